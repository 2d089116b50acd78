"""Samples are pure functions of their visit, texts are packed whole, batches are padded right."""

import multiprocessing
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from toy_records import (
    CONFIG,
    image_source,
    pair_source,
    text_source,
    toy_sources,
    toy_tokenizer,
)
from vlbeit.config import MaskingConfig
from vlbeit.data.collate import Sample, collate, pad_words
from vlbeit.data.loader import build_streams
from vlbeit.data.order import Visit
from vlbeit.data.records import BadSample, RecordSource
from vlbeit.data.streams import PairStream, PictureSettings, SampleStream, TextStream
from vlbeit.data.textpack import PackedText, pack_text
from vlbeit.data.transforms import clean_text
from vlbeit.errors import ConfigError, DataBudgetError, InputError
from vlbeit.tokens.text import TextTokenizer
from vlbeit.types import Stream


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return toy_tokenizer()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[Stream, list[RecordSource]]:
    return toy_sources(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def streams(
    sources: dict[Stream, list[RecordSource]],
    tokenizer: TextTokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, SampleStream]:
    built = build_streams(CONFIG, sources, tokenizer, cache=tmp_path_factory.mktemp("cache"))
    return {stream.stream: stream for stream in built}


def arrays(sample: Sample) -> dict[str, np.ndarray]:
    return {k: v for k, v in vars(sample).items() if isinstance(v, np.ndarray)}


def same(one: Sample, two: Sample) -> bool:
    return arrays(one).keys() == arrays(two).keys() and all(
        np.array_equal(value, arrays(two)[name]) for name, value in arrays(one).items()
    )


def visit_of(stream: SampleStream, epoch: int = 0, index: int = 0) -> Visit:
    return Visit(next(iter(stream.records)), epoch, index)


@pytest.mark.parametrize("name", ["image", "text", "pair"])
def test_a_sample_depends_on_its_visit_alone(streams: dict[str, SampleStream], name: str) -> None:
    stream = streams[name]
    first = stream.sample(visit_of(stream, 2, 5))
    stream.sample(visit_of(stream, 0, 1))
    assert same(stream.sample(visit_of(stream, 2, 5)), first)
    assert same(pickle.loads(pickle.dumps(stream)).sample(visit_of(stream, 2, 5)), first)
    assert not same(stream.sample(visit_of(stream, 3, 5)), first), "another epoch, another sample"


def test_another_seed_changes_every_draw(
    sources: dict[Stream, list[RecordSource]],
    tokenizer: TextTokenizer,
    streams: dict[str, SampleStream],
    tmp_path: Path,
) -> None:
    for other in build_streams(replace(CONFIG, seed=1), sources, tokenizer, cache=tmp_path):
        visit = visit_of(other, 0, 3)
        ours = arrays(streams[other.stream].sample(visit))
        for name, theirs in arrays(other.sample(visit)).items():
            if name != "words" or other.stream == "text":
                assert not np.array_equal(ours[name], theirs), (other.stream, name)


def test_shapes_and_ranges_are_those_of_the_batch(streams: dict[str, SampleStream]) -> None:
    pair = streams["pair"].sample(visit_of(streams["pair"], 0, 2))
    assert pair.pixels is not None and pair.pixels.shape == (3, 32, 32)
    assert pair.pixels.dtype == np.uint8
    assert pair.patch_masked is not None and pair.patch_masked.sum() == round(0.4 * 16)
    assert pair.depth_draws is not None and pair.depth_draws.shape == (2, 6)
    assert pair.depth_draws.dtype == np.float32
    assert 0 <= pair.depth_draws.min() and pair.depth_draws.max() < 1
    image = streams["image"].sample(visit_of(streams["image"]))
    assert image.depth_draws is not None and image.depth_draws.shape == (1, 6)
    assert image.words is None


def test_the_two_masks_of_a_pair_follow_their_rates_and_spare_specials(
    streams: dict[str, SampleStream],
) -> None:
    stream = streams["pair"]
    for index in range(48):
        sample = stream.sample(visit_of(stream, 0, index))
        words, masked, given = sample.words, sample.word_masked, sample.words_given
        assert words is not None and masked is not None and given is not None
        assert words[0] == TextTokenizer.cls and words[-1] == TextTokenizer.sep
        assert len(words) <= CONFIG.input.pair_text_length
        assert masked.sum() == max(1, np.floor(0.5 * (words >= 5).sum() + 0.5))
        assert not masked[words < 5].any()
        assert (given == words)[~masked].all()


def test_every_caption_of_a_record_is_drawn(
    streams: dict[str, SampleStream], sources: dict[Stream, list[RecordSource]]
) -> None:
    stream, index = streams["pair"], 2  # has three captions
    assert len(sources["pair"][0].text_lengths(index)) == 3
    seen = set()
    for epoch in range(40):
        words = stream.sample(visit_of(stream, epoch, index)).words
        assert words is not None
        seen.add(tuple(words))
    assert len(seen) == 3


def test_the_order_knows_the_length_of_the_caption_that_the_sample_shows(
    sources: dict[Stream, list[RecordSource]], tokenizer: TextTokenizer
) -> None:
    pictures = PictureSettings(
        image_size=(32, 32), patch=8, crop=CONFIG.input.pairs, masking=MaskingConfig(min_block=4)
    )
    stream = PairStream(sources["pair"], tokenizer, seed=0, pictures=pictures, text_length=1000)
    visits = [Visit("captioned", epoch, index) for epoch in range(3) for index in range(48)]
    lengths = stream.lengths(visits)
    for visit, length in zip(visits, lengths, strict=True):
        words = stream.sample(visit).words
        assert words is not None
        shown = tokenizer.decode(words[1:-1])
        record = sources["pair"][0].read(visit.index)
        known = [clean_text(text) for text in record.captions()]
        assert shown in known and len(shown) == length


def test_a_bad_record_is_named_with_its_reason(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    sources: dict[Stream, list[RecordSource]] = {
        "image": [image_source(tmp_path, bad={3})],
        "pair": [pair_source(tmp_path, bad={5})],
    }
    config = replace(CONFIG, batch=replace(CONFIG.batch, texts=0))
    image, pair = build_streams(config, sources, tokenizer)
    with pytest.raises(BadSample) as bad_image:
        image.sample(Visit("photos", 0, 3))
    assert bad_image.value.reason == "not_an_image"
    assert bad_image.value.shard.endswith("photos-00000.tar")
    with pytest.raises(BadSample) as bad_text:
        pair.sample(Visit("captioned", 0, 5))
    assert bad_text.value.reason == "empty_text" and "0005" in bad_text.value.member
    image.sample(Visit("photos", 0, 4))


def test_a_picture_size_that_the_patch_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"image_size \(30, 32\).*patch 8"):
        PictureSettings(
            image_size=(30, 32), patch=8, crop=CONFIG.input.pairs, masking=CONFIG.masking
        )


# ------------------------------------------------------------------ packed text


def pack(source: RecordSource, tokenizer: TextTokenizer, cache: Path) -> PackedText:
    return pack_text(source, tokenizer, cache, skip_budget=0.01)


def test_packed_text_is_every_document_in_order_with_separators(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    source = text_source(tmp_path)
    packed = pack(source, tokenizer, tmp_path / "cache")
    expected: list[int] = []
    for record in range(3):
        for line in source.read(record).members["txt"].decode().splitlines():
            expected += [*tokenizer.encode(line).tolist(), TextTokenizer.sep]
    assert packed.documents == 120
    assert list(packed._read(0, packed.tokens)) == expected


def test_chunks_of_an_epoch_tile_the_text_once_and_move_between_epochs(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    packed, length = pack(text_source(tmp_path), tokenizer, tmp_path / "cache"), 16
    flat = list(packed._read(0, packed.tokens))
    bodies = []
    for epoch in range(3):
        chunks = [packed.chunk(i, epoch, length, seed=0) for i in range(packed.chunks(length))]
        assert {len(chunk) for chunk in chunks} == {length}
        assert {(c[0], c[-1]) for c in chunks} == {(TextTokenizer.cls, TextTokenizer.sep)}
        body = [int(token) for chunk in chunks for token in chunk[1:-1]]
        assert packed.tokens - len(body) < length - 2, "less than a chunk is left out"
        start = next(s for s in range(len(flat)) if (flat[s:] + flat[:s])[: len(body)] == body)
        bodies.append(start)
    assert len(set(bodies)) == 3, "borders move"


def test_documents_that_cannot_be_used_are_listed_by_line_and_their_neighbours_kept(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    odd = [b"", b"  \t ", b"\xef\xbb\xbfa red circle", b"a [MASK] square [T_SEP] left", b"a blue"]
    plain = pack(text_source(tmp_path / "plain"), tokenizer, tmp_path / "cache")
    packed = pack(text_source(tmp_path / "odd", lines=odd), tokenizer, tmp_path / "cache")
    skips = list(packed.skips())
    assert [(skip["member"], skip["reason"]) for skip in skips] == [
        ("0000.txt:41", "empty_text"),
        ("0000.txt:42", "empty_text"),
    ]
    assert {skip["source"] for skip in skips} == {"prose"}
    assert packed.documents == plain.documents + 3, "used and skipped add up to what is listed"
    tokens = packed._read(0, packed.tokens)
    assert set(tokens[tokens < 5]) <= {TextTokenizer.unk, TextTokenizer.sep}
    assert (tokens == TextTokenizer.sep).sum() == packed.documents


def test_a_text_source_beyond_its_budget_stops_with_the_reasons(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    garbage = [bytes([0x80, 0x81, 0xFE]) * 8] * 20
    with pytest.raises(DataBudgetError, match=r"prose.*20 documents.*not_utf8.*budget"):
        pack(text_source(tmp_path, lines=garbage), tokenizer, tmp_path / "cache")
    nothing = text_source(tmp_path / "none", records=0)
    with pytest.raises(DataBudgetError, match="no usable sample in text source prose"):
        pack(nothing, tokenizer, tmp_path / "cache")


def test_a_text_source_shorter_than_a_chunk_is_refused_by_name(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    packed = pack(text_source(tmp_path), tokenizer, tmp_path / "cache")
    with pytest.raises(InputError, match=r"prose.*do not fill one chunk of 100000"):
        TextStream([packed], tokenizer, seed=0, text_length=100_000, masking=MaskingConfig())


def _pack_in_process(folder: Path, cache: Path, answer: "multiprocessing.Queue[str]") -> None:
    source = RecordSource("prose", sorted(str(path) for path in folder.glob("*.tar")))
    messages: list[str] = []
    pack_text(source, toy_tokenizer(), cache, skip_budget=0.01, log=messages.append)
    answer.put("built" if messages else "found")


def test_several_processes_pack_once(tmp_path: Path) -> None:
    text_source(tmp_path)
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    jobs = [
        context.Process(target=_pack_in_process, args=(tmp_path, tmp_path / "cache", answer))
        for _ in range(3)
    ]
    for job in jobs:
        job.start()
    found = sorted(answer.get(timeout=60) for _ in jobs)
    for job in jobs:
        job.join(timeout=10)
    assert found == ["built", "found", "found"]
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_damaged_cache_is_made_again_and_said_so(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    source = text_source(tmp_path)
    packed = pack(source, tokenizer, tmp_path / "cache")
    before = list(packed._read(0, packed.tokens))
    path = packed.folder / "tokens.bin"
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="sha256"):
        PackedText("prose", packed.folder)
    said: list[str] = []
    again = pack_text(source, tokenizer, tmp_path / "cache", skip_budget=0.01, log=said.append)
    assert list(again._read(0, again.tokens)) == before
    assert "made again" in said[0]


def test_another_vocabulary_or_other_documents_get_a_cache_of_their_own(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    cache = tmp_path / "cache"
    one = pack(text_source(tmp_path / "a"), tokenizer, cache)
    moved = pack(text_source(tmp_path / "b"), tokenizer, cache)
    other = pack(text_source(tmp_path / "c", lines=[b"a red"]), tokenizer, cache)
    assert one.folder == moved.folder, "the same bytes in another place"
    assert other.folder != one.folder


# ------------------------------------------------------------------ collate


def test_captions_are_padded_to_the_longest_of_the_micro_batch(
    streams: dict[str, SampleStream],
) -> None:
    stream = streams["pair"]
    samples = [stream.sample(visit_of(stream, 0, index)) for index in (1, 4, 9, 12)]
    batch = collate("pair", samples)
    assert batch.words is not None and batch.word_valid is not None
    assert batch.words_given is not None and batch.word_masked is not None
    widths = [len(s.words) for s in samples if s.words is not None]
    assert len(set(widths)) > 1
    assert batch.words.shape == (4, max(widths)) and batch.words.dtype == torch.int64
    for row, (sample, width) in enumerate(zip(samples, widths, strict=True)):
        assert batch.word_valid[row].tolist() == [True] * width + [False] * (max(widths) - width)
        assert batch.words[row, :width].tolist() == list(sample.words)  # type: ignore[arg-type]
        for tensor in (batch.words, batch.words_given):
            assert (tensor[row, width:] == TextTokenizer.pad).all()
        assert not batch.word_masked[row, width:].any()
    assert batch.sample_ids == tuple(f"captioned:0:{index}" for index in (1, 4, 9, 12))
    assert batch.patch_masked is not None
    assert set(batch.patch_masked.sum(1).tolist()) == {round(0.4 * 16)}


def test_text_batches_have_no_padding(streams: dict[str, SampleStream]) -> None:
    stream = streams["text"]
    batch = collate("text", [stream.sample(visit_of(stream, 0, i)) for i in range(3)])
    assert batch.word_valid is not None and bool(batch.word_valid.all())
    assert batch.words is not None and batch.words.shape == (3, CONFIG.input.text_length)
    assert batch.pixels is None and batch.patch_masked is None


def test_photos_in_foreign_shards_become_samples(
    shared_data: Path, tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLBEIT_CACHE", str(tmp_path))
    shard = tmp_path / "val.tar"
    shard.symlink_to(shared_data / "flickr8k/val-000.tar")  # it has no manifest
    config = replace(CONFIG, batch=replace(CONFIG.batch, texts=0, pairs=0))
    (stream,) = build_streams(
        config, {"image": [RecordSource("flickr8k", [str(shard)])]}, tokenizer
    )
    batch = collate("image", [stream.sample(Visit("flickr8k", 0, i)) for i in range(8)])
    assert batch.pixels is not None and batch.pixels.float().std() > 20


@pytest.mark.parametrize(
    ("longest", "allowed", "columns"),
    [(13, 40, 16), (16, 40, 16), (17, 40, 24), (13, 14, 14), (14, 14, 14), (13, 0, 13)],
)
def test_texts_are_filled_to_a_multiple_of_8_but_never_past_what_is_allowed(
    longest: int, allowed: int, columns: int
) -> None:
    words, valid = pad_words([np.arange(longest), np.arange(5)], allowed)
    assert words.shape == valid.shape == (2, columns)
    assert valid.sum(axis=1).tolist() == [longest, 5]
