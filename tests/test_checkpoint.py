"""Laws of checkpoints: the previous one or the new one, never half of one, and no damaged byte."""

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlbeit import checkpoint as ck
from vlbeit.data import transforms
from vlbeit.errors import InputError, SaveError, UnsafeError
from vlbeit.tensorfile import read_header, refuse_pickle
from vlbeit.train import verify

SOURCE = Path(ck.__file__).parents[1]


def tensors(step: int, size: int = 64) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {
        "half": torch.randn(size, 3, generator=draw).to(torch.bfloat16),
        "weight": torch.randn(size, size, generator=draw),
        "turned": torch.randn(size, 5, generator=draw).T,
        "number": torch.tensor(float(step)),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
    }


@dataclass
class ToyTokenizer:
    name: str
    content: str
    digest: str = "0" * 64

    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / self.name).write_text(self.content)


def save(run_dir: Path, step: int, *, size: int = 64, keep: int = 0, log=lambda _: None) -> Path:
    return ck.save_checkpoint(
        run_dir,
        step,
        model_tensors=tensors(step, size),
        optimizer_tensors={"moment": torch.full((size, size), 0.1 * step)},
        state={"cursors": {"coco": 3 * step}, "loss": 0.1 * step},
        config={"seed": 1},
        preprocessor={"image_size": [32, 32]},
        text_tokenizer=ToyTokenizer("tokenizer.json", '{"words": ["a", "b"]}'),
        visual_tokenizer=ToyTokenizer("config.json", "{}"),
        world_size=1,
        threads=1,
        keep=keep,
        log=log,
    )


def test_what_is_loaded_is_what_was_saved_bit_by_bit(tmp_path):
    save(tmp_path, 5)
    found = ck.load_newest(tmp_path, log=pytest.fail)
    assert found is not None and found.step == 5
    assert found.state == {"cursors": {"coco": 15}, "loss": 0.1 * 5, "step": 5}
    assert found.config == {"seed": 1}
    loaded = found.model_tensors()
    assert loaded.keys() == tensors(5).keys()
    for name, value in tensors(5).items():
        assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value), name
    assert torch.equal(found.optimizer_tensors()["moment"], torch.full((64, 64), 0.1 * 5))
    assert json.loads(found.text_tokenizer.read_text()) == {"words": ["a", "b"]}
    assert (found.visual_tokenizer / "config.json").read_text() == "{}"


def test_the_library_reads_our_safetensors_and_the_header_tells_the_same(tmp_path):
    path = save(tmp_path, 2) / "model.safetensors"
    library = load_file(path)
    infos = read_header(path)
    assert infos.keys() == library.keys()
    for name, value in library.items():
        assert (infos[name].dtype, infos[name].shape) == (value.dtype, tuple(value.shape))
        assert torch.equal(value, tensors(2)[name])


