"""`vlbeit bench growth`: the fit finds a bend, and the points are the steps that it says."""

import json

import pytest
import torch

from vlbeit.cli import main
from vlbeit.config import ModelConfig
from vlbeit.errors import ConfigError
from vlbeit.train import bench_growth
from vlbeit.train.bench_growth import AXES, WORST, Fit, draw_growth, measure_growth, point_config
from vlbeit.train.bench_step import build_step, needed_flops

SMALL = ModelConfig(
    width=64, layers=2, heads=1, ffn=128, image_size=(32, 32), vocab=200, codes=50,
    text_positions=32, drop_path=0.0,
)  # fmt: skip


def test_points_on_a_line_are_straight_and_a_square_is_not():
    flops = [1.0, 2.0, 3.0, 4.0, 5.0]
    line = Fit.of(flops, [0.5 + 2 * x for x in flops])
    assert (line.fixed, line.slope) == (pytest.approx(0.5), pytest.approx(2))
    assert line.worst == pytest.approx(0, abs=1e-9)
    assert Fit.of(flops, [x * x for x in flops]).worst > WORST
    off = [0.5 + 2 * x for x in flops]
    off[2] *= 1.3
    assert Fit.of(flops, off).worst > WORST
    with pytest.raises(ValueError, match="2 points"):
        Fit.of([1.0, 2.0], [1.0, 2.0])


@pytest.mark.parametrize("axis", AXES)
def test_a_point_varies_its_axis_and_costs_more_than_the_one_before(axis):
    costs = []
    for value in {"width": (64, 128, 192), "image size": (32, 64, 96)}.get(axis, (2, 3, 4)):
        bench = point_config(axis, value, "fp32", SMALL)
        step, model = build_step(bench)
        costs.append(needed_flops(bench.run, step.batches))
        found = {
            "depth": len(model.backbone.blocks),
            "width": model.config.width,
            "image size": step.batches[0].pixels.shape[-1],
            "samples": len(step.batches[0]),
        }
        assert found[axis] == value
    assert costs == sorted(costs) and len(set(costs)) == 3


def test_the_report_holds_every_point_and_is_drawn(tmp_path, monkeypatch, capsys):
    axes = {"samples": (1, 2, 3)}
    report = measure_growth(axes, 1, "fp32", SMALL)
    found = report["axes"]["samples"]
    assert found["values"] == [1, 2, 3] and all(s > 0 for s in found["cpu_seconds"])
    pytest.importorskip("matplotlib")
    draw_growth(report, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(bench_growth, "AXES", axes)
    monkeypatch.setattr(bench_growth, "measure_growth", lambda *_: report)
    threads = torch.get_num_threads()
    assert main(["bench", "growth", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["axes"] == report["axes"]
    assert main(["bench", "growth"]) == 0
    assert "off by" in capsys.readouterr().out
    assert torch.get_num_threads() == threads
    with pytest.raises(ConfigError, match="--repeats must be at least 1, found 0"):
        bench_growth.main(["--repeats", "0"])
    assert main(["bench", "growth", "--plot", str(tmp_path / "none" / "growth.png")]) == 73
