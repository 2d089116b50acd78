"""Shards behind a web server that goes wrong in every way a network does.

What comes out must be what a local run has: the same records in the same order, nothing altered
used, nothing skipped without a name; or an end that names the shard and what went wrong.
"""

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("aiohttp", reason="the `remote` extra is not installed")

from faulty_server import FaultyServer
from toy_records import picture, toy_sources, toy_tokenizer
from toy_run import losses, rows, toy_codes, toy_run, write_dataset
from vlbeit import cli
from vlbeit.data import remote
from vlbeit.data.dataset import Dataset
from vlbeit.data.manifest import manifest_path
from vlbeit.data.records import BadSample, RecordSource, open_manifest, verify_shards, write_shards
from vlbeit.errors import ConfigError, InputError

pytestmark = [pytest.mark.fault]

RECORDS, PER_SHARD = 40, 10


def members(number: int) -> dict[str, bytes]:
    return {"png": picture(number), "json": json.dumps({"captions": [f"no {number}"]}).encode()}


@pytest.fixture
def far(tmp_path: Path) -> list[Path]:
    """Four shards of ten records, where the server finds them."""
    records = ((f"{i:04d}", members(i)) for i in range(RECORDS))
    return write_shards(records, tmp_path / "far", "x", PER_SHARD)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLBEIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VLBEIT_FETCH_SECONDS", "8")
    monkeypatch.setattr(remote, "_STALL", 0.5)
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 0.05)
    return tmp_path / "cache"


@pytest.fixture
def server(tmp_path: Path, far: list[Path], cache: Path) -> Iterator[FaultyServer]:
    with FaultyServer(tmp_path / "far") as running:
        yield running


def urls(server: FaultyServer, far: list[Path]) -> list[str]:
    return [f"{server.url}/{shard.name}" for shard in far]


def contents(source: RecordSource) -> list[tuple[str, dict[str, bytes]]]:
    found = []
    for index in range(len(source)):
        record = source.read(index)
        found.append((record.key, record.members))
    return found


def fetched_files(cache: Path) -> list[Path]:
    return [path for path in cache.glob("shards/*/*") if path.name != "lock"]


def test_remote_records_are_the_local_ones_and_each_shard_is_fetched_once(far, server, cache):
    source = RecordSource("x", urls(server, far))
    assert contents(source) == contents(RecordSource("x", [str(shard) for shard in far]))
    assert contents(source) == contents(RecordSource("x", urls(server, far)))
    assert set(server.asked.values()) == {1}


@pytest.mark.parametrize(
    "faults",
    [
        (500,),
        (503, 500, 429),
        ("reset",),
        ("cut",),
        ("short",),
        ("long",),
        ("flip",),
        ("stall",),
        ("trickle",),
        ("reset", 500, "flip", "short", "cut"),
    ],
    ids=lambda faults: "-".join(map(str, faults)),
)
def test_a_fault_that_passes_leaves_no_trace(far, server, cache, faults):
    server.fail(far[1].name, *faults)
    server.fail(far[2].name + ".manifest.json", *faults)
    source = RecordSource("x", urls(server, far))
    assert contents(source) == contents(RecordSource("x", [str(shard) for shard in far]))
    tries = 1 if faults == ("trickle",) else len(faults) + 1
    assert server.asked[far[1].name] == server.asked[far[2].name + ".manifest.json"] == tries
    assert sorted(path.name for path in fetched_files(cache)) == [shard.name for shard in far]


def test_without_the_comparison_an_altered_byte_would_be_used(far, server, cache, monkeypatch):
    """The negative check of the test above: what keeps a flipped byte out is the digest."""
    monkeypatch.setattr(remote._Fetch, "_compare", lambda self, part: ("", ""))
    server.fail(far[0].name, "flip")
    source = RecordSource("x", urls(server, far))
    with pytest.raises(BadSample, match="digest_mismatch"):
        contents(source)
    assert server.asked[far[0].name] == 1