def test_the_same_state_gives_the_same_bytes(tmp_path):
    first, second = save(tmp_path / "a", 3), save(tmp_path / "b", 3)
    for path in sorted(first.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (second / path.relative_to(first)).read_bytes(), path


def test_a_run_without_checkpoints_has_none_to_load(tmp_path):
    assert ck.load_newest(tmp_path, log=pytest.fail) is None


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def test_one_flipped_bit_anywhere_is_found_and_the_previous_checkpoint_is_used(tmp_path):
    save(tmp_path, 10, size=16)
    newest = save(tmp_path, 20, size=16)
    files = sorted(p for p in newest.rglob("*") if p.is_file())
    assert len(files) == 8
    draw = random.Random(0)
    # Every file takes its share of 100 places, the manifest too; then both ends of the manifest.
    places = [(f, draw.randrange(8 * f.stat().st_size)) for i in range(100) for f in [files[i % 8]]]
    manifest = newest / "manifest.json"
    places += [(manifest, bit) for bit in (0, 8 * manifest.stat().st_size - 1)]
    for path, bit in places:
        flip(path, bit)
        said: list[str] = []
        found = ck.load_newest(tmp_path, said.append)
        assert found is not None and found.step == 10, (path, bit)
        assert len(said) == 1 and said[0].count("sha256 ") >= 1
        assert "expected" in said[0] and "found" in said[0] and path.name in said[0]
        flip(path, bit)
    found = ck.load_newest(tmp_path, pytest.fail)
    assert found is not None and found.step == 20


@pytest.mark.slow
def test_every_single_bit_of_the_manifest_counts(tmp_path):
    folder = save(tmp_path, 1, size=4)
    manifest = folder / "manifest.json"
    content = manifest.read_bytes()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(damaged)
        problems: list[str] = []
        assert ck._verified_manifest(manifest, problems) is None and problems, bit


def test_a_missing_file_and_a_cut_file_are_damage(tmp_path):
    save(tmp_path, 1)
    (save(tmp_path, 2) / "state.json").unlink()
    cut = save(tmp_path, 3) / "optimizer.safetensors"
    os.truncate(cut, cut.stat().st_size - 1)
    said: list[str] = []
    found = ck.load_newest(tmp_path, said.append)
    assert found is not None and found.step == 1
    assert "optimizer.safetensors" in said[0] and "state.json" in said[1]


def test_with_nothing_good_left_a_start_stops_instead_of_beginning_again(tmp_path):
    (save(tmp_path, 1) / "manifest.json").unlink()
    with pytest.raises(InputError, match="none of the 1 checkpoints verifies"):
        ck.load_newest(tmp_path, lambda _: None)


def test_only_the_newest_are_kept_and_damaged_later_ones_do_not_count(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep=2)
    assert [s for s, _ in ck.list_checkpoints(tmp_path)] == [20, 30]
    flip(tmp_path / "checkpoints/step-0000030/state.json", 9)
    save(tmp_path, 25, keep=2)
    assert [s for s, _ in ck.list_checkpoints(tmp_path)] == [20, 25, 30]


def test_saving_a_step_again_replaces_the_damaged_one(tmp_path):
    folder = save(tmp_path, 7)
    flip(folder / "model.safetensors", 1000)
    assert save(tmp_path, 7) == folder
    assert ck.verify_checkpoint(folder)["ok"]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-0000007"]


CHILD = """
import sys; sys.path[:0] = sys.argv[3:]
from pathlib import Path
from test_checkpoint import save
for step in map(int, sys.argv[2].split(",")):
    save(Path(sys.argv[1]), step, keep=2)
"""


def child(run_dir: Path, steps: str, fault: str = "", **more) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CHILD, str(run_dir), steps, str(SOURCE), str(Path(__file__).parent)],
        env={**os.environ, "VLBEIT_FAULT": fault},
        capture_output=True,
        text=True,
        timeout=120,
        **more,
    )


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.parametrize("point", ck.FAULT_POINTS)
def test_a_crash_at_any_point_of_a_save_leaves_the_previous_or_the_new(tmp_path, point):
    for step in (10, 20):
        save(tmp_path, step)
    died = child(tmp_path, "30", fault=point)
    assert died.returncode == 137, died.stderr
    said: list[str] = []
    ck.remove_leftovers(tmp_path, said.append)
    found = ck.load_newest(tmp_path, pytest.fail)
    renamed = point in ("after_rename", "mid_purge", "after")
    assert found is not None and found.step == (30 if renamed else 20)
    left = point in ("mid_write", "before_fsync", "before_rename", "mid_purge")
    assert len(said) == left and all("removed" in line and ".tmp-step" in line for line in said)
    names = [p.name for p in (tmp_path / "checkpoints").iterdir()]
    assert all(ck.verify_checkpoint(tmp_path / "checkpoints" / n)["ok"] for n in names)
    # Going on gives what an undisturbed run would have given.
    for step in range(found.step + 10, 50, 10):
        save(tmp_path, step, keep=2)
    save(tmp_path / "undisturbed", 40)
    again = tmp_path / "checkpoints/step-0000040/manifest.json"
    assert (
        again.read_bytes()
        == (tmp_path / "undisturbed/checkpoints/step-0000040/manifest.json").read_bytes()
    )


def test_a_replaced_checkpoint_whose_replacement_never_came_is_put_back(tmp_path):
    folder = save(tmp_path, 7)
    folder.rename(folder.with_name(".old-" + folder.name))
    said: list[str] = []
    ck.remove_leftovers(tmp_path, said.append)
    assert "put back" in said[0] and ck.verify_checkpoint(folder)["ok"]


FULL = """
set -e
mount -t tmpfs -o size=1m none "$1"
shift
exec "$@"
"""

