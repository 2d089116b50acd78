"""A checkpoint is a folder: written aside, synced, renamed, verified, and only then relied upon.

    checkpoints/step-0000060/
        model.safetensors       what `VLBeit.from_pretrained(folder)` reads, with config.json
        optimizer.safetensors   moments, by parameter name; of a sharded run a folder, optimizer/,
                                with a part from every rank
        config.json             the resolved config of the run
        state.json              step, cursors and the rest that a resume needs
        tokenizer.json, visual/, preprocessor.json
        manifest.json           size and sha256 of each file, and its own digest

A save goes: temporary folder -> files, each synced -> manifest, synced -> rename -> parent folder
synced -> the new folder read back and verified -> old checkpoints removed. A kill at any point
leaves the previous checkpoint or the new one, never half of one. There is no pointer to the
newest: a start walks the folders from newest to oldest and takes the first that verifies.
No pickle: tensors in safetensors, the rest in JSON.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from vlbeit import hub
from vlbeit.config import FinetuneConfig, PretrainConfig
from vlbeit.config import digest as config_digest
from vlbeit.data.transforms import picture_path
from vlbeit.errors import ConfigError, InputError, SaveError
from vlbeit.jsonfile import read_json
from vlbeit.tensorfile import read_tensors, tensor_bytes, write_tensors
from vlbeit.tensorparts import MergedParts, read_parts, write_parts

FORMAT = "vlbeit-checkpoint"
VERSION = 1
RNG_SCHEME = "philox4x64 raw, keyed by blake2b-128 of (names, numbers); no state to save"
"""How random numbers are made (draws.py). Another scheme is another run: a resume refuses it."""

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
OPTIMIZER_PARTS = "optimizer"
"""Folder in place of OPTIMIZER when ranks held shares of it."""
MANIFEST = "manifest.json"
TEXT_TOKENIZER = "tokenizer.json"
VISUAL_TOKENIZER = "visual"
TASK_FILE = "task.json"
"""What a task learned from its training data beside weights: class names, the answer list."""

HUB_KEYS = ("model_type", "architectures", "task_facts")
"""In config.json of a checkpoint that was exported for the hub, beside the settings of the run."""

SMALL_FILES = 64 << 10
"""Bytes allowed for headers, JSON files and the unused ends of disk blocks."""

FAULT_POINTS = (
    "before_temp",
    "mid_write",
    "before_fsync",
    "before_rename",
    "after_rename",
    "mid_purge",
    "after",
)
"""Where VLBEIT_FAULT=name ends the process with 137, as a kill would. For the fault tests."""

_NAME = re.compile(r"step-(\d{7,})")
_TEMPORARY = ".tmp-"
_REPLACED = ".old-"
_SELF = re.compile(rb'"digest": "([0-9a-f]{64})"')

Log = Callable[[str], None]


class Tokenizer(Protocol):
    """What a checkpoint asks of the two tokenizers."""

    @property
    def digest(self) -> str: ...

    def save(self, folder: Path) -> object:
        """Writes its files into the folder, the same bytes for the same tokenizer."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. Small files are read, tensors only when asked for."""

    folder: Path
    step: int
    state: dict[str, Any]
    """What the trainer handed to `save_checkpoint`."""
    config: dict[str, Any]
    manifest: dict[str, Any]

    def model_tensors(self) -> dict[str, Tensor]:
        """On the CPU, by name."""
        return read_tensors(self.folder / MODEL)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """On the CPU, by name; parts are merged."""
        place = self.optimizer_place
        return read_parts(place) if place.is_dir() else read_tensors(place)

    @property
    def optimizer_place(self) -> Path:
        """The file of the optimizer's state, or the folder with its parts."""
        parts = self.folder / OPTIMIZER_PARTS
        return parts if parts.is_dir() else self.folder / OPTIMIZER

    @property
    def text_tokenizer(self) -> Path:
        """tokenizer.json."""
        return self.folder / TEXT_TOKENIZER

    @property
    def visual_tokenizer(self) -> Path:
        """The visual tokenizer's folder; absent in a run without one."""
        return self.folder / VISUAL_TOKENIZER

    def differences(self, *, world_size: int, threads: int, exact: bool = False) -> list[str]:
        """What makes a resume here other than bit-identical, one sentence each.

        Sums over ranks and threads are made in another order when their number changes: the
        sample order stays the same, losses agree to rounding. A run that was and is `exact` may
        change its number of ranks.
        """
        now = {"world_size": world_size, "threads": threads}
        if exact:
            del now["world_size"]
        # A checkpoint without the entry is older than it.
        pictures = self.manifest.get("pictures", "Pillow; Pillow bicubic")
        changed = [
            f"pictures were made by {pictures} when step {self.step} was saved and are by "
            f"{picture_path()} now: the sample order stays the same, pixels agree to rounding"
        ] * (pictures != picture_path())
        return changed + [
            f"{name} was {self.manifest[name]} when step {self.step} was saved and is {value} now: "
            "the sample order stays the same, losses agree to rounding but not bit by bit"
            for name, value in now.items()
            if self.manifest[name] != value
        ]


