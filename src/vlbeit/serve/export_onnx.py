"""`vlbeit export onnx RUN OUT --mode MODE`: one mode of a run as a folder that onnxruntime reads.

model.onnx          the graph, checked against torch at shapes that were not traced
model.int8.onnx     with --int8: its weights in 8 bits
tokenizer.json      where the mode reads words
labels.json         where it names classes or answers
preprocessor.json   picture size, text length, special ids, inputs and outputs
README.md           the same in words, with a program that needs no vlbeit
export.json         the run, the check, what int8 costs, a digest of every file
"""

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vlbeit import __version__
from vlbeit.checkpoint import folder_aside, preprocessing
from vlbeit.errors import ConfigError
from vlbeit.eval.evaluate import LoadedRun
from vlbeit.serve.onnx_graph import (
    MODES,
    Run,
    at_size,
    available,
    labels_of,
    outputs_of,
    write_graph,
)
from vlbeit.serve.onnx_readme import (
    INT8,
    LABELS,
    MODEL,
    PREPROCESSOR,
    check_line,
    cost_lines,
    readme,
)
from vlbeit.serve.predictor import Predictor, load
from vlbeit.tokens.text import SPECIALS

FACTS = "export.json"
FORMAT = "vlbeit-onnx"
SAMPLES = 1000
ONE_FILE = 2**31
"""Bytes; ONNX (protobuf) puts the weights of larger graphs into files beside them."""


def main(argv: Sequence[str]) -> int:
    """`argv` is the words after `vlbeit export onnx`."""
    parser = argparse.ArgumentParser(
        prog="vlbeit export onnx",
        description="Write one mode of a run as a graph that onnxruntime runs without torch.",
        epilog="modes: " + "; ".join(f"{name}: {mode.help}" for name, mode in MODES.items()),
    )
    parser.add_argument("run", help="run folder (its newest good checkpoint) or a checkpoint")
    parser.add_argument("out", type=Path, help="the folder to write; new, or such an export")
    parser.add_argument("--mode", required=True, choices=tuple(MODES))
    parser.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="height and width of the pictures, or one side; default: the run's",
    )
    parser.add_argument(
        "--int8", action="store_true", help=f"also {INT8}, with what that costs, measured"
    )
    parser.add_argument(
        "--data", nargs="+", default=[], help="prepared folders for --int8; default: the run's"
    )
    parser.add_argument(
        "--samples", type=int, help=f"most samples for --int8; 0: all (default {SAMPLES})"
    )
    given = parser.parse_args(list(argv))
    if not given.int8 and (given.data or given.samples is not None):
        raise ConfigError("--data and --samples say what --int8 is measured on: give that too")
    if given.samples is not None and given.samples < 0:
        raise ConfigError(f"--samples must be at least 0 (all), found {given.samples}")
    facts = export_onnx(
        load(given.run, "cpu", print),
        given.out,
        given.mode,
        image_size=size_of(given.image_size),
        int8=given.int8,
        data=given.data,
        samples=SAMPLES if given.samples is None else given.samples,
    )
    print(describe(given.out, facts))
    return 0


def size_of(sides: Sequence[int]) -> tuple[int, int] | None:
    """Height and width of what --image-size was given."""
    if len(sides) > 2:
        raise ConfigError(f"--image-size is one side, or height and width; found {len(sides)}")
    return (sides[0], sides[-1]) if sides else None


