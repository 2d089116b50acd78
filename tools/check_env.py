"""Fails when the environment is not the one the tests were written for.

    python tools/check_env.py                 what users may have: torch loads, nothing shadows it
    python tools/check_env.py --expect-cpu    what CI must have: a CPU build and no GPU packages

An unconstrained install of many packages of this field swaps a CPU torch for a CUDA one and
brings gigabytes; and a torchvision that does not fit torch breaks the import of others.
"""

import argparse
import importlib
import importlib.metadata
import sys
from collections.abc import Iterator, Mapping

GPU_PACKAGES = ("nvidia-", "cuda-", "triton")


def problems(installed: Mapping[str, str], *, expect_cpu: bool) -> Iterator[str]:
    """What is wrong with a set of distributions (lower-case name -> version)."""
    torch = installed.get("torch")
    if torch is None:
        yield "torch is not installed"
    elif expect_cpu and "+cpu" not in torch:
        yield f"torch {torch} is not a CPU build; install with PIP_CONSTRAINT=constraints/cpu.txt"
    if expect_cpu:
        for name in sorted(installed):
            if name.startswith(GPU_PACKAGES):
                yield f"{name} {installed[name]} belongs to a GPU build of torch"
        if "torchvision" in installed:
            yield "torchvision is installed; vlbeit does not use it and a misfit breaks imports"


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the environment of this interpreter.")
    parser.add_argument("--expect-cpu", action="store_true")
    args = parser.parse_args()
    installed = {
        dist.metadata["Name"].lower(): dist.version for dist in importlib.metadata.distributions()
    }
    found = list(problems(installed, expect_cpu=args.expect_cpu))
    for module in ("torch", "vlbeit"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            found.append(f"{module} cannot be imported: {error}")
    for text in found:
        print(f"check_env: {text}", file=sys.stderr)
    if not found:
        print(f"environment: {len(installed)} packages, torch {installed['torch']}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
