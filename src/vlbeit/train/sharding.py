"""Weights, gradients and optimizer state shared out over the ranks (FSDP2).

A rank keeps its share of every tensor (rows of the first dimension). The weights of a block are
gathered when its turn comes and dropped after it, forward and backward; its gradients are added
and shared out as soon as they are there. So at two ranks about half of the weights, gradients and
moments lie in a rank's memory, and one block's weights beside them.

Every rank must call the blocks equally often: the loader gives them equally many micro-batches
(`aligned`), an empty one where a rank has no sample.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from vlbeit.errors import ConfigError
from vlbeit.nn.model import VLBeit
from vlbeit.tensorparts import fill_from, part_infos
from vlbeit.train.distributed import World
from vlbeit.train.gradients import fill_missing, grad_of, sum_gradients
from vlbeit.train.optim import named_parameters

T = TypeVar("T")

UNIT = 1 << 20
"""Numbers in a layer of a task's head from which on it is gathered by itself, not with the rest."""


def shard_model(root: nn.Module, model: VLBeit, world: World) -> None:
    """Shares the parameters of `root`, which holds the model, out over the ranks, in place.

    From here on every way into the model leads through `root` (forward, `ask_inside`). Call it
    before the optimizer is made: the parameters become others. Single numbers, which FSDP2 cannot
    share, stay whole at every rank.

    Raises:
        ConfigError: this torch cannot do it for a model whose ranks reach different experts.
    """
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise ConfigError(
            f"runtime.sharding full needs torch 2.13 or newer, found {torch.__version__}: earlier "
            "ones wait for ever when ranks reach different experts. Leave it at none"
        )
    mesh = init_device_mesh(world.device.type, (world.size,))
    whole = {p for p in root.parameters() if p.ndim == 0}
    branching = [*model.backbone.blocks, root]
    for unit in (*model.backbone.blocks, *layers_of(model), root):
        fully_shard(unit, mesh=mesh, ignored_params=whole)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by global counts already: a sum and no mean. gloo knows no other.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            # Which experts of a block a micro-batch reaches may differ from rank to rank.
            module.set_reduce_scatter_unused_params(module in branching, recurse=False)
    for block in model.backbone.blocks:
        register_fsdp_forward_method(block, "rows")
    register_fsdp_forward_method(root, "inside")


def ask_inside(root: nn.Module, ask: Callable[[], T]) -> T:
    """What `ask` finds when it calls the model, without gradients; every rank calls it together."""
    found: T = root.inside(ask)  # type: ignore[operator]
    assert isinstance(root, FSDPModule)
    root.reshard()  # without a backward pass nothing else would do it
    return found


def layers_of(model: VLBeit) -> Iterator[nn.Module]:
    """The large layers outside the blocks, each of which has its own turn."""
    yield model.image
    yield model.text
    yield from model.heads.values()
    for layer in model.task.modules() if model.task is not None else ():
        leaf = next(layer.children(), None) is None
        if leaf and sum(p.numel() for p in layer.parameters()) >= UNIT:
            yield layer


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it: the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class ShardedGradients:
    """Shares have been added in the backward passes; what is whole is added here."""

    def __init__(self, parameters: Iterable[nn.Parameter], world: World) -> None:
        self._shares: list[nn.Parameter] = []
        self._whole: list[nn.Parameter] = []
        for parameter in parameters:
            if parameter.requires_grad:
                (self._shares if isinstance(parameter, DTensor) else self._whole).append(parameter)
        self._world = world

    def end_part(self) -> None:
        """Backward passes add to the gradients by themselves."""

    def finish(self, limit: float) -> Tensor:
        fill_missing(self._shares)
        sum_gradients(self._whole, self._world)
        # Norms of DTensors and of tensors do not mix, so all is done on what lies here.
        shares = [local(grad_of(p)) for p in self._shares]
        whole = [grad_of(p) for p in self._whole]
        square = self._world.sum_over_ranks(squares_of(shares, self._world.device))
        norm = (square + squares_of(whole, self._world.device)).sqrt()
        factor = min(1.0, limit / (float(norm) + 1e-6))
        if factor < 1.0:
            for grad in (*shares, *whole):
                grad.mul_(factor)
        return norm


def squares_of(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """The sum of the squares of all their numbers, float64."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for tensor in tensors:
        total += tensor.square().sum()
    return total


def load_optimizer_shares(
    optimizer: torch.optim.Optimizer, place: Path, more: Mapping[str, Tensor] = {}
) -> None:
    """Fill the optimizer's state from a checkpoint, every rank its share and no more.

    Args:
        place: what `tensorparts.fill_from` reads.
        more: tensors to fill beside it, by their names there.
    """
    infos = part_infos(place)
    keys = sorted({name.split("/", 1)[0] for name in infos if name not in more})
    wanted: dict[str, Tensor] = dict(more)
    for name, parameter in named_parameters(optimizer):
        if not any(f"{key}/{name}" in infos for key in keys):
            continue  # a parameter that had no gradient yet
        state: dict[str, Any] = {}
        for key in keys:
            # The step counter of fused AdamW is a single number, everything else has the shape.
            shape = infos[f"{key}/{name}"].shape
            state[key] = (
                torch.zeros_like(parameter.detach())
                if shape == tuple(parameter.shape)
                else torch.zeros(shape, device=parameter.device)
            )
            wanted[f"{key}/{name}"] = state[key]
        optimizer.state[parameter] = state
    fill_from(place, wanted)
