"""Laws of the evaluation: intervals that mean what they say, a gap that only looking can make."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from tiny_run import COLOURS, IMAGES, PAIRS, SHAPES, TEXTS, colour_of, tiny_run, write_world
from vlbeit.data.dataset import Dataset, open_sources
from vlbeit.data.loader import build_streams
from vlbeit.errors import InputError
from vlbeit.eval.bootstrap import difference, ratio, resample_counts
from vlbeit.eval.evaluate import evaluate_run, load_run, other_texts
from vlbeit.eval.heldout import (
    batches_of,
    evaluation_config,
    held_out_streams,
    last_of,
    visits_of,
)
from vlbeit.eval.scoring import neighbour


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


# --- intervals -----------------------------------------------------------------------------------


def half_width(share, samples):
    """Of the normal approximation to a binomial share, 95 %."""
    return 1.96 * np.sqrt(share * (1 - share) / samples)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_one_answer_a_sample_has_the_binomial_interval(share):
    samples = 1000
    right = (np.arange(samples) < share * samples).astype(float)
    found = ratio(right, np.ones(samples))
    assert found.value == pytest.approx(share)
    wanted = half_width(share, samples)
    assert found.high - share == pytest.approx(wanted, rel=0.1)
    assert share - found.low == pytest.approx(wanted, rel=0.1)


def test_answers_that_come_in_bunches_count_as_one_sample_each():
    samples, bunch = 400, 10
    right = (np.arange(samples) < 200).astype(float)
    found = ratio(bunch * right, np.full(samples, bunch))
    width = (found.high - found.low) / 2
    assert width == pytest.approx(half_width(0.5, samples), rel=0.1)
    assert width > 2 * half_width(0.5, samples * bunch)  # as if each answer were its own sample


def test_the_interval_covers_the_truth_in_95_of_100_trials():
    generator = np.random.default_rng(0)
    truth, samples, trials = 0.3, 150, 400
    counts = resample_counts(samples, 400, "coverage")
    covered = 0
    for _ in range(trials):
        right = (generator.random(samples) < truth).astype(float)
        found = ratio(right, np.ones(samples), counts)
        covered += found.low <= truth <= found.high
    assert 0.91 <= covered / trials <= 0.98


def test_a_paired_difference_is_narrower_than_two_intervals_and_zero_for_equals():
    generator = np.random.default_rng(0)
    ones, counts = np.ones(300), resample_counts(300, 1000, "paired")
    first = (generator.random(300) < 0.5).astype(float)
    second = np.where(generator.random(300) < 0.05, 1 - first, first)
    paired = difference((first, ones), (second, ones), counts)
    apart = difference((first, ones), (generator.permutation(second), ones), counts)
    assert paired.high - paired.low < 0.5 * (apart.high - apart.low)
    same = difference((first, ones), (first, ones), counts)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_every_resample_draws_as_many_samples_as_there_are():
    counts = resample_counts(37, 50, "size")
    assert (counts.sum(axis=1) == 37).all()
    assert not np.array_equal(counts, resample_counts(37, 50, "another key"))


# --- sighted and blind ---------------------------------------------------------------------------


def hidden_words(run):
    """(sample, word) of every hidden word, counted here and not by the evaluation."""
    stream = held_out_streams(run.config, run.text)["pair"]
    for visit in visits_of(stream, 0):
        sample = stream.sample(visit)
        for number in sample.words[sample.word_masked]:
            yield visit.index, run.text.decode([int(number)])


def test_a_model_that_reads_the_picture_has_a_gap_of_the_expected_size(world):
    run = tiny_run(world, reads=True)
    found = evaluate_run(run)
    hidden = list(hidden_words(run))
    sighted = np.mean([word == colour_of(i) for i, word in hidden])
    blind = np.mean([word == colour_of((i - 1) % PAIRS) for i, word in hidden])
    assert found["words"]["sighted"]["accuracy"]["value"] == pytest.approx(sighted)
    assert found["words"]["blind"]["accuracy"]["value"] == pytest.approx(blind)
    gap = found["word_gap"]["sighted_minus_blind"]["accuracy"]
    assert gap["value"] == pytest.approx(sighted - blind) and gap["low"] > 0
    assert found["attributes"]["kinds"]["colour"]["sighted"]["value"] == 1.0
    words = found["attributes"]
    assert words["sighted_minus_blind"]["value"] == pytest.approx(
        words["sighted"]["value"] - words["blind"]["value"]
    )


def test_a_model_that_ignores_the_picture_has_no_gap_at_all(world):
    found = evaluate_run(tiny_run(world, reads=False))
    for row in found["word_gap"].values():
        for estimate in row.values():
            assert estimate == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_pictures_in_the_wrong_places_leave_no_gap(tmp_path):
    run = tiny_run(write_world(tmp_path, shift=7), reads=True)
    found = evaluate_run(run)
    gap = found["word_gap"]["sighted_minus_blind"]["accuracy"]
    assert gap["low"] < 0 < gap["high"]
    assert found["attributes"]["kinds"]["colour"]["sighted"]["value"] < 0.6


def test_the_prior_is_the_most_frequent_hidden_word_of_the_kind(world):
    run = tiny_run(world, reads=True)
    found = evaluate_run(run)["attributes"]
    words = Counter(word for _, word in hidden_words(run))
    for kind, names in (("colour", COLOURS), ("shape", SHAPES)):
        asked = [words[name] for name in names]
        assert found["kinds"][kind]["count"] == sum(asked)
        assert found["kinds"][kind]["prior"] == pytest.approx(max(asked) / sum(asked))
    most = sum(max(words[n] for n in names) for names in (COLOURS, SHAPES))
    every = sum(words[n] for n in COLOURS + SHAPES)
    assert found["headline"] == ["colour", "shape"]
    assert found["prior"] == pytest.approx(most / every) and found["count"] == every


def test_nobody_keeps_its_own_picture_or_text(world):
    run = tiny_run(world)
    stream = held_out_streams(run.config, run.text)["pair"]
    visits = visits_of(stream, 0)
    ids = [visit.index for visit in visits]
    previous, met = last_of(stream, visits), []
    for batch in batches_of(stream, visits, 5):
        words, valid = other_texts(batch, previous)
        for row, (given, real) in enumerate(zip(words, valid, strict=True)):
            met.append(run.text.decode(given[real].tolist()))
            assert batch.sample_ids[row] != previous.sample_ids[-1] or row > 0
        previous = batch
    own = [run.text.decode(stream.sample(visit).words.tolist()) for visit in visits]
    assert met == own[-1:] + own[:-1] and ids == list(range(PAIRS))


def test_a_neighbour_is_the_one_before():
    value = torch.arange(4)[:, None]
    assert neighbour(value, torch.tensor([[9]])).flatten().tolist() == [9, 0, 1, 2]


def test_a_single_pair_is_not_asked_with_its_own_picture_as_another(world):
    found = evaluate_run(tiny_run(world, reads=True), samples=1)
    assert set(found["words"]) == {"sighted", "no_image"}
    assert "attributes" not in found


# --- what is counted -----------------------------------------------------------------------------


def leaves(tree, path=""):
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from leaves(value, f"{path}/{name}")
    else:
        yield path, tree


def test_the_batch_size_changes_nothing(world):
    run = tiny_run(world)
    first, *others = (dict(leaves(evaluate_run(run, batch_size=size))) for size in (1, 7, 64))
    numbers = [path for path, value in first.items() if isinstance(value, float)]
    assert len(numbers) > 60
    for other in others:
        assert other.keys() == first.keys()
        for path, value in first.items():
            if path in numbers:
                assert other[path] == pytest.approx(value, abs=1e-6), path
            else:
                assert other[path] == value, path


@pytest.mark.parametrize("size", [1, 4, 100])
def test_every_held_out_record_is_counted_once(world, size):
    run = tiny_run(world)
    for name, stream in held_out_streams(run.config, run.text).items():
        ids = [i for b in batches_of(stream, visits_of(stream, 0), size) for i in b.sample_ids]
        assert len(ids) == len(set(ids)) == sum(stream.records.values()), name
    found = evaluate_run(run, batch_size=size)
    assert found["samples"]["pair"] == PAIRS and found["samples"]["image"] == IMAGES
    assert found["samples"]["text"] > TEXTS
    assert found["words"]["sighted"]["count"] == sum(1 for _ in hidden_words(run))


def test_a_limit_takes_samples_from_the_whole_of_the_data(world):
    stream = held_out_streams(tiny_run(world).config, tiny_run(world).text)["pair"]
    indices = [visit.index for visit in visits_of(stream, 5)]
    assert len(set(indices)) == 5 and indices[0] == 0 and indices[-1] >= PAIRS * 3 // 4


def test_a_hidden_word_cannot_be_read(world):
    run = tiny_run(world)

    def shown(config):
        sources = {"pair": open_sources([world], "pair", "val")}
        (stream,) = build_streams(config, sources, run.text)
        samples = [stream.sample(visit) for visit in visits_of(stream, 0)]
        return np.concatenate([s.words_given[s.word_masked] for s in samples])

    only_pairs = replace(run.config, batch=replace(run.config.batch, images=0, texts=0))
    assert set(shown(evaluation_config(only_pairs)).tolist()) == {run.text.mask}
    assert len(set(shown(only_pairs).tolist())) > 1  # training leaves some readable


def test_a_bad_sample_is_named_and_the_rest_is_counted(tmp_path):
    folder = write_world(tmp_path)
    shard = folder / "pair-00000.tar"
    data = bytearray(shard.read_bytes())
    at = data.index(b"IHDR")
    data[at + 2] ^= 1
    shard.write_bytes(bytes(data))
    found = evaluate_run(tiny_run(folder, reads=True))
    assert found["samples"]["pair"] == PAIRS - 1
    assert len(found["skipped"]) == 1 and "0000" in found["skipped"][0]


def test_data_without_the_split_is_refused_by_name(world):
    with pytest.raises(InputError, match="no test split"):
        evaluate_run(tiny_run(world), split="test")


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="no checkpoint"):
        load_run(tmp_path, "cpu", lambda text: None)


def test_without_a_visual_tokenizer_only_words_are_asked(world):
    found = evaluate_run(tiny_run(world, visual=False))
    assert set(found["objectives"]) == {"mlm", "mvlm_text"}
    assert "patches" not in found
    json.dumps(found)


def test_attribute_words_come_from_the_data_folder_alone(tmp_path):
    folder = write_world(tmp_path)
    dataset = Dataset.open(folder)
    Dataset.write(folder, dataset.name, dataset.sources, {})
    assert "attributes" not in evaluate_run(tiny_run(folder, reads=True))
