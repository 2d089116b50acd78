"""Teachers of a visual tokenizer: networks whose view of a picture the codes must keep."""

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlbeit.errors import ConfigError, InputError
from vlbeit.tensorfile import refuse_pickle
from vlbeit.tokens.efficientnet_lite import LAST, MIDDLE, SHA256, STRIDE, load_efficientnet_lite0

PIXELS = "pixels"
RANDOM = "random"
"""No teacher at all: the encoder keeps its random weights, k-means and EMA alone make the codes;
with layers 0 a random projection of each patch. What codes are worth is measured against these."""
CNN = "efficientnet-lite0"


class Teacher(Protocol):
    """Features of each patch, without gradient.

    width   of a feature vector
    digest  of what it was made from, for the tokenizer's facts
    """

    width: int
    digest: str

    def features(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, 3, H, W) uint8 and the tokenizer's grid -> (B, rows * columns, width) float32."""
        ...

    def to(self, device: torch.device | str) -> "Teacher":
        """Move it, in place; returns itself."""
        ...


def build_teacher(spec: str) -> Teacher | None:
    """The teacher that `VisualTokenizerConfig.teacher` names; None for "pixels" and "random".

    "efficientnet-lite0" is the network of the `teacher` extra (`CNNTeacher`). A folder in the
    layout of `transformers` (config.json, model.safetensors, and preprocessor_config.json for mean
    and standard deviation) gives a ViT: CLIP's vision tower (patch tokens after the visual
    projection, as BEiT v2), DINO, DINOv2, BEiT or plain ViT (last hidden states of the patches).

    Raises:
        ConfigError: none of these, or what it needs is not installed.
        InputError: a folder without the files.
        UnsafeError: weights only as a pickle.
    """
    if spec in (PIXELS, RANDOM):
        return None
    if spec == CNN:
        return CNNTeacher()
    folder = Path(spec)
    if not folder.is_dir():
        raise ConfigError(
            f"teacher: {spec!r} is none of {PIXELS!r}, {CNN!r}, {RANDOM!r} and no folder with a "
            "ViT in the layout of transformers (config.json, model.safetensors)"
        )
    refuse_pickle(folder)
    return ViTTeacher(folder)


class CNNTeacher:
    """EfficientNet-Lite0 at two depths, shown the picture at 16 pixels a patch of our grid.

    A patch's features are its cell of the last maps at stride 16 (112 channels: parts and
    textures) and, interpolated, of the last ones of all at stride 32 (320 channels: things). Each
    half is centred (`EfficientNetLite0.maps`) and weighs the same: without centring every patch
    has nearly the same direction, and a cosine tells them apart badly.
    """

    width = MIDDLE + LAST
    digest = f"{CNN}:{SHA256}"

    def __init__(self) -> None:
        self._model = load_efficientnet_lite0()

    def to(self, device: torch.device | str) -> "CNNTeacher":
        self._model.to(device)
        return self

    @torch.no_grad()
    def features(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        shown = _shown(pixels, (grid[0] * STRIDE, grid[1] * STRIDE))
        middle, last = self._model.maps(shown * 2 - 1)
        last = F.interpolate(last, size=grid, mode="bilinear", align_corners=False)
        # Divided by the root of its channels, each half has a mean squared length of 1.
        both = torch.cat((middle / MIDDLE**0.5, last / LAST**0.5), dim=1)
        return both.flatten(2).transpose(1, 2).float()


class ViTTeacher:
    """A ViT from a local folder, shown the picture at a size that gives it our grid."""

    def __init__(self, folder: Path) -> None:
        try:
            import transformers
        except ImportError:
            raise ConfigError(
                f"teacher {folder}: reading it needs transformers; "
                "run: pip install 'vlbeit[hf]', or set teacher to \"pixels\""
            ) from None
        tree = _read_json(folder / "config.json")
        is_clip = tree.get("model_type") in ("clip", "clip_vision_model")
        kind = transformers.CLIPVisionModelWithProjection if is_clip else transformers.AutoModel
        try:
            # No code of the folder runs: local files, safetensors, transformers' own classes.
            model: nn.Module = kind.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError, RuntimeError) as error:
            first = str(error).strip().splitlines()[0]
            raise InputError(f"teacher {folder}: cannot be loaded ({first})") from None
        config: Any = model.config
        patch = getattr(config, "patch_size", None)
        if not isinstance(patch, int):
            raise InputError(f"teacher {folder}: its config has no patch_size; only ViTs can teach")
        self._model: Any = model.eval().requires_grad_(False)
        self._clip = is_clip
        self._patch = patch
        # [CLS] and, in DINOv2, register tokens stand before the patches.
        self._leading = 1 + int(getattr(config, "num_register_tokens", 0) or 0)
        shown = folder / "preprocessor_config.json"
        rules = _read_json(shown) if shown.is_file() else {}
        self._mean = torch.tensor(rules.get("image_mean", [0.5, 0.5, 0.5])).view(1, 3, 1, 1)
        self._std = torch.tensor(rules.get("image_std", [0.5, 0.5, 0.5])).view(1, 3, 1, 1)
        self.width = int(config.projection_dim if is_clip else config.hidden_size)
        self.digest = f"{tree.get('model_type', 'vit')}:{_weights_digest(folder)}"

    def to(self, device: torch.device | str) -> "ViTTeacher":
        self._model.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    @torch.no_grad()
    def features(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        shown = _shown(pixels, (grid[0] * self._patch, grid[1] * self._patch))
        shown = (shown - self._mean) / self._std
        out = self._model(pixel_values=shown, interpolate_pos_encoding=True)
        patches = out.last_hidden_state[:, self._leading :]
        if self._clip:
            patches = self._model.visual_projection(
                self._model.vision_model.post_layernorm(patches)
            )
        if patches.shape[1] != grid[0] * grid[1]:
            raise InputError(
                f"teacher {self.digest}: {patches.shape[1]} patch features for a grid of "
                f"{grid[0]} x {grid[1]}"
            )
        found: Tensor = patches.float()
        return found


def _shown(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, 3, *size) in [0, 1]."""
    shown = pixels.float() / 255
    if shown.shape[-2:] != size:
        shown = F.interpolate(shown, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    return shown


def _weights_digest(folder: Path) -> str:
    """sha256 over the weight files of a folder, in the order of their names."""
    sha = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                sha.update(part)
    return sha.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: is not a JSON object")
    return tree
