"""A run ready to be asked, pretrained or fine-tuned: `vlbeit.load`.

    run = vlbeit.load("runs/tiny-vqa")
    run.answer("dog.jpg", "what colour is the dog?")       # [Answer(name="brown", ...), ...]
    run.answer("dog.jpg", ["what is this?", "how many?"])  # a list for each
    run = vlbeit.load("NAMESPACE/NAME")                    # one that was uploaded to the hub

A picture is a path, encoded bytes, a PIL image or an array (H, W, 3), (H, W, 4) or (H, W) uint8.
Where a list is given for a picture or a text, a list comes back; a single one beside it goes with
all. Pictures and texts pass the same functions as in `vlbeit eval`, so the answers are the same.

What a run can do depends on what it was trained for. To add a task: its methods in MODES, and each
of these methods, which begins with `self._task("NAME", "METHOD")`.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar, overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlbeit.checkpoint import find_checkpoint
from vlbeit.convert.folder import RECEIPT
from vlbeit.data.collate import pad_words
from vlbeit.data.streams import encode_text
from vlbeit.data.transforms import (
    BadImage,
    BadText,
    clean_text,
    decode_image,
    plain,
    upright_rgb,
)
from vlbeit.errors import ConfigError, InputError
from vlbeit.eval import fill
from vlbeit.eval.downstream import TaskRun, load_task_run
from vlbeit.eval.evaluate import LoadedRun, load_run
from vlbeit.eval.vectors import image_vectors, pair_vectors, text_vectors
from vlbeit.eval.word_attention import Attended, Layer, word_attention
from vlbeit.hub import is_repository, local_folder
from vlbeit.jsonfile import read_json
from vlbeit.nn.model import VLBeit
from vlbeit.nn.upernet import resize
from vlbeit.tasks.classification import Classification
from vlbeit.tasks.recall import combine
from vlbeit.tasks.retrieval import (
    Retrieval,
    RetrievalHead,
    encode_images,
    encode_texts,
    fuse,
    texts_of,
)
from vlbeit.tasks.retrieval_index import Found, Index
from vlbeit.tasks.segmentation import Segmentation, scaled
from vlbeit.tasks.vqa import Vqa
from vlbeit.types import TaskBatch

PRETRAINING = "pretraining"
PAIRS = ("encode_pair", "attention")
ENCODERS = ("encode_image", "encode_text", *PAIRS)
MODES: dict[str, tuple[str, ...]] = {
    PRETRAINING: ("fill_words", "fill_patches", *ENCODERS),
    "classification": ("classify", "encode_image"),
    "vqa": ("answer", *PAIRS),
    "statements": ("compare", *PAIRS),
    "retrieval": ("match", "index", "search", "rerank", *ENCODERS),
    "entailment": ("entail", *PAIRS),
    "segmentation": ("segment",),
}
"""What a run was trained for, and the methods that ask it: what its training has shaped. (A run of
segmentation has no single vector of a picture; one of questions never saw a picture alone.)"""
BATCH = 32
"""Most samples in one forward pass."""

Picture: TypeAlias = str | Path | bytes | Image.Image | np.ndarray
Many: TypeAlias = list[Any] | tuple[Any, ...]
"""Several pictures or texts."""
T = TypeVar("T")


class Answer(NamedTuple):
    """One candidate. Of a class the probabilities of all add up to 1; of an answer to a question
    each stands for itself."""

    name: str
    probability: float


class Verdict(NamedTuple):
    """Whether a statement is true."""

    true: bool
    probability: float
    """That it is true."""


class Relation(NamedTuple):
    """Whether a picture entails a sentence: three probabilities that add up to 1."""

    entailment: float
    neutral: float
    contradiction: float

    @property
    def label(self) -> str:
        """The most probable one."""
        return max(self._asdict().items(), key=lambda item: item[1])[0]


class ClassShare(NamedTuple):
    """What a class has of a picture."""

    name: str
    number: int
    share: float
    """Of the pixels, in (0, 1]."""


class Segmented(NamedTuple):
    """A class for every pixel."""

    classes: np.ndarray
    """(H, W) uint8, the picture's own size: numbers of classes."""
    names: tuple[str, ...]
    """Of all classes, by number."""
    shares: list[ClassShare]
    """The classes that occur, the largest first."""


