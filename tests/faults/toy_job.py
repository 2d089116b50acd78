"""The toy job of the fault tests: a real `vlbeit pretrain`, made small by its own flags.

Width 64, two layers, 4 images, 4 texts and 4 pairs a step, a checkpoint every 5 steps, one thread a
rank. Nothing here reaches into the package: jobs are started, signalled and looked at from outside.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vlbeit

SOURCE = Path(vlbeit.__file__).parents[1]
SAVE_EVERY = 5
STEPS = 60
"""Steps of the undisturbed run of one process."""

TOY = """
    --device cpu --precision fp32 --seed 0 --runtime.threads 1 --runtime.step-timeout 60
    --model.width 64 --model.layers 2 --model.ffn 128 --model.drop-path 0.1
    --batch.images 4 --batch.texts 4 --batch.pairs 4 --batch.micro 4 --input.shuffle-window 256
    --optim.warmup-steps 10 --optim.total-steps 100
    --log.print-every 50 --log.eval-every 0
    --tokenizers.train-visual.total-steps 20 --tokenizers.train-visual.warmup-steps 5
    --tokenizers.train-visual.width 32 --tokenizers.train-visual.heads 2
    --tokenizers.train-visual.ffn 64 --tokenizers.train-visual.batch 16
""".split()


@dataclass(frozen=True)
class Toy:
    """The data, and the visual tokenizer once a first run has trained it."""

    data: Path
    visual: Path | None = None

    def start(
        self,
        run_dir: Path,
        steps: int,
        *more: str,
        ranks: int = 1,
        fault: str = "",
        save_every: int = SAVE_EVERY,
        restarts: int = 0,
        before: tuple[str, ...] = (),
    ) -> subprocess.Popen[str]:
        """The job in a session of its own; its output goes to run_dir with .out at the end.

        `before`: words of a command that starts the job, such as `unshare`; `restarts`: how often
        torchrun starts all ranks again when one is lost.
        """
        words = [*before, sys.executable, "-m"]
        if ranks > 1:
            words += ["torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
            words += ["--max-restarts", str(restarts), "-m"]
        words += ["vlbeit", "pretrain", "tiny", "--data", str(self.data), "--run-dir", str(run_dir)]
        words += ["--max-steps", str(steps), "--save-every", str(save_every), *TOY, *more]
        if self.visual is not None:
            words += ["--tokenizers.visual", str(self.visual)]
        environment = {
            **os.environ,
            "PYTHONPATH": str(SOURCE),
            "OMP_NUM_THREADS": "1",
            "VLBEIT_FAULT": fault,
        }
        with output_of(run_dir).open("a") as out:
            return subprocess.Popen(
                words, env=environment, stdout=out, stderr=out, text=True, start_new_session=True
            )

    def run(self, run_dir: Path, steps: int, *more: str, code: int = 0, **how: Any) -> None:
        """Starts the job and waits; anything but exit code `code` fails with its output."""
        job = self.start(run_dir, steps, *more, **how)
        with killed_at_the_end(job):
            assert job.wait(600) == code, said(run_dir)


@contextmanager
def killed_at_the_end(job: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """No test leaves a process of its job behind."""
    try:
        yield job
    finally:
        for pid in [job.pid, *ranks_of(job)]:
            kill(pid)
        job.wait()


def output_of(run_dir: Path) -> Path:
    return run_dir.with_name(run_dir.name + ".out")


def said(run_dir: Path) -> str:
    """All the job has printed, over all its starts."""
    return output_of(run_dir).read_text()


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun started, by rank."""
    found: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher.pid:
                words = (folder / "environ").read_bytes().split(b"\0")
                found[next(int(w[5:]) for w in words if w.startswith(b"RANK="))] = int(folder.name)
        except (OSError, StopIteration):
            continue
    return [found[rank] for rank in sorted(found)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until_gone(pids: list[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < deadline, f"processes {left} are still there"
        time.sleep(0.05)


def wait_for_step(job: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    """Until the row of that step is in metrics.jsonl."""
    deadline = time.monotonic() + 120
    while last_step(run_dir) < step:
        assert job.poll() is None, said(run_dir)
        assert time.monotonic() < deadline, said(run_dir)
        time.sleep(0.01)


def rows(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The whole lines of a file of rows; a torn one at its end is left out."""
    path = run_dir / name
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def last_step(run_dir: Path) -> int:
    found = rows(run_dir)
    return int(found[-1]["step"]) if found else 0


def losses(run_dir: Path, steps: int) -> list[tuple[int, str]]:
    """(step, hexadecimal loss) of the first steps."""
    return [(row["step"], row["loss"]) for row in rows(run_dir)][:steps]


def checkpoints(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("step-*"))


def state_at(run_dir: Path, step: int) -> dict[str, str]:
    """sha256 of what a run learned and of where it stands, from the manifest of a checkpoint."""
    manifest = json.loads((run_dir / f"checkpoints/step-{step:07d}" / "manifest.json").read_text())
    names = ("model.safetensors", "optimizer.safetensors", "state.json")
    return {name: manifest["files"][name]["sha256"] for name in names}


def same_history(one: Path, other: Path, steps: int) -> None:
    """Losses, sample ids and weights of the first `steps` steps, bit by bit."""
    assert len(losses(one, steps)) == steps
    assert losses(one, steps) == losses(other, steps)
    assert rows(one, "ledger.jsonl")[:steps] == rows(other, "ledger.jsonl")[:steps]
    assert state_at(one, steps) == state_at(other, steps)


def command(*words: str) -> subprocess.CompletedProcess[str]:
    """A short `vlbeit` command."""
    return subprocess.run(
        [sys.executable, "-m", "vlbeit", *words],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        timeout=120,
    )
