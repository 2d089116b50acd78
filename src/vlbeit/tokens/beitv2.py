"""BEiT v2's visual tokenizer (VQ-KD), with its own weights: encoder, codebook and decoder.

    pixels / 127.5 - 1 -> ViT with absolute positions -> LayerNorm -> Linear, Tanh, Linear
        -> unit vector -> nearest row of the codebook
    code vectors -> ViT on 1 x 1 patches -> LayerNorm -> Linear, Tanh, Linear -> teacher's features

Source: microsoft/unilm beit2 (arXiv 2208.06366). Two of its habits are not taken over: it scales
pixels by the largest value of the batch, so that one bright picture changes the codes of the
others, and a lookup moves its usage statistic even in eval mode. Here a picture's codes depend on
the picture alone, and a lookup changes nothing.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlbeit.config import VisualTokenizerConfig
from vlbeit.errors import InputError
from vlbeit.nn.backbone import Backbone
from vlbeit.nn.embed import ImageEmbed
from vlbeit.tokens.foreign_layout import Made, Origin, TensorAccount, fill_from_foreign, size_of
from vlbeit.tokens.quantizer import CosineCodebook
from vlbeit.tokens.vqkd import CodeDecoder, image_states
from vlbeit.types import Modality

HEAD_WIDTH = 64
"""Of every published encoder; a file does not say how many heads it has."""
UNIT_TOLERANCE = 1e-3
"""Largest distance of a codebook row's length from 1. Nearest by distance (theirs) and by cosine
(ours) are the same code for unit rows only."""

DROPPED = ("loss", "teacher", "scaling")
"""Prefixes of tensors that only training needs: the perceptual loss, the teacher, its scaling."""
UNUSED = ("quantize.embedding.cluster_size", "quantize.embedding.embed_avg")
"""Buffers that unilm registers and never updates."""
STARTED, USAGE = "quantize.embedding.initted", "quantize.cluster_size"


@dataclass(frozen=True, kw_only=True)
class BeitV2Sizes:
    """Everything that the tensors' shapes do not tell, and what they do."""

    codes: int
    code_width: int
    image_size: tuple[int, int]
    patch: int
    width: int
    layers: int
    heads: int
    ffn: int
    decoder_layers: int
    feature_width: int
    """Of the teacher: 512 for CLIP, 768 for DINO."""


