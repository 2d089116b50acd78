"""`vlbeit verify PATH` and `vlbeit inspect PATH`: is it whole, and what is in it.

verify reads every byte and compares it with its digest: a checkpoint folder, a run folder (all its
checkpoints and rows), a prepared data folder, or one shard. Exit code 0 when all is well, 1 when
something is damaged, 66 when there is nothing to verify at PATH.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlbeit.checkpoint import (
    MANIFEST,
    MODEL,
    OPTIMIZER,
    OPTIMIZER_PARTS,
    Checkpoint,
    list_checkpoints,
    load_newest,
    open_checkpoint,
    verify_checkpoint,
)
from vlbeit.data.dataset import Dataset
from vlbeit.data.verify import verify_data
from vlbeit.errors import InputError
from vlbeit.tensorfile import TensorInfo, read_header, refuse_pickle
from vlbeit.train.runfolder import read_holder

ROWS = ("metrics.jsonl", "ledger.jsonl", "skips.jsonl", "eval.jsonl")


def main(argv: Sequence[str]) -> int:
    """`vlbeit verify PATH [--json]`; `argv` is the words after the verb."""
    path, as_json = _arguments("verify", "check everything at PATH against its digests", argv)
    report = verify(path)
    print(json.dumps(report, indent=1) if as_json else "\n".join(_verdict(report)))
    return 0 if report["ok"] else 1


def inspect(argv: Sequence[str]) -> int:
    """`vlbeit inspect PATH [--json]`; `argv` is the words after the verb."""
    path, as_json = _arguments("inspect", "show what is in a checkpoint, run or data folder", argv)
    found = describe(path)
    print(json.dumps(found, indent=1) if as_json else "\n".join(_readable(found)))
    return 0


def verify(path: Path) -> dict[str, Any]:
    """The report on whatever lies at `path`, JSON-able, with `path`, `kind` and `ok`.

    Raises:
        InputError: nothing there that can be verified.
        UnsafeError: a pickle file.
    """
    table: dict[str, Callable[[Path], dict[str, Any]]] = {
        "checkpoint": verify_checkpoint,
        "run": _verify_run,
        "dataset": lambda folder: verify_data(str(folder)),
        "shard": lambda shard: verify_data(str(shard)),
    }
    kind = _kind(path)
    return {**table[kind](path), "path": str(path), "kind": kind}


def describe(path: Path) -> dict[str, Any]:
    """What `vlbeit inspect` shows, JSON-able. Of a run, the newest good checkpoint.

    Raises:
        InputError: nothing there that can be shown, or no good checkpoint in a run that has some.
        UnsafeError: a pickle file.
    """
    kind = _kind(path)
    found: dict[str, Any] = {"path": str(path), "kind": kind}
    if kind == "checkpoint":
        return found | _describe_checkpoint(open_checkpoint(path))
    if kind == "run":
        notes: list[str] = []
        newest = load_newest(path, notes.append)
        found |= {
            "checkpoints": [step for step, _ in list_checkpoints(path)],
            "notes": notes,
            "last_row": _last_row(path / "metrics.jsonl"),
            "lock": read_holder(path / "run.lock") if (path / "run.lock").exists() else None,
        }
        return found | ({"newest": _describe_checkpoint(newest)} if newest else {})
    if kind == "dataset":
        data = Dataset.open(path)
        rows = [
            {"name": s.name, "stream": s.stream, "split": s.split, "records": s.records,
             "shards": len(s.shards)}
            for s in data.sources
        ]  # fmt: skip
        return found | {"name": data.name, "sources": rows, "facts": data.facts}
    raise InputError(f"{path}: inspect shows checkpoint, run and data folders; this is a {kind}")


def _kind(path: Path) -> str:
    if path.is_file() and path.suffix == ".tar":
        return "shard"
    if (path / "dataset.json").is_file():
        return "dataset"
    if (path / MANIFEST).is_file() or (path / MODEL).is_file():
        return "checkpoint"
    if any((path / name).exists() for name in ("checkpoints", "run.lock", *ROWS)):
        return "run"
    refuse_pickle(path)
    raise InputError(
        f"{path}: expected a checkpoint folder (with {MANIFEST}), a run folder (with "
        "checkpoints/), a prepared data folder (with dataset.json) or a .tar shard; found none"
    )


def _verify_run(path: Path) -> dict[str, Any]:
    checkpoints = [verify_checkpoint(folder) for _, folder in list_checkpoints(path)]
    rows = [_verify_rows(path / name) for name in ROWS if (path / name).exists()]
    problems = [f"{Path(r['path']).name}: {p}" for r in checkpoints for p in r["problems"]]
    problems += [f"{r['file']}: line {n} is not a row" for r in rows for n in r["bad_lines"]]
    return {"ok": not problems, "checkpoints": checkpoints, "rows": rows, "problems": problems}


def _verify_rows(path: Path) -> dict[str, Any]:
    """Counts rows. A last line without its end is a kill's mark, which a resume cuts: no damage."""
    report: dict[str, Any] = {"file": path.name, "rows": 0, "bad_lines": [], "torn_bytes": 0}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                report["torn_bytes"] = len(line)
                continue
            try:
                int(json.loads(line)["step"])
                report["rows"] += 1
            except (ValueError, KeyError, TypeError):
                report["bad_lines"].append(number)
    return report