def test_a_server_that_is_away_for_five_seconds_only_delays(far, server, cache):
    source = RecordSource("x", urls(server, far))
    server.away(5.0)
    began = time.monotonic()
    assert source.read(0).key == "0000"
    assert 4.0 < time.monotonic() - began < 10.0


@pytest.mark.parametrize("fault", [500, "reset", "stall"])
def test_a_fault_that_stays_ends_with_shard_tries_and_reason(
    far, server, cache, monkeypatch, fault
):
    monkeypatch.setenv("VLBEIT_FETCH_SECONDS", "1.5")
    source = RecordSource("x", urls(server, far))
    server.fail(far[3].name, *[fault] * 99)
    began = time.monotonic()
    with pytest.raises(InputError) as caught:
        source.read(35)
    told = str(caught.value)
    tries = server.asked[far[3].name]
    assert f"{server.url}/{far[3].name}" in told and f"{tries} tries" in told and tries > 1
    assert "run the same command again" in told and "VLBEIT_FETCH_SECONDS" in told
    assert time.monotonic() - began < 5.0
    assert fetched_files(cache) == []  # no part is left


@pytest.mark.parametrize(("fault", "words"), [(404, "no such shard"), (403, "refuses it")])
def test_what_another_try_cannot_change_is_not_tried_again(far, server, cache, fault, words):
    source = RecordSource("x", urls(server, far))
    server.fail(far[0].name, *[fault] * 9)
    with pytest.raises(InputError, match=words):
        source.read(0)
    assert server.asked[far[0].name] == 1


def test_a_shard_that_is_damaged_at_its_place_is_used_as_a_local_one_would_be(far, server, cache):
    """The same wrong bytes come twice: its good records are used, the other is named."""
    body = bytearray(far[1].read_bytes())
    hurt = open_manifest(str(far[1])).members(4)[0]
    body[hurt.offset + 5] ^= 1
    far[1].write_bytes(body)
    report = verify_shards(urls(server, far))
    assert report["used"] == RECORDS - 1 and report["skipped"] == 1
    ((bad,),) = [shard["bad"] for shard in report["shards"] if shard["bad"]]
    assert bad["reason"] == "digest_mismatch" and bad["member"].startswith("0014")
    assert server.asked[far[1].name] == 2


def test_a_foreign_shard_is_scanned_once_and_compared_with_that_from_then_on(far, server, cache):
    for shard in far:
        manifest_path(shard).unlink()
    source = RecordSource("x", urls(server, far))
    assert len(contents(source)) == RECORDS
    for path in fetched_files(cache):
        path.unlink()
    server.fail(far[0].name, "flip")
    assert len(contents(RecordSource("x", urls(server, far)))) == RECORDS
    assert server.asked[far[0].name] == 3  # the scan, the altered one, a good one
    assert server.asked[far[0].name + ".manifest.json"] == 1


# -- the cache -----------------------------------------------------------------------------------


def size_of(shards: list[Path]) -> int:
    return sum(shard.stat().st_size for shard in shards)


def test_the_cache_stays_below_its_limit_and_drops_the_least_recently_used(
    far, server, cache, monkeypatch
):
    limit = int(2.5 * size_of(far) / len(far))
    monkeypatch.setenv("VLBEIT_CACHE_GB", str(limit / 1e9))
    source = RecordSource("x", urls(server, far))
    for index in (0, 10, 1, 20, 2, 30):  # shards 0, 1, 0, 2, 0, 3: the first is always in use
        source.read(index)
        assert size_of(fetched_files(cache)) <= limit
    assert [server.asked[shard.name] for shard in far] == [1, 1, 1, 1]
    assert {path.name for path in fetched_files(cache)} == {far[0].name, far[3].name}
    source.read(10)
    assert server.asked[far[1].name] == 2


def test_a_shard_larger_than_the_whole_cache_is_refused_with_both_numbers(
    far, server, cache, monkeypatch
):
    monkeypatch.setenv("VLBEIT_CACHE_GB", "0.000001")
    with pytest.raises(InputError) as caught:
        RecordSource("x", urls(server, far)).read(0)
    told = str(caught.value)
    assert str(far[0].stat().st_size) in told and "allows 1000" in told
    assert server.asked[far[0].name] == 0


