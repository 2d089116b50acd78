"""The benchmark of the server counts what the server did."""

import argparse
import asyncio
import json

import pytest

from serving import running, served_of_all_tasks
from toy_tasks import write_tasks
from vlbeit.cli import main
from vlbeit.errors import ConfigError, InputError
from vlbeit.serve import bench_serve
from vlbeit.serve.bench_serve import Load, chosen_mode, load_of, requests, speedup
from vlbeit.serve.modes import MODES


def test_a_load_counts_what_the_server_answered(tmp_path):
    served = served_of_all_tasks(write_tasks(tmp_path / "data"), tmp_path / "world")
    with running(served, batch=4) as server:
        for mode in ("answer", "encode_text", "compare"):
            sent = requests(MODES[mode], (32, 32))
            assert len(set(sent)) == (4 if mode == "encode_text" else len(sent))
            load = asyncio.run(load_of(server.port, mode, sent, 6, 4, 0.4))
            batches, asked = server.batches(mode)
            assert len(load.latencies) == asked > 6 and load.batches == batches
            row = load.to_dict()
            assert row["refused"] == 0 and 1 <= row["mean_batch"] <= 4
            assert 0 < row["p50"] <= row["p99"] <= load.seconds
            assert row["per_second"] == pytest.approx(asked / load.seconds)
        bad = [one.replace(b'{"left"', b'["left"') for one in sent]  # no JSON any more
        refused = asyncio.run(load_of(server.port, "compare", bad, 2, 4, 0.3))
        assert refused.refused == len(refused.latencies) > 2 and refused.per_second == 0


def load(clients: int, batch: int, answered: int, seconds: float = 2.0, refused: int = 0) -> Load:
    latencies = (0.1,) * (answered + refused)
    return Load(clients, batch, seconds, latencies, refused, answered / batch, 1.0)


def test_rounds_add_up_and_refused_requests_are_no_throughput():
    both = load(8, 4, 40) + load(8, 4, 20, seconds=4.0, refused=6)
    assert both.per_second == pytest.approx(10) and len(both.latencies) == 66
    assert both.to_dict()["refused"] == 6 and both.cpu_seconds == 2.0
    loads = [load(8, 32, 90), load(8, 1, 30), load(1, 32, 10), load(1, 1, 10)]
    assert speedup(loads, 8) == pytest.approx(3) and speedup(loads, 1) == pytest.approx(1)
    with pytest.raises(AssertionError):
        load(8, 4, 40) + load(8, 1, 40)


def test_a_mode_is_chosen_among_those_that_are_there():
    info = {"modes": {mode: {"available": mode in ("match", "fill_words")} for mode in MODES}}
    assert chosen_mode(None, info) == "match" and chosen_mode("match", info) == "match"
    with pytest.raises(ConfigError, match="--mode answer: the runs have fill_words, match"):
        chosen_mode("answer", info)


@pytest.mark.parametrize("words", [["--clients", "0"], ["--batch", "1"], ["--rounds", "0"]])
def test_settings_that_measure_nothing_are_refused(words, capsys):
    assert main(["bench", "serve", "no-run", *words]) == ConfigError.exit_code
    assert words[0] in capsys.readouterr().err


def test_the_table_and_the_json_say_the_same(monkeypatch, capsys):
    loads = [load(8, 32, 90), load(8, 1, 30)]
    monkeypatch.setattr(bench_serve, "measure", lambda args: ("answer", loads))
    assert main(["bench", "serve", "run", "--clients", "8"]) == 0
    said = capsys.readouterr().out
    assert "8 clients: micro-batches give 3.00 times" in said and "45.0" in said
    assert main(["bench", "serve", "run", "--clients", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["speedup"] == {"8": 3.0} and found["loads"][0]["per_second"] == 45.0


@pytest.mark.slow
def test_a_server_that_does_not_start_is_told(tmp_path):
    args = argparse.Namespace(
        runs=[str(tmp_path)], batch=4, batch_window=0.0, deadline=9.0, threads=1, device="cpu"
    )
    with pytest.raises(InputError, match="no checkpoint here"):
        bench_serve.measure(args)
