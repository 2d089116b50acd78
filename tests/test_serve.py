"""The server: the same answers as from Python, alone and together, and a clear refusal for all
else. What needs a process of its own (memory, signals, floods): faults/test_serve_faults.py."""

import asyncio
import base64
import copy
import io
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving import JSON, PICTURE, Client, Running, exchange, form_of, running, served_of_all_tasks
from test_transforms import CASES
from toy_tasks import write_tasks
from untrained_run import noise, png, retrieval, untrained
from vlbeit.cli import main
from vlbeit.config import ServeConfig
from vlbeit.data.transforms import BadImage, decode_image, plain
from vlbeit.errors import ConfigError, InputError, UnsafeError
from vlbeit.eval.drawing import class_colour
from vlbeit.serve.api_errors import ApiError
from vlbeit.serve.batching import Batcher
from vlbeit.serve.gallery import open_gallery
from vlbeit.serve.metrics import Metrics
from vlbeit.serve.modes import MODES, Kind
from vlbeit.serve.openapi import GET_ROUTES, document
from vlbeit.serve.page_files import PageFile, files_below
from vlbeit.serve.request_body import MAX_PARTS, read_fields
from vlbeit.serve.served_runs import ServedRuns, demo_runs
from vlbeit.serve.server import check, read_token

