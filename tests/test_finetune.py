"""`vlbeit finetune` and `vlbeit eval` from end to end on shades of grey: laws of the loop, what a
run takes from its start, what it refuses, and that both tasks learn."""

import importlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from run_folders import task_run
from tiny_models import gradients
from toy_run import losses, rows, training_here
from toy_tasks import MODEL, TOYS, TRAIN, VAL, toy_config, toy_finetune, write_start, write_tasks
from untrained_run import FACTS
from vlbeit.checkpoint import find_checkpoint, list_checkpoints
from vlbeit.cli import main
from vlbeit.config import finetune_config, to_dict
from vlbeit.data.order import Visit
from vlbeit.data.task_stream import TaskStream, open_task
from vlbeit.errors import ConfigError, DataBudgetError, InputError
from vlbeit.eval.downstream import evaluate_task, load_task_run
from vlbeit.eval.neighbours import vote
from vlbeit.jsonfile import read_json
from vlbeit.nn.model import VLBeit
from vlbeit.tasks import TASKS, build_task, learn_facts, reached
from vlbeit.tokens.text import TextTokenizer
from vlbeit.train.finetune import begin_weights, finetune
from vlbeit.train.opening import TRAINED, RunningMean

every_task = pytest.mark.parametrize("task", TOYS)


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    with training_here():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data") / "shades")


