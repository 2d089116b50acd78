"""F01: weights made to run code or to exhaust the machine are refused, with exit code 77.

Every file goes through the command in one process of its own, whose canaries, time and memory are
looked at from here. The pickles are made by hand: what they name is never imported by this test.
"""

import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from foreign_files import beit_tensors, save_training_file

SECONDS, MEGABYTES = 5, 512


class Runs:
    """Pickles to a call of anything, by name."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, ...]:
        return self.call


def touch(canary: Path) -> Runs:
    return Runs(os.system, f"touch {canary}")


def torch_zip(path: Path, pickled: bytes, entries: Mapping[str, bytes] = {}, **how: int) -> None:
    """A zip as torch.save writes it, around any data.pkl."""
    with zipfile.ZipFile(path, "w", **how) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        for name, content in entries.items():
            archive.writestr(f"archive/{name}", content)


def tensor_pickle(
    shape: tuple[int, ...], stride: tuple[int, ...], count: int, key: str = "0", offset: int = 0
) -> bytes:
    """data.pkl of {"model": {"cls_token": one tensor}}, opcode by opcode."""

    def number(value: int) -> bytes:
        return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu")
    storage += number(count) + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + numbers(shape)
    tensor += numbers(stride) + b"\x89" + b"ccollections\nOrderedDict\n)R" + b"tR"
    return b"\x80\x02}" + text("model") + b"}" + text("cls_token") + tensor + b"ss."


def colliding_keys(count: int) -> bytes:
    """A dict whose keys are tuples: their hashes can be made equal, and then it takes hours."""
    body = b"".join(b"K" + bytes([i % 256]) + b"\x85N" for i in range(count))
    return b"\x80\x02}(" + body + b"u."


def hostile_files(folder: Path, canary: Path) -> dict[str, Path]:
    """Twenty files and more, by what is wrong with them."""
    made: dict[str, Path] = {}

    def at(name: str, suffix: str) -> Path:
        made[name] = folder / f"{len(made):02}{suffix}"
        return made[name]

    evil = touch(canary)
    for suffix in (".pt", ".pth", ".bin", ".ckpt"):
        at(f"a plain pickle that runs a command {suffix}", suffix).write_bytes(pickle.dumps(evil))
    for protocol in (0, 1, 2, 4, 5):
        pickled = pickle.dumps({"model": evil}, protocol)
        torch_zip(at(f"a torch zip, protocol {protocol}", ".pth"), pickled)
    for function in (eval, exec, __import__, getattr, open):
        pickled = pickle.dumps({"model": Runs(function, "1")}, 2)
        torch_zip(at(f"a call of {function.__name__}", ".pt"), pickled)
    at("a pickle named safetensors", ".safetensors").write_bytes(pickle.dumps(evil, 4))
    torch_zip(at("a zip named safetensors", ".safetensors"), pickle.dumps(evil, 2))
    torch.save(torch.nn.Linear(2, 2), at("a pickled module", ".pkl"))
    torch_zip(at("gigabytes of zeros", ".ckpt"), pickle.dumps(Runs(bytearray, 1 << 40), 2))
    torch_zip(
        at("a nested call in the optimizer", ".pth"),
        pickle.dumps({"model": {}, "optimizer": [{"x": (evil,)}]}, 2),
    )
    torch_zip(at("a storage that is not there", ".pt"), tensor_pickle((4,), (1,), 4))
    torch_zip(
        at("a tensor beyond its storage", ".pt"),
        tensor_pickle((1 << 40,), (1,), 1 << 40),
        {"data/0": b"\0" * 16},
    )
    torch_zip(
        at("terabytes by strides of 0", ".pt"),
        tensor_pickle((1 << 20, 1 << 20), (0, 0), 4),
        {"data/0": b"\0" * 16},
    )
    torch_zip(
        at("an offset beyond the storage", ".pt"),
        tensor_pickle((4,), (1,), 4, offset=1 << 40),
        {"data/0": b"\0" * 16},
    )
    torch_zip(
        at("nine dimensions", ".pt"), tensor_pickle((1,) * 9, (1,) * 9, 1), {"data/0": b"\0" * 16}
    )
    torch_zip(
        at("a compressed data.pkl of 2 GB", ".pt"),
        b"\x80\x02" + b"N" * (64 << 20) + b".",
        compression=zipfile.ZIP_DEFLATED,
    )
    torch_zip(at("a data.pkl of millions of lists", ".pt"), b"\x80\x02" + b"]" * (3 << 20) + b".")
    torch_zip(at("colliding keys", ".pt"), colliding_keys(100_000))
    torch_zip(
        at("a number of a million digits", ".pt"),
        b"\x80\x02\x8b" + struct.pack("<I", 1 << 20) + b"\x01" * (1 << 20) + b".",
    )
    torch_zip(
        at("a TorchScript program", ".pt"),
        tensor_pickle((1,), (1,), 1),
        {"data/0": b"\0" * 4, "code/__torch__.py": b"", "constants.pkl": b"."},
    )
    with zipfile.ZipFile(at("a directory of 100,000 entries", ".pt"), "w") as archive:
        for number in range(100_000):
            archive.writestr(f"archive/data/{number}", b"")
    with open(at("a file of 100 GB with holes", ".pt"), "wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(100 << 30)
    at("a zip cut in the middle", ".pt").write_bytes(made["nine dimensions"].read_bytes()[:-30])
    return made  # fmt: skip


CHILD = """
import json, re, sys, time
from vlbeit.cli import main
import vlbeit.convert.cli

def peak():  # of this program alone: ru_maxrss begins with that of the process it came from
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])

rows = []
for line in sys.stdin:
    began, before = time.perf_counter(), peak()
    code = main(["convert", "beit", line.strip(), "--dry-run"])
    rows.append([code, time.perf_counter() - began, peak(), peak() - before])
print(json.dumps(rows))
"""


@pytest.mark.fault
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read there")
def test_hostile_files_run_nothing_take_little_and_end_with_77(tmp_path):
    canary = tmp_path / "canary"
    files = hostile_files(tmp_path, canary)
    assert len(files) >= 20
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input="\n".join(map(str, files.values())),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    rows = json.loads(done.stdout.splitlines()[-1])
    messages = done.stderr.splitlines()
    assert len(rows) == len(messages) == len(files)
    for (name, path), (code, seconds, peak, _), message in zip(
        files.items(), rows, messages, strict=True
    ):
        assert code == 77, (name, code, message)
        assert str(path) in message, name
        assert seconds < SECONDS, (name, seconds)
        assert peak < MEGABYTES << 10, (name, peak)  # of the whole process, torch included
    assert not canary.exists()
    told = [message for message in messages if "safetensors.torch.save_file" in message]
    assert len(told) >= 20


@pytest.mark.fault
def test_the_canary_would_have_sung(tmp_path):
    """The same pickle, loaded as one must not: else the test above would prove nothing."""
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(touch(canary)))
    assert canary.exists()


def test_a_training_file_with_its_command_line_is_taken(tmp_path, capsys):
    from vlbeit.cli import main

    path = save_training_file(tmp_path / "beit.pth", beit_tensors(), "model")
    assert main(["convert", "beit", str(path), "--dry-run", "--fresh", "*"]) == 0
    assert "initialised" in capsys.readouterr().out


def test_a_safetensors_file_that_promises_more_than_it_holds_is_refused(tmp_path, capsys):
    from vlbeit.cli import main

    path = tmp_path / "model.safetensors"
    entry = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}
    header = json.dumps({"cls_token": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert main(["convert", "beit", str(path), "--dry-run"]) == 66
    assert str(path) in capsys.readouterr().err
