"""What every test may rely on: one torch thread, fixed seeds, and where real data lies."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# The same examples on every run: a red test is red again when somebody looks at it.
hypothesis.settings.register_profile("vlbeit", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("vlbeit")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Sums in another order differ in the last bit, and two cores are shared by many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """For what a test itself draws; the package never touches the global generators."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def gen() -> torch.Generator:
    """A seeded generator for tensors a test makes up."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's own folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data beside the project (shared/data); read-only.

    A CI run without it is a fault; on a user's machine its tests are skipped.
    """
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        reason = f"no real data at {folder}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder
