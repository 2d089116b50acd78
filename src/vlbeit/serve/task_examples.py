"""Held-out samples to look at, with what a fine-tuned run says of them: for report.html.

Samples are spread evenly over the held-out split and none is chosen; bad ones are left out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from vlbeit.data.order import Visit
from vlbeit.data.records import BadSample, Record
from vlbeit.data.task_stream import TaskStream
from vlbeit.data.transforms import decode_image
from vlbeit.data.vqa_answers import answer_accuracy
from vlbeit.eval.downstream import TaskRun, held_out_stream
from vlbeit.eval.heldout import visits_of
from vlbeit.eval.report_tasks import (
    AskedExample,
    Candidate,
    MapExample,
    RankedExample,
    RankedPicture,
    TaskExample,
)
from vlbeit.serve.predictor import Predictor
from vlbeit.tasks.classification import Classification
from vlbeit.tasks.segmentation import Segmentation, groups
from vlbeit.tasks.statements import SIDES, picture

ANSWERS = 3
"""Candidates of an answer that are shown."""
NEAREST = 5
"""Pictures that are shown for a caption."""
COMPARED = 1_000
"""Most held-out pictures among which a caption's is looked for."""


def task_examples(run: Predictor, count: int, data: Sequence[str] = ()) -> list[TaskExample]:
    """At most `count` held-out samples of a run's task with its answers; none for a task that has
    no way to be shown.

    Args:
        data: prepared folders; empty: those the run was trained on.

    Raises:
        InputError: the data has no held-out split of the task.
    """
    found = EXAMPLES.get(run.trained_for)
    if found is None:
        return []
    assert isinstance(run.run, TaskRun)
    config = replace(run.run.config, data=tuple(data) or run.run.config.data)
    stream = held_out_stream(config, run.run.task, run.run.text, "val")
    return found(run, run.run, stream, count)


def vqa_examples(
    run: Predictor, asked: TaskRun, stream: TaskStream, count: int
) -> list[TaskExample]:
    found: list[TaskExample] = []
    for visit, record in good(stream, count):
        pixels, about = decode_image(record.image()), stream.about(visit)
        said = run.answer(pixels, about["question"], ANSWERS)
        found.append(
            AskedExample(
                pictures=(pixels,),
                text=about["question"],
                candidates=tuple(
                    Candidate(
                        one.name, one.probability, answer_accuracy(one.name, about["answers"]) > 0
                    )
                    for one in said
                ),
                truth=", ".join(dict.fromkeys(about["answers"])),
            )
        )
    return found


def class_examples(
    run: Predictor, asked: TaskRun, stream: TaskStream, count: int
) -> list[TaskExample]:
    assert isinstance(asked.task, Classification)
    found: list[TaskExample] = []
    for visit, record in good(stream, count):
        pixels, truth = (
            decode_image(record.image()),
            asked.task.classes[stream.about(visit)["label"]],
        )
        said = run.classify(pixels, ANSWERS)
        found.append(
            AskedExample(
                pictures=(pixels,),
                text="",
                candidates=tuple(
                    Candidate(one.name, one.probability, one.name == truth) for one in said
                ),
                truth=truth,
            )
        )
    return found


def statement_examples(
    run: Predictor, asked: TaskRun, stream: TaskStream, count: int
) -> list[TaskExample]:
    found: list[TaskExample] = []
    for visit, record in good(stream, count):
        left, right = (decode_image(picture(record, side)) for side in SIDES)
        about = stream.about(visit)
        true = run.compare(left, right, about["statement"]).probability
        both = [Candidate("true", true, about["truth"])]
        both.append(Candidate("false", 1 - true, not about["truth"]))
        found.append(
            AskedExample(
                pictures=(left, right),
                text=about["statement"],
                candidates=tuple(sorted(both, key=lambda one: -one.probability)),
                truth="true" if about["truth"] else "false",
            )
        )
    return found


def ranked_examples(
    run: Predictor, asked: TaskRun, stream: TaskStream, count: int
) -> list[TaskExample]:
    pictures: dict[str, np.ndarray] = {}  # by record: several captions may have one picture
    captions: dict[str, str] = {}
    for visit, record in good(stream, COMPARED):
        about = stream.about(visit)
        if about["record"] not in pictures:
            pictures[about["record"]] = decode_image(record.image())
            captions[about["record"]] = about["caption"]
    if not pictures:
        return []
    names = list(pictures)
    index = run.index(images=list(pictures.values()), ids=names)
    found: list[TaskExample] = []
    shown = min(count, len(names))
    for own in [names[i * len(names) // shown] for i in range(shown)]:
        near = run.search(index, text=captions[own], top=NEAREST)
        matches = run.match([pictures[one.id] for one in near], captions[own])
        ranked = tuple(
            RankedPicture(
                pixels=pictures[one.id],
                caption=captions[one.id],
                similarity=one.similarity,
                probability=match.probability,
                right=one.id == own,
            )
            for one, match in zip(near, matches, strict=True)
        )
        found.append(RankedExample(caption=captions[own], pictures=ranked, among=len(names)))
    return found


def map_examples(
    run: Predictor, asked: TaskRun, stream: TaskStream, count: int
) -> list[TaskExample]:
    task = asked.task
    assert isinstance(task, Segmentation)
    found: list[TaskExample] = []
    for visit, record in good(stream, count):
        batch = stream.batch(stream.stack([stream.sample(visit)])).to(asked.device)
        ((_, pixels, maps),) = groups(batch)
        with torch.no_grad():
            shares = task.class_shares(asked.model, asked.head, pixels, maps.shape[1:])
        found.append(
            MapExample(
                pixels=decode_image(record.image()),
                said=shares.argmax(dim=1)[0].cpu().numpy().astype(np.uint8),
                truth=maps[0].cpu().numpy().astype(np.uint8),
                classes=tuple(task.classes),
            )
        )
    return found


EXAMPLES: dict[str, Callable[[Predictor, TaskRun, TaskStream, int], list[TaskExample]]] = {
    "vqa": vqa_examples,
    "retrieval": ranked_examples,
    "classification": class_examples,
    "segmentation": map_examples,
    "statements": statement_examples,
}
"""By task."""


def good(stream: TaskStream, count: int) -> Iterator[tuple[Visit, Record]]:
    """The samples that can be made, with their records."""
    for visit in visits_of(stream, count):
        try:
            stream.sample(visit)
        except BadSample:
            continue
        source, record, _ = stream.place(visit)
        yield visit, source.read(record)
