"""Semantic segmentation by UPerNet over four taps of the backbone (docs/paper.md 5).

Vision path; taps after a third, half, two thirds and all of the blocks (base: 4, 6, 8, 12).
Records: an image and seg.png, a map of the same size with one class a pixel, 255 = none;
`facts.segmentation_classes` of dataset.json names the classes. Figures: mean IoU, pixel accuracy,
IoU of each class, beside a map that shows training's most frequent class everywhere.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlbeit.config import CropConfig, FinetuneConfig, SegmentationConfig, SegmentationRun
from vlbeit.data.collate import FILL
from vlbeit.data.records import BadSample, Record, RecordSource
from vlbeit.data.task_stream import Example, Items, Pictures, facts_of
from vlbeit.data.transforms import (
    BadImage,
    color_jitter,
    decode_image,
    decode_map,
    flip_horizontal,
    plain,
    resize,
    resize_map,
)
from vlbeit.draws import Draws
from vlbeit.errors import ConfigError, InputError
from vlbeit.nn.model import VLBeit
from vlbeit.nn.upernet import GROUP_CHANNELS, AuxiliaryHead, FeaturePyramid, UperHead
from vlbeit.nn.upernet import resize as interpolate
from vlbeit.nn.weights import initialise
from vlbeit.tasks import Figure, Path
from vlbeit.tasks.segmentation_metrics import IGNORED, confusion_matrix
from vlbeit.tasks.sliding import Inference, class_probabilities, fill_up, to_floats
from vlbeit.types import Score, TaskBatch

FACTS = ("classes", "most_frequent")
"""What `learn_facts` returns."""
GREY = 128
"""What a picture smaller than the crop is filled up with."""
LONGEST = 4.0
"""A picture is made so small that its longer side is at most this many crops (BEiT: 2048 of
512)."""
CROP_TRIES = 10
COUNTED_MAPS = 1_000
"""Training maps, spread evenly, whose pixels say which class is the most frequent."""

assert FILL == IGNORED  # what fills up a batch must not count


class SegmentationHead(nn.Module):
    """Four taps of the backbone to a map of class scores, and the auxiliary head's."""

    def __init__(self, width: int, classes: int, settings: SegmentationConfig) -> None:
        super().__init__()
        self.pyramid = FeaturePyramid(width, settings.norm)
        self.upper = UperHead(width, settings.channels, classes, settings.norm)
        self.auxiliary = (
            AuxiliaryHead(width, settings.auxiliary_channels, classes, settings.norm)
            if settings.auxiliary
            else None
        )

    def forward(
        self, taps: Sequence[Tensor], grid: tuple[int, int], both: bool = True
    ) -> dict[str, Tensor]:
        """{"segmentation": (B, classes, 4 h, 4 w), "auxiliary": (B, classes, h, w)}; the latter
        only if there is such a head and `both` are wanted."""
        levels = self.pyramid(taps, grid)
        found = {"segmentation": self.upper(levels)}
        if both and self.auxiliary is not None:
            found["auxiliary"] = self.auxiliary(levels)
        return found


