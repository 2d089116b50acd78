"""A run that was stopped, killed, damaged or starved goes on as if nothing had happened.

Numbers as in the reliability contract: R01 to R06 of its fault tests, in slices.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from toy_job import (
    SAVE_EVERY,
    STEPS,
    Toy,
    checkpoints,
    command,
    kill,
    killed_at_the_end,
    last_step,
    losses,
    rows,
    said,
    same_history,
    state_at,
    wait_for_step,
)

from vlbeit.checkpoint import FAULT_POINTS, load_newest, verify_checkpoint

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(900)]


def test_r01_the_same_command_gives_the_same_losses_and_weights(
    toy: Toy, undisturbed: Path, tmp_path: Path
) -> None:
    again = replace(toy, visual=None)  # this one trains its tokenizer too
    again.run(tmp_path / "again", STEPS)
    same_history(tmp_path / "again", undisturbed, STEPS)
    toy.run(tmp_path / "other", 10, "--optim.betas", "0.9", "0.9991")
    assert losses(tmp_path / "other", 10) != losses(undisturbed, 10)  # the comparison can fail


def test_r02_a_run_killed_at_random_times_ends_with_the_same_bits(
    toy: Toy, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    draw = random.Random(2)
    for target in sorted(draw.sample(range(SAVE_EVERY + 1, STEPS - 10), 4)):
        before = last_step(run)
        job = toy.start(run, STEPS)
        with killed_at_the_end(job):
            # Past the rows of the killed run, or this one would be killed before it goes on.
            wait_for_step(job, run, max(target, before + 1))
            time.sleep(draw.uniform(0, 0.3))
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
        reached = last_step(run)
        assert all(verify_checkpoint(folder)["ok"] for folder in checkpoints(run))
        saved = int(checkpoints(run)[-1].name[5:]) if checkpoints(run) else 0
        assert reached - saved <= SAVE_EVERY
    toy.run(run, STEPS)
    same_history(run, undisturbed, STEPS)
    assert said(run).count("going on from") >= 3


def test_r03_a_crash_at_any_point_of_a_save_changes_nothing_in_the_end(
    toy: Toy, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for (
        point
    ) in FAULT_POINTS:  # the first four before step 5 is saved, the others one save later each
        toy.run(run, 20, "--log.keep", "1", fault=point, code=137)
    toy.run(run, 20, "--log.keep", "1")
    same_history(run, undisturbed, 20)
    assert said(run).count("left by a save that was cut off") == 4
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-0000020"]


DISK = """
mkdir -p "$1"; mount -t tmpfs -o size="$2" none "$1" || exit 99
shift 2; exec "$@"
"""

STARVED = """
import shutil, sys; sys.path[:0] = sys.argv[4:]
from pathlib import Path
from toy_job import *
run, good = Path(sys.argv[1]), Path(sys.argv[2])
toy = Toy(Path(sys.argv[3]), good / "tokenizers" / "visual")
free = lambda: shutil.disk_usage(run.parent).free
job = toy.start(run, 20, "--log.keep", "0")
with killed_at_the_end(job):
    wait_for_step(job, run, 6)                  # one checkpoint is there; now the disk fills up
    (run.parent / "filler").write_bytes(bytes(free() - 100_000))
    assert job.wait(60) == 73, said(run)
told = said(run)
assert "bytes needed" in told and "bytes free" in told and str(run) in told, told
assert command("verify", str(run)).returncode == 0
toy.run(run, 20, code=73)                       # still full: refused again, nothing broken
(run.parent / "filler").unlink()
toy.run(run, 20)
same_history(run, good, 20)
crowded = run.with_name("crowded")
(run.parent / "filler").write_bytes(bytes(free() - 1_500_000))
toy.run(crowded, 20, code=73)
assert "crowded: no room" in said(crowded), said(crowded)
assert not rows(crowded)                        # refused at the start, before any step
print("starved and healed")
"""


def test_r04_a_full_disk_ends_with_73_and_heals_when_there_is_room(
    toy: Toy, undisturbed: Path, tmp_path: Path
) -> None:
    size = sum(f.stat().st_size for f in checkpoints(undisturbed)[0].rglob("*") if f.is_file())
    disk = ["unshare", "-m", "bash", "-c", DISK, "-", str(tmp_path / "disk"), str(6 * size)]
    probe = subprocess.run([*disk, "true"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"no private filesystem here: {probe.stderr.strip()}")
    done = subprocess.run(
        [*disk, sys.executable, "-c", STARVED, str(tmp_path / "disk/run"), str(undisturbed)]
        + [str(toy.data), str(Path(__file__).parent), *sys.path],
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert "starved and healed" in done.stdout, done.stdout + done.stderr


def test_r05_a_flipped_bit_is_found_and_the_previous_checkpoint_is_used(
    toy: Toy, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for step in (15, 20):
        name = f"checkpoints/step-{step:07d}"
        shutil.copytree(undisturbed / name, run / name)
    newest = checkpoints(run)[-1]
    files = sorted(f for f in newest.rglob("*") if f.is_file())
    draw = random.Random(5)
    for turn in range(20):
        path = files[turn % len(files)]
        whole = path.read_bytes()
        bit = draw.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        told: list[str] = []
        found = load_newest(run, told.append)
        assert found is not None and found.step == 15, (path, bit)
        assert path.name in told[0] and "expected" in told[0] and "found" in told[0]
        path.write_bytes(whole)
    path.write_bytes(damaged)
    toy.run(run, 25)
    assert f"skipped damaged checkpoint {newest}" in said(run)
    assert "step-0000015 (step 15)" in said(run)
    assert state_at(run, 25) == state_at(undisturbed, 25)
    assert command("verify", str(run)).returncode == 0  # the damaged one was written anew


def test_r06_a_stop_request_saves_at_the_next_step_and_ends_with_75(
    toy: Toy, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for number, step in ((signal.SIGTERM, 7), (signal.SIGINT, 13)):
        job = toy.start(run, 30, save_every=100)
        with killed_at_the_end(job):
            wait_for_step(job, run, step)
            began = time.monotonic()
            kill(job.pid, number)
            assert job.wait(10) == 75, said(run)
            assert time.monotonic() - began < 10
        assert checkpoints(run)[-1].name == f"step-{last_step(run):07d}"
    toy.run(run, 30, save_every=100)
    same_history(run, undisturbed, 30)
    steps = [row["step"] for row in rows(run)]
    assert steps == list(range(1, 31))