class Match(NamedTuple):
    """Whether a picture and a text belong together."""

    similarity: float
    """Cosine of the dual encoder, in [-1, 1]."""
    probability: float | None
    """By the fused pass; None for a run without matching."""


def command_for(method: str) -> str:
    """The command that makes a run with this method, one of those in MODES."""
    task = next(task for task, methods in MODES.items() if method in methods)
    if task == PRETRAINING:
        return "vlbeit pretrain RECIPE --data DIR --run-dir NEW"
    return f"vlbeit finetune {task} --start RUN --data DIR --run-dir NEW"


def lacking_of(run: LoadedRun) -> tuple[str, ...]:
    """The methods of a pretrained run that its training has not shaped.

    A run without a visual tokenizer was trained on words only, but for a converted one: there the
    receipt says which tensors stand as they were initialised.
    """
    receipt = run.folder / RECEIPT
    if not receipt.is_file():
        return () if run.visual is not None else ("fill_patches", "encode_image", *PAIRS)
    tensors = read_json(receipt)["tensors"]
    fresh = [entry["target"] for entry in tensors if entry["action"] == "initialised"]

    def stands(*parts: str) -> bool:
        return any(part in f".{name}" for name in fresh for part in parts)

    picture = stands(".image.cls", ".image.proj", ".image.positions", ".experts.v.")
    words = stands(".text.", ".experts.l.")
    lacking = {
        "fill_words": words or stands(".heads.mlm."),
        "fill_patches": run.visual is None or stands(".image.masked_patch", ".heads.mim."),
        "encode_image": picture,
        "encode_text": words,
        **dict.fromkeys(PAIRS, picture or words or stands(".experts.vl.")),
    }
    return tuple(method for method, lacks in lacking.items() if lacks)