PAGE_FILES = {
    "index.html": PageFile(b"<!DOCTYPE html><title>page</title>", "text/html; charset=utf-8"),
    "page.js": PageFile(b"export {};", "text/javascript; charset=utf-8"),
    "examples/examples.json": PageFile(
        b'[{"name": "a", "title": "A", "text": "t", "question": "q", "source": "s"}]',
        "application/json",
    ),
    "examples/a.png": PageFile(PICTURE, "image/png"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data") / "shades")


@pytest.fixture(scope="module")
def served(data: Path, tmp_path_factory: pytest.TempPathFactory) -> ServedRuns:
    return served_of_all_tasks(data, tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def server(served: ServedRuns) -> Iterator[Running]:
    with running(served, files=PAGE_FILES) as found:
        yield found


@pytest.fixture
def client(server: Running) -> Iterator[Client]:
    with server.client() as found:
        yield found


# ------------------------------------------------------------------ the same answers

COLOURS = ("red", "green", "blue", "white")
TEXTS = tuple(f"which {c} {d}" for c in COLOURS for d in COLOURS) + COLOURS
MASKED = ("red [MASK] here", "[MASK]", "[MASK] ring [MASK] now", "look [MASK]")


def made_request(mode: str, draw: random.Random) -> dict[str, Any]:
    """Fields of a mode: pictures of noise, texts of several lengths, some options left out."""
    found: dict[str, Any] = {}
    chosen = draw.choice(MODES[mode].one_of) if MODES[mode].one_of else None
    for field in MODES[mode].fields:
        if not field.required and (field.name != chosen if chosen else draw.random() < 0.4):
            continue
        match field.kind:
            case Kind.PICTURE | Kind.WHOLE_PICTURE:
                found[field.name] = png(noise(draw.randrange(40), draw.choice((24, 31, 57))))
            case Kind.TEXT:
                words = MASKED if mode == "fill_words" else TEXTS
                found[field.name] = draw.choice(words)
            case Kind.TOP:
                found[field.name] = draw.randrange(1, 7)
            case Kind.LAYER:
                found[field.name] = draw.randrange(1, 3)
            case Kind.PATCHES:
                found[field.name] = draw.sample(range(16), draw.randrange(1, 9))
    return {"text": "red"} if mode == "search" and chosen == "image" else found


def from_python(served: ServedRuns, mode: str, fields: dict[str, Any]) -> Any:
    """What the Predictor says, written out by hand: not by the server's own tables."""
    run = served.answering[mode]
    top = fields.get("top", 5)
    if mode in ("encode_image", "encode_text", "encode_pair"):
        return {"vector": [float(x) for x in getattr(run, mode)(**_plural(mode, fields))]}
    if mode == "fill_words":
        words = run.fill_words(fields["text"], fields.get("image"), top)
        return {
            "text": words.text,
            "guesses": [[{"piece": p, "probability": s} for p, s in one] for one in words.guesses],
            "best": words.best(),
        }
    if mode == "fill_patches":
        found = run.fill_patches(fields["image"], sorted(fields["hidden"]), fields.get("text"))
        return {
            "grid": list(found.grid),
            "hidden": sorted(fields["hidden"]),
            "answers": list(map(int, found.answers)),
            "filled": list(map(int, found.filled)),
            "probabilities": list(map(float, found.probabilities)),
            "right": found.right,
        }
    if mode in ("answer", "classify"):
        given = [fields["image"], fields["question"]] if mode == "answer" else [fields["image"]]
        ranked = getattr(run, mode)(*given, top)
        return {"answers": [{"name": n, "probability": p} for n, p in ranked]}
    if mode == "match":
        cosine, share = run.match(fields["image"], fields["text"])
        return {"similarity": cosine, "probability": share}
    if mode == "compare":
        true, share = run.compare(fields["left"], fields["right"], fields["statement"])
        return {"true": true, "probability": share}
    if mode == "entail":
        yes, open_, no = run.entail(fields["image"], fields["sentence"])
        return {"entailment": yes, "neutral": open_, "contradiction": no}
    if mode == "segment":
        made = run.segment(fields["image"])
        shares = [(s.name, s.number, s.share) for s in made.shares]
        return {"size": list(made.classes.shape), "classes": shares, "map": made.classes.tolist()}
    if mode == "search":
        assert served.index is not None
        near = run.search(served.index, text=fields["text"], top=top)
        rows = [
            {"id": f.id, "similarity": f.similarity, "probability": None, "url": None} for f in near
        ]
        return {"kind": "image", "found": rows}
    assert mode == "attention"
    seen = run.attention(fields["image"], fields["text"], fields.get("layer", "rollout"))
    return {
        "words": seen.words,
        "grid": list(seen.grid),
        "weights": seen.weights.tolist(),
        "layer": seen.layer,
    }


def _plural(mode: str, fields: dict[str, Any]) -> dict[str, Any]:
    names = {"encode_image": {"image": "images"}, "encode_text": {"text": "texts"}}.get(mode, {})
    return {names.get(name, name): value for name, value in fields.items()}


def comparable(mode: str, found: dict[str, Any]) -> Any:
    """An answer of the server without its drawings, which other tests look at."""
    if mode == "segment":
        drawn = Image.open(io.BytesIO(base64.b64decode(found["picture"])))
        shares = [(c["name"], c["number"], c["share"]) for c in found["classes"]]
        return {"size": found["size"], "classes": shares, "map": np.asarray(drawn).tolist()}
    return {name: value for name, value in found.items() if "picture" not in name}


def close(one: Any, other: Any, tolerance: float = 1e-5) -> bool:
    """Equal, floats to the tolerance."""
    if isinstance(one, dict) and isinstance(other, dict):
        return set(one) == set(other) and all(close(one[k], other[k], tolerance) for k in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(
            close(a, b, tolerance) for a, b in zip(one, other, strict=True)
        )
    if isinstance(one, float) and isinstance(other, int | float):
        return abs(one - other) <= tolerance
    return type(one) is type(other) and one == other


def mixed_requests(count: int) -> list[tuple[str, dict[str, Any]]]:
    draw = random.Random(7)
    names = list(MODES)
    return [
        (names[i % len(names)], made_request(names[i % len(names)], draw)) for i in range(count)
    ]


def asked_together(server: Running, requests: Sequence[tuple[str, Any]], clients: int) -> list[Any]:
    """All of them, by so many clients at a time; answers in their order."""
    local = threading.local()

    def ask(one: tuple[str, Any]) -> Any:
        if not hasattr(local, "client"):
            local.client = server.client()
        answer = local.client.ask(*one)
        assert answer.status == 200, answer.body
        return comparable(one[0], answer.json())

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(ask, requests))


@pytest.mark.parametrize(
    "count", [52, pytest.param(500, marks=pytest.mark.slow)], ids=["four of each", "500"]
)
def test_answers_equal_those_from_python_alone_and_together(served, server, client, count):
    requests = mixed_requests(count)
    expected = [from_python(served, mode, fields) for mode, fields in requests]
    for (mode, fields), wanted in zip(requests, expected, strict=True):
        found = comparable(mode, client.ask(mode, fields).json())
        assert close(found, wanted), (mode, found, wanted)
    before = {mode: server.batches(mode) for mode in MODES}
    # Requests of a mode side by side, so that they do meet in the queue.
    order = sorted(range(count), key=lambda i: requests[i][0])
    together = asked_together(server, [requests[i] for i in order], clients=16)
    for i, found in zip(order, together, strict=True):
        assert close(found, expected[i]), (requests[i][0], found, expected[i])
    new = {m: np.subtract(server.batches(m), before[m]) for m in MODES if MODES[m].together}
    assert sum(batches for batches, _ in new.values()) < 0.8 * sum(
        asked for _, asked in new.values()
    )


def test_the_comparison_of_answers_sees_a_difference_of_a_ten_thousandth(served):
    for mode, fields in mixed_requests(len(MODES)):
        answer = from_python(served, mode, fields)
        other = copy.deepcopy(answer)
        assert close(answer, other)
        assert moved(other) and not close(answer, other), mode


def moved(answer: Any) -> bool:
    """Adds 1e-4 to the first float."""
    places = answer.items() if isinstance(answer, dict) else enumerate(answer)
    for place, value in list(places):
        if isinstance(value, float):
            answer[place] = value + 1e-4
            return True
        if isinstance(value, tuple):
            value = answer[place] = list(value)
        if isinstance(value, dict | list) and moved(value):
            return True
    return False


def test_a_form_is_answered_as_json_is(client):
    draw = random.Random(1)
    for mode in MODES:
        fields = made_request(mode, draw)
        by_json, by_form = client.ask(mode, fields), client.ask_by_form(mode, fields)
        assert by_json.status == by_form.status == 200, by_form.body
        assert close(by_json.json(), by_form.json())


def test_a_picture_may_come_as_a_data_url(client):
    url = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
    assert (
        client.ask("classify", {"image": url}).body
        == client.ask("classify", {"image": PICTURE}).body
    )


def test_drawn_answers_show_what_they_say(served, client):
    found = client.ask("fill_patches", {"image": PICTURE, "hidden": [0, 5, 6]}).json()
    made = served.answering["fill_patches"].fill_patches(PICTURE, [0, 5, 6])
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["picture"]))))
    assert (drawn[:8, :8] == made.filled_decoded[:8, :8]).all()
    assert (drawn[8:16, :8] == made.picture[8:16, :8]).all()
    own = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["codes_picture"]))))
    assert (own == made.answers_decoded).all()
    mapped = client.ask("segment", {"image": PICTURE}).json()
    shown = Image.open(io.BytesIO(base64.b64decode(mapped["picture"]))).convert("RGB")
    first = mapped["classes"][0]
    colour = tuple(int(first["colour"][i : i + 2], 16) for i in (1, 3, 5))
    assert colour == class_colour(first["number"])
    share = (np.asarray(shown) == colour).all(axis=-1).mean()
    assert share == pytest.approx(first["share"])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_hand_made_pictures_reach_the_model_with_the_pixels_of_training(served):
    """D03: through the server's own reading, bit-equal or refused for the same reason."""
    run = served.answering["classify"]
    size = run.run.config.model.image_size
    refused = 0
    for name, encoded, wanted in CASES:
        given = {"image": base64.b64encode(encoded).decode()}
        try:
            trained_on = plain(decode_image(encoded), size)
        except BadImage as error:
            with pytest.raises(ApiError) as caught:
                read_fields(MODES["classify"], given, run, ServeConfig())
            assert caught.value.code == error.reason and isinstance(wanted, str), name
            assert caught.value.status == (413 if error.reason == "too_many_pixels" else 422)
            refused += 1
            continue
        row = read_fields(MODES["classify"], given, run, ServeConfig())
        assert (run._pixels([row["image"]])[0] == trained_on).all(), name
        whole = read_fields(MODES["segment"], given, run, ServeConfig())
        assert whole["image"] == encoded
    assert len(CASES) >= 40 and 5 < refused < len(CASES) - 20


