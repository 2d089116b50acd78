"""`vlbeit finetune retrieval` and `vlbeit eval` end to end: resume, batch size, what is told."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tiny_run import grey_png
from toy_run import losses, rows, training_here
from toy_tasks import ASK, write_start
from vlbeit.checkpoint import find_checkpoint, list_checkpoints
from vlbeit.cli import main
from vlbeit.config import RetrievalConfig, RetrievalRun, TextTokenizerConfig
from vlbeit.data.dataset import Dataset, SourceInfo
from vlbeit.data.records import write_shards
from vlbeit.errors import ConfigError
from vlbeit.eval.downstream import evaluate_task, load_task_run
from vlbeit.jsonfile import read_json
from vlbeit.recipes import FINETUNE
from vlbeit.tokens.text import train_text_tokenizer
from vlbeit.train.finetune import check_shares, finetune

TRAIN, VAL = 24, 10
TENS = ("dark", "dim", "pale", "light")
ONES = ("red", "green", "blue", "grey", "pink", "brown")


def captions_of(index: int) -> list[str]:
    """Two for every second picture, one for the others; the shade follows from the words."""
    name = f"{TENS[index % 4]} {ONES[index % 6]}"
    return [f"{name} here", f"look a {name}"][: 1 + index % 2]


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    with training_here():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "captioned"

    def members(first: int, count: int) -> Iterator[tuple[str, dict[str, bytes]]]:
        for i in range(first, first + count):
            said = json.dumps({"captions": captions_of(i)}).encode()
            yield f"{i:04d}", {"png": grey_png(60 * (i % 4) + 9 * (i % 6)), "json": said}

    sources = [
        SourceInfo(
            "retrieval", "task:retrieval", split,
            [str(p) for p in write_shards(members(first, count), folder, split, 16)], count,
        )
        for split, first, count in (("train", 0, TRAIN), ("val", TRAIN, VAL))
    ]  # fmt: skip
    lines = [caption for i in range(TRAIN) for caption in captions_of(i)]
    texts = [("0000", {"txt": "\n".join(lines * 9).encode()})]
    shards = [str(p) for p in write_shards(texts, folder, "words", 1)]
    Dataset.write(folder, "toy", [*sources, SourceInfo("words", "text", "train", shards, 1)], {})
    train_text_tokenizer(lines, TextTokenizerConfig(kind="wordpiece", vocab=80)).save(folder)
    return folder


@pytest.fixture(scope="module")
def start(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with training_here(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLBEIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield write_start(tmp_path_factory.mktemp("runs") / "start", data)


def run_toy(start: Path, data: Path, run_dir: Path, **changes: Any) -> Path:
    shared = {name: value for name, value in vars(ASK).items() if name not in ("task", "vqa")}
    config = RetrievalRun(**shared, retrieval=RetrievalConfig(rerank=3))
    config = replace(config, model=replace(config.model, drop_path=0.2))
    config = replace(config, start=str(start), data=(str(data),), run_dir=str(run_dir))
    return finetune(replace(config, **changes))


def learned(run_dir: Path) -> dict[str, str]:
    files = read_json(list_checkpoints(run_dir)[-1][1] / "manifest.json")["files"]
    return {name: files[name]["sha256"] for name in files if name != "config.json"}


def test_a_resumed_run_ends_with_the_same_bits(start, data, tmp_path):
    straight = run_toy(start, data, tmp_path / "straight")
    run_toy(start, data, tmp_path / "run", max_steps=4)
    before = learned(tmp_path / "run")
    run = run_toy(start, data, tmp_path / "run")
    assert losses(run) == losses(straight) and len(losses(run)) == 8
    assert learned(run) == learned(straight) != before
    counts = {n: s["count"] for n, s in rows(run, "metrics.jsonl")[0]["objectives"].items()}
    assert counts == {"contrast": 20, "matching": 30}


def test_workers_change_nothing_and_another_seed_does(start, data, tmp_path):
    plain = run_toy(start, data, tmp_path / "plain", max_steps=3)
    busy = run_toy(start, data, tmp_path / "busy", max_steps=3, input=replace(ASK.input, workers=2))
    other = run_toy(start, data, tmp_path / "other", max_steps=3, seed=1)
    assert losses(busy) == losses(plain)
    assert losses(other) != pytest.approx(losses(plain), rel=1e-3)


def test_evaluation_reranks_says_what_it_cost_and_ignores_the_batch_size(
    start, data, tmp_path, capsys
):
    place = run_toy(start, data, tmp_path / "run", log=replace(ASK.log, eval_every=8))
    run = load_task_run(find_checkpoint(place, print), "cpu")
    found = [evaluate_task(run, [str(data)], batch_size=size) for size in (1, 4, 64)]
    assert found[0]["figures"] == found[1]["figures"] == found[2]["figures"]
    texts = sum(len(captions_of(i)) for i in range(TRAIN, TRAIN + VAL))
    figures = found[0]["figures"]
    assert found[0]["samples"] == texts == 15
    assert figures["image@1"]["samples"] == texts and figures["text@1"]["samples"] == VAL
    assert figures["image@1"]["baseline"]["value"] == pytest.approx(1 / VAL)
    assert figures["image@10"]["value"] == 1.0  # of ten pictures
    assert {name.startswith("reranked_") for name in figures} == {True, False}
    costs = found[0]["costs"]
    assert costs["rerank_seconds"] > 0 and VAL <= costs["rerank_pairs"] <= 3 * (VAL + texts)
    # While training the dual encoder alone is asked.
    last = rows(place, "eval.jsonl")[-1]["figures"]
    assert last == {n: pytest.approx(figures[n]["value"]) for n in figures if "reranked" not in n}
    capsys.readouterr()
    assert main(["eval", str(place), "--data", str(data)]) == 0
    told = capsys.readouterr().out
    assert "without looking" in told and "rerank_seconds" in told


def test_processes_of_unlike_shares_are_refused_before_they_wait_for_each_other() -> None:
    config = FINETUNE["retrieval"]["tiny"]()  # 64 a step
    check_shares(config, 2)
    with pytest.raises(ConfigError, match="64 over 3 processes.*a multiple of 3"):
        check_shares(config, 3)