def load(
    place: str | Path,
    device: str = "auto",
    log: Callable[[str], None] = warnings.warn,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> "Predictor":
    """A run folder's newest good checkpoint, a checkpoint, or a run that was uploaded.

    Args:
        place: a folder, or NAMESPACE/NAME of a hub repository if nothing here has that name.
        device: "cpu", "cuda", or "auto": CUDA if there is one.
        log: is told of damaged checkpoints that were passed over.
        revision, token, cache_dir, local_files_only: of a repository; see `hub.local_folder`.

    Raises:
        InputError: there is no checkpoint, it is damaged, or the repository cannot be reached.
    """
    if is_repository(str(place)) and not Path(place).exists():
        place = local_folder(
            place,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    checkpoint = find_checkpoint(place, log)
    run: LoadedRun | TaskRun
    if "task" in checkpoint.config:
        run = load_task_run(checkpoint, device)
    else:
        run = load_run(checkpoint.folder, device, log)
    return Predictor(run, checkpoint.manifest["files"]["model.safetensors"]["sha256"])


class Predictor:
    """A run with a method for each thing that it was trained to do."""

    def __init__(self, run: LoadedRun | TaskRun, digest: str) -> None:
        """
        Args:
            digest: of the weights; an index of vectors keeps it.
        """
        self.run = run
        self.digest = digest

    @property
    def model(self) -> VLBeit:
        """The network, in eval mode, on the run's device."""
        return self.run.model

    @property
    def trained_for(self) -> str:
        """ "pretraining" or the name of the task."""
        return self.run.config.task if isinstance(self.run, TaskRun) else PRETRAINING

    @cached_property
    def modes(self) -> tuple[str, ...]:
        """The methods that this run can answer; every question asks, and the receipt is a file."""
        lacking: tuple[str, ...] = ()
        if isinstance(self.run, LoadedRun):
            lacking = lacking_of(self.run)
        elif isinstance(self.run.head, RetrievalHead) and self.run.head.matching is None:
            lacking = ("rerank", *PAIRS)  # never saw a pair in one pass
        found = MODES.get(self.trained_for, ())
        return tuple(method for method in found if method not in lacking)

    def __repr__(self) -> str:
        said = ", ".join(self.modes) or "nothing yet"
        return f"<vlbeit run {self.run.folder}: {self.trained_for} ({said})>"

    # ---- vectors and attention

    @overload
    def encode_image(self, images: Many, *, normalised: bool = True) -> np.ndarray: ...
    @overload
    def encode_image(self, images: Picture, *, normalised: bool = True) -> np.ndarray: ...

    def encode_image(self, images: Any, *, normalised: bool = True) -> np.ndarray:
        """(D,) float32 of a picture, (N, D) of a list; `vlbeit.eval.vectors` says which vector.

        Args:
            normalised: scaled to length 1. For a retrieval run the vectors are then those of
                `index`, and their products are the cosines of `match`.
        """
        self._check_mode("encode_image")
        run = self.run

        def encoded(rows: list[tuple[Any, ...]]) -> list[np.ndarray]:
            pixels = torch.from_numpy(self._pixels([row[0] for row in rows])).to(run.device)
            return list(on_cpu(image_vectors(run, pixels), normalised))

        return self._stacked((images,), encoded)

    def encode_text(self, texts: str | Many, *, normalised: bool = True) -> np.ndarray:
        """(D,) float32 of a text, (N, D) of a list; otherwise as `encode_image`."""
        self._check_mode("encode_text")
        run = self.run

        def encoded(rows: list[tuple[Any, ...]]) -> list[np.ndarray]:
            words, valid = self._padded([row[0] for row in rows])
            return list(on_cpu(text_vectors(run, words, valid), normalised))

        return self._stacked((texts,), encoded)

    def encode_pair(
        self, image: Picture | Many, text: str | Many, *, normalised: bool = True
    ) -> np.ndarray:
        """(D,) float32 of a picture with its text, (N, D) of lists; otherwise as `encode_image`."""
        self._check_mode("encode_pair")
        run = self.run

        def encoded(rows: list[tuple[Any, ...]]) -> list[np.ndarray]:
            pixels = torch.from_numpy(self._pixels([row[0] for row in rows])).to(run.device)
            words, valid = self._padded([row[1] for row in rows])
            return list(on_cpu(pair_vectors(run, words, valid, pixels), normalised))

        return self._stacked((image, text), encoded)

    @overload
    def attention(self, image: Picture, text: str, layer: Layer = "rollout") -> Attended: ...  # type: ignore[overload-overlap]
    @overload
    def attention(
        self, image: Picture | Many, text: str | Many, layer: Layer = "rollout"
    ) -> list[Attended]: ...

    def attention(self, image: Any, text: Any, layer: Layer = "rollout") -> Any:
        """What of each word's attention goes to each patch, in the fused pass of a pair.

        Averaged over heads, at one layer (1 is the first) or by attention rollout over all of them
        (Abnar & Zuidema 2020, arXiv 2005.00928). The text of a pretrained run may hold [MASK].

        Raises:
            ConfigError: no such layer, or a run that never read pairs.
            InputError: a bad picture, or a text that is empty or too long.
        """
        self._check_mode("attention")
        return self._each(
            (image, text),
            lambda rows: [
                word_attention(self.run, self._ids(said), self._pixels([shown])[0], layer)
                for shown, said in rows
            ],
        )

    # ---- pretraining

    def fill_words(self, text: str, image: Picture | None = None, top: int = 5) -> fill.FilledWords:
        """Candidates for every [MASK] of the text, with a picture or from the text alone.

        Raises:
            ConfigError: the run is fine-tuned.
            InputError: no [MASK], a text that is empty or too long, or a bad picture.
        """
        run = self._pretrained("fill_words")
        self._check_mode("fill_words")
        picture = None if image is None else self._pixels([image])[0]
        try:
            return fill.fill_words(run, text, picture, top)
        except BadText as error:
            raise InputError(f"the text {text[:80]!r}: {error.detail}") from None

    def fill_patches(
        self,
        image: Picture,
        hidden: float | Sequence[int] | np.ndarray = 0.4,
        text: str | None = None,
        seed: int = 0,
    ) -> fill.FilledPatches:
        """The model's codes for hidden patches, with a text or from the rest of the picture alone.

        Args:
            hidden: numbers of patches, row-major; or a bool array (P,) or (rows, columns), True
                where hidden; or a share in (0, 1] of them, in blocks that `seed` chooses.

        Raises:
            ConfigError: the run is fine-tuned, or `hidden` is none of these; names the range.
            InputError: no visual tokenizer, nothing hidden, a bad text or a bad picture.
        """
        run = self._pretrained("fill_patches")
        where = hidden_patches(run, hidden, seed)
        picture = self._pixels([image])[0]
        try:
            return fill.fill_patches(run, picture, where, text)
        except BadText as error:
            raise InputError(f"the text {str(text)[:80]!r}: {error.detail}") from None

    # ---- tasks

    @overload
    def classify(self, images: Picture, top: int = 5) -> list[Answer]: ...
    @overload
    def classify(self, images: Many, top: int = 5) -> list[list[Answer]]: ...

    def classify(self, images: Any, top: int = 5) -> Any:
        """The `top` classes of a picture, or of each of a list, the most probable first."""
        run = self._task("classification", "classify")
        task = run.task
        assert isinstance(task, Classification)
        return self._each(
            (images,),
            lambda rows: ranked(
                task.logits(run.model, run.head, self._batch(rows)).softmax(-1), task.classes, top
            ),
        )

    @overload
    def answer(self, image: Picture, question: str, top: int = 5) -> list[Answer]: ...  # type: ignore[overload-overlap]
    @overload
    def answer(
        self, image: Picture | Many, question: str | Many, top: int = 5
    ) -> list[list[Answer]]: ...

    def answer(self, image: Any, question: Any, top: int = 5) -> Any:
        """The `top` answers to a question about a picture, the most probable first."""
        run = self._task("vqa", "answer")
        task = run.task
        assert isinstance(task, Vqa)
        return self._each(
            (image, question),
            lambda rows: ranked(
                task.logits(run.model, run.head, self._batch(rows, text=1)).sigmoid(),
                task.answers,
                top,
            ),
        )

    @overload
    def compare(self, left: Picture, right: Picture, statement: str) -> Verdict: ...  # type: ignore[overload-overlap]
    @overload
    def compare(
        self, left: Picture | Many, right: Picture | Many, statement: str | Many
    ) -> list[Verdict]: ...

    def compare(self, left: Any, right: Any, statement: Any) -> Any:
        """Whether a statement about two pictures is true."""
        run = self._task("statements", "compare")

        def asked(rows: list[tuple[Any, ...]]) -> list[Verdict]:
            found = run.task.predict(run.model, run.head, self._batch(rows, text=2))
            return [Verdict(row["answer"], row["probability"]) for row in found]

        return self._each((left, right, statement), asked)

    @overload
    def entail(self, image: Picture, sentence: str) -> Relation: ...  # type: ignore[overload-overlap]
    @overload
    def entail(self, image: Picture | Many, sentence: str | Many) -> list[Relation]: ...

    def entail(self, image: Any, sentence: Any) -> Any:
        """Whether a picture entails a sentence, contradicts it, or leaves it open."""
        run = self._task("entailment", "entail")

        def asked(rows: list[tuple[Any, ...]]) -> list[Relation]:
            found = run.task.predict(run.model, run.head, self._batch(rows, text=1))
            return [Relation(*row["probabilities"]) for row in found]

        return self._each((image, sentence), asked)

    @overload
    def segment(self, images: Picture) -> Segmented: ...
    @overload
    def segment(self, images: Many) -> list[Segmented]: ...

    def segment(self, images: Any) -> Any:
        """The class of every pixel of a picture, or of each of a list, one after the other: whole
        or by windows, as the run's `segmentation.inference` says."""
        run = self._task("segmentation", "segment")
        task = run.task
        assert isinstance(task, Segmentation)

        def segmented(image: Picture) -> Segmented:
            picture = read_picture(image)
            size = scaled(picture.shape[:2], run.config.model.image_size)
            pixels = torch.from_numpy(plain(picture, size))[None].to(run.device)
            shares = task.class_shares(run.model, run.head, pixels, size)[0]
            classes = largest_at(shares, picture.shape[:2]).cpu().numpy()
            counts = np.bincount(classes.ravel(), minlength=len(task.classes))
            order = [int(n) for n in np.argsort(-counts, kind="stable") if counts[n]]
            return Segmented(
                classes,
                tuple(task.classes),
                [ClassShare(task.classes[n], n, float(counts[n] / classes.size)) for n in order],
            )

        return self._each((images,), lambda rows: [segmented(row[0]) for row in rows])

    @overload
    def match(self, image: Picture, text: str) -> Match: ...  # type: ignore[overload-overlap]
    @overload
    def match(self, image: Picture | Many, text: str | Many) -> list[Match]: ...

    def match(self, image: Any, text: Any) -> Any:
        """How well a picture and a text go together, by the dual encoder and by the fused pass."""
        run, head = self._retrieval("match")

        def asked(rows: list[tuple[Any, ...]]) -> list[Match]:
            batch = self._batch(rows, text=1)
            words, valid = texts_of(batch)
            images = encode_images(run.model, head, batch.image())
            texts = encode_texts(run.model, head, words, valid)
            similar = (images * texts).sum(dim=1).tolist()
            if head.matching is None:
                return [Match(value, None) for value in similar]
            logits = head.match(fuse(run.model, words, valid, batch.image()))
            return list(map(Match, similar, logits.softmax(-1)[:, 1].tolist()))

        return self._each((image, text), asked)

    def index(
        self,
        *,
        images: Many | None = None,
        texts: Many | None = None,
        ids: Sequence[str] | None = None,
    ) -> Index:
        """Pictures or texts, encoded once to be searched; `Index.save` keeps them.

        Args:
            ids: a name for each; default: paths and texts themselves, numbers for other pictures.

        Raises:
            ConfigError: both or neither given, none in the list, or ids that do not fit.
        """
        run, head = self._retrieval("index")
        given = images if texts is None else texts
        if not given or (images is not None and texts is not None):
            raise ConfigError("an index is of images or of texts: give one list, not empty")
        if ids is None:
            paths = (str, Path)
            ids = [str(one) if isinstance(one, paths) else str(i) for i, one in enumerate(given)]
        if len(set(ids)) != len(given) or len(ids) != len(given):
            raise ConfigError(f"{len(given)} entries need as many different ids")

        def encoded(rows: list[tuple[Any, ...]]) -> list[Tensor]:
            if texts is None:
                pixels = self._batch(rows).image()
                return list(encode_images(run.model, head, pixels).cpu())
            words, valid = texts_of(self._batch(rows, text=0))
            return list(encode_texts(run.model, head, words, valid).cpu())

        return Index(
            kind="image" if texts is None else "text",
            model=self.digest,
            checkpoint=str(self.run.folder),
            ids=tuple(ids),
            vectors=torch.stack(self._each((list(given),), encoded)),
        )

    def search(
        self, index: Index, *, text: str | None = None, image: Picture | None = None, top: int = 5
    ) -> list[Found]:
        """The nearest of an index of pictures to a text, or of an index of texts to a picture, by
        the dual encoder; `match` looks at a pair more closely.

        Raises:
            ConfigError: a query of the kind that the index holds.
            InputError: the index was made by another model.
        """
        run, head = self._retrieval("search")
        wanted = "text" if index.kind == "image" else "image"
        if (text is None) == (image is None) or (text is None) == (wanted == "text"):
            raise ConfigError(f"an index of {index.kind}s is searched with one {wanted}")
        with torch.no_grad():
            if text is not None:
                words, valid = texts_of(self._batch([(text,)], text=0))
                query = encode_texts(run.model, head, words, valid)
            else:
                query = encode_images(run.model, head, self._batch([(image,)]).image())
        return index.search(query, top, self.digest, str(self.run.folder))[0]

    def rerank(
        self,
        found: Sequence[Found],
        *,
        text: str | None = None,
        image: Picture | None = None,
        read: Callable[[str], Any] = str,
    ) -> list[Found]:
        """What `search` found, in the order of the fused pass: by the run's `retrieval.rule`, the
        cosine plus the matching logit, or that logit alone. One pass for each.

        Args:
            text, image: the query, as for `search`.
            read: the picture or the text that an id stands for; default: paths and texts are their
                own ids.

        Raises:
            ConfigError: not one query, or a run without matching.
        """
        run, head = self._retrieval("rerank")
        assert isinstance(run.task, Retrieval)
        if (text is None) == (image is None):
            raise ConfigError("what was found is reranked for the one text or picture of the query")
        if head.matching is None:
            raise ConfigError(
                f"{self.run.folder} has no matching head (retrieval.matching was 0): nothing can "
                "look again; leave the reranking out"
            )

        def asked(rows: list[tuple[Any, ...]]) -> list[Tensor]:
            batch = self._batch(rows, text=1)
            return list(head.match(fuse(run.model, *texts_of(batch), batch.image())).cpu())

        if not found:
            return []
        others = [read(one.id) for one in found]
        pairs = (others, text) if image is None else (image, others)
        logits = torch.stack(self._each(pairs, asked))  # (N, 2)
        similar = torch.tensor([one.similarity for one in found])
        scores = combine(similar, logits[:, 1], run.task.settings.rule)
        shares = logits.softmax(dim=1)[:, 1].tolist()
        order = scores.sort(descending=True, stable=True).indices.tolist()
        return [found[place]._replace(probability=shares[place]) for place in order]

    # ---- what they share

    def _task(self, task: str, method: str) -> TaskRun:
        if isinstance(self.run, TaskRun) and self.run.config.task == task:
            return self.run
        raise self._lacks(method)

    def _retrieval(self, method: str) -> tuple[TaskRun, RetrievalHead]:
        run = self._task("retrieval", method)
        assert isinstance(run.task, Retrieval) and isinstance(run.head, RetrievalHead)
        return run, run.head

    def _pretrained(self, method: str) -> LoadedRun:
        if isinstance(self.run, LoadedRun):
            return self.run
        raise self._lacks(method)

    def _check_mode(self, method: str) -> None:
        if method not in self.modes:
            raise self._lacks(method)

    def _lacks(self, method: str) -> ConfigError:
        return ConfigError(
            f"{self.run.folder} was trained for {self.trained_for} and has no {method}; it has "
            f"{', '.join(self.modes) or 'none of these methods'}. A run that has it comes from "
            f"`{command_for(method)}`"
        )

    def _stacked(
        self,
        values: tuple[Any, ...],
        ask: Callable[[list[tuple[Any, ...]]], list[np.ndarray]],
    ) -> np.ndarray:
        """`_each` of vectors: (D,), or (N, D) if one of the values is a list."""
        found = self._each(values, ask)
        if isinstance(found, np.ndarray):
            return found
        return np.stack(found) if found else np.zeros((0, self.model.config.width), np.float32)

    def _each(
        self, values: tuple[Any, ...], ask: Callable[[list[tuple[Any, ...]]], list[T]]
    ) -> Any:
        """What `ask` says of every row of the values, BATCH rows at a time: a list if one of them
        is a list, else the one."""
        counts = {len(value) for value in values if isinstance(value, list | tuple)}
        if len(counts) > 1:
            raise ConfigError(
                f"lists of {' and '.join(map(str, sorted(counts)))} do not go together"
            )
        count = counts.pop() if counts else 1
        columns = [v if isinstance(v, list | tuple) else [v] * count for v in values]
        rows = list(zip(*columns, strict=True))
        found: list[T] = []
        with torch.no_grad():
            for start in range(0, count, BATCH):
                found += ask(rows[start : start + BATCH])
        return found if any(isinstance(value, list | tuple) for value in values) else found[0]

    def _batch(self, rows: Sequence[tuple[Any, ...]], text: int | None = None) -> TaskBatch:
        """Rows of pictures and, in the column `text`, a text."""
        run = self.run
        assert isinstance(run, TaskRun)
        columns = [column for column in range(len(rows[0])) if column != text]
        words = valid = pixels = None
        if columns:
            shown = [self._pixels([row[column] for column in columns]) for row in rows]
            pixels = torch.from_numpy(np.stack(shown))
        if text is not None:
            ids = [self._words(row[text], run.config.input.text_length) for row in rows]
            words, valid = map(torch.from_numpy, pad_words(ids))
        return TaskBatch(
            stream=run.task.stream,
            sample_ids=tuple(map(str, range(len(rows)))),
            pixels=pixels,
            words=words,
            word_valid=valid,
            targets={},
        ).to(run.device)

    def _ids(self, text: str) -> np.ndarray:
        """(W,) of a text as the run was trained on it; with [MASK] where a pretrained one reads
        so."""
        if isinstance(self.run, TaskRun):
            return self._words(text, self.run.config.input.text_length)
        if not isinstance(text, str):
            raise ConfigError(f"expected a text, found {type(text).__name__}")
        try:
            ids = fill.masked_ids(self.run, text)
        except BadText as error:
            raise InputError(f"the text {text[:80]!r}: {error.detail}") from None
        if len(ids) == 2:
            raise InputError(f"the text {text[:80]!r}: no token is left after tokenizing")
        return ids

    def _padded(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(B, W) int64 words and (B, W) bool, True at a real one."""
        words, valid = map(torch.from_numpy, pad_words([self._ids(text) for text in texts]))
        return words.to(self.run.device), valid.to(self.run.device)

    def _words(self, text: str, longest: int) -> np.ndarray:
        if not isinstance(text, str):
            raise ConfigError(f"expected a text, found {type(text).__name__}")
        try:
            return encode_text(self.run.text, clean_text(text), longest)
        except BadText as error:
            raise InputError(f"the text {text[:80]!r}: {error.detail}") from None

    def _pixels(self, images: Sequence[Picture]) -> np.ndarray:
        """(N, 3, height, width) uint8 at the model's size: whole and squashed, as in `eval`."""
        size = self.run.config.model.image_size
        return np.stack([plain(read_picture(image), size) for image in images])


def on_cpu(vectors: Tensor, normalised: bool) -> np.ndarray:
    """(B, D) float32."""
    if normalised:
        vectors = F.normalize(vectors, dim=1)
    return vectors.cpu().numpy()


def hidden_patches(
    run: LoadedRun, hidden: float | Sequence[int] | np.ndarray, seed: int
) -> np.ndarray:
    """(P,) bool of what `Predictor.fill_patches` takes.

    Raises:
        ConfigError: a share, a number or a shape out of range.
    """
    rows, columns = fill.grid_of(run)
    if isinstance(hidden, int | float) and not isinstance(hidden, bool):
        if not 0 < hidden <= 1:
            raise ConfigError(f"the share of hidden patches must be in (0, 1], found {hidden}")
        return fill.hide_share(run, hidden, seed)
    given = np.asarray(hidden)
    patches = rows * columns
    if given.dtype == bool:
        if given.shape not in ((patches,), (rows, columns)):
            raise ConfigError(
                f"hidden patches as bools are ({patches},) or ({rows}, {columns}), found "
                f"{given.shape}"
            )
        return given.reshape(-1)
    where = np.zeros(patches, dtype=bool)
    if given.size == 0:
        return where
    if given.ndim != 1 or not np.issubdtype(given.dtype, np.integer):
        raise ConfigError(
            "hidden patches are a share, a list of whole numbers, or bools, found "
            f"{given.dtype} {given.shape}"
        )
    if given.min() < 0 or given.max() >= patches:
        wrong = given.min() if given.min() < 0 else given.max()
        raise ConfigError(
            f"patches have the numbers 0..{patches - 1} ({rows} rows of {columns}), found {wrong}"
        )
    where[given] = True
    return where


def read_picture(given: Picture) -> np.ndarray:
    """(H, W, 3) uint8 RGB.

    Raises:
        InputError: a file that cannot be read, or no picture; names it.
        ConfigError: something of another type.
    """
    name = str(given) if isinstance(given, str | Path) else f"the {type(given).__name__} given"
    try:
        if isinstance(given, str | Path):
            return decode_image(Path(given).read_bytes())
        if isinstance(given, bytes):
            return decode_image(given)
        if isinstance(given, Image.Image):
            return upright_rgb(given)
        if isinstance(given, np.ndarray):
            deep = given.ndim == 3 and given.shape[2] in (3, 4)
            if given.dtype == np.uint8 and given.size and (given.ndim == 2 or deep):
                return upright_rgb(Image.fromarray(given))
            raise ConfigError(
                "an array that is a picture is (H, W, 3), (H, W, 4) or (H, W) uint8, found "
                f"{given.shape} {given.dtype}"
            )
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror or error})") from None
    except BadImage as error:
        raise InputError(f"{name}: {error.reason}: {error.detail}") from None
    raise ConfigError(
        f"expected a picture (a path, bytes, a PIL image, a uint8 array), found "
        f"{type(given).__name__}"
    )


def largest_at(shares: Tensor, size: Sequence[int]) -> Tensor:
    """(height, width) uint8: the class with the largest share at every pixel of another size.

    Class after class, because all of them at the size of a photo would not fit into memory.

    Shapes: shares (classes, h, w), at most 256 classes; size: height, width.
    """
    best = resize(shares[None, :1], size)[0, 0]
    classes = torch.zeros(best.shape, dtype=torch.uint8, device=shares.device)
    for number in range(1, len(shares)):
        own = resize(shares[None, number : number + 1], size)[0, 0]
        classes[own > best] = number
        best = torch.maximum(best, own)
    return classes


def ranked(shares: Tensor, names: Sequence[str], top: int) -> list[list[Answer]]:
    """(B, N) to the `top` names of each row; of equal ones the first in the list."""
    if top < 1:
        raise ConfigError(f"top must be at least 1, found {top}")
    best = shares.sort(dim=-1, descending=True, stable=True)
    return [
        [Answer(names[place], share) for place, share in zip(places, values, strict=True)]
        for places, values in zip(
            best.indices[:, :top].tolist(), best.values[:, :top].tolist(), strict=True
        )
    ]
