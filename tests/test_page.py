"""The page in a real Chromium: what it shows is what the Predictor says, by mouse and by keyboard,
with nothing asked of anybody else, and with everything from outside shown as text.

Runs with random weights show how it works; a small trained one shows that what was hidden comes
back. Without Chromium or playwright these tests are skipped; with VLBEIT_BROWSER_REQUIRED set they
fail.
"""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from colour_world import draw_colour_scene, train_colour_world
from tiny_run import tiny_run, write_world
from tiny_tasks import write_tasks as write_other_tasks
from toy_tasks import write_tasks
from untrained_run import noise, png, retrieval, untrained
from vlbeit.config import ServeConfig
from vlbeit.data.scenes import draw_scene
from vlbeit.eval.fill import hidden_pixels
from vlbeit.serve.app import App
from vlbeit.serve.metrics import Metrics
from vlbeit.serve.page_files import EXAMPLES, PageFile, package_files
from vlbeit.serve.predictor import Predictor, command_for
from vlbeit.serve.served_runs import ServedRuns
from vlbeit.serve.server import listen, server_of

CAPTION, QUESTION = "red ring look", "say red"
PICTURE = png(noise(7, side=40))
EXAMPLE = {
    "name": "toy",
    "title": "A toy picture",
    "text": CAPTION,
    "question": QUESTION,
    "source": "made here",
}
PANELS = (
    "fill_words", "answer", "match", "compare", "entail", "classify", "segment", "attention",
    "search",
)  # fmt: skip


# ------------------------------------------------------------------ the files themselves


def test_the_files_ask_nothing_of_others_and_hold_no_markup_made_of_text():
    """What a strict content policy forbids anyway, and the calls that turn text into markup."""
    forbidden = re.compile(
        r"""https?://(?!www\.w3\.org/)|//cdn|@import|url\(|innerHTML|outerHTML|insertAdjacentHTML"""
        r"""|document\.write|createContextualFragment|\beval\(|new Function|\sstyle=|\son\w+="""
        r"""|javascript:|srcdoc|<style|DOMParser"""
    )
    texts = {
        name: file.content.decode()
        for name, file in package_files().items()
        if name.endswith((".html", ".css", ".js", ".svg"))
    }
    assert {"index.html", "page.css", "page.js"} <= set(texts)
    assert {name: forbidden.findall(text) for name, text in texts.items()} == dict.fromkeys(
        texts, []
    )
    for planted in (
        "fetch('https://elsewhere.org')",
        "element.innerHTML = text",
        '<p style="color: red">',
        '<img onerror="x()">',
        "@import 'font.css'",
    ):
        assert forbidden.search(planted), planted


def test_the_example_pictures_are_small_and_say_where_they_are_from():
    files = package_files()
    listed = json.loads(files[EXAMPLES].content)
    pictures = {name for name in files if name.startswith("examples/") and name.endswith(".png")}
    assert pictures == {f"examples/{one['name']}.png" for one in listed} and len(pictures) >= 10
    assert sum(len(file.content) for file in files.values()) < 300_000
    scenes = 0
    for one in listed:
        assert set(EXAMPLE) == set(one) and all(one.values())
        assert re.search("Apache-2.0|public domain|without conditions", one["source"])
        if found := re.search(r"\(seed (\d+), split (\w+), index (\d+)\)", one["source"]):
            scene = draw_scene(seed=int(found[1]), split=found[2], index=int(found[3]))
            shown = Image.open(io.BytesIO(files[f"examples/{one['name']}.png"].content))
            assert np.array_equal(np.asarray(shown), np.asarray(scene.image))
            assert one["text"] in scene.captions
            assert one["question"] in [asked.text for asked in scene.questions]
            scenes += 1
    assert scenes >= 6


# ------------------------------------------------------------------ a browser and a server


def unavailable(reason: str) -> None:
    """A machine with a browser says so, and a missing one is a fault there."""
    if os.environ.get("VLBEIT_BROWSER_REQUIRED"):
        pytest.fail(f"VLBEIT_BROWSER_REQUIRED is set, but {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        unavailable(f"none of {', '.join(names)} is installed")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        unavailable("playwright is not installed (the `e2e` extra)")
    with sync_playwright() as playwright:
        # No name but the loopback's is resolved: the network is off.
        started = playwright.chromium.launch(
            executable_path=program,
            args=["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"],
        )
        yield started
        started.close()


class Served:
    """A server in a thread of this process."""

    def __init__(self, runs: ServedRuns, files: dict[str, PageFile]) -> None:
        config = ServeConfig(port=0)
        self.runs = runs
        self.app = App(runs, config, files, Metrics())
        self._listening = listen(config)
        self.address = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._server = server_of(self.app)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._listening]}, daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        self.app.batcher.stop(5.0)
        self._listening.close()


