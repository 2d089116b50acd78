"""Packed or padded, the numbers are the same: states, losses, gradients, dropped paths."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vlbeit.config import ModelConfig
from vlbeit.nn import backbone
from vlbeit.nn.model import VLBeit
from vlbeit.nn.packing import LENGTH_STEP, ROWS_STEP, Packing
from vlbeit.types import Modality, Span, States

LENGTHS = (12, 3, 7, 2, 9)
ALWAYS, NEVER = -9.0, 1.1
"""Shares of padding from which tokens are packed. These few would otherwise be left as they are,
since each span is filled up to 64."""
PATCHES = 16
CLOSE = 1e-5


def model(relative: str = "none", drop_path: float = 0.0) -> VLBeit:
    config = ModelConfig(
        width=24, layers=3, heads=2, ffn=40, vl_layers=1, image_size=(16, 16), patch=4, vocab=50,
        codes=30, text_positions=14, relative_bias=relative, drop_path=drop_path, init_std=0.3,
    )  # fmt: skip
    made = VLBeit(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


def texts() -> tuple[Tensor, Tensor]:
    """(5, 12) words and which are real."""
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(0, 50, (len(LENGTHS), max(LENGTHS)), generator=generator)
    return words, torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


def states(made: VLBeit, stream: str) -> States:
    words, valid = texts()
    draws = None
    if made.config.drop_path:
        generator = torch.Generator().manual_seed(4)
        draws = torch.rand(len(words), 2 * made.config.layers, generator=generator)
    if stream == "text":
        return made.embed_text(words, valid, draws)
    pixels = torch.randint(
        0, 256, (len(words), 3, 16, 16), dtype=torch.uint8, generator=torch.Generator()
    )
    return made.embed_pair(words, valid, pixels, depth_draws=draws)


def asked(made: VLBeit, stream: str, way: str) -> tuple[Tensor, dict[str, Tensor]]:
    """What a way of asking gives at real tokens, and the gradients of a fixed sum of it."""
    made.zero_grad()
    given = states(made, stream)
    assert given.valid is not None
    if way == "forward":
        out = made.backbone(given)[given.valid]
    elif way == "rows":
        out = made.backbone.rows(given, given.valid & (torch.arange(given.x.shape[1]) % 3 == 1))
    elif way == "first":
        out = made.backbone.first(given)
    elif way == "taps":
        out = torch.cat([tap[given.valid] for tap in made.backbone.taps(given, [1, 3])])
    else:
        out = made.backbone.mean(given, given.valid)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    (out * weights).sum().backward()
    grads = {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}
    return out.detach(), grads


@pytest.fixture
def packed_shapes(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of what was packed."""
    found: list[torch.Size] = []
    pack = Packing.pack

    def told(self: Packing, x: Tensor) -> Tensor:
        found.append(x.shape)
        return pack(self, x)

    monkeypatch.setattr(Packing, "pack", told)
    return found


