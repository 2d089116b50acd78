"""The runs of one server: which of them answers what, and what they say about themselves.

A run given may be pretrained or fine-tuned, or a demo folder, which stands for its pretrained run,
every finished run of its tasks and the index of its held-out scenes. A mode (a method of the
Predictor) is answered by the first run that has it.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlbeit.errors import ConfigError, InputError
from vlbeit.serve.gallery import Gallery, open_gallery
from vlbeit.serve.predictor import Predictor, command_for, load, read_picture
from vlbeit.tasks.classification import Classification
from vlbeit.tasks.retrieval_index import Index
from vlbeit.tasks.segmentation import Segmentation

PRETRAIN_FOLDER, TASKS_FOLDER, SCENES_FOLDER, INDEX_FOLDER = "pretrain", "tasks", "scenes", "index"
"""Of a demo folder."""
THUMBNAIL = 256
"""Pixels of the longer side of a picture of the index."""


@dataclass(frozen=True, kw_only=True)
class ServedRuns:
    """Runs in the order they were given, and the index that is searched."""

    runs: tuple[Predictor, ...]
    index: Index | None = None
    gallery: Gallery | None = None
    """Where the pictures of the index are; None: it is of texts, or they are not there any more."""
    answering: dict[str, Predictor] = field(init=False)
    """Mode to the run that answers it."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("nothing to serve: no run given")
        answering: dict[str, Predictor] = {}
        for run in self.runs:
            for mode in run.modes:
                answering.setdefault(mode, run)
        if self.index is not None:
            answering["search"] = self._searcher(self.index)
        else:
            answering.pop("search", None)
        object.__setattr__(self, "answering", answering)

    def _searcher(self, index: Index) -> Predictor:
        for run in self.runs:
            if run.digest == index.model and "search" in run.modes:
                return run
        raise InputError(
            f"the index was made by the model {index.model[:12]} "
            f"({index.checkpoint or 'folder not known'}), which is none of the runs served: "
            f"{', '.join(run.digest[:12] for run in self.runs)}; serve that run too, or build the "
            "index anew with `vlbeit index`"
        )

    def command(self, mode: str) -> str | None:
        """The command that would add a mode; None if it is there."""
        if mode in self.answering:
            return None
        if mode == "search" and any("search" in run.modes for run in self.runs):
            return "vlbeit index RUN --images DIR --out INDEX; vlbeit serve RUN --index INDEX"
        return command_for(mode)

    def picture_url(self, entry: str) -> str | None:
        """Where an entry of the index can be seen. By number: a client never names a file."""
        if self.gallery is None or self.index is None:
            return None
        return f"/indexed/{self.index.ids.index(entry)}"

    def thumbnail(self, number: int) -> bytes:
        """JPEG of an entry of the index, at most THUMBNAIL pixels a side.

        Raises:
            InputError: no such entry, or its file cannot be read.
        """
        if self.gallery is None or self.index is None or not 0 <= number < len(self.index.ids):
            raise InputError(f"no picture number {number} in the index")
        picture = Image.fromarray(read_picture(self.gallery.read(self.index.ids[number])))
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        file = io.BytesIO()
        picture.save(file, "JPEG")
        return file.getvalue()

    def probe(self) -> bool:
        """Whether a forward pass of two tokens through every run gives finite numbers."""
        for run in self.runs:
            ends = torch.tensor([[run.run.text.cls, run.run.text.sep]], device=run.run.device)
            with torch.inference_mode():
                states = run.model.backbone(run.model.embed_text(ends))
            if not bool(torch.isfinite(states).all()):
                return False
        return True

    def facts(self) -> list[dict[str, Any]]:
        """What /info says of each run. Paths stay inside: a client sees names."""
        return [
            {
                "name": name_of(run),
                "task": run.trained_for,
                "step": run.run.step,
                "digest": run.digest,
                "parameters": sum(p.numel() for p in run.model.parameters()),
            }
            for run in self.runs
        ]

    def mode_facts(self, mode: str) -> dict[str, Any]:
        """What /info says of a mode."""
        run = self.answering.get(mode)
        return {
            "available": run is not None,
            "run": None if run is None else name_of(run),
            "command": self.command(mode),
            "image": None if run is None else picture_facts(run),
        }

    def index_facts(self) -> dict[str, Any] | None:
        """What /info says of the index that is searched."""
        if self.index is None:
            return None
        return {"kind": self.index.kind, "count": len(self.index.ids)}

    def classes(self) -> list[str] | None:
        """Names of what `classify` tells apart, else of what `segment` does."""
        for run in (self.answering.get("classify"), self.answering.get("segment")):
            task = None if run is None else getattr(run.run, "task", None)
            if isinstance(task, Classification | Segmentation):
                return list(task.classes)
        return None


