"""From the bytes of a request to the fields of a mode: received, parsed and checked.

JSON (`{"image": base64, "question": "..."}`) and multipart/form-data with the same names give the
same fields. Nothing here opens a path or a URL: a picture is bytes in the request.
"""

import base64
import binascii
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from vlbeit.config import ServeConfig
from vlbeit.data.transforms import BadImage, BadText, clean_text, decode_image, resize
from vlbeit.serve.api_errors import ApiError, busy
from vlbeit.serve.modes import DEFAULT_TOP, Field, Kind, Mode
from vlbeit.serve.predictor import Predictor
from vlbeit.tokens.text import MASK

MAX_PARTS = 8
"""Parts of a form; no mode has more fields."""
NUMBERS = (Kind.TOP, Kind.LAYER, Kind.PATCHES)
"""Fields that a form holds as JSON: `5`, `[0, 7]`."""


class HeldBytes:
    """Bytes of bodies that the server holds, those still arriving included, with a limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    @contextmanager
    def account(self) -> Iterator["Account"]:
        """Counts the bytes of one request until it is answered."""
        account = Account(self)
        try:
            yield account
        finally:
            self.held -= account.taken


class Account:
    """One request's share of the bytes held."""

    def __init__(self, held: HeldBytes) -> None:
        self.of = held
        self.taken = 0

    def take(self, count: int) -> None:
        """Raises ApiError 503 where the server holds too much already."""
        if self.of.held + count > self.of.limit:
            raise busy(
                "too_many_bytes_held",
                f"the bodies of requests in work have {self.of.held} bytes, the server holds at "
                f"most {self.of.limit}; come again",
                close=True,
            )
        self.of.held += count
        self.taken += count


def check_head(headers: Mapping[str, str], config: ServeConfig) -> None:
    """Refuse what the head alone shows to be unusable, before a byte of the body is read.

    Raises:
        ApiError: 411, 413 or 415; 400 for two lengths that contradict each other.
    """
    length, coding = headers.get("content-length"), headers.get("transfer-encoding")
    if length is None and coding is None:
        raise ApiError(411, "length_required", "a POST needs Content-Length or a chunked body")
    if length is not None and coding is not None:
        raise ApiError(
            400, "bad_http", "Content-Length and Transfer-Encoding together; send one", close=True
        )
    if length is not None and int(length) > config.max_body:  # h11 let digits only through
        raise too_long(f"{length} bytes", config)
    packed = headers.get("content-encoding", "identity")
    if packed.lower() != "identity":
        raise ApiError(
            415,
            "unsupported_encoding",
            f"Content-Encoding {packed[:40]!r} is not read; send the body as it is",
            close=True,
        )
    kind = headers.get("content-type", "")
    if media_type(kind) not in ("application/json", "multipart/form-data"):
        raise ApiError(
            415,
            "unsupported_media_type",
            f"Content-Type {kind[:80]!r}: expected application/json or multipart/form-data",
            close=True,
        )


def media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def too_long(found: str, config: ServeConfig) -> ApiError:
    return ApiError(
        413,
        "body_too_large",
        f"the body has {found}; the limit is {config.max_body} bytes",
        close=True,
    )


def parse_body(mode: Mode, body: bytes, content_type: str) -> dict[str, Any]:
    """Names and values as they were sent, not checked yet.

    Raises:
        ApiError: 400, or 413 for too many parts.
    """
    if media_type(content_type) == "application/json":
        return parse_json(body)
    found = parse_form(body, content_type)
    for field in mode.fields:
        if field.kind in NUMBERS and isinstance(found.get(field.name), str):
            found[field.name] = _number_in_form(found[field.name])
    return found


def parse_json(body: bytes) -> dict[str, Any]:
    """One JSON object, strictly: no NaN, no Infinity, no name twice, UTF-8.

    Raises:
        ApiError: 400.
    """
    try:
        found = json.loads(
            body.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_unique
        )
    except RecursionError:
        raise ApiError(400, "bad_json", "the body is nested too deep") from None
    except UnicodeDecodeError as error:
        raise ApiError(400, "bad_json", f"the body is not UTF-8: byte {error.start}") from None
    except ValueError as error:
        raise ApiError(400, "bad_json", f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise ApiError(400, "bad_json", f"expected a JSON object, found {_type_name(found)}")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in an object")
    return found


class Part:
    """One part of a form, while it is read."""

    def __init__(self) -> None:
        self.headers: dict[bytes, bytes] = {}
        self.data = bytearray()

    def name_and_file(self) -> tuple[str, bool]:
        """The field, and whether the part is a file."""
        _, options = parse_options_header(self.headers.get(b"content-disposition"))
        name = options.get(b"name")
        if name is None:
            raise ApiError(400, "bad_form", "a part without a name in its Content-Disposition")
        return name.decode("utf-8", "replace"), b"filename" in options


def parse_form(body: bytes, content_type: str) -> dict[str, Any]:
    """Files as bytes, other parts as text.

    Raises:
        ApiError: 400, or 413 for too many parts.
    """
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise ApiError(400, "bad_form", "multipart/form-data without a boundary")
    found: dict[str, Any] = {}
    part, field_name, field_value, parts, complete = Part(), b"", b"", 0, False

    def begin() -> None:
        nonlocal part, parts
        part, parts = Part(), parts + 1
        if parts > MAX_PARTS:
            raise ApiError(413, "too_many_parts", f"a form has at most {MAX_PARTS} parts")

    def named(data: bytes, start: int, end: int) -> None:
        nonlocal field_name
        field_name += data[start:end]

    def valued(data: bytes, start: int, end: int) -> None:
        nonlocal field_value
        field_value += data[start:end]

    def header_end() -> None:
        nonlocal field_name, field_value
        part.headers[field_name.lower()] = field_value
        field_name = field_value = b""

    def content(data: bytes, start: int, end: int) -> None:
        part.data += data[start:end]

    def end() -> None:
        name, is_file = part.name_and_file()
        if name in found:
            raise ApiError(400, "bad_form", f"the field {name[:80]!r} stands twice")
        found[name] = bytes(part.data) if is_file else _form_text(name, part.data)

    def last() -> None:
        nonlocal complete
        complete = True

    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": begin,
                "on_header_field": named,
                "on_header_value": valued,
                "on_header_end": header_end,
                "on_part_data": content,
                "on_part_end": end,
                "on_end": last,
            },
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise ApiError(400, "bad_form", f"not a form: {str(error)[:200]}") from None
    if not complete:
        raise ApiError(400, "bad_form", "the form has no closing boundary")
    if not parts:
        raise ApiError(400, "bad_form", "no part in the form")
    return found


