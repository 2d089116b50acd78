"""`vlbeit bench plan`: the same numbers as the step's own count, and as published arithmetic."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tiny_models import tiny_config
from vlbeit.cli import main
from vlbeit.config import BatchConfig, ObjectiveConfig, PretrainConfig
from vlbeit.errors import ConfigError, InputError
from vlbeit.nn.flops import training_flops
from vlbeit.nn.model import VLBeit
from vlbeit.objectives import count_targets, views
from vlbeit.recipes import PRETRAIN
from vlbeit.train.bench_plan import (
    UPDATE_BYTES,
    all_reduce_bytes,
    num_parameters,
    parse_plan,
    plan,
    step_work,
)
from vlbeit.train.bench_step import random_batch
from vlbeit.types import STREAMS

EIGHT_H200 = (
    "--recipe base --gpus 8 --objective.mvlm joint --model.vocab 30522 "
    "--input.pair-text-length 40 --tokenizers.codes stored"
).split()
"""The step of the arithmetic that was published for this project before there was code: 2048 images
+ 2048 texts of 196 tokens + 2048 pairs of 197 + 40, 30,522 words, one view a pair, codes stored. It
counts 78 hidden patches an image, the recipe has BEiT's 75: 0.2 % of the step."""


def planned(*words: str) -> dict[str, Any]:
    return plan(parse_plan([*EIGHT_H200, *words]))


def at(peak: float, share: float) -> tuple[str, ...]:
    return ("--peak-tflops", str(peak), "--share", str(share))


def step_report(**changes: Any) -> dict[str, Any]:
    return {
        "needed_tflop": 1.5, "step_seconds": 10.0, "precision": "bf16", "recipe": "base",
        "samples": {"image": 4, "text": 4, "pair": 4}, "machine": "A", "threads": 1, "torch": "2",
        **changes,
    }  # fmt: skip


def written(folder: Path, report: object) -> str:
    path = folder / "measured.json"
    path.write_text(json.dumps(report))
    return str(path)


# ------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize("mvlm", ["two_views", "joint"])
@pytest.mark.parametrize("recipe", ["tiny", "base"])
def test_the_work_of_a_step_is_what_the_step_counts_on_its_batches(recipe, mvlm):
    config = replace(PRETRAIN[recipe](), objective=ObjectiveConfig(mvlm=mvlm))
    config = replace(config, batch=BatchConfig(images=2, texts=3, pairs=1))
    counted = tokens = 0
    for stream, samples in zip(STREAMS, (2, 3, 1), strict=True):
        batch = random_batch(stream, samples, config)
        passes = views(config.objective) if stream == "pair" else 1
        targets = count_targets(batch, config.objective)
        counted += training_flops(config.model, batch, passes, targets)
        tokens += batch.tokens()
    work = step_work(config)
    assert work.flop == counted
    assert work.tokens == tokens
    assert work.images == 3
    longer = replace(config, input=replace(config.input, text_length=config.input.text_length - 1))
    assert step_work(longer).flop < counted


@pytest.mark.parametrize(
    ("peak", "share", "hours"),
    [(790, 1, 15.1), (790, 0.5, 30.2), (989, 0.5, 24.1), (790, 0.65, 23.2), (790, 0.8, 18.9)],
)
def test_480k_steps_on_eight_h200_take_the_published_hours(peak, share, hours):
    assert planned(*at(peak, share))["run"]["hours"] == pytest.approx(hours, rel=0.004)


def test_the_step_on_h200_is_the_published_one():
    whole, half = planned(*at(790, 1)), planned(*at(790, 0.5))
    assert whole["step"]["tflop"] == pytest.approx(716, rel=0.002)
    assert whole["step"]["tokens"] == 1_290_240
    assert whole["step"]["seconds"] == pytest.approx(0.113, rel=0.005)
    assert half["step"]["seconds"] == pytest.approx(0.227, rel=0.005)
    assert planned("--gpus", "1", *at(790, 1))["step"]["seconds"] == pytest.approx(0.907, rel=0.003)
    work = step_work(parse_plan([*EIGHT_H200, *at(790, 1)]).run)
    assert work.coding / 1e12 == pytest.approx(144, rel=0.002)
    ragged = planned(*at(790, 1), "--text-fill", "0.6", "--pair-text-fill", "0.6")
    assert ragged["step"]["tflop"] == pytest.approx(605, rel=0.005)
    assert whole["step"]["tflop"] / ragged["step"]["tflop"] == pytest.approx(1.18, rel=0.005)


@pytest.mark.parametrize(("rate", "cores"), [(639, 28), (328, 55), (219, 83)])
def test_images_to_decode_are_the_published_ones(rate, cores):
    data = planned(*at(790, 0.5), "--decode-rate", str(rate))["data"]
    assert data["images_per_second"] == pytest.approx(18_100, rel=0.002)
    assert data["cores_to_decode"] == pytest.approx(cores, abs=1)


def test_traffic_of_183_million_parameters_is_the_published_one():
    parameters = 183e6
    assert all_reduce_bytes(parameters, 8, 2) / 370e9 == pytest.approx(1.7e-3, rel=0.03)
    assert all_reduce_bytes(parameters, 8) / 370e9 == pytest.approx(3.5e-3, rel=0.02)
    assert all_reduce_bytes(parameters, 1) == 0
    assert parameters * UPDATE_BYTES / 4.3e12 == pytest.approx(1.2e-3, rel=0.01)


