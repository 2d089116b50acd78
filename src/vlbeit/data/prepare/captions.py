"""Captions of the same image, gathered from wherever a data set says them."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from vlbeit.data.prepare.locate import BadPlace, Pictures
from vlbeit.data.prepare.plan import Item, Options, Picture, Plan
from vlbeit.data.prepare.rows import Bad
from vlbeit.data.transforms import BadText, clean_text


class _Entry:
    __slots__ = ("captions", "fields", "split", "where")

    def __init__(self, split: str, where: str, fields: dict[str, Any]) -> None:
        self.split = split
        self.where = where
        self.fields = fields
        self.captions: dict[str, None] = {}


class ImageId(NamedTuple):
    """How a row names its image."""

    name: str
    shard: str | None = None


def usable_captions(captions: Iterable[str]) -> tuple[list[str], str]:
    """Cleaned captions, each once and in order; why the last unusable one was left out."""
    cleaned: dict[str, None] = {}
    reason = "no_text"
    for caption in captions:
        try:
            cleaned[clean_text(caption)] = None
        except BadText as error:
            reason = error.reason
    return list(cleaned), reason


class CaptionTable:
    """Image -> captions; rows that name the same image are merged, equal captions kept once."""

    def __init__(self, plan: Plan, options: Options) -> None:
        self._plan = plan
        self._options = options
        self._entries: dict[ImageId, _Entry] = {}
        self._rejected: dict[ImageId, Bad] = {}
        self.repeated = 0
        """Captions that an image had already."""
        self.unusable: Counter[str] = Counter()
        """Captions that `clean_text` refuses, by reason."""

    def add(
        self,
        image: ImageId,
        captions: Iterable[object],
        where: str,
        split: object = None,
        fields: dict[str, Any] | None = None,
    ) -> None:
        """Captions of one row. A row that is wrong goes to the plan's bad ones."""
        entry = self._entries.get(image)
        mapped = self._plan.split_of(split, where, image.name, self._options)
        if mapped is None:
            return
        if entry is not None and entry.split != mapped:
            detail = f"this row says split {mapped!r}, {entry.where} said {entry.split!r}"
            self._plan.bad.append(Bad(where, image.name, "two_splits", detail))
            return
        cleaned: list[str] = []
        reason = "no_text"
        for caption in captions:
            if not isinstance(caption, str):
                detail = f"a caption is {type(caption).__name__}, expected text"
                self._plan.bad.append(Bad(where, image.name, "bad_caption", detail))
                return
            try:
                cleaned.append(clean_text(caption))
            except BadText as error:
                reason = error.reason
                self.unusable[reason] += 1
        if entry is None and not cleaned:
            self._rejected.setdefault(image, Bad(where, image.name, reason, "no caption is left"))
            return
        if entry is None:
            entry = self._entries[image] = _Entry(mapped, where, fields or {})
            self._rejected.pop(image, None)
        for caption in cleaned:
            self.repeated += caption in entry.captions
            entry.captions[caption] = None

    def finish(self, pictures: Pictures, *, absent_is_bad: bool = True) -> None:
        """Looks up every image and puts the pairs into the plan."""
        plan = self._plan
        plan.bad += self._rejected.values()
        for image, entry in self._entries.items():
            try:
                place = pictures.find(image.name, image.shard)
            except BadPlace as error:
                bad = Bad(entry.where, image.name, error.reason, error.detail)
                (plan.bad if absent_is_bad or error.reason != "no_image" else plan.absent).append(
                    bad
                )
                continue
            fields = {**entry.fields, "captions": list(entry.captions)}
            plan.items.append(Item(entry.split, image.name, entry.where, (Picture(place),), fields))
        for reason, count in self.unusable.items():
            plan.notes.append(f"{count:,} captions left out: {reason}")
        if self.repeated:
            plan.notes.append(f"{self.repeated:,} repeated captions of an image kept once")
        self._entries.clear()