def export_onnx(
    predictor: Predictor,
    out: Path,
    mode_name: str,
    *,
    image_size: tuple[int, int] | None = None,
    int8: bool = False,
    data: Sequence[str] = (),
    samples: int = SAMPLES,
) -> dict[str, Any]:
    """Write the folder, all or nothing; an export that is there is replaced.

    Args:
        image_size: height and width; None: the run's.
        int8: also a graph with int8 weights, and what it costs on held-out samples.
        data: prepared folders for that; empty: the run's.
        samples: most samples for that; 0: all.

    Returns:
        What export.json holds.

    Raises:
        ConfigError: a mode that the run lacks, a size that the patch does not divide, or `out`
            holds something else.
        InputError: no held-out samples to measure int8 on.
        SaveError: the graph does not say what torch says, or `out` cannot be written.
    """
    # Here, so that --help and wrong usage need not have the `export` extra.
    from vlbeit.serve.onnx_cost import folders_to_measure, measure_cost
    from vlbeit.serve.onnx_session import LIMIT, Graph, check_graph, quantise, timed

    mode = MODES[mode_name]
    if mode.method not in predictor.modes:
        raise ConfigError(
            f"{predictor.run.folder} was trained for {predictor.trained_for} and has no "
            f"{mode.method}, which --mode {mode_name} asks; it has "
            f"{', '.join(available(predictor.modes)) or 'none of the modes'}"
        )
    if out.exists() and not (out / FACTS).is_file() and (out.is_file() or any(out.iterdir())):
        raise ConfigError(f"{out}: holds something else; choose a folder that does not exist")
    run = predictor.run
    folders = folders_to_measure(run, data) if int8 else ()
    made = at_size(run, image_size or run.config.model.image_size)
    parameters = sum(p.numel() for p in run.model.parameters())
    if int8 and 4 * parameters >= ONE_FILE:
        raise ConfigError(
            f"--int8 wants a graph in one file, which holds at most {ONE_FILE} bytes; this run has "
            f"{4 * parameters} bytes of weights. Export it without --int8"
        )
    facts: dict[str, Any] = {
        "format": FORMAT,
        "vlbeit": __version__,
        "mode": mode_name,
        "trained_for": predictor.trained_for,
        "step": run.step,
        "weights_sha256": predictor.digest,
    }
    with folder_aside(out, 5 * parameters) as aside:
        write_graph(made, mode, aside / MODEL)
        graphs = {"float32": Graph(aside / MODEL)}
        checked = check_graph(out / MODEL, graphs["float32"], run, mode, made)
        facts["check"] = {
            "largest_difference": checked.difference,
            "limit": LIMIT,
            "samples_and_words": checked.shapes,
        }
        if int8:
            quantise(aside / MODEL, aside / INT8)
            graphs["int8"] = Graph(aside / INT8)
            facts["int8"] = measure_cost(made, mode, graphs, folders, samples)
        facts["threads"] = torch.get_num_threads()
        facts["milliseconds"] = timed(made, mode, graphs)
        write_companions(aside, made, mode_name)
        (aside / "README.md").write_text(readme(made, mode_name, facts), encoding="utf-8")
        facts["files"] = {file.name: digest_of(file) for file in sorted(aside.iterdir())}
        write_json(aside / FACTS, facts)
    return facts


def digest_of(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"size": file.stat().st_size, "sha256": sha256}


def write_json(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_companions(folder: Path, run: Run, mode_name: str) -> None:
    """What somebody needs to feed the graph and to read what it says."""
    mode = MODES[mode_name]
    if "words" in mode.inputs:
        run.text.save(folder)
    if "logits" in mode.outputs:
        write_json(folder / LABELS, labels_of(run))
    known = preprocessing(run.config)
    known.pop("pair_text_length", None)
    if isinstance(run, LoadedRun):
        known["text_length"] = run.config.model.text_positions  # as the Predictor takes them
    write_json(
        folder / PREPROCESSOR,
        {
            "mode": mode_name,
            **known,
            "pixels": "uint8 RGB as they are; the graph scales them",
            "special_ids": {name: number for number, name in enumerate(SPECIALS)},
            "inputs": list(mode.inputs),
            "outputs": outputs_of(mode, run),
        },
    )


def describe(out: Path, facts: Mapping[str, Any]) -> str:
    """What the command prints."""
    sizes = ", ".join(
        f"{name} {file['size'] / 1e6:.1f} MB"
        for name, file in facts["files"].items()
        if name.endswith(".onnx")
    )
    return f"{out}: {sizes}\n{check_line(facts)}\n{cost_lines(facts)}"
