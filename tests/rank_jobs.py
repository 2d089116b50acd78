"""Programs of several ranks for tests: started by torchrun over gloo, as a user's would be."""

import os
import subprocess
import sys
from pathlib import Path

import vlbeit

SOURCE = Path(vlbeit.__file__).parents[1]
TESTS = Path(__file__).parent


def on_ranks(
    ranks: int, *words: str, launch: tuple[str, ...] = (), code: int = 0, **more: str
) -> str:
    """Runs `python words` on so many processes (one: without a launcher); returns what they said.

    Args:
        words: after `python`; a module as "-m", "NAME".
        launch: more options of torchrun.
        code: what it must end with.
        more: variables of the environment.
    """
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
        start += [*launch]
    if ranks > 1 and words[0] == "-m":
        words = ("-m", "--", *words[1:])  # else torchrun takes --start for an option of its own
    done = subprocess.run(
        [*start, *words],
        env={
            **os.environ,
            "PYTHONPATH": f"{SOURCE}:{TESTS}",
            "OMP_NUM_THREADS": "1",
            **more,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    return said
