"""A converted model as a run folder, which `vlbeit finetune`, `eval` and `vlbeit.load` read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vlbeit.checkpoint import TASK_FILE, preprocessing, save_checkpoint
from vlbeit.config import FinetuneConfig, PretrainConfig, to_dict
from vlbeit.convert.rewriting import Plan, Receipt
from vlbeit.errors import SaveError
from vlbeit.nn.model import VLBeit
from vlbeit.nn.weights import initialise
from vlbeit.tasks import build_task
from vlbeit.tokens.text import TextTokenizer

RECEIPT = "receipt.json"
SEED = 0
"""Of what stays as initialised."""


def blank_model(plan: Plan) -> VLBeit:
    """The plan's model without numbers: names and shapes, no memory for the trunk."""
    with torch.device("meta"):
        model = VLBeit(plan.config.model, seed=None)
    return _with_head(model, plan)


def fresh_model(plan: Plan, names: set[str]) -> VLBeit:
    """The plan's model; only the named tensors of the trunk are filled."""
    model = VLBeit(plan.config.model, seed=None)
    sizes = plan.config.model
    initialise(model, SEED, sizes.init_std, sizes.position_std, only=names)
    return _with_head(model, plan)


def _with_head(model: VLBeit, plan: Plan) -> VLBeit:
    if isinstance(plan.config, FinetuneConfig):
        task = build_task(plan.config, plan.facts or {})
        model.put_on(task.head(model, SEED))
    return model


def check_out(run_dir: Path) -> None:
    """Raise SaveError when something lies there already."""
    if run_dir.exists() and any(run_dir.iterdir()):
        raise SaveError(f"{run_dir}: not empty; a conversion is written to a folder of its own")


def write_run(
    run_dir: Path,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    tokenizer: TextTokenizer,
    receipt: Receipt,
) -> Path:
    """Step 0 of a run, with the receipt beside its files; returns the checkpoint.

    Raises:
        SaveError: no room, no permission, or what was written does not verify.
    """
    config: PretrainConfig | FinetuneConfig = plan.config
    files: dict[str, Mapping[str, object]] = {RECEIPT: receipt.to_json()}
    if plan.facts is not None:
        files[TASK_FILE] = plan.facts
    folder = save_checkpoint(
        run_dir,
        0,
        model_tensors=tensors,
        optimizer_tensors={},
        state={"cursors": {}, "sources": {}, "seed": SEED, "converted": receipt.layout},
        config=to_dict(config),
        preprocessor=preprocessing(config),
        text_tokenizer=tokenizer,
        visual_tokenizer=None,
        world_size=1,
        threads=1,
        files=files,
    )
    tree = json.dumps(to_dict(config), indent=1) + "\n"
    (run_dir / "config.json").write_text(tree)
    return folder