@pytest.mark.parametrize("way", ["forward", "rows", "first", "taps", "mean"])
@pytest.mark.parametrize("stream", ["text", "pair"])
@pytest.mark.parametrize("relative", ["none", "per_layer"])
@pytest.mark.parametrize("drop_path", [0.0, 0.6])
def test_packed_tokens_give_the_numbers_and_gradients_of_padded_ones(
    way: str,
    stream: str,
    relative: str,
    drop_path: float,
    packed_shapes: list[torch.Size],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = model(relative, drop_path)
    monkeypatch.setattr(backbone, "PACKED_FROM", ALWAYS)
    packed, of_packed = asked(made, stream, way)
    assert packed_shapes
    packed_shapes.clear()
    monkeypatch.setattr(backbone, "PACKED_FROM", NEVER)
    padded, of_padded = asked(made, stream, way)
    assert not packed_shapes
    assert float((packed - padded).abs().max()) <= CLOSE
    assert of_packed.keys() == of_padded.keys()
    for name, gradient in of_padded.items():
        scale = max(1.0, float(gradient.abs().max()))
        assert float((of_packed[name] - gradient).abs().max()) <= CLOSE * scale, name


def test_a_token_in_the_wrong_span_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model()
    right, _ = asked(made, "pair", "forward")
    monkeypatch.setattr(backbone, "PACKED_FROM", ALWAYS)
    build = Packing.of

    def swapped(valid: Tensor, route: tuple[Span, ...], grouped: bool) -> Packing:
        packing = build(valid, route, grouped)
        places = packing.places.clone()
        last = len(places) - 1 - int(packing.real.flip(0).int().argmax())
        places[[0, last]] = places[[last, 0]]
        return replace(packing, places=places)

    monkeypatch.setattr(Packing, "of", staticmethod(swapped))
    wrong, _ = asked(made, "pair", "forward")
    assert float((wrong - right).abs().max()) > 0.01


def test_each_real_token_stands_once_on_the_axis_span_by_span() -> None:
    words, text = texts()
    image = torch.ones(len(words), PATCHES + 1, dtype=torch.bool)
    route = (Span(Modality.TEXT, text.shape[1]), Span(Modality.IMAGE, PATCHES + 1))
    packing = Packing.of(torch.cat((text, image), dim=1), route)
    assert all(count % ROWS_STEP == 0 for count in packing.counts)
    assert sum(packing.counts) == len(packing.places)
    of_text, of_image = packing.places[packing.real].split([int(text.sum()), image.numel()])
    assert of_text.tolist() == sorted(of_text.tolist())
    assert {(p // 29, p % 29) for p in of_text.tolist()} == {
        (s, c) for s, length in enumerate(LENGTHS) for c in range(length)
    }
    assert {p % 29 for p in of_image.tolist()} == set(range(12, 29))
    numbers = torch.randn(*image.shape[:1], 29, 4)
    there_and_back = packing.unpack(packing.pack(numbers))
    assert torch.equal(there_and_back[:, :12][text], numbers[:, :12][text])
    assert torch.equal(there_and_back[:, :12][~text], torch.zeros(int((~text).sum()), 4))
    wanted = packing.places[packing.real]
    assert torch.equal(packing.places[packing.rows_of(wanted)], wanted)


def test_attention_meets_few_shapes_and_every_token_once() -> None:
    """Whatever the lengths: quarters of the batch, lengths in steps, little padding."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(2, 197, (64,), generator=generator)
        valid = torch.arange(196) < lengths[:, None]
        packing = Packing.of(valid, (Span(Modality.TEXT, 196),))
        assert [group.samples for group in packing.groups] == [16] * 4
        assert all(group.length % LENGTH_STEP == 0 for group in packing.groups)
        held = sum(group.samples * group.length for group in packing.groups)
        slots = packing.slots[packing.real]
        assert len(slots.unique()) == len(slots) == int(lengths.sum())
        assert int(slots.max()) < held < 0.75 * valid.numel()
        seen = torch.cat([(group.hidden == 0).flatten() for group in packing.groups])
        assert torch.equal(seen.nonzero().squeeze(1), slots.sort().values)


def test_what_fills_up_the_axis_gets_no_gradient() -> None:
    _, valid = texts()
    packing = Packing.of(valid, (Span(Modality.TEXT, valid.shape[1]),))
    x = torch.randn(len(packing.places), 3, requires_grad=True)
    packing.pack(packing.unpack(x)).square().sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad[~packing.real], torch.zeros(int((~packing.real).sum()), 3))
    # The first token is given again to what fills up, so it is counted once for each of them.
    assert torch.allclose(x.grad[1 : int(valid.sum())], 2 * x.detach()[1 : int(valid.sum())])


def test_tokens_are_packed_where_that_spares_enough_of_them(
    packed_shapes: list[torch.Size],
) -> None:
    """64 texts of up to 12 words: 768 places; each axis is a multiple of 64."""
    made = model()
    words = torch.randint(0, 50, (64, 12))

    def packs(real: int) -> bool:
        packed_shapes.clear()
        valid = torch.zeros(64, 12, dtype=torch.bool)
        valid[:, 0] = True
        valid.view(-1)[torch.arange(768)[~valid.flatten()][: real - 64]] = True
        assert int(valid.sum()) == real
        made.backbone(made.embed_text(words, valid))
        return bool(packed_shapes)

    assert packs(640)  # 16.7 % spared
    assert not packs(641)  # filled up to 704: 8.3 %
    assert packs(320)
    for block in made.backbone.blocks:
        block.static_shapes = True
    assert not packs(320)