# ------------------------------------------------------------------ refusals


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


GOOD = base64.b64encode(PICTURE).decode()
MALFORMED: list[tuple[str, str, bytes, int, str]] = [
    ("no JSON", "classify", b"{", 400, "bad_json"),
    ("nothing", "classify", b"", 400, "bad_json"),
    ("a word", "classify", b"hello", 400, "bad_json"),
    ("cut", "classify", body(image=GOOD)[:-5], 400, "bad_json"),
    ("two objects", "classify", b"{}{}", 400, "bad_json"),
    ("single quotes", "classify", b"{'image': 1}", 400, "bad_json"),
    ("a trailing comma", "classify", b'{"top": 1,}', 400, "bad_json"),
    ("NaN", "classify", b'{"image": NaN}', 400, "bad_json"),
    ("Infinity", "classify", b'{"top": Infinity}', 400, "bad_json"),
    ("-Infinity", "classify", b'{"top": -Infinity}', 400, "bad_json"),
    ("200,000 brackets", "classify", b"[" * 200_000, 400, "bad_json"),
    ("200,000 closed brackets", "classify", b"[" * 200_000 + b"]" * 200_000, 400, "bad_json"),
    ("200,000 objects", "classify", b'{"a":' * 200_000, 400, "bad_json"),
    ("a list", "classify", b"[1]", 400, "bad_json"),
    ("a number", "classify", b"7", 400, "bad_json"),
    ("null", "classify", b"null", 400, "bad_json"),
    ("UTF-16", "classify", body(image="x").decode().encode("utf-16"), 400, "bad_json"),
    ("Latin-1", "answer", b'{"question": "\xe4"}', 400, "bad_json"),
    ("a name twice", "classify", b'{"top": 1, "top": 2}', 400, "bad_json"),
    ("an integer of 5,000 digits", "classify", b'{"top": ' + b"9" * 5000 + b"}", 400, "bad_json"),
    ("a control character", "answer", b'{"question": "a\x00b"}', 400, "bad_json"),
    ("no field", "classify", b"{}", 400, "bad_field"),
    ("a field too many", "classify", body(image=GOOD, question="a"), 400, "bad_field"),
    ("a field mistyped", "classify", body(imgae=GOOD), 400, "bad_field"),
    ("a null picture", "classify", body(image=None), 400, "bad_field"),
    ("a picture that is a number", "classify", body(image=5), 400, "bad_field"),
    ("a picture that is a list", "classify", body(image=[GOOD]), 400, "bad_field"),
    ("a picture that is an object", "classify", body(image={"url": "a"}), 400, "bad_field"),
    ("a path", "classify", body(image="/etc/passwd"), 400, "bad_field"),
    ("a path that is base64", "classify", body(image="/etc/hosts/a"), 422, "not_an_image"),
    ("a URL", "classify", body(image="http://127.0.0.1/a.png"), 400, "bad_field"),
    ("a file URL", "classify", body(image="file:///etc/passwd"), 400, "bad_field"),
    ("bad base64", "classify", body(image="%%%%"), 400, "bad_field"),
    ("base64 with a letter too many", "classify", body(image=GOOD[:-1]), 400, "bad_field"),
    ("base64 beyond ASCII", "classify", body(image="é" * 8), 400, "bad_field"),
    ("an empty picture", "classify", body(image=""), 422, "not_an_image"),
    ("an empty data URL", "classify", body(image="data:"), 422, "not_an_image"),
    ("HTML", "classify", body(image="PGh0bWw+"), 422, "not_an_image"),
    ("half a picture", "classify", body(image=GOOD[:900]), 422, "truncated_image"),
    ("an SVG", "classify", body(image="PHN2Zy8+"), 422, "not_an_image"),
    ("a pickle", "classify", body(image="gAQu"), 422, "not_an_image"),
    ("top that is a text", "classify", body(image=GOOD, top="3"), 400, "bad_field"),
    ("top that is true", "classify", body(image=GOOD, top=True), 400, "bad_field"),
    ("top that is a fraction", "classify", body(image=GOOD, top=1.5), 400, "bad_field"),
    ("top 0", "classify", body(image=GOOD, top=0), 400, "bad_field"),
    ("top below 0", "classify", body(image=GOOD, top=-1), 400, "bad_field"),
    ("top of 1,000 digits", "classify", body(image=GOOD, top=10**1000), 400, "bad_field"),
    ("top over its limit", "classify", body(image=GOOD, top=101), 400, "bad_field"),
    ("a question that is a number", "answer", body(image=GOOD, question=3), 400, "bad_field"),
    ("a question that is a list", "answer", body(image=GOOD, question=["a"]), 400, "bad_field"),
    ("half a surrogate pair", "answer", body(image=GOOD, question="a\ud800"), 422, "bad_text"),
    ("the other half", "answer", body(image=GOOD, question="\udfffa"), 422, "bad_text"),
    ("blanks", "answer", body(image=GOOD, question=" \n\t"), 422, "bad_text"),
    ("an empty question", "answer", body(image=GOOD, question=""), 422, "bad_text"),
    ("control characters alone", "answer", body(image=GOOD, question="\x01\x02"), 422, "bad_text"),
    ("mostly U+FFFD", "answer", body(image=GOOD, question="\ufffd" * 9), 422, "bad_text"),
    ("a long text", "answer", body(image=GOOD, question="a" * 4001), 413, "text_too_long"),
    ("nothing to fill", "fill_words", body(text="a red ring"), 422, "unusable"),
    ("too many words to fill", "fill_words", body(text="[MASK] " * 300), 422, "unusable"),
    ("patches that are a number", "fill_patches", body(image=GOOD, hidden=3), 400, "bad_field"),
    ("no patches", "fill_patches", body(image=GOOD, hidden=[]), 400, "bad_field"),
    ("a patch outside", "fill_patches", body(image=GOOD, hidden=[16]), 400, "bad_field"),
    ("a patch below 0", "fill_patches", body(image=GOOD, hidden=[-1]), 400, "bad_field"),
    ("a patch that is a text", "fill_patches", body(image=GOOD, hidden=["1"]), 400, "bad_field"),
    ("no such layer", "attention", body(image=GOOD, text="red", layer=99), 400, "bad_field"),
    ("no query", "search", body(top=3), 400, "bad_field"),
    ("two queries", "search", body(text="red", image=GOOD), 400, "bad_field"),
    ("a picture for pictures", "search", body(image=GOOD), 422, "unusable"),
    ("no such mode", "clasify", body(image=GOOD), 404, "not_found"),
]  # fmt: skip