def files_with(*examples: dict[str, str], **changed: str) -> dict[str, PageFile]:
    """The page's files with other examples, and with other texts of some modules."""
    files = package_files()
    listed = json.dumps(list(examples)).encode()
    files[EXAMPLES] = PageFile(listed, "application/json")
    for example in examples:
        files[f"examples/{example['name']}.png"] = PageFile(PICTURE, "image/png")
    for name, text in changed.items():
        files[f"{name}.js"] = PageFile(text.encode(), "text/javascript; charset=utf-8")
    return files


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return Predictor(tiny_run(write_world(tmp_path_factory.mktemp("world"))), "a" * 64)


@pytest.fixture(scope="module")
def runs(pretrained: Predictor, tmp_path_factory: pytest.TempPathFactory) -> ServedRuns:
    """A run of every kind, with random weights, and an index."""
    data = write_tasks(tmp_path_factory.mktemp("data") / "shades")
    other = write_other_tasks(tmp_path_factory.mktemp("data") / "blocks")
    pairs = retrieval(data)
    tasks = [untrained(task, data) for task in ("vqa", "statements", "classification")]
    tasks += [untrained(task, other) for task in ("entailment", "segmentation")]
    index = pairs.index(images=[noise(i) for i in range(12)], ids=[f"p{i}.png" for i in range(12)])
    return ServedRuns(runs=(pretrained, pairs, *tasks), index=index)


@pytest.fixture(scope="module")
def served(runs: ServedRuns) -> Iterator[Served]:
    server = Served(runs, files_with(EXAMPLE))
    yield server
    server.stop()