def open_runs(
    places: Sequence[str],
    index: str | None = None,
    device: str = "auto",
    log: Callable[[str], None] = print,
) -> ServedRuns:
    """Load every run of the places, and the index.

    Args:
        index: a folder written by `vlbeit index`; None: that of the first demo folder which has
            one.
        log: is told of damaged checkpoints, and of a demo's unfinished tasks and outdated index,
            which are left out.

    Raises:
        InputError: a place holds no run, or the index fits none of them.
    """
    runs: list[Predictor] = []
    for place in places:
        parts = demo_runs(Path(place))
        if not parts:
            runs.append(load(place, device, log))
            continue
        for part in parts:
            run = load(part, device, log)
            last = run.run.config.max_steps
            if part.parent.name == TASKS_FOLDER and run.run.step < last:
                log(f"{part}: at step {run.run.step} of {last}, not finished: left out")
            else:
                runs.append(run)
    made = demo_index(places, runs, log) if index is None else Index.load(index)
    if made is None:
        return ServedRuns(runs=tuple(runs))
    gallery = pictures_of(made, index or made.place, log)
    return ServedRuns(runs=tuple(runs), index=made, gallery=gallery)


def demo_index(
    places: Sequence[str], runs: Sequence[Predictor], log: Callable[[str], None]
) -> Index | None:
    """The index of the first demo folder that has one, with the scenes of that folder, wherever it
    has been moved to; None: there is none, or its model is not served."""
    for place in places:
        folder = Path(place) / INDEX_FOLDER
        if not demo_runs(Path(place)) or not folder.is_dir():
            continue
        made = Index.load(folder)
        if any(run.digest == made.model for run in runs):
            return replace(made, place=str(Path(place) / SCENES_FOLDER))
        log(f"{folder}: made by a model that is not served ({made.model[:12]}): left out")
    return None


def pictures_of(index: Index, place: str, log: Callable[[str], None]) -> Gallery | None:
    """The pictures that an index was made of, if they are still where they were."""
    if index.kind != "image":
        return None
    try:
        return open_gallery(index.kind, index.place, index.split)
    except InputError as error:
        log(f"{place}: found pictures are named and not shown: {error}")
        return None


def demo_runs(place: Path) -> list[Path]:
    """Run folders of a demo folder that hold a checkpoint, the pretrained one first; none: it is
    not a demo folder."""
    if not (place / PRETRAIN_FOLDER / "checkpoints").is_dir():
        return []
    tasks = sorted((place / TASKS_FOLDER).glob("*/checkpoints"))
    begun = [folder.parent for folder in tasks if any(folder.glob("step-*"))]
    return [place / PRETRAIN_FOLDER, *begun]


def name_of(run: Predictor) -> str:
    """The run folder's own name, or NAMESPACE/NAME of the repository that it was fetched from."""
    folder = run.run.folder
    if folder.parent.name == "snapshots":  # in the cache: models--NAMESPACE--NAME/snapshots/COMMIT
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    return (folder.parent.parent if folder.parent.name == "checkpoints" else folder).name


def picture_facts(run: Predictor) -> dict[str, Any]:
    """The size a run sees pictures at, (height, width) in pixels, its grid of patches, and the
    layers that read them."""
    model = run.run.config.model
    height, width = model.image_size
    return {
        "size": [height, width],
        "patch": model.patch,
        "grid": [height // model.patch, width // model.patch],
        "layers": model.layers,
    }
