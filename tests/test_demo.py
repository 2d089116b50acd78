"""The demo on a tiny budget: every phase, the figures it promises, and going on where it was."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from vlbeit.cli import main
from vlbeit.config import LogConfig, RuntimeConfig, TokenizersConfig
from vlbeit.data.scenes import draw_scene
from vlbeit.errors import ConfigError
from vlbeit.recipes import tiny
from vlbeit.train.demo import EVALUATIONS, PhaseClock, evaluation_steps, run_demo

COUNT = 60


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


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    run_demo(folder, quick_config(), COUNT)
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
    phases = {"prepare", "visual_tokenizer", "pretrain", "evaluate", "report"}
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
def test_a_demo_told_to_go_further_trains_only_the_missing_steps(demo):
    scenes = (demo / "scenes" / "dataset.json").stat().st_mtime_ns
    visual = (demo / "pretrain/tokenizers/visual/model.safetensors").stat().st_mtime_ns
    rows = (demo / "pretrain" / "metrics.jsonl").read_text()
    run_demo(demo, quick_config(max_steps=8), COUNT)
    assert (demo / "scenes" / "dataset.json").stat().st_mtime_ns == scenes
    assert (demo / "pretrain/tokenizers/visual/model.safetensors").stat().st_mtime_ns == visual
    assert (demo / "pretrain" / "metrics.jsonl").read_text().startswith(rows)
    assert metrics(demo)["pretrain"]["steps"] == 8


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
