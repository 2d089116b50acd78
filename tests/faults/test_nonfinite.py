"""R09 of the reliability contract: NaN and Inf in pixels, loss and gradient, on either rank."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from toy_job import SOURCE, TOY, Toy, checkpoints, killed_at_the_end, output_of, rows, said

from vlbeit.tensorfile import read_tensors

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(600)]

HURT = {
    str(step): (place, value)
    for step, (place, value) in zip(
        (4, 6, 8, 10, 12, 14),
        [(place, value) for place in ("pixels", "loss", "gradient") for value in ("nan", "inf")],
        strict=True,
    )
}
"""One bad step for each, a good one after it."""
LAST = {str(step): ("pixels", "nan") for step in (17, 18, 19)}


@pytest.mark.parametrize("rank", [0, 1])
def test_r09_all_ranks_skip_the_same_steps_and_three_in_a_row_end_the_job_with_70(
    toy: Toy, tmp_path: Path, rank: int
) -> None:
    run = tmp_path / "run"
    job = start_poisoned(toy, run, {"rank": rank, "steps": HURT | LAST})
    with killed_at_the_end(job):
        job.wait(300)
    told = said(run)
    assert told.count("exitcode  : 70") == 2, told
    digests = {r: dict(re.findall(rf"<{r}> step (\d+) (\w+)", told)) for r in (0, 1)}
    assert len(digests[0]) == 19 and digests[0] == digests[1]
    before = [digests[0][str(step)] for step in range(1, 20)]  # as each step found the state
    same = [step for step in range(1, 19) if before[step - 1] == before[step]]
    bad = sorted(int(step) for step in HURT | LAST)
    assert same == [step for step in bad if step < 19], told
    found = rows(run)
    assert [row["step"] for row in found if row.get("skipped") == "non-finite"] == bad
    ledger = {row["step"]: row for row in rows(run, "ledger.jsonl")}
    log = (run / "log.txt").read_text()
    for step in bad:
        (line,) = re.findall(rf"step {step}: loss or gradient is not finite.*", log)
        assert all(name in line for ids in ledger[step]["pair"].values() for name in ids)
    newest = checkpoints(run)[-1]
    assert newest.name == "step-0000016"
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert all(t.isfinite().all() for t in read_tensors(newest / file).values())


def start_poisoned(toy: Toy, run: Path, poison: dict[str, object]) -> subprocess.Popen[str]:
    """The toy job on two ranks, one of which gets what `poisoned_job` makes of `poison`."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words += ["--standalone", str(Path(__file__).with_name("poisoned_job.py"))]
    words += ["pretrain", "tiny", "--data", str(toy.data), "--run-dir", str(run)]
    words += ["--max-steps", "30", "--save-every", "1", *TOY]
    words += ["--tokenizers.visual", str(toy.visual)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(SOURCE),
        "OMP_NUM_THREADS": "1",
        "POISON": json.dumps(poison),
    }
    with output_of(run).open("a") as out:
        return subprocess.Popen(
            words, env=environment, stdout=out, stderr=out, text=True, start_new_session=True
        )
