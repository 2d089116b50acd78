"""Image-text retrieval: a dual encoder that proposes, a fused pass that decides (docs/paper.md 5).

Records: an image and json {"captions": [...]}; a sample is one caption with its image.

Learning, as VLMo with ALBEF's care for images with several captions:
    contrast   [I_CLS] of the V-FFN stack and [T_CLS] of the L-FFN stack, each through a Linear
               without bias and scaled to length 1, compared over all ranks (contrast.py)
    matching   [T_CLS] of the fused pair -> pooler -> Linear 2, on B true pairs, B with a hard image
               and B with a hard text, drawn from what the contrast finds alike, over all ranks

Asking: cosines of all images with all texts; the k nearest of each query are looked at again by the
fused pass. Figures: R@1, 5, 10 both ways, by the dual encoder and after the second look, beside
chance, which is what a guess without looking reaches.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import comb
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlbeit.config import FinetuneConfig, RetrievalConfig, RetrievalRun
from vlbeit.data.collate import pad_words
from vlbeit.data.records import BadSample, Record, RecordSource
from vlbeit.data.task_stream import Example, Items, Pictures
from vlbeit.draws import Draws, key_of
from vlbeit.errors import ConfigError
from vlbeit.nn.model import VLBeit
from vlbeit.nn.weights import initialise
from vlbeit.tasks import Figure, Path
from vlbeit.tasks.contrast import (
    START_LOG_SCALE,
    Contrast,
    Shares,
    contrast,
    draw_hard,
    gather_values,
    gather_words,
    keyed_uniforms,
    share_sizes,
)
from vlbeit.tasks.recall import combine, dual_ranks, nearest, reranked
from vlbeit.types import Score, TaskBatch

FACTS = ()
"""What `learn_facts` returns: nothing."""
AT = (1, 5, 10)
PAIRS = 128
"""Most pairs in one fused pass of the second look."""


class RetrievalHead(nn.Module):
    """Two projections with a temperature, and the matching head on the fused [T_CLS]."""

    def __init__(self, width: int, matching: bool) -> None:
        super().__init__()
        self.image = nn.Linear(width, width, bias=False)
        self.text = nn.Linear(width, width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(START_LOG_SCALE))
        self.pooler = nn.Linear(width, width) if matching else None
        self.matching = nn.Linear(width, 2) if matching else None

    def match(self, fused: Tensor) -> Tensor:
        """(N, D), the fused [T_CLS], to (N, 2) float32 logits: not a pair, a pair."""
        if self.pooler is None or self.matching is None:
            raise ValueError("a dual encoder alone has no matching head")
        logits: Tensor = self.matching(torch.tanh(self.pooler(fused)))
        return logits.float()


@dataclass(frozen=True, kw_only=True)
class SecondLookCost:
    """What reranking took."""

    pairs: int
    """Fused passes. A pair that both its image and its text ask about is looked at once."""
    seconds: float
    queries: int
    """Images and texts that asked."""

    def to_dict(self) -> dict[str, float]:
        return {
            "rerank_pairs": self.pairs,
            "rerank_seconds": round(self.seconds, 3),
            "rerank_seconds_per_query": self.seconds / max(1, self.queries),
        }


def learn_facts(config: FinetuneConfig, sources: Sequence[RecordSource]) -> dict[str, Any]:
    """Nothing: retrieval has no classes."""
    return {}


def build(config: FinetuneConfig, facts: dict[str, Any]) -> "Retrieval":
    """Raises ConfigError for settings out of range."""
    assert isinstance(config, RetrievalRun)
    return Retrieval(config, facts)


class Retrieval:
    """The task; holds no tensor."""

    stream = "task:retrieval"
    gathers: Literal[True] = True

    def __init__(self, config: RetrievalRun, facts: dict[str, Any]) -> None:
        self.settings: RetrievalConfig = config.retrieval
        check(self.settings)
        self.facts = facts
        self.costs: dict[str, float] = {}
        """What the last second look took; empty before."""
        self._seed = config.seed
        self._matching = self.settings.matching > 0
        self.weights: Mapping[str, float] = {"contrast": 1.0}
        self.paths: tuple[Path, ...] = ("image", "text")
        if self._matching:
            self.weights = {**self.weights, "matching": self.settings.matching}
            self.paths = ("image", "text", "pair", "pair", "pair")

    # ---- data

    def items(self, source: RecordSource, training: bool) -> Items:
        """One sample a caption."""
        rows: list[tuple[int, int, int]] = []
        for index in range(len(source)):
            try:
                captions = source.read(index, only=("json", "txt")).captions()
            except BadSample:
                captions = [""]  # named and counted when the loader meets it
            rows += [(index, number, len(text)) for number, text in enumerate(captions)]
        return Items.of(rows)

    def example(
        self, source: RecordSource, record: int, number: int, pictures: Pictures, draws: Draws
    ) -> Example:
        """Targets: `image`, a number that the captions of one image share."""
        found = source.read(record)
        captions = found.captions()
        return Example(
            pixels=pictures.pixels(found.image(), draws)[None],
            text=captions[number],
            targets={"image": np.array(key_of("image", source.name, record) % (1 << 63))},
        )

    def about(self, record: Record, number: int) -> dict[str, Any]:
        return {"caption": record.captions()[number]}

    # ---- model

    def head(self, model: VLBeit, seed: int) -> RetrievalHead:
        head = RetrievalHead(model.config.width, self._matching)
        initialise(head, seed, model.config.init_std)
        with torch.no_grad():
            head.log_scale.fill_(START_LOG_SCALE)
        return head

    def frozen(self, name: str) -> bool:
        return False

    def count(self, batch: TaskBatch) -> dict[str, int]:
        """Each pair asks two questions of the contrast, and is three rows of the matching."""
        found = {"contrast": 2 * len(batch)}
        return {**found, "matching": 3 * len(batch)} if self._matching else found

    def score(self, model: VLBeit, head: nn.Module, batch: TaskBatch) -> dict[str, Score]:
        """Sums of both losses.

        While training, all ranks call this together: they exchange vectors, pixels and words. With
        gradients off it looks at the batch alone, because rank 0 evaluates alone.
        """
        assert isinstance(head, RetrievalHead)
        words, valid = texts_of(batch)
        pixels = batch.image()
        images = encode_images(model, head, pixels, batch.draws(0))
        texts = encode_texts(model, head, words, valid, batch.draws(1))
        pairs = len(batch)
        shares = Shares(0, (pairs,))
        if torch.is_grad_enabled():
            shares = share_sizes(pairs, pixels.device)
        found = contrast(
            images, texts, head.log_scale, batch.targets["image"], self.settings.repeated, shares
        )
        scores = {"contrast": found.score}
        if self._matching:
            scores["matching"] = self._score_matching(model, head, batch, found, shares)
        return scores

    def _score_matching(
        self, model: VLBeit, head: RetrievalHead, batch: TaskBatch, found: Contrast, shares: Shares
    ) -> Score:
        words, valid = texts_of(batch)
        pixels = batch.image()
        hard_text, hard_image = (
            draw_hard(logits, found.same, self._uniforms(batch, kind), self.settings.hardness)
            for logits, kind in (
                (found.text_logits, "hard text"),
                (found.image_logits, "hard image"),
            )
        )  # (B,) each
        # Where all pairs are of one image there is nothing to tell apart: the true pair again.
        own = torch.tensor(shares.places, dtype=torch.int64, device=pixels.device)
        labels = torch.cat((torch.ones_like(own), (hard_image < 0).long(), (hard_text < 0).long()))
        hard_text = torch.where(hard_text < 0, own, hard_text)
        hard_image = torch.where(hard_image < 0, own, hard_image)
        all_words, all_valid = gather_words(words, valid, shares)
        all_pixels = gather_values(pixels, shares)
        lacking = all_words.shape[1] - words.shape[1]
        words, valid = F.pad(words, (0, lacking)), F.pad(valid, (0, lacking), value=False)
        draws = [batch.draws(forward) for forward in (2, 3, 4)]
        fused = fuse(
            model,
            torch.cat((words, words, all_words[hard_text])),
            torch.cat((valid, valid, all_valid[hard_text])),
            torch.cat((pixels, all_pixels[hard_image], pixels)),
            torch.cat([d for d in draws if d is not None]) if draws[0] is not None else None,
        )
        return Score.of_logits(head.match(fused), labels)

    def _uniforms(self, batch: TaskBatch, kind: str) -> Tensor:
        return keyed_uniforms(batch.sample_ids, self._seed, kind)

    def predict(self, model: VLBeit, head: nn.Module, batch: TaskBatch) -> list[dict[str, Any]]:
        """Rows {"image": (D,), "text": (D,), "words": (W,) without padding}, numpy.

        An image that several captions of the batch share is encoded once.
        """
        assert isinstance(head, RetrievalHead)
        words, valid = texts_of(batch)
        names = batch.targets["image"].tolist()
        first = {name: names.index(name) for name in names}
        places = {name: place for place, name in enumerate(first)}
        distinct = batch.image()[torch.tensor([*first.values()], device=words.device)]
        images = encode_images(model, head, distinct).cpu().numpy()
        texts = encode_texts(model, head, words, valid).cpu().numpy()
        return [
            {"image": images[places[name]], "text": text, "words": ids[there].cpu().numpy()}
            for name, text, ids, there in zip(names, texts, words, valid, strict=True)
        ]

    # ---- asking

    def second_look(
        self,
        model: VLBeit,
        head: nn.Module,
        rows: list[dict[str, Any]],
        batch_of: Callable[[Sequence[str]], TaskBatch],
    ) -> list[dict[str, Any]]:
        """Rows with "image_rank" and "text_rank": places after reranking, 0 is a hit at 1.

        image_rank is that of the own image for the row's text; text_rank that of the best caption
        for the row's image, the same in all rows of an image. Each image is read once.
        """
        assert isinstance(head, RetrievalHead)
        k = self.settings.rerank
        if k == 0 or not rows:
            return rows
        began = time.perf_counter()
        world = Compared.of(rows)
        near_texts = nearest(world.images, world.texts, k)
        near_images = nearest(world.texts, world.images, k)
        wanted = [set(places.tolist()) for places in near_texts[1]]
        for text, places in enumerate(near_images[1].tolist()):
            for image in places:
                wanted[image].add(text)
        scores: list[dict[int, float]] = []
        for image, texts in enumerate(wanted):
            row = rows[world.first_rows[image]]
            pixels = batch_of([row["sample_id"]]).image()
            asked = sorted(texts)
            found = match_scores(model, head, pixels, [rows[text]["words"] for text in asked])
            scores.append(dict(zip(asked, found, strict=True)))
        to_text = torch.tensor(
            [[scores[i][t] for t in near] for i, near in enumerate(near_texts[1].tolist())]
        )
        to_image = torch.tensor(
            [[scores[i][t] for i in near] for t, near in enumerate(near_images[1].tolist())]
        )
        text_ranks = reranked(
            world.text_ranks(),
            world.image_ids[:, None] == world.text_ids[near_texts[1]],
            combine(near_texts[0], to_text, self.settings.rule),
        ).tolist()
        image_ranks = reranked(
            world.image_ranks(),
            world.text_ids[:, None] == world.image_ids[near_images[1]],
            combine(near_images[0], to_image, self.settings.rule),
        ).tolist()
        self.costs = SecondLookCost(
            pairs=sum(len(texts) for texts in wanted),
            seconds=time.perf_counter() - began,
            queries=len(world.images) + len(world.texts),
        ).to_dict()
        return [
            {**row, "image_rank": image_ranks[t], "text_rank": text_ranks[int(world.text_ids[t])]}
            for t, row in enumerate(rows)
        ]

    def figures(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
        """text@K: a caption of this image is among the K nearest (TR); image@K: the image of this
        caption is (IR); with "reranked_" in front, after the second look, which then come first.

        The baseline is what an order drawn at random reaches on average.
        """
        world = Compared.of(rows)
        dual = (world.text_ranks().numpy(), world.image_ranks().numpy())
        found: dict[str, Figure] = {}
        if rows and "image_rank" in rows[0]:
            again = [np.array([row[name] for row in rows]) for name in ("text_rank", "image_rank")]
            found |= world.shares("reranked_", again[0][world.first_rows], again[1])
        return found | world.shares("", *dual)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The distinct images and the texts of some rows.

    Shapes: images (I, D), texts (T, D) float32; image_ids (I,) is 0..I - 1 and text_ids (T,) the
    place of each text's image; first_rows: the first row of each image.
    """

    images: Tensor
    texts: Tensor
    image_ids: Tensor
    text_ids: Tensor
    first_rows: list[int]

    @staticmethod
    def of(rows: Sequence[Mapping[str, Any]]) -> "Compared":
        places: dict[str, int] = {}
        first_rows: list[int] = []
        for number, row in enumerate(rows):
            if row["record"] not in places:
                places[row["record"]] = len(places)
                first_rows.append(number)
        return Compared(
            images=torch.from_numpy(np.stack([rows[number]["image"] for number in first_rows])),
            texts=torch.from_numpy(np.stack([row["text"] for row in rows])),
            image_ids=torch.arange(len(places)),
            text_ids=torch.tensor([places[row["record"]] for row in rows]),
            first_rows=first_rows,
        )

    def text_ranks(self) -> Tensor:
        """(I,): how many texts of other images stand before the first own one."""
        return dual_ranks(self.images, self.texts, self.image_ids, self.text_ids)

    def image_ranks(self) -> Tensor:
        """(T,): how many images stand before the own one."""
        return dual_ranks(self.texts, self.images, self.text_ids, self.image_ids)

    def shares(
        self, prefix: str, text_ranks: np.ndarray, image_ranks: np.ndarray
    ) -> dict[str, Figure]:
        """Shapes: text_ranks (I,), image_ranks (T,). An image counts at its first row."""
        images, texts = len(self.images), len(self.texts)
        asks = np.zeros(texts)
        asks[self.first_rows] = 1.0
        own = np.bincount(self.text_ids.numpy(), minlength=images)  # captions of each image
        found: dict[str, Figure] = {}
        for k in AT:
            hits, guess = np.zeros(texts), np.zeros(texts)
            hits[self.first_rows] = text_ranks < k
            guess[self.first_rows] = [chance(texts, int(right), k) for right in own]
            found[f"{prefix}text@{k}"] = Figure(
                numerator=hits, denominator=asks, baseline=(guess, asks)
            )
        for k in AT:
            found[f"{prefix}image@{k}"] = Figure.share(
                list(image_ranks < k), [chance(images, 1, k)] * texts
            )
        return found


