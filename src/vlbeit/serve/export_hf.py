"""`vlbeit export hf RUN OUT`: a run as a folder for the Hugging Face hub.

    config.json               the settings, with what transformers needs to find the class
    model.safetensors         the weights
    tokenizer.json  visual/   the run's tokenizers
    preprocessor.json         how pixels are scaled, in words
    preprocessor_config.json  the same for transformers' image processors
    task.json                 of a fine-tuned run: classes, answers
    README.md                 the model card
    state.json manifest.json  step, sources, and a digest of every file

It is a checkpoint without what only a resume needs: `vlbeit.load`, `vlbeit eval`, `vlbeit finetune
--start` and `vlbeit verify` take it as it is, and so does transformers with `import vlbeit.hf`.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlbeit import hub
from vlbeit.checkpoint import (
    TASK_FILE,
    VISUAL_TOKENIZER,
    Checkpoint,
    copy_checkpoint,
    find_checkpoint,
)
from vlbeit.config import ModelConfig, from_dict
from vlbeit.convert.hf_export import preprocessor
from vlbeit.errors import ConfigError
from vlbeit.eval.run_rows import EVALUATION
from vlbeit.jsonfile import read_json
from vlbeit.modelcard import CardFacts, write_card
from vlbeit.tensorfile import read_header

PATHS = (("run_dir",), ("start",), ("tokenizers", "text"), ("tokenizers", "visual"))
"""Settings that hold a path, relative ones too. The last part stays: others need not know where
files lay."""


def main(argv: Sequence[str]) -> int:
    """`argv` is the words after `vlbeit export hf`."""
    parser = argparse.ArgumentParser(
        prog="vlbeit export hf",
        description="Write a run as a folder that the hub, from_pretrained and vlbeit.load read.",
    )
    parser.add_argument("run", help="run folder (its newest good checkpoint) or a checkpoint")
    parser.add_argument("out", help="the folder to write; must not exist, or be an export")
    parser.add_argument("--licence", default="", help="of the weights, as SPDX has it: cc-by-4.0")
    parser.add_argument("--name", default="", help="title of the model card")
    parser.add_argument(
        "--evaluation",
        default="",
        help=f"JSON of `vlbeit eval --out` for the card (RUN/{EVALUATION} if it is there)",
    )
    parser.add_argument("--push", default="", metavar="NAMESPACE/NAME", help="and upload it")
    parser.add_argument("--private", action="store_true", help="a new repository is private")
    given = parser.parse_args(list(argv))
    if given.private and not given.push:
        raise ConfigError("--private says how --push makes a repository: give that too")
    if given.push and not hub.is_repository(given.push):
        raise ConfigError(f"--push {given.push!r} is not NAMESPACE/NAME of a hub repository")
    folder = export_hf(
        given.run, given.out, licence=given.licence, name=given.name, evaluation=given.evaluation
    )
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    if given.push:
        print(hub.upload(folder, given.push, private=given.private or None))
    return 0


def export_hf(
    run: str | Path,
    out: str | Path,
    *,
    licence: str = "",
    name: str = "",
    evaluation: str | Path = "",
) -> Path:
    """Write the folder, all or nothing; an export that is there is replaced.

    Args:
        run: a run folder or a checkpoint.
        licence: SPDX identifier for the card; "": the card says that none is stated.
        name: the card's title; "": from the run's name.
        evaluation: a file of `vlbeit eval --out`; "": the run's evaluation.json if it has one.

    Raises:
        InputError: no good checkpoint, or the evaluation cannot be read.
        ConfigError: `out` holds something else, or the evaluation is of another step.
    """
    checkpoint = find_checkpoint(run, print)
    facts = card_facts(checkpoint, Path(run), licence, name, evaluation)
    config = {
        "model_type": hub.MODEL_TYPE,
        "architectures": ["VLBeitModel"],
        **_without_paths(checkpoint.config),
    }
    if (checkpoint.folder / TASK_FILE).is_file():
        config["task_facts"] = read_json(checkpoint.folder / TASK_FILE)
    files = {
        hub.CARD: write_card(facts).encode(),
        "preprocessor_config.json": _json(preprocessor(facts.model)),
    }
    visual = f"{VISUAL_TOKENIZER}/{hub.CONFIG}"
    if visual in checkpoint.manifest["files"]:
        # Its facts may name a teacher's folder; its digest is of weights and sizes alone.
        files[visual] = _json(_bare(read_json(checkpoint.folder / visual)))
    return copy_checkpoint(
        checkpoint,
        Path(out),
        config=config,
        state={"step": checkpoint.step, "sources": checkpoint.state.get("sources", {})},
        files=files,
    )


def card_facts(
    checkpoint: Checkpoint, place: Path, licence: str, name: str, evaluation: str | Path
) -> CardFacts:
    """What the run's files say, and nothing else. Of a lone checkpoint its run is looked for
    where runs have theirs: two folders up."""
    run_dir = checkpoint.folder.parent.parent
    config, step = checkpoint.config, checkpoint.step
    shapes = read_header(checkpoint.folder / hub.MODEL)
    title = (
        name or f"VL-BEiT {config.get('task', 'pretraining')} {config.get('recipe', '')}".strip()
    )
    return CardFacts(
        model=from_dict(ModelConfig, config["model"]),
        parameters=sum(info.bytes // info.dtype.itemsize for info in shapes.values()),
        name=title,
        task=config.get("task", ""),
        start=_last_part(config.get("start", "")),
        recipe=config.get("recipe", ""),
        step=step,
        settings=_without_paths(config),
        sources=checkpoint.state.get("sources", {}),
        data_licences=_licences(config.get("data", ())),
        environment=_optional(run_dir / "env.json"),
        seconds=_seconds(run_dir / "metrics.jsonl", step),
        held_out=_last_row(run_dir / "eval.jsonl", step),
        evaluation=_evaluation(place, evaluation, step),
        licence=licence,
    )


def _evaluation(place: Path, given: str | Path, step: int) -> dict[str, Any]:
    path = Path(given) if given else place / EVALUATION
    if not given and not path.is_file():
        return {}
    found = read_json(path)
    if found.get("step") != step:
        raise ConfigError(
            f"{path}: evaluates step {found.get('step')}, the checkpoint is of step {step}; "
            f"run `vlbeit eval {place} --out {path}` again"
        )
    return found


def _licences(folders: Sequence[str]) -> dict[str, str]:
    """By the folder's name, where dataset.json is still there and states one."""
    found = {}
    for folder in folders:
        licence = _optional(Path(folder) / "dataset.json").get("facts", {}).get("licence")
        if licence:
            found[_last_part(folder)] = str(licence)
    return found


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _rows(path: Path, step: int) -> list[dict[str, Any]]:
    """The whole rows of a log up to a step; a run may have gone on after it."""
    found = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the last line of a run that was killed; `vlbeit verify` counts them
            if isinstance(row, dict) and row.get("step", step + 1) <= step:
                found.append(row)
    return found


def _last_row(path: Path, step: int) -> dict[str, Any]:
    return next(reversed(_rows(path, step)), {})


def _seconds(path: Path, step: int) -> float | None:
    """Of the logged steps; None unless every step has its row."""
    rows = _rows(path, step)
    return sum(float(row["seconds"]) for row in rows) if len(rows) == step else None


def _without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = _bare(config)
    tree["data"] = [_last_part(folder) for folder in tree.get("data", ())]
    for *groups, leaf in PATHS:
        inside = tree
        for group in groups:
            inside = inside.get(group, {})
        if inside.get(leaf):
            inside[leaf] = _last_part(inside[leaf])
    return tree


def _bare(value: Any) -> Any:
    """A tree of JSON with the last part of every absolute path in place of it."""
    if isinstance(value, Mapping):
        return {key: _bare(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_bare(inner) for inner in value]
    if isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute()):
        return _last_part(value)
    return value


def _last_part(path: str) -> str:
    return Path(path).name


def _json(tree: Mapping[str, Any]) -> bytes:
    return (json.dumps(tree, indent=1) + "\n").encode()