class BeitV2Network(nn.Module):
    """The network under this package's names. Nothing in it trains."""

    name: ClassVar[str] = "beitv2"
    most_images: ClassVar[int] = 64
    """Pictures encoded at a time; bounds the memory."""

    def __init__(self, sizes: BeitV2Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.codes, self.patch, self.image_size = sizes.codes, sizes.patch, sizes.image_size
        decoder = VisualTokenizerConfig(
            code_width=sizes.code_width,
            image_size=sizes.image_size,
            patch=sizes.patch,
            width=sizes.width,
            heads=sizes.heads,
            ffn=sizes.ffn,
            decoder_layers=sizes.decoder_layers,
        )
        self.image = ImageEmbed(sizes.width, sizes.patch, sizes.image_size)
        self.encoder = Backbone(
            sizes.width, sizes.layers, sizes.heads, sizes.ffn, experts=(Modality.IMAGE,)
        )
        self.to_code = nn.Sequential(
            nn.Linear(sizes.width, sizes.width), nn.Tanh(), nn.Linear(sizes.width, sizes.code_width)
        )
        self.codebook = CosineCodebook(sizes.codes, sizes.code_width)
        self.features = CodeDecoder(decoder, sizes.feature_width)

    def grid(self, pixels: Tensor) -> tuple[int, int]:
        """Rows and columns of codes.

        Raises:
            ValueError: a size that the patch does not divide.
        """
        return self.image.grid(pixels)

    def lookup(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, P) int64. At another size positions are resized bicubically."""
        vectors = self.to_code(image_states(self.encoder, self.image(pixels), self.grid(pixels)))
        return self.codebook.lookup(F.normalize(vectors.float(), dim=-1))

    def code_features(self, codes: Tensor) -> Tensor:
        """What the teacher would say of codes, by the decoder.

        Shapes: codes (B, rows, columns) int64, return (B, rows * columns, feature_width).
        """
        vectors = F.embedding(codes.flatten(1), self.codebook.weight)
        out: Tensor = self.features(vectors, (codes.shape[1], codes.shape[2]))
        return out


def is_beitv2(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file's tensors are those of this tokenizer."""
    return "encode_task_layer.0.weight" in tensors and "quantize.embedding.weight" in tensors


def import_beitv2(
    tensors: Mapping[str, Tensor], *, heads: int = 0, origin: str
) -> tuple[BeitV2Network, list[TensorAccount]]:
    """The network of a file in unilm's layout; its sizes are read off the tensors.

    Args:
        heads: of encoder and decoder; 0: one for every 64 of the width, as published.
        origin: named in messages.

    Raises:
        InputError: a tensor is missing, unknown or of another shape, a codebook that was never
            started or whose rows are not of length one, or heads that do not divide the width.
    """
    codes, code_width = size_of(tensors, "quantize.embedding.weight", 2, origin)
    width, _, patch, _ = size_of(tensors, "encoder.patch_embed.proj.weight", 4, origin)
    places = size_of(tensors, "encoder.pos_embed", 3, origin)[1] - 1
    side = math.isqrt(places)
    if side * side != places:
        raise InputError(
            f"{origin}: encoder.pos_embed has {places} places, expected a square number"
        )
    heads = heads or max(1, width // HEAD_WIDTH)
    if width % heads:
        raise InputError(f"{origin}: width {width} is not a multiple of {heads} heads; set --heads")
    sizes = BeitV2Sizes(
        codes=codes,
        code_width=code_width,
        image_size=(side * patch, side * patch),
        patch=patch,
        width=width,
        layers=_depth(tensors, "encoder"),
        heads=heads,
        ffn=size_of(tensors, "encoder.blocks.0.mlp.fc1.weight", 2, origin)[0],
        decoder_layers=_depth(tensors, "decoder"),
        feature_width=size_of(tensors, "decode_task_layer.2.weight", 2, origin)[0],
    )
    if STARTED in tensors and not bool(tensors[STARTED].all()):
        raise InputError(f"{origin}: {STARTED} is 0: this codebook was never started by k-means")
    lengths = tensors["quantize.embedding.weight"].float().norm(dim=-1)
    furthest = float((lengths - 1).abs().max())
    if not furthest <= UNIT_TOLERANCE:
        raise InputError(
            f"{origin}: rows of quantize.embedding.weight differ from length 1 by up to "
            f"{furthest:.3g}, at most {UNIT_TOLERANCE} is a cosine codebook"
        )
    share = _share(tensors, codes)
    with torch.device("meta"):
        network = BeitV2Network(sizes)
    accounts = fill_from_foreign(
        network,
        dict(_origins(sizes)),
        tensors,
        made={
            "image.masked_patch": Made(torch.zeros(width), "zeros; a tokenizer masks nothing"),
            "codebook.share": share,
        },
        dropped=[
            name
            for name in tensors
            if name in (*UNUSED, STARTED)
            or name.startswith(DROPPED)
            or (name == USAGE and not share.source)
        ],
        origin=origin,
    )
    return network.eval().requires_grad_(False), accounts


def _depth(tensors: Mapping[str, Tensor], part: str) -> int:
    """One more than the largest number of a block; a gap is found as missing tensors."""
    found = (re.match(rf"{part}\.blocks\.(\d{{1,3}})\.", name) for name in tensors)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _share(tensors: Mapping[str, Tensor], codes: int) -> Made:
    """The share of vectors that took each code, from unilm's usage statistic if it has one."""
    even = torch.full((codes,), 1.0 / codes)
    if USAGE not in tensors:
        return Made(even, "an even use; the file has no usage statistic")
    counts = tensors[USAGE].float().flatten()
    if len(counts) != codes or not bool(torch.isfinite(counts).all()) or not counts.sum() > 0:
        return Made(even, f"an even use; {USAGE} is empty")
    return Made(counts / counts.sum(), "brought to a sum of 1", USAGE)


def _origins(sizes: BeitV2Sizes) -> Iterator[tuple[str, Origin]]:
    """(our name, where it comes from)."""
    width, patch, side = sizes.width, sizes.patch, sizes.image_size[0] // sizes.patch
    places = side * side + 1
    for ours, theirs, channels, kernel in (
        ("image", "encoder", 3, patch),
        ("features", "decoder", sizes.code_width, 1),
    ):
        weight = (width, channels, kernel, kernel)
        yield f"{ours}.proj.weight", Origin(f"{theirs}.patch_embed.proj.weight", weight)
        yield f"{ours}.proj.bias", Origin(f"{theirs}.patch_embed.proj.bias", (width,))
        yield f"{ours}.cls", Origin(f"{theirs}.cls_token", (1, 1, width))
        yield f"{ours}.positions", Origin(f"{theirs}.pos_embed", (1, places, width))
    for ours, theirs, depth in (
        ("encoder", "encoder", sizes.layers),
        ("features.backbone", "decoder", sizes.decoder_layers),
    ):
        for i in range(depth):
            yield from _block(f"{ours}.blocks.{i}", f"{theirs}.blocks.{i}", sizes)
        yield from _affine(f"{ours}.norm", f"{theirs}.fc_norm", (width,))
    for ours, theirs, out in (
        ("to_code", "encode_task_layer", sizes.code_width),
        ("features.head", "decode_task_layer", sizes.feature_width),
    ):
        yield from _affine(f"{ours}.0", f"{theirs}.0", (width, width))
        yield from _affine(f"{ours}.2", f"{theirs}.2", (out, width))
    table = (sizes.codes, sizes.code_width)
    yield "codebook.weight", Origin("quantize.embedding.weight", table)


def _block(ours: str, theirs: str, sizes: BeitV2Sizes) -> Iterator[tuple[str, Origin]]:
    width, ffn = sizes.width, sizes.ffn
    yield from _affine(f"{ours}.norm1", f"{theirs}.norm1", (width,))
    qkv = Origin(f"{theirs}.attn.qkv.weight", (3 * width, width))
    yield f"{ours}.attention.qkv.weight", qkv
    for bias in ("q_bias", "v_bias"):
        yield f"{ours}.attention.{bias}", Origin(f"{theirs}.attn.{bias}", (width,))
    yield from _affine(f"{ours}.attention.proj", f"{theirs}.attn.proj", (width, width))
    expert = f"{ours}.experts.{Modality.IMAGE.value}"
    yield from _affine(f"{expert}.norm", f"{theirs}.norm2", (width,))
    yield from _affine(f"{expert}.fc1", f"{theirs}.mlp.fc1", (ffn, width))
    yield from _affine(f"{expert}.fc2", f"{theirs}.mlp.fc2", (width, ffn))


def _affine(ours: str, theirs: str, weight: tuple[int, ...]) -> Iterator[tuple[str, Origin]]:
    """Weight and bias of a linear layer or a norm."""
    yield f"{ours}.weight", Origin(f"{theirs}.weight", weight)
    yield f"{ours}.bias", Origin(f"{theirs}.bias", weight[:1])