ON_FULL_DISK = """
import sys; sys.path[:0] = sys.argv[2:]
import shutil
from pathlib import Path
from test_checkpoint import ck, save
from vlbeit.errors import SaveError
run = Path(sys.argv[1]); said = []
save(run, 10, size=200)                    # about 0.33 MB: three fit, the filesystem holds 1 MB
filler = run / "filler"
real, write, last = ck.free_bytes, ck._write, ["weights"]
ck._write = lambda path, content: last.append(path.name) or write(path, content)
block = 4096
all_but_manifest = sum(
    -(-f.stat().st_size // block)
    for f in (run / "checkpoints/step-0000010").rglob("*")
    if f.is_file() and f.name != "manifest.json"
)
for place, blocks in {"before": 70, "weights": 20, "manifest": all_but_manifest}.items():
    free = blocks * block
    if place != "before":                  # the room goes between the check and the write
        ck.free_bytes = lambda _: 10**9
    filler.write_bytes(b"x" * (real(run) - free))
    last[1:] = []
    try:
        save(run, 20, size=200)
    except SaveError as error:
        print(place, last[-1], "|", error)
    ck.free_bytes = real
    filler.unlink()
    assert ck.verify_checkpoint(run / "checkpoints/step-0000010")["ok"]
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-0000010"]
save(run, 20, size=200)
assert ck.load_newest(run, said.append).step == 20 and not said
try:
    ck.check_space(run, real(run) // 2 + 1)
except SaveError as error:
    print("start - |", error)
ck.check_space(run, real(run) // 2)
"""


