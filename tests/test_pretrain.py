"""`vlbeit pretrain` from end to end on a toy world: what a run writes, refuses, skips and resumes.

Runs are real ones, of a few steps, in this process; only the machine's speed is not measured.
Kills, signals, full disks and several processes are in tests/faults.
"""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from toy_records import image_source, pair_source, text_source, toy_tokenizer
from toy_run import (
    TOY,
    changed,
    copied,
    losses,
    rows,
    toy_run,
    training_here,
    write_dataset,
    write_toy_data,
)
from vlbeit.checkpoint import find_checkpoint, list_checkpoints, load_newest, open_checkpoint
from vlbeit.data.loader import build_streams, open_streams
from vlbeit.data.order import Visit
from vlbeit.errors import ConfigError, DataBudgetError, InputError, NonFiniteError
from vlbeit.nn.model import VLBeit
from vlbeit.objectives import OBJECTIVES, score_batch
from vlbeit.train import loop
from vlbeit.train.opening import check_same_data
from vlbeit.types import STREAMS, Batch, Score

IMAGES_ONLY = {"batch.texts": 0, "batch.pairs": 0}
TEXTS_ONLY = {"batch.images": 0, "batch.pairs": 0}
PAIRS_ONLY = {"batch.images": 0, "batch.texts": 0}
PATCHES = 6  # hidden ones of 16, by masking.image


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    with training_here():
        yield


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with training_here(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLBEIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_data(tmp_path_factory.mktemp("data") / "toy")


@pytest.fixture(scope="module")
def ten(data: Path, cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of ten steps with checkpoints at 5 and 10; to be looked at only."""
    return toy_run(data, tmp_path_factory.mktemp("runs") / "ten")


@pytest.fixture(scope="module")
def five(data: Path, cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, stopped after five steps; to be looked at or copied."""
    return toy_run(data, tmp_path_factory.mktemp("runs") / "five", {"max_steps": 5})


def ledger_ids(run_dir: Path, stream: str) -> Iterator[tuple[int, str]]:
    """(step, sample id) of a stream, in order within each source."""
    for row in rows(run_dir, "ledger.jsonl"):
        for ids in row.get(stream, {}).values():
            yield from ((row["step"], name) for name in ids)


def saved_steps(run_dir: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(run_dir)]


def state_of(run_dir: Path) -> dict[str, Any]:
    newest = load_newest(run_dir, print)
    assert newest is not None
    return newest.state


def weights_of(run_dir: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    folders = dict(list_checkpoints(run_dir))
    return open_checkpoint(folders[step or max(folders)]).model_tensors()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# ------------------------------------------------------------------ what a run writes


def test_every_step_has_one_row_with_the_promised_keys(ten: Path) -> None:
    found = rows(ten)
    assert [row["step"] for row in found] == list(range(1, 11))
    for row in found:
        assert set(row) == {
            "step", "loss", "objectives", "lr", "grad_norm", "seconds", "waited",
            "samples_per_second", "tokens_per_second", "padding_share", "limit_share", "memory_mb",
            "activation_mb",
        }  # fmt: skip
        assert list(row["objectives"]) == list(OBJECTIVES)
        for score in row["objectives"].values():
            assert set(score) == {"loss", "count", "accuracy"}
            assert score["loss"] > 0 and 0 <= score["accuracy"] <= 1 and score["count"] > 0
        assert row["grad_norm"] > 0 and row["samples_per_second"] > 0 and row["memory_mb"] > 50
        assert set(row["activation_mb"]) == set(STREAMS)  # empty where malloc is not glibc's
        assert all(0.1 < mb < 50 for mb in row["activation_mb"].values())
    assert [row["lr"] for row in found[:3]] == [1e-3, 2e-3, pytest.approx(2e-3, rel=0.01)]


def test_the_loss_is_the_weighted_sum_of_its_objectives_to_the_last_bit(
    data: Path, ten: Path, tmp_path: Path
) -> None:
    weights = {"mlm": 0.5, "mim": 2.0, "mvlm_text": 1.0, "mvlm_image": 0.25}
    settings = {f"objective.{name}": weight for name, weight in weights.items()}
    other = toy_run(data, tmp_path / "run", {**settings, "max_steps": 3})
    for run, factors in ((ten, dict.fromkeys(weights, 1.0)), (other, weights)):
        for row in rows(run):
            total = sum(factors[name] * s["loss"] for name, s in row["objectives"].items())
            assert float(total).hex() == row["loss"]
    # Same data, same weights at the start: only the sum differs.
    assert rows(other)[0]["objectives"] == rows(ten)[0]["objectives"]
    assert rows(other)[0]["loss"] != rows(ten)[0]["loss"]


def test_the_ledger_lists_every_sample_once_an_epoch(data: Path, tmp_path: Path) -> None:
    run = toy_run(data, tmp_path / "run", {"max_steps": 21, "save_every": 100})
    sizes = {"photos": 40, "drawings": 10, "captioned": 48, "alt-texts": 21}
    ledger = rows(run, "ledger.jsonl")
    assert [row["step"] for row in ledger] == list(range(1, 22))
    for row in ledger:
        counts = {s: sum(len(ids) for ids in row[s].values()) for s in ("image", "text", "pair")}
        assert counts == {"image": 6, "text": 5, "pair": 8}
    seen: dict[str, list[tuple[int, int]]] = {}
    for stream in ("image", "text", "pair"):
        for _, name in ledger_ids(run, stream):
            source, epoch, index = name.rsplit(":", 2)
            seen.setdefault(source, []).append((int(epoch), int(index)))
    sizes["prose"] = 1 + max(index for _, index in seen["prose"])
    assert seen.keys() == sizes.keys()
    for source, visits in seen.items():
        size = sizes[source]
        assert [epoch for epoch, _ in visits] == [i // size for i in range(len(visits))]
        for epoch in range(len(visits) // size):
            once = [index for e, index in visits if e == epoch]
            assert sorted(once) == list(range(size))
        assert [i for e, i in visits if e == 0] != [i for e, i in visits if e == 1]
    assert len(seen["photos"]) > 2 * 40  # more than one epoch was looked at


def test_a_digest_ledger_says_the_same_in_fewer_bytes(
    data: Path, ten: Path, tmp_path: Path
) -> None:
    run = toy_run(data, tmp_path / "run", {"log.ledger": "digest", "max_steps": 3})
    for short, full in zip(rows(run, "ledger.jsonl"), rows(ten, "ledger.jsonl"), strict=False):
        for stream in ("image", "text", "pair"):
            assert short[stream] == {n: loop.digest_of(ids) for n, ids in full[stream].items()}


def test_metrics_can_be_thinned_and_the_ledger_cannot(data: Path, tmp_path: Path) -> None:
    run = toy_run(data, tmp_path / "run", {"log.every": 4})
    assert [row["step"] for row in rows(run)] == [4, 8]
    assert [row["step"] for row in rows(run, "ledger.jsonl")] == list(range(1, 11))


def test_checkpoints_come_at_their_interval_and_at_the_end(data: Path, tmp_path: Path) -> None:
    run = toy_run(data, tmp_path / "run", {"save_every": 3, "max_steps": 7})
    assert saved_steps(run) == [3, 6, 7]
    run = toy_run(data, tmp_path / "short", {"save_every": 2, "max_steps": 7, "log.keep": 2})
    assert saved_steps(run) == [6, 7]


# ------------------------------------------------------------------ resume


def test_a_run_in_two_parts_is_the_run_in_one(ten: Path, five: Path, data: Path, tmp_path: Path):
    run = toy_run(data, copied(five, tmp_path / "run"))
    assert losses(run) == losses(ten)
    assert rows(run, "ledger.jsonl") == rows(ten, "ledger.jsonl")
    assert same(weights_of(run), weights_of(ten))
    assert not same(weights_of(run), weights_of(five))  # five more steps did something
    assert "going on from" in (run / "log.txt").read_text()


REFUSED: list[tuple[str, Any]] = [
    ("seed", 1),
    ("precision", "bf16"),
    ("model.layers", 3),
    ("model.drop_path", 0.0),
    ("batch.pairs", 7),
    ("masking.pair_text", 0.4),
    ("objective.mvlm", "half"),
    ("objective.mim", 0.5),
    ("optim.lr", 1e-3),
    ("optim.total_steps", 60),
    ("input.shuffle_window", 100),
    ("input.pairs.flip", 0.5),
]


@pytest.mark.parametrize(("setting", "value"), REFUSED, ids=[name for name, _ in REFUSED])
def test_a_resume_with_another_setting_is_refused_by_name(
    five: Path, data: Path, setting: str, value: Any
) -> None:
    before = (five / "metrics.jsonl").read_bytes(), (five / "config.json").read_bytes()
    with pytest.raises(ConfigError) as refused:
        toy_run(data, five, {setting: value})
    assert refused.value.exit_code == 78
    told = str(refused.value)
    assert f"{setting} was " in told and f"is {value!r}" in told and "step-0000005" in told
    assert before == ((five / "metrics.jsonl").read_bytes(), (five / "config.json").read_bytes())


def test_all_settings_that_differ_are_named_at_once(five: Path, data: Path) -> None:
    with pytest.raises(ConfigError, match=r"optim\.clip was 3\.0 and is 1\.0; seed was 0 and is 4"):
        toy_run(data, five, {"seed": 4, "optim.clip": 1.0})


ALLOWED: list[dict[str, Any]] = [
    {"max_steps": 8},
    {"save_every": 2},
    {"log.every": 1, "log.keep": 2, "log.ledger": "full", "log.print_every": 1},
    {"input.skip_budget": 0.5, "input.loader_timeout": 30.0},
    {"input.workers": 1},
    {"runtime.step_timeout": 10.0},
    {"runtime.checkpoint_activations": True},
    {"batch.micro": 3},
    {"runtime.exact": 4},
]


@pytest.mark.parametrize("settings", ALLOWED, ids=lambda settings: ",".join(settings))
def test_a_resume_may_change_what_changes_only_rounding(
    five: Path, ten: Path, data: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    run = toy_run(data, copied(five, tmp_path / "run"), {"max_steps": 8} | settings)
    assert rows(run, "ledger.jsonl") == rows(ten, "ledger.jsonl")[:8]
    assert losses(run) == pytest.approx(losses(ten)[:8], rel=1e-5)
    if not settings.keys() & {"batch.micro", "runtime.exact"}:
        assert losses(run) == losses(ten)[:8]


def test_a_resume_on_other_records_is_refused_with_both_counts(
    five: Path, data: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(data, other)
    # Moved or copied, the same data is the same data.
    moved = toy_run(other, copied(five, tmp_path / "moved"), {"max_steps": 6})
    assert len(rows(moved)) == 6
    write_dataset(
        other,
        {
            "image": [image_source(other), image_source(other, "drawings", 10)],
            "text": [text_source(other)],
            "pair": [pair_source(other, records=47), pair_source(other, "alt-texts", 21)],
        },
    )
    with pytest.raises(InputError) as refused:
        toy_run(other, five)
    assert refused.value.exit_code == 66
    told = str(refused.value)
    assert "'captioned': 48" in told and "'captioned': 47" in told and "--data" in told


def test_a_resume_on_as_many_other_records_is_refused_with_the_source(
    five: Path, data: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(data, other)
    write_dataset(
        other,
        {
            "image": [image_source(other), image_source(other, "drawings", 10)],
            "text": [text_source(other)],
            "pair": [pair_source(other, bad={5}), pair_source(other, "alt-texts", 21)],
        },
    )
    with pytest.raises(InputError, match="source captioned of pair has as many records") as told:
        toy_run(other, five)
    assert told.value.exit_code == 66


def test_a_checkpoint_that_does_not_know_its_records_contents_goes_on(five: Path) -> None:
    found = find_checkpoint(five, print)
    counts = found.state["sources"]
    nothing = {s: dict.fromkeys(sources, "") for s, sources in counts.items()}
    old = replace(found, state={k: v for k, v in found.state.items() if k != "contents"})
    check_same_data(old, counts, nothing)
    check_same_data(found, counts, found.state["contents"])
    with pytest.raises(InputError, match="has as many records"):
        check_same_data(found, counts, nothing)


def test_a_resume_without_one_of_its_sources_is_refused(five: Path, data: Path, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(data, other)
    tree = json.loads((other / "dataset.json").read_text())
    tree["sources"] = [row for row in tree["sources"] if row["name"] != "drawings"]
    (other / "dataset.json").write_text(json.dumps(tree))
    with pytest.raises(InputError, match="drawings"):
        toy_run(other, five)


def test_a_run_that_is_complete_is_left_alone(five: Path, data: Path, tmp_path: Path) -> None:
    run = copied(five, tmp_path / "run")
    kept = ("metrics.jsonl", "ledger.jsonl", "checkpoints/step-0000005/manifest.json")
    before = [(run / name).read_bytes() for name in kept]
    saved = (run / kept[-1]).stat().st_mtime_ns
    for limit in (5, 4):
        assert toy_run(data, run, {"max_steps": limit}) == run
        assert f"step 5 of {limit} is already done" in (run / "log.txt").read_text()
    assert before == [(run / name).read_bytes() for name in kept]
    assert saved_steps(run) == [5] and (run / kept[-1]).stat().st_mtime_ns == saved


# ------------------------------------------------------------------ tokenizers


def test_a_tokenizer_that_does_not_fit_names_the_flag_that_makes_it_fit(
    data: Path, tmp_path: Path
) -> None:
    pieces = toy_tokenizer().size
    for settings, words in (
        ({"model.vocab": 50}, ["model.vocab is 50", f"--model.vocab {pieces}"]),
        ({"model.codes": 32}, ["model.codes is 32", "--model.codes 16"]),
        ({"model.patch": 16}, ["model.patch is 16", "visual tokenizer's is 8"]),
    ):
        with pytest.raises(ConfigError) as refused:
            toy_run(data, tmp_path / "run", settings)
        assert refused.value.exit_code == 78
        assert all(word in str(refused.value) for word in words), refused.value
    # More rows than pieces are allowed: a vocabulary may hold fewer than asked for.
    toy_run(data, tmp_path / "wide", {"model.vocab": pieces + 8, "max_steps": 1})


def test_a_tokenizer_that_is_named_and_not_there_is_an_input_error(data: Path, tmp_path: Path):
    for setting in ("tokenizers.text", "tokenizers.visual"):
        with pytest.raises(InputError, match=rf"{setting}: .*nowhere"):
            toy_run(data, tmp_path / "run", {setting: str(tmp_path / "nowhere")})


def test_the_checkpoint_holds_the_tokenizers_that_were_used(ten: Path, data: Path) -> None:
    for name in ("tokenizer.json", "visual/config.json", "visual/model.safetensors"):
        assert (ten / "checkpoints/step-0000010" / name).read_bytes() == (data / name).read_bytes()


# ------------------------------------------------------------------ arithmetic of a step


def test_micro_batches_add_up_to_the_batch(data: Path, tmp_path: Path) -> None:
    whole = toy_run(data, tmp_path / "whole", {"batch.micro": 64})
    for micro in (1, 3):
        parts = toy_run(data, tmp_path / f"micro{micro}", {"batch.micro": micro})
        assert rows(parts, "ledger.jsonl") == rows(whole, "ledger.jsonl")
        assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
        for one, other in zip(rows(parts), rows(whole), strict=True):
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
            for name in OBJECTIVES:
                assert one["objectives"][name]["count"] == other["objectives"][name]["count"]


def test_micro_batches_leave_the_order_of_a_run_alone(tmp_path: Path) -> None:
    """With more pairs than fill a step, so that buckets of like length matter."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_toy_data(folder, {"pair": [pair_source(folder, records=200)]})
    ledgers = []
    for micro in (4, 16, 64):
        run = toy_run(
            folder,
            tmp_path / f"micro{micro}",
            PAIRS_ONLY | {"batch.pairs": 32, "batch.micro": micro, "max_steps": 4},
        )
        ledgers.append(rows(run, "ledger.jsonl"))
    assert ledgers[0] == ledgers[1] == ledgers[2]


def expected_counts(data: Path, run: Path, settings: dict[str, Any]) -> list[dict[str, int]]:
    """Positions to predict in each step, counted on the samples that the ledger names."""
    config = changed(replace(TOY, data=(str(data),)), settings)
    streams = {
        stream.stream: stream
        for stream in build_streams(config, open_streams(config, "train"), toy_tokenizer())
    }
    found = []
    for row in rows(run, "ledger.jsonl"):
        counts: Counter[str] = Counter()
        for stream, sources in row.items():
            for name in [] if stream == "step" else [n for ids in sources.values() for n in ids]:
                source, epoch, index = name.rsplit(":", 2)
                sample = streams[stream].sample(Visit(source, int(epoch), int(index)))
                words = 0 if sample.word_masked is None else int(sample.word_masked.sum())
                if stream == "text":
                    counts["mlm"] += words
                elif stream == "image":
                    counts["mim"] += PATCHES
                else:
                    even = (int(epoch) + int(index)) % 2 == 0
                    half = config.objective.mvlm == "half"
                    counts["mvlm_text"] += words if even or not half else 0
                    counts["mvlm_image"] += PATCHES if not even or not half else 0
        found.append(+counts)
    return found


@pytest.mark.parametrize("mvlm", ["two_views", "half", "joint"])
def test_every_form_of_mvlm_predicts_exactly_what_was_hidden(
    data: Path, tmp_path: Path, mvlm: str
) -> None:
    settings = {"objective.mvlm": mvlm, "max_steps": 4}
    run = toy_run(data, tmp_path / mvlm, settings)
    counts = [{n: s["count"] for n, s in row["objectives"].items()} for row in rows(run)]
    assert counts == expected_counts(data, run, settings)
    pairs = 2 * 8 * 4 * PATCHES // 2
    image_counts = sum(step["mvlm_image"] for step in counts)
    assert (image_counts == pairs) == (mvlm != "half")
    assert all(torch.isfinite(w).all() for w in weights_of(run).values())


def test_each_form_of_mvlm_is_another_training(data: Path, ten: Path, tmp_path: Path) -> None:
    for mvlm in ("half", "joint"):
        run = toy_run(data, tmp_path / mvlm, {"objective.mvlm": mvlm, "max_steps": 2})
        for one, other in zip(rows(run), rows(ten), strict=False):
            assert one["objectives"]["mvlm_text"] != other["objectives"]["mvlm_text"]
        # What does not concern pairs is the same in the first step.
        assert rows(run)[0]["objectives"]["mlm"] == rows(ten)[0]["objectives"]["mlm"]


def test_an_objective_of_weight_0_is_neither_computed_nor_reported(
    data: Path, ten: Path, tmp_path: Path
) -> None:
    run = toy_run(data, tmp_path / "run", {"objective.mvlm_image": 0.0, "max_steps": 2})
    assert [list(row["objectives"]) for row in rows(run)] == [["mlm", "mim", "mvlm_text"]] * 2
    assert rows(run)[0]["objectives"]["mim"] == rows(ten)[0]["objectives"]["mim"]


def test_a_model_without_vl_experts_trains_in_every_form(data: Path, tmp_path: Path) -> None:
    for mvlm in ("two_views", "joint"):
        settings = {"model.vl_layers": 0, "objective.mvlm": mvlm, "max_steps": 3}
        run = toy_run(data, tmp_path / mvlm, settings)
        names = weights_of(run)
        assert not [name for name in names if ".experts.vl." in name]
        assert [name for name in names if ".experts.v." in name]
        assert list(rows(run)[-1]["objectives"]) == list(OBJECTIVES)


@pytest.mark.parametrize("relative_bias", ["none", "shared", "per_layer"])
def test_recomputed_activations_give_the_losses_of_kept_ones(
    data: Path, tmp_path: Path, relative_bias: str
) -> None:
    settings = {
        "model.relative_bias": relative_bias,
        "model.layer_scale": 0.1,
        "model.drop_path": 0.3,
        "max_steps": 5,
    }
    kept = toy_run(data, tmp_path / "kept", settings)
    again = toy_run(data, tmp_path / "again", settings | {"runtime.checkpoint_activations": True})
    assert losses(again) == losses(kept)
    assert same(weights_of(again), weights_of(kept))
    tables = [name for name in weights_of(kept) if name.endswith("relative_bias.table")]
    assert len(tables) == (relative_bias != "none")
    assert all(weights_of(kept)[name].abs().max() > 0 for name in tables)  # it started at zero
    other = toy_run(data, tmp_path / "other", settings | {"model.drop_path": 0.0, "max_steps": 2})
    assert losses(other) != losses(kept)[:2]  # paths were dropped


def test_the_loss_falls_on_data_seen_again_and_again(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_toy_data(
        folder,
        {
            "image": [image_source(folder, records=6)],
            "text": [text_source(folder, records=1)],
            "pair": [pair_source(folder, records=8)],
        },
    )
    settings = {"max_steps": 80, "optim.total_steps": 80, "optim.lr": 4e-3, "save_every": 100}
    run = toy_run(folder, tmp_path / "run", settings)
    found = losses(run)
    assert sum(found[-10:]) < 0.9 * sum(found[:10])


# ------------------------------------------------------------------ streams


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (IMAGES_ONLY, ["mim"]),
        (TEXTS_ONLY, ["mlm"]),
        (PAIRS_ONLY, ["mvlm_text", "mvlm_image"]),
        ({"batch.pairs": 0}, ["mlm", "mim"]),
    ],
    ids=["images", "texts", "pairs", "no pairs"],
)
def test_a_run_may_leave_streams_out(
    data: Path, tmp_path: Path, settings: dict[str, int], names: list[str]
) -> None:
    whole = toy_run(data, tmp_path / "whole", settings | {"max_steps": 6, "save_every": 3})
    assert [list(row["objectives"]) for row in rows(whole)] == [names] * 6
    parts = toy_run(data, tmp_path / "parts", settings | {"max_steps": 3, "save_every": 3})
    parts = toy_run(data, parts, settings | {"max_steps": 6, "save_every": 3})
    assert losses(parts) == losses(whole)
    assert same(weights_of(parts), weights_of(whole))


def test_a_run_on_texts_alone_needs_no_pictures_and_no_codes(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_dataset(folder, {"text": [text_source(folder)]})
    settings = TEXTS_ONLY | {
        "tokenizers.train_text.vocab": 120,
        "tokenizers.train_text.kind": "wordpiece",
    }
    run = toy_run(folder, tmp_path / "run", settings | {"max_steps": 5})
    assert not (run / "checkpoints/step-0000005/visual").exists()
    run = toy_run(folder, run, settings | {"max_steps": 7})  # a resume does not miss them either
    assert len(rows(run)) == 7 and saved_steps(run) == [5, 7]


def test_a_run_on_images_alone_needs_no_words(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_toy_data(folder, {"image": [image_source(folder)]})
    (folder / "tokenizer.json").unlink()
    run = toy_run(folder, tmp_path / "run", IMAGES_ONLY | {"max_steps": 5})
    run = toy_run(folder, run, IMAGES_ONLY | {"max_steps": 7})
    assert len(rows(run)) == 7 and list(rows(run)[-1]["objectives"]) == ["mim"]


def test_a_stream_that_no_source_feeds_is_refused_before_a_tokenizer_is_trained(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_toy_data(folder, {"image": [image_source(folder)]})
    shutil.rmtree(folder / "visual")
    with pytest.raises(InputError, match=r"batch asks for 5 of the text stream.*batch.texts to 0"):
        toy_run(folder, tmp_path / "run", {"batch.pairs": 0})
    assert not (tmp_path / "run" / "tokenizers").exists()


# ------------------------------------------------------------------ bad samples


def dirty_data(folder: Path, bad: set[int], records: int = 400) -> Path:
    folder.mkdir(parents=True)
    return write_toy_data(folder, {"image": [image_source(folder, "dirty", records, bad)]})


def test_a_source_with_no_usable_sample_stops_within_10_seconds_by_name(tmp_path: Path) -> None:
    folder = dirty_data(tmp_path / "data", bad=set(range(500)), records=500)
    began = time.monotonic()
    with pytest.raises(DataBudgetError, match=r"no usable sample in source dirty .*not_an_image"):
        toy_run(folder, tmp_path / "run", IMAGES_ONLY)
    assert time.monotonic() - began < 10
    assert DataBudgetError.exit_code == 65
    assert not rows(tmp_path / "run")


DIRTY = IMAGES_ONLY | {"batch.images": 40, "max_steps": 20, "input.skip_budget": 0.01}


def test_half_a_per_cent_of_bad_samples_goes_on_and_each_is_named_once(tmp_path: Path) -> None:
    bad = {17, 333}
    folder = dirty_data(tmp_path / "data", bad)
    run = toy_run(folder, tmp_path / "run", DIRTY)
    skips = rows(run, "skips.jsonl")
    # 20 steps of 40 are two epochs of 400 records
    expected = [f"dirty:{epoch}:{index}" for epoch in (0, 1) for index in sorted(bad)]
    assert sorted(row["sample_id"] for row in skips) == expected
    for row in skips:
        assert row["reason"] == "not_an_image" and row["source"] == "dirty"
        assert row["shard"].endswith(f"dirty-{int(row['member']) // 16:05d}.tar")
        assert row["sample_id"] in rows(run, "ledger.jsonl")[row["step"] - 1]["image"]["dirty"]
    budget = {"visits": {"image/dirty": 800}, "reasons": {"image/dirty": {"not_an_image": 4}}}
    assert state_of(run)["budget"] == budget
    # Nothing takes the place of a bad sample.
    per_step = Counter(row["step"] for row in skips)
    for row in rows(run):
        used = 40 - per_step[row["step"]]
        assert row["objectives"]["mim"]["count"] == PATCHES * used
    assert "4 samples skipped" in (run / "log.txt").read_text()


def test_five_per_cent_of_bad_samples_stop_with_65_and_the_reasons(tmp_path: Path) -> None:
    folder = dirty_data(tmp_path / "data", set(range(0, 400, 20)))
    told = []
    for save_every in (100, 2):  # without and with checkpoints to go on from
        run = tmp_path / f"every-{save_every}"
        for _ in range(2):  # the same command again counts nothing twice
            with pytest.raises(DataBudgetError) as stopped:
                toy_run(folder, run, DIRTY | {"save_every": save_every})
            assert stopped.value.exit_code == 65
            told.append(str(stopped.value))
            seen = sum(1 for _ in ledger_ids(run, "image"))
            bad = len(rows(run, "skips.jsonl"))
            assert f"source image/dirty: {bad} of {seen} samples were bad" in told[-1]
            assert f"({bad} x not_an_image)" in told[-1] and "allows 1.00%" in told[-1]
            assert 200 <= seen < 400 and bad > 0.01 * seen
    assert len(set(told)) == 1
    # Allowed more, the same run goes on.
    run = toy_run(folder, run, DIRTY | {"input.skip_budget": 0.06})
    assert len(rows(run, "skips.jsonl")) == 40


def test_bad_samples_are_counted_once_over_a_crash_and_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = dirty_data(tmp_path / "data", set(range(0, 400, 67)))
    settings = DIRTY | {"input.skip_budget": 0.05, "save_every": 5}
    whole = toy_run(folder, tmp_path / "whole", settings)
    run = tmp_path / "run"
    for crash_at in (8, 14):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "flag_over_ranks", crash_after(run, crash_at))
            with pytest.raises(ZeroDivisionError):
                toy_run(folder, run, settings)
        assert rows(run)[-1]["step"] == crash_at  # rows beyond the newest checkpoint
        assert saved_steps(run)[-1] == crash_at // 5 * 5
    toy_run(folder, run, settings)
    assert rows(run, "skips.jsonl") == rows(whole, "skips.jsonl")
    assert len(rows(run, "skips.jsonl")) == 2 * 6
    assert state_of(run)["budget"] == state_of(whole)["budget"]
    assert losses(run) == losses(whole)


def crash_after(run: Path, step: int) -> Callable[..., int]:
    def asked(*_: Any) -> int:
        return 1 // (rows(run)[-1]["step"] != step) - 1

    return asked


def test_bad_pairs_and_bad_lines_of_text_are_counted_by_stream(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    lines = [b"", b"\x00\x01", b"a red circle"]
    write_toy_data(
        folder,
        {
            "text": [text_source(folder, lines=lines)],
            "pair": [pair_source(folder, records=300, bad={7})],
        },
    )
    settings = {"batch.images": 0, "batch.pairs": 30, "max_steps": 10}
    run = toy_run(folder, tmp_path / "run", settings)
    skips = rows(run, "skips.jsonl")
    pairs = [row for row in skips if row["stream"] == "pair"]
    assert [(row["sample_id"], row["reason"]) for row in pairs] == [("captioned:0:7", "empty_text")]
    texts = [row for row in skips if row["stream"] == "text"]
    assert texts and all(row["step"] == 0 and row["shard"] for row in texts)
    again = toy_run(folder, run, settings | {"max_steps": 12})
    assert [r for r in rows(again, "skips.jsonl") if r["stream"] == "text"] == texts


# ------------------------------------------------------------------ numbers that are no numbers


class Poison:
    """Stands in for `score_batch`: in the given steps it hurts the model or the loss."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: set[int], how: str) -> None:
        self.steps, self.how, self.now = steps, how, 0
        monkeypatch.setattr("vlbeit.train.pretrain.score_batch", self.score)
        rate = loop.lr_at

        def told(step: int, config: Any) -> float:
            self.now = step
            return rate(step, config)

        monkeypatch.setattr(loop, "lr_at", told)

    def score(self, model: VLBeit, batch: Batch, config: Any) -> dict[str, Score]:
        if self.now in self.steps and self.how == "weight":
            with torch.no_grad():
                model.heads["mim"].weight[0, 0] = float("nan")
        scores = score_batch(model, batch, config)
        if self.now in self.steps and self.how in ("nan", "inf") and batch.stream == "pair":
            scores["mvlm_text"] = replace(
                scores["mvlm_text"], loss_sum=scores["mvlm_text"].loss_sum * float(self.how)
            )
        return scores


def test_three_steps_without_a_finite_loss_end_with_70_and_leave_a_finite_checkpoint(
    data: Path, ten: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        Poison(patch, {6}, "weight")  # once poisoned, the weight stays so
        with pytest.raises(NonFiniteError, match="step 8: .* 3 steps in a row") as stopped:
            toy_run(data, run, {"save_every": 1})
    assert stopped.value.exit_code == 70
    assert [row["step"] for row in rows(run) if "skipped" in row] == [6, 7, 8]
    assert all(row["skipped"] == "non-finite" for row in rows(run)[5:])
    assert saved_steps(run) == [1, 2, 3, 4, 5]
    newest = load_newest(run, print)
    assert newest is not None and newest.step == 5
    tensors = [*newest.model_tensors().values(), *newest.optimizer_tensors().values()]
    assert all(torch.isfinite(tensor).all() for tensor in tensors)
    said = (run / "log.txt").read_text()
    assert all(name in said for _, name in ledger_ids(run, "pair") if _ == 6)
    # Without the poison the same command goes on as if nothing had been.
    toy_run(data, run)
    assert losses(run) == losses(ten)
    assert same(weights_of(run), weights_of(ten))


@pytest.mark.parametrize("how", ["nan", "inf"])
def test_a_step_without_a_finite_loss_changes_no_weight_and_no_moment(
    data: Path, ten: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        Poison(patch, {6, 7}, how)
        # The checkpoint of step 7 is asked for by the end of the run.
        toy_run(data, run, {"max_steps": 7})
    assert saved_steps(run) == [5, 7]
    assert same(weights_of(run), weights_of(ten, 5))
    folders = dict(list_checkpoints(run))
    before, after = (open_checkpoint(folders[step]) for step in (5, 7))
    assert same(before.optimizer_tensors(), after.optimizer_tensors())
    assert (after.state["nonfinite"], after.state["nonfinite_in_row"]) == (2, 2)
    assert after.state["cursors"] != before.state["cursors"]
    assert [row["loss"] for row in rows(run)][5:] == [how, how]
    # The count in a row goes on over a resume, and a good step ends it.
    with monkeypatch.context() as patch:
        Poison(patch, {8}, how)
        with pytest.raises(NonFiniteError):
            toy_run(data, copied(run, tmp_path / "third"))
    toy_run(data, run)
    assert state_of(run)["nonfinite_in_row"] == 0 and state_of(run)["nonfinite"] == 2


def test_a_run_of_one_bad_step_still_ends_with_a_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Poison(monkeypatch, {1}, "nan")
    run = toy_run(data, tmp_path / "run", {"max_steps": 1})
    assert saved_steps(run) == [1]


# ------------------------------------------------------------------ precision and workers


def test_bf16_trains_close_to_fp32_and_keeps_fp32_weights(
    data: Path, ten: Path, tmp_path: Path
) -> None:
    run = toy_run(data, tmp_path / "run", {"precision": "bf16", "max_steps": 5})
    assert losses(run) == pytest.approx(losses(ten)[:5], rel=0.02)
    assert losses(run) != losses(ten)[:5]
    assert {tensor.dtype for tensor in weights_of(run).values()} == {torch.float32}


def test_loader_processes_change_no_bit(data: Path, ten: Path, tmp_path: Path) -> None:
    run = toy_run(data, tmp_path / "run", {"input.workers": 2, "max_steps": 5})
    assert losses(run) == losses(ten)[:5]
    assert rows(run, "ledger.jsonl") == rows(ten, "ledger.jsonl")[:5]


def test_another_seed_is_another_run(data: Path, ten: Path, tmp_path: Path) -> None:
    run = toy_run(data, tmp_path / "run", {"seed": 1, "max_steps": 2})
    assert losses(run) != losses(ten)[:2]
    assert rows(run, "ledger.jsonl") != rows(ten, "ledger.jsonl")[:2]
