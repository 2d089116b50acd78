"""VLBeit: embeddings, backbone and the two heads shared by all objectives."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vlbeit import hub
from vlbeit.config import ModelConfig, from_dict, to_dict
from vlbeit.errors import ConfigError, InputError, SaveError
from vlbeit.jsonfile import read_json
from vlbeit.modelcard import CardFacts, write_card
from vlbeit.nn.backbone import Backbone
from vlbeit.nn.embed import ImageEmbed, TextEmbed
from vlbeit.nn.linear import Linear
from vlbeit.nn.positions import RelativeBias
from vlbeit.nn.weights import initialise
from vlbeit.tensorfile import read_header, read_tensors, write_tensors
from vlbeit.types import Modality, Span, States

HEADS = ("heads.", "task.")
"""What the names of tensors begin with that do not belong to the trunk."""


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
                "mlm": Linear(config.width, config.vocab),
                "mim": Linear(config.width, config.codes),
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
        """[text ; image], (B, W + P + 1, D); arguments as in `embed_text` and `embed_image`."""
        text, image = self.text(words), self.image(pixels, patch_masked)
        x = torch.cat((text, image), dim=1)
        if valid is not None:
            valid = torch.cat((valid, valid.new_ones(valid.shape[0], image.shape[1])), dim=1)
        route = (Span(Modality.TEXT, text.shape[1]), Span(Modality.IMAGE, image.shape[1]))
        return States(
            x=x, valid=valid, route=route, grid=self.image.grid(pixels), depth_draws=depth_draws
        )

    @classmethod
    def from_pretrained(
        cls,
        place: str | Path,
        *,
        trunk_only: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> "VLBeit":
        """The model of a folder with config.json and model.safetensors, on the CPU, in float32.

        Such a folder is a checkpoint of a run, what `save_pretrained` or `vlbeit export hf`
        wrote, or a repository of the hub (NAMESPACE/NAME) with those files. Nothing else is read:
        never a pickle, never code. Shapes are compared before memory is taken.

        Args:
            trunk_only: leave out heads, those of pretraining and of a task: embeddings and
                backbone alone.
            revision, token, cache_dir, force_download, local_files_only: see `hub.local_folder`.

        Raises:
            InputError: nothing there, a file is missing or damaged, tensors are missing, extra or
                of another shape, or the model is fine-tuned (its head comes with `vlbeit.load`).
            UnsafeError: weights as a pickle only, or beyond the limits of `tensorfile`.
        """
        folder = hub.local_folder(
            place,
            wanted=(hub.CONFIG, hub.MODEL),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        for name in (hub.CONFIG, hub.MODEL):
            if not (folder / name).is_file():
                raise InputError(f"{folder}: no {name}; expected a checkpoint folder")
        tree = read_json(folder / hub.CONFIG)
        if not isinstance(tree.get("model"), dict):
            raise InputError(
                f'{folder / hub.CONFIG}: no settings under "model"; it is not of a VL-BEiT'
                + (f" but of {tree['model_type']!r}" if "model_type" in tree else "")
            )
        try:
            config = from_dict(ModelConfig, tree["model"])
        except ConfigError as error:
            raise InputError(f"{folder / hub.CONFIG}: model: {error}") from None
        shapes = {n: info.shape for n, info in read_header(folder / hub.MODEL).items()}
        if not trunk_only and any(name.startswith("task.") for name in shapes):
            raise InputError(
                f"{folder}: fine-tuned for {tree.get('task', 'a task')}; vlbeit.load(folder) reads "
                "it with its head (.model is the network), trunk_only=True without"
            )
        if config.layers > len(shapes):
            raise InputError(
                f"{folder}: config.json asks for {config.layers} layers, {hub.MODEL} holds "
                f"{len(shapes)} tensors"
            )
        with torch.device("meta"):
            model = cls(config, seed=None)
        if trunk_only:
            model.heads = nn.ModuleDict()
            shapes = {n: s for n, s in shapes.items() if not n.startswith(HEADS)}
        model.check_fit(shapes, str(folder))
        tensors = read_tensors(folder / hub.MODEL)
        model.load_state_dict({name: tensors[name].float() for name in shapes}, assign=True)
        return model.eval()

    def save_pretrained(self, folder: str | Path, *, card: str = "") -> Path:
        """Write config.json, model.safetensors and README.md, which `from_pretrained` reads.

        For the whole of a run, with tokenizers and the measured facts: `vlbeit export hf`.

        Args:
            card: README.md; "": what the model itself knows. One that is there is kept.

        Raises:
            ConfigError: a fine-tuned model, whose head belongs to its run's settings.
            SaveError: the folder cannot be written.
        """
        if self.task is not None:
            raise ConfigError(
                "save_pretrained: this model has a task's head, which nothing but its run can "
                "build again; use `vlbeit export hf RUN OUT`"
            )
        folder = Path(folder)
        tree = {"model_type": hub.MODEL_TYPE, "model": to_dict(self.config)}
        aside = folder / f".{hub.MODEL}.part"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            aside.unlink(missing_ok=True)
            write_tensors(aside, self.state_dict())
            (folder / hub.CONFIG).write_text(json.dumps(tree, indent=1) + "\n")
            if card or not (folder / hub.CARD).exists():
                parameters = sum(p.numel() for p in self.parameters())
                text = card or write_card(CardFacts(model=self.config, parameters=parameters))
                (folder / hub.CARD).write_text(text, encoding="utf-8")
            aside.replace(folder / hub.MODEL)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise SaveError(f"{folder}: cannot be written ({error.strerror})") from None
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        card: str = "",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload by vlbeit",
    ) -> str:
        """`save_pretrained` into a hub repository; returns the address of the commit.

        Raises:
            ConfigError: a fine-tuned model, or `repo_id` is not NAMESPACE/NAME.
            SaveError: the hub cannot be reached or refuses.
        """
        with tempfile.TemporaryDirectory() as made:
            return hub.upload(
                self.save_pretrained(Path(made) / "model", card=card),
                repo_id,
                private=private,
                token=token,
                branch=branch,
                create_pr=create_pr,
                message=commit_message,
            )

    def check_fit(self, shapes: Mapping[str, Sequence[int]], origin: str) -> None:
        """Compare names and shapes with the model's own, before a tensor is read.

        Args:
            shapes: of the tensors, by name.
            origin: file or folder, for the message.

        Raises:
            InputError: with every name that is missing or unknown and every other shape.
        """
        own = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        problems = [f"missing {name}" for name in own if name not in shapes]
        problems += [f"unknown {name}" for name in shapes if name not in own]
        problems += [
            f"{name} is {tuple(shapes[name])}, the model has {own[name]}"
            for name in own
            if name in shapes and tuple(shapes[name]) != own[name]
        ]
        if problems:
            shown = "; ".join(problems[:10]) + (
                f"; and {len(problems) - 10} more" * (len(problems) > 10)
            )
            raise InputError(f"{origin}: weights do not fit the model: {shown}")

    def load_tensors(self, tensors: dict[str, Tensor], origin: str) -> None:
        """Copy tensors in, strictly.

        Raises:
            InputError: a name or shape does not agree; all of them are listed.
        """
        self.check_fit({name: tensor.shape for name, tensor in tensors.items()}, origin)
        self.load_state_dict(tensors)
