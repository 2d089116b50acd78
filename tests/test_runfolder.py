"""Laws of the run folder: one writer, no torn row after a resume, nothing counted twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlbeit.errors import SaveError
from vlbeit.train import runfolder
from vlbeit.train.runfolder import JsonLines, RunFolder
from vlbeit.train.signals import REPEAT_AFTER, StopSignal

SOURCE = Path(runfolder.__file__).parents[2]


def rows_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_losses_come_back_bit_by_bit_and_what_is_not_finite_too(tmp_path):
    rows = JsonLines(tmp_path / "metrics.jsonl")
    for step, loss in enumerate((0.1 + 0.2, 1 / 3, float("inf"), float("nan"))):
        rows.append({"step": step, "loss": loss.hex(), "norm": {"grad": [loss]}})
    found = rows_of(rows.path)
    assert [float.fromhex(str(r["loss"])) for r in found[:3]] == [0.1 + 0.2, 1 / 3, float("inf")]
    assert found[2]["norm"] == {"grad": ["inf"]} and found[3]["norm"] == {"grad": ["nan"]}


@pytest.mark.parametrize("step", [0, 1, 7, 12, 99])
def test_a_resume_cuts_exactly_the_rows_after_its_step(tmp_path, step):
    rows = JsonLines(tmp_path / "skips.jsonl")
    steps = [1, 1, 3, 7, 7, 7, 12]  # several rows a step, and steps without any
    for number, s in enumerate(steps):
        rows.append({"step": s, "number": number, "text": "x" * 10_000 * (number % 2)})
    cut, torn = rows.truncate_after(step)
    assert [r["step"] for r in rows_of(rows.path)] == [s for s in steps if s <= step]
    assert (cut, torn) == (sum(s > step for s in steps), 0)
    rows.append({"step": step + 1})
    assert rows_of(rows.path)[-1] == {"step": step + 1}


@pytest.mark.parametrize("kept", [1, 10, 25])
def test_a_line_cut_off_by_a_kill_goes_and_the_rows_before_it_stay(tmp_path, kept):
    rows = JsonLines(tmp_path / "ledger.jsonl")
    for step in (1, 2, 3):
        rows.append({"step": step, "ids": ["coco:0:17"]})
    whole = rows.path.read_bytes()
    rows.path.write_bytes(whole + whole.splitlines()[0][:kept])
    assert rows.truncate_after(3) == (0, kept)
    assert rows.path.read_bytes() == whole


def test_blocks_of_zeros_after_a_power_cut_go_too(tmp_path):
    rows = JsonLines(tmp_path / "ledger.jsonl")
    rows.append({"step": 1})
    whole = rows.path.read_bytes()
    rows.path.write_bytes(whole + bytes(5000) + b"\n" + bytes(17))
    rows.truncate_after(9)
    assert rows.path.read_bytes() == whole


def test_cutting_a_long_file_reads_only_its_end(tmp_path):
    path = tmp_path / "ledger.jsonl"
    row = b'{"step":1,"ids":"%s"}\n' % (b"x" * 1000)
    path.write_bytes(row * 100_000 + b'{"step":2}\n')
    start = time.monotonic()
    assert JsonLines(path).truncate_after(1) == (1, 0)
    assert time.monotonic() - start < 0.5
    assert path.stat().st_size == len(row) * 100_000


def test_no_file_and_an_empty_file_have_nothing_to_cut(tmp_path):
    path = tmp_path / "skips.jsonl"
    assert JsonLines(path).truncate_after(3) == (0, 0)
    path.touch()
    assert JsonLines(path).truncate_after(3) == (0, 0)


@pytest.mark.fault
def test_a_row_that_does_not_fit_names_the_file_and_a_resume_heals_it(tmp_path):
    limited = (
        "import resource, sys; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path\n"
        "from vlbeit.errors import SaveError\n"
        "from vlbeit.train.runfolder import JsonLines\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (250, 250))\n"
        "rows = JsonLines(Path(sys.argv[1]))\n"
        "try:\n"
        "    for step in range(10): rows.append({'step': step, 'text': 'x' * 100})\n"
        "except SaveError as error: print(step, error)\n"
    )
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", limited, str(path), str(SOURCE)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.startswith("2 ") and str(path) in done.stdout, done.stderr
    assert path.stat().st_size == 250
    rows = JsonLines(path)
    rows.truncate_after(9)
    assert [r["step"] for r in rows_of(path)] == [0, 1]


HOLDER = """
import sys; sys.path[:0] = sys.argv[2:]
import os, time
from pathlib import Path
from vlbeit.train.runfolder import RunFolder
RunFolder(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), str(SOURCE)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


