"""The verbs of `vlbeit prepare` for downstream tasks: own rows and the tasks' official files."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vlbeit.data.prepare.arguments import Parser, add_verb, images_option, root_argument
from vlbeit.errors import ConfigError

if TYPE_CHECKING:
    from vlbeit.data.prepare.plan import Options, Plan

TASK_VERBS: Final = (
    "vqa", "statements", "retrieval", "classification", "segmentation", "entailment",
    "vqav2", "nlvr2", "ade20k", "snli-ve",
)  # fmt: skip


def add_task_verbs(verbs: "argparse._SubParsersAction[Parser]") -> None:
    """Their arguments."""
    vqa = _rows(verbs, "vqa", "rows of image, question and answer", "image", "question", "answer")
    _answers_options(vqa, 1)

    statements = _rows(
        verbs, "statements", "rows of two images, a statement and whether it is true",
        "left", "right", "statement", "truth",
    )  # fmt: skip
    for side in ("left", "right"):
        statements.add_argument(
            f"--{side}-box", type=_box, metavar="L,T,R,B",
            help=f"pixels to cut out as the {side} image; rows may then have one image",
        )  # fmt: skip

    _rows(verbs, "retrieval", "rows of image and captions", "image", "caption")

    classification = _rows(
        verbs, "classification", "rows of image and label, or a folder a class", "image", "label"
    )
    _classes_option(classification)

    segmentation = _rows(
        verbs, "segmentation", "rows of image and class map (8-bit PNG)", "image", "map"
    )
    _classes_option(segmentation)
    segmentation.add_argument(
        "--ignore-index", type=int, metavar="N", help="value of pixels that belong to no class"
    )

    _rows(
        verbs, "entailment", "rows of image, hypothesis and label", "image", "hypothesis", "label"
    )

    vqav2 = add_verb(verbs, "vqav2", "VQA v2's questions and annotations")
    root_argument(vqav2)
    vqav2.add_argument(
        "--parts", nargs="+", default=[], choices=("train", "val", "test", "test-dev"),
        help="default: those of train and val that are there",
    )  # fmt: skip
    for kind in ("questions", "annotations"):
        vqav2.add_argument(
            f"--{kind}", type=Path, nargs="+", default=[], metavar="FILE",
            help=f"files of {kind}, where they do not lie below FOLDER",
        )  # fmt: skip
    vqav2.add_argument(
        "--trainval", action="store_true", help="train on val too, but for --val-images of it"
    )
    vqav2.add_argument(
        "--val-images", type=int, default=1000, metavar="N", help="kept back by --trainval (1000)"
    )
    _answers_options(vqav2, 9)
    images_option(vqav2)

    nlvr2 = add_verb(verbs, "nlvr2", "NLVR2's train.json, dev.json and test1.json")
    ade20k = add_verb(verbs, "ade20k", "ADE20K's ADEChallengeData2016")
    snli_ve = add_verb(verbs, "snli-ve", "SNLI-VE's snli_ve_*.jsonl on Flickr30k")
    for parser in (nlvr2, ade20k, snli_ve):
        root_argument(parser)
    for parser in (nlvr2, snli_ve):
        parser.add_argument(
            "--annotations", type=Path, nargs="+", default=[], metavar="FILE",
            help="files of rows, where they do not lie in FOLDER",
        )  # fmt: skip
        images_option(parser)

    for name in TASK_VERBS:
        verbs.choices[name].add_argument("--licence", metavar="TEXT", help="kept in dataset.json")


def _rows(
    verbs: "argparse._SubParsersAction[Parser]", name: str, help_text: str, *columns: str
) -> argparse.ArgumentParser:
    parser = add_verb(verbs, name, help_text)
    parser.add_argument("sources", nargs="+", metavar="FILE", help="JSONL, CSV, TSV or JSON list")
    images_option(parser)
    for column in columns:
        parser.add_argument(
            f"--{column}-column", metavar="NAME", help=f"what the rows call it, if not {column!r}"
        )
    return parser


def _answers_options(parser: argparse.ArgumentParser, least: int) -> None:
    parser.add_argument("--answers", type=Path, metavar="FILE", help="the answer list, in order")
    parser.add_argument(
        "--min-answers", type=int, default=least, metavar="N",
        help="without --answers: questions that must have an answer for it to be in the list",
    )  # fmt: skip


def _classes_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--classes", type=Path, metavar="FILE", help="names, in order")


def _box(text: str) -> tuple[int, int, int, int]:
    numbers = text.split(",")
    if len(numbers) != 4 or not all(number.strip().isdigit() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: expected left,top,right,bottom in pixels")
    left, top, right, bottom = map(int, numbers)
    return left, top, right, bottom


def plan_task(given: argparse.Namespace, images: Sequence[Path], options: "Options") -> "Plan":
    """What the verb finds in the user's files."""
    if getattr(given, "min_answers", 1) < 1:
        raise ConfigError(f"--min-answers {given.min_answers}: must be at least 1")
    plan = _plan(given, images, options)
    if given.licence is not None:
        plan.facts["licence"] = given.licence
    return plan


