"""`vlbeit.load` and `vlbeit predict`: the same answers as `vlbeit eval`, from any kind of input."""

import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vlbeit
from test_transforms import CASES
from tiny_run import caption_of, grey_png, tiny_run, write_world
from tiny_tasks import CONFIGS, batch_of, block_picture, toy_task
from tiny_tasks import write_tasks as write_other_tasks
from toy_run import training_here
from toy_tasks import VAL, toy_finetune, write_start, write_tasks
from untrained_run import COLOURS, noise, png, retrieval, untrained
from vlbeit.cli import main
from vlbeit.config import RetrievalConfig
from vlbeit.data.dataset import open_sources
from vlbeit.data.order import Visit
from vlbeit.data.records import BadSample, RecordSource, write_shards
from vlbeit.data.streams import ImageStream, PictureSettings
from vlbeit.data.transforms import BadImage, decode_image
from vlbeit.errors import ConfigError, InputError, VLBeitError
from vlbeit.eval.downstream import TaskRun, held_out_stream, predict_rows
from vlbeit.eval.drawing import (
    DISTINCT,
    class_colour,
    draw_answers,
    draw_classes,
    draw_confusion,
    draw_ranked,
)
from vlbeit.eval.fill import fill_patches, fill_words, hide_share, open_picture
from vlbeit.eval.heldout import visits_of
from vlbeit.nn.upernet import resize
from vlbeit.serve.predictor import (
    BATCH,
    MODES,
    PRETRAINING,
    Answer,
    Predictor,
    Relation,
    command_for,
    largest_at,
    read_picture,
)
from vlbeit.tasks.entailment import CLASSES
from vlbeit.tasks.retrieval_index import Index


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data") / "shades")


