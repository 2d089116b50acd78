"""Filling in: words come from the vocabulary, patches from the codes, panels hold their place."""

import numpy as np
import pytest
import torch

from tiny_run import Shades, tiny_run, write_world
from vlbeit.errors import InputError
from vlbeit.eval.examples import pair_examples, spelt
from vlbeit.eval.fill import (
    HIDDEN_GREY,
    draw_filled,
    fill_patches,
    fill_words,
    guess_words,
    hidden_pixels,
    hide_share,
    masked_ids,
    open_picture,
    panels,
)
from vlbeit.eval.heldout import batches_of, held_out_streams, visits_of
from vlbeit.eval.scoring import image_rows, pair_patch_rows, pair_word_rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(write_world(tmp_path_factory.mktemp("world")))


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)


# --- words ---------------------------------------------------------------------------------------


def test_the_mask_stands_where_the_text_says_so(run):
    words = run.text
    red, ring = (int(words.encode(word)[0]) for word in ("red", "ring"))
    assert masked_ids(run, "red [MASK] ring").tolist() == [
        words.cls, red, words.mask, ring, words.sep,
    ]  # fmt: skip
    assert masked_ids(run, "[MASK][MASK] red").tolist() == [
        words.cls, words.mask, words.mask, red, words.sep,
    ]  # fmt: skip
    assert masked_ids(run, "red [MASK]").tolist() == [words.cls, red, words.mask, words.sep]


def test_candidates_are_words_in_falling_probability(run, picture):
    for given in (picture, None):
        filled = fill_words(run, "[MASK] ring [MASK]", given, top=4)
        assert len(filled.guesses) == 2
        for guesses in filled.guesses:
            values = [guess.probability for guess in guesses]
            assert len(guesses) == 4 and values == sorted(values, reverse=True)
            assert 0 < sum(values) <= 1 + 1e-6
            assert not any(guess.piece.startswith("[") for guess in guesses)


def test_all_candidates_together_have_probability_one(run, picture):
    (guesses,) = fill_words(run, "a [MASK]", picture, top=10_000).guesses
    assert len(guesses) == run.text.size - 5  # every piece that is not special
    assert sum(guess.probability for guess in guesses) == pytest.approx(1.0, abs=1e-5)


def test_the_best_text_holds_the_first_candidates(run, picture):
    filled = fill_words(run, "[MASK] ring [MASK]", picture)
    first, last = (guesses[0].piece for guesses in filled.guesses)
    assert filled.best() == f"{first} ring {last}"


def test_another_picture_may_change_the_words_and_no_picture_is_not_a_black_one(run, picture):
    def said(given):
        return [g.probability for g in fill_words(run, "red [MASK]", given).guesses[0]]

    black = np.zeros_like(picture)
    assert said(picture) == said(picture.copy())
    assert said(picture) != said(black) != said(None)


def test_a_person_is_told_the_same_words_as_the_evaluation_counts(run):
    stream = held_out_streams(run.config, run.text)["pair"]
    visits = visits_of(stream, 0)[:6]
    (batch,) = batches_of(stream, visits, 6)
    with torch.no_grad():
        rows = pair_word_rows(run.model, batch)
    asked = []
    for visit in visits:
        s = stream.sample(visit)
        found = guess_words(run, s.words_given, s.word_masked, s.pixels, top=1)
        asked += [guesses[0].piece for guesses in found]
    # Random weights also predict ids that are no words; only there may the two differ.
    words = (rows.predicted >= 5) & (rows.predicted < run.text.size)
    assert words.sum() > 3
    for place in np.flatnonzero(words):
        assert [asked[place]] == run.text.pieces([rows.predicted[place]])


def test_texts_that_cannot_be_filled_are_refused(run):
    with pytest.raises(InputError, match="nothing to fill"):
        fill_words(run, "red ring")
    with pytest.raises(InputError, match="at most 12"):
        fill_words(run, "[MASK] " + "red " * 20)


@pytest.mark.parametrize(
    ("piece", "kind", "expected"),
    [
        ("red", "wordpiece", ("red", True)),
        ("##s", "wordpiece", ("s", False)),
        ("\u2581red", "unigram", ("red", True)),
        ("s", "unigram", ("s", False)),
    ],
)
def test_pieces_are_spelt_without_the_vocabularys_marks(piece, kind, expected):
    assert spelt(piece, kind) == expected


# --- patches -------------------------------------------------------------------------------------


