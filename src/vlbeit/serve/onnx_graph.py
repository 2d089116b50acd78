"""What `vlbeit export onnx` can write: a table of modes, and a mode of a run as an ONNX graph.

A graph answers as the Predictor's method of its mode does, from the same functions. Its inputs:

    words       (B, W) int64, [T_CLS] first and [T_SEP] last; whatever at padding
    word_valid  (B, W) bool, False at padding
    pixels      (B, 3, height, width) uint8 RGB; of two pictures `left` and `right`

Batch and text length are free, height and width are fixed: the position table of another size is
resampled when the graph is made, not each time it is asked.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from vlbeit.data.collate import pad_words
from vlbeit.draws import Draws
from vlbeit.errors import ConfigError
from vlbeit.eval.downstream import TaskRun
from vlbeit.eval.evaluate import LoadedRun
from vlbeit.eval.fill import word_probabilities
from vlbeit.eval.vectors import image_vectors, pair_vectors, text_vectors
from vlbeit.nn.model import VLBeit
from vlbeit.nn.transfer import transfer
from vlbeit.tasks.classification import Classification
from vlbeit.tasks.entailment import CLASSES as CLASSES_OF_ENTAILMENT
from vlbeit.tasks.entailment import Entailment
from vlbeit.tasks.retrieval import Retrieval, RetrievalHead, encode_images, encode_texts, fuse
from vlbeit.tasks.statements import Statements
from vlbeit.tasks.vqa import Vqa
from vlbeit.tokens.text import SPECIALS, TextTokenizer
from vlbeit.types import Batch, TaskBatch

Run: TypeAlias = LoadedRun | TaskRun
Inputs: TypeAlias = Mapping[str, Tensor]

WORDS = ("words", "word_valid")
TRACED = (2, 8)
"""Samples and words of the example that is traced. A check asks at other shapes."""
FEWEST_WORDS = 3
"""[T_CLS], a word, [T_SEP]: an empty text is refused before a model sees it."""
MAX_BATCH = 65_536
MAX_PATCHES = 4096
"""1,024 x 1,024 pixels in patches of 16. The check asks five samples at a time, and onnxruntime
holds all their attention scores."""


@dataclass(frozen=True, kw_only=True)
class OnnxMode:
    """One kind of graph."""

    method: str
    """The Predictor's method that says the same; a run has the mode if it has the method."""
    help: str
    inputs: tuple[str, ...]
    outputs: Mapping[str, str]
    """Name: shape and meaning."""
    ask: Callable[[Run, Inputs], tuple[Tensor, ...]]
    """The outputs in their order, by torch."""

    @property
    def pictures(self) -> tuple[str, ...]:
        return tuple(name for name in self.inputs if name not in WORDS)


def ask_vqa(run: Run, given: Inputs) -> tuple[Tensor, ...]:
    logits = task_logits(run, given)
    return logits, logits.sigmoid()


def ask_classes(run: Run, given: Inputs) -> tuple[Tensor, ...]:
    logits = task_logits(run, given)
    return logits, logits.softmax(dim=-1)


def task_logits(run: Run, given: Inputs) -> Tensor:
    """(B, classes) float32: what the run's task says."""
    assert isinstance(run, TaskRun)
    logits: Tensor = run.task.logits(run.model, run.head, batch_of(run, given))  # type: ignore[attr-defined]
    return logits


def batch_of(run: TaskRun, given: Inputs) -> TaskBatch:
    """The inputs as the task's batch, without targets."""
    pictures = [given[name] for name in given if name not in WORDS]
    return TaskBatch(
        stream=run.task.stream,
        sample_ids=(),  # nobody asks for names here
        pixels=torch.stack(pictures, dim=1),
        words=given.get("words"),
        word_valid=given.get("word_valid"),
        targets={},
    )


def ask_match(run: Run, given: Inputs) -> tuple[Tensor, ...]:
    assert isinstance(run, TaskRun) and isinstance(run.head, RetrievalHead)
    words, valid, pixels = (given[name] for name in (*WORDS, "pixels"))
    images = encode_images(run.model, run.head, pixels)
    texts = encode_texts(run.model, run.head, words, valid)
    similar = (images * texts).sum(dim=1)
    if run.head.matching is None:
        return (similar,)
    logits = run.head.match(fuse(run.model, words, valid, pixels))
    return similar, logits.softmax(dim=-1)[:, 1]


def ask_fill(run: Run, given: Inputs) -> tuple[Tensor, ...]:
    assert isinstance(run, LoadedRun)
    words, valid = (given[name] for name in WORDS)
    if "pixels" in given:
        states = run.model.embed_pair(words, valid, given["pixels"])
    else:
        states = run.model.embed_text(words, valid)
    vectors = run.model.backbone(states)[:, : words.shape[1]]
    return (word_probabilities(run, run.model.heads["mlm"](vectors).float()),)