class Visit:
    """A page that is open, and what it did: requests to others, errors, bodies of its questions."""

    def __init__(self, browser: Any, address: str, **settings: Any) -> None:
        self.context = browser.new_context(
            **{"viewport": {"width": 1240, "height": 900}, **settings}
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.outside: list[str] = []
        self.errors: list[str] = []
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.page.on("request", lambda request: self._seen(request, address))
        self.page.on("console", lambda said: said.type == "error" and self.errors.append(said.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.errors.append("a dialog"), dialog.dismiss()))
        self.page.goto(address)

    def _seen(self, request: Any, address: str) -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            self.outside.append(request.url)
        if "/v1/" in request.url:
            self.asked.append((request.url.rsplit("/", 1)[1], request.post_data_json))

    def ready(self) -> "Visit":
        """Waits for the first example."""
        self.page.locator(".preview:not([hidden])").wait_for()
        return self

    def open(self, mode: str) -> Any:
        """The panel of a mode, opened by its tab."""
        self.page.locator(f"#tab-{mode}").click()
        return self.page.locator(f"#panel-{mode}")

    def idle(self) -> None:
        """Waits until no answer is awaited."""
        self.page.wait_for_timeout(350)  # a panel asks a quarter of a second after a change
        self.page.locator(".result[aria-busy=true]").first.wait_for(state="detached")

    def drop(self, name: str, data: bytes) -> None:
        """Drops a file on the picture, as a hand would."""
        self.page.evaluate(
            """([name, data]) => {
              const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
              const dataTransfer = new DataTransfer();
              dataTransfer.items.add(new File([bytes], name));
              const facts = { dataTransfer, bubbles: true, cancelable: true };
              document.querySelector(".given .zone").dispatchEvent(new DragEvent("drop", facts));
            }""",
            [name, base64.b64encode(data).decode()],
        )

    def close(self) -> None:
        self.context.close()


@pytest.fixture
def visit(browser: Any, served: Served) -> Iterator[Visit]:
    opened = Visit(browser, served.address).ready()
    yield opened
    opened.close()


def percent(share: float) -> str:
    text = f"{100 * share:.1f}" if share == 0 or share >= 0.0005 else "<\u00a00.1"
    return f"{text}\u00a0%"


def bars(place: Any) -> list[tuple[str, str]]:
    """Names and numbers of a list of bars."""
    return [
        (row.locator(".name").inner_text().split(" \u25c2")[0], row.locator(".number").inner_text())
        for row in place.locator(".bars li").all()
    ]


# ------------------------------------------------------------------ the page says what the run says


@pytest.mark.browser
def test_hidden_words_get_the_candidates_of_the_run_with_the_picture_and_without(visit, pretrained):
    panel = visit.page.locator("#panel-fill_words")
    panel.get_by_role("button", name="ring", exact=True).click()
    panel.locator(".word-card").wait_for()
    columns = panel.locator(".word-card .columns > div")
    text = "red [MASK] look"
    for column, picture in ((0, PICTURE), (1, None)):
        guesses = pretrained.fill_words(text, picture, 50).guesses[0]
        expected = [(one.piece.removeprefix("##"), percent(one.probability)) for one in guesses[:5]]
        assert bars(columns.nth(column)) == expected
        told = next((one.probability for one in guesses if one.piece == "ring"), None)
        if told is not None:
            assert percent(told) in panel.locator(".adds").inner_text()
    assert bars(columns.nth(0)) != bars(columns.nth(1))
    panel.get_by_role("button", name="ring", exact=True).click()
    panel.locator(".word-card").wait_for(state="detached")
    assert visit.errors == [] and visit.outside == []


@pytest.mark.browser
def test_patches_painted_by_mouse_and_by_finger_are_those_that_are_asked_for(
    visit, browser, served, pretrained
):
    cells = visit.page.locator("#panel-fill_words [role=gridcell]")
    assert cells.count() == 16
    boxes = [cells.nth(i).bounding_box() for i in range(16)]

    def middle(number: int) -> tuple[float, float]:
        box = boxes[number]
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    visit.page.mouse.move(*middle(4))
    visit.page.mouse.down()
    for number in (5, 6, 10):
        visit.page.mouse.move(*middle(number), steps=3)
    visit.page.mouse.up()
    visit.page.locator(".figures figure").nth(3).wait_for()
    hidden = [4, 5, 6, 10]
    patches = [body for mode, body in visit.asked if mode == "fill_patches"]
    assert [body["hidden"] for body in patches] == [hidden, hidden]
    assert sorted(body.get("text", "") for body in patches) == ["", CAPTION]
    for place, text in ((1, CAPTION), (2, None)):
        found = pretrained.fill_patches(PICTURE, hidden, text)
        figure = visit.page.locator(".figures figure").nth(place)
        said = figure.locator("figcaption").inner_text()
        mean = percent(float(found.probabilities[hidden].mean()))
        assert f"{found.right} of 4 codes right, {mean} sure" in said
        shown = figure.locator("img").get_attribute("src").partition(",")[2]
        drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown))))
        where = hidden_pixels(found)
        assert (drawn[where] == found.filled_decoded[where]).all()
        assert (drawn[~where] == found.picture[~where]).all()
    assert visit.errors == []

    touched = Visit(browser, served.address, has_touch=True).ready()
    cell = touched.page.locator("#panel-fill_words [role=gridcell]").nth(9)
    cell.tap()
    assert cell.get_attribute("aria-selected") == "true"
    cell.tap()
    assert cell.get_attribute("aria-selected") == "false"
    touched.close()