def test_w03_malformed_bodies_get_a_4xx_that_says_why(server):
    assert len(MALFORMED) >= 60 and len({name for name, *_ in MALFORMED}) == len(MALFORMED)
    with server.client() as client:
        golden = client.ask("classify", {"image": PICTURE}).body
        for name, mode, sent, status, code in MALFORMED:
            found = client.send("POST", f"/v1/{mode}", sent, JSON)
            assert (found.status, found.error()) == (status, code), (name, found.body)
            assert "Traceback" not in found.body.decode() and "/src/" not in found.body.decode()
        assert client.ask("classify", {"image": PICTURE}).body == golden


FORMS: list[tuple[str, str, bytes, int, str]] = [
    ("no boundary", "multipart/form-data", b"--a\r\n\r\n--a--", 400, "bad_form"),
    ("another boundary", "multipart/form-data; boundary=b", b"--a\r\n\r\n--a--", 400, "bad_form"),
    ("nothing", "multipart/form-data; boundary=a", b"", 400, "bad_form"),
    ("no part", "multipart/form-data; boundary=a", b"--a--\r\n", 400, "bad_form"),
    ("cut", "multipart/form-data; boundary=bound", form_of({"image": PICTURE})[1][:-40], 400, ""),
    ("a part without a name", "multipart/form-data; boundary=a",
     b"--a\r\nContent-Disposition: form-data\r\n\r\nx\r\n--a--\r\n", 400, "bad_form"),
    ("a field twice", "multipart/form-data; boundary=bound",
     form_of({"image": PICTURE})[1].replace(b"--bound--\r\n", b"") * 2 + b"--bound--\r\n",
     400, "bad_form"),
    ("100 pictures", "multipart/form-data; boundary=bound",
     form_of({f"image{i}": PICTURE for i in range(100)})[1], 413, "too_many_parts"),
    ("a text that is not UTF-8", "multipart/form-data; boundary=a",
     b'--a\r\nContent-Disposition: form-data; name="question"\r\n\r\n\xff\r\n--a--\r\n',
     400, "bad_form"),
    ("a form of fields", "application/x-www-form-urlencoded", b"image=1",
     415, "unsupported_media_type"),
    ("no type", "", b"{}", 415, "unsupported_media_type"),
    ("text", "text/plain", b"{}", 415, "unsupported_media_type"),
]  # fmt: skip


@pytest.mark.parametrize("case", FORMS, ids=[case[0] for case in FORMS])
def test_malformed_forms_get_a_4xx_that_says_why(client, case):
    _, kind, sent, status, code = case
    found = client.send("POST", "/v1/classify", sent, {"Content-Type": kind})
    assert found.status == status and found.error() == (code or "bad_form"), found.body
    assert max(len(mode.fields) for mode in MODES.values()) <= MAX_PARTS


def raw(*lines: str, content: bytes = b"") -> bytes:
    head = "POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head.encode() + "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n" + content


HEADS: list[tuple[str, bytes, int]] = [
    ("no length", raw(), 411),
    ("a length below 0", raw("Content-Length: -5"), 400),
    ("a length that is a word", raw("Content-Length: many"), 400),
    ("two lengths", raw("Content-Length: 2", "Content-Length: 3", content=b"{}"), 400),
    ("length and chunks", raw("Content-Length: 2", "Transfer-Encoding: chunked"), 400),
    ("a length of 10 GB", raw("Content-Length: 10000000000"), 413),
    ("a length too small", raw("Content-Length: 5", content=b'{"image": 1}'), 400),
    ("a length too large", raw("Content-Length: 500", content=b'{"image": 1}'), 408),
    ("gzip", raw("Content-Length: 2", "Content-Encoding: gzip", content=b"{}"), 415),
    ("chunks of no size", raw("Transfer-Encoding: chunked", content=b"zz\r\n"), 400),
    ("an unknown coding", raw("Transfer-Encoding: br"), 400),
    ("no HTTP", b"\x16\x03\x01\x02\x00\x01\x00", 400),
    ("a head of 100 kB", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000, 400),
    ("no host", b"GET /live HTTP/1.1\r\n\r\n", 400),
]


def test_w02_heads_that_promise_what_is_not_there_are_refused_and_closed(served):
    with running(served, receive_seconds=0.6) as server:
        for name, sent, status in HEADS:
            began = time.monotonic()
            got = exchange(server.port, sent)
            assert time.monotonic() - began < 2.0, name
            assert got.startswith(b"HTTP/1.1 %d " % status), (name, got)
            last = got.rpartition(b"\r\n\r\n")[2]
            assert json.loads(last)["error"]["message"], name
        with server.client() as client:
            assert client.get("/live").status == 200


