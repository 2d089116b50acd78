"""What a forward pass is said to hold is what it holds; `base` trains in 12 GB."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vlbeit
from tiny_models import masked_batch, tiny_config
from vlbeit.config import ObjectiveConfig
from vlbeit.nn.model import VLBeit
from vlbeit.objectives import score_batch
from vlbeit.train import memory
from vlbeit.train.memory import ActivationMemory, held_bytes, memory_mb

CPU = torch.device("cpu")
counted = pytest.mark.skipif(held_bytes(CPU) is None, reason="this C library does not count")
MB = 2**20


def held_by(layers: int, *, grad: bool) -> float:
    """MiB that a chain of tanh on 4 MiB holds; each saves its answer for the backward pass."""
    held = ActivationMemory(CPU)
    first = x = torch.zeros(MB, requires_grad=grad)
    with held.forward("chain"):
        for _ in range(layers):
            x = x.tanh()
    assert first.sum() == 0  # kept to the end, so that its memory is not another's
    return held.mb()["chain"]


@counted
def test_what_is_saved_for_the_backward_pass_is_what_is_counted():
    assert held_by(8, grad=True) == pytest.approx(8 * 4, abs=0.5)
    assert held_by(16, grad=True) == pytest.approx(16 * 4, abs=0.5)
    # Without a backward pass to come only the answer is left.
    assert held_by(8, grad=False) == pytest.approx(4, abs=0.5)


@counted
def test_tensors_that_are_freed_or_were_there_before_are_not_counted():
    kept = [torch.zeros(MB) for _ in range(8)]
    held = ActivationMemory(CPU)
    with held.forward("none"):
        torch.zeros(4 * MB)
    assert held.mb()["none"] == pytest.approx(0, abs=0.5)
    assert len(kept) == 8


@counted
def test_a_stream_keeps_its_largest_micro_batch():
    held = ActivationMemory(CPU)
    for count in (2, 5, 1):
        with held.forward("image"):
            made = torch.zeros(count * MB)
        del made
    assert held.mb() == {"image": pytest.approx(20, abs=0.5)}


@counted
def test_activation_checkpointing_holds_less():
    config = tiny_config(width=128, ffn=512, layers=6)
    found = {}
    for checkpointed in (False, True):
        model = VLBeit(config)
        model.backbone.checkpoint_activations = checkpointed
        batch = masked_batch("image", 32, config=config)
        held = ActivationMemory(CPU)
        with held.forward("image"):
            loss = sum(s.loss_sum for s in score_batch(model, batch, ObjectiveConfig()).values())
        loss.backward()
        found[checkpointed] = held.mb()["image"]
    assert found[True] < 0.6 * found[False], found


def test_where_nothing_counts_no_number_is_made_up(monkeypatch):
    monkeypatch.setattr(memory, "_mallinfo2", lambda: None)
    held = ActivationMemory(CPU)
    with held.forward("image"):
        torch.zeros(MB)
    assert held.mb() == {}


def test_the_peak_of_the_process_is_in_mib():
    before = memory_mb(CPU)
    assert len(bytearray(300 * MB)) and memory_mb(CPU) >= 300
    assert memory_mb(CPU) < before + 400


def available_gb() -> float:
    rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(rows["MemAvailable"].split()[0]) / 2**20


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform != "linux" or available_gb() < 12, reason="needs 12 GB of memory")
def test_base_trains_8_images_8_texts_and_8_pairs_at_224_px_in_12_gb():
    words = "bench step --recipe base --samples 8 --steps 1 --threads 1 --json".split()
    done = subprocess.run(
        [sys.executable, "-m", "vlbeit", *words],
        env={**os.environ, "PYTHONPATH": str(Path(vlbeit.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads(done.stdout)
    # Weights, gradients and moments alone are 16 bytes a parameter: less would not be believed.
    needed = 16 * report["parameters"] / MB
    assert needed < report["memory_mb"] < 12e9 / MB, report
    assert report["samples"] == {"image": 8, "text": 8, "pair": 8}
    assert sum(report["activation_mb"].values()) > 500, report