@pytest.mark.browser
@pytest.mark.parametrize("mode", [mode for mode in PANELS if mode != "fill_words"])
def test_a_panel_shows_the_answer_of_the_run(visit, runs, mode):
    panel = visit.open(mode)
    run = runs.answering[mode]
    if mode in ("answer", "entail", "match", "compare", "search"):
        texts = {"match": "red\nsay blue", "entail": "red", "compare": "say red", "search": "red"}
        field = panel.locator("form textarea, form input").first
        if mode == "compare":
            panel.get_by_role("button", name=EXAMPLE["title"]).click()
            panel.locator(".preview:not([hidden])").wait_for()
        if mode != "answer":  # the example brings its question along
            field.fill(texts[mode])
        panel.locator("form button").click()
    expected: Any
    if mode == "search":
        found = run.search(runs.index, text="red", top=8)
        panel.locator(".found li").nth(7).wait_for()
        rows = [row.inner_text().split("\n") for row in panel.locator(".found li").all()]
        assert [row[0] for row in rows] == [one.id for one in found]
        assert [row[-1] for row in rows] == [f"cosine {one.similarity:.3f}" for one in found]
        return
    if mode == "attention":
        found = run.attention(PICTURE, CAPTION)
        panel.get_by_role("radio", name="look").click()
        weights = found.weights[found.words.index("look")]
        best = int(weights.argmax())
        said = panel.locator("[aria-live]").last.inner_text()
        assert percent(float(weights.sum())) in said
        place = f"row {best // 4 + 1}, column {best % 4 + 1}: {percent(float(weights[best]))}"
        assert place in said
        panel.locator("select").select_option("1")
        visit.idle()
        first = run.attention(PICTURE, CAPTION, 1).weights[found.words.index("look")]
        assert percent(float(first.sum())) in panel.locator("[aria-live]").last.inner_text()
        return
    if mode == "segment":
        found = run.segment(PICTURE)
        panel.locator(".legend li").first.wait_for()
        rows = [tuple(row.inner_text().split("\n")) for row in panel.locator(".legend li").all()]
        assert rows == [(one.name, percent(one.share)) for one in found.shares]
        panel.get_by_role("slider").fill("25")
        strength = panel.locator(".above").evaluate("(one) => getComputedStyle(one).opacity")
        assert float(strength) == pytest.approx(0.25)
        return
    panel.locator(".bars li").first.wait_for()
    if mode == "answer":
        expected = [(a.name, percent(a.probability)) for a in run.answer(PICTURE, QUESTION)]
    elif mode == "classify":
        expected = [(a.name, percent(a.probability)) for a in run.classify(PICTURE)]
    elif mode == "entail":
        shares = sorted(run.entail(PICTURE, "red")._asdict().items(), key=lambda row: -row[1])
        expected = [(name, percent(share)) for name, share in shares]
    elif mode == "compare":
        verdict = run.compare(PICTURE, PICTURE, "say red")
        expected = [
            (str(verdict.true).lower(), percent(max(verdict.probability, 1 - verdict.probability))),
            (
                str(not verdict.true).lower(),
                percent(min(verdict.probability, 1 - verdict.probability)),
            ),
        ]
    else:
        found = {text: run.match(PICTURE, text) for text in ("red", "say blue")}
        order = sorted(found, key=lambda text: -found[text].probability)
        expected = [
            (text, f"{percent(found[text].probability)} · cosine {found[text].similarity:.3f}")
            for text in order
        ]
    assert bars(panel) == expected
    if mode != "match":
        assert panel.locator(".verdict").inner_text() == expected[0][0]
    assert visit.errors == []


@pytest.mark.browser
def test_modes_that_are_lacking_name_the_command_that_adds_them(browser, pretrained):
    server = Served(ServedRuns(runs=(pretrained,)), files_with(EXAMPLE))
    try:
        visit = Visit(browser, server.address).ready()
        for mode in PANELS:
            panel = visit.open(mode)
            lacks = panel.locator(".lacks")
            if mode in pretrained.modes:
                assert lacks.count() == 0
                continue
            assert command_for(mode) == lacks.locator("code").inner_text()
            assert "not in these runs" in visit.page.locator(f"#tab-{mode}").text_content()
        assert visit.errors == []
        visit.close()
    finally:
        server.stop()


@pytest.mark.browser
def test_a_server_that_is_gone_and_a_file_that_is_no_picture_are_told(browser, runs):
    server = Served(runs, files_with(EXAMPLE))
    visit = Visit(browser, server.address).ready()
    visit.drop("notes.txt", b"no picture at all")
    trouble = visit.page.locator(".given .notice.bad")
    trouble.wait_for()
    assert "notes.txt: not a picture" in trouble.inner_text()
    server.stop()
    visit.page.get_by_role("button", name="red", exact=True).click()
    told = visit.page.locator("#panel-fill_words .notice.bad")
    told.wait_for()
    assert "does not answer" in told.inner_text()
    visit.close()


# ------------------------------------------------------------------ nothing outside, no errors


