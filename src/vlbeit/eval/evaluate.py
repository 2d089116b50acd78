"""Did it learn to look? Held-out scores per objective and the sighted / blind gap of pairs."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlbeit.checkpoint import find_checkpoint
from vlbeit.config import PretrainConfig, from_dict
from vlbeit.data.dataset import Dataset
from vlbeit.data.records import BadSample
from vlbeit.errors import InputError
from vlbeit.eval.bootstrap import RESAMPLES, Estimate, difference, ratio, resample_counts
from vlbeit.eval.heldout import batches_of, held_out_streams, last_of, need_streams, visits_of
from vlbeit.eval.scoring import (
    Rows,
    image_rows,
    neighbour,
    pair_patch_rows,
    pair_word_rows,
    text_rows,
)
from vlbeit.nn.linear import autocast
from vlbeit.nn.model import VLBeit
from vlbeit.tokens.text import TextTokenizer
from vlbeit.tokens.visual import VisualTokenizer, load_visual_tokenizer
from vlbeit.types import Batch

WORD_CONDITIONS = {
    "sighted": "with its own image",
    "blind": "with another image",
    "no_image": "from the text alone",
}
PATCH_CONDITIONS = {
    "with_text": "with its own text",
    "other_text": "with another text",
    "no_text": "from the image alone",
}


@dataclass(kw_only=True)
class LoadedRun:
    """A pretrained checkpoint ready to be asked."""

    folder: Path
    step: int
    config: PretrainConfig
    model: VLBeit
    text: TextTokenizer
    visual: VisualTokenizer | None
    device: torch.device


def load_run(
    place: str | Path, device: str = "auto", log: Callable[[str], None] = print
) -> LoadedRun:
    """Load a checkpoint folder, or the newest good checkpoint of a run folder.

    Raises:
        InputError: there is none, or it is damaged (a run folder falls back to the one before).
    """
    checkpoint = find_checkpoint(place, log)
    if "task" in checkpoint.config:
        raise InputError(
            f"{checkpoint.folder}: fine-tuned for {checkpoint.config['task']}; this needs a "
            "pretrained one"
        )
    config = from_dict(PretrainConfig, checkpoint.config)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    target = torch.device(device)
    model = VLBeit(config.model, seed=None)
    model.load_tensors(checkpoint.model_tensors(), str(checkpoint.folder))
    has_codes = (checkpoint.visual_tokenizer / "config.json").is_file()
    return LoadedRun(
        folder=checkpoint.folder,
        step=checkpoint.step,
        config=config,
        model=model.to(target).eval(),
        text=TextTokenizer.load(checkpoint.text_tokenizer),
        visual=load_visual_tokenizer(checkpoint.visual_tokenizer).to(target) if has_codes else None,
        device=target,
    )


@dataclass(kw_only=True)
class Collected:
    """Rows of one way of asking, over all batches."""

    parts: list[Rows] = field(default_factory=list)

    def add(self, rows: Rows, before: int) -> None:
        self.parts.append(rows.shifted(before))

    def rows(self) -> Rows:
        return Rows.join(self.parts)


def evaluate_run(
    run: LoadedRun,
    data: Sequence[str] = (),
    *,
    split: str = "val",
    samples: int = 0,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Everything `vlbeit eval` prints, as plain JSON.

    Args:
        data: prepared folders; empty: those the run was trained on.
        samples: most samples of each stream; 0: all.
        batch_size: changes nothing but speed (padding is hidden from attention).

    Returns:
        objectives: loss, accuracy (with 95 % intervals), count and the share of the most frequent
        answer, for mlm, mim, mvlm_text, mvlm_image. gap: the same for words with the right image,
        another image and none, and for patches with the right text, another and none, and the
        differences with paired intervals. attributes: where the data names attribute words.

    Hidden words are all shown as [MASK] (see `evaluation_config`). Bad samples are left out and
    named under `skipped`.

    Raises:
        InputError: nothing to evaluate on.
    """
    config = replace(run.config, data=tuple(data) or run.config.data)
    streams = held_out_streams(config, run.text, split)
    need_streams(dict(streams), config.data, split)
    bad: list[BadSample] = []
    asked: dict[str, Collected] = {}
    seen: dict[str, int] = {}

    def ask(name: str, rows: Rows, before: int) -> None:
        asked.setdefault(name, Collected()).add(rows, before)

    with torch.no_grad(), autocast(run.device, config.precision):
        for name, stream in streams.items():
            visits = visits_of(stream, samples)
            # The samples stand in a ring: the first one's neighbour is the last one, whatever
            # the batch size.
            previous = last_of(stream, visits) if name == "pair" else None
            if previous is not None:
                previous = previous.to(run.device)
            seen[name] = 0
            for batch in batches_of(stream, visits, batch_size, bad):
                batch = batch.to(run.device)
                if run.visual is not None and batch.pixels is not None:
                    batch = batch.with_codes(run.visual.encode(batch.pixels))
                before = seen[name]
                seen[name] += len(batch)
                if name == "text":
                    ask("mlm", text_rows(run.model, batch), before)
                elif name == "image" and run.visual is not None:
                    ask("mim", image_rows(run.model, batch), before)
                elif name == "pair" and previous is not None:
                    ask_pair(run, batch, previous, functools.partial(ask, before=before))
                    previous = batch
    if not any(seen.values()):
        raise InputError(f"all {len(bad)} held-out samples are bad, for example {bad[0]}")
    collected = {name: value.rows() for name, value in asked.items()}
    return report(run, config, split, collected, seen, bad)


