"""What `vlbeit verify` says about data: every byte of a prepared folder or of some shards."""

from pathlib import Path
from typing import Any

from vlbeit.data.dataset import Dataset
from vlbeit.data.records import expand_shards, verify_shards


def verify_data(path: str) -> dict[str, Any]:
    """A report that can be written as JSON; `ok` is True when everything listed can be used.

    Args:
        path: a prepared folder (dataset.json), a tar file, or a pattern of tar files.

    Raises:
        InputError: there is nothing of the kind at `path`.
    """
    if not (Path(path).is_dir() or Path(path).name == "dataset.json"):
        return {"kind": "shards", "path": path, **verify_shards(expand_shards(path))}
    dataset = Dataset.open(path)
    sources = []
    for source in dataset.sources:
        report = verify_shards(source.shards)
        # Bad entries of a scanned shard are listed too, so only fewer than promised is a fault.
        complete = report["listed"] >= source.records
        sources.append(
            {
                "source": source.name,
                "stream": source.stream,
                "split": source.split,
                "promised": source.records,
                **report,
                "ok": report["ok"] and complete,
            }
        )
    totals = {
        key: sum(s[key] for s in sources) for key in ("promised", "listed", "used", "skipped")
    }
    ok = all(source["ok"] for source in sources)
    return {"kind": "dataset", "path": path, "ok": ok, **totals, "sources": sources}