def test_a_body_over_the_limit_is_refused_while_it_arrives(served):
    with running(served, max_body=50_000) as server:
        fits = raw("Content-Length: 50000", "Connection: close", content=b" " * 50_000)
        assert b" 400 " in exchange(server.port, fits)[:20]  # not JSON, but not too long
        chunk = b"2710\r\n" + b" " * 10_000 + b"\r\n"
        for sent in (
            raw("Content-Length: 50001"),
            raw("Transfer-Encoding: chunked", content=chunk * 6),  # never ended
        ):
            got = exchange(server.port, sent)
            assert b" 413 " in got[:20] and b"the limit is 50000 bytes" in got


def test_a_client_that_waits_for_100_continue_is_told_before_it_sends(served):
    with running(served, max_body=1000) as server:
        got = exchange(server.port, raw("Content-Length: 1001", "Expect: 100-continue"))
        assert got.startswith(b"HTTP/1.1 413 ")
        small = raw("Content-Length: 2", "Expect: 100-continue", "Connection: close", content=b"{}")
        assert exchange(server.port, small).startswith(b"HTTP/1.1 100 ")


def test_the_bytes_held_together_have_a_limit(served):
    """Bodies that each may be sent do not add up to more than the server wants to hold."""
    with running(served, max_body=50_000, max_held=60_000, receive_seconds=3.0) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as slow:
            slow.sendall(raw("Content-Length: 49000", content=b" " * 45_000))
            until = time.monotonic() + 3
            while server.app.held.held < 45_000 and time.monotonic() < until:
                time.sleep(0.01)
            with server.client() as client:
                found = client.send("POST", "/v1/classify", b" " * 20_000, JSON)
                assert (found.status, found.error()) == (503, "too_many_bytes_held")
                assert found.headers["retry-after"] == "1"
        until = time.monotonic() + 3
        while server.app.held.held and time.monotonic() < until:
            time.sleep(0.01)
        assert server.app.held.held == 0
        with server.client() as client:
            assert client.ask("classify", {"image": PICTURE}).status == 200


def test_w06_a_picture_over_the_pixel_limit_is_refused_and_the_rest_of_it_is_not_read(served):
    with running(served, max_pixels=24 * 29 - 1) as server, server.client() as client:
        found = client.ask("classify", {"image": PICTURE})
        assert (found.status, found.error()) == (413, "too_many_pixels")
        assert "29 x 24 pixels; the limit is 695" in found.json()["error"]["message"]
    with running(served, max_pixels=24 * 29) as server, server.client() as client:
        assert client.ask("classify", {"image": PICTURE}).status == 200


def test_a_mode_that_no_run_has_names_the_command_that_adds_it(data):
    with running(ServedRuns(runs=(untrained("vqa", data),))) as server, server.client() as client:
        found = client.ask("classify", {"image": PICTURE})
        assert (found.status, found.error()) == (409, "mode_lacking")
        assert "vlbeit finetune classification" in found.json()["error"]["message"]
        told = client.get("/info").json()["modes"]["classify"]
        assert told["available"] is False and told["command"] in found.body.decode()
    with running(ServedRuns(runs=(retrieval(data),))) as server, server.client() as client:
        found = client.ask("search", {"text": "red"})
        assert "vlbeit index" in found.json()["error"]["message"]


# ------------------------------------------------------------------ who may ask


def test_every_answer_carries_the_headers_that_keep_a_browser_safe(server):
    asked = [("GET", path.format(name="page.js", number="0")) for path in GET_ROUTES]
    asked += [("GET", "/nowhere"), ("POST", "/v1/classify"), ("DELETE", "/"), ("GET", "/v1/answer")]
    asked += [("OPTIONS", "/v1/answer")]
    for method, path in asked:
        with server.client() as client:
            found = client.send(method, path)
        policy = found.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
        assert found.headers["x-content-type-options"] == "nosniff"
        assert not [name for name in found.headers if name.startswith("access-control")]
        assert "server" not in found.headers and len(found.headers["x-request-id"]) == 16
        if method != "GET" or path in ("/nowhere", "/v1/answer"):
            assert found.status in (404, 405, 415) and found.error()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:99", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("vlbeit.example:80", 200),
        ("10.0.0.7", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("[::1", 421),
        ("", 421),
    ],
)
def test_only_a_host_of_ours_is_answered(served, host, status, host_server):
    with host_server.client() as client:
        assert client.get("/live", Host=host).status == status


@pytest.fixture(scope="module")
def host_server(served: ServedRuns) -> Iterator[Running]:
    with running(served, allowed_hosts=("vlbeit.example",)) as found:
        yield found


def test_a_page_of_another_origin_may_not_ask(server):
    own = f"http://127.0.0.1:{server.port}"
    for origin, status in (
        (own, 400),
        ("https://evil.example", 403),
        ("null", 403),
        (f"http://localhost:{server.port + 1}", 403),
        ("http://[", 403),
    ):
        with server.client() as client:
            found = client.send("POST", "/v1/classify", b"{}", {**JSON, "Origin": origin})
            assert found.status == status, origin


def test_with_a_token_every_route_but_the_health_routes_wants_it(served):
    token = "a secret of the operator"
    shown = {
        "bearer": f"Bearer {token}",
        "basic": "Basic " + base64.b64encode(f"anyone:{token}".encode()).decode(),
    }
    wrong = (
        "", "Bearer", "Bearer x", f"Bearer {token}x", f"Bearer {token[:-1]}", f"Token {token}",
        "Basic !!", "Basic " + base64.b64encode(token.encode()).decode(), "Bearer é",
    )  # fmt: skip
    with running(served, files=PAGE_FILES, token=token) as server:
        paths = [route.path for route in server.app._routes()]
        assert len(paths) == len(GET_ROUTES) + 1
        for template in paths:
            path = template.replace("{mode}", "classify").replace("{name:path}", "page.js")
            path = path.replace("{number}", "0")
            method = "POST" if path.startswith("/v1") else "GET"
            for value in wrong:
                with server.client() as client:
                    given = {"Authorization": value} if value else {}
                    status = client.send(method, path, headers=given).status
                    assert status == (200 if path in ("/live", "/ready") else 401), path
            for value in shown.values():
                with server.client() as client:
                    found = client.send(method, path, headers={"Authorization": value})
                    assert found.status in (200, 404, 415), path
        with server.client() as client:
            assert "Basic" in client.get("/info").headers["www-authenticate"]


