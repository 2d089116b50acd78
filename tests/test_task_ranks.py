"""A fine-tuning run is the same run on any number of processes, and its figures the same figures.

Two ranks are started by torchrun over gloo, as a user would; scenes are drawn for the test.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vlbeit
from tiny_tasks import MODEL, write_start
from toy_run import losses, rows, training_here
from vlbeit.checkpoint import find_checkpoint
from vlbeit.cli import main
from vlbeit.eval.downstream import evaluate_task, load_task_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SOURCE = Path(vlbeit.__file__).parents[1]
STEPS, SIZE = 3, 8
TASKS = {
    "vqa": "--vqa.min-count 1 --optim.ema 0.5",
    "retrieval": "--retrieval.rerank 3",
    "segmentation": "--segmentation.channels 32 --segmentation.auxiliary-channels 32",
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    assert main(["prepare", "scenes", "--out", str(folder), "--count", "120"]) == 0
    return folder


@pytest.fixture(scope="module")
def start(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    model = replace(MODEL, image_size=(40, 40), vocab=512, text_positions=40)
    with training_here(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLBEIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield write_start(tmp_path_factory.mktemp("runs") / "start", scenes, model)


def finetuned(task: str, start: Path, scenes: Path, run_dir: Path, ranks: int, *more: str) -> Path:
    """`vlbeit finetune` on so many processes, which share a step's samples and each micro-batch."""
    words = [sys.executable, "-m"]
    if ranks > 1:
        words += ["torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
        words += ["-m", "--"]  # else torchrun takes --start for its own --start-method
    words += f"""vlbeit finetune {task} tiny --start {start} --data {scenes} --run-dir {run_dir}
        --device cpu --precision fp32 --runtime.threads 1 --max-steps {STEPS} --save-every {STEPS}
        --batch.size {SIZE} --batch.micro {SIZE // ranks} --model.drop-path 0.1 --optim.lr 1e-3
        --optim.warmup-steps 1 --optim.total-steps {STEPS} --log.eval-every {STEPS}
        --log.eval-samples 20 {TASKS[task]}""".split()
    done = subprocess.run(
        [*words, *more],
        env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir


def held_out(run_dir: Path, losses_too: bool) -> list[dict[str, Any]]:
    """Figures, and losses, of each evaluation while training, as plain numbers."""
    return [
        row["figures"]
        | ({name: score["loss"] for name, score in row["objectives"].items()} if losses_too else {})
        for row in rows(run_dir, "eval.jsonl")
    ]


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_and_workers_learn_what_one_learns(task, start, scenes, tmp_path):
    one = finetuned(task, start, scenes, tmp_path / "one", 1)
    two = finetuned(task, start, scenes, tmp_path / "two", 2, "--input.workers", "1")
    assert len(losses(one)) == STEPS and len(set(losses(one))) == STEPS
    assert losses(two) == pytest.approx(losses(one), abs=1e-5, rel=1e-5)
    assert rows(two, "ledger.jsonl") == rows(one, "ledger.jsonl")
    counts = [
        [{name: score["count"] for name, score in row["objectives"].items()} for row in rows(run)]
        for run in (one, two)
    ]
    assert counts[0] == counts[1]
    # Rank 0 evaluates alone: the rivals in the contrast's loss are those of its micro-batches.
    before, after = (held_out(run, task != "retrieval") for run in (one, two))
    assert len(before) == len(after) == 2
    for other, row in zip(after, before, strict=True):
        assert other == pytest.approx(row, abs=1e-5, rel=1e-5)

    # Sharded, with a running mean where one is kept: the same, from a checkpoint in parts.
    if task != "segmentation":
        shared = finetuned(task, start, scenes, tmp_path / "shared", 2, "--runtime.sharding=full")
        assert losses(shared) == pytest.approx(losses(one), abs=1e-5, rel=1e-5)
        for other, row in zip(held_out(shared, task != "retrieval"), after, strict=True):
            assert other == pytest.approx(row, abs=1e-5, rel=1e-5)
        weights = find_checkpoint(shared, print).model_tensors()
        for name, tensor in find_checkpoint(two, print).model_tensors().items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-5)

    run = load_task_run(find_checkpoint(one, print), "cpu")
    found = [
        evaluate_task(run, [str(scenes)], samples=40, batch_size=size)["figures"]
        for size in (1, 7, 64)
    ]
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, row in other.items():
            for part in ("value", "low", "high"):
                assert row[part] == pytest.approx(found[0][name][part], abs=1e-6), name
