"""`vlbeit report RUN RUN ...`: a page about several runs from their logs, and what it refuses."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from test_page import browser as browser
from test_report import Reader
from toy_tasks import toy_finetune, write_start, write_tasks
from vlbeit.cli import main
from vlbeit.errors import ConfigError, InputError
from vlbeit.eval.report_comparison import read_runs, short_names, write_comparison

NAN = "nan"


def write_run(
    folder: Path,
    *,
    rate: float = 0.001,
    steps: int = 40,
    task: str = "",
    held: bool = True,
    loss: float = 5.0,
) -> Path:
    """A run folder with logs, whose loss after step s is loss / s."""
    folder.mkdir(parents=True)
    objective = task or "mvlm_text"

    def row(step: int) -> dict[str, Any]:
        score = {"loss": loss / max(step, 1), "count": 40, "accuracy": step / steps}
        return {"step": step, "objectives": {objective: score}}

    lines = [
        row(step) | {"seconds": 0.5, "waited": 0.125, "samples_per_second": 64.0}
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if held:
        evals = [row(0), row(steps // 2), row(steps)]
        if task:
            evals = [line | {"figures": {"accuracy": 0.75, "accuracy/a": 0.5}} for line in evals]
        (folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evals))
    config = {"run_dir": str(folder), "seed": 0, "optim": {"lr": rate, "betas": [0.9, 0.98]}}
    config |= {"model": {"width": 32}} | ({"task": task} if task else {})
    (folder / "config.json").write_text(json.dumps(config))
    environment = {"host": "secret-host", "device": "cpu", "threads": 1, "gpu": None}
    (folder / "env.json").write_text(json.dumps(environment | {"versions": {"torch": "2.13.0"}}))
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    return [
        write_run(tmp_path / "calm", rate=0.001),
        write_run(tmp_path / "<wild>", rate=0.004, steps=30, loss=9.0),
    ]


def text_of(page: Path) -> str:
    return " ".join(" ".join(Reader(page.read_text()).text).split())


# ------------------------------------------------------------------ the page


def test_the_page_is_whole_and_loads_nothing(pair):
    page = write_comparison(pair).read_text()
    reader = Reader(page)
    assert [tag for tag, _ in reader.found].count("h1") == 1
    assert not re.search(r"https?:|url\(|@import|<script|<link|<iframe|<img", page)
    # A run's name is text and never markup, and the host's name stays at home.
    assert "&lt;wild&gt;" in page and "<wild>" not in page and "secret-host" not in page
    for chart in reader.all("svg"):
        assert "calm held out from" in chart["aria-label"]


def test_each_run_has_a_line_of_its_own_in_every_chart(pair):
    page = write_comparison(pair).read_text()
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(charts) == 2  # loss and accuracy of the one objective
    for chart in charts:
        lines = re.findall(r'<polyline class="line (\w+ \w+)"', chart)
        assert sorted(lines) == ["held run0", "held run1", "train run0", "train run1"]
        dots = re.findall(r'<circle class="dot held (\w+)"', chart)
        assert dots.count("run0") == dots.count("run1") == 3
    # Both over the same steps: the shorter run ends at three quarters of the longer one.
    ends = [float(points.split()[-1].split(",")[0]) for points in re.findall(
        r'class="line held run\d" points="(.*?)"', charts[0]
    )]  # fmt: skip
    left, right = 46, 440 - 12
    assert ends == pytest.approx([right, left + 0.75 * (right - left)], abs=0.1)


def test_only_settings_that_differ_are_shown(pair):
    shown = text_of(write_comparison(pair))
    assert "1 of 4 settings differ" in shown and "optim.lr 0.001 0.004" in shown
    assert "optim.betas" not in shown and "model.width" not in shown and "run_dir" not in shown
    assert "All 1 packages are the same." in shown


def test_a_setting_that_one_run_lacks_is_a_difference(pair):
    tree = json.loads((pair[1] / "config.json").read_text())
    tree["model"]["patch"] = 8
    (pair[1] / "config.json").write_text(json.dumps(tree))
    assert "model.patch \u2014 8" in text_of(write_comparison(pair))


def test_runs_with_the_same_settings_say_so(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    assert "All 4 settings are the same." in text_of(write_comparison(runs))


def test_the_figures_are_those_of_the_logs(pair):
    shown = text_of(write_comparison(pair))
    assert "held out at step 40 30" in shown
    objective = "MVLM: hidden words of pairs, image seen, loss (nats)"
    assert f"{objective} {5 / 40:.4f} {9 / 30:.4f}" in shown
    means = [
        sum(loss / step for step in range(last - 19, last + 1)) / 20
        for loss, last in ((5, 40), (9, 30))
    ]
    assert f"{objective} {means[0]:.4f} {means[1]:.4f}" in shown
    assert "samples a second 64.0 64.0" in shown
    assert "share of the time waiting for data 20.0 % 20.0 %" in shown
    assert "time of all logged steps 25.0 s 18.8 s" in shown


def test_runs_that_looked_at_nothing_held_out_say_so(tmp_path):
    runs = [write_run(tmp_path / name, held=False) for name in ("a", "b")]
    shown = text_of(write_comparison(runs))
    assert "log.eval_every 0" in shown and "held out at step" not in shown
    one = [write_run(tmp_path / "c"), runs[0]]
    assert "held out at step 40 \u2014" in text_of(write_comparison(one))


def test_an_evaluation_in_the_run_folder_is_shown_with_its_intervals(tmp_path):
    runs = [write_run(tmp_path / name, task="vqa") for name in ("a", "b")]
    assert "vlbeit eval RUN --out" in text_of(write_comparison(runs))
    estimate = {"value": 0.5, "low": 0.25, "high": 0.625, "samples": 9}
    tree = {"step": 40, "figures": {"accuracy": estimate}}
    (runs[1] / "evaluation.json").write_text(json.dumps(tree))
    shown = text_of(write_comparison(runs))
    assert "accuracy \u2014 50.0 % [25.0, 62.5]" in shown


def test_a_task_gets_curves_of_its_figures_but_not_of_their_parts(tmp_path):
    runs = [write_run(tmp_path / name, task="vqa") for name in ("a", "b")]
    page = write_comparison(runs).read_text()
    titles = re.findall(r"<h3>(.*?)</h3>", page)
    assert titles == ["vqa", "vqa", "accuracy"]
    assert "fine-tuning (vqa)" in page


def test_a_row_that_is_no_number_leaves_the_page_whole(pair):
    line = json.loads((pair[0] / "eval.jsonl").read_text().splitlines()[-1])
    line["step"], line["objectives"]["mvlm_text"]["loss"] = 41, NAN
    with (pair[0] / "eval.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    page = write_comparison(pair).read_text()
    assert "nan" not in "".join(re.findall(r'points="(.*?)"', page))
    assert "held out at step 41" in text_of(pair[0].parent / "comparison.html")


def test_runs_of_one_name_are_told_apart_by_what_comes_before():
    places = [Path("/a/x/vqa"), Path("/b/x/vqa"), Path("/b/y/vqa"), Path("/b/small")]
    assert short_names(places) == ["a/x/vqa", "b/x/vqa", "y/vqa", "small"]
    assert short_names([Path("/r"), Path("/s/r")]) == ["/r", "s/r"]


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_each_run_in_its_own_colour_and_fits_a_phone(browser, tmp_path, scheme):
    runs = [write_run(tmp_path / f"a-run-with-a-long-name-{i}", rate=i + 0.5) for i in range(8)]
    page = write_comparison(runs)
    context = browser.new_context(color_scheme=scheme, viewport={"width": 390, "height": 800})
    opened = context.new_page()
    said: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.goto(page.as_uri())
    colours = opened.eval_on_selector_all(
        "polyline.held", "lines => lines.map(line => getComputedStyle(line).stroke)"
    )
    keys = opened.eval_on_selector_all(
        "header .key li",
        "all => all.map(one => getComputedStyle(one, '::before').backgroundColor)",
    )
    # Loss and accuracy are drawn in the colours of the legend, in its order.
    assert len(set(keys)) == 8 and colours == keys * 2
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert said == []
    context.close()


# ------------------------------------------------------------------ what is refused


def test_the_same_run_twice_is_refused_by_any_name(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(pair[0])
    for again in (pair[0], Path("calm"), Path("<wild>/../calm"), tmp_path / "link"):
        with pytest.raises(ConfigError, match="the same run"):
            read_runs([pair[0], pair[1], again])


def test_runs_of_different_kinds_are_refused_with_each_kind(pair, tmp_path):
    asked = write_run(tmp_path / "asked", task="vqa")
    with pytest.raises(ConfigError, match=r"calm: pretraining; asked: vqa"):
        read_runs([pair[0], asked])


def test_a_folder_without_a_run_is_refused(pair, tmp_path):
    for name in ("nowhere", "empty"):
        if name == "empty":
            (tmp_path / name).mkdir()
        with pytest.raises(InputError, match=f"{name}: no run there"):
            read_runs([pair[0], tmp_path / name])


def test_a_run_that_has_logged_nothing_is_refused(pair):
    (pair[1] / "metrics.jsonl").write_text('{"step": 1')
    with pytest.raises(InputError, match=r"metrics\.jsonl"):
        read_runs(pair)


def test_a_tokenizers_training_is_refused(pair, tmp_path):
    (tmp_path / "visual").mkdir()
    (tmp_path / "visual/config.json").write_text('{"tokenizer": {}}')
    with pytest.raises(ConfigError, match="tokenizer's training"):
        read_runs([pair[0], tmp_path / "visual"])


def test_more_runs_than_colours_are_refused(tmp_path):
    runs = [write_run(tmp_path / str(i)) for i in range(9)]
    with pytest.raises(ConfigError, match="9 runs: at most 8"):
        read_runs(runs)
    page = write_comparison(runs[:8]).read_text()
    assert len(set(re.findall(r'"line held (run\d)"', page))) == 8
    assert all(page.count(f"--run{i}: #") == 2 for i in range(8))  # light and dark


# ------------------------------------------------------------------ the command


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("finetune", "pretrain"):
        monkeypatch.setattr(f"vlbeit.train.{name}.matrix_limit", lambda *_: 1e11)
    yield


def test_the_command_compares_real_runs_named_by_folder_or_checkpoint(tmp_path, capsys, quick):
    data = write_tasks(tmp_path / "data")
    start = write_start(tmp_path / "start", data)
    settings = {"log.eval_every": 4, "optim.lr": 0.001}
    runs = [
        toy_finetune("vqa", start, data, tmp_path / "one"),
        toy_finetune("vqa", start, data, tmp_path / "two", settings),
    ]
    checkpoint = next((tmp_path / "two/checkpoints").iterdir())
    capsys.readouterr()
    assert main(["report", str(tmp_path / "one"), str(checkpoint)]) == 0
    assert f"report in {tmp_path / 'comparison.html'}" in capsys.readouterr().out
    shown = text_of(tmp_path / "comparison.html")
    assert "optim.lr 0.003 0.001" in shown and "log.eval_every 0 4" in shown
    assert len(runs) == 2


def test_a_flag_of_a_single_run_is_refused_for_several(pair, capsys):
    for flag in (["--data", "x"], ["--samples", "3"], ["--batch", "2"], ["--device", "cpu"]):
        assert main(["report", *map(str, pair), *flag]) == 78
        assert f"{flag[0]} is of a single pretrained run" in capsys.readouterr().err
    assert not (pair[0].parent / "comparison.html").exists()


def test_a_fine_tuned_run_alone_has_a_page_with_all_of_its_settings(tmp_path, capsys):
    run = write_run(tmp_path / "mine", task="vqa")
    assert main(["report", str(run)]) == 0
    assert f"report in {run / 'report.html'}" in capsys.readouterr().out
    shown, raw = text_of(run / "report.html"), (run / "report.html").read_text()
    assert "A run of fine-tuning (vqa), from its own log" in shown
    assert '"betas": [ 0.9, 0.98 ]' in shown and "torch 2.13.0" in shown
    assert "samples a second 64.0" in shown and raw.count("<polyline") >= 3
    assert "side by side" not in shown and "Settings that differ" not in shown
    assert "secret-host" not in raw
    assert main(["report", str(run), "--samples", "3"]) == 78
    assert "a fine-tuned run is shown by what was logged" in capsys.readouterr().err
    (run / "metrics.jsonl").unlink()
    assert main(["report", str(run)]) == 66
    assert "nothing to show: its metrics.jsonl" in capsys.readouterr().err


def test_the_page_goes_where_it_is_told(pair, tmp_path, capsys):
    assert main(["report", *map(str, pair), "--out", str(tmp_path / "mine.html")]) == 0
    assert (tmp_path / "mine.html").is_file()
    assert main(["report", *map(str, pair), "--out", str(tmp_path / "no/such/mine.html")]) == 73