TRAVERSALS = [
    f"/{place}/{up * depth}{target}"
    for place in ("static", "static/examples", "indexed", "examples")
    for up in ("../", "..%2f", "%2e%2e/", "%2e%2e%2f", "..%5c", "%252e%252e/", "....//", "..;/")
    for depth in (1, 4)
    for target in ("app.py", "etc/passwd")
]


def test_w07_paths_that_climb_get_404_or_400(server):
    allowed = {file.content for file in PAGE_FILES.values()}
    assert len(set(TRAVERSALS)) >= 100
    with server.client() as client:
        assert client.get("/static/page.js").body in allowed
        assert client.get("/static/examples/a.png").body == PICTURE
    for path in [*TRAVERSALS, "/static//etc/passwd", "/static/%00page.js", "/static/page.js%00"]:
        got = exchange(server.port, f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        assert got.split(b" ")[1] in (b"404", b"400"), path
        assert b"root:" not in got and b"import" not in got


def test_page_files_are_read_from_their_folder_and_only_files_that_are_served(tmp_path):
    (tmp_path / "examples").mkdir()
    (tmp_path / "index.html").write_text("page")
    (tmp_path / "examples" / "a.png").write_bytes(PICTURE)
    (tmp_path / "notes.md").write_text("not for the page")
    found = files_below(tmp_path)
    assert set(found) == {"index.html", "examples/a.png"}
    assert found["examples/a.png"] == PageFile(PICTURE, "image/png")
    assert files_below(tmp_path / "nothing") == {}


def test_examples_come_with_the_address_of_their_picture(client):
    one = client.get("/examples").json()["examples"][0]
    assert set(one) == {"name", "title", "text", "question", "source", "url"}
    found = client.get(one["url"])
    assert found.body == PICTURE and found.headers["content-type"] == "image/png"


# ------------------------------------------------------------------ what it says of itself


def test_info_and_openapi_name_every_mode_and_only_modes_that_exist(server, served, client):
    told = client.get("/info").json()
    described = client.get("/openapi.json").json()
    assert set(told["modes"]) == set(MODES)
    assert {path for path in described["paths"] if path.startswith("/v1/")} == {
        f"/v1/{mode}" for mode in MODES
    }
    assert {p for p in described["paths"] if not p.startswith("/v1/")} == set(GET_ROUTES)
    for mode, facts in told["modes"].items():
        assert facts["available"] and facts["command"] is None
        assert facts["image"]["grid"] == [4, 4]
        schema = described["paths"][f"/v1/{mode}"]["post"]["requestBody"]["content"]
        assert set(schema) == {"application/json", "multipart/form-data"}
    assert [run["task"] for run in told["runs"]][:2] == ["pretraining", "retrieval"]
    assert told["runs"][0]["parameters"] > 10_000 and told["index"] == {"kind": "image", "count": 6}
    assert told["classes"] == list(COLOURS) and told["mask_word"] == "[MASK]"
    assert str(Path.cwd()) not in json.dumps(told)


def test_the_document_demands_what_the_server_demands(client):
    """A request with every field of a mode is accepted, and one without a required field is not."""
    described = document(ServeConfig())
    draw = random.Random(3)
    for mode in MODES:
        schema = described["paths"][f"/v1/{mode}"]["post"]["requestBody"]["content"][
            "application/json"
        ]["schema"]
        full = made_request(mode, draw)
        assert set(full) <= set(schema["properties"])
        assert client.ask(mode, full).status == 200
        for name in schema["required"]:
            found = client.ask(mode, {key: v for key, v in full.items() if key != name})
            assert found.error() == "bad_field" and name in found.body.decode()
        answer = described["paths"][f"/v1/{mode}"]["post"]["responses"]["200"]
        wanted = answer["content"]["application/json"]["schema"]["required"]
        assert set(client.ask(mode, full).json()) == set(wanted)
    assert "security" in document(ServeConfig(token="x" * 20))


def test_metrics_count_by_mode_and_status_and_not_by_what_strangers_ask_for(served):
    with running(served) as server, server.client() as client:
        for _ in range(3):
            client.ask("classify", {"image": PICTURE})
        client.ask("classify", {"image": "%"})
        for i in range(20):
            client.get(f"/nowhere/{i}")
        text = client.get("/metrics").body.decode()
    assert 'vlbeit_requests_total{route="classify",status="200"} 3.0' in text
    assert 'vlbeit_requests_total{route="classify",status="400"} 1.0' in text
    assert 'vlbeit_requests_total{route="other",status="404"} 20.0' in text
    assert 'vlbeit_batch_size_sum{mode="classify"} 3.0' in text
    assert "vlbeit_queue_length 0.0" in text and "process_resident_memory_bytes" in text
    assert "nowhere" not in text


def test_pictures_of_the_index_are_shown_by_number_only(data, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(noise(i, 600)))
    (tmp_path / "secret.png").write_bytes(png(noise(9)))
    run = retrieval(data)
    gallery = open_gallery("image", tmp_path)
    names = ["0.png", "1.png", "2.png"]
    index = run.index(images=[gallery.read(name) for name in names], ids=names)
    made = ServedRuns(runs=(run,), index=index, gallery=gallery)
    with running(made) as server, server.client() as client:
        found = client.ask("search", {"text": "red", "top": 3}).json()["found"]
        assert sorted(one["url"] for one in found) == [f"/indexed/{i}" for i in range(3)]
        shown = Image.open(io.BytesIO(client.get(found[0]["url"]).body))
        assert max(shown.size) == 256 and shown.format == "JPEG"
        for wrong in ("3", "-1", "secret.png", "0.png", "9" * 30, "%2e%2e"):
            with server.client() as other:
                answer = other.get(f"/indexed/{wrong}")
                assert answer.error() == "not_found" and str(tmp_path) not in answer.body.decode()


def test_ready_fails_with_the_model_and_live_does_not(served, monkeypatch):
    with running(served) as server, server.client() as client:
        assert client.get("/ready").status == 200
        monkeypatch.setattr("vlbeit.serve.app.PROBE_EVERY", 0.0)
        monkeypatch.setattr(ServedRuns, "probe", lambda self: False)
        assert client.get("/ready").error() == "not_ready"
        monkeypatch.setattr("vlbeit.serve.app.PROBE_SECONDS", 0.2)
        monkeypatch.setattr(ServedRuns, "probe", lambda self: time.sleep(0.6) or True)
        assert client.get("/ready").error() == "not_ready"
        assert client.get("/live").status == 200


def test_a_probe_sees_numbers_that_are_not_finite(data):
    run = untrained("vqa", data)
    assert ServedRuns(runs=(run,)).probe()
    next(iter(run.model.backbone.parameters())).data.fill_(float("nan"))
    assert not ServedRuns(runs=(run,)).probe()


# ------------------------------------------------------------------ the queue


class Recorded:
    """Stands in for the model: answers twice the number, and keeps what it was asked together."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.batches: list[list[Any]] = []
        self.seconds = seconds

    def __call__(self, key: Any, rows: Sequence[Any]) -> list[Any]:
        time.sleep(self.seconds)
        self.batches.append(list(rows))
        if "bad" in rows:
            raise InputError("this row is bad")
        if "fault" in rows:
            raise RuntimeError("a secret of the server")
        return [(key, row) for row in rows]


def in_queue(model: Recorded, act: Callable[[Batcher], Any], **how: Any) -> Any:
    settings = {"queue": 8, "batch": 4, **how}
    batcher = Batcher(model, Metrics(), **settings)

    async def acted() -> Any:
        batcher.start()
        return await act(batcher)

    try:
        return asyncio.run(acted())
    finally:
        assert batcher.stop(5)


async def outcomes(batcher: Batcher, rows: Sequence[Any], key: Any = "k", **how: Any) -> list[Any]:
    asked = (
        batcher.answer(row if key is None else key, row, label="x", seconds=how.get("seconds", 5.0))
        for row in rows
    )
    return await asyncio.gather(*asked, return_exceptions=True)


def test_requests_that_wait_together_are_asked_together_in_their_order():
    model = Recorded(0.05)
    found = in_queue(model, lambda batcher: outcomes(batcher, range(7)))
    assert found == [("k", i) for i in range(7)]
    assert model.batches[0] in ([0], [0, 1], [0, 1, 2], [0, 1, 2, 3])
    assert [row for batch in model.batches for row in batch] == list(range(7))
    assert len(model.batches) <= 3 and max(map(len, model.batches)) <= 4


def test_only_equal_keys_are_asked_together():
    model = Recorded(0.02)
    found = in_queue(model, lambda batcher: outcomes(batcher, [1, 2, 1, 2, 1], key=None))
    assert found == [(i, i) for i in (1, 2, 1, 2, 1)]
    assert all(len(set(batch)) == 1 for batch in model.batches)
    assert max(map(len, model.batches)) > 1


def test_a_window_waits_for_company_and_a_full_batch_does_not_wait():
    async def apart(batcher: Batcher) -> list[Any]:
        async def later(i: int) -> Any:
            await asyncio.sleep(0.03 * i)
            return await batcher.answer("k", i, label="x", seconds=5.0)

        return await asyncio.gather(*map(later, range(4)))

    alone, waited = Recorded(), Recorded()
    in_queue(alone, apart)
    assert [len(batch) for batch in alone.batches] == [1, 1, 1, 1]
    began = time.monotonic()
    in_queue(waited, apart, window=4.0)
    assert [len(batch) for batch in waited.batches] == [4] and time.monotonic() - began < 3.0


def test_one_bad_request_of_a_batch_fails_alone(caplog):
    model = Recorded(0.03)
    rows = ["first", "a", "bad", "fault", "b"]
    found = in_queue(model, lambda batcher: outcomes(batcher, rows))
    assert [found[i] for i in (0, 1, 4)] == [("k", "first"), ("k", "a"), ("k", "b")]
    assert (found[2].status, found[2].message) == (422, "this row is bad")
    assert found[3].status == 500 and "secret" not in found[3].message
    assert "a secret of the server" in caplog.text


def test_a_full_queue_refuses_at_once_and_a_late_answer_is_504():
    async def flood(batcher: Batcher) -> tuple[list[Any], float]:
        began = time.monotonic()
        found = await outcomes(batcher, range(30), seconds=0.3)
        return found, time.monotonic() - began

    model = Recorded(0.2)
    found, seconds = in_queue(model, flood, queue=8, batch=1)
    refused = [one for one in found if isinstance(one, ApiError)]
    statuses = [one.status for one in refused]
    assert statuses.count(503) == 22 and statuses.count(504) >= 6 and seconds < 1.0
    assert all(one.headers["Retry-After"] for one in refused if one.status == 503)
    assert len(found) - len(refused) >= 1
    # Who was told 504 while waiting is not asked for afterwards.
    assert sum(map(len, model.batches)) <= 4


def test_a_probe_goes_before_all_others():
    async def act(batcher: Batcher) -> None:
        rest = asyncio.ensure_future(outcomes(batcher, range(8)))
        await asyncio.sleep(0.02)
        await batcher.ahead("probe", seconds=5.0)
        assert not rest.done()
        await rest

    model = Recorded(0.05)
    in_queue(model, act, batch=2)
    assert model.batches[1] == [None]


# ------------------------------------------------------------------ slow clients


def held_open(port: int, seconds: float, *, trickle: bytes = b"") -> tuple[bool, bytes]:
    """Whether a connection that sends a byte now and then is open after so long; what it got."""
    with socket.create_connection(("127.0.0.1", port)) as line:
        line.settimeout(0.15)
        got, until = b"", time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                if trickle:
                    line.send(trickle[:1])
                    trickle = trickle[1:] + trickle[:1]
                more = line.recv(4096)
                if not more:
                    return False, got
                got += more
            except TimeoutError:
                continue
            except OSError:
                return False, got
        return True, got


TRICKLES = {
    "idle": b"",
    "head": b"GET /live HTTP/1.1\r\nHost: localhost\r\nX: aaaaaaaaaaaaaaaaaaaaaaaa",
}


def test_w04_a_connection_without_a_whole_request_is_cut(served):
    with running(served, receive_seconds=0.6) as server:
        with ThreadPoolExecutor(8) as pool:
            idle = pool.submit(held_open, server.port, 3.0)
            head = pool.submit(held_open, server.port, 3.0, trickle=TRICKLES["head"])
            sent = raw("Content-Length: 900")
            slow = pool.submit(exchange, server.port, sent)
            assert idle.result() == (False, b"")
            open_still, got = head.result()
            assert not open_still and b" 408 " in got[:20] and b"head_timeout" in got
            assert b" 408 " in slow.result()[:20] and b"body_timeout" in slow.result()
        with server.client() as client:
            text = client.get("/metrics").body.decode()
    for reason in ("idle", "head", "body"):
        assert f'vlbeit_connections_cut_total{{reason="{reason}"}} 1.0' in text


def test_w04_an_answer_does_not_buy_a_connection_more_time_for_the_next_head(served):
    """After an answer the clock starts anew, and bytes of a head that never ends do not stop it."""
    with running(served, receive_seconds=0.6) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as line:
            line.sendall(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b" 200 " in line.recv(4096)[:20]
            began, closed = time.monotonic(), False
            line.settimeout(0.1)
            while time.monotonic() - began < 3.0 and not closed:
                try:
                    line.send(b"G")
                    closed = line.recv(4096) == b""
                except TimeoutError:
                    continue
                except OSError:
                    closed = True
            assert closed and 0.3 < time.monotonic() - began < 2.0


def test_w04_the_stock_protocol_keeps_them(served):
    """What the deadline adds: uvicorn's own connection stays open for both."""
    with running(served, receive_seconds=0.6, http=H11Protocol) as server:
        with ThreadPoolExecutor(2) as pool:
            idle = pool.submit(held_open, server.port, 2.0)
            head = pool.submit(held_open, server.port, 2.0, trickle=TRICKLES["head"])
            assert idle.result()[0] and head.result()[0]


def test_a_client_that_does_not_take_its_answer_is_cut(served):
    files = {"index.html": PageFile(b"x" * 30_000_000, "text/html")}
    with running(served, files=files, send_seconds=0.5) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as line:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            line.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            until = time.monotonic() + 5
            cut = server.app.metrics.registry.get_sample_value
            name, labels = "vlbeit_connections_cut_total", {"reason": "unread"}
            while not cut(name, labels) and time.monotonic() < until:
                time.sleep(0.02)
            assert cut(name, labels) == 1.0
        with server.client() as client:
            assert len(client.get("/").body) == 30_000_000  # who reads gets all of it


# ------------------------------------------------------------------ the command


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["--host", "0.0.0.0"], UnsafeError.exit_code, "--token-file"),
        (["--host", "::"], UnsafeError.exit_code, "--allow-anonymous"),
        (["--port", "70000"], ConfigError.exit_code, "--port must be in 0..65535, found 70000"),
        (["--batch", "0"], ConfigError.exit_code, "--batch must be at least 1, found 0"),
        (["--deadline", "-1"], ConfigError.exit_code, "--deadline must be at least"),
        (["--token-file", "nowhere.txt"], InputError.exit_code, "nowhere.txt"),
    ],
)
def test_a_server_that_is_open_to_strangers_or_cannot_run_is_refused_before_loading(
    words, code, named, capsys
):
    assert main(["serve", "no-such-run", *words]) == code
    assert named in capsys.readouterr().err


