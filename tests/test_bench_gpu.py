"""`vlbeit bench gpu`, on the CPU with `tiny`: all sections, a wrong result, and no time."""

import json

import pytest
import torch

from vlbeit.cli import main
from vlbeit.recipes import PRETRAIN
from vlbeit.train import bench_gpu
from vlbeit.train.bench_gpu import (
    LEVERS,
    GpuRun,
    copy_rate,
    correctness,
    describe_gpu,
    parse_gpu,
    run_all,
)

CPU = torch.device("cpu")
WORDS = ["bench", "gpu", "--device", "cpu", "--recipes", "tiny", "--largest", "1"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The machine is not measured for seconds; of the levers two are tried."""
    for module in ("bench_gpu", "bench_step"):
        monkeypatch.setattr(f"vlbeit.train.{module}.matrix_limit", lambda *_, **__: 1e11)
    monkeypatch.setattr(bench_gpu, "COPIED_BYTES", 1 << 20)
    kept = {name: LEVERS[name] for name in ("fp32", "one view a pair")}
    monkeypatch.setattr(bench_gpu, "LEVERS", kept)
    yield
    torch.use_deterministic_algorithms(False)


def test_every_section_is_run_and_written(tmp_path, capsys):
    assert main([*WORDS, "--out", str(tmp_path / "gpu"), "--peak-tflops", "2"]) == 0
    found = json.loads((tmp_path / "gpu" / "gpu.json").read_text())
    assert found["left_out"] == []
    assert {row["stream"] for row in found["correctness"]} == {"image", "text", "pair"}
    assert all(row["ok"] for row in found["correctness"])
    tried = found["sizes"]["tiny"]["tried"]
    assert [row["micro"] for row in tried] == [1] and 0 < tried[0]["mfu"] < 1
    assert [row["changed"] for row in found["levers"]] == ["nothing", "fp32", "one view a pair"]
    assert "aten::" in found["profile"]
    text = (tmp_path / "gpu" / "gpu.md").read_text()
    assert text.strip() in capsys.readouterr().out
    for section in ("Against float64", "tiny: micro-batches", "One thing changed", "Profile"):
        assert f"## {section}" in text


def test_a_device_that_computes_something_else_is_found(monkeypatch):
    def broken(model, runtime, device):
        with torch.no_grad():
            model.backbone.blocks[0].attention.q_bias.add_(0.3)

    asked = GpuRun(runs=(PRETRAIN["tiny"](),), device=CPU, seconds=60.0)
    assert all(row["ok"] for row in correctness(asked))
    monkeypatch.setattr(bench_gpu, "set_blocks", broken)
    rows = correctness(asked)
    assert not any(row["ok"] for row in rows if row["precision"] == "fp32")
    shown = describe_gpu(
        {"machine": "A", "threads": 1, "cores": 1, "load": 0, "torch": "2", "left_out": [],
         "seconds": 1.0, "correctness": rows}
    )  # fmt: skip
    assert "WRONG" in shown
    monkeypatch.setattr(bench_gpu, "run_all", lambda _: {"correctness": rows, "left_out": []})
    monkeypatch.setattr(bench_gpu, "describe_gpu", lambda _: "")
    assert main(WORDS) == 1


def test_what_the_time_does_not_reach_is_named():
    asked = GpuRun(runs=(PRETRAIN["tiny"](),), device=CPU, seconds=1e-9)
    found = run_all(asked, log=lambda _: None)
    assert found["left_out"] == ["limits", "correctness", "sizes", "levers", "profile"]
    assert "Left out, no time left: limits, correctness, sizes, levers, profile." in describe_gpu(
        found
    )


def test_a_copy_rate_counts_bytes_read_and_written():
    slow, fast = copy_rate(CPU, 1 << 16), copy_rate(CPU, 1 << 22)
    assert 1e7 < slow and 1e8 < fast < 1e13


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--device cpu --minutes 0", "--minutes must be a number above 0"),
        ("--device cpu --peak-tflops -1", "--peak-tflops must be a number above 0"),
        ("--device cpu --largest 0", "--largest must be at least 1, found 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(words, said, capsys):
    assert main(["bench", "gpu", *words.split()]) == 78
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_does_not_measure_the_cpu(capsys):
    assert main(["bench", "gpu"]) == 78
    assert "torch finds no GPU" in capsys.readouterr().err
    assert parse_gpu(["--device", "cpu"])[0].device == CPU