@pytest.mark.parametrize("given", ["0", "-1", "nan", "lots"])
def test_a_limit_that_is_no_positive_number_is_refused(cache, monkeypatch, given):
    monkeypatch.setenv("VLBEIT_CACHE_GB", given)
    with pytest.raises(ConfigError, match="VLBEIT_CACHE_GB"):
        remote.cache_limit()


def read_everything(shards: list[str], seed: int, told: "multiprocessing.Queue[object]") -> None:
    source = RecordSource("x", shards)
    order = np.random.default_rng(seed).permutation(len(source)).tolist()
    told.put(sorted(source.read(index).key for index in order))


def test_processes_share_the_cache_without_disturbing_each_other(far, server, cache, monkeypatch):
    """Four readers in four orders, room for two and a half shards of four, and faults besides."""
    limit = int(2.5 * size_of(far) / len(far))
    monkeypatch.setenv("VLBEIT_CACHE_GB", str(limit / 1e9))
    server.fail(far[0].name, "flip", "reset", 500)
    context = multiprocessing.get_context("fork")  # spawned ones would not have the patches
    told: multiprocessing.Queue[object] = context.Queue()
    shards = urls(server, far)
    readers = [
        context.Process(target=read_everything, args=(shards, seed, told)) for seed in range(4)
    ]
    for reader in readers:
        reader.start()
    largest, done = 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not done.is_set():
            sizes = []
            for path in fetched_files(cache):
                try:
                    sizes.append(path.stat().st_size)
                except FileNotFoundError:
                    continue
            largest = max(largest, sum(sizes))
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    keys = [told.get(timeout=60) for _ in readers]
    for reader in readers:
        reader.join(timeout=10)
    done.set()
    watcher.join()
    assert keys == [[f"{i:04d}" for i in range(RECORDS)]] * 4
    assert 0 < largest <= limit


def fetch_and_die(url: str) -> None:
    def die(size: int) -> None:
        os._exit(9)

    remote._sync = die  # type: ignore[assignment]
    RecordSource("x", [url]).read(0)


def test_what_a_killed_process_left_in_the_cache_is_removed_and_not_counted(far, server, cache):
    shards = urls(server, far)
    for shard in shards:
        remote.remote_manifest(shard)
    victim = multiprocessing.get_context("fork").Process(target=fetch_and_die, args=shards[:1])
    victim.start()
    victim.join(timeout=20)
    assert victim.exitcode == 9
    (part,) = fetched_files(cache)
    assert part.name.endswith(".part")
    RecordSource("x", shards).read(20)
    assert [path.name for path in fetched_files(cache)] == [far[2].name]
    assert RecordSource("x", shards).read(0).key == "0000"


def test_a_full_disk_is_told_as_such_and_not_tried_again(far, server, cache, monkeypatch):
    source = RecordSource("x", urls(server, far))

    def full(path: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remote.tempfile, "mkstemp", lambda *words: full(words))
    with pytest.raises(remote.SaveError, match=r"No space left.*VLBEIT_CACHE"):
        source.read(0)
    assert server.asked[far[0].name] == 0


# -- runs ----------------------------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[tuple]:
    """The toy world as a local folder, and as one that names the shards at a server."""
    local, far = tmp_path / "local", tmp_path / "published"
    for folder in (local, far):
        folder.mkdir()
        write_dataset(folder, toy_sources(folder))
    with FaultyServer(far) as server:
        near = tmp_path / "near"
        assert cli.main(["prepare", "remote", f"{server.url}/", "--out", str(near)]) == 0
        for folder in (local, near):
            toy_tokenizer().save(folder)
            toy_codes().save(folder / "visual")
        yield local, near, server


