"""R11 and R12 of the reliability contract: lost loader workers, and little shared memory."""

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from toy_job import (
    Toy,
    alive,
    kill,
    killed_at_the_end,
    last_step,
    said,
    same_history,
    wait_for_step,
    wait_until_gone,
)

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(300)]

LOADER_TIMEOUT = 5


def workers_of(job: subprocess.Popen[str]) -> list[int]:
    """Processes whose parent is the job."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == job.pid:
            found.append(int(folder.name))
    return sorted(found)


@pytest.mark.parametrize(
    ("number", "within", "words"),
    [
        (signal.SIGKILL, 10, "ended by signal 9"),
        (signal.SIGSTOP, LOADER_TIMEOUT + 5, "input.loader_timeout"),
    ],
)
def test_r11_a_lost_loader_worker_ends_the_run_in_time_and_the_same_command_goes_on(
    toy: Toy, undisturbed: Path, tmp_path: Path, number: signal.Signals, within: float, words: str
) -> None:
    run = tmp_path / "run"
    more = ("--input.workers", "2", "--input.loader-timeout", str(LOADER_TIMEOUT))
    job = toy.start(run, 60, *more)
    with killed_at_the_end(job):
        wait_for_step(job, run, 7)
        workers = workers_of(job)
        assert len(workers) >= 2
        began = time.monotonic()
        kill(workers[-1], number)
        assert job.wait(within) == 71, said(run)
        assert time.monotonic() - began <= within
        wait_until_gone(workers, 10)
    assert words in said(run), said(run)
    toy.run(run, 60, *more)
    same_history(run, undisturbed, 60)


def test_r12_two_workers_need_no_more_than_16_mb_of_shared_memory(
    toy: Toy, undisturbed: Path, tmp_path: Path
) -> None:
    own_mounts = ["unshare", "--mount", "sh", "-c"]
    small = "mount -t tmpfs -o size=16m tmpfs /dev/shm"
    if shutil.which("unshare") is None or subprocess.run([*own_mounts, small]).returncode != 0:
        pytest.skip("this user may not mount a file system of its own")
    run = tmp_path / "run"
    inside = (*own_mounts, f'{small} && exec "$@"', "sh")
    job = toy.start(run, 60, "--input.workers", "2", before=inside)
    with killed_at_the_end(job):
        assert job.wait(120) == 0, said(run)
    assert last_step(run) == 60 and not any(alive(pid) for pid in workers_of(job))
    same_history(run, undisturbed, 60)
