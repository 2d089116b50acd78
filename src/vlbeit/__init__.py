"""VL-BEiT: vision-language pretraining by masked prediction alone.

    import vlbeit
    run = vlbeit.load("runs/tiny-vqa")
    run.answer("dog.jpg", "what colour is the dog?")

`import vlbeit` is cheap: torch is imported when `load` or `VLBeit` is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlbeit.nn.model import VLBeit
    from vlbeit.serve.predictor import Predictor, load

__version__ = "0.1.0"
__all__ = ["Predictor", "VLBeit", "__version__", "load"]

_HOMES = {
    "VLBeit": "vlbeit.nn.model",
    "Predictor": "vlbeit.serve.predictor",
    "load": "vlbeit.serve.predictor",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        # By name, not by an import statement: the package root has no line in the import rule.
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vlbeit' has no attribute {name!r}")