@pytest.mark.browser
def test_a_walk_through_every_panel_asks_nobody_else_and_logs_no_error(visit):
    visit.page.get_by_role("button", name="red", exact=True).click()
    visit.page.get_by_role("button", name="Hide 40 % at random").click()
    for mode in PANELS:
        panel = visit.open(mode)
        if mode in ("answer", "match", "search"):
            panel.locator("form button").click()
        visit.idle()
        assert panel.is_visible() and panel.locator(".notice.bad:visible").count() == 0
    visit.page.locator("#runs summary").click()
    assert visit.page.locator("#runs tbody tr").count() == 7
    assert visit.outside == [] and visit.errors == []
    assert {mode for mode, _ in visit.asked} == {*PANELS, "fill_patches"} - {"compare", "entail"}

    visit.page.evaluate("fetch('https://example.org/').catch(() => 0)")
    visit.page.wait_for_timeout(200)
    assert visit.errors, "the content policy would have told of a request to others"
    assert visit.outside or "example.org" in " ".join(visit.errors)


# ------------------------------------------------------------------ text stays text

MARK = "window.owned = 1"
PAYLOADS = [
    f"<script>{MARK}</script>",
    f"<SCRIPT>{MARK}</SCRIPT>",
    f"<scr<script>ipt>{MARK}</script>",
    f"</textarea><script>{MARK}</script>",
    f"</title><script>{MARK}</script>",
    f"</style><script>{MARK}</script>",
    f"--><script>{MARK}</script>",
    f"]]><script>{MARK}</script>",
    f"<script src=data:text/javascript,{MARK}></script>",
    f"<script type=module>{MARK}</script>",
    f'<img src=x onerror="{MARK}">',
    f"<img src=x onerror='{MARK}'>",
    "<img src=x onerror=window.owned=1>",
    f'"><img src=x onerror="{MARK}">',
    f"'><img src=x onerror='{MARK}'>",
    '" onerror="window.owned=1" x="',
    '" onfocus="window.owned=1" autofocus="',
    "' onmouseover='window.owned=1",
    f'<svg onload="{MARK}">',
    f"<svg><script>{MARK}</script></svg>",
    f"<svg><animate onbegin='{MARK}' attributeName=x dur=1s>",
    f'<body onload="{MARK}">',
    f'<iframe srcdoc="<script>parent.{MARK}</script>">',
    f'<iframe src="javascript:{MARK}">',
    f'<a href="javascript:{MARK}">press</a>',
    f'<a href="data:text/html,<script>{MARK}</script>">press</a>',
    f'<object data="javascript:{MARK}">',
    f'<embed src="javascript:{MARK}">',
    f'<form action="javascript:{MARK}"><button>send</button></form>',
    f'<input autofocus onfocus="{MARK}">',
    f'<video><source onerror="{MARK}"></video>',
    f'<details open ontoggle="{MARK}">',
    f'<meta http-equiv=refresh content="0;url=javascript:{MARK}">',
    '<base href="https://elsewhere.example/">',
    '<link rel=stylesheet href="https://elsewhere.example/a.css">',
    '<style>@import "https://elsewhere.example/a.css"</style>',
    f"<math><mtext></mtext><mglyph><style><img src=x onerror={MARK}>",
    f"<noscript><p title=\"</noscript><img src=x onerror='{MARK}'>\">",
    "${window.owned=1}{{constructor.constructor('window.owned=1')()}}",
    f"javascript:{MARK}",
]
INTRUDERS = """() => [...document.querySelectorAll(
  "script:not([src='/static/page.js']), iframe, object, embed, svg, math, base, video, source,"
  + "form[action], meta[http-equiv], a[href^='javascript:'], a[href^='data:'], style,"
  + "link:not([href^='/static/']), [onerror], [onload], [onfocus], [onmouseover], [onbegin],"
  + "[ontoggle], [autofocus]"
)].map((one) => one.outerHTML)"""


def picture_with_notes(note: str) -> bytes:
    """A JPEG whose EXIF says something about itself."""
    exif = Image.Exif()
    for tag in (0x010E, 0x010F, 0x013B, 0x8298):  # description, maker, artist, copyright
        exif[tag] = note
    file = io.BytesIO()
    Image.fromarray(noise(1)).save(file, "JPEG", exif=exif)
    return file.getvalue()


