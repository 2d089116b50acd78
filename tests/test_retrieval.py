"""Retrieval: both losses, the rows, reranking and the figures, each against a longer way."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import vlbeit
from tiny_models import fill_normal, tiny_model
from toy_records import CONFIG, pair_source, toy_tokenizer
from vlbeit.config import (
    CropConfig,
    ModelConfig,
    RetrievalConfig,
    RetrievalRun,
    TaskInputConfig,
)
from vlbeit.data.order import Visit
from vlbeit.data.records import BadSample
from vlbeit.data.task_stream import TaskStream
from vlbeit.errors import ConfigError
from vlbeit.nn.model import VLBeit
from vlbeit.tasks import reached
from vlbeit.tasks.contrast import START_LOG_SCALE, contrast, draw_hard, keyed_uniforms
from vlbeit.tasks.retrieval import (
    Retrieval,
    RetrievalHead,
    build,
    chance,
    match_scores,
)
from vlbeit.tasks.retrieval_index import Index
from vlbeit.train.gradients import fill_missing
from vlbeit.types import TaskBatch

SOURCE = Path(vlbeit.__file__).parents[1]
PAIRS, WIDTH = 6, 12


def task(seed: int = 0, **settings: object) -> Retrieval:
    config = RetrievalRun(
        recipe="toy",
        seed=seed,
        model=replace(CONFIG.model, drop_path=0.0),
        input=TaskInputConfig(
            crop=CropConfig(scale=(0.5, 1.0), flip=0.5, jitter=0.0), text_length=WIDTH
        ),
        retrieval=RetrievalConfig(**settings),
    )
    return build(config, {})


def ready(made: Retrieval, **changes: object) -> tuple[VLBeit, RetrievalHead]:
    """A tiny model with its head on, no tensor of either zero."""
    model = tiny_model(**changes)
    head = made.head(model, 0)
    fill_normal(head, seed=5)
    with torch.no_grad():
        head.log_scale.fill_(1.5)
    model.put_on(head)
    return model, head


def make_batch(images: tuple[int, ...] = (0, 1, 2, 0, 3, 4), draws: bool = False) -> TaskBatch:
    """Pairs of the given images, texts of several lengths."""
    gen = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (9, 3, 32, 32), generator=gen, dtype=torch.uint8)
    words = torch.randint(5, 50, (9, WIDTH), generator=gen)
    lengths = torch.tensor([12, 7, 9, 12, 5, 8, 6, 10, 11])
    valid = torch.arange(WIDTH)[None, :] < lengths[:, None]
    words[:, 0] = 2
    count = len(images)
    return TaskBatch(
        stream="task:retrieval",
        sample_ids=tuple(f"pairs:0:{i}" for i in range(count)),
        pixels=pixels[list(images)][:, None],
        words=words.masked_fill(~valid, 0)[:count],
        word_valid=valid[:count],
        targets={"image": torch.tensor(images) * 1000 + 7},
        depth_draws=torch.rand(count, 5, 8, generator=gen) if draws else None,
    )


def part_of(batch: TaskBatch, part: slice) -> TaskBatch:
    tensors = {n: v[part] for n, v in vars(batch).items() if isinstance(v, Tensor)}
    targets = {name: value[part] for name, value in batch.targets.items()}
    return replace(batch, sample_ids=batch.sample_ids[part], targets=targets, **tensors)


def alone(model: VLBeit, head: RetrievalHead, batch: TaskBatch, row: int) -> tuple[Tensor, Tensor]:
    """Vectors of one pair, by whole forward passes without padding."""
    words = batch.words[row : row + 1, batch.word_valid[row]]
    image = model.backbone(model.embed_image(batch.image()[row : row + 1]))[:, 0]
    text = model.backbone(model.embed_text(words))[:, 0]
    vectors = image @ head.image.weight.T, text @ head.text.weight.T
    return tuple(v[0] / v[0].norm() for v in vectors)


def fused_logit(
    model: VLBeit, head: RetrievalHead, batch: TaskBatch, text: int, image: int
) -> Tensor:
    """(2,): the matching logits of one text with one image."""
    words = batch.words[text : text + 1, batch.word_valid[text]]
    states = model.embed_pair(words, None, batch.image()[image : image + 1])
    fused = model.backbone(states)[0, 0]
    pooled = torch.tanh(head.pooler.weight @ fused + head.pooler.bias)
    return head.matching.weight @ pooled + head.matching.bias


# -- learning --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repeated", "hardness"), [("positives", 1.0), ("masked", 1.0), ("positives", 0.25)]
)
def test_both_losses_equal_their_definition_pair_by_pair(repeated, hardness):
    made = task(repeated=repeated, hardness=hardness)
    model, head = ready(made)
    batch = make_batch()
    found = made.score(model, head, batch)
    vectors = [alone(model, head, batch, row) for row in range(PAIRS)]
    images, texts = (torch.stack(side) for side in zip(*vectors, strict=True))
    expected = contrast(images, texts, head.log_scale, batch.targets["image"], repeated)
    assert torch.allclose(found["contrast"].loss_sum, expected.score.loss_sum, atol=1e-4)
    losses, right = [], 0
    rivals = {
        kind: draw_hard(logits, expected.same, keyed_uniforms(batch.sample_ids, 0, kind), hardness)
        for kind, logits in (
            ("hard text", expected.text_logits),
            ("hard image", expected.image_logits),
        )
    }
    for row in range(PAIRS):
        text, image = int(rivals["hard text"][row]), int(rivals["hard image"][row])
        assert batch.targets["image"][text] != batch.targets["image"][row]
        assert batch.targets["image"][image] != batch.targets["image"][row]
        for pair, label in (((row, row), 1), ((row, image), 0), ((text, row), 0)):
            logits = fused_logit(model, head, batch, *pair)
            losses.append(-logits.log_softmax(dim=0)[label])
            right += int(logits.argmax()) == label
    assert torch.allclose(found["matching"].loss_sum, torch.stack(losses).sum(), atol=1e-4)
    assert int(found["matching"].correct) == right
    assert {n: int(s.count) for n, s in found.items()} == made.count(batch)
    assert made.count(batch) == {"contrast": 12, "matching": 18}


def test_a_gradient_reaches_what_the_paths_say_and_nothing_else():
    for settings, with_matching in (({}, True), ({"matching": 0.0, "rerank": 0}, False)):
        made = task(**settings)
        model, head = ready(made)
        scores = made.score(model, head, make_batch())
        assert set(scores) == set(made.weights)
        sum(score.loss_sum for score in scores.values()).backward()
        touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert touched == set(reached(model, made.paths))
        assert any(".vl." in name for name in touched) == with_matching
        assert (head.pooler is not None) == with_matching


def test_a_batch_of_one_image_has_finite_losses_and_keeps_its_count():
    made = task()
    model, head = ready(made)
    for images in ((3,), (3, 3)):
        batch = make_batch(images)
        scores = made.score(model, head, batch)
        assert {n: int(s.count) for n, s in scores.items()} == made.count(batch)
        assert all(bool(score.loss_sum.isfinite()) for score in scores.values())


def test_depth_draws_of_all_five_passes_are_used():
    made = task()
    model, head = ready(made, drop_path=0.5)
    batch = make_batch(draws=True)
    first = made.score(model, head, batch)
    again = made.score(model, head, batch)
    for name in first:
        assert torch.equal(first[name].loss_sum, again[name].loss_sum)
    for forward in range(5):
        moved = batch.depth_draws.clone()
        moved[:, forward] = 1 - moved[:, forward]
        other = made.score(model, head, replace(batch, depth_draws=moved))
        assert other["matching"].loss_sum != first["matching"].loss_sum
        assert (other["contrast"].loss_sum != first["contrast"].loss_sum) == (forward < 2)


def test_other_seeds_draw_other_negatives():
    model, head = ready(task())
    scores = [task(seed=seed).score(model, head, make_batch())["matching"] for seed in range(6)]
    assert len({score.loss_sum.item() for score in scores}) > 1


def test_the_fresh_head_starts_with_the_stated_temperature():
    made = task()
    model = tiny_model()
    head = made.head(model, 3)
    assert head.log_scale.item() == pytest.approx(math.log(1 / 0.07)) == START_LOG_SCALE
    assert all(
        torch.equal(a, b)
        for a, b in zip(head.parameters(), made.head(model, 3).parameters(), strict=True)
    )
    assert not torch.equal(head.image.weight, made.head(model, 4).image.weight)
    assert head.image.bias is None and head.text.bias is None


@pytest.mark.slow
def test_it_learns_to_tell_pairs_apart():
    made = task(rerank=4)
    model, head = ready(made)
    batch = make_batch((0, 1, 2, 3, 4, 5))
    names = [f"pairs:0:{i}" for i in range(PAIRS)]

    def one(ids: list[str]) -> TaskBatch:
        return part_of(batch, slice(names.index(ids[0]), names.index(ids[0]) + 1))

    def figures() -> dict[str, float]:
        with torch.no_grad():
            rows = made.second_look(model, head, rows_of(made, model, head, batch), one)
        return {n: f.numerator.sum() / f.denominator.sum() for n, f in made.figures(rows).items()}

    before = figures()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        sum(s.mean_loss() for s in made.score(model, head, batch).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = figures()
    assert before["image@1"] < 1 and before["reranked_image@1"] < 1
    assert {after[n] for n in ("image@1", "text@1", "reranked_image@1", "reranked_text@1")} == {1.0}


# -- asking ----------------------------------------------------------------------------------


def rows_of(made: Retrieval, model: VLBeit, head: RetrievalHead, batch: TaskBatch) -> list[dict]:
    """Rows as the driver makes them."""
    rows = made.predict(model, head, batch)
    records = [f"pairs:{name}" for name in batch.targets["image"].tolist()]
    return [
        {"sample_id": sample, "record": record, **row}
        for sample, record, row in zip(batch.sample_ids, records, rows, strict=True)
    ]


def test_rows_depend_on_no_other_sample():
    made = task()
    model, head = ready(made)
    batch = make_batch()
    with torch.no_grad():
        together = made.predict(model, head, batch)
        for row in range(PAIRS):
            single = made.predict(model, head, part_of(batch, slice(row, row + 1)))[0]
            image, text = alone(model, head, batch, row)
            for found in (together[row], single):
                assert np.abs(found["image"] - image.numpy()).max() <= 1e-6
                assert np.abs(found["text"] - text.numpy()).max() <= 1e-6
                assert found["words"].tolist() == batch.words[row, batch.word_valid[row]].tolist()
    assert np.abs(together[0]["image"] - together[1]["image"]).max() > 1e-3


def test_an_image_with_several_captions_is_encoded_once(monkeypatch):
    made = task()
    model, head = ready(made)
    seen, embed = [], model.embed_image

    def counted(pixels: Tensor, **more: object) -> object:
        seen.append(len(pixels))
        return embed(pixels, **more)

    monkeypatch.setattr(model, "embed_image", counted)
    with torch.no_grad():
        rows = made.predict(model, head, make_batch((0, 1, 1, 0, 0, 1)))
    assert seen == [2]
    assert [np.array_equal(row["image"], rows[0]["image"]) for row in rows] == [
        True, False, False, True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize("rule", ["sum", "matching"])
@pytest.mark.parametrize("k", [1, 3, 9])
def test_reranking_equals_scoring_every_pair_and_sorting(k, rule):
    images = (0, 1, 2, 0, 3, 4, 1, 5, 6)
    made = task(rerank=k, rule=rule)
    model, head = ready(made)
    batch = make_batch(images)
    places = {name: i for i, name in enumerate(batch.sample_ids)}
    asked: list[str] = []

    def batch_of(ids: list[str]) -> TaskBatch:
        asked.extend(ids)
        return part_of(batch, slice(places[ids[0]], places[ids[0]] + 1))

    with torch.no_grad():
        rows = rows_of(made, model, head, batch)
        found = made.second_look(model, head, rows, batch_of)
        distinct = sorted(set(images))
        firsts = [images.index(image) for image in distinct]
        assert len(asked) == len(distinct)  # each image is read once
        cosine = (
            np.stack([rows[i]["image"] for i in firsts]) @ np.stack([r["text"] for r in rows]).T
        )
        logit = np.array(
            [[fused_logit(model, head, batch, t, i)[1].item() for t in range(9)] for i in firsts]
        )

    def rank(near: np.ndarray, again: np.ndarray, right: np.ndarray) -> int:
        order = sorted(range(len(near)), key=lambda j: (-near[j], j))
        score = near + again if rule == "sum" else again
        order = sorted(order[:k], key=lambda j: -score[j]) + order[k:]
        return next(place for place, j in enumerate(order) if right[j])

    own = np.array([distinct.index(image) for image in images])
    for t, row in enumerate(found):
        right = np.arange(len(distinct)) == own[t]
        assert row["image_rank"] == rank(cosine[:, t], logit[:, t], right)
        i = own[t]
        assert row["text_rank"] == rank(cosine[i], logit[i], own == i)
    assert made.costs["rerank_seconds"] > 0
    assert made.costs["rerank_pairs"] <= 9 * len(distinct)
    if k == 9:
        assert made.costs["rerank_pairs"] == 9 * len(distinct)
    moved = [row["image_rank"] for row in found]
    dual = made.figures(rows)
    if k > 1:  # the negative control: the second look changes the order
        assert moved != [int(r) for r in dual_image_ranks(cosine, own)]
    both = made.figures(found)
    assert [*both] == [f"reranked_{name}" for name in dual] + [*dual]
    assert all(np.array_equal(dual[name].numerator, both[name].numerator) for name in dual)


def dual_image_ranks(cosine: np.ndarray, own: np.ndarray) -> list[int]:
    return [int((cosine[:, t] > cosine[own[t], t]).sum()) for t in range(len(own))]


def test_a_saved_index_finds_what_the_ranks_say(tmp_path):
    made = task()
    model, head = ready(made)
    batch = make_batch()
    with torch.no_grad():
        rows = rows_of(made, model, head, batch)
    first = list({row["record"]: row for row in reversed(rows)}.values())[::-1]
    for kind, name, kept in (("image", "record", first), ("text", "sample_id", rows)):
        vectors = torch.from_numpy(np.stack([row[kind] for row in kept]))
        ids = tuple(str(row[name]) for row in kept)
        Index(kind=kind, model="m" * 64, ids=ids, vectors=vectors).save(tmp_path / kind)
    images, texts = Index.load(tmp_path / "image"), Index.load(tmp_path / "text")
    assert (len(images.ids), len(texts.ids)) == (5, 6)
    queries = torch.from_numpy(np.stack([row["text"] for row in rows]))
    found = images.search(queries, 5, "m" * 64)
    hits = made.figures(rows)["image@1"].numerator
    for row, answers, hit in zip(rows, found, hits, strict=True):
        assert (answers[0].id == row["record"]) == bool(hit)
    assert texts.search(queries[:1], 1, "m" * 64)[0][0].id == rows[0]["sample_id"]


def test_without_reranking_rows_stay_as_they_are():
    made = task(rerank=0)
    model, head = ready(made)
    with torch.no_grad():
        rows = rows_of(made, model, head, make_batch())
    assert made.second_look(model, head, rows, lambda ids: pytest.fail("asked")) is rows
    assert made.costs == {}


def test_figures_count_each_image_once_and_each_text_once():
    made = task()
    rows = [
        {"record": record, "image": image, "text": text}
        for record, image, text in zip(
            "aabcb",
            np.eye(3, dtype=np.float32)[[0, 0, 1, 2, 1]],
            np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0], [0.1, 0.9, 0], [0, 1, 0]], dtype=np.float32),
            strict=True,
        )
    ]
    found = {n: f.numerator.sum() / f.denominator.sum() for n, f in made.figures(rows).items()}
    # Image a finds its first text. For b, a text of a scores as its own two: a tie, which loses.
    # For c all texts score 0. Of the texts, the second of a and that of c find another image.
    assert found["text@1"] == 1 / 3
    assert found["image@1"] == 3 / 5
    assert found["text@5"] == 1.0  # c: four wrong ones before it
    assert found["image@5"] == 1.0
    assert made.figures(rows)["text@1"].denominator.tolist() == [1, 0, 1, 1, 0]


@pytest.mark.parametrize(("candidates", "right", "k"), [(5, 1, 1), (5, 2, 1), (5, 2, 3), (4, 3, 2)])
def test_chance_is_the_mean_over_all_orders(candidates, right, k):
    orders = list(permutations(range(candidates)))
    hits = sum(any(j < right for j in order[:k]) for order in orders) / len(orders)
    assert chance(candidates, right, k) == pytest.approx(hits)
    assert chance(candidates, right, 10) == 1.0


def test_match_scores_in_pieces_equal_those_at_once(monkeypatch):
    made = task()
    model, head = ready(made)
    batch = make_batch()
    texts = [batch.words[i, batch.word_valid[i]].numpy() for i in range(PAIRS)]
    with torch.no_grad():
        whole = match_scores(model, head, batch.image()[:1], texts)
        monkeypatch.setattr("vlbeit.tasks.retrieval.PAIRS", 4)
        pieces = match_scores(model, head, batch.image()[:1], texts)
        assert match_scores(model, head, batch.image()[:1], []) == []
    assert pieces == pytest.approx(whole, abs=1e-6)


# -- data and settings -----------------------------------------------------------------------


def test_samples_are_captions_and_share_their_images_number(tmp_path):
    source = pair_source(tmp_path, records=9, bad=(4,))
    made = task()
    config = RetrievalRun(
        recipe="toy",
        model=ModelConfig(image_size=(32, 32), patch=8, layers=3, drop_path=0.0),
        input=TaskInputConfig(text_length=WIDTH),
    )
    stream = TaskStream(made, [source], toy_tokenizer(), config, training=False, passes=5)
    assert stream.records == {"captioned": 17}  # 1, 2, 3, 1, bad, 3, 1, 2, 3 captions
    samples = {}
    for index in range(17):
        try:
            samples[index] = stream.sample(Visit("captioned", 0, index))
        except BadSample as bad:
            assert index == 7 and "0004" in str(bad)
    assert len(samples) == 16
    numbers = [int(sample.targets["image"]) for sample in samples.values()]
    assert [numbers.count(n) for n in dict.fromkeys(numbers)] == [1, 2, 3, 1, 3, 1, 2, 3]
    batch = stream.batch(stream.stack([*samples.values()]))
    assert batch.pixels.shape == (16, 1, 3, 32, 32) and batch.targets["image"].dtype == torch.int64
    assert torch.equal(batch.pixels[1], batch.pixels[2])
    assert not torch.equal(batch.words[1], batch.words[2])
    captions = [stream.about(Visit("captioned", 0, index))["caption"] for index in (1, 2)]
    assert captions == source.read(1).captions()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"matching": -1.0}, "retrieval.matching must be 0"),
        ({"rerank": -1}, "retrieval.rerank must be 0"),
        ({"hardness": -0.5}, "retrieval.hardness must be 0"),
        ({"matching": 0.0, "rerank": 0, "hardness": 0.0}, "leave retrieval.hardness at 1"),
        ({"matching": 0.0, "rerank": 8}, "set retrieval.rerank to 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        task(**settings)


# -- two ranks -------------------------------------------------------------------------------

RANK = """
import json, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
import test_retrieval as laws
from vlbeit.train.distributed import init_world

