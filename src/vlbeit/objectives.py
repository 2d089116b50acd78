"""The pretraining objectives side by side: MLM, MIM and MVLM (paper section 2.3).

Each turns one masked micro-batch into sums (`Score`). The loop adds scores over micro-batches and
ranks, divides each objective once by its global count and adds the means, weighted.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vlbeit.config import ObjectiveConfig
from vlbeit.nn.backbone import places_of
from vlbeit.nn.model import VLBeit
from vlbeit.nn.packing import ROWS_STEP
from vlbeit.types import Batch, Score, States

OBJECTIVES = ("mlm", "mim", "mvlm_text", "mvlm_image")


def score_rows(rows: Tensor, answers: Tensor, head: Callable[[Tensor], Tensor]) -> Score:
    """Cross-entropy of `head` at the given rows, as sums.

    Only masked rows reach the head: its (N, V) logits are the widest tensor of a step. The loss
    is taken in fp32. With no rows the sums are zero and still have a gradient, never NaN.

    Shapes: rows (N, D), answers (N,) int64.
    """
    filled = F.pad(rows, (0, 0, 0, -len(rows) % ROWS_STEP))
    return Score.of_logits(head(filled)[: len(rows)], answers)


def score_states(
    model: VLBeit, states: States, head: str, wanted: Tensor, answers: Tensor
) -> Score:
    """Score the wanted positions of one forward pass.

    Shapes: wanted (B, L) bool, answers (N,) in row-major order of `wanted`.
    """
    rows = model.backbone.rows(states, wanted, len(answers))
    return score_rows(rows, answers, model.heads[head])


def words_to_predict(batch: Batch) -> Tensor:
    """(N,) int64: the hidden words of a batch, row by row."""
    words = need(batch.words, "words", batch.stream)
    masked = need(batch.word_masked, "word_masked", batch.stream)
    return words.flatten()[places_of(masked, batch.known.words if batch.known else None)]


def codes_to_predict(batch: Batch) -> Tensor:
    """(N,) int64: the codes of the hidden patches of a batch, row by row."""
    codes = need(batch.patch_codes, "patch_codes", batch.stream)
    masked = need(batch.patch_masked, "patch_masked", batch.stream)
    return codes.flatten()[places_of(masked, batch.known.patches if batch.known else None)]


def need(value: Tensor | None, name: str, stream: str) -> Tensor:
    if value is None:
        raise ValueError(f"a {stream} batch without {name}")
    return value


def score_text(model: VLBeit, batch: Batch) -> Score:
    """MLM: name the hidden words of a text, from the text alone."""
    masked = need(batch.word_masked, "word_masked", batch.stream)
    given = need(batch.words_given, "words_given", batch.stream)
    states = model.embed_text(given, batch.valid_words(), view_draws(batch, 0))
    return score_states(model, states, "mlm", masked, words_to_predict(batch))


def score_image(model: VLBeit, batch: Batch) -> Score:
    """MIM: name the visual code of each hidden patch, from the image alone."""
    masked = need(batch.patch_masked, "patch_masked", batch.stream)
    pixels = need(batch.pixels, "pixels", batch.stream)
    states = model.embed_image(pixels, masked, view_draws(batch, 0))
    return score_states(model, states, "mim", after_class(masked), codes_to_predict(batch))


def after_class(patch_masked: Tensor) -> Tensor:
    """(B, P) -> (B, P + 1): [I_CLS] stands first and is never masked."""
    return F.pad(patch_masked, (1, 0), value=False)


def view_draws(batch: Batch, view: int) -> Tensor | None:
    return None if batch.depth_draws is None else batch.depth_draws[:, view]


def score_pair_words(model: VLBeit, batch: Batch, view: int) -> Score:
    """MVLM, text view: hidden words from the other words and the whole image."""
    masked = need(batch.word_masked, "word_masked", batch.stream)
    given = need(batch.words_given, "words_given", batch.stream)
    pixels = need(batch.pixels, "pixels", batch.stream)
    draws = view_draws(batch, view)
    states = model.embed_pair(given, batch.valid_words(), pixels, None, draws)
    wanted = F.pad(masked, (0, states.x.shape[1] - masked.shape[1]), value=False)
    return score_states(model, states, "mlm", wanted, words_to_predict(batch))


def score_pair_patches(model: VLBeit, batch: Batch, view: int) -> Score:
    """MVLM, image view: codes of hidden patches from the other patches and the whole text."""
    masked = need(batch.patch_masked, "patch_masked", batch.stream)
    words = need(batch.words, "words", batch.stream)
    pixels = need(batch.pixels, "pixels", batch.stream)
    draws = view_draws(batch, view)
    states = model.embed_pair(words, batch.valid_words(), pixels, masked, draws)
    wanted = F.pad(masked, (states.x.shape[1] - masked.shape[1], 0), value=False)
    return score_states(model, states, "mim", wanted, codes_to_predict(batch))


def score_pair_joint(model: VLBeit, batch: Batch) -> dict[str, Score]:
    """MVLM with both modalities masked in one pass (the paper's text can be read so)."""
    word_masked = need(batch.word_masked, "word_masked", batch.stream)
    patch_masked = need(batch.patch_masked, "patch_masked", batch.stream)
    given = need(batch.words_given, "words_given", batch.stream)
    pixels = need(batch.pixels, "pixels", batch.stream)
    draws = view_draws(batch, 0)
    states = model.embed_pair(given, batch.valid_words(), pixels, patch_masked, draws)
    wanted = torch.cat((word_masked, after_class(patch_masked)), dim=1)
    rows = model.backbone.rows(states, wanted)
    is_word = wanted.nonzero()[:, 1] < word_masked.shape[1]
    return {
        "mvlm_text": score_rows(rows[is_word], words_to_predict(batch), model.heads["mlm"]),
        "mvlm_image": score_rows(rows[~is_word], codes_to_predict(batch), model.heads["mim"]),
    }


def views(config: ObjectiveConfig) -> int:
    """Forward passes of one pair, each with its own draws for stochastic depth."""
    return 2 if config.mvlm == "two_views" else 1


def half_view(sample_id: str) -> str:
    """Which view a pair gets in "half": it alternates from epoch to epoch.

    Keyed by the sample and not by its place in a micro-batch, so it does not depend on ranks.
    """
    _, epoch, index = sample_id.rsplit(":", 2)
    return ("mvlm_text", "mvlm_image")[(int(epoch) + int(index)) % 2]


def score_batch(model: VLBeit, batch: Batch, config: ObjectiveConfig) -> dict[str, Score]:
    """The scores of one micro-batch, by objective; objectives of weight 0 are left out."""
    if batch.stream == "text":
        return {"mlm": score_text(model, batch)} if config.mlm else {}
    if batch.stream == "image":
        return {"mim": score_image(model, batch)} if config.mim else {}
    wanted = [name for name in ("mvlm_text", "mvlm_image") if getattr(config, name)]
    if config.mvlm == "joint":
        scores = score_pair_joint(model, batch)
        return {name: scores[name] for name in wanted}
    if config.mvlm == "half":
        places: dict[str, list[int]] = {"mvlm_text": [], "mvlm_image": []}
        for place, sample_id in enumerate(batch.sample_ids):
            places[half_view(sample_id)].append(place)
        # A view without a pair is passed too: on other ranks it may have some.
        return {name: PAIR_VIEWS[name](model, batch.pick(places[name]), 0) for name in wanted}
    return {
        name: PAIR_VIEWS[name](model, batch, view)
        for view, name in enumerate(("mvlm_text", "mvlm_image"))
        if name in wanted
    }


def count_targets(batch: Batch, config: ObjectiveConfig) -> dict[str, int]:
    """Positions that `score_batch` will predict, by objective; known before any forward pass."""
    if batch.stream == "pair" and config.mvlm == "half":
        views_of = [half_view(sample_id) for sample_id in batch.sample_ids]
        found = {}
        for name, masked in (("mvlm_text", batch.word_masked), ("mvlm_image", batch.patch_masked)):
            here = torch.tensor([view == name for view in views_of])
            found[name] = 0 if masked is None else int(masked[here.to(masked.device)].sum())
    else:
        known = batch.known or batch.count()
        found = {
            "text": {"mlm": known.words},
            "image": {"mim": known.patches},
            "pair": {"mvlm_text": known.words, "mvlm_image": known.patches},
        }[batch.stream]
    return {name: count for name, count in found.items() if getattr(config, name)}


PAIR_VIEWS = {"mvlm_text": score_pair_words, "mvlm_image": score_pair_patches}