def test_the_hidden_share_is_exact_and_keyed_by_the_seed(run):
    for share in (0.25, 0.5, 1.0):
        assert hide_share(run, share).sum() == round(share * 16)
    assert (hide_share(run, 0.5, 1) == hide_share(run, 0.5, 1)).all()
    assert any((hide_share(run, 0.5, 1) != hide_share(run, 0.5, seed)).any() for seed in (2, 3, 4))


def test_only_hidden_patches_are_filled(run, picture):
    hidden = hide_share(run, 0.5)
    for text in ("red ring", None):
        filled = fill_patches(run, picture, hidden, text)
        assert (filled.filled[~hidden] == filled.answers[~hidden]).all()
        assert filled.right == int((filled.filled == filled.answers)[hidden].sum())


def test_the_filled_codes_are_those_that_the_evaluation_counts(run):
    stream = held_out_streams(run.config, run.text)["pair"]
    (batch,) = batches_of(stream, visits_of(stream, 0)[:1], 1)
    batch = batch.with_codes(run.visual.encode(batch.pixels))
    hidden = batch.patch_masked[0].numpy()
    text = run.text.decode(batch.words[0].tolist())
    with torch.no_grad():
        rows = {text: pair_patch_rows(run.model, batch), None: image_rows(run.model, batch)}
    for given, counted in rows.items():
        filled = fill_patches(run, batch.pixels[0].numpy(), hidden, given)
        assert filled.filled[hidden].tolist() == counted.predicted.tolist()
        assert filled.answers[hidden].tolist() == counted.answer.tolist()


def test_panels_change_the_hidden_patches_and_nothing_else(run, picture):
    hidden = hide_share(run, 0.4, 3)
    filled = fill_patches(run, picture, hidden, "red")
    shown, where = panels(filled), hidden_pixels(filled)
    assert where.sum() == hidden.sum() * 64
    for row in range(4):
        for column in range(4):
            patch = where[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            assert (patch == hidden[4 * row + column]).all()
    upright = picture.transpose(1, 2, 0)
    assert (shown["picture"] == upright).all()
    assert (shown["hidden"][where] == HIDDEN_GREY).all()
    for name in ("hidden", "filled in"):
        assert (shown[name][~where] == upright[~where]).all()
    decoded = Shades().decode(torch.from_numpy(filled.filled).view(1, 4, 4))[0]
    assert (shown["filled in"][where] == decoded.permute(1, 2, 0).numpy()[where]).all()
    assert (shown["codes decoded"] == decoded.permute(1, 2, 0).numpy()).all()


def test_the_sheet_holds_all_panels_side_by_side(run, picture):
    filled = fill_patches(run, picture, hide_share(run, 0.4), None)
    sheet = draw_filled(filled, "a caption", side=64)
    assert sheet.width >= 5 * 64 and sheet.height >= 64
    without = draw_filled(filled, side=64)
    assert without.height < sheet.height
    first = np.asarray(sheet)[22 : 22 + 64, 8 : 8 + 64]
    assert (first[::2, ::2] == filled.picture).all()  # enlarged without smoothing


def test_patches_need_a_tokenizer_and_something_hidden(run, picture):
    with pytest.raises(InputError, match="no patch is hidden"):
        fill_patches(run, picture, np.zeros(16, dtype=bool))
    blind = tiny_run(run.folder, visual=False)
    with pytest.raises(InputError, match="no visual tokenizer"):
        fill_patches(blind, picture, hide_share(run, 0.5))


def test_a_picture_of_any_shape_is_squashed_to_the_models_size(run):
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("L", (50, 20), 200).save(file, "PNG")
    assert open_picture(run, file.getvalue()).shape == (3, 32, 32)


# --- examples ------------------------------------------------------------------------------------


def test_examples_hide_what_the_evaluation_hides_and_judge_it_alike(run):
    reading = tiny_run(run.folder, reads=True)
    stream = held_out_streams(reading.config, reading.text)["pair"]
    examples = pair_examples(reading, stream, 8)
    assert len(examples) == 8
    for example, visit in zip(examples, visits_of(stream, 8), strict=True):
        sample = stream.sample(visit)
        hidden = [word for word in example.words if word.guess is not None]
        assert len(hidden) == sample.word_masked.sum()
        assert " ".join(word.text for word in example.words) == example.caption
        colour = example.words[0].text
        assert all(word.guess == colour for word in hidden)
        assert all(word.right == (word.text == colour) for word in hidden)
        assert (example.with_text.hidden == sample.patch_masked).all()
