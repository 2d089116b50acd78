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
    state_at,
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


def test_r08_exact_runs_have_the_same_bits_on_1_2_and_4_processes(toy: Toy, tmp_path: Path) -> None:
    exact = ("--runtime.exact", "4")
    alone, moved = tmp_path / "alone", tmp_path / "moved"
    toy.run(alone, 12, *exact, save_every=4)
    for ranks, steps in ((2, 4), (1, 8), (4, 12)):
        toy.run(moved, steps, *exact, ranks=ranks, save_every=4)
    same_history(moved, alone, 12)
    assert "bit by bit" not in said(moved)
    # Without it the number of processes shows in the bits, so the comparison could have failed.
    plain = tmp_path / "plain"
    toy.run(plain, 4, ranks=2, save_every=4)
    assert state_at(plain, 4) != state_at(alone, 4)
    toy.run(tmp_path / "three", 4, *exact, ranks=3, code=1)
    assert "can be shared by 1, 2, 4 processes, found 3" in said(tmp_path / "three")


def test_a_lost_rank_is_started_again_by_torchrun_and_the_run_ends_as_if_undisturbed(
    toy: Toy, undisturbed_pair: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = toy.start(run, 40, ranks=2, launch=("--max-restarts", "2"))
    with killed_at_the_end(job):
        wait_for_step(job, run, 7)
        kill(ranks_of(job)[1])
        assert job.wait(240) == 0, said(run)
    told = said(run)
    assert "lost another rank" in told and "going on from" in told, told
    assert [row["step"] for row in rows(run)] == list(range(1, 41))
    same_history(run, undisturbed_pair, 40)


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
