"""`vlbeit` with numbers that are no numbers, on one rank: what POISON asks for (a JSON object).

    {"rank": 1, "steps": {"4": ["pixels", "nan"], ...}}

Before each update every rank prints the digest of its weights and optimizer state. A file of its
own, because torchrun starts it; it is no test.
"""

import hashlib
import json
import os
from dataclasses import replace
from typing import Any

import torch

from vlbeit.cli import command
from vlbeit.train import loop, pretrain

ASKED = json.loads(os.environ["POISON"])
HERE = int(os.environ["RANK"]) == ASKED["rank"]
now = 0

rate, score, sums = loop.lr_at, pretrain.score_batch, loop.global_sums


def told(step: int, config: Any) -> float:
    global now
    now = step
    return rate(step, config)


def poisoned(model: Any, batch: Any, config: Any) -> Any:
    place, value = ASKED["steps"].get(str(now), ("", "0"))
    if not HERE or batch.stream != "pair" or not place:
        return score(model, batch, config)
    hurt = float(value)
    if place == "pixels":
        pixels = batch.pixels.float() / 127.5 - 1
        pixels[0, 0, 0, 0] = hurt
        return score(model, replace(batch, pixels=pixels), config)
    scores = score(model, batch, config)
    words = scores["mvlm_text"]
    if place == "loss":
        hurt_sum = words.loss_sum * hurt
    else:  # the loss is what it was, its gradient is not

        def hurt_gradient(gradient: torch.Tensor) -> torch.Tensor:
            return gradient * hurt

        hurt_sum = words.loss_sum * 1.0
        hurt_sum.register_hook(hurt_gradient)
    return {**scores, "mvlm_text": replace(words, loss_sum=hurt_sum)}


def watched(run: Any, scores: Any) -> Any:
    found = hashlib.sha256()
    for parameter in run.model.parameters():
        found.update(parameter.detach().numpy().tobytes())
    for state in run.optimizer.state.values():
        for value in state.values():
            found.update(value.numpy().tobytes())
    line = f"<{os.environ['RANK']}> step {now} {found.hexdigest()}\n"
    os.write(1, line.encode())  # one write, so that lines of two ranks do not mix
    return sums(run, scores)


loop.lr_at, pretrain.score_batch, loop.global_sums = told, poisoned, watched

if __name__ == "__main__":
    command()
