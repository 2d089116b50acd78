"""Laws of several processes: the same answer everywhere, one exit code, and nobody left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vlbeit.errors import ConfigError, InputError, LostWorkerError, SaveError
from vlbeit.train import distributed
from vlbeit.train.distributed import World, init_world, set_threads

SOURCE = Path(distributed.__file__).parents[2]

RANK = """
import os, signal, sys, time
import torch
from vlbeit.errors import LostWorkerError, SaveError
from vlbeit.train.distributed import init_world, set_threads
from vlbeit.train.signals import StopSignal

mode, timeout = sys.argv[1], float(sys.argv[2])
stop = StopSignal().install()
world = init_world("cpu", timeout)
def say(*words):  # one write, so that lines of two ranks do not mix
    os.write(1, " ".join(map(str, [f"<{world.rank}>", *words])).encode() + b"\\n")
say("pid", os.getpid())
if mode == "agree":
    say("sum", world.sum_over_ranks(torch.tensor([1.0 + world.rank, 2.0])).tolist())
    say("all", world.gather_objects({"rank": world.rank, "ids": ["x"] * (3 * world.rank)}))
    say("main", world.on_main(lambda: ["chosen", world.rank]))
    def fail(): raise SaveError("the disk is full")
    try: world.on_main(fail)
    except SaveError as error: say("failed", error)
    say("threads", set_threads(0, world.local_size))
    world.close()
    sys.exit(0)
if mode == "leave":
    import torch.distributed.nn.functional  # as the making of an optimizer does
    from vlbeit.train.distributed import leave_group
    def threads():
        tasks = [f"/proc/self/task/{task}/comm" for task in os.listdir("/proc/self/task")]
        return [open(task).read().strip() for task in tasks]
    def train():
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        for _ in range(3): model(torch.ones(1, 2)).sum().backward()
        world.close()
    say("during", any("gloo" in name for name in threads()))
    train()
    leave_group()
    say("after", [name for name in threads() if "gloo" in name])
    sys.exit(0)
try:
    for step in range(100_000):
        if mode == "hang" and step == 3: time.sleep(60)
        if stop.requested and mode == "save": time.sleep(1); say("saved"); os._exit(75)
        if step == 3: say("running")
        if mode == "shape" and step == 3:
            with world.guard("the step"): torch.ones(2) @ torch.ones(3)
        world.barrier()
        time.sleep(0.01)
except LostWorkerError as error:
    say("lost", error)
    sys.exit(error.exit_code)