def _form_text(name: str, data: bytearray) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise ApiError(400, "bad_form", f"the field {name[:80]!r} is not UTF-8") from None


def read_fields(
    mode: Mode, given: Mapping[str, Any], run: Predictor, config: ServeConfig
) -> dict[str, Any]:
    """The row of a mode: every field checked, pictures decoded.

    Raises:
        ApiError: 400 for a field that is missing, unknown, of a wrong type or out of range, 413
            for a picture or a text over its limit, 422 for one that cannot be used.
    """
    names = [field.name for field in mode.fields]
    for name in given:
        if name not in names:
            raise bad_field(
                name, f"{mode.name} has no such field{nearest(name, names)} ({', '.join(names)})"
            )
    row = {
        field.name: read_field(field, given[field.name], run, config)
        if given.get(field.name) is not None
        else left_out(mode, field)
        for field in mode.fields
    }
    count = sum(row[name] is not None for name in mode.one_of)
    if mode.one_of and count != 1:
        raise ApiError(
            400, "bad_field", f"{mode.name} takes one of {' and '.join(mode.one_of)}, found {count}"
        )
    return row


def left_out(mode: Mode, field: Field) -> int | None:
    if field.required:
        raise bad_field(field.name, f"is missing; {mode.name} needs it: {field.help}")
    return DEFAULT_TOP if field.kind is Kind.TOP else None


def read_field(field: Field, value: Any, run: Predictor, config: ServeConfig) -> Any:
    """One value, checked."""
    match field.kind:
        case Kind.PICTURE | Kind.WHOLE_PICTURE:
            data = picture_bytes(field.name, value)
            picture = read_picture(field.name, data, config)
            if field.kind is Kind.WHOLE_PICTURE:
                # Decoded again for the model: whole pictures that wait would take too much memory.
                return data
            # The size the model sees: `plain` leaves it as it is, and what waits is small.
            return resize(picture, run.run.config.model.image_size)
        case Kind.TEXT:
            return read_text(field.name, value, config)
        case Kind.TOP:
            return read_integer(field.name, value, 1, config.max_top)
        case Kind.LAYER:
            return read_integer(field.name, value, 1, run.run.config.model.layers)
        case Kind.PATCHES:
            return read_patches(field.name, value, run)


def picture_bytes(name: str, value: Any) -> bytes:
    """Bytes of a file, or base64 with or without `data:...;base64,`."""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise bad_field(name, f"expected a picture as base64, found {_type_name(value)}")
    if value.startswith("data:"):
        value = value.partition(",")[2]
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: not ASCII
        raise bad_field(name, f"not base64: {str(error)[:100]}") from None


def read_picture(name: str, data: bytes, config: ServeConfig) -> np.ndarray:
    try:
        return decode_image(data, max_pixels=config.max_pixels)
    except BadImage as error:
        large = error.reason == "too_many_pixels"
        raise ApiError(
            413 if large else 422, error.reason, f"the field {name!r}: {error.detail}"
        ) from None


def read_text(name: str, value: Any, config: ServeConfig) -> str:
    """A text as it was sent, once it is known that `clean_text` admits it."""
    if not isinstance(value, str):
        raise bad_field(name, f"expected a text, found {_type_name(value)}")
    if len(value) > config.max_characters:
        raise ApiError(
            413,
            "text_too_long",
            f"the field {name!r} has {len(value)} characters; the limit is {config.max_characters}",
        )
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ApiError(422, "bad_text", f"the field {name!r} has half a surrogate pair")
    try:
        clean_text(value.replace(MASK, "x"))
    except BadText as error:
        raise ApiError(422, "bad_text", f"the field {name!r}: {error.detail}") from None
    return value


def read_integer(name: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise bad_field(name, f"expected a whole number, found {_type_name(value)}")
    if not low <= value <= high:
        raise bad_field(name, f"must be in {low}..{high}, found {str(value)[:20]}")
    return value


def read_patches(name: str, value: Any, run: Predictor) -> np.ndarray:
    """(P,) bool of the run's grid."""
    if not isinstance(value, list) or not value:
        raise bad_field(name, f"expected a list of patch numbers, found {_type_name(value)}")
    model = run.run.config.model
    count = (model.image_size[0] // model.patch) * (model.image_size[1] // model.patch)
    hidden = np.zeros(count, dtype=bool)
    for number in value:
        hidden[read_integer(name, number, 0, count - 1)] = True
    return hidden


def _number_in_form(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint for who mistyped a name."""
    near = difflib.get_close_matches(name[:80], names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def bad_field(name: str, message: str) -> ApiError:
    return ApiError(400, "bad_field", f"the field {name[:80]!r}: {message}")


def _type_name(value: Any) -> str:
    names = {str: "a text", bool: "a boolean", int: "a number", float: "a number", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")
