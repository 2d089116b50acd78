"""A guide followed command by command in a folder of its own, with less of everything.

`SMALLER` is all that a command here has other than the page prints: fewer steps, samples or
layers, never another path or another flag of meaning. The words as printed go through the real
parser first.
"""

import contextlib
import io
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import traceback
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import vlbeit.train.bench_data
import vlbeit.train.demo
from document_blocks import (
    Block,
    Command,
    WrongPageError,
    check_command,
    check_parsed,
    commands,
    compare_printed,
    smaller,
    write_file,
)
from document_worlds import COUNT, demo_config, demo_tasks
from vlbeit.cli import main

VISUAL = {"codes": "16", "width": "24", "layers": "1", "heads": "2", "ffn": "48", "batch": "16"}
VISUAL |= {"decoder-layers": "1", "warmup-steps": "1", "total-steps": "4"}
STEPS = {"--device": "cpu", "--precision": "fp32", "--runtime.threads": "1", "--max-steps": "2"}
STEPS |= {"--save-every": "2", "--log.eval-every": "0"}
MODEL = {"--model.width": "32", "--model.ffn": "64", "--model.codes": "16"}
PICTURES = {"--model.image-size": "32 32", "--model.patch": "8", "--model.heads": "2"}
PICTURES |= {"--model.layers": "4", "--model.vocab": "600"}
STREAMS = {f"--batch.{stream}": "4" for stream in ("images", "texts", "pairs")}
TRAIN_VISUAL = {f"--tokenizers.train-visual.{name}": value for name, value in VISUAL.items()}
PRETRAIN = {**STEPS, **MODEL, **STREAMS, **TRAIN_VISUAL}
SMALL = {
    **PRETRAIN,
    **PICTURES,
    "--tokenizers.train-visual.image-size": "32 32",
    "--tokenizers.train-visual.patch": "8",
    "--tokenizers.train-text.vocab": "60",
}
SMALLER: dict[tuple[str, ...], dict[str, str]] = {
    ("demo",): {"--count": str(COUNT), "--device": "cpu"},
    ("prepare", "scenes"): {"--count": "40"},
    ("pretrain", "tiny"): PRETRAIN,
    ("pretrain", "small"): SMALL,
    ("pretrain", "base"): SMALL,
    ("finetune",): {**STEPS, "--batch.size": "8", "--batch.micro": "8"},
    ("finetune", "vqa", "base"): {
        **STEPS,
        "--batch.size": "8",
        "--batch.micro": "8",
        "--model.image-size": "40 40",
        "--model.patch": "8",
        "--input.text-length": "12",
        "--model.text-positions": "48",
        "--vqa.min-count": "1",
    },
    ("eval",): {"--samples": "16", "--device": "cpu"},
    ("report",): {"--samples": "16", "--device": "cpu"},
    ("report", "runs/tiny", "runs/demo/pretrain"): {},
    ("report", "runs/tiny-vqa", "runs/tiny-vqa-low-lr"): {},
    ("tokenizer", "train-visual"): {
        "--max-steps": "4", "--device": "cpu",
        **{f"--tokenizer.{name}": value for name, value in VISUAL.items()},
    },
    ("tokenizer", "import", "vqkd"): {"--heads": "2"},
    ("convert", "beit"): {"--heads": "2"},
    ("convert", "beitv2"): {"--heads": "2"},
    ("convert", "beit3"): {"--heads": "2"},
    ("convert", "vlmo"): {"--heads": "2", "--text-positions": "12"},
    ("bench", "step"): {"--samples": "1", "--steps": "1", **MODEL, **PICTURES},
    ("bench", "plan"): {},
    ("bench", "data"): {"--samples": "1", "--steps": "1", **MODEL, **PICTURES},
    ("bench", "serve"): {"--seconds": "0.3", "--clients": "1 2", "--rounds": "1"},
    ("bench",): {"--samples": "1", "--steps": "1", **MODEL, **PICTURES},
    ("serve",): {"--threads": "1"},
}  # fmt: skip
"""The flags of a command whose words begin so; the longest beginning counts. A last word is also
met by one that starts with it (a file's name)."""
UNCHANGED = ("--help", "--print-config", "--neighbours", "--submission")
"""A command with one of these is run as it is: it trains nothing, or takes no number of samples."""