@pytest.fixture(scope="module")
def other_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statements, entailment and segmentation."""
    return write_other_tasks(tmp_path_factory.mktemp("data") / "blocks")


# ------------------------------------------------------------------ as in evaluation


@pytest.mark.parametrize("task", ["classification", "vqa"])
def test_a_run_answers_as_its_evaluation_does(task, data):
    run = untrained(task, data)
    assert isinstance(run.run, TaskRun)
    stream = held_out_stream(run.run.config, run.run.task, run.run.text, "val")
    rows = predict_rows(
        run.run.task, run.model, run.run.head, stream, visits_of(stream, 0), size=7,
        device=run.run.device, bad=[],
    )  # fmt: skip
    source = open_sources([data], f"task:{task}", "val")[0]
    pictures = [source.read(int(row["record"].split(":")[1])).image() for row in rows]
    assert len(pictures) > BATCH or task == "classification"
    if task == "vqa":
        found = run.answer(pictures, [row["question"] for row in rows], top=1)
        expected = [(row["answer"], row["probability"]) for row in rows]
    else:
        found = run.classify(pictures, top=1)
        expected = [(COLOURS[row["top"][0]], row["probabilities"][0]) for row in rows]
    assert len(found) == len(rows) == VAL * (2 if task == "vqa" else 1)
    assert [one[0].name for one in found] == [name for name, _ in expected]
    assert [one[0].probability for one in found] == pytest.approx([p for _, p in expected])
    assert len({one[0].probability for one in found}) > 3


def test_candidates_are_sorted_and_classes_share_one_probability(data):
    found = untrained("classification", data).classify(noise(0))
    assert sum(one.probability for one in found) == pytest.approx(1)
    assert [one.probability for one in found] == sorted((p for _, p in found), reverse=True)
    assert {one.name for one in found} == set(COLOURS)
    assert untrained("classification", data).classify(noise(0), top=2) == found[:2]


def test_words_and_patches_are_filled_as_by_the_functions_of_eval(tmp_path):
    loaded = tiny_run(write_world(tmp_path))
    run = Predictor(loaded, "d" * 64)
    data = grey_png(80)
    picture = open_picture(loaded, data)
    text = caption_of(1).replace("now", "[MASK]").replace("look", "[MASK]")
    assert "[MASK]" in text and run.modes == MODES[PRETRAINING]
    assert run.fill_words(text, data) == fill_words(loaded, text, picture)
    assert run.fill_words(text) != run.fill_words(text, data)
    one = run.fill_patches(data, 0.5, "red ring", seed=3)
    other = fill_patches(loaded, picture, hide_share(loaded, 0.5, 3), "red ring")
    assert (one.hidden == other.hidden).all() and (one.filled == other.filled).all()
    assert ((one.probabilities < 1) == one.hidden).all() and (one.probabilities > 0).all()
    with pytest.raises(InputError, match=r"has no \[MASK\]"):
        run.fill_words("red ring")


# ------------------------------------------------------------------ inputs


def test_a_picture_is_the_same_in_every_form(data, tmp_path):
    run = untrained("classification", data)
    pixels = noise(1)
    (tmp_path / "a.png").write_bytes(png(pixels))
    opaque = np.concatenate([pixels, np.full((*pixels.shape[:2], 1), 255, np.uint8)], axis=2)
    forms = [
        tmp_path / "a.png", str(tmp_path / "a.png"), png(pixels), Image.fromarray(pixels),
        pixels, opaque,
    ]  # fmt: skip
    found = [run.classify(form) for form in forms]
    assert all(one == found[0] for one in found)
    assert found[0] != run.classify(noise(2))
    for one in run.classify(forms):  # several at a time change rounding only
        assert [a.name for a in one] == [a.name for a in found[0]]
        assert [a.probability for a in one] == pytest.approx([a.probability for a in found[0]])
    grey = noise(1)[..., 0]
    assert run.classify(grey) == run.classify(np.stack([grey] * 3, axis=-1))


def test_a_pil_image_passes_the_rules_of_the_decoder():
    """Rotation by EXIF, transparency over white, 16-bit grey: as from its bytes."""
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(0)).save(file, "JPEG", exif=exif)
    clear = np.dstack([noise(1), noise(2)[..., 0]])
    deep = io.BytesIO()
    Image.fromarray(noise(3)[..., 0].astype(np.uint16) * 257).save(deep, "PNG")
    for encoded in (file.getvalue(), png(clear), deep.getvalue()):
        opened = Image.open(io.BytesIO(encoded))
        assert (read_picture(opened) == decode_image(encoded)).all()
    assert read_picture(Image.open(io.BytesIO(file.getvalue()))).shape == (29, 24, 3)
    assert (read_picture(clear) == decode_image(png(clear))).all()


@pytest.mark.parametrize(
    ("given", "error", "named"),
    [
        ("/nowhere/a.png", InputError, "/nowhere/a.png: cannot be read"),
        (b"<html>", InputError, "the bytes given: not_an_image"),
        (noise(0) / 255, ConfigError, r"found \(24, 29, 3\) float64"),
        (noise(0).transpose(2, 0, 1), ConfigError, r"found \(3, 24, 29\)"),
        (np.zeros((0, 4, 3), np.uint8), ConfigError, r"found \(0, 4, 3\)"),
        (7, ConfigError, "found int"),
    ],
)
def test_what_is_no_picture_is_named(given, error, named, data):
    with pytest.raises(error, match=named):
        untrained("classification", data).classify(given)


def test_a_single_one_goes_with_all_of_a_list(data):
    run = untrained("vqa", data)
    pictures, questions = [noise(0), noise(1)], ["say red", "which colour is here"]
    alone = [run.answer(p, q) for p, q in zip(pictures, questions, strict=True)]
    together = run.answer(pictures, questions)
    for one, other in zip(alone, together, strict=True):  # padding changes rounding only
        assert [a.name for a in one] == [a.name for a in other]
        assert [a.probability for a in one] == pytest.approx([a.probability for a in other])
    assert [one[0].name for one in run.answer(noise(0), tuple(questions))][0] == alone[0][0].name
    assert len(run.answer(pictures, "say red", top=1)[1]) == 1
    assert run.answer([], "say red") == []
    with pytest.raises(ConfigError, match="lists of 2 and 3"):
        run.answer(pictures, ["a"] * 3)
    with pytest.raises(InputError, match="the text ' '"):
        run.answer(noise(0), " ")
    with pytest.raises(ConfigError, match="expected a text, found int"):
        run.answer(noise(0), 3)  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="top must be at least 1"):
        run.answer(noise(0), "say red", top=0)


# ------------------------------------------------------------------ hidden patches


def test_hidden_patches_are_a_share_or_numbers_or_bools(tmp_path):
    run = Predictor(tiny_run(write_world(tmp_path)), "d" * 64)
    picture = grey_png(80)
    by_number = run.fill_patches(picture, [1, 6, 15], "red ring")
    where = np.zeros((4, 4), dtype=bool)
    where[0, 1] = where[1, 2] = where[3, 3] = True
    for same in (where, where.reshape(-1), np.array([15, 6, 1, 6]), (1, 6, 15)):
        found = run.fill_patches(picture, same, "red ring")
        assert (found.hidden == where.reshape(-1)).all()
        assert (found.filled == by_number.filled).all()
    assert run.fill_patches(picture, hidden=0.25).hidden.sum() == 4
    for wrong, named in (
        (1.5, r"in \(0, 1\], found 1.5"),
        (0, r"in \(0, 1\], found 0"),
        ([3, 16], r"0\.\.15 \(4 rows of 4\), found 16"),
        ([-1, 3], "found -1"),
        ([0.5], "float64"),
        (np.zeros((2, 8), dtype=bool), r"found \(2, 8\)"),
        ("all", "a share, a list"),
    ):
        with pytest.raises(ConfigError, match=named):
            run.fill_patches(picture, wrong)
    for nothing in ([], where & False):
        with pytest.raises(InputError, match="no patch is hidden"):
            run.fill_patches(picture, nothing)


# ------------------------------------------------------------------ vectors and attention


@pytest.fixture
def pretrained(tmp_path) -> Predictor:
    return Predictor(tiny_run(write_world(tmp_path)), "d" * 64)


def test_vectors_alone_are_those_of_a_list_and_have_length_one(pretrained, data):
    pictures = [noise(seed) for seed in range(3)]
    texts = ["red", "green ring look here now", "blue star"]
    for run in (pretrained, retrieval(data)):
        calls: list[tuple[Any, tuple[Any, ...]]] = [
            (run.encode_image, (pictures,)),
            (run.encode_text, (texts,)),
            (run.encode_pair, (pictures, texts)),
        ]
        for ask, given in calls:
            together = ask(*given)
            assert together.shape == (3, run.model.config.width)
            assert together.dtype == np.float32
            assert np.linalg.norm(together, axis=1) == pytest.approx(1)
            assert np.abs(together[0] - together[1]).max() > 1e-3
            for i, vector in enumerate(together):
                alone = ask(*(column[i] for column in given))
                assert alone.shape == vector.shape
                np.testing.assert_allclose(alone, vector, atol=1e-5)
                raw = ask(*(column[i] for column in given), normalised=False)
                length = np.linalg.norm(raw)
                assert abs(length - 1) > 1e-2
                np.testing.assert_allclose(raw / length, alone, atol=1e-5)
            assert ask(*([] for _ in given)).shape == (0, run.model.config.width)


def test_a_pretrained_vector_is_the_mean_over_patches_and_words_without_the_specials(pretrained):
    run, text = pretrained.run, "red ring look"
    pixels = torch.from_numpy(open_picture(run, png(noise(0))))[None]
    ids = torch.tensor([[run.text.cls, *run.text.encode(text).tolist(), run.text.sep]])
    with torch.no_grad():
        image = run.model.backbone(run.model.embed_image(pixels))[0, 1:]
        words = run.model.backbone(run.model.embed_text(ids))[0, 1:-1]
        pair = run.model.backbone(run.model.embed_pair(ids, None, pixels))[0]
    width = ids.shape[1]
    wanted = torch.cat((pair[1 : width - 1], pair[width + 1 :])).mean(dim=0)
    with_specials = pair.mean(dim=0)
    raw = {"normalised": False}
    close = {"atol": 1e-5, "rtol": 1e-4}
    np.testing.assert_allclose(pretrained.encode_image(noise(0), **raw), image.mean(0), **close)
    np.testing.assert_allclose(pretrained.encode_text(text, **raw), words.mean(0), **close)
    np.testing.assert_allclose(pretrained.encode_pair(noise(0), text, **raw), wanted, **close)
    assert (with_specials - wanted).abs().max() > 1e-2
    with pytest.raises(InputError, match="no token is left"):
        pretrained.encode_text("  ")
    with pytest.raises(ConfigError, match="expected a text, found int"):
        pretrained.encode_text(3)  # type: ignore[arg-type]


def test_vectors_of_a_retrieval_run_are_those_of_its_index_and_their_product_its_cosine(data):
    run = retrieval(data)
    pictures, texts = [noise(seed) for seed in range(3)], ["say red", "say blue", "red"]
    images, words = run.encode_image(pictures), run.encode_text(texts)
    index = run.index(images=pictures, ids=["a", "b", "c"])
    np.testing.assert_allclose(images, index.vectors.numpy(), atol=1e-6)
    found = run.match(pictures, texts)
    assert (images * words).sum(axis=1) == pytest.approx([one.similarity for one in found])
    pair = run.encode_pair(pictures[0], texts[0], normalised=False)
    logits = run.run.head.match(torch.from_numpy(pair)[None]).detach()
    assert float(logits.softmax(-1)[0, 1]) == pytest.approx(found[0].probability, abs=1e-5)


def test_the_vector_of_a_classification_run_is_what_its_head_reads(data):
    run = untrained("classification", data)
    vector = torch.from_numpy(run.encode_image(noise(0), normalised=False))
    shares = run.run.head(vector[None])[0].softmax(-1).detach().numpy()
    for answer in run.classify(noise(0)):
        assert shares[COLOURS.index(answer.name)] == pytest.approx(answer.probability, abs=1e-5)


def test_attention_of_a_word_is_the_softmax_of_its_products_with_every_key(pretrained):
    """Against loops over heads and keys, with the projections taken apart by hand."""
    run, text, layer = pretrained.run, "red [MASK] look", 3
    found = pretrained.attention(noise(0), text, layer)
    assert found.words == ["[T_CLS]", "red", "[MASK]", "look", "[T_SEP]"]
    assert found.grid == (4, 4) and found.weights.shape == (5, 16) and found.layer == layer
    red, look = (int(run.text.encode(word)[0]) for word in ("red", "look"))
    ids = torch.tensor([[run.text.cls, red, run.text.mask, look, run.text.sep]])
    pixels = torch.from_numpy(open_picture(run, png(noise(0))))[None]
    with torch.no_grad():
        states = run.model.embed_pair(ids, None, pixels)
        x = run.model.backbone.taps(states, [layer - 1])[0]
        block = run.model.backbone.blocks[layer - 1]
        x = block.norm1(x)[0]
        attention = block.attention
        width = x.shape[1]
        query = x @ attention.qkv.weight[:width].T + attention.q_bias
        key = x @ attention.qkv.weight[width : 2 * width].T  # no bias: softmax cancels it
    heads, depth = attention.heads, width // attention.heads
    expected = np.zeros((5, len(x)))
    swapped = np.zeros((5, len(x)))
    for head in range(heads):
        part = slice(head * depth, (head + 1) * depth)
        for word in range(5):
            for into, (ask, told) in ((expected, (query, key)), (swapped, (key, query))):
                scores = np.array([float(ask[word, part] @ k[part]) for k in told]) / depth**0.5
                shares = np.exp(scores - scores.max())
                into[word] += shares / shares.sum() / heads
    np.testing.assert_allclose(found.weights, expected[:, -16:], atol=1e-6)
    assert np.abs(found.weights - swapped[:, -16:]).max() > 1e-3
    assert (found.weights.sum(axis=1) < 1).all()


def test_attention_by_rollout_multiplies_the_layers_with_half_on_the_residual(pretrained):
    run = pretrained.run
    found = pretrained.attention(noise(0), "red ring")
    pixels = torch.from_numpy(open_picture(run, png(noise(0))))[None]
    ids = torch.tensor([[run.text.cls, *run.text.encode("red ring").tolist(), run.text.sep]])
    with torch.no_grad():
        layers = run.model.backbone.attention_weights(run.model.embed_pair(ids, None, pixels))
    reached = np.eye(layers[0].shape[-1])
    backwards = np.eye(len(reached))
    for layer in layers:
        mixed = 0.5 * layer[0].double().mean(dim=0).numpy() + 0.5 * np.eye(len(reached))
        reached, backwards = mixed @ reached, backwards @ mixed
    np.testing.assert_allclose(found.weights, reached[:4, -16:], atol=1e-6)
    assert np.abs(found.weights - backwards[:4, -16:]).max() > 1e-4
    assert found.layer == "rollout"


def test_attention_of_a_list_is_that_of_each_and_a_layer_that_is_not_there_is_named(
    pretrained, data
):
    for run in (pretrained, untrained("vqa", data)):
        each = run.attention([noise(0), noise(1)], "red")
        for one, seed in zip(each, (0, 1), strict=True):
            assert (one.weights == run.attention(noise(seed), "red").weights).all()
        assert (each[0].weights != each[1].weights).any()
        layers = run.model.config.layers
        for wrong in (0, layers + 1, True, "last"):
            with pytest.raises(ConfigError, match=rf"1\.\.{layers} or 'rollout', found {wrong!r}"):
                run.attention(noise(0), "red", wrong)


# ------------------------------------------------------------------ the same pixels everywhere


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_hand_made_pictures_are_the_same_pixels_in_training_evaluation_and_here(tmp_path):
    """D03: three callers bit-equal, and refused for the same reason where they are refused."""
    loaded = tiny_run(write_world(tmp_path / "world"))
    run = Predictor(loaded, "d" * 64)
    records = ((f"{i:04d}", {"png": data}) for i, (_, data, _) in enumerate(CASES))
    shards = [str(path) for path in write_shards(records, tmp_path, "made", 100)]
    config = loaded.config
    pictures = PictureSettings(
        image_size=config.model.image_size,
        patch=config.model.patch,
        crop=config.input.images,
        masking=config.masking,
    )
    stream = ImageStream([RecordSource("made", shards)], seed=0, pictures=pictures)
    seen = set()
    for i, (name, data, wanted) in enumerate(CASES):
        (tmp_path / "file").write_bytes(data)
        if isinstance(wanted, str):
            with pytest.raises(BadSample) as trained:
                stream.sample(Visit("made", 0, i))
            with pytest.raises(BadImage) as evaluated:
                open_picture(loaded, data)
            for form in (data, tmp_path / "file"):
                with pytest.raises(InputError, match=f": {evaluated.value.reason}: "):
                    run.encode_image(form)
            assert trained.value.reason == evaluated.value.reason, name
            continue
        trained_on = stream.sample(Visit("made", 0, i)).pixels
        assert (open_picture(loaded, data) == trained_on).all(), name
        for form in (data, tmp_path / "file", str(tmp_path / "file")):
            found = run.fill_patches(form, [0])
            assert (found.picture.transpose(2, 0, 1) == trained_on).all(), name
        seen.add(trained_on.tobytes())
    assert len(CASES) >= 40 and len(seen) > 12


# ------------------------------------------------------------------ modes


CALLS: dict[str, tuple[Any, ...]] = {
    "encode_image": (noise(0),),
    "encode_text": ("red",),
    "encode_pair": (noise(0), "red"),
    "attention": (noise(0), "red"),
    "fill_words": ("a [MASK]",),
    "fill_patches": (noise(0),),
    "classify": (noise(0),),
    "answer": (noise(0), "say red"),
    "compare": (noise(0), noise(1), "red"),
    "match": (noise(0), "red"),
    "index": (),
    "search": (None,),
    "rerank": ([],),
    "entail": (noise(0), "red"),
    "segment": (noise(0),),
}


@pytest.mark.parametrize("task", MODES)
def test_a_mode_that_a_run_lacks_names_the_command_that_makes_one(task, data, tmp_path):
    if task == PRETRAINING:
        run = Predictor(tiny_run(write_world(tmp_path)), "")
    else:
        run = untrained(task, data)
    assert run.trained_for == task and run.modes == MODES[task]
    makers: dict[str, str] = {}
    for other, methods in MODES.items():
        for method in methods:
            makers.setdefault(method, other)  # pretraining comes first
    for method, other in makers.items():
        command = "vlbeit pretrain" if other == PRETRAINING else f"vlbeit finetune {other} --start"
        assert command_for(method).startswith(command)
        if method not in MODES[task]:
            with pytest.raises(ConfigError, match=f"no {method}; .*`{command}"):
                getattr(run, method)(*CALLS[method])
    assert task in repr(run) and all(mode in repr(run) for mode in run.modes)
    assert set(CALLS) == set(makers)


def test_a_run_that_never_read_pictures_or_pairs_says_so(data, tmp_path):
    words = Predictor(tiny_run(write_world(tmp_path), visual=False), "")
    assert words.modes == ("fill_words", "encode_text")
    dual = retrieval(data, matching=0)
    assert set(MODES["retrieval"]) - set(dual.modes) == {"rerank", "encode_pair", "attention"}
    for run in (words, dual):
        for method in ("encode_pair", "attention"):
            with pytest.raises(ConfigError, match=f"no {method}; .*`vlbeit pretrain"):
                getattr(run, method)(*CALLS[method])


def test_a_statement_is_judged_as_by_the_task(data):
    run = untrained("statements", data)
    found = run.compare(noise(0), [noise(1), noise(2)], "say red")
    assert [one.true for one in found] == [one.probability > 0.5 for one in found]
    assert run.compare(noise(0), noise(1), "say red").probability == pytest.approx(
        found[0].probability
    )
    assert run.compare(noise(1), noise(0), "say red").probability != found[0].probability


def test_a_sentence_is_judged_as_by_the_task(other_data):
    run = untrained("entailment", other_data)
    _, stream, _ = toy_task("entailment", other_data, training=False)
    batch = batch_of(stream, "entailment", [0, 1, 2])
    expected = run.run.task.predict(run.model, run.run.head, batch)
    source = open_sources([other_data], "task:entailment", "train")[0]
    records = [source.read(i) for i in range(3)]
    said = [json.loads(record.members["json"])["hypothesis"] for record in records]
    found = run.entail([record.image() for record in records], said)
    for one, row in zip(found, expected, strict=True):
        assert tuple(one) == pytest.approx(row["probabilities"]) and sum(one) == pytest.approx(1)
        assert one.label == CLASSES[row["answer"]]
    assert run.entail(records[0].image(), said[0]) == pytest.approx(found[0])
    assert Relation._fields == CLASSES


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_a_map_has_the_size_of_the_picture_and_the_pixels_that_evaluation_counts(mode, other_data):
    settings = replace(CONFIGS["segmentation"].segmentation, inference=mode, flip=True)
    run = untrained("segmentation", other_data, segmentation=settings)
    _, stream, _ = toy_task("segmentation", other_data, training=False)
    pictures = [block_picture(i)[0] for i in range(3)]
    found = run.segment(pictures)
    for i, one in enumerate(found):
        batch = batch_of(stream, "segmentation", [i])
        row = run.run.task.predict(run.model, run.run.head, batch)[0]
        counted = one.classes[2:]  # the first rows of these maps are of no class
        assert one.classes.shape == pictures[i].shape[:2] and one.classes.dtype == np.uint8
        assert np.bincount(counted.ravel(), minlength=3).tolist() == row["named"]
        assert [s.number for s in one.shares] == sorted(
            np.unique(one.classes), key=lambda n: -(one.classes == n).sum()
        )
        assert sum(s.share for s in one.shares) == pytest.approx(1)
        assert all(one.names[s.number] == s.name for s in one.shares)
    assert (run.segment(png(pictures[0])).classes == found[0].classes).all()
    assert len({s.number for one in found for s in one.shares}) > 1


def test_the_largest_class_is_that_of_all_classes_at_once(gen):
    shares = torch.randn(7, 5, 6, generator=gen).softmax(dim=0)
    for size in ((5, 6), (13, 31), (3, 2)):
        expected = resize(shares[None], size)[0].argmax(dim=0)
        assert torch.equal(largest_at(shares, size).long(), expected)


def test_reranking_orders_by_the_fused_pass_and_keeps_what_was_found(data):
    run = retrieval(data)
    pictures = {f"p{i}": noise(i) for i in range(6)}
    index = run.index(images=[*pictures.values()], ids=[*pictures])
    found = run.search(index, text="say red", top=4)
    again = run.rerank(found, text="say red", read=pictures.__getitem__)
    assert {one.id for one in again} == {one.id for one in found}
    for one in again:
        match = run.match(pictures[one.id], "say red")
        assert one.similarity == pytest.approx(match.similarity, abs=1e-5)
        assert one.probability == pytest.approx(match.probability, rel=1e-4)
    texts = ["say red", "which colour is here", "say blue"]
    back = run.search(run.index(texts=texts), image=pictures["p0"], top=3)
    backwards = run.rerank(back, image=pictures["p0"])
    shares = [run.match(pictures["p0"], one.id).probability for one in backwards]
    assert [one.probability for one in backwards] == pytest.approx(shares, rel=1e-4)
    alone = RetrievalConfig(matching=1.0, rerank=3, rule="matching")
    by_logit = untrained("retrieval", data, retrieval=alone)
    logits = by_logit.rerank(back, image=pictures["p0"])
    assert {one.id for one in logits} == set(texts)
    assert run.rerank([], text="say red") == []
    with pytest.raises(ConfigError, match="one text or picture of the query"):
        run.rerank(found)
    dual = retrieval(data, matching=0)
    assert "rerank" not in dual.modes
    with pytest.raises(ConfigError, match="no matching head"):
        dual.rerank(found, text="say red", read=pictures.__getitem__)


def test_matches_and_searches_are_those_of_all_pairs(data, tmp_path):
    run = retrieval(data)
    pictures = [noise(seed) for seed in range(5)]
    texts = ["say red", "which colour is here", "say blue"]
    found = [run.match(pictures, text) for text in texts]
    similar = np.array([[one.similarity for one in row] for row in found])  # (texts, pictures)
    names = [f"p{i}" for i in range(5)]
    index = run.index(images=pictures, ids=names)
    index.save(tmp_path / "index")
    for row, text in enumerate(texts):
        hits = run.search(Index.load(tmp_path / "index"), text=text, top=3)
        order = np.argsort(-similar[row], kind="stable")[:3]
        assert [hit.id for hit in hits] == [names[place] for place in order]
        assert [hit.similarity for hit in hits] == pytest.approx(similar[row][order], abs=1e-5)
    back = run.search(run.index(texts=texts), image=pictures[2])
    assert [hit.id for hit in back] == [texts[i] for i in np.argsort(-similar[:, 2])]
    shares = [one.probability for row in found for one in row]
    assert all(share is not None and 0 < share < 1 for share in shares) and len(set(shares)) > 9
    assert retrieval(data, matching=0).match(pictures[0], "say red").probability is None
    for wrong in ({"image": noise(0)}, {}, {"text": "a", "image": noise(0)}):
        with pytest.raises(ConfigError, match="an index of images is searched with one text"):
            run.search(index, **wrong)
    with pytest.raises(InputError, match="was made by the model"):
        Predictor(run.run, "e" * 64).search(index, text="say red")
    for given in ({}, {"images": []}, {"images": pictures, "texts": texts}):
        with pytest.raises(ConfigError, match="give one list"):
            run.index(**given)
    with pytest.raises(ConfigError, match="as many different ids"):
        run.index(texts=["a", "a"])


# ------------------------------------------------------------------ drawing


def test_bars_are_as_long_as_their_probabilities():
    bars = [Answer("a", 0.8), Answer("b", 0.2), Answer("c", 0.0)]
    sheet = np.asarray(draw_answers([noise(0)], "what is it?", bars)).astype(int)
    blue = (np.abs(sheet - [0x1F, 0x6F, 0xEB]).sum(-1) < 3).sum()
    pale = (np.abs(sheet - [0x9B, 0xB8, 0xE0]).sum(-1) < 3).sum()
    assert pale / blue == pytest.approx(0.25, abs=0.03)
    wide = draw_answers([noise(0), noise(1)], "long " * 200, [Answer("x" * 300, 1.0)])
    assert wide.width > 2 * 320 and wide.height < 600
    assert draw_answers([noise(0)], "", []).height > 320


def test_a_class_map_is_drawn_in_the_colours_of_its_legend():
    classes = np.zeros((24, 29), dtype=np.uint8)
    classes[:, 20:] = 2
    black = np.zeros((24, 29, 3), dtype=np.uint8)
    shares = [("ground", 0, 20 / 29), ("green", 2, 9 / 29)]
    sheet = np.asarray(draw_classes(black, classes, shares)).astype(int)
    over = [(np.abs(sheet - 0.55 * np.array(class_colour(n))).sum(-1) < 3).sum() for n in (0, 2)]
    assert over[1] / over[0] == pytest.approx(9 / 20, abs=0.05)
    for number in (0, 2):
        assert (sheet == class_colour(number)).all(-1).sum() > 200  # the legend
    many = [(f"class {n}", n, 1 / 150) for n in range(150)]
    assert draw_classes(black, classes, many).height < 500
    assert len({class_colour(n) for n in range(256)}) == 256 > len(DISTINCT)


def test_ranked_pictures_stand_in_rows_of_five():
    lines = ["a-very-long-name-of-a-file-that-does-not-fit-below-it.jpg", "cosine 0.5"]
    five = draw_ranked([noise(i) for i in range(5)], "a query", [lines] * 5)
    six = draw_ranked([noise(i) for i in range(6)], "a query", [lines] * 6)
    assert five.width == six.width and six.height > 1.5 * five.height


def test_a_confusion_matrix_is_darker_where_more_are():
    counts = np.array([[8, 2], [0, 10]])
    sheet = np.asarray(draw_confusion(["cat", "dog"], counts)).astype(int)
    red = (np.abs(sheet - sheet.reshape(-1, 3)[0]).sum(-1) > 0) & (sheet[..., 0] > sheet[..., 2])
    blue = (sheet == (31, 111, 235)).all(-1)
    assert blue.sum() > 1000 and red.sum() > 1000  # all dogs; two cats
    assert draw_confusion([str(n) for n in range(200)], np.eye(200, dtype=int)).width < 1100


# ------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with runs: start, vqa, classification."""
    folder = tmp_path_factory.mktemp("runs")
    with training_here(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLBEIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        start = write_start(folder / "start", data)
        for task in ("vqa", "classification"):
            toy_finetune(task, start, data, folder / task, {"max_steps": 2, "save_every": 2})
    yield folder


def test_the_command_says_what_python_says(trained, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(grey_png(80))
    asked = ["--image", str(tmp_path / "a.png"), "--device", "cpu"]
    words = ["predict", str(trained / "vqa"), *asked, "--question", "say red"]
    out = tmp_path / "drawn.png"
    assert main([*words, "--json", "--top", "3", "--out", str(out)]) == 0
    said = json.loads(capsys.readouterr().out)
    expected = vlbeit.load(trained / "vqa", "cpu").answer(tmp_path / "a.png", "say red", top=3)
    assert [tuple(row.values()) for row in said["answers"]] == [tuple(one) for one in expected]
    assert said["trained_for"] == "vqa" and said["picture"] == str(out)
    with Image.open(out) as sheet:
        assert sheet.height > 320
    assert main(["predict", str(trained / "classification"), *asked]) == 0
    shown = capsys.readouterr().out
    best = vlbeit.load(trained / "classification").classify(tmp_path / "a.png")[0]
    assert best.name in shown and f"{100 * best.probability:.1f} %" in shown
    assert main(["predict", str(trained / "start"), "--text", "say [MASK]"]) == 0
    assert "[MASK] 1:" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "drawn.png"]


@pytest.mark.parametrize(
    ("run", "words", "named"),
    [
        ("vqa", ["--text", "say [MASK]"], "--text: .* takes --image, --question"),
        ("vqa", ["--image", "a.png"], "give --question"),
        ("classification", ["--image", "a.png", "--hide", "0.4"], "--hide: .* takes --image"),
        ("start", ["--image", "a.png", "--question", "q"], "--question: .* takes --image, --text"),
        ("start", ["--text", "nothing hidden"], "nothing is hidden"),
        ("start", [], "nothing to predict"),
    ],
)
def test_what_a_run_would_not_look_at_is_refused(run, words, named, trained, capsys):
    assert main(["predict", str(trained / run), *words]) == ConfigError.exit_code
    assert re.search(named, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("task", "words", "key", "size"),
    [
        ("statements", ["a.png", "--right", "b.png", "--statement", "red"], "answers", (680, 340)),
        ("entailment", ["a.png", "--hypothesis", "it is dark"], "answers", (730, 340)),
        ("segmentation", ["a.png"], "classes", (900, 340)),
        ("retrieval", ["a.png", "b.png", "--text", "say red"], "pictures", (400, 200)),
    ],
)
def test_a_run_of_every_task_is_asked_and_drawn(
    task, words, key, size, data, other_data, tmp_path, monkeypatch, capsys
):
    made = retrieval(data) if task == "retrieval" else untrained(task, other_data)
    monkeypatch.setattr("vlbeit.serve.predict.load", lambda *_: made)
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        Path(name).write_bytes(png(noise(ord(name[0]))))
    words = ["predict", "RUN", "--out", "drawn.png", "--image", *words]
    assert main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["trained_for"] == task and said["picture"] == "drawn.png" and len(said[key]) > 0
    with Image.open("drawn.png") as sheet:
        assert sheet.width >= size[0] and sheet.height >= size[1]
    assert main(words) == 0
    assert "drawn in drawn.png" in capsys.readouterr().out
    if task != "retrieval":
        assert main([*words, "--image", "a.png", "b.png"]) == ConfigError.exit_code
        assert "looks at one picture, found 2" in capsys.readouterr().err


def test_files_that_cannot_be_read_or_written_are_named(trained, tmp_path, capsys):
    words = ["predict", str(trained / "classification"), "--image"]
    assert main([*words, str(tmp_path / "no.png")]) == InputError.exit_code
    assert "no.png: cannot be read" in capsys.readouterr().err
    (tmp_path / "a.png").write_bytes(grey_png(80))
    assert main([*words, str(tmp_path / "a.png"), "--out", str(tmp_path / "no" / "b.png")]) == 73
    with pytest.raises(VLBeitError, match="no checkpoint here"):
        vlbeit.load(tmp_path)