def test_a_run_on_remote_shards_is_the_local_run_whatever_goes_wrong_on_the_way(toy, tmp_path):
    local, near, server = toy
    wanted = toy_run(local, tmp_path / "wanted")
    names = [s.rpartition("/")[2] for x in Dataset.open(near).sources for s in x.shards]
    for name, faults in zip(names, [(500,), ("flip",), ("reset", 503), ("short",)], strict=False):
        server.fail(name, *faults)
    for workers in (0, 2):
        run = toy_run(near, tmp_path / f"far-{workers}", {"input.workers": workers})
        assert losses(run) == losses(wanted)
        assert rows(run, "ledger.jsonl") == rows(wanted, "ledger.jsonl")
        assert not (run / "skips.jsonl").exists() or rows(run, "skips.jsonl") == []


def test_a_run_that_ended_for_want_of_its_server_goes_on_where_it_was(toy, tmp_path, monkeypatch):
    local, near, server = toy
    wanted = toy_run(local, tmp_path / "wanted")
    run = toy_run(near, tmp_path / "far", {"max_steps": 5})
    for path in fetched_files(tmp_path / "cache"):
        path.unlink()
    monkeypatch.setenv("VLBEIT_FETCH_SECONDS", "0.5")
    for shard in server.folder.glob("*.tar"):
        server.fail(shard.name, *[503] * 99)
    with pytest.raises(InputError, match=r"503.*run the same command again") as caught:
        toy_run(near, run)
    assert caught.value.exit_code == 66
    server.faults.clear()
    toy_run(near, run)
    assert losses(run) == losses(wanted)
    assert rows(run, "ledger.jsonl") == rows(wanted, "ledger.jsonl")


def test_verify_reads_a_remote_folder_and_names_the_shard_that_does_not_come(toy, capsys):
    _, near, server = toy
    assert cli.main(["verify", str(near)]) == 0
    capsys.readouterr()
    for path in fetched_files(Path(os.environ["VLBEIT_CACHE"])):
        path.unlink()
    name = Dataset.open(near).sources[0].shards[0].rpartition("/")[2]
    server.fail(name, *[404] * 9)
    assert cli.main(["verify", str(near), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    shards = [shard for source in report["sources"] for shard in source["shards"]]
    bad = {(row["reason"], name in row["detail"]) for shard in shards for row in shard["bad"]}
    assert bad == {("unreadable_shard", True)}


# -- credentials ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "https://me:hunter2@host/x-{0..3}.tar",
        "https://hunter2@host/x.tar",
        "s3://bucket/x.tar?X-Amz-Signature=hunter2",
    ],
)
def test_a_url_with_credentials_in_it_is_refused_without_repeating_them(
    tmp_path, url, cache, capsys
):
    for given in (
        lambda: RecordSource("x", [url]),
        lambda: cli.main(["prepare", "pairs", url, "--out", str(tmp_path / "out")]),
        lambda: cli.main(["prepare", "remote", url, "--out", str(tmp_path / "out")]),
    ):
        try:
            code = given()
        except ConfigError as error:
            told = str(error)
        else:
            assert code == 78
            told = "".join(capsys.readouterr())
        assert "hunter2" not in told and ("host" in told or "bucket" in told)
    assert not (tmp_path / "out").exists()


def test_a_token_given_to_fsspec_opens_the_door_and_is_written_nowhere(
    toy, tmp_path, monkeypatch, capsys
):
    from fsspec.config import conf

    _, near, server = toy
    server.token = "hunter2"
    with pytest.raises(InputError, match="refuses it"):
        RecordSource("x", Dataset.open(near).sources[0].shards)
    headers = {"Authorization": "Bearer hunter2"}
    monkeypatch.setitem(conf, "http", {"headers": headers})  # what FSSPEC_HTTP sets at the start
    run = toy_run(near, tmp_path / "run", {"max_steps": 2})
    places = [path for root in (run, near, tmp_path / "cache") for path in root.rglob("*")]
    written = [path for path in places if path.is_file() and b"hunter2" in path.read_bytes()]
    out = capsys.readouterr()
    assert len(places) > 20 and written == [] and "hunter2" not in out.out + out.err
