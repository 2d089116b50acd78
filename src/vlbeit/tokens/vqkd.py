"""VQ-KD (BEiT v2): a picture becomes a grid of codes that a decoder turns into a teacher's view.

    pixels -> ViT encoder -> Linear, Tanh, Linear -> unit vector -> nearest code
    code vectors -> ViT decoder -> Linear, Tanh, Linear -> teacher's features    loss 1 - cosine
    code vectors -> ViT decoder -> Linear, Tanh, Linear -> pixels                loss squared

With a teacher the pixel decoder reads the codes without training them: it shows what a code
means. Without one (teacher "pixels") it is the only target and trains them. The target is the
picture itself in [-1, 1], not normalised per patch: a code must tell red from blue, since captions
do. With the teacher "random" nothing trains the encoder (`VQKD.freeze_encoder`).
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlbeit.config import VisualTokenizerConfig, from_dict, to_dict
from vlbeit.errors import ConfigError, InputError
from vlbeit.nn.backbone import Backbone
from vlbeit.nn.embed import ImageEmbed, to_patches
from vlbeit.nn.positions import resize_grid
from vlbeit.tokens.quantizer import CosineCodebook, Quantized
from vlbeit.tokens.tokenizer_folder import (
    CONFIG_FILE,
    check_digest,
    fill_from_folder,
    save_tokenizer_folder,
    tokenizer_digest,
)
from vlbeit.types import Modality, Span, States

KIND = "vqkd"
ENCODE_IMAGES = 256
"""Pictures encoded at a time."""


class VQLosses(NamedTuple):
    """Losses of one batch and what the codebook's update needs.

    total       scalar with a gradient, mean over patches, weighted as the config says
    pixels      scalar, mean squared error of pixels in [-1, 1]
    features    scalar, 1 - cosine to the teacher; zero without one
    quantized   see `Quantized`
    """

    total: Tensor
    pixels: Tensor
    features: Tensor
    quantized: Quantized


class CodeDecoder(nn.Module):
    """A ViT on code vectors: one token a patch, [CLS] and positions as the encoder has them.

    Shapes: vectors (B, P, C), grid (rows, columns) with P = rows * columns, return (B, P, out).
    """

    def __init__(self, config: VisualTokenizerConfig, out: int) -> None:
        super().__init__()
        width = config.width
        self.native_grid = _native_grid(config)
        self.proj = nn.Linear(config.code_width, width)
        self.cls = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(
            torch.zeros(self.native_grid[0] * self.native_grid[1] + 1, width)
        )
        self.backbone = Backbone(
            width, config.decoder_layers, config.heads, config.ffn, experts=(Modality.IMAGE,)
        )
        self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out))

    def forward(self, vectors: Tensor, grid: tuple[int, int]) -> Tensor:
        x = self.proj(vectors)
        x = torch.cat((self.cls.to(x.dtype).expand(len(x), 1, -1), x), dim=1)
        places = resize_grid(self.positions[1:], self.native_grid, grid)
        x = x + torch.cat((self.positions[:1], places))
        out: Tensor = self.head(image_states(self.backbone, x, grid))
        return out


class VQKD(nn.Module):
    """Encoder, codebook and decoders.

    Args:
        config: sizes.
        feature_width: of the teacher's features; None: no teacher, pixels train the codes.
    """

    def __init__(self, config: VisualTokenizerConfig, feature_width: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.image = ImageEmbed(config.width, config.patch, config.image_size)
        self.encoder = Backbone(
            config.width, config.layers, config.heads, config.ffn, experts=(Modality.IMAGE,)
        )
        self.to_code = nn.Sequential(
            nn.Linear(config.width, config.width),
            nn.Tanh(),
            nn.Linear(config.width, config.code_width),
        )
        self.codebook = CosineCodebook(config.codes, config.code_width, config.decay)
        self.pixels = CodeDecoder(config, 3 * config.patch**2)
        self.features = CodeDecoder(config, feature_width) if feature_width else None

    def freeze_encoder(self) -> None:
        """Leave all that makes code vectors as it is; the decoders still learn."""
        for part in (self.image, self.encoder, self.to_code):
            part.requires_grad_(False)

    def embed(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, P, C), before the codebook makes them unit vectors."""
        grid = self.image.grid(pixels)
        out: Tensor = self.to_code(image_states(self.encoder, self.image(pixels), grid))
        return out

    def forward(
        self, pixels: Tensor, teacher_features: Tensor | None = None, *, coded: bool = True
    ) -> VQLosses:
        """Losses of a batch.

        `coded` False lets the decoders see the encoder's unit vectors themselves: an encoder
        that has learned nothing gives nearly the same vector for every patch, and a codebook
        started on those collapses.

        Shapes: pixels (B, 3, H, W) uint8, teacher_features (B, P, feature_width) or None.
        """
        grid = self.image.grid(pixels)
        quantized = self.codebook(self.embed(pixels))
        if not coded:
            nothing = quantized.commitment.detach() * 0
            quantized = quantized._replace(vectors=quantized.units, commitment=nothing)
        shown = quantized.vectors
        feature_loss = shown.new_zeros(())
        if self.features is not None:
            if teacher_features is None:
                raise ValueError("this tokenizer learns from a teacher; give its features")
            guess = self.features(shown, grid).float()
            feature_loss = (1 - F.cosine_similarity(guess, teacher_features.float(), dim=-1)).mean()
            shown = shown.detach()
        drawn = self.pixels(shown, grid).float()
        pixel_loss = F.mse_loss(drawn, to_patches(pixels, self.config.patch))
        total = (
            feature_loss
            + self.config.pixel_loss * pixel_loss
            + self.config.commitment * quantized.commitment
        )
        return VQLosses(total, pixel_loss.detach(), feature_loss.detach(), quantized)

    def draw(self, codes: Tensor) -> Tensor:
        """(B, rows, columns) int64 codes -> (B, 3, H, W) uint8, what the pixel decoder sees."""
        batch, rows, columns = codes.shape
        patch = self.config.patch
        vectors = F.embedding(codes.reshape(batch, -1), self.codebook.weight)
        drawn = self.pixels(vectors, (rows, columns)).float()
        levels = ((drawn + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        grid = levels.reshape(batch, rows, columns, 3, patch, patch).permute(0, 3, 1, 4, 2, 5)
        pictures: Tensor = grid.reshape(batch, 3, rows * patch, columns * patch)
        return pictures


class VQKDTokenizer:
    """A trained VQ-KD as the rest of the system sees it (protocol `VisualTokenizer`).

    Always in eval mode and without gradient; the teacher's decoder is dropped, the pixel decoder
    kept. `facts` is free: how it was trained and how its codes are used.
    """

    kind = KIND
    draws = True

    def __init__(self, model: VQKD, facts: dict[str, Any] | None = None) -> None:
        model.features = None
        self._model = model.eval().requires_grad_(False)
        self.facts = dict(facts or {})
        self.codes = model.config.codes
        self.patch = model.config.patch
        self.image_size = model.config.image_size
        self.digest = _digest(model)

    @property
    def config(self) -> VisualTokenizerConfig:
        """The settings it was built with."""
        return self._model.config

    def to(self, device: torch.device | str) -> "VQKDTokenizer":
        """Move it, in place; returns itself."""
        self._model.to(device)
        return self

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, P) int64 codes, row by row.

        Pixels are scaled by fixed numbers, picture by picture, so no picture changes the codes of
        another. Any H and W that are multiples of the patch.

        Raises:
            ValueError: pixels that are not uint8, or of a size the patch does not divide.
        """
        if pixels.dtype != torch.uint8:
            raise ValueError(f"pixels must be uint8 in 0..255, found {pixels.dtype}")
        found = []
        with torch.autocast(pixels.device.type, enabled=False):
            for part in pixels.split(ENCODE_IMAGES):
                units = F.normalize(self._model.embed(part).float(), dim=-1)
                found.append(self._model.codebook.lookup(units))
        return torch.cat(found)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """(B, rows, columns) int64 -> (B, 3, H, W) uint8: pictures of codes.

        Raises:
            ValueError: a code outside the codebook.
        """
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codes:
            found = f"{int(codes.min())}..{int(codes.max())}"
            raise ValueError(f"codes must be in 0..{self.codes - 1}, found {found}")
        with torch.autocast(codes.device.type, enabled=False):
            return self._model.draw(codes)

    def save(self, folder: Path | str) -> Path:
        """Write config.json and model.safetensors into the folder, all or nothing."""
        return save_tokenizer_folder(
            folder,
            kind=KIND,
            digest=self.digest,
            tensors=self._model.state_dict(),
            config=to_dict(self.config),
            facts=self.facts,
        )

    @classmethod
    def load(cls, folder: Path, tree: dict[str, Any]) -> "VQKDTokenizer":
        """From a folder and its parsed config.json (`load_visual_tokenizer` reads that).

        Raises:
            InputError: settings, tensors or digest that do not belong together.
        """
        try:
            config = from_dict(VisualTokenizerConfig, tree.get("config", {}))
        except ConfigError as error:
            raise InputError(f"{folder / CONFIG_FILE}: {error}") from None
        with torch.device("meta"):
            model = VQKD(config)
        fill_from_folder(model, folder)
        tokenizer = cls(model, tree.get("facts", {}))
        check_digest(folder, tokenizer.digest, tree.get("digest"))
        return tokenizer


def _native_grid(config: VisualTokenizerConfig) -> tuple[int, int]:
    return config.image_size[0] // config.patch, config.image_size[1] // config.patch


def image_states(backbone: Backbone, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, P + 1, D) -> (B, P, D): through the backbone, [CLS] left out."""
    route = (Span(Modality.IMAGE, x.shape[1]),)
    out: Tensor = backbone(States(x=x, valid=None, route=route, grid=grid))
    return out[:, 1:]


def _digest(model: VQKD) -> str:
    config = to_dict(model.config)
    sizes = {name: config[name] for name in ("image_size", "patch", "heads")}
    return tokenizer_digest([KIND, sizes], model.state_dict())
