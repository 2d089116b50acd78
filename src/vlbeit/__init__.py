"""VL-BEiT: vision-language pretraining by masked prediction alone.

    import vlbeit
    model = vlbeit.load("runs/demo/pretrain/checkpoints/step-0000600")

`import vlbeit` is cheap: torch is imported when `load` or `VLBeit` is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from vlbeit.nn.model import VLBeit

__version__ = "0.1.0"
__all__ = ["VLBeit", "__version__", "load"]


def load(folder: "str | Path") -> "VLBeit":
    """The model of a checkpoint folder (config.json and model.safetensors), in eval mode.

    Raises:
        InputError: the folder or a file in it is missing or does not fit the config.
    """
    model: VLBeit = __getattr__("VLBeit").from_pretrained(folder)
    return model.eval()


def __getattr__(name: str) -> Any:
    if name == "VLBeit":
        # By name, not by an import statement: the package root has no line in the import rule.
        return importlib.import_module("vlbeit.nn.model").VLBeit
    raise AttributeError(f"module 'vlbeit' has no attribute {name!r}")
