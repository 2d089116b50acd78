"""Scores on held-out samples: what a run logs while it trains, and what `vlbeit eval` reports."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch

from vlbeit.config import CropConfig, PretrainConfig
from vlbeit.data.loader import PretrainingStream, build_streams, open_streams
from vlbeit.data.order import Visit
from vlbeit.data.records import BadSample
from vlbeit.data.streams import SampleStream
from vlbeit.errors import InputError
from vlbeit.nn.linear import autocast
from vlbeit.nn.model import VLBeit
from vlbeit.objectives import count_targets, score_batch
from vlbeit.tokens.text import TextTokenizer
from vlbeit.tokens.visual import VisualTokenizer
from vlbeit.types import Batch, Score

B = TypeVar("B")

EVAL_SEED = 20_220_603
"""Keys the masks of every evaluation, so that all runs and steps meet the same ones."""


def evaluation_config(config: PretrainConfig) -> PretrainConfig:
    """The run's config as evaluation wants it: whole pictures, no flip, no jitter, fixed masks.

    Every chosen word becomes [MASK]. Training leaves one in ten as it is (80 / 10 / 10), and a
    word that can still be read says nothing about what the model gets from the picture.
    """
    whole = CropConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=0.0)
    return replace(
        config,
        seed=EVAL_SEED,
        model=replace(config.model, drop_path=0.0),
        masking=replace(config.masking, to_mask=1.0, to_random=0.0),
        input=replace(config.input, images=whole, pairs=whole),
    )


def held_out_streams(
    config: PretrainConfig, text: TextTokenizer, split: str = "val"
) -> dict[str, PretrainingStream]:
    """The held-out sources by stream; a stream whose data has no such split is left out."""
    plain = evaluation_config(config)
    sources = open_streams(config, split)
    batch = replace(
        plain.batch,
        images=plain.batch.images if sources.get("image") else 0,
        texts=plain.batch.texts if sources.get("text") else 0,
        pairs=plain.batch.pairs if sources.get("pair") else 0,
    )
    built = build_streams(replace(plain, batch=batch), sources, text)
    return {stream.stream: stream for stream in built}


def visits_of(stream: SampleStream[Any, Any], limit: int) -> list[Visit]:
    """At most `limit` visits (0: all), spread evenly over the stream's records."""
    everything = [
        Visit(source, 0, index)
        for source, count in stream.records.items()
        for index in range(count)
    ]
    if limit <= 0 or limit >= len(everything):
        return everything
    return [everything[i * len(everything) // limit] for i in range(limit)]


def batches_of(
    stream: SampleStream[Any, B],
    visits: list[Visit],
    size: int,
    bad: list[BadSample] | None = None,
) -> Iterator[B]:
    """Micro-batches of the visits, in order; bad samples are left out and put into `bad`."""
    ready: list[Any] = []
    for visit in visits:
        try:
            ready.append(stream.sample(visit))
        except BadSample as error:
            if bad is not None:
                bad.append(error)
        if len(ready) == size:
            yield stream.batch(stream.stack(ready))
            ready = []
    if ready:
        yield stream.batch(stream.stack(ready))


def last_of(stream: PretrainingStream, visits: list[Visit]) -> Batch | None:
    """The last good sample, as a batch of one; None when all are bad."""
    for visit in reversed(visits):
        for batch in batches_of(stream, [visit], 1):
            return batch
    return None


class HeldOut:
    """Held-out loss and accuracy of every objective, on the same samples and masks each time."""

    def __init__(
        self, config: PretrainConfig, text: TextTokenizer, visual: VisualTokenizer | None
    ) -> None:
        self._config, self._text, self._visual = config, text, visual
        self._batches: list[Batch] | None = None

    def batches(self) -> list[Batch]:
        """Made at first use and kept: a few hundred small samples."""
        if self._batches is None:
            self._batches = []
            for stream in held_out_streams(self._config, self._text).values():
                visits = visits_of(stream, self._config.log.eval_samples)
                self._batches += batches_of(stream, visits, self._config.batch.micro)
        return self._batches

    def measure(self, model: VLBeit, device: torch.device) -> dict[str, dict[str, float]]:
        """{"mlm": {"loss", "count", "accuracy"}, ...}; loss in nats, no dropped paths."""
        model.eval()
        totals: dict[str, Score] = {}
        with torch.no_grad(), autocast(device, self._config.precision):
            for batch in self.batches():
                batch = batch.to(device)
                if self._visual is not None and batch.pixels is not None:
                    batch = batch.with_codes(self._visual.encode(batch.pixels))
                if not count_targets(batch, self._config.objective):
                    continue
                for name, score in score_batch(model, batch, self._config.objective).items():
                    totals[name] = totals[name] + score if name in totals else score
        return {
            name: {
                "loss": float(score.mean_loss()),
                "count": int(score.count),
                "accuracy": float(score.accuracy()),
            }
            for name, score in totals.items()
            if score.count > 0
        }


def need_streams(streams: Mapping[str, object], data: tuple[str, ...], split: str) -> None:
    """Raise InputError when there is nothing to evaluate on."""
    if not streams:
        raise InputError(
            f"no {split} split in {', '.join(data) or 'no data folder'}: prepare one with "
            "`vlbeit prepare`, or name another --split"
        )
