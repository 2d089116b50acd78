"""What the server can be asked: one table of modes with their fields, limits and answers.

Requests are checked against it, the OpenAPI document is written from it, and it says how a mode's
waiting requests are put to the Predictor together. A mode is a method of the Predictor, and its
answer is what the method returns, as JSON.
"""

import base64
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from vlbeit.eval.drawing import class_colour
from vlbeit.eval.fill import FilledPatches, FilledWords, panels
from vlbeit.eval.word_attention import Layer
from vlbeit.serve.predictor import Answer, Segmented
from vlbeit.serve.served_runs import ServedRuns
from vlbeit.tokens.text import MASK

Row: TypeAlias = Mapping[str, Any]
"""The fields of one request: arrays, texts and numbers by name; None for what was left out."""
Schema: TypeAlias = dict[str, Any]


class Kind(Enum):
    """What a field holds. In JSON a picture is base64; in a form it is the bytes of a file."""

    PICTURE = "picture"
    """Reaches the Predictor as (H, W, 3) uint8 at the model's size."""
    WHOLE_PICTURE = "whole picture"
    """Reaches it as encoded bytes, because the answer has the picture's own size."""
    TEXT = "text"
    TOP = "top"
    LAYER = "layer"
    PATCHES = "patches"


@dataclass(frozen=True, kw_only=True)
class Field:
    name: str
    kind: Kind
    help: str
    required: bool = True


@dataclass(frozen=True, kw_only=True)
class Mode:
    """One thing to ask."""

    name: str
    help: str
    fields: tuple[Field, ...]
    answer: Schema
    """JSON schema of the answer."""
    ask: Callable[[ServedRuns, Sequence[Row]], list[dict[str, Any]]]
    """The answers to rows that have the same `key`."""
    one_of: tuple[str, ...] = ()
    """Of these fields exactly one is given."""
    together: bool = True
    """Whether the Predictor takes several at a time."""

    def key(self, row: Row) -> tuple[Any, ...]:
        """What requests must have in common to be asked together: numbers, and which fields."""
        numbers = (Kind.TOP, Kind.LAYER)
        return self.name, *(
            row[one.name] if one.kind in numbers else row[one.name] is not None
            for one in self.fields
        )


DEFAULT_TOP = 5
IMAGE = Field(name="image", kind=Kind.PICTURE, help="a picture")
TEXT = Field(name="text", kind=Kind.TEXT, help="a text")
TOP = Field(
    name="top",
    kind=Kind.TOP,
    required=False,
    help=f"how many candidates, the most probable first (default {DEFAULT_TOP})",
)


def optional(field: Field, help: str) -> Field:
    return dataclasses.replace(field, required=False, help=help)


# ---- answers


def as_json(value: Any) -> Any:
    """Named tuples and dataclasses as objects, arrays and tensors as lists."""
    if isinstance(value, Tensor | np.ndarray):
        return value.tolist()
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: as_json(part) for name, part in value._asdict().items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    if isinstance(value, np.generic):
        return value.item()
    return value