def _verdict(report: dict[str, Any]) -> list[str]:
    """The report for a terminal: what is wrong, each on a line, then one line in all."""
    lines = list(report.get("problems", []))
    for source in report.get("sources", [report] if "shards" in report else []):
        for shard in source["shards"]:
            lines += [
                f"{shard['shard']}: {bad['member'] or 'the whole file'}: {bad['reason']}"
                f" ({bad['detail']})"
                for bad in shard["bad"]
            ]
    counts = {
        "checkpoint": lambda: f"{len(report['files'])} files",
        "run": lambda: f"{len(report['checkpoints'])} checkpoints",
        "dataset": lambda: f"{report['used']} of {report['promised']} records",
        "shard": lambda: f"{report['used']} records",
    }[report["kind"]]()
    verdict = "whole" if report["ok"] else "DAMAGED"
    return [*lines, f"{report['path']}: {report['kind']} with {counts}: {verdict}"]


def _describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    manifest = checkpoint.manifest
    return {
        "folder": str(checkpoint.folder),
        "step": checkpoint.step,
        **{key: manifest[key] for key in ("world_size", "threads", "rng", "cursors")},
        "tokenizer_digests": manifest["tokenizer_digests"],
        "config": checkpoint.config,
        "tensors": {
            name: _describe_tensors(read_header(checkpoint.folder / name))
            for name in manifest["files"]
            if name in (MODEL, OPTIMIZER) or name.startswith(f"{OPTIMIZER_PARTS}/")
        },
    }


def _describe_tensors(infos: dict[str, TensorInfo]) -> dict[str, Any]:
    return {
        "count": len(infos),
        "elements": sum(math.prod(info.shape) for info in infos.values()),
        "bytes": sum(info.bytes for info in infos.values()),
        "shapes": {
            name: [str(info.dtype).removeprefix("torch."), *info.shape]
            for name, info in infos.items()
        },
    }


def _last_row(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - (1 << 20)))
            lines = [line for line in file.read().split(b"\n")[:-1] if line]
        row: dict[str, Any] = json.loads(lines[-1])
        return row
    except (OSError, ValueError, IndexError):
        return None


def _readable(value: Any, depth: int = 0) -> list[str]:
    """Nested mappings as indented lines; a list of plain values stays on one."""
    lines: list[str] = []
    for name, item in value.items():
        if isinstance(item, dict) and item:
            lines += ["  " * depth + f"{name}:", *_readable(item, depth + 1)]
        else:
            text = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)
            lines.append("  " * depth + f"{name}: {text}")
    return lines


def _arguments(verb: str, does: str, argv: Sequence[str]) -> tuple[Path, bool]:
    parser = argparse.ArgumentParser(prog=f"vlbeit {verb}", description=does)
    parser.add_argument(
        "path", type=Path, metavar="PATH", help="a run folder, checkpoint, export or data folder"
    )
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
    given = parser.parse_args(list(argv))
    return given.path, given.json