def ask_pair(
    run: LoadedRun, batch: Batch, previous: Batch, ask: Callable[[str, Rows], object]
) -> None:
    """Both modalities of a pair batch under all conditions.

    `previous` ends with the neighbour of the batch's first sample. A sample that has only itself
    as a neighbour is not asked with another's picture or text.
    """
    model = run.model
    has_other = previous.sample_ids[-1] != batch.sample_ids[0]
    ask("sighted", pair_word_rows(model, batch))
    if has_other:
        assert batch.pixels is not None and previous.pixels is not None
        ask("blind", pair_word_rows(model, batch, neighbour(batch.pixels, previous.pixels[-1:])))
    ask("no_image", text_rows(model, batch))
    if run.visual is None:
        return
    ask("with_text", pair_patch_rows(model, batch))
    if has_other:
        ask("other_text", pair_patch_rows(model, batch, other_texts(batch, previous)))
    ask("no_text", image_rows(model, batch))


def other_texts(batch: Batch, previous: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sample's predecessor's words; widths differ between batches, so pad to the wider."""
    assert batch.words is not None and batch.word_valid is not None
    assert previous.words is not None and previous.word_valid is not None
    width = max(batch.words.shape[1], previous.words.shape[1])

    def widen(value: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(value, (0, width - value.shape[1]))

    return (
        neighbour(widen(batch.words), widen(previous.words)[-1:]),
        neighbour(widen(batch.word_valid), widen(previous.word_valid)[-1:]),
    )


def measured(rows: Rows, samples: int, counts: np.ndarray | None = None) -> dict[str, Any]:
    """Loss and accuracy with intervals, count, and the share of the most frequent answer."""
    sums = rows.sums(samples)
    if counts is None:
        counts = resample_counts(samples, RESAMPLES, samples)
    answers = np.bincount(rows.answer) if len(rows.answer) else np.zeros(1)
    return {
        "count": int(sums["count"].sum()),
        "loss": ratio(sums["loss"], sums["count"], counts).to_dict(),
        "accuracy": ratio(sums["correct"], sums["count"], counts).to_dict(),
        "top_share": float(answers.max() / max(answers.sum(), 1)),
    }


def gap(first: Rows, second: Rows, samples: int, counts: np.ndarray) -> dict[str, Any]:
    """What the first condition is better by: accuracy up, loss down; paired 95 % intervals."""
    one, two = first.sums(samples), second.sums(samples)

    def minus(key: str, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> Estimate:
        return difference((a[key], a["count"]), (b[key], b["count"]), counts)

    return {
        "accuracy": minus("correct", one, two).to_dict(),
        "loss": minus("loss", two, one).to_dict(),
    }


def report(
    run: LoadedRun,
    config: PretrainConfig,
    split: str,
    rows: Mapping[str, Rows],
    seen: Mapping[str, int],
    bad: Sequence[BadSample],
) -> dict[str, Any]:
    pairs = seen.get("pair", 0)
    counts = resample_counts(pairs, RESAMPLES, pairs) if pairs else np.zeros((0, 0))
    objectives = {
        name: measured(rows[name], seen[stream])
        for name, stream in (("mlm", "text"), ("mim", "image"))
        if name in rows
    }
    result: dict[str, Any] = {
        "checkpoint": str(run.folder),
        "step": run.step,
        "data": list(config.data),
        "split": split,
        "samples": dict(seen),
        "skipped": [str(sample) for sample in bad],
        "objectives": objectives,
    }
    words = {name: rows[name] for name in WORD_CONDITIONS if name in rows}
    patches = {name: rows[name] for name in PATCH_CONDITIONS if name in rows}
    if words:
        objectives["mvlm_text"] = measured(words["sighted"], pairs, counts)
        result["words"] = {n: measured(r, pairs, counts) for n, r in words.items()}
        result["word_gap"] = {
            f"sighted_minus_{name}": gap(words["sighted"], other, pairs, counts)
            for name, other in words.items()
            if name != "sighted"
        }
        kinds = attribute_words(config.data)
        if kinds and "blind" in words:
            result["attributes"] = attributes(run.text, kinds, words, pairs, counts)
    if patches:
        objectives["mvlm_image"] = measured(patches["with_text"], pairs, counts)
        result["patches"] = {n: measured(r, pairs, counts) for n, r in patches.items()}
        result["patch_gap"] = {
            f"with_text_minus_{name}": gap(patches["with_text"], other, pairs, counts)
            for name, other in patches.items()
            if name != "with_text"
        }
    return result


def attribute_words(folders: Sequence[str]) -> dict[str, list[str]]:
    """Words by kind, as a data folder's facts name them (`vlbeit prepare scenes` does)."""
    kinds: dict[str, list[str]] = {}
    for folder in folders:
        found = Dataset.open(folder).facts.get("attribute_words", {})
        kinds.update({str(kind): [str(w) for w in words] for kind, words in found.items()})
    return kinds


HEADLINE_KINDS = ("colour", "shape", "size", "count", "place")
"""The kinds that the headline figure covers, where the data names them; else all kinds."""


def attributes(
    text: TextTokenizer,
    kinds: Mapping[str, Sequence[str]],
    words: Mapping[str, Rows],
    samples: int,
    counts: np.ndarray,
) -> dict[str, Any]:
    """Hidden attribute words: right with their picture, with another, and by the prior.

    `prior` is what a guesser reaches who knows the kind of the hidden word and always says the
    most frequent word of that kind.
    """
    ids = {kind: word_ids(text, names) for kind, names in kinds.items()}
    table = {kind: attribute_row(words, found, samples, counts) for kind, found in ids.items()}
    headline = [kind for kind in HEADLINE_KINDS if kind in table] or list(table)
    every = np.concatenate([ids[kind] for kind in headline])
    overall = attribute_row(words, every, samples, counts)
    asked = sum(table[kind]["count"] for kind in headline)
    overall["prior"] = sum(table[k]["prior"] * table[k]["count"] for k in headline) / max(asked, 1)
    return {"kinds": table, "headline": headline, **overall}


def word_ids(text: TextTokenizer, names: Sequence[str]) -> np.ndarray:
    """Ids of the words that are one piece of the vocabulary; longer ones are not counted."""
    encoded = [text.encode(name) for name in names]
    return np.array([ids[0] for ids in encoded if len(ids) == 1], dtype=np.int64)


def attribute_row(
    words: Mapping[str, Rows], ids: np.ndarray, samples: int, counts: np.ndarray
) -> dict[str, Any]:
    """The accuracy under each condition, on hidden words that are among `ids`, the paired gap
    between sighted and blind, and the prior."""
    asked = {name: rows.where(np.isin(rows.answer, ids)) for name, rows in words.items()}
    found = {name: measured(rows, samples, counts) for name, rows in asked.items()}
    return {
        "count": found["sighted"]["count"],
        **{name: row["accuracy"] for name, row in found.items()},
        "sighted_minus_blind": gap(asked["sighted"], asked["blind"], samples, counts)["accuracy"],
        "prior": found["sighted"]["top_share"],
    }