def checkpoint_name(step: int) -> str:
    return f"step-{step:07d}"


def list_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything that is named like a checkpoint, oldest first; unverified."""
    root = run_dir / "checkpoints"
    if not root.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in root.iterdir() if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in found if match)


# Saving ------------------------------------------------------------------------------------------


def save_checkpoint(
    run_dir: Path,
    step: int,
    *,
    model_tensors: Mapping[str, Tensor],
    optimizer_tensors: Mapping[str, Tensor] | Path,
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
    text_tokenizer: Tokenizer,
    visual_tokenizer: Tokenizer | None,
    world_size: int,
    threads: int,
    keep: int = 0,
    log: Log = print,
    files: Mapping[str, Mapping[str, Any]] = {},
) -> Path:
    """Writes `checkpoints/step-0000060`, verifies it, then removes all but the `keep` newest.

    Called by one process only, the holder of the run folder's lock. `state` must be JSON and holds
    `cursors` (source -> samples handed out). The tokenizers write themselves from memory: their
    own files may be gone by now (the checkpoint they were read from was purged) or may have rotted
    since. What ranks hold in shares comes from `write_shares`. A folder of the same step is
    replaced. `keep` of 0 keeps all.
    `files` are more JSON files, by name (a task's task.json).

    Raises:
        SaveError: no room, no permission, or the written files do not verify. The previous
            checkpoint is untouched and the temporary folder is gone.
    """
    root = run_dir / "checkpoints"
    folder = root / checkpoint_name(step)
    needed = tensor_bytes(model_tensors) + SMALL_FILES
    if not isinstance(optimizer_tensors, Path):
        needed += tensor_bytes(optimizer_tensors)
    with folder_aside(folder, needed) as temporary:
        text_tokenizer.save(temporary)
        if visual_tokenizer is not None:
            visual_tokenizer.save(temporary / VISUAL_TOKENIZER)
        written = {name: _digest_of(temporary / name) for name in _names(temporary)}
        free = free_bytes(root)
        if free < needed:
            raise SaveError(_no_room(folder, needed, free))
        written[MODEL] = _record(*write_tensors(temporary / MODEL, model_tensors))
        _fault("mid_write")
        if isinstance(optimizer_tensors, Path):
            parts = temporary / OPTIMIZER_PARTS
            optimizer_tensors.rename(parts)
            for name in _names(parts):
                written[f"{OPTIMIZER_PARTS}/{name}"] = _digest_of(parts / name)
        else:
            written[OPTIMIZER] = _record(*write_tensors(temporary / OPTIMIZER, optimizer_tensors))
        for name, content in {
            "config.json": config,
            "state.json": {**state, "step": step},
            "preprocessor.json": preprocessor,
            **files,
        }.items():
            written[name] = _write(temporary / name, _json_bytes(content))
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "world_size": world_size,
            "threads": threads,
            "pictures": picture_path(),
            "rng": RNG_SCHEME,
            "cursors": state["cursors"],
            "config_digest": config_digest(dict(config)),
            "tokenizer_digests": {
                "text": text_tokenizer.digest,
                "visual": None if visual_tokenizer is None else visual_tokenizer.digest,
            },
            "files": written,
        }
        _write(temporary / MANIFEST, _manifest_bytes(manifest))
    report = verify_checkpoint(folder)
    if not report["ok"]:
        raise SaveError(
            f"{folder}: what was read back is not what was written: "
            f"{'; '.join(report['problems'])}. Older checkpoints were kept; check the disk."
        )
    _purge(run_dir, step, keep, log)
    _fault("after")
    return folder


def write_shares(
    run_dir: Path, model_tensors: Mapping[str, Tensor], optimizer_tensors: Mapping[str, Tensor]
) -> None:
    """Write what ranks hold in shares aside, synced; all ranks call it together.

    What a kill leaves of it goes with the other leftovers at the next start.

    Raises:
        SaveError: no room or no permission, at some rank.
    """
    model, optimizer = _shares(run_dir)
    # The model's numbers are on the disk twice for a moment, in parts and merged.
    needed = 2 * tensor_bytes(model_tensors) + tensor_bytes(optimizer_tensors)
    with _translated(model.parent, needed):
        write_parts(model, model_tensors)
        write_parts(optimizer, optimizer_tensors)


def merged_shares(run_dir: Path) -> tuple[Mapping[str, Tensor], Path]:
    """What `write_shares` wrote, for `save_checkpoint`: the model whole, a tensor at a time, as
    whoever reads a checkpoint need not know how many ranks wrote it; the optimizer's parts."""
    model, optimizer = _shares(run_dir)
    return MergedParts(model), optimizer


def clear_shares(run_dir: Path) -> None:
    """Remove what `write_shares` left, before it is called and after a save; for rank 0 alone."""
    shutil.rmtree(_shares(run_dir)[0].parent, ignore_errors=True)


def _shares(run_dir: Path) -> tuple[Path, Path]:
    aside = run_dir / "checkpoints" / (_TEMPORARY + "shares")
    return aside / "model", aside / OPTIMIZER_PARTS


def copy_checkpoint(
    source: Checkpoint,
    out: Path,
    *,
    config: Mapping[str, Any],
    state: Mapping[str, Any],
    files: Mapping[str, bytes],
) -> Path:
    """A checkpoint to hand on: without the optimizer's state, with config.json, state.json and
    more files in place of its own, and a manifest of its own. Written aside, then renamed.

    Args:
        config: with the keys of `HUB_KEYS` too; they are no settings.
        state: `step`, and what else may be known.
        files: contents by name.

    Raises:
        InputError: a file of the source is not what its manifest says.
        ConfigError: `out` exists and holds no checkpoint.
        SaveError: `out` cannot be written.
    """
    if out.exists() and not (out / MANIFEST).is_file() and any(out.iterdir()):
        raise ConfigError(f"{out}: holds something else; choose a folder that does not exist")
    replaced = {"config.json": _json_bytes(config), "state.json": _json_bytes(state), **files}
    written: dict[str, dict[str, Any]] = {}
    handed = {name: f for name, f in source.manifest["files"].items() if not _of_optimizer(name)}
    needed = sum(f["size"] for f in handed.values())
    with folder_aside(out, needed + SMALL_FILES) as aside:
        for name, wanted in handed.items():
            if name in replaced:
                continue
            if _found(source.folder, name).get("found_sha256") != wanted["sha256"]:
                raise InputError(
                    f"{source.folder / name}: is not what the manifest says; see "
                    f"`vlbeit verify {source.folder}`"
                )
            (aside / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source.folder / name, aside / name)
            written[name] = _digest_of(aside / name)
        for name, content in replaced.items():
            written[name] = _write(aside / name, content)
        manifest = {
            **{key: value for key, value in source.manifest.items() if key != "digest"},
            "config_digest": config_digest(_settings(config)),
            "files": written,
        }
        _write(aside / MANIFEST, _manifest_bytes(manifest))
    return out


@contextmanager
def folder_aside(folder: Path, needed: int) -> Iterator[Path]:
    """An empty folder beside `folder` to be filled.

    When the block ends, everything in it is fsynced and it takes the place of `folder`; when the
    block fails, it is removed and `folder` stays as it was.

    Args:
        needed: bytes, for the message when there is no room.

    Raises:
        SaveError: it cannot be written.
    """
    folder = folder.absolute()
    temporary = folder.with_name(_TEMPORARY + folder.name)
    with _translated(folder, needed):
        _fault("before_temp")
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            _fault("before_fsync")
            for inside in (*temporary.rglob("*"), temporary):
                _sync(inside)
            _fault("before_rename")
            _put_in_place(temporary, folder)
        except BaseException:
            # Half a checkpoint on a full disk would also take the room that the log needs.
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _fault("after_rename")
        _sync(folder.parent)


def _of_optimizer(name: str) -> bool:
    return name == OPTIMIZER or name.startswith(OPTIMIZER_PARTS + "/")


SQUASHED = "bicubic, squashed to image_size"


def preprocessing(
    config: PretrainConfig | FinetuneConfig, resize: str = SQUASHED
) -> dict[str, Any]:
    """preprocessor.json: what somebody needs beside the weights to feed the model.

    Args:
        resize: how a picture that is not augmented gets the model's size, in words.
    """
    found = {
        "image_size": list(config.model.image_size),
        "patch": config.model.patch,
        "pixels": "uint8 RGB / 127.5 - 1 (mean = std = 0.5)",
        "resize": resize,
        "text_length": config.input.text_length,
    }
    if isinstance(config, PretrainConfig):
        found["pair_text_length"] = config.input.pair_text_length
    return found


def check_space(run_dir: Path, needed: int) -> None:
    """At the start of a run: refuse unless the disk takes two checkpoints of `needed` bytes.

    Raises:
        SaveError: with the path, the bytes needed and the bytes free.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    free = free_bytes(run_dir)
    if free < 2 * needed:
        raise SaveError(_no_room(run_dir, 2 * needed, free))


def free_bytes(folder: Path) -> int:
    """What an ordinary user may still write there."""
    return shutil.disk_usage(folder).free


def remove_leftovers(run_dir: Path, log: Log) -> list[str]:
    """Removes what a kill during a save left behind; for the holder of the lock, at its start.

    A checkpoint that was moved aside to be replaced, and whose replacement never arrived, is put
    back. Returns the names dealt with.
    """
    root = run_dir / "checkpoints"
    dealt: list[str] = []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        original = root / path.name.removeprefix(_REPLACED)
        if path.name.startswith(_REPLACED) and not original.exists():
            path.rename(original)
            log(f"put back {original}: its replacement was never finished")
        elif path.name.startswith((_TEMPORARY, _REPLACED)):
            shutil.rmtree(path)
            log(f"removed {path}, left by a save that was cut off")
        else:
            continue
        dealt.append(path.name)
    return dealt


@contextmanager
def _translated(path: Path, needed: int) -> Iterator[None]:
    """The system's refusals to write, as SaveError with the numbers a user can act on."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            existing = next(p for p in (path, *path.parents) if p.exists())
            why = {
                errno.ENOSPC: "",
                errno.EDQUOT: " The user's quota is used up.",
                errno.EFBIG: " A file grew over the file-size limit (see `ulimit -f`).",
            }[error.errno]
            raise SaveError(_no_room(path, needed, free_bytes(existing)) + why) from error
        raise SaveError(
            f"{error.filename or path}: cannot write ({error.strerror}). Earlier checkpoints were "
            "kept; the same command goes on from the newest."
        ) from error


def _no_room(path: Path, needed: int, free: int) -> str:
    return (
        f"{path}: no room: {needed} bytes needed, {free} bytes free. Earlier checkpoints were "
        "kept. Free space, or lower log.keep or move run_dir, then run the same command again."
    )


def _names(folder: Path) -> list[str]:
    """Files in and below a folder, relative to it."""
    return [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]


def _digest_of(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        return _record(os.fstat(file.fileno()).st_size, found)


def _record(size: int, sha256: str) -> dict[str, Any]:
    return {"size": size, "sha256": sha256}


def _write(path: Path, content: bytes) -> dict[str, Any]:
    with path.open("xb") as file:
        file.write(content)
    return _record(len(content), hashlib.sha256(content).hexdigest())


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    # NaN is not JSON: a state that holds one could not be read by anything else.
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def _manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """The manifest ends with the sha256 of its own bytes, taken with 64 zeros in that place."""
    blank = _json_bytes({**manifest, "digest": "0" * 64})
    own = hashlib.sha256(blank).hexdigest()
    return blank.replace(b'"digest": "' + b"0" * 64, b'"digest": "' + own.encode())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Renames; a folder of that name (found damaged at the start, or saved before) gives way."""
    if folder.exists():
        aside = folder.with_name(_REPLACED + folder.name)
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        temporary.rename(folder)
        shutil.rmtree(aside)
    else:
        temporary.rename(folder)


def _purge(run_dir: Path, step: int, keep: int, log: Log) -> None:
    """Removes all but the `keep` newest checkpoints up to `step`.

    Later ones can only be there because a resume found them damaged; they do not count, or they
    would push out the good ones.
    """
    if keep <= 0:
        return
    for _, folder in [c for c in list_checkpoints(run_dir) if c[0] <= step][:-keep]:
        # Renamed first: a kill in the middle must not leave half a folder with a good name.
        doomed = folder.with_name(_TEMPORARY + folder.name)
        try:
            folder.rename(doomed)
            _fault("mid_purge")
            shutil.rmtree(doomed)
        except OSError as error:
            log(f"cannot remove old checkpoint {folder}: {error.strerror}")


def _fault(point: str) -> None:
    if os.environ.get("VLBEIT_FAULT") == point:
        os._exit(137)


# Verifying and loading ---------------------------------------------------------------------------


def load_newest(run_dir: Path, log: Log) -> Checkpoint | None:
    """The newest checkpoint that verifies; None when the run has none at all.

    Each one passed over is logged with the expected and the found digest.

    Raises:
        InputError: there are checkpoints, and none of them is good.
    """
    found = list_checkpoints(run_dir)
    for _, folder in reversed(found):
        report = verify_checkpoint(folder)
        if report["ok"]:
            return open_checkpoint(folder)
        log(f"skipped damaged checkpoint {folder}: {'; '.join(report['problems'])}")
    if found:
        raise InputError(
            f"{run_dir / 'checkpoints'}: none of the {len(found)} checkpoints verifies, newest "
            f"{found[-1][1].name}; see `vlbeit verify {run_dir}`. Restore one from a copy, or "
            "choose a new run_dir to start over."
        )
    return None


def find_checkpoint(place: str | Path, log: Log) -> Checkpoint:
    """A checkpoint folder, or the newest good checkpoint of a run folder.

    Raises:
        InputError: there is none, or it is damaged (a run folder falls back to the one before).
    """
    place = Path(place)
    if (place / MANIFEST).is_file():
        return open_checkpoint(place)
    checkpoint = load_newest(place, log)
    if checkpoint is None:
        raise InputError(
            f"{place}: no checkpoint here; expected a run folder or a checkpoint{_instead(place)}"
        )
    return checkpoint


def _instead(place: Path) -> str:
    """What to do with a folder of weights that is no checkpoint, or a name of the hub."""
    if hub.is_repository(str(place)) and not place.exists():
        return (
            f". Of a repository of the hub give the folder that "
            f"vlbeit.hub.local_folder({str(place)!r}) fetches"
        )
    if not (place / hub.CONFIG).is_file():
        return ""
    if "model" in read_json(place / hub.CONFIG):
        return (
            ". These are the weights of a model alone, as save_pretrained writes them, without "
            f"tokenizers and {MANIFEST}: give the run that they come from, or what "
            "`vlbeit export hf RUN OUT` makes of it"
        )
    return (
        ". This looks like a folder of transformers: `vlbeit convert LAYOUT FOLDER --out RUN` "
        "makes a run of one whose layout it knows"
    )


def open_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint that was verified before (by `load_newest`, perhaps in another process).

    Raises:
        InputError: a file is missing or does not parse, or another version of the code wrote it
            with a format or a random-number scheme that this one does not know.
    """
    manifest = read_json(folder / MANIFEST)
    for key, known in (("format", FORMAT), ("version", VERSION), ("rng", RNG_SCHEME)):
        if manifest.get(key) != known:
            raise InputError(
                f"{folder / MANIFEST}: {key} is {manifest.get(key)!r}, this version of vlbeit "
                f"reads {known!r}; use the version that wrote it"
            )
    return Checkpoint(
        folder=folder,
        step=manifest["step"],
        state=read_json(folder / "state.json"),
        config=_settings(read_json(folder / "config.json")),
        manifest=manifest,
    )


def _settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key not in HUB_KEYS}


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """Compares every file with the manifest, and the manifest with itself; reads all bytes.

    Returns:
        {"path", "kind": "checkpoint", "ok", "step", "files": [{"name", "ok", "size", "sha256",
        "found_size", "found_sha256"}], "extra": [names not in the manifest], "problems": [...]}
    """
    report: dict[str, Any] = {
        "path": str(folder),
        "kind": "checkpoint",
        "ok": False,
        "step": None,
        "files": [],
        "extra": [],
        "problems": [],
    }
    manifest = _verified_manifest(folder / MANIFEST, report["problems"])
    if manifest is None:
        return report
    report["step"] = manifest["step"]
    for name, wanted in manifest["files"].items():
        entry = {"name": name, **wanted, **_found(folder, name)}
        entry["ok"] = (entry["size"], entry["sha256"]) == (
            entry["found_size"],
            entry["found_sha256"],
        )
        report["files"].append(entry)
        if not entry["ok"]:
            report["problems"].append(
                f"{name}: expected {entry['size']} bytes, sha256 {entry['sha256']}; found "
                + (
                    f"{entry['found_size']} bytes, sha256 {entry['found_sha256']}"
                    if entry["found_size"] is not None
                    else entry["error"]
                )
            )
    listed = {MANIFEST, *manifest["files"]}
    report["extra"] = [name for name in _names(folder) if name not in listed]
    report["ok"] = not report["problems"]
    return report


def _verified_manifest(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """The manifest if its bytes are those that were written; else None and a problem."""
    try:
        content = path.read_bytes()
    except OSError as error:
        problems.append(f"{MANIFEST}: cannot be read ({error.strerror})")
        return None
    marks = list(_SELF.finditer(content))
    if not marks:
        found = hashlib.sha256(content).hexdigest()
        problems.append(f"{MANIFEST}: expected its own sha256 at the end; found sha256 {found}")
        return None
    begin, end = marks[-1].span(1)
    wanted = content[begin:end].decode()
    found = hashlib.sha256(content[:begin] + b"0" * 64 + content[end:]).hexdigest()
    if wanted != found:
        problems.append(f"{MANIFEST}: expected sha256 {wanted}; found sha256 {found}")
        return None
    try:
        manifest: dict[str, Any] = json.loads(content)
        files = manifest["files"].values()
        if all({"size", "sha256"} <= set(wanted) for wanted in files) and "step" in manifest:
            return manifest
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        pass
    problems.append(f"{MANIFEST}: its digest is right, but it is not a checkpoint's manifest")
    return None


def _found(folder: Path, name: str) -> dict[str, Any]:
    path, home = folder / name, folder.resolve()
    places = [home]
    if home.parent.name == "snapshots":
        # The cache of huggingface-hub: every file of a snapshot is a link to a blob beside it.
        places.append(home.parent.parent / "blobs")
    inside = any(path.resolve().is_relative_to(place) for place in places)
    if not (inside and (path.is_file() or not path.exists())):
        # A stranger's manifest may name a device or a file elsewhere.
        return {"found_size": None, "found_sha256": None, "error": "not a file of this folder"}
    try:
        return {f"found_{key}": value for key, value in _digest_of(path).items()}
    except OSError as error:
        return {"found_size": None, "found_sha256": None, "error": error.strerror}
