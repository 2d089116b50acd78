"""Visual tokenizers with other people's weights, as the rest of the system sees them.

A foreign tokenizer has no pixel decoder. What a code means can still be shown: its picture is the
mean patch that it stood for in some pictures (`with_pictures`), the best a patch-by-patch
decoder can do in squared error.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from vlbeit.config import from_dict, to_dict
from vlbeit.errors import ConfigError, InputError
from vlbeit.nn.embed import to_patches
from vlbeit.tokens.beitv2 import BeitV2Network, BeitV2Sizes, import_beitv2, is_beitv2
from vlbeit.tokens.dalle import STRIDE, DalleNetwork, DalleSizes, import_dalle, is_dalle
from vlbeit.tokens.foreign_layout import TensorAccount
from vlbeit.tokens.tokenizer_folder import (
    CONFIG_FILE,
    check_digest,
    fill_from_folder,
    save_tokenizer_folder,
    tokenizer_digest,
)

KIND = "imported"
UNSEEN_GREY = 128
"""The picture of a code that occurred in none of the pictures."""

Network: TypeAlias = BeitV2Network | DalleNetwork


class _Kept(nn.Module):
    """What model.safetensors holds."""

    pictures: Tensor | None

    def __init__(self, network: Network, pictures: Tensor | None) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("pictures", pictures)


class ImportedTokenizer:
    """A foreign network (protocol `VisualTokenizer`), always in eval mode and without gradient.

    Args:
        network: with its weights.
        pictures: (codes, 3, patch, patch) uint8, a picture of each code; None: not measured, and
            `decode` refuses.
        facts: free: where it came from.
    """

    kind = KIND

    def __init__(
        self,
        network: Network,
        pictures: Tensor | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self._kept = _Kept(network.eval().requires_grad_(False), pictures)
        self.network = network
        self.draws = pictures is not None
        self.facts = dict(facts or {})
        self.codes, self.patch = network.codes, network.patch
        self.image_size = network.image_size
        about = [KIND, network.name, to_dict(network.sizes)]
        self.digest = tokenizer_digest(about, self._kept.state_dict())

    def to(self, device: torch.device | str) -> "ImportedTokenizer":
        """Move it, in place; returns itself."""
        self._kept.to(device)
        return self

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, P) int64 codes, row by row, in float32.

        Raises:
            ValueError: pixels that are not uint8, or of a size the patch does not divide.
        """
        if pixels.dtype != torch.uint8:
            raise ValueError(f"pixels must be uint8 in 0..255, found {pixels.dtype}")
        with torch.autocast(pixels.device.type, enabled=False):
            parts = pixels.split(self.network.most_images)
            return torch.cat([self.network.lookup(part) for part in parts])

    def decode(self, codes: Tensor) -> Tensor:
        """(B, rows, columns) int64 -> (B, 3, H, W) uint8: the codes' mean patches, side by side.

        Raises:
            ValueError: a code outside the codebook.
            InputError: no pictures of the codes were measured.
        """
        pictures = self._kept.pictures
        if pictures is None:
            raise InputError(
                f"this visual tokenizer ({self.network.name}) cannot draw its codes; import it "
                "again with --pictures DATA"
            )
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codes:
            found = f"{int(codes.min())}..{int(codes.max())}"
            raise ValueError(f"codes must be in 0..{self.codes - 1}, found {found}")
        batch, rows, columns = codes.shape
        patches = pictures[codes]  # (B, rows, columns, 3, patch, patch)
        joined = patches.permute(0, 3, 1, 4, 2, 5)
        return joined.reshape(batch, 3, rows * self.patch, columns * self.patch)

    def save(self, folder: Path | str) -> Path:
        """Write config.json and model.safetensors into the folder, all or nothing."""
        return save_tokenizer_folder(
            folder,
            kind=KIND,
            digest=self.digest,
            tensors=self._kept.state_dict(),
            config={
                "network": self.network.name,
                "sizes": to_dict(self.network.sizes),
                "draws": self.draws,
            },
            facts=self.facts,
        )

    @classmethod
    def load(cls, folder: Path, tree: dict[str, Any]) -> "ImportedTokenizer":
        """From a folder and its parsed config.json (`load_visual_tokenizer` reads that).

        Raises:
            InputError: settings, tensors or digest that do not belong together.
        """
        where = folder / CONFIG_FILE
        config = tree.get("config")
        if not isinstance(config, dict) or config.keys() != {"network", "sizes", "draws"}:
            raise InputError(f"{where}: config must have network, sizes and draws; import it again")
        with torch.device("meta"):
            try:
                network = _build(config["network"], config["sizes"])
            except (ConfigError, ValueError) as error:
                raise InputError(f"{where}: {error}") from None
            pictures = _no_pictures(network) if config["draws"] else None
        kept = _Kept(network, pictures)
        fill_from_folder(kept, folder)
        tokenizer = cls(network, kept.pictures, tree.get("facts", {}))
        check_digest(folder, tokenizer.digest, tree.get("digest"))
        return tokenizer


