"""How a model's blocks run on a device: compiled or not, their activations kept or made again."""

import torch

from vlbeit.config import RuntimeConfig
from vlbeit.nn.model import VLBeit


def set_blocks(model: VLBeit, runtime: RuntimeConfig, device: torch.device) -> None:
    """Apply `runtime.checkpoint_activations` and `runtime.compile` to a model, in place.

    Every block is compiled by itself: the same code serves all layers of a kind, and names in
    checkpoints stay as they are. A length of text that is new compiles once more, then lengths are
    left open. On a GPU, compiled or not, no shape depends on a draw: a step waits for the device
    when it writes its log, and nowhere before.
    """
    model.backbone.checkpoint_activations = runtime.checkpoint_activations
    compiled = compiles(runtime, device)
    for block in model.backbone.blocks:
        block.static_shapes = compiled or device.type == "cuda"  # type: ignore[assignment]
        if compiled:
            block.compile()


def compiles(runtime: RuntimeConfig, device: torch.device) -> bool:
    """Whether `runtime.compile` means yes on this device."""
    return runtime.compile == "on" or (runtime.compile == "auto" and device.type == "cuda")