VECTOR = {"vector": "(B, D) float32, not scaled to length 1"}
CLASSES = {
    "logits": "(B, N) float32, one for each of labels.json",
    "probabilities": "(B, N) float32, which add up to 1",
}
ANSWERS = {**CLASSES, "probabilities": "(B, N) float32 in [0, 1], each for itself"}
FILLED = {"probabilities": "(B, W, V) float32: of every piece of the vocabulary, at every word"}
MATCHED = {
    "similarity": "(B,) float32, cosine of the dual encoder",
    "probability": "(B,) float32, that they belong together, by the fused pass",
}

MODES: dict[str, OnnxMode] = {
    "image": OnnxMode(
        method="encode_image",
        help="a picture's vector",
        inputs=("pixels",),
        outputs=VECTOR,
        ask=lambda run, given: (image_vectors(run, given["pixels"]),),
    ),
    "text": OnnxMode(
        method="encode_text",
        help="a text's vector",
        inputs=WORDS,
        outputs=VECTOR,
        ask=lambda run, given: (text_vectors(run, given["words"], given["word_valid"]),),
    ),
    "pair": OnnxMode(
        method="encode_pair",
        help="the vector of a picture with its text",
        inputs=(*WORDS, "pixels"),
        outputs=VECTOR,
        ask=lambda run, given: (
            pair_vectors(run, given["words"], given["word_valid"], given["pixels"]),
        ),
    ),
    "fill": OnnxMode(
        method="fill_words",
        help="what stands at each [MASK] of a picture's text",
        inputs=(*WORDS, "pixels"),
        outputs=FILLED,
        ask=ask_fill,
    ),
    "fill-text": OnnxMode(
        method="fill_words",
        help="what stands at each [MASK] of a text without a picture",
        inputs=WORDS,
        outputs=FILLED,
        ask=ask_fill,
    ),
    "vqa": OnnxMode(
        method="answer",
        help="answers to a question about a picture",
        inputs=(*WORDS, "pixels"),
        outputs=ANSWERS,
        ask=ask_vqa,
    ),
    "classify": OnnxMode(
        method="classify",
        help="the class of a picture",
        inputs=("pixels",),
        outputs=CLASSES,
        ask=ask_classes,
    ),
    "compare": OnnxMode(
        method="compare",
        help="whether a statement about two pictures is true",
        inputs=(*WORDS, "left", "right"),
        outputs=CLASSES,
        ask=ask_classes,
    ),
    "entail": OnnxMode(
        method="entail",
        help="whether a picture entails a sentence",
        inputs=(*WORDS, "pixels"),
        outputs=CLASSES,
        ask=ask_classes,
    ),
    "match": OnnxMode(
        method="match",
        help="whether a picture and a text belong together",
        inputs=(*WORDS, "pixels"),
        outputs=MATCHED,
        ask=ask_match,
    ),
}
"""By the word after --mode. Segmentation is not here: it works by windows of a picture's own size,
which a graph of a fixed size does not have."""


def outputs_of(mode: OnnxMode, run: Run) -> dict[str, str]:
    """The outputs that this run has: without matching, `match` has no probability."""
    found = dict(mode.outputs)
    if isinstance(run, TaskRun) and isinstance(run.task, Retrieval):
        assert isinstance(run.head, RetrievalHead)
        if run.head.matching is None:
            found.pop("probability", None)
    return found


def at_size(run: Run, size: tuple[int, int]) -> Run:
    """The same run for pictures of another size, its position tables resampled once and for all.

    Raises:
        ConfigError: a side that is no multiple of the patch, or more than `MAX_PATCHES`.
    """
    config = run.config.model
    if size == config.image_size:
        return run
    for side in size:
        if side < 1 or side % config.patch:
            raise ConfigError(
                f"--image-size {size[0]} {size[1]}: a side is a multiple of the patch, "
                f"{config.patch}; the run's own size is {config.image_size[0]} "
                f"{config.image_size[1]}"
            )
    patches = size[0] * size[1] // config.patch**2
    if patches > MAX_PATCHES:
        raise ConfigError(
            f"--image-size {size[0]} {size[1]}: {patches} patches, and every one looks at every "
            f"other; at most {MAX_PATCHES}"
        )
    model = VLBeit(replace(config, image_size=size), seed=None)
    if isinstance(run, TaskRun):
        # The head has no part that knows the size; `transfer` copies it with the trunk.
        head = run.task.head(model, run.config.seed)
        model.put_on(head)
    grid = run.model.image.native_grid
    transfer(model, run.model.state_dict(), grid, str(run.folder))
    model.eval()
    if isinstance(run, TaskRun):
        task_settings = replace(run.config, model=model.config)
        return replace(run, model=model, head=head, config=task_settings)
    return replace(run, model=model, config=replace(run.config, model=model.config))