@pytest.mark.fault
@pytest.mark.slow
def test_on_a_full_disk_a_save_says_what_it_needs_and_keeps_the_previous(tmp_path):
    probe = subprocess.run(
        ["unshare", "-m", "bash", "-c", FULL, "-", str(tmp_path), "true"], capture_output=True
    )
    if probe.returncode:
        pytest.skip(f"no private mount here: {probe.stderr.decode().strip()}")
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", FULL, "-", str(tmp_path)]
        + [sys.executable, "-c", ON_FULL_DISK, str(tmp_path), str(SOURCE)]
        + [str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    # Where the room ran out, and the last small file that was begun.
    assert [line.split(" |")[0] for line in lines] == [
        "before weights",
        "weights weights",
        "manifest manifest.json",
        "start -",
    ]
    for line in lines:
        assert "bytes needed" in line and "bytes free" in line and str(tmp_path) in line, line


@pytest.mark.fault
@pytest.mark.slow
def test_a_file_size_limit_ends_a_save_with_the_limit_named(tmp_path):
    save(tmp_path, 10, size=200)
    limited = (
        "import resource, sys; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path\n"
        "from test_checkpoint import SaveError, save\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: save(Path(sys.argv[1]), 20, size=200)\n"
        "except SaveError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, str(tmp_path), str(SOURCE), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "ulimit" in done.stdout and "step-0000020" in done.stdout, done.stderr
    assert [s for s, _ in ck.list_checkpoints(tmp_path)] == [10]


def test_a_run_says_when_ranks_or_threads_changed(tmp_path):
    save(tmp_path, 1)
    found = ck.load_newest(tmp_path, pytest.fail)
    assert found is not None
    assert found.differences(world_size=1, threads=1) == []
    said = found.differences(world_size=2, threads=1)
    assert len(said) == 1 and "world_size was 1" in said[0] and "is 2" in said[0]


def test_a_run_says_when_its_pictures_are_made_by_another_library(tmp_path, monkeypatch):
    """Pixels may then differ by rounding; a checkpoint without the entry is from before it."""
    pytest.importorskip("simplejpeg")
    save(tmp_path, 1)
    found = ck.load_newest(tmp_path, pytest.fail)
    assert found is not None
    monkeypatch.setattr(transforms, "simplejpeg", None)
    (said,) = found.differences(world_size=1, threads=1)
    assert str(found.manifest["pictures"]) in said and "are by Pillow" in said
    del found.manifest["pictures"]
    (said,) = found.differences(world_size=1, threads=1)
    assert "Pillow bicubic" in said


# Strangers' files ---------------------------------------------------------------------------------


def header_file(path: Path, header: object, body: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


@pytest.mark.parametrize(
    ("header", "body", "error"),
    [
        ({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, b"", InputError),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234", InputError),
        ({"a": {"dtype": "PY", "shape": [1], "data_offsets": [0, 4]}}, b"1234", UnsafeError),
        ({"a": {"dtype": "U8", "shape": [1] * 9, "data_offsets": [0, 1]}}, b"1", UnsafeError),
        ({"a": {"dtype": "U8", "shape": [-1], "data_offsets": [0, -1]}}, b"", InputError),
        ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"12", InputError),
        ({"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, b"1", InputError),
        ({"a": 3}, b"", InputError),
        (b"[" * 100_000, b"", InputError),
        (b"[]", b"", InputError),
    ],
)
def test_a_header_that_promises_what_is_not_there_is_refused(tmp_path, header, body, error):
    with pytest.raises(error, match="x.safetensors"):
        read_header(header_file(tmp_path / "x.safetensors", header, body))


def test_more_tensors_than_the_limit_are_refused(tmp_path):
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    path = header_file(tmp_path / "x.safetensors", {str(i): entry for i in range(70_000)})
    with pytest.raises(UnsafeError, match="65536"):
        read_header(path)


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.BIN", "a.ckpt", "weights", "folder"])
def test_pickles_are_refused_with_the_way_out_and_never_opened_as_code(tmp_path, name):
    canary = tmp_path / "canary"
    payload = b"\x80\x04cposix\nsystem\n(Vtouch " + str(canary).encode() + b"\ntR."
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        (path / "pytorch_model.bin").write_bytes(payload)
    else:
        path.write_bytes(payload)
    with pytest.raises(UnsafeError, match="safetensors.torch.save_file"):
        refuse_pickle(path)
    with pytest.raises(UnsafeError):
        verify.main([str(path)])
    assert not canary.exists()
    assert UnsafeError.exit_code == 77


def test_a_safetensors_file_is_not_taken_for_a_pickle(tmp_path):
    # A header of 0x280 bytes makes the file begin like pickle protocol 2.
    text = json.dumps({"__metadata__": {"x": ""}}).encode().ljust(0x280)
    assert read_header(header_file(tmp_path / "x.safetensors", text)) == {}


def test_a_manifest_that_points_elsewhere_is_not_followed(tmp_path):
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["digest"]
    outside = tmp_path / "outside"
    outside.write_text("secret")
    manifest["files"]["../../outside"] = {"size": 6, "sha256": "0" * 64}
    (folder / "manifest.json").write_bytes(ck._manifest_bytes(manifest))
    report = ck.verify_checkpoint(folder)
    assert not report["ok"] and "not a file of this folder" in report["problems"][0]


# The commands -------------------------------------------------------------------------------------


def test_verify_ends_with_0_on_whole_and_1_on_damaged_and_names_the_file(tmp_path, capsys):
    folder = save(tmp_path, 1)
    assert verify.main([str(folder)]) == 0
    assert verify.main([str(tmp_path), "--json"]) == 0
    capsys.readouterr()
    flip(folder / "model.safetensors", 999)
    assert verify.main([str(folder), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    bad = [f["name"] for f in report["files"] if not f["ok"]]
    assert bad == ["model.safetensors"]
    assert verify.main([str(tmp_path)]) == 1
    assert "model.safetensors: expected" in capsys.readouterr().out


def test_verify_of_nothing_says_what_it_expected(tmp_path):
    with pytest.raises(InputError, match="checkpoint folder"):
        verify.main([str(tmp_path / "nowhere")])


def test_inspect_shows_step_cursors_and_tensors_of_the_newest_good_checkpoint(tmp_path, capsys):
    save(tmp_path, 1)
    flip(save(tmp_path, 2) / "state.json", 0)
    assert verify.inspect([str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["newest"]["step"] == 1 and found["newest"]["cursors"] == {"coco": 3}
    assert found["newest"]["tensors"]["model.safetensors"]["shapes"]["weight"] == [
        "float32",
        64,
        64,
    ]
    assert "step-0000002" in found["notes"][0]
    assert verify.inspect([str(tmp_path)]) == 0
    assert "coco: 3" in capsys.readouterr().out


def test_a_save_that_cannot_write_is_a_save_error(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(SaveError, match="checkpoints"):
        save(tmp_path, 1)