def chance(candidates: int, right: int, k: int) -> float:
    """The probability that some right one is among k candidates drawn without looking."""
    k = min(k, candidates)
    return 1 - comb(candidates - right, k) / comb(candidates, k)


# ---- ways through the model


def texts_of(batch: TaskBatch) -> tuple[Tensor, Tensor]:
    """(B, W) words and which of them are real.

    Raises:
        ValueError: there are none.
    """
    if batch.words is None or batch.word_valid is None:
        raise ValueError(f"a {batch.stream} batch without words")
    return batch.words, batch.word_valid


def encode_images(
    model: VLBeit, head: RetrievalHead, pixels: Tensor, draws: Tensor | None = None
) -> Tensor:
    """(B, 3, height, width) to (B, D) float32 of length 1."""
    return F.normalize(project_images(model, head, pixels, draws), dim=1)


def project_images(
    model: VLBeit, head: RetrievalHead, pixels: Tensor, draws: Tensor | None = None
) -> Tensor:
    """`encode_images` before the vectors are scaled to length 1."""
    states = model.embed_image(pixels, depth_draws=draws)
    vectors: Tensor = head.image(model.backbone.first(states))
    return vectors.float()


def encode_texts(
    model: VLBeit, head: RetrievalHead, words: Tensor, valid: Tensor, draws: Tensor | None = None
) -> Tensor:
    """(B, W) to (B, D) float32 of length 1."""
    return F.normalize(project_texts(model, head, words, valid, draws), dim=1)