def labels_of(run: Run) -> list[str]:
    """The names of a task's logits; none for what has no classes."""
    if isinstance(run, TaskRun):
        task = run.task
        if isinstance(task, Vqa):
            return task.answers
        if isinstance(task, Classification):
            return task.classes
        if isinstance(task, Statements):
            return ["false", "true"]
        if isinstance(task, Entailment):
            return list(CLASSES_OF_ENTAILMENT)
    return []


def batch_inputs(mode: OnnxMode, batch: Batch | TaskBatch) -> dict[str, Tensor]:
    """What a held-out batch gives the mode; of a pretraining batch the text with its [MASK]s where
    the mode fills them, else the text as it is."""
    found: dict[str, Tensor] = {}
    words = batch.words
    if isinstance(batch, Batch) and mode.method == "fill_words":
        words = batch.words_given
    if "words" in mode.inputs:
        assert words is not None and batch.word_valid is not None
        found.update(words=words, word_valid=batch.word_valid)
    for number, name in enumerate(mode.pictures):
        if isinstance(batch, TaskBatch):
            found[name] = batch.image(number)
        else:
            assert batch.pixels is not None
            found[name] = batch.pixels
    return found


class Asked(nn.Module):
    """A mode of a run as a module: tensors in, tensors out."""

    def __init__(self, run: Run, mode: OnnxMode) -> None:
        super().__init__()
        self.model = run.model  # so that the weights are found
        self._run, self._mode = run, mode

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        return self._mode.ask(self._run, dict(zip(self._mode.inputs, given, strict=True)))


def made_inputs(run: Run, mode: OnnxMode, batch: int, words: int, seed: int) -> dict[str, Tensor]:
    """Inputs of random words and pixels, by name; texts of falling length, the first `words` long
    (at least `FEWEST_WORDS`), so that there is padding wherever two of them differ."""
    draws = Draws(seed, "onnx", batch, words)
    found: dict[str, Tensor] = {}
    if "words" in mode.inputs:
        texts = []
        for row in range(batch):
            inner = draws.integers(len(SPECIALS), run.text.size, max(1, words - row - 2))
            texts.append(np.array([TextTokenizer.cls, *inner, TextTokenizer.sep]))
        found.update(zip(WORDS, map(torch.from_numpy, pad_words(texts)), strict=True))
    height, width = run.config.model.image_size
    for name in mode.pictures:
        pixels = draws.integers(0, 256, batch * 3 * height * width).astype(np.uint8)
        found[name] = torch.from_numpy(pixels.reshape(batch, 3, height, width))
    return found


def write_graph(run: Run, mode: OnnxMode, path: Path) -> None:
    """Trace the mode and write it (weights above 2 GB beside it, as ONNX wants it)."""
    samples, longest = TRACED[0], run.config.model.text_positions
    example = made_inputs(run, mode, samples, min(TRACED[1], longest), seed=0)
    batch = Dim("batch", min=1, max=MAX_BATCH)
    words = Dim("text_length", min=FEWEST_WORDS, max=longest)
    shapes = tuple({0: batch, 1: words} if name in WORDS else {0: batch} for name in mode.inputs)
    with torch.no_grad(), quiet():
        # A table that is remembered from call to call must not be remembered from the tracing.
        Asked(run, mode)(*example.values())
        program = torch.onnx.export(
            Asked(run, mode).eval(),
            tuple(example.values()),
            dynamo=True,
            dynamic_shapes=(shapes,),
            input_names=list(mode.inputs),
            output_names=list(outputs_of(mode, run)),
            verbose=False,
        )
        assert program is not None
        program.save(str(path))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's remarks on torchvision, which is not there, and on its own axes."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def largest_difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference, as a share of the largest value where that is over 1; infinite for other
    shapes and where either is no number."""
    if found.shape != wanted.shape or not np.isfinite(found).all() or not np.isfinite(wanted).all():
        return float("inf")
    difference = np.abs(found.astype(np.float64) - wanted).max(initial=0.0)
    return float(difference / max(1.0, np.abs(wanted).max(initial=0.0)))


def torch_outputs(run: Run, mode: OnnxMode, given: Inputs) -> list[np.ndarray]:
    """What torch says, in the order of the outputs."""
    with torch.no_grad():
        return [output.cpu().numpy() for output in mode.ask(run, given)]


def available(run_modes: Sequence[str]) -> list[str]:
    """The modes of a run that has these methods."""
    return [name for name, mode in MODES.items() if mode.method in run_modes]