"""


def launch(tmp_path: Path, mode: str, timeout: float = 30.0) -> subprocess.Popen[str]:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        + ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        + [str(script), mode, str(timeout)],
        env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def read_until(
    job: subprocess.Popen[str], word: str, times: int
) -> tuple[list[str], dict[int, int]]:
    """Lines until `word` came `times` times, and the process of each rank."""
    assert job.stdout is not None
    lines: list[str] = []
    while sum(word in line for line in lines) < times:
        line = job.stdout.readline()
        assert line, "".join(lines)
        lines.append(line)
    pids = {int(li[1]): int(li.split()[2]) for li in lines if li.startswith("<") and "> pid" in li}
    return lines, pids


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_gone(pids: list[int], seconds: float) -> float:
    start = time.monotonic()
    while any(alive(p) for p in pids):
        assert time.monotonic() - start < seconds, "still there"
        time.sleep(0.05)
    return time.monotonic() - start


def test_one_process_is_a_world_of_its_own_without_sockets():
    world = World()
    value = torch.tensor([3.0])
    assert world.main and world.sum_over_ranks(value) is value and value.item() == 3.0
    assert world.gather_objects({"a": 1}) == [{"a": 1}]
    assert world.on_main(lambda: 5) == 5
    world.barrier()
    world.close()
    with pytest.raises(InputError, match="gone"):
        world.on_main(_raise_input_error)


def _raise_input_error() -> None:
    raise InputError("gone")


def test_the_guard_names_lost_ranks_and_lets_other_errors_through():
    world = World(rank=0, size=2, timeout=7)
    with pytest.raises(LostWorkerError, match="rank 0 of 2 lost another rank while stepping"):
        with world.guard("stepping"):
            raise RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:4996")
    with pytest.raises(RuntimeError, match="shapes"):
        with world.guard("stepping"):
            raise RuntimeError("shapes cannot be multiplied (1x2 and 3x4)")


def test_cuda_is_refused_where_there_is_none():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match="--device cpu"):
        init_world("cuda", 5)
    assert init_world("auto", 5).device == torch.device("cpu")


def test_threads_are_the_cores_shared_by_the_ranks_of_a_host():
    before = torch.get_num_threads()
    try:
        cores = len(os.sched_getaffinity(0))
        assert set_threads(0, 1) == cores == torch.get_num_threads()
        assert set_threads(0, 10 * cores) == 1
        assert set_threads(3, 2) == 3 == torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_all_ranks_get_the_same_sums_values_and_errors(tmp_path):
    job = launch(tmp_path, "agree")
    out, _ = job.communicate(timeout=90)
    assert job.returncode == 0, out
    told = [[li[4:] for li in out.splitlines() if li.startswith(f"<{r}>")] for r in (0, 1)]
    answers = [lines[1:] for lines in told]  # all but the process number
    assert answers[0] == answers[1]
    assert answers[0][:4] == [
        "sum [3.0, 4.0]",
        "all [{'rank': 0, 'ids': []}, {'rank': 1, 'ids': ['x', 'x', 'x']}]",
        "main ['chosen', 0]",
        "failed the disk is full",
    ]
    assert SaveError.exit_code == 73


@pytest.mark.slow
def test_no_thread_of_the_group_is_left_to_meet_an_ending_interpreter(tmp_path):
    job = launch(tmp_path, "leave")
    out, _ = job.communicate(timeout=90)
    assert job.returncode == 0, out
    assert out.count("during True") == 2 and out.count("after []") == 2, out


@pytest.mark.slow
@pytest.mark.fault
def test_a_killed_rank_ends_the_job_with_71_and_its_name(tmp_path):
    job = launch(tmp_path, "run")
    _, pids = read_until(job, "running", 2)
    start = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    out, _ = job.communicate(timeout=15)
    assert time.monotonic() - start < 15
    assert "lost" in out and "rank 1, process" in out and "exitcode  : 71" in out, out
    assert "SIGKILL" in out and not any(alive(p) for p in pids.values())


@pytest.mark.slow
@pytest.mark.fault
def test_a_stopped_rank_is_given_up_after_the_timeout_and_named(tmp_path):
    job = launch(tmp_path, "run", timeout=4)
    _, pids = read_until(job, "running", 2)
    start = time.monotonic()
    os.kill(pids[1], signal.SIGSTOP)
    lines, _ = read_until(job, "<0> lost", 1)
    assert time.monotonic() - start < 4 + 3
    assert f"rank 1, process {pids[1]}, is stopped" in lines[-1], lines
    os.kill(pids[1], signal.SIGKILL)  # the launcher would wait 30 s for it
    job.communicate(timeout=20)
    assert not any(alive(p) for p in pids.values())


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("mode", ["run", "save", "hang"])
def test_ranks_leave_when_their_launcher_is_killed(tmp_path, mode):
    job = launch(tmp_path, mode)
    word = "pid" if mode == "hang" else "running"
    _, pids = read_until(job, word, 2)
    time.sleep(0.5)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    took = wait_gone(list(pids.values()), 10)
    out = job.stdout.read() if job.stdout else ""
    if mode == "save":  # they were asked, and had the time to save
        assert out.count("saved") == 2 and took < distributed.ORPHAN_GRACE, out


@pytest.mark.slow
def test_an_error_of_ones_own_is_not_taken_for_a_lost_rank(tmp_path):
    job = launch(tmp_path, "shape")
    out, _ = job.communicate(timeout=60)
    assert "exitcode  : 1 " in out and "inconsistent tensor size" in out, out
