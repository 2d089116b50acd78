"""`vlbeit export KIND RUN OUT ...`: a run for others to use."""

import importlib
from collections.abc import Sequence

from vlbeit.errors import ConfigError

KINDS = {
    "hf": "a folder for the Hugging Face hub, with its model card",
    "onnx": "one mode as a graph for onnxruntime, checked against torch",
}
USAGE = "\n".join(
    ["usage: vlbeit export KIND RUN OUT ...      `vlbeit export KIND --help` explains it", ""]
    + [f"  {name:<5} {help}" for name, help in KINDS.items()]
)


def main(argv: Sequence[str]) -> int:
    """Hand the words after the kind on; returns the exit code.

    Raises:
        ConfigError: no such kind.
    """
    kind = argv[0] if argv else ""
    if kind in ("-h", "--help"):
        print(USAGE)
        return 0
    if kind not in KINDS:
        found = repr(kind) if argv else "nothing"
        raise ConfigError(f"vlbeit export: found {found}, known are {', '.join(KINDS)}\n{USAGE}")
    code: int = importlib.import_module(f"vlbeit.serve.export_{kind}").main(argv[1:])
    return code
