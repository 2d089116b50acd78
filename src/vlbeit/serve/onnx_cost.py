"""What int8 costs: the same held-out samples asked of a graph in float32 and in int8."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from vlbeit.data.records import BadSample
from vlbeit.errors import InputError
from vlbeit.eval.downstream import TaskRun, evaluate_task, held_out_stream
from vlbeit.eval.heldout import batches_of, held_out_streams, need_streams, visits_of
from vlbeit.nn.model import VLBeit
from vlbeit.serve.onnx_graph import WORDS, OnnxMode, Run, batch_inputs, outputs_of
from vlbeit.serve.onnx_session import Graph
from vlbeit.types import Batch, TaskBatch

BATCH = 32
KINDS = ("float32", "int8")
COSINE = "cosine with float32"
Figures: TypeAlias = dict[str, dict[str, float]]
"""By name, then by KINDS."""


class Cost(TypedDict):
    """What was measured."""

    data: list[str]
    split: str
    samples: int
    skipped: int
    figures: Figures


def folders_to_measure(run: Run, data: Sequence[str]) -> tuple[str, ...]:
    """`data`, or the folders that the run was trained on.

    Raises:
        InputError: one of them is not there; names it.
    """
    folders = tuple(data) or run.config.data
    gone = [folder for folder in folders if not Path(folder).is_dir()]
    if gone or not folders:
        where = f"{', '.join(gone)} is not there" if gone else "the run names none"
        raise InputError(
            f"--int8 measures what it costs on held-out samples, and {where}; name prepared "
            "folders with --data"
        )
    return folders


def measure_cost(
    run: Run,
    mode: OnnxMode,
    graphs: Mapping[str, Graph],
    folders: tuple[str, ...],
    samples: int,
    split: str = "val",
) -> Cost:
    """The figures of both graphs on held-out samples.

    Of answers and classes: the task's own figures (accuracy, top1) and how often both graphs put
    the same one first. Of hidden words: the share that is named right. Of vectors: the cosine
    between the two graphs', mean and lowest. Of `match`: the mean absolute difference.

    Args:
        graphs: by the names in KINDS.
        folders: prepared data.
        samples: most samples; 0: all.

    Raises:
        InputError: there are no such samples.
    """
    if isinstance(run, TaskRun):
        run = replace(run, config=replace(run.config, data=folders))
    else:
        run = replace(run, config=replace(run.config, data=folders))
    bad: list[BadSample] = []
    count, figures = compared(run, mode, graphs, split, samples, bad)
    if "logits" in mode.outputs:
        assert isinstance(run, TaskRun)
        own = {
            kind: evaluate_task(by_graph(run, mode, graphs[kind]), split=split, samples=samples)
            for kind in KINDS
        }
        # Those of parts of the data (accuracy/colour) would be a page of their own.
        names = [name for name in own[KINDS[0]]["figures"] if "/" not in name]
        figures = {
            name: {kind: own[kind]["figures"][name]["value"] for kind in KINDS} for name in names
        } | figures
    return Cost(
        data=[Path(folder).name for folder in folders],
        split=split,
        samples=count,
        skipped=len(bad),
        figures=figures,
    )


def by_graph(run: TaskRun, mode: OnnxMode, graph: Graph) -> TaskRun:
    """The run with a graph's logits in place of its own."""
    place = list(mode.outputs).index("logits")

    def logits(model: VLBeit, head: nn.Module, batch: TaskBatch) -> Tensor:
        return torch.from_numpy(graph(batch_inputs(mode, batch))[place])

    task: Any = copy.copy(run.task)
    task.logits = logits  # an instance's own name hides that of its class
    return replace(run, task=task)


def compared(
    run: Run,
    mode: OnnxMode,
    graphs: Mapping[str, Graph],
    split: str,
    samples: int,
    bad: list[BadSample],
) -> tuple[int, Figures]:
    """How many samples there were, and the figures that the two graphs' outputs give."""
    names = list(outputs_of(mode, run))
    seen: dict[str, dict[str, list[np.ndarray]]] = {kind: {} for kind in KINDS}
    count = 0
    for batch in held_out(run, mode, split, samples, bad):
        given = batch_inputs(mode, batch)
        found = {kind: dict(zip(names, graphs[kind](given), strict=True)) for kind in KINDS}
        for kind in KINDS:
            for name, values in looked_at(batch, found[kind], found["float32"]).items():
                seen[kind].setdefault(name, []).append(values)
        count += len(batch)
    if not count:
        raise InputError(f"none of the held-out samples is usable, the first: {bad[0]}")
    figures: Figures = {}
    for kind in KINDS:
        for name, parts in seen[kind].items():
            values = np.concatenate(parts)
            figures.setdefault(name, {})[kind] = float(values.mean())
            if name == COSINE:
                figures.setdefault(f"lowest {name}", {})[kind] = float(values.min())
    return count, figures


def looked_at(
    batch: Batch | TaskBatch, outputs: Mapping[str, np.ndarray], float32: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """(N,) float64 by the name of a figure, whose mean it is: a graph's outputs beside the answers
    and beside those in float32."""
    if "vector" in outputs:
        one, other = outputs["vector"], float32["vector"]
        lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        return {COSINE: (one * other).sum(axis=1) / np.maximum(lengths, 1e-12)}
    if "logits" in outputs:
        first = outputs["logits"].argmax(axis=1) == float32["logits"].argmax(axis=1)
        return {"same first answer": first.astype(np.float64)}
    if isinstance(batch, Batch):
        assert batch.word_masked is not None and batch.words is not None
        said = outputs["probabilities"].argmax(axis=-1) == batch.words.numpy()
        return {"hidden words right": said[batch.word_masked.numpy()].astype(np.float64)}
    return {
        f"{name}, difference from float32": np.abs(values.astype(np.float64) - float32[name])
        for name, values in outputs.items()
    }


def held_out(
    run: Run, mode: OnnxMode, split: str, samples: int, bad: list[BadSample]
) -> Iterator[Batch | TaskBatch]:
    """Batches that have the mode's inputs, whole pictures and fixed masks."""
    if isinstance(run, TaskRun):
        stream = held_out_stream(run.config, run.task, run.text, split)
        yield from batches_of(stream, visits_of(stream, samples), BATCH, bad)
        return
    streams = held_out_streams(run.config, run.text, split)
    need_streams(dict(streams), run.config.data, split)
    usable = ["pair"] + (["text"] if mode.inputs == WORDS else [])
    usable += ["image"] if mode.inputs == ("pixels",) else []
    name = next((one for one in usable if one in streams), None)
    if name is None:
        raise InputError(
            f"{', '.join(run.config.data)}: no {split} split of {' or '.join(usable)} records to "
            "measure int8 on; name a folder that has one with --data"
        )
    yield from batches_of(streams[name], visits_of(streams[name], samples), BATCH, bad)
