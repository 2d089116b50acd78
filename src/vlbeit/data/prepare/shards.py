"""Tar shards that exist already: webdataset's layout, img2dataset's output.

They are used where they are: the dataset folder only names them, and each gets a manifest beside
it (or in the cache, where its folder is read-only).
"""

import time
from collections.abc import Sequence

from vlbeit.data.dataset import Dataset, SourceInfo
from vlbeit.data.manifest import IMAGE_EXTENSIONS, Manifest
from vlbeit.data.prepare.account import Account, Report
from vlbeit.data.prepare.captions import usable_captions
from vlbeit.data.prepare.folder import new_folder
from vlbeit.data.prepare.locate import Place
from vlbeit.data.prepare.plan import Item, Options, Picture, Plan
from vlbeit.data.prepare.rows import Bad
from vlbeit.data.records import BadSample, RecordSource, expand_shards, open_manifest
from vlbeit.errors import ConfigError


def shards_by_split(
    patterns: Sequence[str], val_patterns: Sequence[str], split: str
) -> dict[str, list[str]]:
    """Every shard of the patterns, by split. A shard in two splits is a ConfigError."""
    found = {split or "train": [s for pattern in patterns for s in expand_shards(pattern)]}
    val = [shard for pattern in val_patterns for shard in expand_shards(pattern)]
    if val:
        found.setdefault("val", []).extend(val)
    all_shards = [shard for shards in found.values() for shard in shards]
    twice = sorted({shard for shard in all_shards if all_shards.count(shard) > 1})
    if twice:
        raise ConfigError(f"{twice[0]}: named twice; each shard belongs to one split, once")
    return found


def prepare_shards(by_split: dict[str, list[str]], options: Options) -> Report:
    """A dataset folder that names the shards; their records are checked by the manifest alone
    (is there an image, is there a text), not opened. Raises what `build` raises."""
    assert options.out is not None
    start = time.monotonic()
    manifests = {s: open_manifest(s) for shards in by_split.values() for s in shards}
    account = Account(options, sum(len(manifest) for manifest in manifests.values()))
    sources: list[SourceInfo] = []
    with new_folder(options.out) as (folder, _):
        for split, shards in by_split.items():
            place = f"{options.name} pair {split}"
            for shard in shards:
                usable = _account(shard, manifests[shard], account)
                account.report.records[place] += usable
            records = sum(len(manifests[shard]) for shard in shards)
            sources.append(SourceInfo(options.name, "pair", split, shards, records))
        account.close()
        account.report.seconds = time.monotonic() - start
        account.report.out = str(options.out)
        account.report.notes.append("the shards stay where they are; --copy writes new ones")
        account.write(folder)
        Dataset.write(folder, options.name, sources, {"prepared": account.report.facts()})
    return account.report


def _account(shard: str, manifest: Manifest, account: Account) -> int:
    usable = 0
    for bad in manifest.bad:
        account.skip(Bad(shard, bad.member, bad.reason, bad.detail))
    for record in range(manifest.records):
        extensions = [member.extension for member in manifest.members(record)]
        lengths = manifest.text_lengths(record)
        found = f"it has {', '.join(extensions)}"
        if not any(extension in IMAGE_EXTENSIONS for extension in extensions):
            account.skip(Bad(shard, manifest.key(record), "no_image", found))
        elif not len(lengths):
            account.skip(Bad(shard, manifest.key(record), "no_text", found))
        elif not lengths.any():
            account.skip(Bad(shard, manifest.key(record), "empty_text", found))
        else:
            account.report.seen += 1
            account.report.captions += len(lengths)
            usable += 1
    return usable


def plan_shards(by_split: dict[str, list[str]], options: Options) -> Plan:
    """The shards' records as new records (`--copy`, `--max-size`) or to be checked one by one."""
    plan = Plan("pair")
    for split, shards in by_split.items():
        drawn = "" if split == "train" and options.val_fraction else split
        for shard in shards:
            source = RecordSource(options.name, [shard])
            manifest = open_manifest(shard)
            for index in range(len(source)):
                try:
                    record = source.read(index)
                    captions, reason = usable_captions(record.captions())
                    record.image()
                except BadSample as bad:
                    plan.bad.append(Bad(shard, bad.member, bad.reason, bad.detail))
                    continue
                if not captions:
                    plan.bad.append(Bad(shard, record.key, reason, "no caption is left"))
                    continue
                member = next(
                    m
                    for extension in IMAGE_EXTENSIONS
                    for m in manifest.members(index)
                    if m.extension == extension
                )
                place = Place(shard, member.offset, member.size)
                name = f"{record.key}.{member.extension}"
                plan.items.append(
                    Item(drawn, name, f"{shard}:{name}", (Picture(place),), {"captions": captions})
                )
    return plan