def show_everywhere(visit: Visit, payload: str) -> dict[str, str]:
    """What the page shows of a payload in a file name (and EXIF), a caption, a label, an error."""
    page = visit.page
    said = {"answers": [{"name": payload, "probability": 0.5}]}
    page.unroute_all()
    page.route("**/v1/answer", lambda route: route.fulfill(json=said))
    told = {"error": {"code": "bad_field", "message": payload, "request_id": "0"}}
    page.route("**/v1/match", lambda route: route.fulfill(json=told, status=422))
    visit.drop(payload, picture_with_notes(payload))
    page.wait_for_function(
        "(name) => document.querySelector('.given .preview').alt === name", arg=payload
    )
    page.locator("#caption").fill(payload)
    page.wait_for_function(
        """(text) => document.querySelector("#panel-fill_words .chips").textContent === text""",
        arg=re.sub(r"\s", "", payload),
    )
    answer = visit.open("answer")
    answer.locator("form input").fill(payload)
    answer.locator("form button").click()
    answer.locator(".verdict").wait_for()
    match = visit.open("match")
    match.locator("form textarea").fill(payload)
    match.locator("form button").click()
    match.locator(".notice.bad").wait_for()
    shown = {
        "file name": page.locator(".given .file-name").text_content().rsplit(" · ", 1)[0],
        "label": answer.locator(".verdict").text_content(),
        "bar": answer.locator(".bars .name").text_content(),
        "error": match.locator(".notice.bad").text_content(),
    }
    visit.open("fill_words")
    return shown


@pytest.mark.browser
@pytest.mark.slow
def test_forty_script_payloads_are_shown_as_text(visit):
    """In caption, file name, EXIF, label and error text."""
    assert len(set(PAYLOADS)) == 40
    for payload in PAYLOADS:
        shown = show_everywhere(visit, payload)
        assert set(shown.values()) == {payload}
        assert visit.page.evaluate(INTRUDERS) == []
        assert visit.page.evaluate("window.owned") is None
    # An answer of 422 is told on the console by the browser itself.
    assert [text for text in visit.errors if "422" not in text] == [] and visit.outside == []


@pytest.mark.browser
def test_a_page_that_made_markup_of_text_would_be_caught(browser, runs):
    text = package_files()["dom.js"].content.decode()
    broken = text.replace("element.textContent = text", "element.innerHTML = text")
    assert broken != text
    server = Served(runs, files_with(EXAMPLE, dom=broken))
    try:
        visit = Visit(browser, server.address).ready()
        answer = visit.open("answer")
        said = {"answers": [{"name": PAYLOADS[10], "probability": 0.5}]}
        visit.page.route("**/v1/answer", lambda route: route.fulfill(json=said))
        answer.locator("form button").click()
        answer.locator(".verdict").wait_for()
        assert answer.locator(".verdict").text_content() != PAYLOADS[10]
        assert visit.page.evaluate(INTRUDERS) != []
        assert visit.page.evaluate("window.owned") is None, "the content policy is the second line"
        visit.close()
    finally:
        server.stop()


# ------------------------------------------------------------------ for everybody


def tab_to(visit: Visit, wanted: str, key: str = "Tab") -> None:
    """Presses Tab until the focused element fits a selector."""
    for _ in range(80):
        visit.page.keyboard.press(key)
        if visit.page.evaluate("(one) => document.activeElement.matches(one)", wanted):
            return
    pytest.fail(f"80 presses of {key} do not reach {wanted}")


@pytest.mark.browser
def test_everything_can_be_done_by_keyboard_alone(visit):
    page = visit.page
    tab_to(visit, ".skip")
    tab_to(visit, ".example")
    page.keyboard.press("Enter")
    tab_to(visit, "#caption")
    tab_to(visit, "[role=tab]")
    tab_to(visit, "[role=gridcell]")
    for key in ("Space", "ArrowRight", "Space", "ArrowDown", "Enter", "End", "ArrowUp", "Space"):
        page.keyboard.press(key)
    tab_to(visit, ".chip")
    page.keyboard.press("Space")
    visit.idle()
    page.locator(".word-card").wait_for()
    page.locator(".figures figure").nth(3).wait_for()
    assert [body["hidden"] for mode, body in visit.asked if mode == "fill_patches"][-1] == [
        0, 1, 3, 5,
    ]  # fmt: skip
    assert [body["text"] for mode, body in visit.asked if mode == "fill_words"][-1] == (
        "[MASK] ring look"
    )
    tab_to(visit, "[role=tab]", "Shift+Tab")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-answer"
    tab_to(visit, "#panel-answer input")
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("say blue")
    page.keyboard.press("Enter")
    page.locator("#panel-answer .verdict").wait_for()
    assert visit.asked[-1][1]["question"] == "say blue"
    tab_to(visit, "[role=tab]", "Shift+Tab")
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.id") == "tab-search"
    page.keyboard.press("ArrowLeft")
    tab_to(visit, "[role=radio]")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.getAttribute('aria-checked')") == "true"
    assert visit.errors == []


