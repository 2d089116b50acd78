"""Rows that a run wrote: metrics.jsonl, eval.jsonl."""

import json
from pathlib import Path
from typing import Any

EVALUATION = "evaluation.json"
"""In a run folder: what `vlbeit eval RUN --out RUN/evaluation.json` wrote."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Whole rows of a JSON-lines file; none if there is no such file. A torn last line of a run
    that is still going, or was killed, is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows
