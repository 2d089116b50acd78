"""The three streams: a visit becomes one masked sample, without a model.

A sample is a pure function of (seed, stream, source, epoch, index): crop, flip, caption, masks and
dropped paths are drawn from streams keyed by these, so it does not matter which rank or worker
makes it, nor what was made before.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import numpy as np

from vlbeit.config import CropConfig, MaskingConfig
from vlbeit.data.collate import Sample, Stacked, as_batch, stack
from vlbeit.data.order import SourceOrder, Visit
from vlbeit.data.records import BadSample, Record, RecordSource
from vlbeit.data.stored_codes import SourceCodes
from vlbeit.data.textpack import PackedText
from vlbeit.data.transforms import BadImage, BadText, augment, clean_text, decode_image
from vlbeit.draws import Draws
from vlbeit.errors import ConfigError
from vlbeit.masking import block_masked, replace_words, word_masked
from vlbeit.tokens.text import SPECIALS, TextTokenizer
from vlbeit.types import Batch, Stream

S = TypeVar("S")
B = TypeVar("B", covariant=True)

_CHUNKS_A_SHARD = 256
"""Neighbouring chunks of packed text that the order treats as one shard (about 50k tokens)."""


class SampleStream(Protocol[S, B]):
    """What the loader asks of a stream of samples `S` that become micro-batches `B`."""

    @property
    def stream(self) -> str:
        """Its name, in the ledger and in `dataset.json`."""

    @property
    def records(self) -> dict[str, int]:
        """What one epoch of each source counts: records, chunks of text, questions."""

    def sample(self, visit: Visit) -> S:
        """The sample of a visit.

        Raises:
            BadSample: it cannot be made; shard, member and reason say why.
        """

    def stack(self, samples: Sequence[S]) -> Stacked:
        """A micro-batch in numpy, which may be sent from another process; at least one sample."""

    def batch(self, stacked: Stacked) -> B:
        """The same memory as tensors."""

    def lengths(self, visits: Sequence[Visit]) -> np.ndarray | None:
        """(n,) lengths by which a step is sorted before it is cut; None: not sorted."""

    def orders(self, window: int, bucket: int) -> list[SourceOrder]:
        """The order of each source; `bucket` visits have like lengths."""


class MaskedStream:
    """What the three streams of pretraining share: how their samples become a `Batch`."""

    stream: Stream

    def stack(self, samples: Sequence[Sample]) -> Stacked:
        return stack(self.stream, samples)

    def batch(self, stacked: Stacked) -> Batch:
        return as_batch(stacked)


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    """How a record's picture becomes pixels and hidden patches."""

    image_size: tuple[int, int]
    patch: int
    crop: CropConfig
    masking: MaskingConfig

    def __post_init__(self) -> None:
        if self.image_size[0] % self.patch or self.image_size[1] % self.patch:
            raise ConfigError(
                f"model.image_size {self.image_size} is not a multiple of model.patch {self.patch}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch, self.image_size[1] // self.patch

    def masked(self, draws: Draws) -> np.ndarray:
        """(P,) bool."""
        rows, cols = self.grid
        count = round(self.masking.image * rows * cols)
        return block_masked(
            draws, self.grid, count, self.masking.min_block, self.masking.max_aspect
        )

    def pixels(self, data: bytes, draws: Draws) -> np.ndarray:
        """(3, height, width) uint8."""
        return augment(decode_image(data), draws, self.image_size, self.crop)


@dataclass(frozen=True, kw_only=True)
class WordSettings:
    """How token ids become a masked text."""

    vocab_size: int
    rate: float
    masking: MaskingConfig

    def masked(self, words: np.ndarray, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """words_given and word_masked of (W,) ids; special tokens are left alone."""
        low = len(SPECIALS)
        masked = word_masked(draws, words >= low, self.rate)
        given = replace_words(
            draws,
            words,
            masked,
            TextTokenizer.mask,
            low,
            self.vocab_size,
            self.masking.to_mask,
            self.masking.to_random,
        )
        return given, masked


def depth_draws(
    seed: int, stream: str, visit: Visit, shape: tuple[int, int] | None
) -> np.ndarray | None:
    """(views, 2 * layers) float32 in [0, 1), which decide about dropped paths; None: no shape.

    24 bits each, so that float32 holds them exactly and 1 is never reached.
    """
    if shape is None:
        return None
    raw = Draws(seed, "depth", stream, *visit).raw(shape[0] * shape[1])
    return ((raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)).reshape(shape)


def encode_text(tokenizer: TextTokenizer, text: str, longest: int) -> np.ndarray:
    """(W,) int32: [T_CLS] text [T_SEP], cut to `longest` tokens.

    Raises:
        BadText: empty_text.
    """
    ids = tokenizer.encode(text)[: longest - 2]
    if len(ids) == 0:
        raise BadText("empty_text", "no token is left after tokenizing")
    words = np.empty(len(ids) + 2, dtype=np.int32)
    words[0], words[1:-1], words[-1] = TextTokenizer.cls, ids, TextTokenizer.sep
    return words


def stored_row(codes: Mapping[str, SourceCodes], visit: Visit, record: Record) -> np.ndarray | None:
    """(P,) int64, the stored codes of a visit; None where codes are not stored.

    Raises:
        BadSample: no_codes, for a record that had no usable picture when codes were stored.
    """
    if visit.source not in codes:
        return None
    row = codes[visit.source].row(visit.index)
    if row is None:
        detail = f"{codes[visit.source].path} has none for it; encode again"
        raise BadSample(record.shard, record.key, "no_codes", detail)
    return row


class ImageStream(MaskedStream):
    """Single images for MIM. `codes`: the stored codes of its sources; empty: none are stored."""

    stream: Stream = "image"

    def __init__(
        self,
        sources: Sequence[RecordSource],
        *,
        seed: int,
        pictures: PictureSettings,
        depth_shape: tuple[int, int] | None = None,
        codes: Mapping[str, SourceCodes] = MappingProxyType({}),
    ) -> None:
        self._sources = {source.name: source for source in sources}
        self.records = {source.name: len(source) for source in sources}
        self._seed = seed
        self._pictures = pictures
        self._depth_shape = depth_shape
        self._codes = dict(codes)

    def sample(self, visit: Visit) -> Sample:
        record = self._sources[visit.source].read(visit.index)
        try:
            draws = Draws(self._seed, "crop", self.stream, *visit)
            pixels = self._pictures.pixels(record.image(), draws)
        except BadImage as bad:
            raise BadSample(record.shard, record.key, bad.reason, bad.detail) from None
        return Sample(
            visit=visit,
            pixels=pixels,
            patch_masked=self._pictures.masked(Draws(self._seed, "mask", self.stream, *visit)),
            patch_codes=stored_row(self._codes, visit, record),
            depth_draws=depth_draws(self._seed, self.stream, visit, self._depth_shape),
        )

    def lengths(self, visits: Sequence[Visit]) -> np.ndarray | None:
        return None

    def orders(self, window: int, bucket: int) -> list[SourceOrder]:
        return [SourceOrder(s.name, s.sizes, self._seed, window) for s in self._sources.values()]


class PairStream(MaskedStream):
    """Image-text pairs for MVLM. Words and patches are both masked; the objective picks.

    `codes` as in `ImageStream`.
    """

    stream: Stream = "pair"

    def __init__(
        self,
        sources: Sequence[RecordSource],
        tokenizer: TextTokenizer,
        *,
        seed: int,
        pictures: PictureSettings,
        text_length: int,
        depth_shape: tuple[int, int] | None = None,
        codes: Mapping[str, SourceCodes] = MappingProxyType({}),
    ) -> None:
        self._sources = {source.name: source for source in sources}
        self.records = {source.name: len(source) for source in sources}
        self._codes = dict(codes)
        self._tokenizer = tokenizer
        self._seed = seed
        self._pictures = pictures
        self._text_length = text_length
        masking = pictures.masking
        self._words = WordSettings(
            vocab_size=tokenizer.size, rate=masking.pair_text, masking=masking
        )
        self._depth_shape = depth_shape

    def sample(self, visit: Visit) -> Sample:
        record = self._sources[visit.source].read(visit.index)
        captions = record.captions()
        number = self._caption(visit, len(captions))
        try:
            words = encode_text(self._tokenizer, clean_text(captions[number]), self._text_length)
            draws = Draws(self._seed, "crop", self.stream, *visit)
            pixels = self._pictures.pixels(record.image(), draws)
        except BadText as bad:
            member = f"{record.key} (caption {number + 1} of {len(captions)})"
            raise BadSample(record.shard, member, bad.reason, bad.detail) from None
        except BadImage as bad:
            raise BadSample(record.shard, record.key, bad.reason, bad.detail) from None
        draws = Draws(self._seed, "mask", self.stream, *visit)
        patch_masked = self._pictures.masked(draws)
        words_given, words_masked = self._words.masked(words, draws)
        return Sample(
            visit=visit,
            pixels=pixels,
            patch_masked=patch_masked,
            patch_codes=stored_row(self._codes, visit, record),
            words=words,
            words_given=words_given,
            word_masked=words_masked,
            depth_draws=depth_draws(self._seed, self.stream, visit, self._depth_shape),
        )

    def _caption(self, visit: Visit, captions: int) -> int:
        """Which caption a visit shows; order and sample must agree, so both ask here."""
        if captions <= 1:
            return 0
        return Draws(self._seed, "caption", *visit).integer(0, captions)

    def stack(self, samples: Sequence[Sample]) -> Stacked:
        return stack(self.stream, samples, self._text_length)

    def lengths(self, visits: Sequence[Visit]) -> np.ndarray:
        found = np.zeros(len(visits), dtype=np.int64)
        for place, visit in enumerate(visits):
            captions = self._sources[visit.source].text_lengths(visit.index)
            if len(captions) > 0:
                found[place] = captions[self._caption(visit, len(captions))]
        return found

    def orders(self, window: int, bucket: int) -> list[SourceOrder]:
        return [
            SourceOrder(
                name,
                source.sizes,
                self._seed,
                window,
                lengths=functools.partial(self._record_lengths, name),
                bucket=bucket,
            )
            for name, source in self._sources.items()
        ]

    def _record_lengths(self, source: str, epoch: int, records: np.ndarray) -> np.ndarray:
        return self.lengths([Visit(source, epoch, index) for index in records.tolist()])


class TextStream(MaskedStream):
    """Full-length chunks of text for MLM."""

    stream: Stream = "text"

    def __init__(
        self,
        packed: Sequence[PackedText],
        tokenizer: TextTokenizer,
        *,
        seed: int,
        text_length: int,
        masking: MaskingConfig,
        depth_shape: tuple[int, int] | None = None,
    ) -> None:
        self._packed = {text.name: text for text in packed}
        self.records = {text.name: text.chunks(text_length) for text in packed}
        self._seed = seed
        self._text_length = text_length
        self._words = WordSettings(vocab_size=tokenizer.size, rate=masking.text, masking=masking)
        self._depth_shape = depth_shape

    def skips(self) -> Iterator[dict[str, Any]]:
        """Documents that are in no chunk: stream, source, shard, member, reason, detail."""
        for text in self._packed.values():
            for row in text.skips():
                yield {"stream": self.stream, **row}

    def sample(self, visit: Visit) -> Sample:
        text = self._packed[visit.source]
        words = text.chunk(visit.index, visit.epoch, self._text_length, self._seed)
        given, masked = self._words.masked(words, Draws(self._seed, "mask", self.stream, *visit))
        return Sample(
            visit=visit,
            words=words,
            words_given=given,
            word_masked=masked,
            depth_draws=depth_draws(self._seed, self.stream, visit, self._depth_shape),
        )

    def lengths(self, visits: Sequence[Visit]) -> np.ndarray | None:
        return None

    def orders(self, window: int, bucket: int) -> list[SourceOrder]:
        orders = []
        for name, chunks in self.records.items():
            sizes = [_CHUNKS_A_SHARD] * (chunks // _CHUNKS_A_SHARD)
            rest = chunks % _CHUNKS_A_SHARD
            orders.append(SourceOrder(name, sizes + [rest] * (rest > 0), self._seed, window))
        return orders
