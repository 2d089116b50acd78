"""k nearest neighbours: what a trunk's features say about classes when nothing is trained.

The feature of a picture is the mean of its patch vectors after the final norm, scaled to length
one. The class is voted for by the nearest training pictures, each with exp(similarity / 0.07)
(Wu and others, arXiv 1805.01978; DINO's protocol).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlbeit.checkpoint import Checkpoint
from vlbeit.config import ClassificationRun, ModelConfig, from_dict
from vlbeit.data.records import BadSample
from vlbeit.data.task_stream import TaskStream, open_task
from vlbeit.errors import ConfigError, InputError
from vlbeit.eval.downstream import estimates, held_out_stream
from vlbeit.eval.heldout import batches_of, visits_of
from vlbeit.eval.vectors import patches_of
from vlbeit.nn.model import VLBeit
from vlbeit.tasks import Figure, build_task, learn_facts
from vlbeit.tokens.text import TextTokenizer

TEMPERATURE = 0.07


def features(
    model: VLBeit, stream: TaskStream, size: int, device: torch.device, bad: list[BadSample]
) -> tuple[Tensor, np.ndarray, list[str]]:
    """(N, D) float32 of length one on the CPU, (N,) labels, N sample ids; good samples only."""
    found, labels = [], []
    names: list[str] = []
    with torch.no_grad():
        for batch in batches_of(stream, visits_of(stream, 0), size, bad):
            states = model.embed_image(batch.to(device).image())
            mean = model.backbone.mean(states, patches_of(states))
            found.append(F.normalize(mean.float(), dim=-1).cpu())
            labels.append(batch.targets["label"].numpy())
            names += batch.sample_ids
    if not found:
        raise InputError(
            f"no usable sample of {stream.stream}" + (f", the first: {bad[0]}" if bad else "")
        )
    return torch.cat(found), np.concatenate(labels), names


def vote(known: Tensor, labels: np.ndarray, asked: Tensor, k: int, classes: int) -> np.ndarray:
    """(M,) the class of each asked feature.

    Shapes: known (N, D), labels (N,), asked (M, D), all of length one.
    """
    answers = []
    k = min(k, len(known))
    marks = F.one_hot(torch.from_numpy(labels).long(), classes).double()
    for part in asked.split(256):
        near = (part @ known.T).double().topk(k, dim=1)
        votes = (near.values / TEMPERATURE).exp()[:, :, None] * marks[near.indices]  # (m, k, C)
        answers.append(votes.sum(dim=1).argmax(dim=-1).numpy())
    return np.concatenate(answers)


def evaluate_neighbours(
    checkpoint: Checkpoint,
    data: Sequence[str],
    *,
    k: int,
    split: str = "val",
    batch_size: int = 64,
    device: str = "auto",
    scratch: bool = False,
) -> dict[str, Any]:
    """k-NN accuracy of a pretrained (or fine-tuned) checkpoint's trunk on a classification source.

    Args:
        data: prepared folders with a train and another split; empty: those of the run.
        scratch: fresh weights instead, what a random trunk of the same shape gives.

    Returns:
        As `evaluate_task`, with one figure, "knn".

    Raises:
        ConfigError: k below 1.
        InputError: no such source, or no usable sample.
    """
    if k < 1:
        raise ConfigError(f"--neighbours must be at least 1, found {k}")
    folders = tuple(data) or tuple(checkpoint.config["data"])
    shape = from_dict(ModelConfig, checkpoint.config["model"])
    config = ClassificationRun(recipe="knn", data=folders, model=shape)
    facts = learn_facts(config, open_task(folders, "task:classification", "train"))
    task = build_task(config, facts)
    text = TextTokenizer.load(checkpoint.text_tokenizer)
    model = VLBeit(shape, seed=0 if scratch else None)
    if not scratch:
        given = checkpoint.model_tensors()
        trunk = {name: t for name, t in given.items() if not name.startswith("task.")}
        if "task" in checkpoint.config:
            model.put_on(torch.nn.Identity())  # no head is asked here
        model.load_tensors(trunk, str(checkpoint.folder))
    where = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    )
    model = model.to(where).eval()
    bad: list[BadSample] = []
    known, labels, _ = features(
        model, held_out_stream(config, task, text, "train"), batch_size, where, []
    )
    asked, truth, names = features(
        model, held_out_stream(config, task, text, split), batch_size, where, bad
    )
    said = vote(known, labels, asked, k, len(facts["classes"]))
    guess = (truth == facts["most_frequent"]).tolist()
    return {
        "checkpoint": str(checkpoint.folder) + (" (fresh weights)" if scratch else ""),
        "step": checkpoint.step,
        "task": f"classification by {k} nearest neighbours",
        "split": split,
        "data": list(folders),
        "samples": len(names),
        "skipped": [str(sample) for sample in bad],
        "figures": estimates({"knn": Figure.share((said == truth).tolist(), guess)}, names),
    }
