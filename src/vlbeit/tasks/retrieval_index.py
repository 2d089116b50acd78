"""A set of images or texts, encoded once, saved, and searched with the vectors of queries.

    index.safetensors   vectors (C, D) float32
    ids.json            what they are vectors of, whose they are, their ids in the same order, and
                        where the checkpoint and what has these ids lay

The vectors are those of one checkpoint's dual encoder. Queries of another one would give numbers
without a meaning, so an index keeps the digest of its model and refuses others.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vlbeit.errors import InputError, SaveError
from vlbeit.tasks.recall import nearest
from vlbeit.tensorfile import read_tensors, write_tensors

FORMAT = "vlbeit-index-1"
VECTORS, IDS = "index.safetensors", "ids.json"

Kind = Literal["image", "text"]


class Found(NamedTuple):
    """One answer to a query."""

    id: str
    similarity: float
    """Cosine, in [-1, 1]."""
    probability: float | None = None
    """That they belong together, by the fused pass; None: it was not asked."""


@dataclass(frozen=True, kw_only=True)
class Index:
    """Vectors of length 1 and whose they are.

    Shapes: vectors (C, D) float32; `ids` C different strings; `model` the digest of the weights.
    """

    kind: Kind
    model: str
    ids: tuple[str, ...]
    vectors: Tensor
    checkpoint: str = ""
    """Folder of the model; empty: not known."""
    place: str = ""
    """Where the pictures or texts are: a folder, a file, a prepared folder; empty: not known."""
    split: str = ""
    """Of a prepared folder."""

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or len(self.vectors) != len(self.ids):
            raise ValueError(f"vectors {tuple(self.vectors.shape)} for {len(self.ids)} ids")
        if len(set(self.ids)) != len(self.ids):
            raise ValueError("an id stands twice in the index")

    def search(self, queries: Tensor, k: int, model: str, asking: str = "") -> list[list[Found]]:
        """The k nearest of every query, best first; of equal ones the one that was added first.

        Shapes: queries (Q, D), of the other kind, made by the weights with the digest `model`.

        Args:
            asking: the folder of these weights, for the message.

        Raises:
            InputError: the queries are of another model or width.
        """
        if model != self.model or queries.shape[1] != self.vectors.shape[1]:
            raise InputError(
                f"the index was made by the model {self.model[:12]} (width "
                f"{self.vectors.shape[1]}; {self.checkpoint or 'folder not known'}), the queries "
                f"by {model[:12]} (width {queries.shape[1]}; {asking or 'folder not known'}); "
                "build the index anew with the model that asks"
            )
        scores, places = nearest(queries.cpu(), self.vectors, k)
        return [
            [Found(self.ids[p], s) for p, s in zip(ps, ss, strict=True)]
            for ps, ss in zip(places.tolist(), scores.tolist(), strict=True)
        ]

    def save(self, folder: Path | str) -> None:
        """Write a new folder; it appears when it is complete.

        Raises:
            SaveError: the folder exists, or cannot be written.
        """
        folder = Path(folder)
        if folder.exists():
            raise SaveError(f"{folder}: exists already; choose another folder or remove it")
        facts: Mapping[str, Any] = {
            "format": FORMAT,
            "kind": self.kind,
            "model": self.model,
            "ids": list(self.ids),
            "checkpoint": self.checkpoint,
            "place": self.place,
            "split": self.split,
        }
        made: Path | None = None
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            made.chmod(0o755)
            write_tensors(made / VECTORS, {"vectors": self.vectors.float()})
            (made / IDS).write_text(json.dumps(facts), encoding="utf-8")
            made.rename(folder)
        except OSError as error:
            if made is not None:
                shutil.rmtree(made, ignore_errors=True)
            raise SaveError(f"{folder}: cannot be written ({error.strerror})") from error

    @staticmethod
    def load(folder: Path | str) -> "Index":
        """The index in a folder.

        Raises:
            InputError: it is not what `save` wrote; file and member are named.
        """
        folder = Path(folder)
        file = folder / IDS
        try:
            facts = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(
                f"{file}: cannot be read ({error.strerror}); expected an index folder"
            ) from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file}: not JSON ({error}); build the index anew") from None
        found = facts.get("format") if isinstance(facts, dict) else type(facts).__name__
        if found != FORMAT:
            raise InputError(f"{file}: format {found!r}, expected {FORMAT!r}; build the index anew")
        kind, model, ids = (facts.get(name) for name in ("kind", "model", "ids"))
        if kind not in ("image", "text") or not isinstance(model, str) or not _strings(ids):
            raise InputError(f"{file}: kind, model or ids is missing or of a wrong type")
        origin = {name: str(facts.get(name, "")) for name in ("checkpoint", "place", "split")}
        tensors = read_tensors(folder / VECTORS)
        vectors = tensors.get("vectors")
        if vectors is None or vectors.dtype != torch.float32:
            raise InputError(f"{folder / VECTORS}: no float32 tensor named vectors")
        try:
            return Index(kind=kind, model=model, ids=tuple(ids), vectors=vectors, **origin)
        except ValueError as error:
            raise InputError(f"{folder}: {error}; build the index anew") from None


def _strings(value: object) -> bool:
    return isinstance(value, Sequence) and all(isinstance(item, str) for item in value)
