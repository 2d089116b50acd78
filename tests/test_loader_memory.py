"""A loader worker's memory stays flat over 50,000 samples (reliability.md, "memory creeps up").

Measured from outside, as pages of its own (not shared with the trainer): copies of pages that a
forked worker only touches, and lists of small objects that grow, both show there.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from toy_records import CONFIG, image_source, toy_tokenizer
from vlbeit.config import BatchConfig, CropConfig
from vlbeit.data.loader import StepLoader, build_loader, build_streams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

SAMPLES, STEP, SETTLED = 50_000, 250, 40
ALLOWED = 1.0
"""Megabytes of growth of a worker: 40 bytes a sample."""


def small_pictures(folder: Path) -> StepLoader:
    """Two workers on 500 records, a hundred visits of each."""
    config = replace(
        CONFIG,
        model=replace(CONFIG.model, image_size=(16, 16), drop_path=0.0),
        input=replace(CONFIG.input, images=CropConfig(scale=(0.5, 1.0)), workers=2),
        batch=BatchConfig(images=STEP, texts=0, pairs=0, micro=125),
    )
    sources = {"image": [image_source(folder, records=500)]}
    return build_loader(config, build_streams(config, sources, toy_tokenizer(), cache=folder))


def own_megabytes(pid: int) -> float:
    """Memory of a process that it shares with no other."""
    told = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(kb) for kb in re.findall(r"^Private_\w+:\s+(\d+) kB", told, re.M)) / 1000


def growth(loader: StepLoader, samples: int) -> Sequence[float]:
    """By how much each worker grew from step SETTLED to the last, in megabytes."""
    last = samples // STEP
    sizes = []
    # A few steps more, so that the workers are still there when the last one is measured.
    for data in loader.steps(loader.start_cursors(), 1, last + 20):
        if data.step in (SETTLED, last):
            workers = loader._background._workers  # type: ignore[union-attr]
            sizes.append([own_megabytes(worker.pid) for worker in workers])
        assert sum(len(batch) for batch in data.batches["image"]) == STEP
        if data.step == last:
            break
    loader.close()
    return (np.array(sizes[1]) - np.array(sizes[0])).tolist()


def test_workers_stay_flat_over_fifty_thousand_samples(tmp_path: Path) -> None:
    grown = growth(small_pictures(tmp_path), SAMPLES)
    assert len(grown) == 2 and max(grown) < ALLOWED, grown


def test_a_list_that_grows_with_the_samples_would_be_seen(tmp_path: Path) -> None:
    """The negative check: one small object a sample, two fifths of the samples."""
    loader = small_pictures(tmp_path)
    stream = loader._streams["image"]
    kept, good = [], stream.sample

    def keeps(visit):
        kept.append({"visit": visit, "note": f"{visit} was here"})
        return good(visit)

    stream.sample = keeps  # type: ignore[method-assign]
    assert min(growth(loader, 2 * SAMPLES // 5)) > ALLOWED
