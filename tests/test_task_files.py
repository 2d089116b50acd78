"""What holds of every task that is no special case: sums, batches, learning, refusals, recipes."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import fill_normal, gradients
from tiny_tasks import (
    CONFIGS,
    TRAIN,
    batch_of,
    entailment_members,
    statement_members,
    toy_config,
    toy_finetune,
    toy_task,
    write_start,
    write_tasks,
)
from toy_run import losses, rows, training_here
from vlbeit.checkpoint import find_checkpoint, list_checkpoints
from vlbeit.config import finetune_config, to_dict
from vlbeit.data.order import Visit
from vlbeit.data.records import BadSample
from vlbeit.data.task_stream import open_task
from vlbeit.errors import ConfigError, InputError
from vlbeit.eval.downstream import evaluate_task, load_task_run
from vlbeit.jsonfile import read_json
from vlbeit.recipes import FINETUNE
from vlbeit.tasks import TASKS, learn_facts, reached
from vlbeit.types import Score
from vlbeit.validate import validate_finetune

every_task = pytest.mark.parametrize("task", CONFIGS)
with_text = pytest.mark.parametrize("task", ["statements", "entailment"])


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    with training_here():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data") / "toy")


@pytest.fixture(scope="module")
def start(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with training_here():
        yield write_start(tmp_path_factory.mktemp("runs") / "start", data)


def summed(parts: list[dict[str, Score]]) -> dict[str, tuple[Tensor, int, int]]:
    return {
        name: (
            torch.stack([part[name].loss_sum for part in parts]).sum(),
            sum(int(part[name].count) for part in parts),
            sum(int(part[name].correct) for part in parts),
        )
        for name in parts[0]
    }


@every_task
@pytest.mark.parametrize("training", [True, False])
def test_micro_batches_add_up_and_count_says_before_what_score_counts(task, training, data):
    made, stream, model = toy_task(task, data, {"model.drop_path": 0.3}, training=training)
    fill_normal(model)
    whole = batch_of(stream, task, list(range(9)))
    if training:
        assert whole.depth_draws is not None and whole.depth_draws.shape[1] == len(made.paths)
    parts = [batch_of(stream, task, places) for places in ([0, 1], [2, 3, 4, 5, 6], [7, 8])]
    one = summed([made.score(model, model.task, whole)])
    several = summed([made.score(model, model.task, part) for part in parts])
    assert one.keys() == several.keys() == made.weights.keys()
    for name, (loss, count, right) in one.items():
        torch.testing.assert_close(several[name][0], loss, rtol=1e-5, atol=1e-4)
        assert several[name][1:] == (count, right)
        assert made.count(whole)[name] == count == sum(made.count(p)[name] for p in parts)
    other = summed([made.score(model, model.task, batch_of(stream, task, list(range(1, 10))))])
    assert all(abs(float((other[name][0] - one[name][0]).detach())) > 1e-3 for name in one)


@every_task
def test_a_prediction_does_not_depend_on_the_rest_of_its_batch(task, data):
    made, stream, model = toy_task(task, data, training=False)
    fill_normal(model)
    model.eval()
    places = list(range(12))
    with torch.no_grad():
        together = made.predict(model, model.task, batch_of(stream, task, places))
        alone = [
            made.predict(model, model.task, batch_of(stream, task, [place]))[0] for place in places
        ]
        backwards = made.predict(model, model.task, batch_of(stream, task, places[::-1]))[::-1]
    for found in (alone, backwards):
        for one, other in zip(together, found, strict=True):
            for name, value in one.items():
                assert other[name] == (
                    pytest.approx(value, abs=1e-5) if name.startswith("prob") else value
                )
    assert any(row != together[0] for row in together)  # it is not the same for all


@every_task
def test_all_that_a_task_reaches_and_does_not_freeze_gets_a_gradient(task, data):
    made, stream, model = toy_task(task, data)
    fill_normal(model)
    scores = made.score(model, model.task, batch_of(stream, task, list(range(6))))
    torch.stack([score.loss_sum for score in scores.values()]).sum().backward()
    wanted = {
        name
        for name in reached(model, made.paths)
        if name.startswith("task.") or not made.frozen(name)
    }
    assert {n for n, g in gradients(model).items() if g.abs().sum() > 0} == wanted


@every_task
def test_a_head_is_the_same_for_the_same_seed_and_norms_begin_as_norms(task, data):
    made, _, model = toy_task(task, data)
    again, other = (made.head(model, seed).state_dict() for seed in (0, 1))
    assert model.task is not None
    for name, value in model.task.state_dict().items():
        assert torch.equal(value, again[name])
        if "norm" in name or name.endswith("bias") or name == "pyramid.up4.1.weight":
            expected = torch.ones_like(value) if name.endswith("weight") else value * 0
            assert torch.equal(value, expected), name
        else:
            assert not torch.equal(value, other[name])


@every_task
def test_the_same_sample_twice_is_the_same_and_epochs_differ_where_something_is_drawn(task, data):
    _, stream, _ = toy_task(task, data, {"model.drop_path": 0.1})
    first, again, later = (batch_of(stream, task, [3], epoch) for epoch in (0, 0, 1))
    assert torch.equal(first.pixels, again.pixels)
    assert not torch.equal(first.depth_draws, later.depth_draws)
    assert torch.equal(first.pixels, later.pixels) == (task != "segmentation")


# ------------------------------------------------------------------ whole runs

LESSONS: dict[str, dict[str, Any]] = {
    "statements": {"max_steps": 220, "optim.total_steps": 220, "optim.lr": 2e-3},
    "entailment": {"max_steps": 120, "optim.total_steps": 120},
    "segmentation": {"max_steps": 60, "optim.total_steps": 60},
}


@every_task
@pytest.mark.slow
def test_a_task_is_learned_and_beats_the_guess_that_does_not_look(task, start, data, tmp_path):
    run = toy_finetune(task, start, data, tmp_path / "run", LESSONS[task])
    seen = losses(run)
    assert sum(seen[-10:]) < 0.6 * sum(seen[:10])
    checkpoint = find_checkpoint(str(run), print)
    found = evaluate_task(load_task_run(checkpoint, "cpu"))
    main = next(iter(found["figures"].values()))
    assert main["value"] > 0.8
    assert main["gain"]["low"] > 0.1
    assert main["value"] - main["baseline"]["value"] == pytest.approx(main["gain"]["value"])
    one_by_one = evaluate_task(load_task_run(checkpoint, "cpu"), batch_size=1)
    for name, row in found["figures"].items():
        assert one_by_one["figures"][name]["value"] == pytest.approx(row["value"], abs=1e-3)


@every_task
def test_a_resumed_run_ends_with_the_same_bits_and_micro_batches_change_nothing(
    task, start, data, tmp_path
):
    drops = {"model.drop_path": 0.2, "max_steps": 4}
    straight = toy_finetune(task, start, data, tmp_path / "straight", drops)
    toy_finetune(task, start, data, tmp_path / "run", drops | {"max_steps": 2})
    run = toy_finetune(task, start, data, tmp_path / "run", drops)
    assert losses(run) == losses(straight) and len(losses(run)) == 4
    files = [
        read_json(list_checkpoints(r)[-1][1] / "manifest.json")["files"] for r in (run, straight)
    ]
    for name in ("model.safetensors", "optimizer.safetensors", "task.json"):
        assert files[0][name] == files[1][name]
    cut = toy_finetune(task, start, data, tmp_path / "cut", drops | {"batch.micro": 5})
    assert rows(cut, "ledger.jsonl") == rows(straight, "ledger.jsonl")
    assert losses(cut) == pytest.approx(losses(straight), rel=1e-4)


# ------------------------------------------------------------------ records that cannot be used


def with_json(members: dict[str, bytes], **changes: Any) -> dict[str, bytes]:
    body = json.loads(members["json"]) | changes
    return members | {"json": json.dumps(body).encode()}


def without(members: dict[str, bytes], name: str) -> dict[str, bytes]:
    return {key: value for key, value in members.items() if key != name}


BAD: list[tuple[str, dict[str, bytes], str]] = [
    (
        "statements",
        without(statement_members(0), "right.png"),
        "no_image.*no right picture; it has",
    ),
    ("statements", without(statement_members(0), "json"), "no_json"),
    ("statements", with_json(statement_members(0), truth="True"), "expected bool, found 'True'"),
    ("statements", with_json(statement_members(0), statement=3), '"statement": expected str'),
    ("statements", with_json(statement_members(0), statement=" "), "empty_text"),
    ("statements", statement_members(0) | {"left.png": b"<html>"}, "not_an_image"),
    ("entailment", with_json(entailment_members(0), label=3), r'bad_label \("label" is 3; 0 is'),
    ("entailment", with_json(entailment_members(0), label=True), "expected int, found True"),
    ("entailment", with_json(entailment_members(0), hypothesis=None), '"hypothesis": expected str'),
    ("entailment", without(entailment_members(0), "png"), "no_image"),
]


@pytest.mark.parametrize(("task", "members", "told"), BAD)
def test_a_bad_record_is_named_with_what_was_expected_and_found(task, members, told, tmp_path):
    data = write_tasks(tmp_path / "data", {(task, 0): members})
    _, stream, _ = toy_task(task, data)
    with pytest.raises(BadSample, match=told) as caught:
        stream.sample(Visit(task, 0, 0))
    assert "0000" in str(caught.value)
    stream.sample(Visit(task, 0, 1))


@with_text
def test_data_of_which_no_record_can_be_used_is_refused(task, tmp_path):
    make = {"statements": statement_members, "entailment": entailment_members}[task]
    name = {"statements": "truth", "entailment": "label"}[task]
    broken = {(task, i): with_json(make(i), **{name: "?"}) for i in range(TRAIN)}
    config = toy_config(task, write_tasks(tmp_path / "data", broken))
    with pytest.raises(InputError, match=f'no record of {task} has a "{name}"'):
        learn_facts(config, open_task(config.data, f"task:{task}", "train"))


# ------------------------------------------------------------------ recipes

ALL_RECIPES = [(task, name) for task in FINETUNE for name in FINETUNE[task]]


@pytest.mark.parametrize(("task", "name"), ALL_RECIPES)
def test_a_recipe_is_complete_and_says_with_which_command_it_runs(task, name):
    config = FINETUNE[task][name]()
    assert (config.task, config.recipe) == (task, name)
    assert f"vlbeit finetune {task} {name} --start" in (FINETUNE[task][name].__doc__ or "")
    assert config.run_dir == f"runs/{name}-{task}"
    assert config.max_steps == config.optim.total_steps
    validate_finetune(dataclasses.replace(config, data=("x",), start="x"))
    assert finetune_config(json.loads(json.dumps(to_dict(config)))) == config


def test_every_task_has_a_config_recipes_and_a_page():
    from vlbeit.config import FINETUNE_CONFIGS

    assert set(TASKS) == set(FINETUNE) == set(FINETUNE_CONFIGS)
    assert all(set(FINETUNE[task]) == {"tiny", "small", "base"} for task in TASKS)


def test_evaluation_may_change_what_was_not_learned_and_nothing_else(start, data, tmp_path):
    run = toy_finetune("segmentation", start, data, tmp_path / "run", {"max_steps": 1})
    checkpoint = find_checkpoint(str(run), print)
    changed = load_task_run(checkpoint, "cpu", {"segmentation.flip": True})
    assert (
        changed.config.segmentation.flip and not load_task_run(checkpoint).config.segmentation.flip
    )
    with pytest.raises(ConfigError, match=r"--set segmentation\.channels: .*segmentation\.scales"):
        load_task_run(checkpoint, "cpu", {"segmentation.channels": 32})
    with pytest.raises(ConfigError, match=r"segmentation\.stride must be above 0"):
        load_task_run(checkpoint, "cpu", {"segmentation.stride": 0.0})
    words = toy_finetune("entailment", start, data, tmp_path / "words", {"max_steps": 1})
    with pytest.raises(ConfigError, match="may change no setting"):
        load_task_run(find_checkpoint(str(words), print), "cpu", {"segmentation.flip": True})


def test_the_pass_over_both_pictures_equals_one_pass_for_each(data):
    made, stream, model = toy_task("statements", data, {"model.drop_path": 0.4})
    fill_normal(model)
    batch = batch_of(stream, "statements", list(range(5)))
    sides = [
        model.backbone(
            model.embed_pair(
                batch.words, batch.word_valid, batch.image(side), depth_draws=batch.draws(side)
            )
        )[:, 0]
        for side in range(2)
    ]
    expected = model.task(torch.cat(sides, dim=1))
    torch.testing.assert_close(made.logits(model, model.task, batch), expected)
    swapped = model.task(torch.cat(sides[::-1], dim=1))
    assert not torch.allclose(expected, swapped, atol=1e-3)