AUDIT = (Path(__file__).parent / "page_audit.js").read_text().partition("\n")[2]


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1240, 360])
def test_every_panel_has_names_roles_contrast_and_room(browser, served, scheme, width):
    size = {"width": width, "height": 800}
    visit = Visit(
        browser, served.address, viewport=size, color_scheme=scheme, reduced_motion="reduce"
    ).ready()
    visit.page.get_by_role("button", name="red", exact=True).click()
    visit.page.get_by_role("button", name="Hide 40 % at random").click()
    for mode in PANELS:
        panel = visit.open(mode)
        if mode in ("answer", "match", "entail", "search"):
            panel.locator("form input, form textarea").first.fill("red")
            panel.locator("form button").click()
        visit.idle()
        visit.page.wait_for_timeout(200)  # the fading of what is old
        assert visit.page.evaluate(AUDIT) == [], mode
    visit.close()


@pytest.mark.browser
def test_the_audit_finds_what_is_planted(visit):
    assert visit.page.evaluate(AUDIT) == []
    planted = {
        "contrast": "document.documentElement.style.setProperty('--hush', '#b8b4aa')",
        "no name": "document.getElementById('tab-answer').textContent = ''",
        "outside its holder": "document.getElementById('tabs').removeAttribute('role')",
        "no alt": "document.querySelector('.preview').removeAttribute('alt')",
        "px too wide": "document.querySelector('.top').style.width = '2000px';"
        "document.querySelector('.top').style.maxWidth = 'none'",
        "of nothing": "document.querySelector('.card.panel:not([hidden])').setAttribute("
        "'aria-labelledby', 'nobody')",
        "smaller than 24 px": "document.querySelector('.chip').style.cssText ="
        " 'min-height: 0; height: 10px; padding: 0'",
    }
    for named, change in planted.items():
        visit.page.evaluate(f"() => {{ {change} }}")
        assert any(named in problem for problem in visit.page.evaluate(AUDIT)), named


# ------------------------------------------------------------------ what was hidden comes back


@contextmanager
def serve_command(folder: Path) -> Iterator[str]:
    """Where `vlbeit serve FOLDER` listens; it must end with 0 when it is told to."""
    job = subprocess.Popen(
        [sys.executable, "-m", "vlbeit", "serve", str(folder), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert job.stdout is not None
    try:
        for line in job.stdout:
            if found := re.search(r"serving on (http://127\.0\.0\.1:\d+)/", line):
                break
        else:
            pytest.fail(f"vlbeit serve ended with {job.wait()} before it listened")
        yield found[1]
    finally:
        job.terminate()
        assert job.wait(30) == 0


@pytest.fixture(scope="module")
def trained(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where `vlbeit serve` shows a demo folder that has learned colours."""
    folder = train_colour_world(tmp_path_factory.mktemp("colours") / "demo")
    with serve_command(folder) as address:
        yield address


class Shown(NamedTuple):
    """A held-out scene, a caption with its colour in it, and a question with its answer."""

    image: Image.Image
    caption: str
    colour: str
    question: str
    answer: str


def colour_scenes(count: int) -> list[Shown]:
    scenes = (draw_colour_scene("held out", i) for i in range(count))
    return [Shown(s.image, s.caption, s.colour, s.question, s.colour) for s in scenes]


def demo_scenes(count: int) -> list[Shown]:
    """Of the demo's own world, those with one group of figures, so that one colour is right."""
    scenes = (draw_scene(seed=0, split="val", index=i) for i in range(4 * count))
    found = []
    for number, scene in enumerate(one for one in scenes if len(one.groups) == 1):
        caption = scene.captions[number % len(scene.captions)]
        asked = scene.questions[number % len(scene.questions)]
        colour = scene.groups[0].colour
        found.append(Shown(scene.image, caption, colour, asked.text, asked.answer))
    assert len(found) >= count
    return found[:count]


class Played(NamedTuple):
    """How often the page was right, and how far off its pictures were, in levels of 255."""

    right: int
    alone_right: int
    """Colours named without the picture."""
    answered: int
    filled_error: float
    mean_error: float
    """Of the mean training picture."""


def play(visit: Visit, scenes: Sequence[Shown], mean: np.ndarray) -> Played:
    """Hides each scene's colour word and a block of 3 x 3 of its patches (of 5 x 5, 8 pixels each),
    and asks the question."""
    right = alone_right = answered = 0
    filled_error, mean_error = [], []
    for number, scene in enumerate(scenes):
        take(visit, scene, f"{number}.png")
        panel = visit.page.locator("#panel-fill_words")
        panel.get_by_role("button", name=scene.colour, exact=True).click()
        panel.locator(".word-card").wait_for()
        columns = panel.locator(".word-card .columns > div")
        right += bars(columns.nth(0))[0][0] == scene.colour
        alone_right += bars(columns.nth(1))[0][0] == scene.colour

        pixels = np.asarray(scene.image, float)
        top, left = number % 3, number // 3 % 3  # elsewhere in each scene
        block = [
            5 * row + column for row in range(top, top + 3) for column in range(left, left + 3)
        ]
        for patch in block:
            panel.locator("[role=gridcell]").nth(patch).click()
        panel.locator(".figures figure").nth(3).wait_for()
        visit.idle()
        assert [body for mode, body in visit.asked if mode == "fill_patches"][-1]["hidden"] == block
        shown = panel.locator(".figures img").first.get_attribute("src").partition(",")[2]
        drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown))), float)
        where = np.zeros((5, 5), bool)
        where.flat[block] = True
        where = where.repeat(8, axis=0).repeat(8, axis=1)
        filled_error.append(np.abs(drawn - pixels)[where].mean())
        mean_error.append(np.abs(mean - pixels)[where].mean())

        answer = visit.open("answer")
        answer.locator("form input").fill(scene.question)
        answer.locator("form button").click()
        answer.locator(".verdict").wait_for()
        visit.idle()
        answered += answer.locator(".verdict").inner_text() == scene.answer
    errors = float(np.mean(filled_error)), float(np.mean(mean_error))
    return Played(right, alone_right, answered, *errors)


