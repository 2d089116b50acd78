"""`vlbeit bench step --find-micro`: what it picks follows from what it measured."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from vlbeit.cli import main
from vlbeit.errors import ConfigError
from vlbeit.train import bench_micro
from vlbeit.train.bench import parse
from vlbeit.train.bench_micro import find_micro


def bench(**changes):
    return replace(parse(["--recipe", "tiny", "--find-micro"], "vlbeit bench step"), **changes)


def measured(rates, monkeypatch, limit=None, error=torch.OutOfMemoryError, held=1.0):
    """Steps that reach these samples a second by micro-batch, and none above `limit`."""

    def measure(asked):
        micro = asked.run.batch.micro
        assert asked.run.batch.images == asked.run.batch.texts == asked.run.batch.pairs == micro
        if limit is not None and micro > limit:
            raise error("out of memory")
        return {
            "step_seconds": 3 * micro / rates[micro], "samples_per_second": rates[micro],
            "limit_share": 0.5, "activation_mb": {"pair": held * micro}, "memory_mb": 10,
        }  # fmt: skip

    monkeypatch.setattr(bench_micro, "measure_step", measure)


def test_the_smallest_within_2_per_cent_of_the_best_is_picked(monkeypatch):
    measured({1: 10, 2: 50, 4: 99, 8: 100, 16: 80, 32: 70}, monkeypatch)
    found = find_micro(bench())
    assert found["micro"] == 4
    assert [row["micro"] for row in found["tried"]] == [1, 2, 4, 8, 16]
    assert found["stopped"] == "two doublings in a row gained nothing"
    measured({1: 10, 2: 50, 4: 97, 8: 100, 16: 80, 32: 70}, monkeypatch)
    assert find_micro(bench())["micro"] == 8


def test_what_does_not_fit_ends_the_search(monkeypatch):
    rates = {2**i: 10.0 * 2**i for i in range(13)}
    measured(rates, monkeypatch, limit=8)
    found = find_micro(bench())
    assert found["micro"] == 8 and found["stopped"] == "16 do not fit the device"
    measured(rates, monkeypatch, limit=0)
    with pytest.raises(ConfigError, match="one sample of each stream does not fit"):
        find_micro(bench())
    measured(rates, monkeypatch)
    assert find_micro(bench(), largest=64)["micro"] == 64
    # On a CPU nothing says so before the process is killed: it is foreseen.
    monkeypatch.setattr(bench_micro, "available_bytes", lambda: 100 * 2**20)
    measured(rates, monkeypatch, held=10.0)
    found = find_micro(bench())
    assert found["micro"] == 8 and "16 would not fit" in found["stopped"]
    # Another fault is no lack of memory.
    measured(rates, monkeypatch, limit=2, error=ValueError)
    with pytest.raises(ValueError, match="out of memory"):
        find_micro(bench())


def test_the_share_of_a_stated_peak_is_given_only_where_one_is_stated(capsys, monkeypatch):
    monkeypatch.setattr("vlbeit.train.bench.find_micro", partial(find_micro, largest=1))
    words = ["bench", "step", "--recipe", "tiny", "--steps", "1", "--find-micro"]
    assert main([*words, "--json", "--peak-tflops", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    row = found["tried"][0]
    assert found["micro"] == 1 and 0 < row["mfu"] < 1
    assert main(words) == 0
    assert "pick 1" in capsys.readouterr().out
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("step --find-micro --samples 4", "leave out --samples"),
        ("data --find-micro", "is of `vlbeit bench step`"),
        ("step --peak-tflops 0", "--peak-tflops must be a number above 0"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(words, said, capsys):
    assert main(["bench", *words.split()]) == 78
    assert said in capsys.readouterr().err
    torch.use_deterministic_algorithms(False)