def project_texts(
    model: VLBeit, head: RetrievalHead, words: Tensor, valid: Tensor, draws: Tensor | None = None
) -> Tensor:
    """`encode_texts` before the vectors are scaled to length 1."""
    states = model.embed_text(words, valid, draws)
    vectors: Tensor = head.text(model.backbone.first(states))
    return vectors.float()


def fuse(
    model: VLBeit, words: Tensor, valid: Tensor, pixels: Tensor, draws: Tensor | None = None
) -> Tensor:
    """(B, D): [T_CLS] of every pair."""
    return model.backbone.first(model.embed_pair(words, valid, pixels, depth_draws=draws))


def match_scores(
    model: VLBeit, head: RetrievalHead, pixels: Tensor, texts: Sequence[np.ndarray]
) -> list[float]:
    """The logit of "they belong together" of one image with some texts.

    Shapes: pixels (1, 3, height, width); texts: (W,) word ids each.
    """
    found: list[float] = []
    for start, stop in pairwise([*range(0, len(texts), PAIRS), len(texts)]):
        part = texts[start:stop]
        words, valid = (torch.from_numpy(x).to(pixels.device) for x in pad_words(part))
        fused = fuse(model, words, valid, pixels.expand(len(part), -1, -1, -1))
        found += head.match(fused)[:, 1].tolist()
    return found


def check(settings: RetrievalConfig) -> None:
    """Raise ConfigError for a setting out of range or in conflict with another."""
    if settings.matching < 0:
        raise ConfigError(
            f"retrieval.matching must be 0 (no matching) or above, found {settings.matching}"
        )
    if settings.hardness < 0:
        raise ConfigError(
            f"retrieval.hardness must be 0 (any other image alike) or above, found "
            f"{settings.hardness}"
        )
    if settings.hardness != 1 and settings.matching == 0:
        raise ConfigError(
            f"retrieval.hardness is {settings.hardness} and retrieval.matching is 0: without the "
            "matching loss no wrong pair is drawn; leave retrieval.hardness at 1"
        )
    if settings.rerank < 0:
        raise ConfigError(f"retrieval.rerank must be 0 (off) or above, found {settings.rerank}")
    if settings.rerank and settings.matching == 0:
        raise ConfigError(
            f"retrieval.rerank is {settings.rerank} and retrieval.matching is 0: without the "
            "matching loss nothing can look again; set retrieval.rerank to 0"
        )