def take(visit: Visit, scene: Shown, name: str) -> None:
    """Shows a scene, with its caption, on the panel that fills in."""
    file = io.BytesIO()
    scene.image.save(file, "PNG")
    visit.open("fill_words")
    visit.drop(name, file.getvalue())
    visit.page.wait_for_function(
        "(name) => document.querySelector('.given .preview').alt === name", arg=name
    )
    visit.page.locator("#caption").fill(scene.caption)
    # All of its words, as the caption before may have had the same colour.
    visit.page.wait_for_function(
        """(text) => document.querySelector("#panel-fill_words .chips").textContent === text""",
        arg=scene.caption.replace(" ", ""),
    )


def mean_picture(scenes: Iterable[Any]) -> np.ndarray:
    return np.mean([np.asarray(scene.image, float) for scene in scenes], axis=0)


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute of training on a core of its own
def test_hidden_colours_and_patches_come_back_and_questions_are_answered(browser, trained):
    """On held-out scenes, through the browser and `vlbeit serve`, with the network off."""
    visit = Visit(browser, trained).ready()
    scenes = colour_scenes(8)
    played = play(visit, scenes, mean_picture(draw_colour_scene("train", i) for i in range(200)))
    assert played.right == played.answered == len(scenes), played
    assert played.alone_right < len(scenes) / 2, "the text must not give the colour away"
    assert played.filled_error < 0.5 * played.mean_error, played
    assert visit.errors == [] and visit.outside == []
    visit.close()


DEMO = os.environ.get("VLBEIT_DEMO", "")


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not DEMO, reason="VLBEIT_DEMO names no folder of `vlbeit demo`")
def test_on_the_demos_own_checkpoint_the_same_comes_back(browser):
    """What the command that `make run` ends with shows. The demo itself takes half an hour."""
    with serve_command(Path(DEMO)) as address:
        visit = Visit(browser, address).ready()
        scenes = demo_scenes(24)
        trained_on = (draw_scene(seed=0, split="train", index=i) for i in range(200))
        played = play(visit, scenes, mean_picture(trained_on))
        assert played.right == len(scenes) and played.answered >= 20, played
        assert played.alone_right < len(scenes) / 2, played
        assert played.filled_error < 0.5 * played.mean_error, played
        assert visit.errors == [] and visit.outside == []
        visit.close()
