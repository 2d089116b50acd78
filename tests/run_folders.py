"""Run folders of untrained models as the trainers write them, with logs that look like theirs."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from test_vqkd import CONFIG as VISUAL
from tiny_models import TINY
from tiny_run import shade_words
from untrained_run import FACTS, untrained
from vlbeit.checkpoint import TASK_FILE, preprocessing, save_checkpoint
from vlbeit.config import PretrainConfig, to_dict
from vlbeit.nn.model import VLBeit
from vlbeit.nn.weights import initialise
from vlbeit.tokens.text import TextTokenizer
from vlbeit.tokens.vqkd import VQKD, VQKDTokenizer

STEP = 3


def _save(run_dir: Path, config: Any, model: VLBeit, text: TextTokenizer, **more: Any) -> Path:
    save_checkpoint(
        run_dir,
        STEP,
        model_tensors=model.state_dict(),
        optimizer_tensors={"moment": model.image.cls.detach()},
        state={"cursors": {}, "sources": {"pair": {"shades": 23}}},
        config=to_dict(config),
        preprocessor=preprocessing(config),
        text_tokenizer=text,
        world_size=1,
        threads=1,
        **{"visual_tokenizer": None, **more},
    )
    rows = [{"step": step, "seconds": 1800.0} for step in range(1, STEP + 2)]
    (run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    row = {"loss": 1.25, "accuracy": 0.375, "count": 8}
    evals = [{"step": step, "objectives": {"mim": row}} for step in (0, 2, 4)]
    (run_dir / "eval.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in evals))
    machine = {"world_size": 1, "device": "cpu", "gpu": None, "cores": 2, "host": "my-own-host"}
    versions = {"vlbeit": "0.1.0", "torch": "2.13.0"}
    (run_dir / "env.json").write_text(json.dumps({**machine, "versions": versions}))
    return run_dir


def pretrained_run(run_dir: Path, data: Path = Path("/home/me/private/shades")) -> Path:
    """A pretraining run of two tokenizers; its logs go one step beyond the checkpoint."""
    text = shade_words()
    sizes = replace(TINY, vocab=text.size, codes=VISUAL.codes)
    config = PretrainConfig(
        recipe="tiny", run_dir=str(run_dir.absolute()), data=(str(data),), model=sizes
    )
    visual = VQKD(VISUAL)
    initialise(visual, 0)
    model = VLBeit(sizes, seed=1)
    taught = {"training": {"teacher": "/home/me/private/clip"}}
    return _save(run_dir, config, model, text, visual_tokenizer=VQKDTokenizer(visual, taught))


def task_run(run_dir: Path, task: str, facts: Mapping[str, Any] | None = None) -> Path:
    """A fine-tuned run of the task.

    Args:
        facts: what its task.json holds; None: what this release keeps.
    """
    shade_words().save(run_dir / "words")
    predictor = untrained(task, run_dir / "words")
    config = replace(predictor.run.config, start="/home/me/private/runs/start")
    kept = {TASK_FILE: FACTS[task] if facts is None else facts}
    return _save(run_dir, config, predictor.model, predictor.run.text, files=kept)