def png(picture: Image.Image) -> str:
    """Base64 of a PNG."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def answers_json(found: Sequence[Answer]) -> dict[str, Any]:
    return {"answers": as_json(found)}


def words_json(found: FilledWords) -> dict[str, Any]:
    return {**as_json(found), "best": found.best()}


def patches_json(found: FilledPatches) -> dict[str, Any]:
    drawn = panels(found)
    return {
        "grid": list(found.grid),
        "hidden": np.flatnonzero(found.hidden).tolist(),
        "answers": found.answers.tolist(),
        "filled": found.filled.tolist(),
        "probabilities": found.probabilities.tolist(),
        "right": found.right,
        "picture": png(Image.fromarray(drawn["filled in"])),
        "codes_picture": png(Image.fromarray(drawn["tokenizer's own"])),
    }


def segmented_json(found: Segmented) -> dict[str, Any]:
    """The map is a palette PNG: its pixels are numbers of classes, its palette their colours."""
    drawn = Image.fromarray(found.classes)
    drawn.putpalette([level for n in range(len(found.names)) for level in class_colour(n)])
    colours = {share.number: "#{:02x}{:02x}{:02x}".format(*class_colour(share.number))
               for share in found.shares}  # fmt: skip
    return {
        "size": list(found.classes.shape),
        "classes": [{**as_json(s), "colour": colours[s.number]} for s in found.shares],
        "picture": png(drawn),
    }


# ---- schemas


NUMBER: Schema = {"type": "number"}
STRING: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
PNG_PICTURE: Schema = {
    "type": "string",
    "contentEncoding": "base64",
    "contentMediaType": "image/png",
}
SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}


def array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def record(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


ANSWERS = record(answers=array(record(name=STRING, probability=SHARE)))
VECTOR = record(vector=array(NUMBER))


# ---- asking


def column(rows: Sequence[Row], name: str) -> list[Any]:
    return [row[name] for row in rows]


def listed(
    method: str, names: Sequence[str], to_json: Callable[[Any], dict[str, Any]] = as_json
) -> Callable[[ServedRuns, Sequence[Row]], list[dict[str, Any]]]:
    """Puts the columns of all rows to a method of the Predictor at once; `top` goes as it is."""

    def ask(served: ServedRuns, rows: Sequence[Row]) -> list[dict[str, Any]]:
        run = served.answering[method]
        options = {"top": rows[0]["top"]} if "top" in rows[0] else {}
        found = getattr(run, method)(*(column(rows, name) for name in names), **options)
        return [to_json(one) for one in found]

    return ask


def one_by_one(
    ask: Callable[[ServedRuns, Row], dict[str, Any]],
) -> Callable[[ServedRuns, Sequence[Row]], list[dict[str, Any]]]:
    return lambda served, rows: [ask(served, row) for row in rows]


def filled_words(served: ServedRuns, row: Row) -> dict[str, Any]:
    run = served.answering["fill_words"]
    return words_json(run.fill_words(row["text"], row["image"], row["top"]))


def filled_patches(served: ServedRuns, row: Row) -> dict[str, Any]:
    run = served.answering["fill_patches"]
    return patches_json(run.fill_patches(row["image"], hidden=row["hidden"], text=row["text"]))


def attended(served: ServedRuns, row: Row) -> dict[str, Any]:
    run = served.answering["attention"]
    layer: Layer = "rollout" if row["layer"] is None else row["layer"]
    found: dict[str, Any] = as_json(run.attention(row["image"], row["text"], layer))
    return found


def searched(served: ServedRuns, row: Row) -> dict[str, Any]:
    run, index = served.answering["search"], served.index
    assert index is not None
    found = run.search(index, text=row["text"], image=row["image"], top=row["top"])
    return {
        "kind": index.kind,
        "found": [{**as_json(one), "url": served.picture_url(one.id)} for one in found],
    }


def vector_json(found: Any) -> dict[str, Any]:
    return {"vector": as_json(found)}


MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode(
            name="encode_image",
            help="the vector of a picture, of length 1",
            fields=(IMAGE,),
            answer=VECTOR,
            ask=listed("encode_image", ["image"], vector_json),
        ),
        Mode(
            name="encode_text",
            help="the vector of a text, of length 1",
            fields=(TEXT,),
            answer=VECTOR,
            ask=listed("encode_text", ["text"], vector_json),
        ),
        Mode(
            name="encode_pair",
            help="the vector of a picture and a text read together, of length 1",
            fields=(IMAGE, TEXT),
            answer=VECTOR,
            ask=listed("encode_pair", ["image", "text"], vector_json),
        ),
        Mode(
            name="fill_words",
            help="candidates for every hidden word, with a picture or from the text alone",
            fields=(
                dataclasses.replace(TEXT, help=f"a text with {MASK} in place of hidden words"),
                optional(IMAGE, "the picture that the text is about"),
                TOP,
            ),
            answer=record(
                text=STRING,
                guesses=array(array(record(piece=STRING, probability=SHARE))),
                best=STRING,
            ),
            ask=one_by_one(filled_words),
            together=False,
        ),
        Mode(
            name="fill_patches",
            help="the model's codes for hidden patches, and the picture drawn from them",
            fields=(
                IMAGE,
                Field(
                    name="hidden",
                    kind=Kind.PATCHES,
                    help="numbers of the hidden patches, row by row from the top left, from 0",
                ),
                optional(TEXT, "what the picture shows"),
            ),
            answer=record(
                grid=array(COUNT),
                hidden=array(COUNT),
                answers=array(COUNT),
                filled=array(COUNT),
                probabilities=array(SHARE),
                right=COUNT,
                picture=PNG_PICTURE,
                codes_picture=PNG_PICTURE,
            ),
            ask=one_by_one(filled_patches),
            together=False,
        ),
        Mode(
            name="match",
            help="whether a picture and a text belong together",
            fields=(IMAGE, TEXT),
            answer=record(similarity=NUMBER, probability={"type": ["number", "null"]}),
            ask=listed("match", ["image", "text"]),
        ),
        Mode(
            name="answer",
            help="answers to a question about a picture",
            fields=(IMAGE, Field(name="question", kind=Kind.TEXT, help="a question"), TOP),
            answer=ANSWERS,
            ask=listed("answer", ["image", "question"], answers_json),
        ),
        Mode(
            name="compare",
            help="whether a statement about two pictures is true",
            fields=(
                Field(name="left", kind=Kind.PICTURE, help="the picture to the left"),
                Field(name="right", kind=Kind.PICTURE, help="the picture to the right"),
                Field(name="statement", kind=Kind.TEXT, help="a sentence about both"),
            ),
            answer=record(true={"type": "boolean"}, probability=SHARE),
            ask=listed("compare", ["left", "right", "statement"]),
        ),
        Mode(
            name="entail",
            help="whether a picture entails a sentence",
            fields=(IMAGE, Field(name="sentence", kind=Kind.TEXT, help="a sentence about it")),
            answer=record(entailment=SHARE, neutral=SHARE, contradiction=SHARE),
            ask=listed("entail", ["image", "sentence"]),
        ),
        Mode(
            name="classify",
            help="the class of a picture",
            fields=(IMAGE, TOP),
            answer=ANSWERS,
            ask=listed("classify", ["image"], answers_json),
        ),
        Mode(
            name="segment",
            help="the class of every pixel, as a palette PNG of the picture's own size",
            fields=(dataclasses.replace(IMAGE, kind=Kind.WHOLE_PICTURE),),
            answer=record(
                size=array(COUNT),
                classes=array(record(name=STRING, number=COUNT, share=SHARE, colour=STRING)),
                picture=PNG_PICTURE,
            ),
            ask=listed("segment", ["image"], segmented_json),
            together=False,
        ),
        Mode(
            name="search",
            help="the nearest of the index: pictures for a text, or texts for a picture",
            fields=(optional(TEXT, "a text"), optional(IMAGE, "a picture"), TOP),
            one_of=("text", "image"),
            answer=record(
                kind={"type": "string", "enum": ["image", "text"]},
                found=array(
                    record(
                        id=STRING,
                        similarity=NUMBER,
                        probability={"type": ["number", "null"]},
                        url={"type": ["string", "null"]},
                    )
                ),
            ),
            ask=one_by_one(searched),
            together=False,
        ),
        Mode(
            name="attention",
            help="how much each word attends to each patch",
            fields=(
                IMAGE,
                TEXT,
                Field(
                    name="layer",
                    kind=Kind.LAYER,
                    required=False,
                    help="number of the layer, from 1; left out: rollout over all",
                ),
            ),
            answer=record(
                words=array(STRING),
                grid=array(COUNT),
                weights=array(array(SHARE)),
                layer={"type": ["integer", "string"]},
            ),
            ask=one_by_one(attended),
            together=False,
        ),
    )
}
"""By name. To add one: a method of the Predictor, and its row here."""
