"""Laws of the allocator's settings, allocator.py."""

import os
import platform
import subprocess
import sys

import pytest

from vlbeit.allocator import OWN

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")

STEPS = """
import resource, sys, torch
if "keep" in sys.argv:
    from vlbeit.allocator import keep_freed_memory
    print(keep_freed_memory())
def step():
    # 2 blocks of 40 MB: above 32 MB glibc never takes them from the heap by itself
    return [torch.ones(10_000_000) for _ in range(2)]
# With glibc 2.36 the heap first grows: five steps fetched nine blocks in all, the later ones none.
for _ in range(20):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*words: str, **settings: str) -> list[str]:
    """What a process of its own prints: whether memory is kept, and the page faults of 5 steps."""
    env = {name: value for name, value in os.environ.items() if name not in OWN}
    done = subprocess.run(
        [sys.executable, "-c", STEPS, *words],
        env={**env, **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.slow
def test_kept_memory_is_not_fetched_page_by_page_in_every_step():
    (given,) = faults()
    said, kept = faults("keep")
    assert said == "True"
    assert int(kept) < 100 < 5_000 < int(given)


@pytest.mark.slow
def test_an_allocator_that_the_environment_sets_is_left_alone():
    said, fetched = faults("keep", MALLOC_MMAP_THRESHOLD_="1048576")
    assert said == "False"
    assert int(fetched) > 5_000
