"""Recall at K between images and texts, by the dual encoder and after reranking.

A query (an image, or a text) is answered when one of its right candidates is among the first K. An
image with several captions has several right texts; a text has one right image. Right is what
carries the same id: image ids are the images' own and, for a text, the id of its image.

Ties count against the model: a wrong candidate with the score of the best right one stands before
it. So a model that gives every pair the same score has a recall of 0, and no number depends on the
order of the candidates.

Nothing of the size queries x candidates is ever held: scores are made, used and dropped in blocks.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from vlbeit.errors import NonFiniteError

RerankRule = Literal["sum", "matching"]
"""How a pair that both encoders saw is scored (docs/paper.md 5): "sum", similarity plus the
matching score (VLMo), or "matching", the matching score alone (ALBEF)."""

BLOCK_NUMBERS = 1 << 24
"""Scores held at once: 64 MiB in float32."""


def score_blocks(
    queries: Tensor, candidates: Tensor, numbers: int = BLOCK_NUMBERS
) -> Iterator[tuple[slice, Tensor]]:
    """Scores of neighbouring queries with all candidates, (q, C) float32, block after block.

    Shapes: queries (Q, D), candidates (C, D).

    Raises:
        NonFiniteError: a score is NaN or infinite; comparing with NaN would count as right.
    """
    step = max(1, numbers // max(1, len(candidates)))
    for start in range(0, len(queries), step):
        block = slice(start, min(start + step, len(queries)))
        scores = queries[block].float() @ candidates.float().T
        if not bool(scores.isfinite().all()):
            raise NonFiniteError(
                f"retrieval: a score of the queries {start}..{block.stop - 1} is not a finite "
                "number; the model's vectors are broken"
            )
        yield block, scores


def ranks(scores: Tensor, query_ids: Tensor, candidate_ids: Tensor) -> Tensor:
    """(Q,) int64: how many wrong candidates stand before the best right one; 0 is a hit at 1.

    Shapes: scores (Q, C), query_ids (Q,), candidate_ids (C,) int64.

    Raises:
        ValueError: a query has no right candidate.
    """
    right = query_ids[:, None] == candidate_ids[None, :]  # (Q, C)
    alone = ~right.any(dim=1)
    if bool(alone.any()):
        found = int(query_ids[alone][0])
        raise ValueError(f"the query with id {found} has no right candidate")
    best = scores.masked_fill(~right, float("-inf")).amax(dim=1, keepdim=True)
    return ((scores >= best) & ~right).sum(dim=1)


def dual_ranks(
    queries: Tensor,
    candidates: Tensor,
    query_ids: Tensor,
    candidate_ids: Tensor,
    numbers: int = BLOCK_NUMBERS,
) -> Tensor:
    """`ranks` of the dot products of two sets of vectors, in blocks.

    Shapes: queries (Q, D), candidates (C, D), query_ids (Q,), candidate_ids (C,), return (Q,).
    """
    found = [
        ranks(scores, query_ids[block], candidate_ids)
        for block, scores in score_blocks(queries, candidates, numbers)
    ]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)


def nearest(
    queries: Tensor, candidates: Tensor, k: int, numbers: int = BLOCK_NUMBERS
) -> tuple[Tensor, Tensor]:
    """The k best candidates of every query: their scores and places, both (Q, min(k, C)).

    Best first; of equal ones the candidate with the lower place.
    """
    k = min(k, len(candidates))
    scores, places = [], []
    for _, block in score_blocks(queries, candidates, numbers):
        best, place = block.sort(dim=1, descending=True, stable=True)
        scores.append(best[:, :k].clone())
        places.append(place[:, :k].clone())
    if not scores:
        return torch.zeros(0, k), torch.zeros(0, k, dtype=torch.int64)
    return torch.cat(scores), torch.cat(places)


def combine(similarity: Tensor, matching: Tensor, rule: RerankRule) -> Tensor:
    """The score by which the nearest candidates are ordered again.

    Shapes: all (Q, k). `similarity` is the cosine, not divided by the temperature, and `matching`
    the logit of "they belong together", as VLMo adds them.
    """
    return similarity + matching if rule == "sum" else matching


def reranked(dual: Tensor, right: Tensor, scores: Tensor) -> Tensor:
    """(Q,) int64: `ranks` after the k nearest candidates of each query were scored again.

    The k nearest stand first, ordered by the new scores; all others keep the dual encoder's order
    behind them. So k = 0 is the dual encoder, and k = C the new scores alone. VLMo and ALBEF reach
    the same by giving the others a score of -100.

    Shapes: dual (Q,) the dual encoder's ranks; right (Q, k) bool, whether the j-th nearest is a
    right one; scores (Q, k) the new scores.

    Raises:
        NonFiniteError: a new score is NaN or infinite.
    """
    if not bool(scores.isfinite().all()):
        raise NonFiniteError("retrieval: a reranking score is not a finite number")
    if right.shape[1] == 0:
        return dual
    best = scores.masked_fill(~right, float("-inf")).amax(dim=1, keepdim=True)
    among = ((scores >= best) & ~right).sum(dim=1)
    # None right among the k nearest: all k stand before the best right one as they did before.
    return torch.where(right.any(dim=1), among, dual)


def recalls(found: Tensor, at: tuple[int, ...] = (1, 5, 10)) -> dict[int, float]:
    """K -> share of queries whose rank is below K. Shapes: found (Q,), as from `ranks`.

    Raises:
        ValueError: no query.
    """
    if len(found) == 0:
        raise ValueError("recall of no query at all")
    return {k: int((found < k).sum()) / len(found) for k in at}


def recall_both_ways(
    image_vectors: Tensor,
    text_vectors: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    at: tuple[int, ...] = (1, 5, 10),
    numbers: int = BLOCK_NUMBERS,
) -> Mapping[str, dict[int, float]]:
    """{"text": which text belongs to this image (TR), "image": which image to this text (IR)}.

    Shapes: image_vectors (I, D), text_vectors (T, D), image_ids (I,), text_ids (T,): the id of
    each text's image.
    """
    text = dual_ranks(image_vectors, text_vectors, image_ids, text_ids, numbers)
    image = dual_ranks(text_vectors, image_vectors, text_ids, image_ids, numbers)
    return {"text": recalls(text, at), "image": recalls(image, at)}
