"""Pyramid and heads against transformers' BEiT and UperNet, weights mapped name by name.

Outputs must agree to rounding with the norms' stored statistics and with those of the batch, as
must gradients, and they stop agreeing as soon as any mapped tensor is disturbed.
"""

import pytest
import torch
from torch import Tensor, nn
from transformers import BeitConfig, UperNetConfig
from transformers.models.beit.modeling_beit import BeitForSemanticSegmentation
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

from vlbeit.nn.upernet import POOLS, AuxiliaryHead, FeaturePyramid, UperHead

WIDTH, CHANNELS, AUXILIARY, CLASSES, GRID = 24, 20, 12, 7, (5, 8)
NORM = ("weight", "bias", "running_mean", "running_var")


class Ours(nn.Module):
    """The three pieces as one, so that every tensor has one name."""

    def __init__(self, norm: str = "batch", channels: int = CHANNELS) -> None:
        super().__init__()
        self.pyramid = FeaturePyramid(WIDTH, norm)
        self.head = UperHead(WIDTH, channels, CLASSES, norm)
        self.auxiliary = AuxiliaryHead(WIDTH, AUXILIARY, CLASSES, norm)

    def forward(self, taps: list[Tensor], grid: tuple[int, int]) -> list[Tensor]:
        levels = self.pyramid(taps, grid)
        return [*levels, self.head(levels), self.auxiliary(levels)]


class Peer(nn.Module):
    """BEiT's own pyramid; UperNet's heads."""

    def __init__(self) -> None:
        super().__init__()
        beit = BeitConfig(
            hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=2, out_indices=[1, 2, 3, 4],
            intermediate_size=8, image_size=32, patch_size=8, use_auxiliary_head=False,
        )  # fmt: skip
        self.fpn = BeitForSemanticSegmentation(beit).fpn
        config = UperNetConfig(
            hidden_size=CHANNELS, num_labels=CLASSES, pool_scales=list(POOLS),
            auxiliary_channels=AUXILIARY, auxiliary_in_channels=WIDTH,
        )  # fmt: skip
        self.head = UperNetHead(config, [WIDTH] * 4)
        self.auxiliary = UperNetFCNHead(config, [WIDTH] * 4)

    def forward(self, taps: list[Tensor], grid: tuple[int, int]) -> list[Tensor]:
        # As BeitForSemanticSegmentation.forward makes its maps.
        maps = [tap[:, 1:].transpose(1, 2).reshape(len(tap), -1, *grid) for tap in taps]
        levels = self.fpn(tuple(maps))
        return [*levels, self.head(levels), self.auxiliary(levels)]


def names() -> dict[str, str]:
    """Our name -> the peer's, for parameters and statistics."""
    pairs = {
        "pyramid.up4.0.": "fpn.fpn1.conv_transpose1.",
        "pyramid.up4.3.": "fpn.fpn1.conv_transpose2.",
        "pyramid.up2.": "fpn.fpn2.",
        "head.classifier.": "head.classifier.",
        "auxiliary.classifier.": "auxiliary.classifier.",
    }
    found = {a + leaf: b + leaf for a, b in pairs.items() for leaf in ("weight", "bias")}
    found |= {f"pyramid.up4.1.{leaf}": f"fpn.fpn1.normalization.{leaf}" for leaf in NORM}
    convs = {f"head.pools.{i}": f"head.psp_modules.{i}.1" for i in range(4)}
    convs |= {f"head.laterals.{i}": f"head.lateral_convs.{i}" for i in range(3)}
    convs |= {f"head.smooths.{i}": f"head.fpn_convs.{i}" for i in range(3)}
    convs |= {
        "head.bottleneck": "head.bottleneck",
        "head.fuse": "head.fpn_bottleneck",
        "auxiliary.conv": "auxiliary.convs.0",
    }
    for a, b in convs.items():
        found[f"{a}.conv.weight"] = f"{b}.conv.weight"
        found |= {f"{a}.norm.{leaf}": f"{b}.batch_norm.{leaf}" for leaf in NORM}
    return found


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Everything but the count of steps that BatchNorm keeps; each tensor under all its names."""
    return {
        name: tensor
        for name, tensor in module.state_dict(keep_vars=True).items()
        if not name.endswith("num_batches_tracked")
    }


def fill(module: nn.Module, seed: int) -> None:
    """No weight, bias, mean or variance at its starting value; signals keep their size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in tensors(module).items():
            fresh = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(fresh.abs() + 0.5)
            elif tensor.ndim > 1:
                tensor.copy_(fresh / tensor[0].numel() ** 0.5)
            else:
                tensor.copy_(0.3 * fresh + (1.0 if "norm" in name and "weight" in name else 0.0))


@pytest.fixture
def taps(gen: torch.Generator) -> list[Tensor]:
    return [torch.randn(3, GRID[0] * GRID[1] + 1, WIDTH, generator=gen) for _ in range(4)]