def test_a_public_host_is_served_with_a_token_or_when_it_is_said(tmp_path):
    token = tmp_path / "token"
    token.write_text("0123456789abcdef\n")
    check(ServeConfig(host="0.0.0.0", token=read_token(token)))
    check(ServeConfig(host="0.0.0.0", allow_anonymous=True))
    check(ServeConfig(host="::1"))
    token.write_text("short\n")
    with pytest.raises(ConfigError, match="has 5 characters, at least 16"):
        read_token(token)


def test_a_port_that_is_taken_is_named(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "no-such-run", "--port", port]) == ConfigError.exit_code
    assert port in capsys.readouterr().err


def test_each_mode_is_answered_by_the_first_run_that_has_it(data):
    first, second = untrained("vqa", data), untrained("vqa", data)
    other = untrained("classification", data)
    made = ServedRuns(runs=(first, other, second))
    assert made.answering["answer"] is first and made.answering["classify"] is other
    assert ServedRuns(runs=(second, first)).answering["answer"] is second
    assert "search" not in ServedRuns(runs=(retrieval(data),)).answering
    with pytest.raises(ConfigError, match="nothing to serve"):
        ServedRuns(runs=())


def test_an_index_of_another_model_is_refused(data):
    run = retrieval(data)
    index = run.index(images=[noise(0)])
    run.digest = "f" * 64
    with pytest.raises(InputError, match="was made by the model dddddddddddd .*ffffffffffff"):
        ServedRuns(runs=(run,), index=index)


def test_a_demo_folder_stands_for_its_pretrained_run_and_its_tasks(tmp_path):
    assert demo_runs(tmp_path) == []
    for name in ("pretrain", "tasks/vqa", "tasks/retrieval", "tasks/begun"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        if name != "tasks/begun":
            (tmp_path / name / "checkpoints" / "step-0000001").mkdir()
    names = [str(folder.relative_to(tmp_path)) for folder in demo_runs(tmp_path)]
    assert names == ["pretrain", "tasks/retrieval", "tasks/vqa"]
