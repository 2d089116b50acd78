"""One small world and two undisturbed runs, which every disturbed one is compared with."""

from dataclasses import replace
from pathlib import Path

import pytest
from toy_job import STEPS, Toy, command


@pytest.fixture(scope="session")
def _first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Toy, Path]:
    folder = tmp_path_factory.mktemp("faults")
    drawn = command("prepare", "scenes", "--out", str(folder / "scenes"), "--count", "150")
    assert drawn.returncode == 0, drawn.stderr
    toy = Toy(folder / "scenes")
    run = folder / "undisturbed"
    toy.run(run, STEPS, "--log.keep", "0")
    return toy, run


@pytest.fixture(scope="session")
def undisturbed(_first: tuple[Toy, Path]) -> Path:
    """A run of one process that trained its own tokenizer, with all its checkpoints."""
    return _first[1]


@pytest.fixture(scope="session")
def toy(_first: tuple[Toy, Path]) -> Toy:
    """The job on the same data with the tokenizer of the undisturbed run, to save its training."""
    return replace(_first[0], visual=_first[1] / "tokenizers" / "visual")


@pytest.fixture(scope="session")
def undisturbed_pair(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes, with all its checkpoints."""
    run = tmp_path_factory.mktemp("pair") / "undisturbed"
    toy.run(run, 40, "--log.keep", "0", ranks=2)
    return run
