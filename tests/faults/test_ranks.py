"""Two processes: stopped together, ended together, started again in another number.

Numbers as in the reliability contract: R06, R07, R08 and R10 of its fault tests.
"""

import os
import signal
import time
from pathlib import Path

import pytest
from toy_job import (
    Toy,
    checkpoints,
    kill,
    killed_at_the_end,
    last_step,
    losses,
    output_of,
    ranks_of,
    rows,
    said,
    same_history,
    wait_for_step,
    wait_until_gone,
)

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("told", ["launcher", "rank 1"])
def test_r06_all_ranks_save_and_stop_in_the_same_step(
    toy: Toy, undisturbed_pair: Path, tmp_path: Path, told: str
) -> None:
    run = tmp_path / "run"
    job = toy.start(run, 40, ranks=2, save_every=100)
    with killed_at_the_end(job):
        wait_for_step(job, run, 7)
        ranks = ranks_of(job)
        began = time.monotonic()
        kill(job.pid if told == "launcher" else ranks[int(told[-1])], signal.SIGTERM)
        wait_until_gone(ranks, 10)
        assert time.monotonic() - began < 10
        job.wait(20)
    assert said(run).count("saved as step") == 2, said(run)
    if told != "launcher":  # told itself, the launcher leaves without a report on its ranks
        assert said(run).count("exitcode  : 75") == 2, said(run)
    assert checkpoints(run)[-1].name == f"step-{last_step(run):07d}"
    toy.run(run, 40, ranks=2, save_every=100)
    same_history(run, undisturbed_pair, 40)


def test_r07_ranks_leave_with_their_launcher_and_the_next_start_takes_the_folder(
    toy: Toy, undisturbed_pair: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = toy.start(run, 40, ranks=2)
    with killed_at_the_end(job):
        wait_for_step(job, run, 7)
        ranks = ranks_of(job)
        kill(job.pid)
        following = toy.start(run, 40, ranks=2)  # at once: the old ranks may still be saving
        with killed_at_the_end(following):
            wait_until_gone(ranks, 10)
            assert following.wait(120) == 0, said(run)
    assert [row["step"] for row in rows(run)] == list(range(1, 41))  # one writer at a time
    same_history(run, undisturbed_pair, 40)


def test_r07_of_two_starts_in_one_folder_one_runs(toy: Toy, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = toy.start(run, 100_000, save_every=100_000)
    with killed_at_the_end(first):
        wait_for_step(first, run, 1)
        began = time.monotonic()
        second = toy.start(run, 100_000)
        with killed_at_the_end(second):
            assert second.wait(60) == 73, said(run)
        assert f"process {first.pid} on" in said(run) and time.monotonic() - began < 60
        assert first.poll() is None
        kill(first.pid, signal.SIGTERM)
        assert first.wait(10) == 75
    steps = [row["step"] for row in rows(run)]
    assert steps == list(range(1, len(steps) + 1))


def test_r08_the_sample_order_does_not_depend_on_the_number_of_processes(
    toy: Toy, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for ranks, steps in ((2, 20), (1, 40), (2, 60)):
        toy.run(run, steps, ranks=ranks, save_every=20)
    ledger = rows(run, "ledger.jsonl")
    assert len(ledger) == 60 and ledger == rows(undisturbed, "ledger.jsonl")
    assert "world_size was 2 when step 20 was saved and is 1 now" in said(run)
    for (_, one), (_, two) in zip(losses(undisturbed, 10), losses(run, 10), strict=True):
        assert float.fromhex(one) == pytest.approx(float.fromhex(two), rel=1e-6)


def test_r10_a_killed_rank_ends_the_job_within_15_seconds_with_71(toy: Toy, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = toy.start(run, 100_000, ranks=2)
    with killed_at_the_end(job):
        wait_for_step(job, run, 6)
        ranks = ranks_of(job)
        began = time.monotonic()
        kill(ranks[1])
        job.wait(15)
        assert time.monotonic() - began < 15
        assert not [pid for pid in ranks if os.path.exists(f"/proc/{pid}")]
    told = output_of(run).read_text()
    assert "exitcode  : 71" in told and f"rank 1, process {ranks[1]}," in told, told
    assert "Signal 9 (SIGKILL)" in told


def test_r10_torchrun_may_start_the_ranks_again_and_the_run_is_the_same(
    toy: Toy, undisturbed_pair: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = toy.start(run, 40, ranks=2, restarts=1)
    with killed_at_the_end(job):
        wait_for_step(job, run, 7)
        kill(ranks_of(job)[1])
        assert job.wait(120) == 0, said(run)
    assert said(run).count("going on from") == 1
    same_history(run, undisturbed_pair, 40)