@pytest.fixture
def case(taps):
    peer, ours = Peer(), Ours()
    fill(peer, 1)
    fill(ours, 2)
    theirs, mine = tensors(peer), tensors(ours)
    with torch.no_grad():
        for here, there in names().items():
            mine[here].copy_(theirs[there])
    return peer, ours, taps


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    assert [f.shape for f in found] == [e.shape for e in expected]
    return max((f - e).abs().max().item() for f, e in zip(found, expected, strict=True))


def test_every_tensor_of_both_is_mapped(case):
    peer, ours, _ = case
    assert set(names()) == set(tensors(ours))
    different = {id(t): t.numel() for t in tensors(peer).values()}  # the peer names some twice
    assert sum(different.values()) == sum(t.numel() for t in tensors(ours).values())


@pytest.mark.parametrize("training", [False, True], ids=["stored statistics", "the batch's own"])
def test_levels_and_logits_agree_with_the_peer(case, training):
    peer, ours, taps = case
    found, expected = ours.train(training)(taps, GRID), peer.train(training)(taps, GRID)
    assert [tuple(x.shape[2:]) for x in found] == [(20, 32), (10, 16), GRID, (2, 4), (20, 32), GRID]
    assert all(x.std() > 0.1 for x in found)
    assert worst(found, expected) <= 1e-5
    if training:  # and both have learned the same statistics
        theirs, mine = tensors(peer), tensors(ours)
        running = [(a, b) for a, b in names().items() if "running" in a]
        assert worst([mine[a] for a, _ in running], [theirs[b] for _, b in running]) <= 1e-5


def test_gradients_agree_with_the_peer(case, gen):
    peer, ours, taps = case
    targets = torch.randint(0, CLASSES, (3, 20, 32), generator=gen)
    for model in (peer, ours):
        outputs = model.eval()(taps, GRID)
        loss = nn.functional.cross_entropy(outputs[4], targets)
        (loss + 0.4 * outputs[5].square().mean()).backward()
    theirs, mine = tensors(peer), tensors(ours)
    for here, there in names().items():
        if mine[here].requires_grad:
            wanted = theirs[there].grad
            scale = wanted.abs().max().item()
            assert scale > 0, here
            assert (mine[here].grad - wanted).abs().max().item() <= 1e-4 * scale + 1e-7, here


def test_disturbing_any_mapped_tensor_breaks_the_agreement(case):
    peer, ours, taps = case
    mine = tensors(ours)
    with torch.no_grad():
        expected = peer.eval()(taps, GRID)
        for name in names():
            kept = mine[name].clone()
            mine[name].mul_(1.5).add_(0.1)
            assert worst(ours.eval()(taps, GRID), expected) > 1e-3, name
            mine[name].copy_(kept)
        assert worst(ours.eval()(taps, GRID), expected) <= 1e-5


def test_the_class_token_does_not_reach_the_pyramid(case):
    _, ours, taps = case
    before = ours.eval()(taps, GRID)
    for tap in taps:
        tap[:, 0] += 1.0
    assert worst(ours(taps, GRID), before) == 0
    taps[2][:, 1] += 1.0
    assert worst(ours(taps, GRID), before) > 1e-3


def test_group_norm_makes_each_image_independent_of_its_batch(taps):
    for kind, bound in (("group", 1e-5), ("batch", None)):
        model = Ours(kind, channels=32).train()
        fill(model, 3)
        together = model(taps, GRID)
        # Batch norm of a single image fails where the pooled map is one pixel: two at least.
        apart = [torch.cat(parts) for parts in zip(
            model([tap[:1] for tap in taps], GRID) if kind == "group" else
            [x[:1] for x in model([tap[[0, 0]] for tap in taps], GRID)],
            model([tap[1:] for tap in taps], GRID), strict=True,
        )]  # fmt: skip
        if bound is None:
            assert worst(apart, together) > 1e-2
        else:
            assert worst(apart, together) <= bound


def test_the_global_pool_survives_group_norm():
    taps = [torch.randn(2, 5, WIDTH) for _ in range(4)]
    model = Ours("group", channels=32)
    fill(model, 3)
    first = model(taps, (2, 2))[4]
    with torch.no_grad():
        model.head.pools[0].conv.weight.add_(torch.randn_like(model.head.pools[0].conv.weight))
    assert (model(taps, (2, 2))[4] - first).abs().max() > 1e-3


def test_taps_that_do_not_fit_are_refused(taps):
    pyramid = FeaturePyramid(WIDTH)
    with pytest.raises(ValueError, match="four of 49 fit"):
        pyramid(taps, (6, 8))
    with pytest.raises(ValueError, match="four of 41"):
        pyramid(taps[:3], GRID)
    with pytest.raises(ValueError, match="2 x 2 at least"):
        pyramid(taps, (1, 40))
