"""Image classification: vision path, mean of patch vectors, LayerNorm, Linear (docs/paper.md 5).

Records: an image and json {"label": 3, "class": "tench"}; `facts.classes` of dataset.json names
the classes. Figures: top-1 and top-5, beside the class that training shows most.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlbeit.config import ClassificationConfig, ClassificationRun, FinetuneConfig
from vlbeit.data.records import BadSample, Record, RecordSource
from vlbeit.data.task_stream import Example, Items, Pictures, facts_of, read_field
from vlbeit.draws import Draws
from vlbeit.errors import ConfigError, InputError
from vlbeit.nn.model import VLBeit
from vlbeit.nn.weights import initialise
from vlbeit.tasks import Figure, Path
from vlbeit.types import Score, TaskBatch

FACTS = ("classes", "most_frequent")
"""What `learn_facts` returns."""
TOP = 5


class ClassHead(nn.Module):
    """(B, D), the mean of the patch vectors, to (B, classes) logits."""

    def __init__(self, width: int, classes: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.linear = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.norm(x))
        return out


def learn_facts(config: FinetuneConfig, sources: Sequence[RecordSource]) -> dict[str, Any]:
    """{"classes": names in the order of the labels, "most_frequent": label}.

    Raises:
        InputError: no class names, or a label without one.
    """
    classes = facts_of(config.data, "classes")
    if not classes:
        raise InputError(
            f"{', '.join(config.data)}: dataset.json has no facts.classes, the names of the "
            "classes in the order of their labels; prepare the folder again"
        )
    counts: Counter[int] = Counter()
    for source in sources:
        for index in range(len(source)):
            try:
                counts[read_field(source.read(index, only=("json",)), "label", int)] += 1
            except BadSample:
                continue  # named and counted when the loader meets it
    beyond = [label for label in counts if not 0 <= label < len(classes)]
    if beyond:
        raise InputError(
            f"label {beyond[0]} of source(s) {', '.join(s.name for s in sources)} is none of the "
            f"{len(classes)} classes (0 to {len(classes) - 1}) that dataset.json names"
        )
    most = min(counts, key=lambda label: (-counts[label], label)) if counts else 0
    return {"classes": classes, "most_frequent": most}


def build(config: FinetuneConfig, facts: dict[str, Any]) -> "Classification":
    """Raises ConfigError for settings out of range."""
    assert isinstance(config, ClassificationRun)
    return Classification(config, facts)


class Classification:
    """The task; holds no tensor."""

    stream = "task:classification"
    weights: Mapping[str, float] = {"classification": 1.0}
    paths: tuple[Path, ...] = ("image",)

    def __init__(self, config: ClassificationRun, facts: dict[str, Any]) -> None:
        self.settings: ClassificationConfig = config.classification
        check(self.settings)
        self.facts = facts
        self.classes: list[str] = facts["classes"]
        self._seed = config.seed

    # ---- data

    def items(self, source: RecordSource, training: bool) -> Items:
        return Items.one_each(source)

    def example(
        self, source: RecordSource, record: int, number: int, pictures: Pictures, draws: Draws
    ) -> Example:
        """Targets: `classes` (classes,) float32, which add up to 1, and `label`."""
        pixels, label = self._read(source, record, pictures, draws)
        target = self._smooth(label)
        if pictures.training and self.settings.mixup + self.settings.cutmix > 0:
            # The partner is drawn by the sample, not found beside it in the micro-batch: so
            # neither ranks nor the size of micro-batches change what is learned.
            partner = draws.integer(0, len(source))
            other, other_label = self._read(source, partner, pictures, draws)
            pixels, share = mixed(pixels, other, self.settings, draws)
            target = share * target + (1 - share) * self._smooth(other_label)
        return Example(
            pixels=pixels[None],
            targets={"classes": target.astype(np.float32), "label": np.array(label)},
        )

    def _read(
        self, source: RecordSource, index: int, pictures: Pictures, draws: Draws
    ) -> tuple[np.ndarray, int]:
        record = source.read(index)
        pixels = pictures.pixels(record.image(), draws)
        if pictures.training:
            pixels = erased(pixels, draws, self.settings.erase)
        return pixels, self._label(record)

    def _label(self, record: Record) -> int:
        label: int = read_field(record, "label", int)
        if not 0 <= label < len(self.classes):
            detail = f'"label" is {label}; the classes are 0 to {len(self.classes) - 1}'
            raise BadSample(record.shard, f"{record.key}.json", "bad_label", detail)
        return label

    def _smooth(self, label: int) -> np.ndarray:
        """(classes,): 1 - smoothing at the label, the rest over all classes (timm, BEiT)."""
        rest = self.settings.label_smoothing
        target = np.full(len(self.classes), rest / len(self.classes))
        target[label] += 1 - rest
        return target

    def about(self, record: Record, number: int) -> dict[str, Any]:
        return {"label": self._label(record)}

    # ---- model

    def head(self, model: VLBeit, seed: int) -> ClassHead:
        head = ClassHead(model.config.width, len(self.classes), model.config.norm_eps)
        initialise(head, seed, model.config.init_std)
        with torch.no_grad():
            # BEiT's init_scale: the fresh head begins with nearly equal logits.
            head.linear.weight.mul_(0.001)
        return head

    def frozen(self, name: str) -> bool:
        """The final norm is not used (BEiT: the head's own norm follows the mean); in a linear
        probe the whole trunk stays as it is."""
        return name.startswith("backbone.norm.") or self.settings.probe

    def count(self, batch: TaskBatch) -> dict[str, int]:
        return {"classification": len(batch)}

    def logits(self, model: VLBeit, head: nn.Module, batch: TaskBatch) -> Tensor:
        """(B, classes) float32."""
        logits: Tensor = head(self.features(model, batch.image(), batch.draws()))
        return logits.float()

    def features(self, model: VLBeit, pixels: Tensor, draws: Tensor | None = None) -> Tensor:
        """(B, D): the mean of the patch vectors before the final norm, which the head reads."""
        states = model.embed_image(pixels, depth_draws=draws)
        x = model.backbone.taps(states, [len(model.backbone.blocks)])[0]
        return x[:, 1:].mean(dim=1)

    def score(self, model: VLBeit, head: nn.Module, batch: TaskBatch) -> dict[str, Score]:
        """Cross-entropy with the soft targets; `correct` by the picture's own label."""
        logits = self.logits(model, head, batch)
        loss = -(batch.targets["classes"] * F.log_softmax(logits, dim=-1)).sum()
        right = (logits.detach().argmax(dim=-1) == batch.targets["label"]).sum()
        count = torch.tensor(len(batch), device=logits.device)
        return {"classification": Score(loss_sum=loss, count=count, correct=right)}

    def predict(self, model: VLBeit, head: nn.Module, batch: TaskBatch) -> list[dict[str, Any]]:
        """Rows {"top": labels, most likely first, "probabilities": theirs}."""
        logits = self.logits(model, head, batch)
        found = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        return [
            {"top": labels, "probabilities": shares}
            for labels, shares in zip(
                found.indices[:, :TOP].tolist(), found.values[:, :TOP].tolist(), strict=True
            )
        ]

    def figures(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
        """top1 and top5; the baseline always says what training shows most."""
        guess = [row["label"] == self.facts["most_frequent"] for row in rows]
        found = {"top1": Figure.share([row["top"][0] == row["label"] for row in rows], guess)}
        if len(self.classes) > TOP:
            found["top5"] = Figure.share([row["label"] in row["top"] for row in rows])
        return found


def check(settings: ClassificationConfig) -> None:
    """Raise ConfigError for a setting out of range."""
    for name in ("label_smoothing", "erase"):
        value = getattr(settings, name)
        if not 0 <= value <= 1:
            raise ConfigError(f"classification.{name} must be in [0, 1], found {value}")
    for name in ("mixup", "cutmix"):
        value = getattr(settings, name)
        if not 0 <= value <= 10:
            raise ConfigError(f"classification.{name} must be in [0, 10], found {value}")


def beta(draws: Draws, alpha: float) -> float:
    """One number from Beta(alpha, alpha), by Jöhnk's method; made for alpha up to a few."""
    while True:
        x, y = (math.pow(draws.uniform(), 1 / alpha) for _ in range(2))
        if 0 < x + y <= 1:
            return x / (x + y)


def mixed(
    pixels: np.ndarray, other: np.ndarray, settings: ClassificationConfig, draws: Draws
) -> tuple[np.ndarray, float]:
    """Two (3, height, width) pictures as one, and the share of the first in it.

    mixup (arXiv 1710.09412) adds them, CutMix (1905.04899) puts a rectangle of the second into the
    first; with both on, each picture draws one of the two. Its share is that of the pixels.
    """
    both = settings.mixup > 0 and settings.cutmix > 0
    cut = draws.uniform() < 0.5 if both else settings.cutmix > 0
    share = beta(draws, settings.cutmix if cut else settings.mixup)
    if not cut:
        blend = share * pixels.astype(np.float64) + (1 - share) * other
        return np.rint(blend).astype(np.uint8), share
    height, width = pixels.shape[1:]
    rows, columns = (round(side * math.sqrt(1 - share)) for side in (height, width))
    # The centre is uniform, so a rectangle may be cut off at the border.
    top, left = (draws.integer(0, side) for side in (height, width))
    y = slice(max(0, top - rows // 2), min(height, top - rows // 2 + rows))
    x = slice(max(0, left - columns // 2), min(width, left - columns // 2 + columns))
    result = pixels.copy()
    result[:, y, x] = other[:, y, x]
    return result, 1 - (y.stop - y.start) * (x.stop - x.start) / (height * width)


def erased(pixels: np.ndarray, draws: Draws, probability: float) -> np.ndarray:
    """Random erasing (arXiv 1708.04896): with this probability a rectangle of 2 % to a third of the
    area is filled with noise. Shapes: (3, height, width) uint8."""
    if probability == 0 or draws.uniform() >= probability:
        return pixels
    height, width = pixels.shape[1:]
    for _ in range(10):
        area = draws.uniform(0.02, 1 / 3) * height * width
        aspect = math.exp(draws.uniform(math.log(0.3), math.log(1 / 0.3)))
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < rows < height and 0 < columns < width:
            top, left = draws.integer(0, height - rows), draws.integer(0, width - columns)
            noise = draws.integers(0, 256, 3 * rows * columns).astype(np.uint8)
            result = pixels.copy()
            result[:, top : top + rows, left : left + columns] = noise.reshape(3, rows, columns)
            return result
    return pixels