def learn_facts(config: FinetuneConfig, sources: Sequence[RecordSource]) -> dict[str, Any]:
    """{"classes": names in the order of their numbers, "most_frequent": number, by pixels}; with
    `segmentation.balance` also "class_weights", of each class in the loss.

    Raises:
        InputError: no class names, a number without one, or no pixel with a class.
    """
    classes = facts_of(config.data, "segmentation_classes")
    if not classes:
        raise InputError(
            f"{', '.join(config.data)}: dataset.json has no facts.segmentation_classes, the names "
            "of the classes in the order of their numbers; prepare the folder again"
        )
    counts, shown = np.zeros(256, dtype=np.int64), np.zeros(256, dtype=np.int64)
    for source in sources:
        read = min(len(source), COUNTED_MAPS)
        for index in range(read):
            try:
                record = source.read(index * len(source) // read, only=("seg.png",))
                found = np.bincount(map_of(record).ravel(), minlength=256)
            except (BadSample, BadImage):
                continue  # named and counted when the loader meets it
            counts += found
            shown += (found > 0) * found[:IGNORED].sum()
    beyond = np.flatnonzero(counts[len(classes) : IGNORED])
    if len(beyond):
        raise InputError(
            f"class {len(classes) + int(beyond[0])} in a map of source(s) "
            f"{', '.join(s.name for s in sources)}; dataset.json names {len(classes)} classes (0 "
            f"to {len(classes) - 1}), and {IGNORED} stands for none"
        )
    counts, shown = counts[: len(classes)], shown[: len(classes)]
    if not counts.any():
        raise InputError(
            f"source(s) {', '.join(s.name for s in sources)}: no map that was read has a pixel of "
            f"a class, all are {IGNORED}; prepare the folder again"
        )
    facts: dict[str, Any] = {"classes": classes, "most_frequent": int(counts.argmax())}
    assert isinstance(config, SegmentationRun)
    if config.segmentation.balance:
        facts["class_weights"] = class_weights(counts, shown, config.segmentation.balance).tolist()
    return facts


def class_weights(counts: np.ndarray, shown: np.ndarray, balance: float) -> np.ndarray:
    """(K,) weights of the classes in the loss (SegmentationConfig.balance).

    A class's frequency is its share of the pixels of those maps that show it. One that no map shows
    weighs as much as the rarest that some map does.

    Args:
        counts: (K,) pixels of each class.
        shown: (K,) pixels with a class, of the maps that show this one.
        balance: the power.
    """
    there = counts > 0
    frequency = counts[there] / shown[there]
    weights = np.full(len(counts), frequency.min())
    weights[there] = frequency
    weights = (np.median(frequency) / weights) ** balance
    scaled_up: np.ndarray = weights * (counts.sum() / (counts * weights).sum())
    return scaled_up


def map_of(record: Record) -> np.ndarray:
    """(H, W) uint8.

    Raises:
        BadSample: no_map. BadImage: it cannot be decoded.
    """
    if "seg.png" not in record.members:
        found = ", ".join(record.members) or "nothing"
        raise BadSample(record.shard, record.key, "no_map", f"no seg.png; it has {found}")
    return decode_map(record.members["seg.png"])


def build(config: FinetuneConfig, facts: dict[str, Any]) -> "Segmentation":
    """Raises ConfigError for settings out of range or without effect."""
    assert isinstance(config, SegmentationRun)
    check(config)
    return Segmentation(config, facts)


class Segmentation:
    """The task; holds no tensor."""

    stream = "task:segmentation"
    paths: tuple[Path, ...] = ("image",)
    eval_settings = ("inference", "stride", "scales", "flip")
    """Settings that `vlbeit eval --set` may change."""
    resize = "bicubic, the shorter side that of image_size"

    def __init__(self, config: SegmentationRun, facts: dict[str, Any]) -> None:
        self.settings = config.segmentation
        self.facts = facts
        self.classes: list[str] = facts["classes"]
        self._class_weights: list[float] = facts["class_weights"] if self.settings.balance else []
        self.weights: Mapping[str, float] = {"segmentation": 1.0}
        if self.settings.auxiliary:
            self.weights = {"segmentation": 1.0, "auxiliary": self.settings.auxiliary}
        self._size = config.model.image_size
        self._how = inference(config)

    # ---- data

    def items(self, source: RecordSource, training: bool) -> Items:
        return Items.one_each(source)

    def example(
        self, source: RecordSource, record: int, number: int, pictures: Pictures, draws: Draws
    ) -> Example:
        """Targets: `map` (H, W) uint8, and `sizes` (4,): height and width of the pixels and of the
        map. In training both are a crop; else the picture is resized, the map stays as it is."""
        found = source.read(record)
        image, classes = decode_image(found.image()), map_of(found)
        self._check(found, image, classes)
        if pictures.training:
            image, classes = training_crop(
                image, classes, draws, self._size, self.settings, pictures.config.input.crop
            )
            pixels = np.ascontiguousarray(image.transpose(2, 0, 1))
        else:
            pixels = plain(image, scaled(image.shape[:2], self._size))
        sizes = np.array([*pixels.shape[1:], *classes.shape])
        return Example(pixels=pixels[None], targets={"map": classes, "sizes": sizes})

    def _check(self, record: Record, image: np.ndarray, classes: np.ndarray) -> None:
        member = f"{record.key}.seg.png"
        if classes.shape != image.shape[:2]:
            rows, columns = classes.shape
            detail = (
                f"{rows} x {columns} pixels, its picture has {image.shape[0]} x {image.shape[1]}"
            )
            raise BadSample(record.shard, member, "map_size", detail)
        highest = int(classes[classes != IGNORED].max(initial=0))
        if highest >= len(self.classes):
            detail = (
                f"class {highest}; there are 0 to {len(self.classes) - 1}, and {IGNORED} for none"
            )
            raise BadSample(record.shard, member, "bad_class", detail)

    def about(self, record: Record, number: int) -> dict[str, Any]:
        return {}

    # ---- model

    def head(self, model: VLBeit, seed: int) -> SegmentationHead:
        head = SegmentationHead(model.config.width, len(self.classes), self.settings)
        initialise(head, seed, model.config.init_std)
        return head

    def frozen(self, name: str) -> bool:
        """The taps lie before the final norm."""
        return name.startswith("backbone.norm.")

    def count(self, batch: TaskBatch) -> dict[str, int]:
        counted = int((batch.targets["map"] != IGNORED).sum())
        return dict.fromkeys(self.weights, counted)

    def outputs(
        self,
        model: VLBeit,
        head: nn.Module,
        pixels: Tensor,
        draws: Tensor | None = None,
        both: bool = True,
    ) -> dict[str, Tensor]:
        """The head's maps of scores. Shapes: pixels (B, 3, height, width), multiples of the patch;
        draws (B, 2 * layers)."""
        states = model.embed_image(pixels, depth_draws=draws)
        layers = self.settings.taps or tap_layers(len(model.backbone.blocks))
        taps = model.backbone.taps(states, layers)
        found: dict[str, Tensor] = head(taps, model.image.grid(pixels), both)
        return found

    def score(self, model: VLBeit, head: nn.Module, batch: TaskBatch) -> dict[str, Score]:
        """Cross-entropy at every pixel that counts, the scores brought to the map's size; one pass
        over the whole picture. The mean is over these pixels (mmsegmentation's also counts the
        others); `segmentation.balance` weighs them by class."""
        weights = (
            torch.tensor(self._class_weights, device=batch.targets["map"].device)
            if self._class_weights
            else None
        )
        totals = {name: Score.zero(batch.targets["map"].device) for name in self.weights}
        draws = batch.draws()
        for places, pixels, maps in groups(batch):
            patch, size = model.config.patch, pixels.shape[2:]
            up = [math.ceil(side / patch) * patch for side in size]
            if list(size) != up:
                pixels = fill_up(to_floats(pixels), *up)
            found = self.outputs(model, head, pixels, None if draws is None else draws[places])
            wanted = maps.long().flatten()
            for name, scores in found.items():
                scores = scores.float()
                if list(size) != up:
                    scores = interpolate(scores, up)[..., : size[0], : size[1]]
                rows = interpolate(scores, maps.shape[1:]).permute(0, 2, 3, 1).flatten(0, 2)
                totals[name] = totals[name] + Score.of_logits(rows, wanted, IGNORED, weights)
        return totals

    def predict(self, model: VLBeit, head: nn.Module, batch: TaskBatch) -> list[dict[str, Any]]:
        """Rows {"hits", "having", "named"}, pixels of each class: found rightly, there, named."""
        rows: dict[int, dict[str, Any]] = {}
        for places, pixels, maps in groups(batch):
            named = self.class_shares(model, head, pixels, maps.shape[1:]).argmax(dim=1)
            for place, said, wanted in zip(places, named, maps, strict=True):
                matrix = confusion_matrix(said, wanted, len(self.classes))
                rows[place] = {
                    "hits": matrix.diag().tolist(),
                    "having": matrix.sum(dim=1).tolist(),
                    "named": matrix.sum(dim=0).tolist(),
                }
        return [rows[place] for place in range(len(batch))]

    def class_shares(
        self, model: VLBeit, head: nn.Module, pixels: Tensor, size: Sequence[int]
    ) -> Tensor:
        """(B, classes, *size): the probability of every class at every pixel, as the settings say
        (windows, scales, mirror image). Shapes: pixels (B, 3, height, width), of any size."""

        def scorer(part: Tensor) -> Tensor:
            return self.outputs(model, head, part, both=False)["segmentation"]

        return interpolate(class_probabilities(scorer, pixels, self._how), size)

    def figures(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
        """mean_iou; pixel_accuracy; iou/CLASS of every class that occurs or is named."""
        hits, having, named = (
            np.array([row[key] for row in rows], dtype=np.float64)
            for key in ("hits", "having", "named")
        )  # (S, K)
        guess = self.facts["most_frequent"]
        guess_hits, guess_union = np.zeros_like(hits), having.copy()
        guess_hits[:, guess] = having[:, guess]
        guess_union[:, guess] = having.sum(axis=1)
        union = having + named - hits
        found = {
            "mean_iou": Figure(
                numerator=hits, denominator=union, baseline=(guess_hits, guess_union)
            ),
            "pixel_accuracy": Figure(
                numerator=hits.sum(axis=1),
                denominator=having.sum(axis=1),
                baseline=(having[:, guess], having.sum(axis=1)),
            ),
        }
        for place, name in enumerate(self.classes):
            if union[:, place].any():
                found[f"iou/{name}"] = Figure(
                    numerator=hits[:, place],
                    denominator=union[:, place],
                    baseline=(guess_hits[:, place], guess_union[:, place]),
                )
        return found


def groups(batch: TaskBatch) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Samples of equal sizes: their places in the batch, pixels (b, 3, height, width) and maps
    (b, H, W), without what fills up the batch."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    for place, sizes in enumerate(batch.targets["sizes"].tolist()):
        by_size.setdefault(tuple(sizes), []).append(place)
    for (height, width, rows, columns), places in by_size.items():
        yield (
            places,
            batch.image()[places, :, :height, :width],
            batch.targets["map"][places, :rows, :columns],
        )


def tap_layers(layers: int) -> list[int]:
    """The blocks after which the head taps the backbone; 12: 4, 6, 8, 12."""
    return [max(1, layers // 3), max(1, layers // 2), max(1, 2 * layers // 3), layers]


def scaled(shape: Sequence[int], size: tuple[int, int], factor: float = 1.0) -> tuple[int, int]:
    """Height and width of a picture whose shorter side becomes that of `size` times the factor; a
    very long one is made smaller, until its longer side is LONGEST times that."""
    target = min(size)
    factor *= min(target / min(shape), LONGEST * target / max(shape))
    height, width = (max(1, round(side * factor)) for side in shape)
    return height, width


def training_crop(
    image: np.ndarray,
    classes: np.ndarray,
    draws: Draws,
    size: tuple[int, int],
    settings: SegmentationConfig,
    crop: CropConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """(*size, 3) and (*size): the same random part of picture and map, at a random scale.

    Where the picture ends before the crop does, it is filled up with grey, the map with IGNORED.
    """
    scale = draws.uniform(*settings.scale)
    shape = scaled(classes.shape, size, scale)
    image, classes = resize(image, shape), resize_map(classes, shape)
    lacking = [(0, max(0, side - own)) for side, own in zip(size, shape, strict=True)]
    image = np.pad(image, (*lacking, (0, 0)), constant_values=GREY)
    classes = np.pad(classes, lacking, constant_values=IGNORED)
    for _ in range(CROP_TRIES):
        top, left = (
            draws.integer(0, own - side + 1) for own, side in zip(classes.shape, size, strict=True)
        )
        part = (slice(top, top + size[0]), slice(left, left + size[1]))
        if largest_share(classes[part]) <= settings.max_share:
            break
    image, classes = image[part], classes[part]
    if draws.uniform() < crop.flip:
        image, classes = flip_horizontal(image), classes[:, ::-1]
    if crop.jitter > 0:
        image = color_jitter(image, draws, crop.jitter)
    return image, np.ascontiguousarray(classes)


def largest_share(classes: np.ndarray) -> float:
    """The most frequent class's share of the pixels that count; 0 where none does."""
    counts = np.bincount(classes.ravel(), minlength=256)[:IGNORED]
    return float(counts.max() / max(1, counts.sum()))


def inference(config: SegmentationRun) -> Inference:
    """How evaluation makes a map of a picture; windows are of the size of the training crops."""
    given, (height, width) = config.segmentation, config.model.image_size
    return Inference(
        mode=given.inference,
        crop=(height, width),
        stride=(max(1, int(height * given.stride)), max(1, int(width * given.stride))),
        multiple=config.model.patch,
        scales=given.scales,
        flip=given.flip,
    )


def check(config: SegmentationRun) -> None:
    """Raise ConfigError for a setting out of range, or one that would have no effect."""
    given, crop, model = config.segmentation, config.input.crop, config.model
    for name in ("channels", "auxiliary_channels"):
        if getattr(given, name) < 1:
            raise ConfigError(
                f"segmentation.{name} must be at least 1, found {getattr(given, name)}"
            )
        if given.norm == "group" and getattr(given, name) % GROUP_CHANNELS:
            raise ConfigError(
                f"segmentation.{name} must be a multiple of {GROUP_CHANNELS} (segmentation.norm "
                f"group), found {getattr(given, name)}"
            )
    if given.taps and not (
        len(given.taps) == 4
        and list(given.taps) == sorted(given.taps)
        and 1 <= given.taps[0] <= given.taps[-1] <= model.layers
    ):
        raise ConfigError(
            f"segmentation.taps must be four blocks of 1..{model.layers} (model.layers) in rising "
            f"order, found {given.taps}"
        )
    if given.auxiliary < 0:
        raise ConfigError(f"segmentation.auxiliary must be at least 0, found {given.auxiliary}")
    if not 0 <= given.balance <= 1:
        raise ConfigError(f"segmentation.balance must be 0 to 1, found {given.balance}")
    low, high = given.scale
    if not 0 < low <= high <= 10:
        raise ConfigError(
            f"segmentation.scale must be 0 < low <= high <= 10, found {low} and {high}"
        )
    for name in ("max_share", "stride"):
        value = getattr(given, name)
        if not 0 < value <= 1:
            raise ConfigError(f"segmentation.{name} must be above 0 and at most 1, found {value}")
    if not given.scales or not all(0.1 <= scale <= 10 for scale in given.scales):
        raise ConfigError(
            f"segmentation.scales must be one or more of 0.1 to 10, found {given.scales}"
        )
    # The pyramid halves the grid of patches.
    smallest = min(model.image_size)
    if given.inference == "whole":
        smallest = int(smallest * min(1.0, *given.scales))
    if smallest <= model.patch:
        raise ConfigError(
            f"{smallest} pixels are one patch (model.patch {model.patch}), segmentation needs two: "
            "a larger model.image_size or larger segmentation.scales"
        )
    if crop.scale != (1.0, 1.0) or config.input.rand_augment.operations:
        raise ConfigError(
            "input.crop.scale and input.rand_augment would move the picture and not its map; "
            "leave them at 1 1 and 0, and set segmentation.scale"
        )
    if given.norm == "batch" and (config.batch.micro < config.batch.size or config.optim.ema):
        raise ConfigError(
            "segmentation.norm batch takes its statistics from one micro-batch: batch.micro "
            f"({config.batch.micro}) must be batch.size ({config.batch.size}) and optim.ema 0"
        )