def test_a_second_start_is_refused_with_the_holder_named_and_writes_nothing(tmp_path):
    holder = hold(tmp_path)
    try:
        with pytest.raises(SaveError, match=f"process {holder.pid} on "):
            RunFolder(tmp_path, lock_wait=0.3).acquire()
        assert [p.name for p in tmp_path.iterdir()] == ["run.lock"]
        assert SaveError.exit_code == 73
    finally:
        holder.kill()
        holder.wait()


def test_a_killed_holder_frees_the_folder_for_a_start_that_waits(tmp_path, capsys):
    holder = hold(tmp_path)
    os.kill(holder.pid, signal.SIGKILL)
    with RunFolder(tmp_path, lock_wait=10) as run:
        run.log("mine now")
    holder.wait()
    assert "mine now" in (tmp_path / "log.txt").read_text()
    with RunFolder(tmp_path, lock_wait=0):  # released: the next one gets it at once
        pass


def test_the_lock_is_broken_neither_by_its_file_nor_by_its_removal(tmp_path):
    """A stale file blocks nobody; the lock is the kernel's."""
    (tmp_path / "run.lock").write_text('{"pid": 1, "host": "elsewhere", "started": 0}')
    with RunFolder(tmp_path, lock_wait=0) as run:
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
        assert run.path == tmp_path


def test_a_folder_that_cannot_be_made_is_a_save_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match="file"):
        RunFolder(tmp_path / "file" / "run").acquire()


def test_truncation_of_the_folder_says_what_it_cut(tmp_path, capsys):
    with RunFolder(tmp_path) as run:
        for step in (1, 2, 3):
            run.metrics.append({"step": step})
            run.ledger.append({"step": step})
        run.sync()
        run.truncate_after(1)
    assert [r["step"] for r in rows_of(tmp_path / "metrics.jsonl")] == [1]
    assert "metrics.jsonl: cut 2 rows after step 1" in capsys.readouterr().out
    assert "ledger.jsonl: cut 2 rows" in (tmp_path / "log.txt").read_text()


def test_config_and_environment_are_replaced_whole(tmp_path):
    import torch

    run = RunFolder(tmp_path)
    run.write_json("config.json", {"seed": 1, "lr": 2e-3})
    run.write_json("config.json", {"seed": 2})
    assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 2}
    env = runfolder.environment(world_size=2, threads=1, device=torch.device("cpu"))
    assert env["versions"]["torch"] == torch.__version__ and env["world_size"] == 2
    run.write_json("env.json", env)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["config.json", "env.json"]


def test_a_stop_is_remembered_and_its_echo_from_the_launcher_does_not_kill():
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        stop = StopSignal().install()
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and stop.name == "SIGINT"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.slow
def test_a_second_signal_after_a_while_ends_the_process_at_once():
    code = (
        "import sys, time; sys.path[:0] = sys.argv[1:]\n"
        "from vlbeit.train.signals import StopSignal\n"
        "StopSignal().install(); print('ready', flush=True)\n"
        "while True: time.sleep(1)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(SOURCE)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    child.terminate()
    time.sleep(REPEAT_AFTER + 0.3)
    assert child.poll() is None
    child.terminate()
    assert child.wait(5) == 128 + signal.SIGTERM