def _build(name: object, sizes: Mapping[str, Any]) -> Network:
    if name == BeitV2Network.name:
        return BeitV2Network(from_dict(BeitV2Sizes, sizes))
    if name == DalleNetwork.name:
        return DalleNetwork(from_dict(DalleSizes, sizes))
    raise ConfigError(f"network {name!r} is none of {BeitV2Network.name}, {DalleNetwork.name}")


def _no_pictures(network: Network) -> Tensor:
    side = network.patch
    return torch.full((network.codes, 3, side, side), UNSEEN_GREY, dtype=torch.uint8)


def import_tokenizer(
    tensors: Mapping[str, Tensor], *, origin: str, heads: int = 0, patch: int = 0
) -> tuple[ImportedTokenizer, list[TensorAccount]]:
    """The tokenizer of a foreign file; its names tell which.

    Args:
        origin: named in messages and facts.
        heads: of BEiT v2's; 0: one for every 64 of the width.
        patch: of DALL-E's, see `DalleSizes.patch`; 0: its own 8.

    Raises:
        InputError: neither of the two layouts, or a tensor that does not fit.
        ConfigError: an argument that the layout does not have, or of no use.
    """
    network: Network
    if is_beitv2(tensors):
        if patch:
            raise ConfigError("--patch is for DALL-E's encoder; BEiT v2's has its own")
        network, accounts = import_beitv2(tensors, heads=heads, origin=origin)
    elif is_dalle(tensors):
        if heads:
            raise ConfigError("--heads is for BEiT v2's tokenizer; DALL-E's has none")
        network, accounts = import_dalle(tensors, patch=patch or STRIDE, origin=origin)
    else:
        shown = ", ".join(sorted(tensors)[:5])
        raise InputError(
            f"{origin}: neither BEiT v2's visual tokenizer (encode_task_layer.0.weight ...) nor "
            f"DALL-E's encoder (blocks.input.weight ...); its tensors are {shown} ..."
        )
    facts = {
        "imported": network.name,
        "file": Path(origin).name,
        "dropped": [row.source for row in accounts if row.action == "dropped"],
    }
    return ImportedTokenizer(network, None, facts), accounts


def with_pictures(tokenizer: ImportedTokenizer, batches: Iterable[Tensor]) -> ImportedTokenizer:
    """The same tokenizer with a picture of each code: the mean of the patches that got it.

    Shapes: batches of (B, 3, H, W) uint8.

    Raises:
        InputError: no picture.
    """
    network, side = tokenizer.network, tokenizer.patch
    sums = torch.zeros(tokenizer.codes, 3 * side * side, dtype=torch.float64)
    counts = torch.zeros(tokenizer.codes, dtype=torch.float64)
    images = 0
    for pixels in batches:
        codes = tokenizer.encode(pixels).flatten().cpu()
        # to_patches keeps floats as they are: these stay levels in 0..255.
        patches = to_patches(pixels.cpu().double(), side).flatten(0, 1)
        sums.index_add_(0, codes, patches)
        counts += torch.bincount(codes, minlength=tokenizer.codes)
        images += len(pixels)
    if not images:
        raise InputError("--pictures: no picture to measure the codes on")
    seen = counts > 0
    pictures = _no_pictures(network)
    means = (sums / counts.clamp(min=1)[:, None]).round().to(torch.uint8)
    pictures[seen] = means.reshape(len(means), 3, side, side)[seen]
    facts = {"images": images, "codes_seen": int(seen.sum())}
    return ImportedTokenizer(network, pictures, {**tokenizer.facts, "pictures": facts})
