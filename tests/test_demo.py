"""The demo on a tiny budget: every phase, the figures it promises, and going on where it was."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from vlbeit.checkpoint import list_checkpoints
from vlbeit.cli import main
from vlbeit.config import LogConfig, RetrievalConfig, RuntimeConfig, TokenizersConfig
from vlbeit.data.scenes import draw_scene
from vlbeit.errors import ConfigError
from vlbeit.recipes import tiny
from vlbeit.serve.gallery import open_gallery
from vlbeit.serve.served_runs import open_runs
from vlbeit.tasks.retrieval_index import Index
from vlbeit.train.demo import (
    EVALUATIONS,
    PHASES,
    PhaseClock,
    evaluation_steps,
    page_command,
    run_demo,
)
from vlbeit.train.demo_tasks import DRAWN_TASKS, parse_tasks, task_configs, task_metrics

COUNT = 60
VQA_STEPS = 40


def quick_config(max_steps=6):
    recipe = tiny()
    visual = replace(
        recipe.tokenizers.train_visual,
        codes=16, width=24, layers=1, heads=2, ffn=48, decoder_layers=1, batch=16, total_steps=12,
        warmup_steps=2, kmeans_iterations=2,
    )  # fmt: skip
    return replace(
        recipe,
        max_steps=max_steps,
        save_every=3,
        model=replace(recipe.model, width=32, layers=2, heads=2, ffn=64, codes=16),
        batch=replace(recipe.batch, images=4, texts=4, pairs=8, micro=8),
        tokenizers=TokenizersConfig(train_text=recipe.tokenizers.train_text, train_visual=visual),
        log=LogConfig(eval_samples=16),
        runtime=RuntimeConfig(threads=1),
    )


def quick_tasks(*names):
    """A few steps of each; VQA has enough of them to be killed on the way."""

    def quick(config):
        if config.task == "retrieval":
            config = replace(config, retrieval=RetrievalConfig(rerank=2))
        return replace(
            config,
            max_steps=VQA_STEPS if config.task == "vqa" else 3,
            save_every=2,
            batch=replace(config.batch, size=8, micro=8),
            log=LogConfig(eval_every=0, eval_samples=16),
        )

    return [quick(config) for config in task_configs(names)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    run_demo(folder, quick_config(), COUNT, quick_tasks(*DRAWN_TASKS))
    return folder


def metrics(folder: Path):
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.slow
def test_the_figures_have_their_promised_names_and_are_shares(demo):
    found = metrics(demo)["pretrain"]
    words = found["mvlm_word_accuracy"]
    for value in (
        words["sighted"], words["blind"], words["prior"],
        found["mim_accuracy"], found["mim_top_code_share"],
    ):  # fmt: skip
        assert isinstance(value, float) and 0 <= value <= 1
    for name in ("sighted", "blind"):
        low, high = words["intervals"][name]
        assert low <= words[name] <= high
    assert words["kinds_counted"] == ["colour", "shape", "size", "count", "place"]
    by_kind = found["mvlm_word_accuracy_by_kind"]
    assert set(words["kinds_counted"]) < set(by_kind)
    assert words["count"] == sum(by_kind[kind]["count"] for kind in words["kinds_counted"])
    assert found["steps"] == 6
    assert found["samples"]["pair"] == found["samples"]["image"] == 200


@pytest.mark.slow
def test_losses_are_told_at_the_start_and_at_the_end_and_every_phase_has_its_time(demo):
    found = metrics(demo)
    loss = found["pretrain"]["held_out_loss"]
    assert set(loss["start"]) == set(loss["end"]) == {"mlm", "mim", "mvlm_text", "mvlm_image"}
    assert loss["start"] != loss["end"]
    phases = set(PHASES)
    assert {"prepare", "pretrain", "finetune_vqa", "finetune_retrieval", "report"} <= phases
    assert set(found["seconds"]) == phases | {"together"}
    assert found["seconds"]["together"] == pytest.approx(
        sum(found["seconds"][phase] for phase in phases)
    )
    assert len(found["config_digest"]) == 64
    assert "torch" in found["versions"] and "vlbeit" in found["versions"]


@pytest.mark.slow
def test_the_folder_holds_the_page_the_run_and_both_tokenizers(demo):
    assert (demo / "report.html").stat().st_size > 20_000
    assert (demo / "scenes" / "tokenizer.json").is_file()
    assert (demo / "pretrain" / "tokenizers" / "visual" / "model.safetensors").is_file()
    assert (demo / "pretrain" / "checkpoints" / "step-0000006" / "manifest.json").is_file()


@pytest.mark.slow
def test_the_last_words_are_the_command_that_opens_the_page(demo):
    said = (demo / "log.txt").read_text().rstrip().splitlines()[-1]
    assert said.endswith(f" page:    {page_command(demo)}")


@pytest.mark.slow
def test_the_page_of_a_demo_searches_its_held_out_scenes_wherever_the_folder_is(demo, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(demo, moved)
    held_out = open_gallery("image", demo / "scenes").ids
    said = []
    for folder in (demo, moved):
        served = open_runs([str(folder)], log=said.append)
        assert served.index.ids == held_out and len(held_out) > 5
        assert served.gallery.place == folder / "scenes"
        assert served.thumbnail(0).startswith(b"\xff\xd8")
        found = served.answering["search"].search(served.index, text="a red square", top=3)
        assert {entry.id for entry in found} <= set(held_out)
    assert not [line for line in said if "left out" in line]

    index = replace(Index.load(moved / "index"), model="0" * 64)
    shutil.rmtree(moved / "index")
    index.save(moved / "index")
    assert "search" not in open_runs([str(moved)], log=said.append).answering
    assert "moved/index" in said[-1] and "not served (000000000000): left out" in said[-1]


@pytest.mark.slow
def test_every_task_has_its_promised_figure_beside_its_baseline(demo):
    found = metrics(demo)["tasks"]
    assert {name: [key for key in entry if key in PROMISED] for name, entry in found.items()} == {
        "vqa": ["accuracy"],
        "retrieval": ["tr_r1", "ir_r1"],
        "nlvr2": ["accuracy"],
        "classification": ["top1"],
        "segmentation": ["miou"],
    }
    for name, entry in found.items():
        for key in [*(key for key in entry if key in PROMISED), "baseline"]:
            low, high = entry["intervals"][key]
            assert 0 <= low <= entry[key] <= high <= 1, (name, key)
        assert entry["count"] > 0 and entry["steps"] == (VQA_STEPS if name == "vqa" else 3)
    assert start_of(demo, "statements").endswith("tasks/vqa/checkpoints/step-0000040")
    assert start_of(demo, "retrieval").endswith("pretrain/checkpoints/step-0000006")
    assert found["retrieval"]["baseline"] == pytest.approx(1 / 500)
    assert found["retrieval"]["tr_r1"] == found["retrieval"]["figures"]["reranked_text@1"]["value"]


PROMISED = ("accuracy", "tr_r1", "ir_r1", "top1", "miou")


@pytest.mark.slow
def test_the_page_shows_every_task_with_examples(demo):
    page = (demo / "report.html").read_text()
    for words in ("VQA, accuracy", "image R@1", "mean IoU", "top 1", "statements, accuracy"):
        assert words in page
    assert page.count('class="asked"') >= 6 + 4 + 6  # questions, captions, statements
    assert page.count('class="strip three"') == 6 and 'class="swatches"' in page


@pytest.mark.slow
def test_what_an_earlier_command_finished_stays_and_is_not_trained_again(demo):
    def trained():
        found = sorted((demo / "tasks").rglob("*.safetensors"))
        return {path: path.stat().st_mtime_ns for path in found}

    before = trained()
    run_demo(demo, quick_config(), COUNT, quick_tasks("vqa"))
    assert trained() == before
    assert set(metrics(demo)["tasks"]) == {
        "vqa", "retrieval", "nlvr2", "classification", "segmentation"
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.fault
def test_a_demo_killed_within_a_task_goes_on_there_even_after_it_was_moved(demo, tmp_path):
    begun, moved = tmp_path / "begun", tmp_path / "moved"
    shutil.copytree(demo, begun, ignore=shutil.ignore_patterns("tasks"))
    code = (
        "import sys; from pathlib import Path; from test_demo import *\n"
        "run_demo(Path(sys.argv[1]), quick_config(), COUNT, quick_tasks('vqa', 'retrieval'))"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    job = subprocess.Popen(
        [sys.executable, "-c", code, str(begun)],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
    )
    first = begun / "tasks" / "vqa" / "checkpoints" / "step-0000002"
    while not first.exists() and job.poll() is None:
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    step = list_checkpoints(begun / "tasks" / "vqa")[-1][0]
    assert 2 <= step < VQA_STEPS
    begun.rename(moved)

    run_demo(moved, quick_config(), COUNT, quick_tasks("vqa", "retrieval"))
    assert f"going on from {moved}/tasks/vqa" in (moved / "tasks" / "vqa" / "log.txt").read_text()
    for task in ("vqa", "retrieval"):
        (_, own), (_, uninterrupted) = (
            list_checkpoints(folder / "tasks" / task)[-1] for folder in (moved, demo)
        )
        weights = "model.safetensors"
        assert (own / weights).read_bytes() == (uninterrupted / weights).read_bytes(), task
    assert metrics(moved)["tasks"]["vqa"] == metrics(demo)["tasks"]["vqa"]


@pytest.mark.slow
def test_a_demo_told_to_go_further_trains_only_the_missing_steps(demo):
    scenes = (demo / "scenes" / "dataset.json").stat().st_mtime_ns
    visual = (demo / "pretrain/tokenizers/visual/model.safetensors").stat().st_mtime_ns
    rows = (demo / "pretrain" / "metrics.jsonl").read_text()
    run_demo(demo, quick_config(max_steps=8), COUNT)
    assert (demo / "scenes" / "dataset.json").stat().st_mtime_ns == scenes
    assert (demo / "pretrain/tokenizers/visual/model.safetensors").stat().st_mtime_ns == visual
    assert (demo / "pretrain" / "metrics.jsonl").read_text().startswith(rows)
    assert metrics(demo)["pretrain"]["steps"] == 8
    assert metrics(demo)["tasks"] == {}  # they started from step 6

    run_demo(demo, quick_config(max_steps=8), COUNT, quick_tasks("segmentation"))
    assert set(metrics(demo)["tasks"]) == {"segmentation"}
    assert (demo / "tasks" / "segmentation-from-step-0000006" / "metrics.jsonl").is_file()
    assert start_of(demo, "segmentation").endswith("pretrain/checkpoints/step-0000008")

    run_demo(demo, quick_config(max_steps=8), COUNT, quick_tasks("vqa"))
    # VQA ends at the same step again, so its name alone would not tell that statements are old.
    assert (demo / "tasks" / "statements-from-step-0000006").is_dir()
    assert set(metrics(demo)["tasks"]) == {"segmentation", "vqa"}


def start_of(demo: Path, task: str) -> str:
    return json.loads((demo / "tasks" / task / "config.json").read_text())["start"]


@pytest.mark.slow
def test_scenes_of_another_demo_are_not_taken_for_ours(demo):
    with pytest.raises(ConfigError, match="count was 60 and is 61"):
        run_demo(demo, quick_config(), COUNT + 1)
    with pytest.raises(ConfigError, match="seed was 0 and is 1"):
        run_demo(demo, replace(quick_config(), seed=1), COUNT)


@pytest.mark.slow
def test_eval_predict_and_report_answer_for_the_finished_run(demo, tmp_path, capsys):
    run = demo / "pretrain"
    assert main(["eval", str(run), "--json", "--samples", "32", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == {"image": 32, "text": 32, "pair": 32}
    assert main(["eval", str(run), "--samples", "32"]) == 0
    assert "with its own image" in " ".join(capsys.readouterr().out.split())

    draw_scene(0, "val", 0).image.save(tmp_path / "scene.png")
    out = tmp_path / "filled.png"
    words = ["predict", str(run), "--image", str(tmp_path / "scene.png"), "--json"]
    assert main([*words, "--text", "one x [MASK] circle", "--hide", "0.4", "--out", str(out)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert "[MASK]" not in answer["text"] and len(answer["words"][0]) == 5
    assert answer["patches"]["hidden"] == 10
    with Image.open(out) as sheet:
        assert sheet.width > 5 * 40
    assert main(["predict", str(run), "--text", "a [MASK] ring"]) == 0
    assert main(words) == main(["predict", str(run)]) == 78  # nothing is hidden; nothing is given
    (tmp_path / "no.png").write_bytes(b"<html>")
    assert main([*words[:3], str(tmp_path / "no.png"), "--hide", "0.4"]) == 66
    assert "no.png" in capsys.readouterr().err

    checkpoint = next((run / "checkpoints").glob("step-*"))
    page = tmp_path / "page.html"
    assert main(["report", str(checkpoint), "--out", str(page), "--samples", "16"]) == 0
    assert "<polyline" in page.read_text()  # the curves of the run that the checkpoint is from


def test_the_command_that_opens_the_page_can_be_run_where_it_is_shown(tmp_path, monkeypatch):
    folder = tmp_path / "my demo"
    elsewhere = page_command(folder)
    for place in ("", str(Path(sys.executable).parent)):
        monkeypatch.setenv("PATH", place)
        *command, given = shlex.split(page_command(folder))
        assert given == str(folder) and command[-1] == "serve"
        done = subprocess.run([*command, "--help"], capture_output=True, text=True)
        assert done.returncode == 0 and "vlbeit serve RUN" in done.stdout, done.stderr
    assert page_command(folder).startswith("vlbeit serve ") or not (
        Path(sys.executable).with_name("vlbeit").exists()
    )
    assert elsewhere.endswith(f"serve '{folder}'")


# --- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--tasks", "vqa,retreival"], "did you mean retrieval?"),
        (["--tasks", "entailment"], "no task of the drawn world"),
        (["--tasks", "none,vqa"], "none alone"),
        (["--tasks", ""], "no task"),
        (["--tasks", "vqa", "--all-tasks"], "not allowed with"),
    ],
)
def test_a_wrong_choice_of_tasks_is_refused_before_anything_starts(tmp_path, capsys, words, named):
    assert main(["demo", "--run-dir", str(tmp_path / "demo"), *words]) == 78
    assert named in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ([], ["vqa", "retrieval"]),
        (["--tasks", "segmentation,vqa"], ["vqa", "segmentation"]),
        (["--tasks", "none"], []),
        (["--all-tasks"], list(DRAWN_TASKS)),
    ],
)
def test_the_command_asks_for_these_tasks_and_stops_them_early_too(
    tmp_path, monkeypatch, words, names
):
    asked = []
    monkeypatch.setattr("vlbeit.train.demo.run_demo", lambda *given: asked.extend(given))
    assert main(["demo", "--run-dir", str(tmp_path), "--max-steps", "7", *words]) == 0
    _, config, _, tasks = asked
    assert [task.task for task in tasks] == names
    assert all(run.max_steps == 7 for run in (config, *tasks))


def test_tasks_are_in_the_order_of_the_demo_and_named_once():
    assert parse_tasks(" retrieval, vqa,vqa ") == ("vqa", "retrieval")


def test_a_task_that_goes_on_from_another_brings_it_along():
    assert parse_tasks("statements,retrieval") == ("vqa", "retrieval", "statements")


def test_text_retrieval_and_image_retrieval_are_told_apart():
    def figure(value):
        return {
            "value": value, "low": value, "high": value, "samples": 500,
            "baseline": {"value": 0.002, "low": 0.002, "high": 0.002},
            "gain": {"value": value - 0.002, "low": value, "high": value},
        }  # fmt: skip

    evaluation = {
        "task": "retrieval", "step": 600,
        "figures": {"text@1": figure(0.7), "image@1": figure(0.6)},
    }  # fmt: skip
    name, found = task_metrics(evaluation)
    # Which text belongs to this image: text retrieval (TR).
    assert (name, found["tr_r1"], found["ir_r1"]) == ("retrieval", 0.7, 0.6)
    evaluation["figures"] |= {"reranked_text@1": figure(0.9), "reranked_image@1": figure(0.8)}
    _, found = task_metrics(evaluation)
    assert (found["tr_r1"], found["ir_r1"], found["baseline"]) == (0.9, 0.8, 0.002)


def test_a_phase_says_what_is_still_to_come(tmp_path):
    said = []
    clock = PhaseClock(
        tmp_path / "phases.json", {"report", "pretrain", "finetune_vqa"}, said.append
    )
    for name in ("pretrain", "report"):
        with clock.phase(name):
            pass
    assert said == [
        "--- pretrain   (then: fine-tune: questions (VQA); write the report)",
        "--- write the report",
    ]


@pytest.mark.parametrize("steps", [1, 2, 20, 499, 600, 3000, 3001, 4096])
def test_evaluations_are_few_and_the_last_one_ends_the_run(steps):
    every = evaluation_steps(steps)
    assert steps % every == 0 and steps // every <= EVALUATIONS


def test_an_interrupted_phase_keeps_its_time(tmp_path):
    clock = PhaseClock(tmp_path / "phases.json")
    with pytest.raises(KeyboardInterrupt), clock.phase("pretrain"):
        raise KeyboardInterrupt
    before = clock.seconds["pretrain"]
    again = PhaseClock(tmp_path / "phases.json")
    with again.phase("pretrain"):
        pass
    assert again.seconds["pretrain"] >= before