@pytest.fixture(scope="module")
def start(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with training_here(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLBEIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield write_start(tmp_path_factory.mktemp("runs") / "start", data)


def newest(run_dir: Path) -> Path:
    return list_checkpoints(run_dir)[-1][1]


def learned(run_dir: Path) -> dict[str, str]:
    """sha256 of weights, moments and state of the newest checkpoint."""
    files = read_json(newest(run_dir) / "manifest.json")["files"]
    return {name: files[name]["sha256"] for name in files if name != "config.json"}


RICH: dict[str, dict[str, Any]] = {
    "classification": {
        "model.drop_path": 0.2,
        "optim.ema": 0.9,
        "classification.mixup": 0.8,
        "classification.cutmix": 1.0,
        "classification.erase": 0.5,
        "input.rand_augment.operations": 2,
    },
    "vqa": {"model.drop_path": 0.2, "optim.ema": 0.9, "input.crop.scale": [0.5, 1.0]},
}
"""Everything random that a task knows."""


# ------------------------------------------------------------------ laws of the loop


@every_task
def test_micro_batches_and_workers_change_nothing(task, start, data, tmp_path):
    whole = toy_finetune(task, start, data, tmp_path / "whole", RICH[task] | {"max_steps": 4})
    cut = toy_finetune(
        task, start, data, tmp_path / "cut",
        RICH[task] | {"max_steps": 4, "batch.micro": 3, "input.workers": 2},
    )  # fmt: skip
    assert rows(cut, "ledger.jsonl") == rows(whole, "ledger.jsonl")
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)
    other = toy_finetune(
        task, start, data, tmp_path / "other", RICH[task] | {"max_steps": 4, "seed": 1}
    )
    assert losses(other) != pytest.approx(losses(whole), rel=1e-3)


@every_task
def test_a_resumed_run_ends_with_the_same_bits(task, start, data, tmp_path):
    straight = toy_finetune(task, start, data, tmp_path / "straight", RICH[task])
    run = toy_finetune(task, start, data, tmp_path / "run", RICH[task] | {"max_steps": 4})
    before = learned(run)
    run = toy_finetune(task, start, data, tmp_path / "run", RICH[task])
    assert losses(run) == losses(straight) and len(losses(run)) == 8
    assert learned(run) == learned(straight) != before
    assert rows(run, "ledger.jsonl") == rows(straight, "ledger.jsonl")


def test_a_resume_needs_the_start_no_more(start, data, tmp_path):
    shutil.copytree(start, tmp_path / "start")
    config = {"max_steps": 4}
    toy_finetune("vqa", tmp_path / "start", data, tmp_path / "run", config)
    shutil.rmtree(tmp_path / "start")
    run = toy_finetune("vqa", tmp_path / "start", data, tmp_path / "run")
    assert len(losses(run)) == 8


def test_a_resume_with_other_settings_is_refused(start, data, tmp_path):
    toy_finetune("vqa", start, data, tmp_path / "run", {"max_steps": 4})
    with pytest.raises(ConfigError, match=r"optim\.head_lr was 2\.0 and is 3\.0"):
        toy_finetune("vqa", start, data, tmp_path / "run", {"optim.head_lr": 3.0})
    with pytest.raises(ConfigError, match="other settings"):
        toy_finetune("classification", start, data, tmp_path / "run")


def test_the_order_of_vqa_counts_questions(start, data, tmp_path):
    run = toy_finetune("vqa", start, data, tmp_path / "run", {"max_steps": 12, "save_every": 12})
    ids = [n for row in rows(run, "ledger.jsonl") for n in row["task:vqa"]["vqa"]]
    assert sorted(ids) == sorted(f"vqa:0:{i}" for i in range(2 * TRAIN))  # each once an epoch


# ------------------------------------------------------------------ what comes from the start


@every_task
def test_the_trunk_is_the_starts_and_the_head_is_fresh(task, start, data, tmp_path, capsys):
    run = toy_finetune(
        task, start, data, tmp_path / "run",
        {"max_steps": 1, "optim.lr": 1e-12, "optim.min_lr": 0.0, "optim.weight_decay": 0.0},
    )  # fmt: skip
    told = capsys.readouterr().out
    before = load_file(newest(start) / "model.safetensors")
    after = load_file(newest(run) / "model.safetensors")
    trunk = {name for name in before if not name.startswith("heads.")}
    assert {name for name in after if not name.startswith("task.")} == trunk
    for name in trunk:
        torch.testing.assert_close(after[name], before[name], msg=name)
    assert f"{len(trunk)} tensors taken" in told
    assert "4 dropped: heads.mim.bias" in told and "fresh: task." in told


@pytest.mark.parametrize("fact", ["most_frequent", "classes"])
def test_a_head_is_taken_where_its_outputs_mean_the_same(fact, start, data, tmp_path):
    """Other counts of the same classes leave the head; other names of as many classes do not."""
    first = toy_finetune("classification", start, data, tmp_path / "first", {"max_steps": 1})
    begin = find_checkpoint(first, print)
    facts = read_json(begin.folder / "task.json")
    facts[fact] = facts[fact] + 1 if fact == "most_frequent" else facts[fact][::-1]
    config = toy_config("classification")
    task = build_task(config, facts)
    model = VLBeit(config.model)
    model.put_on(task.head(model, 7))
    fresh = {name: x.clone() for name, x in model.state_dict().items()}
    begin_weights(config, model, task, begin)
    saved = begin.model_tensors()
    head = [name for name in fresh if name.startswith("task.")]
    wanted, other = (saved, fresh) if fact == "most_frequent" else (fresh, saved)
    for name in head:
        assert torch.equal(model.state_dict()[name], wanted[name]), name
    assert any(not torch.equal(wanted[name], other[name]) for name in head)  # negative control


def test_from_scratch_nothing_but_the_shape_is_the_starts(start, data, tmp_path, capsys):
    still = {"max_steps": 1, "optim.lr": 1e-12, "optim.min_lr": 0.0, "optim.weight_decay": 0.0}
    run = toy_finetune("vqa", start, data, tmp_path / "run", still | {"scratch": True, "seed": 9})
    before = load_file(newest(start) / "model.safetensors")
    after = load_file(newest(run) / "model.safetensors")
    fresh = VLBeit(MODEL, seed=9).state_dict()
    for name in ("image.proj.weight", "backbone.blocks.1.experts.vl.fc1.weight"):
        assert not torch.allclose(after[name], before[name])
        torch.testing.assert_close(after[name], fresh[name])
    assert "from scratch" in capsys.readouterr().out
    assert (
        newest(run).joinpath("tokenizer.json").read_bytes()
        == (newest(start) / "tokenizer.json").read_bytes()
    )


def test_another_size_of_picture_resizes_the_positions_and_says_so(start, data, tmp_path, capsys):
    small = load_file(newest(start) / "model.safetensors")
    run = toy_finetune(
        "vqa", start, data, tmp_path / "run",
        {"max_steps": 1, "optim.lr": 1e-12, "optim.min_lr": 0.0, "optim.weight_decay": 0.0,
         "model.image_size": [48, 32], "model.text_positions": 12},
    )  # fmt: skip
    told = capsys.readouterr().out
    assert "image.positions (17 x 32 to 25 x 32)" in told
    assert "text.positions (16 x 32 to 12 x 32)" in told
    large = load_file(newest(run) / "model.safetensors")
    # The same as what the pretrained model does for a picture of that size.
    model = VLBeit(MODEL)
    model.load_state_dict(small)
    pixels = torch.randint(0, 256, (2, 3, 48, 32), dtype=torch.uint8)
    other = VLBeit(replace(MODEL, image_size=(48, 32), text_positions=12))
    other.put_on(torch.nn.Identity())
    other.load_state_dict({k: v for k, v in large.items() if not k.startswith("task.")})
    torch.testing.assert_close(other.image(pixels), model.image(pixels))


def test_the_head_of_the_same_task_goes_on_and_that_of_another_is_dropped(
    start, data, tmp_path, capsys
):
    first = toy_finetune("vqa", start, data, tmp_path / "first", {"max_steps": 2})
    capsys.readouterr()
    toy_finetune("vqa", first, data, tmp_path / "second", {"max_steps": 1})
    assert "fresh" not in capsys.readouterr().out
    toy_finetune("classification", first, data, tmp_path / "third", {"max_steps": 1})
    told = capsys.readouterr().out
    assert "4 fresh: task." in told and "dropped: task." in told


def test_what_a_start_lacks_is_named(start, data, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.width is 64.*keeps that of"):
        toy_finetune("vqa", start, data, tmp_path / "a", {"model.width": 64})
    with pytest.raises(InputError, match="no checkpoint here"):
        toy_finetune("vqa", tmp_path / "nowhere", data, tmp_path / "b")
    with pytest.raises(ConfigError, match="no start"):
        finetune(replace(toy_config("vqa"), data=(str(data),), run_dir=str(tmp_path / "c")))


@pytest.mark.parametrize("paths", [("image",), ("text",), ("pair",), ("image", "text")])
def test_what_a_path_reaches_is_what_gets_a_gradient(paths):
    model = VLBeit(replace(MODEL, relative_bias="shared"))
    model.put_on(torch.nn.Linear(32, 3))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    words = torch.tensor([[2, 7, 3], [2, 8, 3]])
    embed = {
        "image": lambda: model.embed_image(pixels),
        "text": lambda: model.embed_text(words),
        "pair": lambda: model.embed_pair(words, None, pixels),
    }
    assert model.task is not None
    for path in paths:
        model.task(model.backbone(embed[path]())).square().sum().backward()
    assert set(reached(model, paths)) == set(gradients(model))


def test_what_no_path_reaches_does_not_decay(start, data, tmp_path):
    run = toy_finetune("classification", start, data, tmp_path / "run", {"optim.weight_decay": 0.5})
    before = load_file(newest(start) / "model.safetensors")
    after = load_file(newest(run) / "model.safetensors")
    assert torch.equal(after["text.words.weight"], before["text.words.weight"])
    name = "backbone.blocks.0.experts.{}.fc1.weight"
    assert torch.equal(after[name.format("l")], before[name.format("l")])
    assert not torch.equal(after[name.format("v")], before[name.format("v")])


# ------------------------------------------------------------------ the running mean


def test_the_running_mean_is_the_sum_it_stands_for():
    model = VLBeit(MODEL)
    mean = RunningMean(model, 0.75)
    name = "image.cls"
    values = [model.get_parameter(name).detach().clone()]
    for step in range(1, 4):
        with torch.no_grad():
            model.get_parameter(name).add_(float(step))
        values.append(model.get_parameter(name).detach().clone())
        mean.update()
    shares = [0.75**3, 0.25 * 0.75**2, 0.25 * 0.75, 0.25]
    expected = sum(share * value for share, value in zip(shares, values, strict=True))
    torch.testing.assert_close(mean.mean[name], expected)
    with mean.in_place():
        torch.testing.assert_close(model.get_parameter(name), expected)
    assert torch.equal(model.get_parameter(name), values[-1])


def test_a_checkpoint_holds_the_mean_as_its_model_and_the_rest_for_the_resume(
    start, data, tmp_path
):
    plain = toy_finetune("vqa", start, data, tmp_path / "plain")
    mean = toy_finetune("vqa", start, data, tmp_path / "mean", {"optim.ema": 0.9})
    assert losses(mean) == losses(plain)  # it changes what is saved, not what is learned
    weights = load_file(newest(plain) / "model.safetensors")
    kept = load_file(newest(mean) / "optimizer.safetensors")
    averaged = load_file(newest(mean) / "model.safetensors")
    name = "task.fc1.weight"
    assert torch.equal(kept[TRAINED + name], weights[name])
    assert not torch.allclose(averaged[name], weights[name])


# ------------------------------------------------------------------ evaluation


@every_task
def test_figures_do_not_depend_on_the_batch_size(task, start, data, tmp_path):
    place = toy_finetune(task, start, data, tmp_path / "run")
    run = load_task_run(find_checkpoint(place, print), "cpu")
    found = [evaluate_task(run, [str(data)], batch_size=size) for size in (1, 7, 64)]
    assert found[0]["figures"] == found[1]["figures"] == found[2]["figures"]
    assert found[0]["samples"] == VAL * (2 if task == "vqa" else 1)
    assert evaluate_task(run, [str(data)], split="train")["figures"] != found[0]["figures"]


def test_evaluation_needs_the_run_folder_and_the_data_alone(start, data, tmp_path, capsys):
    moved = shutil.copytree(data, tmp_path / "data")
    toy_finetune("vqa", start, moved, tmp_path / "run")
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    shutil.move(moved, tmp_path / "there")
    words = ["eval", str(tmp_path / "elsewhere"), "--data", str(tmp_path / "there"), "--json"]
    capsys.readouterr()
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["task"] == "vqa" and found["samples"] == 2 * VAL
    row = found["figures"]["accuracy"]
    assert row["low"] <= row["value"] <= row["high"] and "baseline" in row and "gain" in row
    assert main(words[:-1]) == 0
    assert "without looking" in capsys.readouterr().out


def test_evaluations_while_training_are_rows_of_eval_jsonl(start, data, tmp_path):
    run = toy_finetune("classification", start, data, tmp_path / "run", {"log.eval_every": 4})
    found = rows(run, "eval.jsonl")
    assert [row["step"] for row in found] == [0, 4, 8]
    assert found[-1]["objectives"]["classification"]["count"] == VAL
    checked = evaluate_task(load_task_run(find_checkpoint(run, print), "cpu"), [str(data)])
    assert found[-1]["figures"]["top1"] == pytest.approx(checked["figures"]["top1"]["value"])


# ------------------------------------------------------------------ neighbours


def test_neighbours_vote_as_a_loop_over_pictures_would():
    generator = torch.Generator().manual_seed(0)
    known = torch.nn.functional.normalize(torch.randn(40, 6, generator=generator), dim=-1)
    asked = torch.nn.functional.normalize(torch.randn(9, 6, generator=generator), dim=-1)
    labels = torch.randint(0, 4, (40,), generator=generator).numpy()
    found = vote(known, labels, asked, 7, 4)
    for place, one in enumerate(asked):
        near = sorted(range(40), key=lambda i: -float(one @ known[i]))[:7]
        votes = [0.0] * 4
        for i in near:
            votes[labels[i]] += math.exp(float(one @ known[i]) / 0.07)
        assert found[place] == votes.index(max(votes))


def test_neighbours_need_no_training(start, data, capsys):
    words = ["eval", str(start), "--data", str(data), "--neighbours", "5", "--json"]
    assert main(words) == 0
    row = json.loads(capsys.readouterr().out)["figures"]["knn"]
    assert row["samples"] == VAL and row["value"] > row["baseline"]["value"]
    assert main([*words, "--scratch"]) == 0
    assert main([*words[:-3], "--neighbours", "0"]) == 78
    assert main(["eval", str(start), "--scratch"]) == 78


# ------------------------------------------------------------------ learning


LONG = {
    "max_steps": 150,
    "save_every": 150,
    "optim.total_steps": 150,
    "optim.warmup_steps": 10,
    "batch.size": 20,
    "batch.micro": 20,
}


def test_classification_learns_what_the_picture_shows(start, data, tmp_path):
    settings = LONG | {"max_steps": 60, "optim.lr": 1e-2, "classification.label_smoothing": 0.0}
    run = toy_finetune("classification", start, data, tmp_path / "run", settings)
    found = evaluate_task(load_task_run(find_checkpoint(run, print), "cpu"), [str(data)])
    assert found["figures"]["top1"]["value"] > 0.9
    assert found["figures"]["top1"]["gain"]["low"] > 0.2


@pytest.mark.slow
def test_vqa_learns_to_look_and_to_read(start, data, tmp_path):
    longer = LONG | {"max_steps": 250, "save_every": 250, "optim.total_steps": 250}
    run = toy_finetune("vqa", start, data, tmp_path / "run", longer)
    found = evaluate_task(load_task_run(find_checkpoint(run, print), "cpu"), [str(data)])
    assert found["figures"]["accuracy/look"]["value"] > 0.9
    assert found["figures"]["accuracy/read"]["value"] > 0.9
    assert found["figures"]["accuracy/look"]["baseline"]["value"] < 0.5


def test_a_linear_probe_leaves_the_trunk_alone(start, data, tmp_path):
    settings = LONG | {"max_steps": 40, "optim.lr": 1e-1, "classification.probe": True}
    run = toy_finetune("classification", start, data, tmp_path / "run", settings)
    before = load_file(newest(start) / "model.safetensors")
    after = load_file(newest(run) / "model.safetensors")
    for name, value in after.items():
        if not name.startswith("task."):
            assert torch.equal(value, before[name]), name
    assert losses(run)[-1] < 0.8 * losses(run)[0]


# ------------------------------------------------------------------ refusals


def test_data_without_the_task_is_refused_with_what_it_has(start, data, tmp_path):
    tree = json.loads((data / "dataset.json").read_text())
    tree["sources"] = [s for s in tree["sources"] if s["stream"] != "task:vqa"]
    folder = shutil.copytree(data, tmp_path / "data")
    (folder / "dataset.json").write_text(json.dumps(tree))
    with pytest.raises(InputError, match=r"no task:vqa source.*task:classification \(train\)"):
        toy_finetune("vqa", start, folder, tmp_path / "run")


def test_a_label_beyond_the_classes_is_refused(start, tmp_path):
    folder = write_tasks(tmp_path / "data", {7: {"label": 4}})
    with pytest.raises(InputError, match="label 4 .* none of the 4 classes"):
        toy_finetune("classification", start, folder, tmp_path / "run")


def test_bad_records_are_skipped_by_name(start, tmp_path):
    folder = write_tasks(tmp_path / "data", {3: {"questions": "none"}, 5: {"questions": [{}]}})
    run = toy_finetune("vqa", start, folder, tmp_path / "run", {"max_steps": 12})
    found = {(row["member"], row["reason"]) for row in rows(run, "skips.jsonl")}
    assert found == {("0003.json", "bad_json"), ("0005.json", "bad_json")}


def test_a_source_without_a_usable_sample_ends_the_run_at_once(start, tmp_path):
    bad = {"label": "three"}
    folder = write_tasks(tmp_path / "data", dict.fromkeys(range(TRAIN), bad))
    with pytest.raises(
        DataBudgetError, match=r"no usable sample in source classification.*bad_json"
    ):
        toy_finetune("classification", start, folder, tmp_path / "run")


@pytest.mark.parametrize(
    ("task", "settings", "named"),
    [
        ("classification", {"input.text_length": 12}, "has no text"),
        ("vqa", {"input.text_length": 0}, r"input\.text_length must be 3\.\.16"),
        ("vqa", {"batch.size": 0}, r"batch\.size must be at least 1"),
        ("vqa", {"optim.ema": 1.0}, r"optim\.ema must be in \[0, 1\)"),
        ("vqa", {"vqa.min_count": 0}, r"vqa\.min_count"),
        ("vqa", {"vqa.min_count": 1000}, r"lower it or give a list"),
        ("vqa", {"vqa.answers": "/nowhere/list.txt"}, r"vqa\.answers /nowhere/list\.txt"),
        ("classification", {"classification.label_smoothing": 2.0}, "label_smoothing"),
    ],
)
def test_settings_out_of_range_are_refused(task, settings, named, start, data, tmp_path):
    with pytest.raises((ConfigError, InputError), match=named):
        toy_finetune(task, start, data, tmp_path / "run", settings)
    assert not list_checkpoints(tmp_path / "run")


def test_a_run_of_a_release_that_kept_less_of_its_task_is_refused_by_folder_and_name(
    data, tmp_path, capsys
):
    facts = {name: value for name, value in FACTS["vqa"].items() if name != "log_odds"}
    old = find_checkpoint(task_run(tmp_path / "old", "vqa", facts), print)
    its_own = replace(finetune_config(old.config), run_dir=str(tmp_path / "old"))
    with pytest.raises(InputError) as of_resume:
        finetune(replace(its_own, data=(str(data),)))
    assert main(["eval", str(old.folder), "--data", str(data)]) == InputError.exit_code
    for said in (str(of_resume.value), capsys.readouterr().err):
        assert str(old.folder) in said and "have no log_odds (found answers," in said
        assert f"vlbeit finetune vqa --start {its_own.start}" in said  # what to do
    # Nothing else is wrong with such a folder.
    load_task_run(find_checkpoint(task_run(tmp_path / "whole", "vqa"), print), "cpu")


# ------------------------------------------------------------------ the command


def test_the_command_names_tasks_and_the_nearest_one(capsys):
    assert main(["finetune"]) == 78
    assert main(["finetune", "--help"]) == 0
    assert "classification, vqa" in capsys.readouterr().out
    assert main(["finetune", "vqq"]) == 78
    assert "did you mean vqa?" in capsys.readouterr().err
    assert main(["finetune", "vqa", "huge"]) == 78


def test_without_a_recipe_the_starts_is_taken(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("vlbeit.train.finetune.finetune", seen.append)
    (tmp_path / "config.json").write_text('{"recipe": "small"}')
    words = ["finetune", "vqa", "--start", str(tmp_path), "--scratch", "true"]
    assert main(words) == 0
    assert (seen[0].recipe, seen[0].task, seen[0].scratch) == ("small", "vqa", True)
    assert main([*words[:-1], "false"]) == 0 and not seen[1].scratch
    assert main([*words, "--no-scratch"]) == 78  # set twice
    (tmp_path / "config.json").write_text('{"recipe": "toy"}')
    assert main(words) == 78
    assert main(["finetune", "vqa", "--start", str(tmp_path / "nowhere")]) == 66


def test_every_task_has_a_module_a_config_and_recipes():
    from vlbeit.config import FINETUNE_CONFIGS
    from vlbeit.recipes import FINETUNE

    assert set(TASKS) == set(FINETUNE_CONFIGS) == set(FINETUNE)


@every_task
def test_a_task_is_what_its_facts_say(task, data):
    """Facts pass through JSON, and the same facts give the same samples."""
    config = replace(toy_config(task, RICH[task]), data=(str(data),))
    assert finetune_config(to_dict(config)) == config
    sources = open_task(config.data, f"task:{task}", "train")
    facts = learn_facts(config, sources)
    assert set(facts) == set(importlib.import_module(TASKS[task]).FACTS)
    text = TextTokenizer.load(data)
    one, other = (
        TaskStream(build_task(config, f), sources, text, config, training=True)
        for f in (facts, json.loads(json.dumps(facts)))
    )
    made = [s.stack([s.sample(Visit(task, 1, i)) for i in (3, 11)])["arrays"] for s in (one, other)]
    assert made[0].keys() == made[1].keys()
    assert all((made[0][name] == made[1][name]).all() for name in made[0])
