"""Recall against brute force over sorted lists: several captions, ties, blocks, reranking."""

import pytest
import torch
from torch import Tensor

from vlbeit.errors import NonFiniteError
from vlbeit.tasks.recall import (
    combine,
    dual_ranks,
    nearest,
    ranks,
    recall_both_ways,
    recalls,
    reranked,
    score_blocks,
)

IMAGES, TEXTS, WIDTH = 37, 101, 3


@pytest.fixture
def world(gen: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Small whole numbers as vectors: scores are exact and many of them are equal."""
    image_vectors = torch.randint(-2, 3, (IMAGES, WIDTH), generator=gen).float()
    text_vectors = torch.randint(-2, 3, (TEXTS, WIDTH), generator=gen).float()
    image_ids = torch.randperm(IMAGES, generator=gen) * 7 + 3
    extra = torch.randint(0, IMAGES, (TEXTS - IMAGES,), generator=gen)
    text_ids = image_ids[torch.cat((torch.arange(IMAGES), extra))]
    text_ids = text_ids[torch.randperm(TEXTS, generator=gen)]
    return image_vectors, text_vectors, image_ids, text_ids


def brute_rank(scores: list[float], right: list[bool]) -> int:
    """Place of the first right one in a list where, of equal scores, the wrong ones come first."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], right[j]))
    return next(place for place, j in enumerate(order) if right[j])


def brute_ranks(queries: Tensor, candidates: Tensor, own: Tensor, others: Tensor) -> list[int]:
    found = []
    for query, name in zip(queries, own.tolist(), strict=True):
        scores = [float((query * candidate).sum()) for candidate in candidates]
        found.append(brute_rank(scores, [other == name for other in others.tolist()]))
    return found


@pytest.mark.parametrize("numbers", [1, 250, 10**6])
def test_recall_equals_brute_force_both_ways_whatever_the_blocks(world, numbers):
    images, texts, image_ids, text_ids = world
    to_text = brute_ranks(images, texts, image_ids, text_ids)
    to_image = brute_ranks(texts, images, text_ids, image_ids)
    assert dual_ranks(images, texts, image_ids, text_ids, numbers).tolist() == to_text
    assert dual_ranks(texts, images, text_ids, image_ids, numbers).tolist() == to_image
    found = recall_both_ways(images, texts, image_ids, text_ids, numbers=numbers)
    for k in (1, 5, 10):
        assert found["text"][k] == sum(r < k for r in to_text) / IMAGES
        assert found["image"][k] == sum(r < k for r in to_image) / TEXTS
    assert 0 < found["image"][1] < found["image"][10] < 1


def test_the_world_of_these_tests_has_ties_that_matter(world):
    images, texts, image_ids, text_ids = world
    scores = texts @ images.T
    right = text_ids[:, None] == image_ids[None, :]
    kind = ((scores > scores[right][:, None]) & ~right).sum(dim=1)
    assert not torch.equal(kind, dual_ranks(texts, images, text_ids, image_ids))


def test_a_model_that_scores_all_pairs_alike_finds_nothing(world):
    _, _, image_ids, text_ids = world
    found = recall_both_ways(torch.ones(IMAGES, 4), torch.ones(TEXTS, 4), image_ids, text_ids)
    assert found == {"text": {1: 0, 5: 0, 10: 0}, "image": {1: 0, 5: 0, 10: 0}}


def test_the_order_of_candidates_and_queries_changes_nothing(world, gen):
    images, texts, image_ids, text_ids = world
    mixed, turned = torch.randperm(TEXTS, generator=gen), torch.randperm(IMAGES, generator=gen)
    assert recall_both_ways(
        images[turned], texts[mixed], image_ids[turned], text_ids[mixed]
    ) == recall_both_ways(images, texts, image_ids, text_ids)


def test_the_captions_of_an_image_do_not_compete_with_each_other():
    scores = torch.tensor([[9.0, 8.0, 1.0, 5.0]])
    ids = torch.tensor([0, 0, 1, 2])
    assert ranks(scores, torch.tensor([0]), ids).tolist() == [0]
    assert ranks(scores, torch.tensor([2]), ids).tolist() == [2]
    assert ranks(scores, torch.tensor([1]), ids).tolist() == [3]
    assert recalls(torch.tensor([0, 1, 4, 5]), (1, 2, 5)) == {1: 0.25, 2: 0.5, 5: 0.75}


def test_the_nearest_are_those_of_a_stable_sort(world):
    images, texts, _, _ = world
    full = texts @ images.T
    for numbers in (1, 10**6):
        scores, places = nearest(texts, images, 7, numbers)
        for row in range(TEXTS):
            order = sorted(range(IMAGES), key=lambda j: (-float(full[row, j]), j))[:7]
            assert places[row].tolist() == order
            assert scores[row].tolist() == full[row, order].tolist()
    assert nearest(texts, images, 1000)[1].shape == (TEXTS, IMAGES)


@pytest.mark.parametrize("rule", ["sum", "matching"])
@pytest.mark.parametrize("k", [0, 1, 4, 12, IMAGES])
def test_reranking_equals_brute_force_over_whole_lists(world, gen, k, rule):
    images, texts, image_ids, text_ids = world
    matching = torch.randint(-3, 4, (TEXTS, IMAGES), generator=gen).float()
    similarity, places = nearest(texts, images, k)
    right = text_ids[:, None] == image_ids[places]
    again = combine(similarity, matching.gather(1, places), rule)
    dual = dual_ranks(texts, images, text_ids, image_ids)
    found = reranked(dual, right, again)
    full = texts @ images.T
    for row in range(TEXTS):
        near = set(places[row].tolist())
        # VLMo: what is not among the k nearest gets -100 in the matching score's place.
        scores = [
            (float(full[row, j]) if rule == "sum" or j not in near else 0.0)
            + (float(matching[row, j]) if j in near else -1000.0)
            for j in range(IMAGES)
        ]
        assert int(found[row]) == brute_rank(
            scores, [int(i) == int(text_ids[row]) for i in image_ids]
        )
    if k == 0:
        assert torch.equal(found, dual)
    else:
        assert not torch.equal(found, dual)
    if k == IMAGES and rule == "matching":
        assert torch.equal(found, ranks(matching, text_ids, image_ids))


def test_blocks_cover_the_queries_and_stay_within_the_limit(world):
    images, texts, _, _ = world
    seen = list(score_blocks(images, texts, 250))
    assert [b.start for b, _ in seen] == list(range(0, IMAGES, 2))
    assert max(s.numel() for _, s in seen) <= 250
    assert torch.equal(torch.cat([s for _, s in seen]), images @ texts.T)


def test_scores_that_are_no_numbers_are_refused(world):
    images, texts, image_ids, text_ids = world
    images[5, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="retrieval"):
        recall_both_ways(images, texts, image_ids, text_ids)
    with pytest.raises(NonFiniteError, match="reranking"):
        reranked(torch.zeros(1), torch.ones(1, 1).bool(), torch.tensor([[float("nan")]]))


def test_a_query_without_an_answer_and_an_empty_set_are_refused(world):
    images, texts, image_ids, text_ids = world
    with pytest.raises(ValueError, match="id 999 has no right"):
        dual_ranks(images, texts, image_ids.clone().fill_(999), text_ids)
    with pytest.raises(ValueError, match="no query"):
        recalls(torch.zeros(0, dtype=torch.int64))