def _columns(given: argparse.Namespace, **names: str) -> dict[str, tuple[str, ...]]:
    """Argument of a plan -> the column that the user calls otherwise."""
    asked = {argument: getattr(given, f"{column}_column") for argument, column in names.items()}
    return {argument: (name,) for argument, name in asked.items() if name is not None}


def _plan(given: argparse.Namespace, images: Sequence[Path], options: "Options") -> "Plan":
    if given.verb == "vqa":
        from vlbeit.data.prepare.questions import plan_vqa

        return plan_vqa(
            given.sources,
            images,
            options,
            answers=given.answers,
            min_answers=given.min_answers,
            **_columns(given, image="image", question="question", answer="answer"),
        )
    if given.verb == "statements":
        from vlbeit.data.prepare.statements import plan_statements

        return plan_statements(
            given.sources,
            images,
            options,
            left_box=given.left_box,
            right_box=given.right_box,
            **_columns(given, left="left", right="right", statement="statement", truth="truth"),
        )
    if given.verb == "retrieval":
        from vlbeit.data.prepare.blind import CaptionSummary
        from vlbeit.data.prepare.pairs import plan_pairs

        plan = plan_pairs(
            given.sources,
            images,
            options,
            image_column=given.image_column or "image",
            caption_column=given.caption_column or "caption",
        )
        plan.serves, plan.summary = "retrieval", CaptionSummary()
        return plan
    if given.verb == "classification":
        from vlbeit.data.prepare.classification import plan_classification

        return plan_classification(
            given.sources,
            given.images,
            options,
            classes=given.classes,
            image_column=given.image_column or "image",
            label_column=given.label_column or "label",
        )
    if given.verb == "segmentation":
        from vlbeit.data.prepare.segmentation import plan_segmentation

        return plan_segmentation(
            given.sources,
            images,
            options,
            classes=given.classes,
            ignore=given.ignore_index,
            **_columns(given, image="image", label="map"),
        )
    if given.verb == "entailment":
        from vlbeit.data.prepare.entailment import plan_entailment

        return plan_entailment(
            given.sources,
            images,
            options,
            **_columns(given, image="image", hypothesis="hypothesis", label="label"),
        )
    if given.verb == "vqav2":
        from vlbeit.data.prepare.vqav2 import plan_vqav2

        return plan_vqav2(
            given.root,
            parts=given.parts,
            questions=given.questions,
            annotations=given.annotations,
            images=images,
            trainval=given.trainval,
            val_images=given.val_images,
            answers=given.answers,
            min_answers=given.min_answers,
            options=options,
        )
    if given.verb == "ade20k":
        from vlbeit.data.prepare.segmentation import plan_ade20k

        return plan_ade20k(given.root, options)
    if given.verb == "nlvr2":
        from vlbeit.data.prepare.statements import plan_nlvr2

        return plan_nlvr2(given.root, annotations=given.annotations, images=images, options=options)
    from vlbeit.data.prepare.entailment import plan_snli_ve

    return plan_snli_ve(given.root, annotations=given.annotations, images=images, options=options)
