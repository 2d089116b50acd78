"""A fine-tuning run that is killed goes on as if nothing had happened (R02 of the contract)."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_job import (
    SOURCE,
    Toy,
    checkpoints,
    killed_at_the_end,
    last_step,
    losses,
    output_of,
    said,
    same_history,
    wait_for_step,
)

from tiny_tasks import write_tasks
from vlbeit.checkpoint import verify_checkpoint
from vlbeit.recipes import FINETUNE

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(900)]
STEPS, SAVE_EVERY, KILLS = 20, 4, 2
SMALL_HEADS = "--segmentation.channels 32 --segmentation.auxiliary-channels 32"
TASKS = {
    "classification": "--classification.mixup 0.8 --classification.cutmix 1.0",
    "vqa": "--vqa.min-count 1",
    "retrieval": "",
    "statements": "",
    "entailment": "",
    "segmentation": SMALL_HEADS,
}
assert set(TASKS) == set(FINETUNE)


def start_task(task: str, start: Path, data: Path, run_dir: Path) -> subprocess.Popen[str]:
    words = f"""-m vlbeit finetune {task} tiny --start {start} --data {data} --run-dir {run_dir}
        --device cpu --precision fp32 --runtime.threads 1 --max-steps {STEPS}
        --save-every {SAVE_EVERY} --batch.size 8 --batch.micro 4 --model.drop-path 0.1
        --optim.ema 0.9 --optim.warmup-steps 5 --optim.total-steps {STEPS}
        --log.eval-every 0 --log.keep 0""".split()
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    with output_of(run_dir).open("a") as out:
        return subprocess.Popen(
            [sys.executable, *words, *TASKS[task].split()],
            env=environment, stdout=out, stderr=out, text=True, start_new_session=True,
        )  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_a_killed_fine_tuning_run_ends_with_the_same_bits(
    task: str, toy: Toy, undisturbed: Path, tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    # Scenes have no sentences to entail.
    data = write_tasks(tmp_path / "data") if task == "entailment" else toy.data
    job = start_task(task, undisturbed, data, whole)
    with killed_at_the_end(job):
        assert job.wait(300) == 0, said(whole)
    draw = random.Random(task)
    for target in sorted(draw.sample(range(SAVE_EVERY + 1, STEPS - 2), KILLS)):
        job = start_task(task, undisturbed, data, run)
        with killed_at_the_end(job):
            wait_for_step(job, run, target)
            time.sleep(draw.uniform(0, 0.1))  # in the middle of a step, or of a save
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
        assert all(verify_checkpoint(folder)["ok"] for folder in checkpoints(run))
        assert last_step(run) < STEPS or len(losses(run, STEPS)) == STEPS
    job = start_task(task, undisturbed, data, run)
    with killed_at_the_end(job):
        assert job.wait(300) == 0, said(run)
    same_history(run, whole, STEPS)
    facts = [
        json.loads((c / "task.json").read_text())
        for c in (checkpoints(run)[-1], checkpoints(whole)[0])
    ]
    assert facts[0] == facts[1]
    assert "going on from" in said(run)