def key_of(words: Sequence[str]) -> tuple[str, ...] | None:
    """The entry of SMALLER for the words after `vlbeit`."""
    if set(UNCHANGED) & set(words):
        return None
    found = [
        key
        for key in SMALLER
        if tuple(words[: len(key) - 1]) == key[:-1]
        and len(words) >= len(key)
        and (
            words[len(key) - 1] == key[-1]
            or (len(key) > 2 and words[len(key) - 1].startswith(key[-1]))
        )
    ]
    return max(found, key=len, default=None)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
    return port


class PageRun:
    """One page, followed from its first block to its last in the current folder."""

    def __init__(self, page: str, root: Path) -> None:
        self.page, self.root = page, root
        self.space: dict[str, Any] = {"__name__": "__page__"}
        self.printed = ""
        self.done: Counter[str] = Counter()
        self.server: subprocess.Popen[str] | None = None
        self.port = 0

    def follow(self, block: Block) -> None:
        """Do with the block what its kind asks for.

        Raises:
            WrongPageError: what a reader would get is not what the page lets expect.
        """
        kind = block.kind
        self.done[kind] += 1
        if kind == "parsed":
            check_parsed(block)
        elif kind == "file":
            write_file(block, Path.cwd())
        elif kind == "printed":
            compare_printed(block, self.printed)
        elif kind == "run" and block.language == "python":
            self.run_python(block)
        elif kind == "run":
            wanted = int(block.about) if block.remark == "ends with" else 0
            for command in commands(block):
                check_command(command, block.where)
                self.run_command(command, block.where, wanted)

    def close(self) -> None:
        """End the server of the page, as a reader does with Ctrl-C."""
        if self.server is None:
            return
        self.server.send_signal(signal.SIGINT)
        said, _ = self.server.communicate(timeout=30)
        code, self.server = self.server.returncode, None
        if code != 0:
            raise WrongPageError(f"{self.page}: the server ended with {code}:\n{said}")

    # -- python

    def run_python(self, block: Block) -> None:
        said = io.StringIO()
        code = compile("\n" * block.line + block.text, block.page, "exec")
        with contextlib.redirect_stdout(said):
            try:
                exec(code, self.space)
            except Exception:
                raise WrongPageError(f"{block.where}:\n{traceback.format_exc()}") from None
        self.printed += said.getvalue()

    # -- shell

    def run_command(self, command: Command, where: str, wanted: int) -> None:
        program = command.words[0]
        if program == "vlbeit":
            self.run_vlbeit(list(command.words[1:]), command.into, where, wanted)
        elif program == "torchrun":
            self.run_torchrun(command, where)
        elif program == "make":
            self.outside(["make", "-n", "-C", str(self.root), *command.words[1:]], where)
        elif program == "pip":
            self.check_pip(command.words, where)
        elif program == "curl":
            self.run_curl(command.words, where)
        elif command.words[:3] == ("python", "-m", "pytest"):
            words = [sys.executable, *command.words[1:], "--collect-only", "-q"]
            self.outside(words, where, folder=self.root)
        else:
            raise WrongPageError(f"{where}: {shlex.join(command.words)}: no way to run {program!r}")

    def shrunk(self, words: list[str]) -> list[str]:
        key = key_of(words)
        if key is None:
            return words
        return smaller(words, SMALLER[key])

    def run_vlbeit(self, words: list[str], into: str, where: str, wanted: int) -> None:
        if words[0] == "serve":
            return self.start_server(self.shrunk(words), where)
        small = self.shrunk(words)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(small)
        self.printed += out.getvalue() + err.getvalue()
        if code != wanted:
            said = (out.getvalue() + err.getvalue())[-3000:]
            raise WrongPageError(
                f"{where}: vlbeit {shlex.join(words)} ended with {code}, not {wanted} "
                f"(run as: {shlex.join(small)})\n{said}"
            )
        if into:
            Path(into).write_text(out.getvalue())

    def run_torchrun(self, command: Command, where: str) -> None:
        at = command.words.index("vlbeit")
        words = [*command.words[1 : at + 1], *self.shrunk(list(command.words[at + 1 :]))]
        launcher = smaller(words[: words.index("-m")], {"--nproc-per-node": "2"})
        rest = words[words.index("-m") :]
        self.outside([sys.executable, "-m", "torch.distributed.run", *launcher, *rest], where)

    def outside(self, words: Sequence[str], where: str, folder: Path | None = None) -> None:
        environment = {**os.environ, "PYTHONPATH": str(self.root / "src"), "OMP_NUM_THREADS": "1"}
        environment.pop("MAKEFLAGS", None)
        done = subprocess.run(
            words, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
        )
        self.printed += done.stdout + done.stderr
        if done.returncode:
            said = (done.stdout + done.stderr)[-3000:]
            raise WrongPageError(
                f"{where}: {shlex.join(words)}: ended with {done.returncode}\n{said}"
            )

    def check_pip(self, words: Sequence[str], where: str) -> None:
        """Nothing is installed by a test: the extras that it names must exist."""
        project = tomllib.loads((self.root / "pyproject.toml").read_text())["project"]
        for word in words:
            name, _, extras = word.rstrip("]").partition("[")
            asked = set(filter(None, extras.split(",")))
            unknown = asked - set(project["optional-dependencies"])
            if name in (".", "vlbeit") and unknown:
                raise WrongPageError(f"{where}: no extra {', '.join(sorted(unknown))}")

    def run_curl(self, words: Sequence[str], where: str) -> None:
        if self.server is None:
            raise WrongPageError(f"{where}: curl, and no `vlbeit serve` before it on the page")
        if shutil.which("curl") is None:
            pytest.fail("the pages use curl, which is not installed here")
        here = [
            word.replace(f"127.0.0.1:{port}", f"127.0.0.1:{self.port}")
            for word in words
            for port in (8000,)
        ]
        self.outside([*here, "--silent", "--show-error", "--fail-with-body"], where)

    def start_server(self, words: list[str], where: str) -> None:
        """The server in a process of its own, on a free port; it is left running for the page."""
        self.close()
        self.port = free_port()
        words = smaller(words, {"--port": str(self.port)})
        environment = {**os.environ, "PYTHONPATH": str(self.root / "src"), "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            [sys.executable, "-m", "vlbeit", *words],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        ready = f"http://127.0.0.1:{self.port}/ready"
        for _ in range(600):
            if self.server.poll() is not None:
                said = self.server.communicate()[0]
                self.server = None
                raise WrongPageError(f"{where}: vlbeit {shlex.join(words)} ended:\n{said}")
            with contextlib.suppress(OSError), urllib.request.urlopen(ready, timeout=5) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.1)
        raise WrongPageError(f"{where}: no /ready from vlbeit {shlex.join(words)}")


@contextlib.contextmanager
def smaller_constants() -> Iterator[None]:
    """What no flag makes smaller: the recipes of the demo, and the data that `bench` makes up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vlbeit.train.demo, "tiny", demo_config)
        patch.setattr(
            vlbeit.train.demo, "task_configs", lambda names, most_steps: demo_tasks(names)
        )
        for name in ("PHOTOS", "SMALL_RECORDS", "DOCUMENTS"):
            patch.setattr(vlbeit.train.bench_data, name, 200)
        yield
