"""The page: valid, complete by itself, honest in what it says; and its charts."""

import base64
import io
import json
import re
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from tiny_run import PAIRS, tiny_run, write_world
from vlbeit.data.dataset import Dataset
from vlbeit.data.records import write_shards
from vlbeit.eval.curves import POINTS, Line, interval_chart, line_chart, nice_ticks, share_chart
from vlbeit.eval.evaluate import evaluate_run
from vlbeit.eval.examples import Word
from vlbeit.eval.report import run_folder_of, summary, write_report
from vlbeit.eval.report_html import picture
from vlbeit.eval.report_looking import said
from vlbeit.eval.report_tasks import (
    HEADLINES,
    AskedExample,
    Candidate,
    MapExample,
    RankedExample,
    RankedPicture,
    TaskResult,
    coloured,
    tasks_part,
)
from vlbeit.eval.report_training import duration
from vlbeit.eval.run_rows import read_rows

VOID = {"meta", "img", "br", "link", "input", "hr"}
SVG_EMPTY = {"line", "circle", "polyline", "polygon"}


class Reader(HTMLParser):
    """Every tag with its attributes; complains about tags that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in SVG_EMPTY
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.found if name == tag]


def rows_of_a_run(folder):
    def row(step, loss):
        scores = {"loss": loss, "count": 40, "accuracy": 1 / (1 + loss)}
        return {"step": step, "objectives": {"mim": scores, "mvlm_text": scores}}

    speed = {"seconds": 0.5, "waited": 0.1, "samples_per_second": 1234.5, "memory_mb": 567}
    lines = [row(step, 5 / step) | speed for step in range(1, 41)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evals = [row(0, 5.0), row(20, 0.3), row(40, 0.2)]
    (folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evals))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    rows_of_a_run(folder)
    run = tiny_run(write_world(tmp_path_factory.mktemp("world")), reads=True)
    evaluation = evaluate_run(run)
    out = write_report(
        folder, evaluation, folder / "report.html", run=run, seconds={"train": 75.0, "look": 2.0}
    )
    return out.read_text()


@pytest.fixture(scope="module")
def page(report):
    return Reader(report)


# --- the page as a document ----------------------------------------------------------------------


def test_every_tag_is_closed_in_order_and_the_skeleton_is_there(page, report):
    assert report.startswith("<!doctype html>")
    tags = [tag for tag, _ in page.found]
    for tag in ("html", "head", "body", "main", "h1", "title", "style"):
        assert tags.count(tag) == 1
    assert page.all("html")[0]["lang"] == "en"
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    with pytest.raises(AssertionError):
        Reader(report.replace("</table>", "", 1))


def test_nothing_is_loaded_from_elsewhere(page, report):
    assert not re.search(r"https?:|url\(|@import|srcset|<script|<link|<iframe", report)
    for tag, attrs in page.found:
        for name, value in attrs.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "data", "action"):
                assert tag == "img" and value.startswith("data:image/png;base64,")
    (policy,) = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    assert "default-src 'none'" in policy and "img-src data:" in policy


def test_every_picture_is_a_png_with_its_size_and_a_text(page):
    images = page.all("img")
    assert len(images) > 12 + 8 * 5
    for attrs in images:
        assert attrs["alt"].strip()
        data = base64.b64decode(attrs["src"].split(",")[1], validate=True)
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            assert image.format == "PNG"
            assert (str(image.width), str(image.height)) == (attrs["width"], attrs["height"])


def test_it_can_be_read_without_seeing_it(page):
    for chart in page.all("svg"):
        assert chart["role"] == "img" and len(chart["aria-label"]) > 20
    levels = [int(tag[1]) for tag, _ in page.found if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    tables = len(page.all("table"))
    assert tables >= 4 and len(page.all("caption")) == tables
    assert all(attrs["scope"] in ("col", "row") for attrs in page.all("th"))


def test_it_follows_the_readers_light_or_dark_theme_and_fits_a_phone(report):
    assert "prefers-color-scheme: dark" in report and "max-width: 34rem" in report
    inline = re.findall(r'(?:fill|stroke|color)="#?\w+', report)
    assert inline == []  # colours come from the theme's variables only


def test_it_holds_the_figures_that_were_measured(page, report):
    text = " ".join(" ".join(page.text).split())
    for words in ("sighted", "blind", "prior", "hidden words", "1 min 17 s", "Visual tokenizer"):
        assert words in text
    assert text.count("\u2713") + text.count("\u2717") > 12
    assert f"{PAIRS} pairs" in text
    for words in ("samples a second 1,234.5", "seconds a step 0.500", "waiting for data 16.7 %"):
        assert words in text, words
    assert "tokens a second" not in text  # this log has none
    assert report.count("<polyline") >= 2 * 4 - 2


def test_a_hostile_caption_stays_text(tmp_path):
    folder = write_world(tmp_path)
    attack = '<script>alert("1")</script> & <img src=x>'
    rows = (
        (f"{i}", {"png": png(), "json": json.dumps({"captions": [attack]}).encode()})
        for i in range(3)
    )
    world = Dataset.open(folder)
    shards = [str(path) for path in write_shards(rows, folder, "hostile")]
    pairs = [s for s in world.sources if s.stream == "pair"][0]
    hostile = type(pairs)("hostile", "pair", "val", shards, 3)
    others = [s for s in world.sources if s.stream != "pair"]
    Dataset.write(folder, "world", [hostile, *others], {})
    run = tiny_run(folder)
    out = write_report(
        folder, evaluate_run(run), folder / "report.html", run=run, title=f"run {attack}"
    )
    page = Reader(out.read_text())
    assert page.all("script") == []
    assert all("src" in attrs and attrs["src"].startswith("data:") for attrs in page.all("img"))
    assert escape(attack) in out.read_text()


def png():
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (16, 16, 16)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("streams", [("image",), ("text",), ("pair",)])
def test_a_run_of_one_stream_has_a_page_too(tmp_path, streams):
    run = tiny_run(write_world(tmp_path, streams=streams))
    out = write_report(tmp_path, evaluate_run(run), tmp_path / "report.html", run=run)
    Reader(out.read_text())


def test_a_run_without_codes_has_a_page_too(tmp_path):
    run = tiny_run(write_world(tmp_path), visual=False)
    out = write_report(tmp_path, evaluate_run(run), tmp_path / "report.html", run=run)
    assert "Visual tokenizer" not in out.read_text()


def test_codes_without_pictures_are_counted_and_not_drawn(tmp_path):
    run = tiny_run(write_world(tmp_path))
    drawn = write_report(tmp_path, evaluate_run(run), tmp_path / "drawn.html", run=run).read_text()
    run.visual.draws, run.visual.decode = False, None
    plain = write_report(tmp_path, evaluate_run(run), tmp_path / "plain.html", run=run).read_text()
    assert "How often each code is used" in plain
    assert "their codes decode to" in drawn and "their codes decode to" not in plain


# --- what it says --------------------------------------------------------------------------------


def test_the_summary_claims_looking_only_where_the_intervals_are_apart(tmp_path):
    world = write_world(tmp_path)
    assert "reads the answers off" in summary(evaluate_run(tiny_run(world, reads=True)))
    assert "has not learned to look" in summary(evaluate_run(tiny_run(world, reads=False)))


def test_right_and_wrong_words_differ_by_more_than_their_colour():
    right = said([Word("red", True, "red", 0.97)])
    wrong = said([Word("red", True, "blue", 0.41)])
    assert "\u2713" in right and "97 %" in right and "answered right" in right
    assert "\u2717" in wrong and "<s>blue</s>" in wrong and "red" in wrong
    plain = said([Word("a", True), Word("ring", True), Word("s", False)])
    assert plain == "a rings"


# --- tasks ---------------------------------------------------------------------------------------


def task_result(task, *examples):
    def estimate(value):
        return {"value": value, "low": value - 0.02, "high": value + 0.02}

    found = {**estimate(0.8), "samples": 200, "baseline": estimate(0.3), "gain": estimate(0.5)}
    figures = {line.figures[-1]: found for line in HEADLINES[task]}
    evaluation = {"task": task, "step": 9, "samples": 200, "figures": figures}
    return TaskResult(evaluation=evaluation, examples=examples)


def pixels_of(shade):
    return np.full((32, 32, 3), shade, np.uint8)


def asked(text, *candidates, pictures=1):
    shown = tuple(pixels_of(40 * place) for place in range(pictures))
    return AskedExample(pictures=shown, text=text, candidates=candidates, truth="red")


def test_a_fine_tuned_demo_has_its_tasks_on_the_page(tmp_path):
    run = tiny_run(write_world(tmp_path))
    attack = "<b>what</b> colour?"
    right = Candidate("red", 0.9, True)
    wrong = Candidate("blue", 0.4, False)
    near = [RankedPicture(
        pixels=pixels_of(i), caption=f"scene {i}", similarity=0.9 - i / 10, probability=None,
        right=i == 1,
    ) for i in range(3)]  # fmt: skip
    classes = np.zeros((32, 32), np.uint8)
    results = [
        task_result("vqa", asked(attack, right, wrong), asked("second?", wrong)),
        task_result("retrieval", RankedExample(caption=attack, pictures=tuple(near), among=90)),
        task_result("classification", asked("", right)),
        task_result("statements", asked("both are red", right, wrong, pictures=2)),
        task_result("segmentation", MapExample(
            pixels=pixels_of(9), said=classes, truth=np.tri(32, dtype=np.uint8),
            classes=("ground", "ring"),
        )),
    ]  # fmt: skip
    out = write_report(tmp_path, evaluate_run(run), tmp_path / "out.html", run=run, tasks=results)
    page = Reader(out.read_text())
    text = " ".join("".join(page.text).split())
    for words in ("80.0 % [78.0, 82.0]", "30.0 %", "+50.0 %", "90 held-out scenes", "R@1"):
        assert words in text
    assert attack in text and "<b>" not in out.read_text()
    assert "right would be: red" in text  # where no candidate is right
    assert "The first of these is right in 1" in text
    for attrs in page.all("img"):
        assert attrs["alt"].strip() and attrs["src"].startswith("data:image/png;base64,")


def test_a_page_without_tasks_says_nothing_of_them(report):
    assert tasks_part([]) == []
    assert "fine-tuned" not in report


def test_a_right_answer_differs_by_more_than_its_colour():
    (html,) = tasks_part([task_result("vqa", asked("?", Candidate("red", 0.9, True)))])
    assert "\u2713" in html and "right: " in html


def test_no_two_classes_of_a_map_look_the_same_and_none_is_black():
    maps = coloured(np.array([[*range(30), 255]], np.uint8), [str(i) for i in range(30)])
    assert len({tuple(pixel) for pixel in maps[0].tolist()}) == 31
    assert maps[0, -1].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3.26, "3.3 s"), (59.2, "59.2 s"), (125, "2 min 05 s"), (5400, "1 h 30 min")],
)
def test_durations_read_as_people_say_them(seconds, words):
    assert duration(seconds) == words


def test_a_torn_last_row_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    assert read_rows(tmp_path / "none.jsonl") == []


def test_a_checkpoints_run_folder_is_found(tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "step-0000060"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    assert run_folder_of(folder) == tmp_path / "run"
    assert run_folder_of(tmp_path / "run") == tmp_path / "run"


# --- charts --------------------------------------------------------------------------------------


def test_smoothing_keeps_the_weighted_mean_and_drops_what_is_no_number():
    values = np.random.default_rng(0).random(1200)
    rows = [(step, value, 1.0 + step % 3) for step, value in enumerate(values)]
    line = Line.smoothed("x", "train", rows)
    assert len(line.values) == POINTS
    group = values[:10]
    weights = 1.0 + np.arange(10) % 3
    assert line.values[0] == pytest.approx(np.average(group, weights=weights))
    assert line.steps[0] == pytest.approx(4.5)
    broken = [(0.0, 1.0, 1.0), (1.0, float("nan"), 1.0), (2.0, 3.0, 0.0), (3.0, 2.0, 1.0)]
    assert Line.smoothed("x", "train", broken).values.tolist() == [1.0, 2.0]
    assert len(Line.smoothed("x", "train", []).values) == 0


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 6.3), (0, 3000), (0, 0.004), (2, 2)])
def test_ticks_are_few_round_and_inside(low, high):
    ticks = nice_ticks(low, high, 4)
    assert 1 <= len(ticks) <= 6
    assert low - 1e-9 <= ticks[0] and ticks[-1] <= high + 1e-9


def test_a_higher_value_is_drawn_higher_and_a_later_step_further_right():
    line = Line(name="x", kind="held", steps=np.array([0.0, 5, 10]), values=np.array([1.0, 2, 4]))
    (path,) = re.findall(r'points="([^"]+)"', line_chart("rising", [line]))
    points = [tuple(map(float, point.split(","))) for point in path.split()]
    xs, ys = zip(*points, strict=True)
    assert list(xs) == sorted(xs) and list(ys) == sorted(ys, reverse=True)
    assert ys[1] - ys[0] == pytest.approx((ys[2] - ys[0]) / 3, abs=0.1)


def test_charts_of_nothing_are_still_charts():
    empty = Line(name="x", kind="train", steps=np.zeros(0), values=np.zeros(0))
    Reader(line_chart("empty", [empty]))
    Reader(share_chart("one code", np.array([1.0])))
    Reader(interval_chart("none", [], {"sighted": "sighted"}))


def test_the_interval_is_drawn_around_its_dot():
    row = {"sighted": {"value": 0.5, "low": 0.4, "high": 0.7}}
    page = Reader(interval_chart("colour", [("colour", row, 0.25)], {"sighted": "sighted"}))
    (dot,) = page.all("circle")
    (whisker,) = [a for a in page.all("line") if a["class"].startswith("whisker")]
    (prior,) = [a for a in page.all("line") if a["class"] == "prior"]
    left, middle, right = (float(v) for v in (whisker["x1"], dot["cx"], whisker["x2"]))
    assert left < middle < right and right - middle == pytest.approx(2 * (middle - left), abs=0.2)
    assert float(prior["x1"]) < left


def test_small_pictures_keep_their_pixels_and_large_ones_are_smoothed():
    small, large = np.zeros((40, 40, 3), np.uint8), np.zeros((224, 224, 3), np.uint8)
    assert 'class="pixels"' in picture(small, "small")
    assert 'class="pixels"' not in picture(large, "large")
    assert "&quot;" in picture(small, 'a "quoted" text')
