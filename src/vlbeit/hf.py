"""VL-BEiT in transformers: after `import vlbeit.hf`, AutoConfig and AutoModel know a folder of it.

    import vlbeit.hf
    model = transformers.AutoModel.from_pretrained("FOLDER")    # of `vlbeit export hf` or the hub

The same network under the same names as `VLBeit`: a folder that either wrote loads in the other.
Needs the `hf` extra. No code of the folder is run (`trust_remote_code` is not needed).
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from vlbeit import hub
from vlbeit.config import FINETUNE_CONFIGS, ModelConfig, finetune_config, from_dict, to_dict
from vlbeit.errors import ConfigError, InputError
from vlbeit.nn.model import VLBeit
from vlbeit.tasks import build_task

try:
    import transformers
    from transformers.modeling_outputs import BaseModelOutput
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "vlbeit.hf needs transformers; run: pip install 'vlbeit[hf]'", name="transformers"
    ) from error


class VLBeitConfig(transformers.PreTrainedConfig):
    """config.json of `vlbeit export hf`: `model` has the sizes; the other settings of the run are
    attributes of their own names.

    Raises:
        ConfigError: sizes that `ModelConfig` does not know.
    """

    model_type = hub.MODEL_TYPE

    def __init__(self, model: Mapping[str, Any] | None = None, **more: Any) -> None:
        self.model = to_dict(from_dict(ModelConfig, model or {}))
        super().__init__(**more)

    def sizes(self) -> ModelConfig:
        """As the rest of the package has them."""
        return from_dict(ModelConfig, self.model)

    def task_head(self, network: VLBeit) -> nn.Module | None:
        """The fresh head of a fine-tuned run; None for a pretrained one."""
        task = getattr(self, "task", None)
        if not task:
            return None
        if task not in FINETUNE_CONFIGS:
            raise ConfigError(f"task: {task!r} is none of {', '.join(FINETUNE_CONFIGS)}")
        names = [field.name for field in fields(FINETUNE_CONFIGS[task])]
        tree = {name: getattr(self, name) for name in names if hasattr(self, name)}
        config = finetune_config(tree)
        facts = getattr(self, "task_facts", {})
        origin = self.name_or_path or "this configuration"
        return build_task(config, facts, origin).head(network, config.seed)


@dataclass
class VLBeitOutput(BaseModelOutput):
    """last_hidden_state (B, L, D) after the final norm: [text ; image] of a pair, [T_CLS] first."""


class VLBeitModel(transformers.PreTrainedModel):
    """`VLBeit` as a model of transformers; `network` is the VLBeit itself."""

    config_class = VLBeitConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    network: VLBeit

    def __init__(self, config: VLBeitConfig) -> None:
        super().__init__(config)
        network = VLBeit(config.sizes(), seed=None)
        with torch.device("cpu"):
            head = config.task_head(network)
        if head is not None:
            network.put_on(head)
        # The parts themselves, not the whole: so the names are those of VLBeit's own files.
        self.image, self.text, self.backbone = network.image, network.text, network.backbone
        self.heads, self.task = network.heads, network.task
        object.__setattr__(self, "network", network)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: weights come from a file, all of them."""

    @classmethod
    def from_pretrained(cls, *place: Any, **more: Any) -> Any:
        """As in transformers, but a tensor that is missing, unknown or of another shape is an
        error, and only safetensors are read.

        Raises:
            InputError: names the tensors.
        """
        wanted = more.pop("output_loading_info", False)
        # Shapes that differ are let through to be named below; transformers only logs them.
        own = {"use_safetensors": True, "output_loading_info": True}
        own["ignore_mismatched_sizes"] = True
        loaded: Any = super().from_pretrained(*place, **{**more, **own})
        model, info = loaded
        wrong = {
            kind: sorted(map(str, info.get(kind, ())))
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        }
        if any(wrong.values()):
            shown = "; ".join(f"{k}: {', '.join(v[:10])}" for k, v in wrong.items() if v)
            raise InputError(f"{place[0]}: weights do not fit the model: {shown}")
        return (model, info) if wanted else model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        **ignored: Any,
    ) -> VLBeitOutput:
        """A text, an image, or both.

        Shapes: input_ids (B, W) int64 with [T_CLS] first and [T_SEP] last; attention_mask (B, W),
        0 at padding; pixel_values (B, 3, H, W) uint8, or floats in [-1, 1]; bool_masked_pos (B, P).

        Raises:
            ValueError: neither a text nor an image, or another argument with a value.
        """
        # Flags such as return_dict are transformers' own and change nothing here.
        given = [n for n, v in ignored.items() if v is not None and not isinstance(v, bool)]
        if given:
            raise ValueError(f"VLBeitModel does not take {', '.join(given)}")
        network = self.network
        valid = None if attention_mask is None else attention_mask.bool()
        if input_ids is not None and pixel_values is not None:
            states = network.embed_pair(input_ids, valid, pixel_values, bool_masked_pos)
        elif input_ids is not None:
            states = network.embed_text(input_ids, valid)
        elif pixel_values is not None:
            states = network.embed_image(pixel_values, bool_masked_pos)
        else:
            raise ValueError("give input_ids, pixel_values or both")
        return VLBeitOutput(last_hidden_state=network.backbone(states))


transformers.AutoConfig.register(VLBeitConfig.model_type, VLBeitConfig, exist_ok=True)
transformers.AutoModel.register(VLBeitConfig, VLBeitModel, exist_ok=True)
