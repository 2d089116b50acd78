"""An exported graph in onnxruntime: asked, checked against torch, timed, and made int8."""

import contextlib
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic
from torch import Tensor

from vlbeit.errors import SaveError
from vlbeit.serve.onnx_graph import (
    FEWEST_WORDS,
    OnnxMode,
    Run,
    largest_difference,
    made_inputs,
    outputs_of,
    torch_outputs,
)

LIMIT = 1e-4
"""Largest difference from torch, as a share of the largest value where that is over 1."""
REPORT = (
    "Nothing was written; please report it with the versions of torch, onnx, onnxscript and "
    "onnxruntime (pip list)"
)
CHECKED_BATCHES = (1, 3, 5)
"""None of them is the batch that was traced."""
TIMED_BATCHES = (1, 16)
TIMED_WORDS = 16
TIMES = 15


class Graph:
    """A file ready to be asked, on the CPU, with as many threads as torch has."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors; warnings tell of its own optimisations
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self.inputs: list[str] = [one.name for one in self._session.get_inputs()]

    def __call__(self, given: Mapping[str, Tensor]) -> list[np.ndarray]:
        """The outputs, in their order."""
        feed = {name: given[name].cpu().numpy() for name in self.inputs}
        outputs: list[np.ndarray] = self._session.run(None, feed)
        return outputs


class Checked(NamedTuple):
    """How far a graph is from torch."""

    difference: float
    """The largest, as `largest_difference` has it."""
    shapes: list[tuple[int, int]]
    """Samples and words (0: no text) of each question."""


def check_graph(path: Path, graph: Graph, asked: Run, mode: OnnxMode, made: Run) -> Checked:
    """Ask the graph and torch the same, at shapes that were not traced.

    Args:
        path: named in messages.
        asked: the run as it is; it interpolates positions by itself.
        made: the run that was traced, of the graph's picture size.

    Raises:
        SaveError: an output further from torch than `LIMIT`, or a shape that the graph refuses.
    """
    longest = made.config.model.text_positions
    widths = [FEWEST_WORDS, longest, max(FEWEST_WORDS, longest // 2)]
    if "words" not in mode.inputs:
        widths = [0] * len(widths)
    shapes = list(zip(CHECKED_BATCHES, widths, strict=True))
    worst = 0.0
    for seed, (batch, words) in enumerate(shapes, 1):
        given = made_inputs(made, mode, batch, words, seed)
        here = f"for {batch} samples" + f" of {words} words" * bool(words)
        try:
            said = graph(given)
        except Exception as error:  # onnxruntime has a class of its own for each of its codes
            raise SaveError(f"{path}: not kept: it fails {here} ({error}). {REPORT}") from None
        answers = zip(said, torch_outputs(asked, mode, given), strict=True)
        for name, (found, wanted) in zip(outputs_of(mode, asked), answers, strict=True):
            difference = largest_difference(found, wanted)
            if not difference <= LIMIT:
                raise SaveError(
                    f"{path}: not kept: its output {name!r} differs from torch by {difference:.1e} "
                    f"(limit {LIMIT:.0e}) {here}. {REPORT}"
                )
            worst = max(worst, difference)
    return Checked(worst, shapes)


def quantise(path: Path, out: Path) -> None:
    """Weights of products as int8 with one scale a column, activations as 8 bits when it is asked
    (onnxruntime's dynamic quantisation). `path` is below 2 GiB, one file."""
    # A weight that several products share is transposed once, by a node; only what is folded into
    # the file is seen as a weight.
    folded = out.with_name(out.name + ".folded")
    try:
        quant_pre_process(str(path), str(folded), skip_onnx_shape=True, skip_symbolic_shape=True)
        with quiet_root():
            quantize_dynamic(str(folded), str(out), per_channel=True, weight_type=QuantType.QInt8)
    finally:
        folded.unlink(missing_ok=True)


@contextlib.contextmanager
def quiet_root() -> Iterator[None]:
    """Without the quantiser's advice, on the root logger, to do first what was done."""
    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def milliseconds(
    ask: Callable[[Mapping[str, Tensor]], object], given: Mapping[str, Tensor]
) -> float:
    """The median time of a question, after one that is not counted."""
    ask(given)
    taken = []
    for _ in range(TIMES):
        start = time.perf_counter()
        ask(given)
        taken.append(time.perf_counter() - start)
    return 1000 * statistics.median(taken)


def timed(run: Run, mode: OnnxMode, graphs: Mapping[str, Graph]) -> dict[str, dict[str, float]]:
    """{"16 samples": {"torch": ms, "float32": ms, ...}, ...}; texts of up to `TIMED_WORDS`."""
    words = min(TIMED_WORDS, run.config.model.text_positions)
    asks: dict[str, Callable[[Mapping[str, Tensor]], Sequence[np.ndarray]]] = {
        "torch": lambda given: torch_outputs(run, mode, given),
        **graphs,
    }
    found = {}
    for batch in TIMED_BATCHES:
        given = made_inputs(run, mode, batch, words, 0)
        name = f"{batch} sample{'s' * (batch > 1)}"
        found[name] = {kind: round(milliseconds(ask, given), 3) for kind, ask in asks.items()}
    return found