torch.set_num_threads(1)
world = init_world("cpu", 60)
first = int(sys.argv[3])
part = slice(0, first) if world.rank == 0 else slice(first, laws.PAIRS)
told = laws.one_step(part, world.sum_over_ranks)
with torch.no_grad():  # rank 0 evaluates alone, and must not wait for the others
    if world.main:
        laws.one_step(part, lambda x: x)
Path(sys.argv[2], f"told-{world.rank}.json").write_text(json.dumps(told))
world.close()
"""


def one_step(part: slice, add: object) -> dict[str, list]:
    """Losses and gradients of a step over a part of the pairs."""
    made = task()
    model, head = ready(made, drop_path=0.2)
    scores = made.score(model, head, part_of(make_batch(draws=True), part))
    table = [
        torch.stack((s.loss_sum.detach(), s.count.float(), s.correct.float()))
        for s in scores.values()
    ]
    told = {"scores": add(torch.stack(table).flatten()).tolist()}
    if torch.is_grad_enabled():
        sum(score.loss_sum for score in scores.values()).backward()
        learned = [p for n, p in model.named_parameters() if n in set(reached(model, made.paths))]
        fill_missing(learned)  # without a pair some branches do not run
        flat = torch.cat([p.grad.flatten() for p in learned])
        told["gradients"] = add(flat).tolist()
    return told


@pytest.mark.slow
@pytest.mark.parametrize("first", [4, PAIRS], ids=["shared", "the second rank has none"])
def test_two_ranks_learn_what_one_process_learns_hard_negatives_included(tmp_path, first):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        + ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        + [str(script), str(here), str(tmp_path), str(first)],
        env={**os.environ, "PYTHONPATH": f"{SOURCE}:{here}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Files: lines as long as these, on one output, run into each other.
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1)]
    expected = one_step(slice(0, PAIRS), lambda x: x)
    assert told[0] == told[1]
    found = np.array(told[0]["gradients"])
    wanted = np.array(expected["gradients"])
    assert np.allclose(told[0]["scores"], expected["scores"], rtol=1e-5)
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    if first < PAIRS:
        halves = [one_step(part, lambda x: x) for part in (slice(0, first), slice(first, PAIRS))]
        apart = sum(np.array(half["gradients"]) for half in halves)
        assert np.abs(apart - wanted).max() > 1e-2 * np.abs(wanted).max()