def test_parameters_are_those_of_the_model():
    config = PretrainConfig(recipe="t", model=tiny_config())
    assert num_parameters(config) == sum(p.numel() for p in VLBeit(config.model).parameters())


# ------------------------------------------------------------------------ rates and their sources


def test_a_measured_rate_gives_the_time_that_was_measured(tmp_path):
    """The plan of the very step that was measured, on one device, takes its seconds."""
    run = parse_plan(["--recipe", "tiny", *at(1, 1)]).run
    flop = step_work(run).flop / 1e12
    report = step_report(needed_tflop=flop, step_seconds=3.5, recipe="tiny")
    words = ["--recipe", "tiny", "--measured", written(tmp_path, report)]
    words += ["--tokenizers.codes", "stored"]
    found = plan(parse_plan(words))
    assert found["step"]["seconds"] == pytest.approx(3.5, rel=1e-3)
    # Two devices at 90 % each; and by CPU time where that is known.
    found = plan(parse_plan([*words, "--gpus", "2", "--scaling", "0.9"]))
    assert found["step"]["seconds"] == pytest.approx(3.5 / 1.8, rel=1e-3)
    written(tmp_path, {**report, "step_cpu_seconds": 3.0})
    assert plan(parse_plan(words))["step"]["seconds"] == pytest.approx(3.0, rel=1e-3)


def test_a_report_of_the_data_gives_the_decoding_rate_too(tmp_path):
    report = {"step": step_report(), "rates": {"images loaded": {"per_core": 250.0}}}
    asked = parse_plan(["--measured", written(tmp_path, report)])
    decode = asked.assumptions["decode"]
    assert decode.value == 250 and decode.source.startswith("measured")
    assert parse_plan(list(at(1, 1))).assumptions["decode"].source.startswith("assumed")


def test_measured_activations_are_scaled_to_the_micro_batch_of_a_device(tmp_path):
    report = step_report(activation_mb={"image": 400, "text": 400, "pair": 1000})
    words = ["--measured", written(tmp_path, report), "--batch.micro", "16"]
    memory = plan(parse_plan(words))["memory"]
    assert memory["activations_gb"] == pytest.approx(1000 / 4 * 16 * 2**20 / 1e9, abs=1e-3)
    # On 1,024 devices only two samples of a stream reach each.
    memory = plan(parse_plan([*words, "--gpus", "1024"]))["memory"]
    assert memory["activations_gb"] == pytest.approx(1000 / 4 * 2 * 2**20 / 1e9, abs=1e-3)


def test_cost_is_the_price_of_all_device_hours():
    run = planned(*at(790, 0.5), "--price", "3.5")["run"]
    assert run["cost"] == pytest.approx(3.5 * 8 * run["hours"], rel=1e-3)
    assert "cost" not in planned(*at(790, 0.5))["run"]


def test_every_assumption_is_printed_with_its_source(capsys):
    words = ["bench", "plan", *EIGHT_H200, *at(790, 0.5), "--text-fill", "0.6"]
    assert main([*words, "--json"]) == 0
    assumptions = json.loads(capsys.readouterr().out)["assumptions"]
    assert {one["source"].split(":")[0] for one in assumptions} == {"given", "assumed"}
    assert main(words) == 0
    text = capsys.readouterr().out
    for one in assumptions:
        assert f"{one['value']:g} {one['unit']} ({one['source']})" in text


# ------------------------------------------------------------------------ nonsense


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--gpus 0", "--gpus must be at least 1, found 0"),
        ("--gpus 8", "no rate"),
        ("--peak-tflops 790", "no rate"),
        ("--peak-tflops 790 --share 1.2", r"--share must be in \(0, 1\], found 1.2"),
        ("--peak-tflops -3 --share 1", "--peak-tflops must be a number above 0, found -3.0"),
        ("--peak-tflops nan --share 1", "--peak-tflops must be a number above 0, found nan"),
        ("--peak-tflops 790 --share 0.5 --text-fill 0", "--text-fill must be in"),
        ("--peak-tflops 790 --share 0.5 --price 0", "--price must be a number above 0"),
        ("--peak-tflops 790 --share 0.5 --modl.width 3", "modl.width"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_by_name(words, said):
    with pytest.raises(ConfigError, match=said):
        parse_plan(words.split())


def test_a_report_that_does_not_fit_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"nothing.json: cannot be read"):
        parse_plan(["--measured", str(tmp_path / "nothing.json")])
    for bad in ([], 3, {"step_seconds": 1}, {"step": {}}, {"step": 3}):
        with pytest.raises(InputError, match="measured.json: has no needed_tflop, "):
            parse_plan(["--measured", written(tmp_path, bad)])
    for bad in ({"needed_tflop": 0}, {"step_seconds": "x"}, {"step_seconds": float("nan")}):
        with pytest.raises(InputError, match=f"{next(iter(bad))} must be above 0, found"):
            parse_plan(["--measured", written(tmp_path, step_report(**bad))])
    (tmp_path / "measured.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        parse_plan(["--measured", str(tmp_path / "measured.json")])
    path = written(tmp_path, step_report(precision="fp32"))
    with pytest.raises(ConfigError, match="measured in fp32, the recipe runs in bf16"):
        parse_plan(["--measured", path])
    with pytest.raises(ConfigError, match="give one"):
        parse_plan(["--measured", written(tmp_path, step_report()), *at(790, 0.5)])
