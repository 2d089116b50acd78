"""VLBeit: embeddings, backbone and the two heads shared by all objectives."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vlbeit.config import ModelConfig, from_dict
from vlbeit.errors import InputError
from vlbeit.nn.backbone import Backbone
from vlbeit.nn.embed import ImageEmbed, TextEmbed
from vlbeit.nn.positions import RelativeBias
from vlbeit.nn.weights import initialise
from vlbeit.types import Modality, Span, States


class VLBeit(nn.Module):
    """One bidirectional Transformer for images, texts and pairs (VL-BEiT, arXiv 2206.01127).

    `embed_*` makes States, `backbone` turns them into vectors, `heads` names words ("mlm") and
    visual codes ("mim"). A pair is [text ; image] (paper section 2.1). There is no other forward.
    """

    def __init__(self, config: ModelConfig, seed: int | None = 0) -> None:
        """
        Args:
            seed: of the fresh weights; None leaves them unfilled, for weights from a file.
        """
        super().__init__()
        self.config = config
        absolute = config.absolute_positions
        self.image = ImageEmbed(config.width, config.patch, config.image_size, absolute)
        self.text = TextEmbed(
            config.width, config.vocab, config.text_positions, absolute, config.text_norm_eps
        )
        relative = None
        if config.relative_bias != "none":
            relative = RelativeBias(
                self.image.native_grid,
                config.text_positions,
                config.layers,
                config.heads,
                config.relative_bias == "per_layer",
            )
        self.backbone = Backbone(
            config.width,
            config.layers,
            config.heads,
            config.ffn,
            vl_layers=config.vl_layers,
            layer_scale=config.layer_scale,
            drop_path=config.drop_path,
            norm_eps=config.norm_eps,
            relative_bias=relative,
        )
        self.heads = nn.ModuleDict(
            {
                "mlm": nn.Linear(config.width, config.vocab),
                "mim": nn.Linear(config.width, config.codes),
            }
        )
        self.task: nn.Module | None = None
        if seed is not None:
            initialise(self, seed, config.init_std, config.position_std)

    def put_on(self, head: nn.Module) -> "VLBeit":
        """The same model with a task's head (its tensors are named task.*) for the two heads of
        pretraining."""
        self.heads = nn.ModuleDict()
        self.task = head
        return self

    def embed_image(
        self, pixels: Tensor, patch_masked: Tensor | None = None, depth_draws: Tensor | None = None
    ) -> States:
        """pixels (B, 3, height, width) uint8 or float in [-1, 1]; patch_masked (B, P) bool."""
        x = self.image(pixels, patch_masked)
        route = (Span(Modality.IMAGE, x.shape[1]),)
        return States(
            x=x, valid=None, route=route, grid=self.image.grid(pixels), depth_draws=depth_draws
        )

    def embed_text(
        self, words: Tensor, valid: Tensor | None = None, depth_draws: Tensor | None = None
    ) -> States:
        """words (B, W) int64 with [T_CLS] first and [T_SEP] last; valid (B, W) bool."""
        x = self.text(words)
        route = (Span(Modality.TEXT, x.shape[1]),)
        return States(x=x, valid=valid, route=route, depth_draws=depth_draws)

    def embed_pair(
        self,
        words: Tensor,
        valid: Tensor | None,
        pixels: Tensor,
        patch_masked: Tensor | None = None,
        depth_draws: Tensor | None = None,
    ) -> States:
        """[text ; image]; arguments as in `embed_text` and `embed_image`."""
        text, image = self.text(words), self.image(pixels, patch_masked)
        x = torch.cat((text, image), dim=1)
        if valid is not None:
            valid = torch.cat((valid, valid.new_ones(len(valid), image.shape[1])), dim=1)
        route = (Span(Modality.TEXT, text.shape[1]), Span(Modality.IMAGE, image.shape[1]))
        return States(
            x=x, valid=valid, route=route, grid=self.image.grid(pixels), depth_draws=depth_draws
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "VLBeit":
        """The model of a checkpoint folder (config.json, model.safetensors), on the CPU.

        Raises:
            InputError: a file is missing, or tensors are missing, extra or of another shape.
        """
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise InputError(f"{folder}: no {name}; expected a checkpoint folder")
        tree: dict[str, Any] = json.loads((folder / "config.json").read_text())
        model = cls(from_dict(ModelConfig, tree["model"]))
        model.load_tensors(load_file(folder / "model.safetensors"), str(folder))
        return model

    def load_tensors(self, tensors: dict[str, Tensor], origin: str) -> None:
        """Copy tensors in, strictly: all names and shapes must agree, or InputError lists them."""
        own = self.state_dict()
        problems = [f"missing {name}" for name in own if name not in tensors]
        problems += [f"unknown {name}" for name in tensors if name not in own]
        problems += [
            f"{name} is {tuple(tensors[name].shape)}, the model has {tuple(own[name].shape)}"
            for name in own
            if name in tensors and tensors[name].shape != own[name].shape
        ]
        if problems:
            shown = "; ".join(problems[:10]) + (
                f"; and {len(problems) - 10} more" * (len(problems) > 10)
            )
            raise InputError(f"{origin}: weights do not fit the model: {shown}")
        self.load_state_dict(tensors)
