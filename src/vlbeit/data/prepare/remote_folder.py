"""A prepared folder that lies at a URL, as a folder here that names its shards."""

from pathlib import Path

from vlbeit.data.dataset import Dataset
from vlbeit.data.prepare.folder import new_folder


def name_remote_folder(url: str, out: Path) -> str:
    """Write `out/dataset.json` with the sources of the one at `url`; no shard is fetched yet.

    Returns:
        What was found, as a line for a person.

    Raises:
        ConfigError: `out` exists, or the URL has credentials in it.
        InputError: there is no prepared folder at the URL, or it cannot be reached.
        SaveError: `out` cannot be written.
    """
    with new_folder(out) as (folder, _):
        dataset = Dataset.copy_of_remote(url, folder)
    shards = {shard for source in dataset.sources for shard in source.shards}
    records = sum(source.records for source in dataset.sources)
    return (
        f"{out}: {dataset.name}, {len(dataset.sources)} sources with {records} records in "
        f"{len(shards)} shards, which are fetched when they are read"
    )
