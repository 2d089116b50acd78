"""`vlbeit export onnx`: the graph says what torch says, at other shapes than it was traced at, and
a graph that does not is never left in its place."""

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from run_folders import task_run
from tiny_models import fill_normal
from tiny_run import grey_png, tiny_run, write_world
from toy_tasks import write_tasks
from untrained_run import noise, retrieval, untrained
from vlbeit.cli import main
from vlbeit.data.dataset import Dataset, SourceInfo
from vlbeit.data.records import write_shards
from vlbeit.errors import ConfigError, InputError, SaveError
from vlbeit.eval.downstream import TaskRun, evaluate_task
from vlbeit.nn.model import VLBeit
from vlbeit.serve.export_onnx import FACTS, export_onnx, size_of
from vlbeit.serve.onnx_cost import held_out, looked_at, measure_cost
from vlbeit.serve.onnx_graph import MODES, TRACED, OnnxMode, largest_difference, write_graph
from vlbeit.serve.onnx_readme import INT8, MODEL, program
from vlbeit.serve.onnx_session import LIMIT, Graph, check_graph, quantise
from vlbeit.serve.predictor import Predictor

TASK_OF = {
    "vqa": "vqa",
    "classify": "classification",
    "compare": "statements",
    "entail": "entailment",
    "match": "retrieval",
}
"""The other modes are asked of a pretrained run."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data") / "shades")


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Predictor]:
    """Untrained runs by mode."""
    pretrained = Predictor(tiny_run(write_world(tmp_path_factory.mktemp("world"))), "e" * 64)
    found = dict.fromkeys(MODES, pretrained)
    found |= {mode: untrained(task, data) for mode, task in TASK_OF.items() if mode != "match"}
    return found | {"match": retrieval(data)}


@pytest.fixture(scope="module")
def asked(runs: Mapping[str, Predictor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VQA run's export, with int8. An export takes some three seconds, so tests share it."""
    out = tmp_path_factory.mktemp("out") / "vqa"
    export_onnx(runs["vqa"], out, "vqa", int8=True, samples=20)
    return out


def copied(folder: Path, out: Path) -> Path:
    out.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    return out


def most_are_slow(values: Any, quick: str) -> list[Any]:
    """As parameters of which all but one are marked slow."""
    return [v if v == quick else pytest.param(v, marks=pytest.mark.slow) for v in values]


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with the pictures that the programs ask about."""
    for number, name in enumerate(("pixels", "left", "right")):
        Image.fromarray(noise(number, 40)).save(tmp_path / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    yield tmp_path


# ------------------------------------------------------------------ the same answers


def by_predictor(run: Predictor, mode: str, texts: list[str]) -> Any:
    """What the Predictor's method says of the program's pictures."""
    text = texts[0] if texts else ""
    shown = [f"{name}.png" for name in MODES[mode].pictures]
    if mode in ("image", "text", "pair"):
        given = [*shown, text] if mode == "pair" else [text or shown[0]]
        return getattr(run, MODES[mode].method)(*given, normalised=False)
    if mode == "classify":
        return dict(run.classify(shown[0], 4))
    if mode == "vqa":
        return dict(run.answer(shown[0], text, 4))
    if mode == "compare":
        return run.compare(*shown, text).probability
    if mode == "entail":
        return list(run.entail(shown[0], text))
    if mode == "match":
        return list(run.match(shown[0], text))
    return [dict(one) for one in run.fill_words(text, *shown, top=200).guesses]


def by_graph(mode: str, space: Mapping[str, Any]) -> Any:
    """The same from what the program found."""
    found = space["found"]
    if "vector" in found:
        return found["vector"][0]
    if mode == "match":
        return [float(found["similarity"][0]), float(found["probability"][0])]
    shares = found["probabilities"]
    if mode in ("classify", "vqa"):
        return dict(zip(space["labels"], shares[0].tolist(), strict=True))
    if mode == "compare":
        return shares[0, space["labels"].index("true")]
    if mode == "entail":
        return shares[0].tolist()
    pieces = {space["tokenizer"].id_to_token(i): i for i in range(5, 200)}
    return [
        {piece: float(row[i]) for piece, i in pieces.items() if piece is not None}
        for row in shares[space["given"]["words"] == 4]
    ]


def assert_close(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = ([part[key] for key in sorted(one)] for part in (one, other))
    if isinstance(one, list) and one and isinstance(one[0], dict):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_close(a, b)
        return
    np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", most_are_slow(MODES, "vqa"))
def test_the_program_of_the_readme_says_what_the_predictor_says(
    mode, runs, asked, in_folder, capsys
):
    """Pixels and words are made by the program, from the files of the export alone.

    The pictures have the model's size: Pillow, with which the program squashes others, is a level
    off our kernel in places.
    """
    if mode == "vqa":
        copied(asked, in_folder)
    else:
        export_onnx(runs[mode], in_folder / "out", mode)
        copied(in_folder / "out", in_folder)
    facts = json.loads((in_folder / FACTS).read_text())
    assert facts["check"]["largest_difference"] <= LIMIT
    shape = (*runs[mode].model.config.image_size, 3)
    for number, name in enumerate(("pixels", "left", "right")):
        drawn = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(drawn).save(in_folder / f"{name}.png")
    (code,) = re.findall(r"```python\n(.*?)```", (in_folder / "README.md").read_text(), re.DOTALL)
    assert code == program(mode)
    space: dict[str, Any] = {}
    exec(compile(code, f"README.md of {mode}", "exec"), space)
    assert capsys.readouterr().out
    texts = re.findall(r'read_texts\(\["(.*?)"\]\)', code)
    assert_close(by_predictor(runs[mode], mode, texts), by_graph(mode, space))


def test_a_digest_of_every_file_is_in_the_facts(asked):
    facts = json.loads((asked / FACTS).read_text())
    assert {file.name for file in asked.iterdir()} == {FACTS, *facts["files"]}
    for name, found in facts["files"].items():
        content = (asked / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == tuple(found.values())


def test_the_guide_shows_the_program_and_it_runs_without_torch_or_vlbeit(root, asked, in_folder):
    guide = (root / "docs/export.md").read_text()
    code = next(b for b in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "onnx" in b)
    assert code == program("vqa")
    copied(asked, in_folder)
    barred = "import sys\nsys.modules.update(dict.fromkeys(['torch', 'vlbeit', 'transformers']))\n"
    done = subprocess.run([sys.executable, "-c", barred + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] in json.loads((asked / "labels.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({"relative_bias": "per_layer", "absolute_positions": False}, None),
        ({"relative_bias": "shared", "layer_scale": 0.1}, (48, 32)),
        ({"vl_layers": 0}, (16, 40)),
        ({"text_norm_eps": 1e-12, "image_size": (16, 48)}, None),
    ],
    ids=["bias of each layer", "shared bias, other size", "no VL-expert, other size", "not square"],
)
def test_every_kind_of_model_passes_the_check(changes, size, runs, tmp_path):
    """As converted runs have them; the check asks the run as it is, which interpolates itself."""
    run = runs["pair"].run
    model = VLBeit(replace(run.config.model, **changes))
    fill_normal(model, seed=1)
    other = replace(run, model=model.eval(), config=replace(run.config, model=model.config))
    out = tmp_path / "out"
    facts = export_onnx(Predictor(other, "f" * 64), out, "pair", image_size=size)
    assert facts["check"]["largest_difference"] <= LIMIT
    sides = json.loads((out / "preprocessor.json").read_text())["image_size"]
    assert tuple(sides) == (size or model.config.image_size)


# ------------------------------------------------------------------ the check


def broken_modes() -> dict[str, OnnxMode]:
    """Modes with a fault that a check at the traced shape, or without padding, would not see."""
    vqa = MODES["vqa"]

    def reads_padding(run, given):
        return vqa.ask(run, {**given, "word_valid": given["word_valid"] | True})

    def bound_to_its_batch(run, given):
        return tuple(output.reshape(2, -1) for output in vqa.ask(run, given))

    def a_little_off(run, given):
        return tuple(output * 1.001 for output in vqa.ask(run, given))

    def no_number(run, given):
        return tuple(output / (given["words"].shape[1] - 16) for output in vqa.ask(run, given))

    faults = (reads_padding, bound_to_its_batch, a_little_off, no_number)
    return {fault.__name__: replace(vqa, ask=fault) for fault in faults}


@pytest.mark.parametrize("fault", most_are_slow(broken_modes(), "reads_padding"))
def test_a_broken_graph_is_found_and_not_kept(fault, runs, asked, tmp_path, monkeypatch):
    broken = broken_modes()[fault]
    monkeypatch.setattr(
        "vlbeit.serve.export_onnx.write_graph", lambda run, _, path: write_graph(run, broken, path)
    )
    out = copied(asked, tmp_path / "out")
    with pytest.raises(SaveError, match="not kept") as caught:
        export_onnx(runs["vqa"], out, "vqa")
    assert caught.value.exit_code == 73
    # What was there before is untouched, and nothing lies beside it.
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / MODEL).read_bytes() == (asked / MODEL).read_bytes()


def test_a_difference_counts_as_a_share_of_large_values_only():
    small, large = np.array([0.1, 0.2], np.float32), np.array([100.0, 2.0], np.float32)
    assert largest_difference(small + np.float32(0.01), small) == pytest.approx(0.01, rel=1e-4)
    assert largest_difference(large + 1, large) == pytest.approx(0.01)
    assert largest_difference(small, small[:1]) == float("inf")
    assert largest_difference(small, np.array([0.1, np.nan])) == float("inf")


@pytest.mark.slow
def test_an_export_replaces_an_export(runs, asked, tmp_path):
    out = copied(asked, tmp_path / "out")
    export_onnx(runs["image"], out, "image")
    assert json.loads((out / FACTS).read_text())["mode"] == "image"
    assert not (out / "labels.json").exists() and not (out / INT8).exists()


# ------------------------------------------------------------------ int8


def test_int8_is_smaller_and_its_cost_is_in_the_readme(asked, data):
    facts = json.loads((asked / FACTS).read_text())
    sizes = {name: file["size"] for name, file in facts["files"].items()}
    assert sizes[INT8] < sizes[MODEL]
    cost = facts["int8"]
    assert cost["samples"] == 20 and cost["data"] == [data.name]
    assert {"accuracy", "same first answer"} == cost["figures"].keys()
    assert {"torch", "float32", "int8"} == facts["milliseconds"]["1 sample"].keys()
    accuracy = cost["figures"]["accuracy"]
    row = f"| accuracy | {accuracy['float32']:.4f} | {accuracy['int8']:.4f} |"
    assert row in (asked / "README.md").read_text()


def float_products(path: Path) -> int:
    """Products of activations with a weight that is in the file as floats, or made of one."""
    graph = onnx.load(str(path)).graph
    known = {weight.name for weight in graph.initializer}
    for node in graph.node:
        if node.op_type in ("Transpose", "Identity", "Reshape") and set(node.input) <= known:
            known.update(node.output)
    return sum(
        node.op_type in ("MatMul", "Gemm") and not known.isdisjoint(node.input)
        for node in graph.node
    )


@pytest.mark.parametrize("mode", most_are_slow(("vqa", "match"), "vqa"))
def test_int8_leaves_no_product_with_weights_in_float(mode, runs, asked, tmp_path):
    """`match` asks the trunk three times, so that products share their weights."""
    place = asked
    if mode != "vqa":
        place = tmp_path
        write_graph(runs[mode].run, MODES[mode], place / MODEL)
        quantise(place / MODEL, place / INT8)
    assert float_products(place / MODEL) > 10
    assert float_products(place / INT8) == 0
    assert not list(place.glob("*.folded"))


def test_int8_of_a_model_beyond_one_file_is_refused_at_once(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("vlbeit.serve.export_onnx.ONE_FILE", 10_000)
    with pytest.raises(ConfigError, match="at most 10000 bytes"):
        export_onnx(runs["vqa"], tmp_path / "out", "vqa", int8=True)
    assert not list(tmp_path.iterdir())


def write_captioned(folder: Path) -> Path:
    """Records of retrieval; the tokenizer of a run does for their words."""
    rows = (
        (f"{i:04d}", {"png": grey_png(9 * i), "json": b'{"captions": ["which red is here"]}'})
        for i in range(20)
    )
    shards = [str(path) for path in write_shards(rows, folder, "val")]
    Dataset.write(folder, "captioned", [SourceInfo("c", "task:retrieval", "val", shards, 20)], {})
    return folder


@pytest.mark.parametrize("mode", most_are_slow(("vqa", "match"), "vqa"))
def test_a_graph_costs_nothing_beside_itself_and_something_beside_another(
    mode, runs, asked, tmp_path
):
    run, place = runs[mode].run, asked
    if mode != "vqa":
        place = tmp_path
        write_graph(run, MODES[mode], place / MODEL)
        quantise(place / MODEL, place / INT8)
    own, other = Graph(place / MODEL), Graph(place / INT8)
    folders = run.config.data
    if mode == "match":
        folders = (str(write_captioned(tmp_path / "data")),)
    nothing = measure_cost(run, MODES[mode], {"float32": own, "int8": own}, folders, 16)
    something = measure_cost(run, MODES[mode], {"float32": own, "int8": other}, folders, 16)
    assert nothing["samples"] == something["samples"] > 1
    for row in nothing["figures"].values():
        assert row["int8"] == pytest.approx(row["float32"], abs=1e-6)
    assert nothing["figures"].keys() == something["figures"].keys()
    if mode == "match":  # shares of few samples may well be the same
        assert nothing["figures"] != something["figures"]


def test_outputs_that_differ_are_told_apart(runs):
    first, other = np.eye(3, 4, dtype=np.float32), np.eye(3, 4, k=1, dtype=np.float32)
    batch = next(held_out(runs["fill"].run, MODES["fill"], "val", 3, []))

    def seen(name: str, one: np.ndarray, two: np.ndarray) -> dict[str, float]:
        found = looked_at(batch, {name: one}, {name: two})
        return {figure: float(values.mean()) for figure, values in found.items()}

    assert seen("vector", first, 2 * first) == {"cosine with float32": 1.0}
    assert seen("vector", first, other) == {"cosine with float32": 0.0}
    assert seen("logits", first, first) == {"same first answer": 1.0}
    assert seen("logits", first, other) == {"same first answer": 0.0}
    right = np.eye(120, dtype=np.float32)[batch.words]
    assert seen("probabilities", right, right) == {"hidden words right": 1.0}
    assert seen("probabilities", 1 - right, right) == {"hidden words right": 0.0}


def test_accuracy_by_the_graph_is_accuracy_by_torch(runs, tmp_path):
    run = runs["classify"].run
    assert isinstance(run, TaskRun)
    write_graph(run, MODES["classify"], tmp_path / "a.onnx")
    graph = Graph(tmp_path / "a.onnx")
    graphs = {"float32": graph, "int8": graph}
    cost = measure_cost(run, MODES["classify"], graphs, run.config.data, 0)
    wanted = evaluate_task(run)["figures"]["top1"]["value"]
    assert 0 < wanted < 1
    assert cost["figures"]["top1"]["float32"] == pytest.approx(wanted, abs=1e-9)


def test_int8_without_data_to_measure_it_on_is_refused(runs, tmp_path):
    run = runs["classify"]
    gone = replace(run.run, config=replace(run.run.config, data=("nowhere/at-all",)))
    with pytest.raises(InputError, match="nowhere/at-all.*--data"):
        export_onnx(Predictor(gone, "f" * 64), tmp_path / "out", "classify", int8=True)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ the command


def test_the_command_writes_what_it_says(tmp_path, capsys):
    task_run(tmp_path / "run", "classification")
    words = ["export", "onnx", str(tmp_path / "run"), str(tmp_path / "out"), "--mode", "classify"]
    assert main([*words, "--image-size", "16"]) == 0
    said = capsys.readouterr().out
    assert "model.onnx" in said and "of torch (limit 1e-04) for 1, 3, 5 samples" in said
    assert json.loads((tmp_path / "out/preprocessor.json").read_text())["image_size"] == [16, 16]
    # Nothing of the machine is in the folder.
    for file in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--mode", "segment"], 78, "invalid choice"),
        (["--mode", "vqa"], 78, "--mode vqa"),
        (["--mode", "classify", "--image-size", "20"], 78, "multiple of the patch, 8"),
        (["--mode", "classify", "--image-size", "8", "8", "8"], 78, "found 3"),
        (["--mode", "classify", "--image-size", "1024"], 78, "16384 patches"),
        (["--mode", "classify", "--image-size", "-8"], 78, "multiple of the patch"),
        (["--mode", "classify", "--data", "x"], 78, "--int8"),
        (["--mode", "classify", "--int8", "--samples", "-1"], 78, "found -1"),
        (["--mode", "classify", "--int8", "--data", "x"], 66, "x is not there"),
        ([], 78, "--mode"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage_is_refused_and_writes_nothing(words, code, said, tmp_path, capsys):
    task_run(tmp_path / "run", "classification")
    out = tmp_path / "out"
    assert main(["export", "onnx", str(tmp_path / "run"), str(out), *words]) == code
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_with_something_else_is_kept(runs, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="holds something else"):
        export_onnx(runs["image"], tmp_path / "mine", "image")
    assert (tmp_path / "mine/letter.txt").read_text() == "dear"


@pytest.mark.parametrize("words", [[], ["onyx"], ["--mode", "image"]], ids=str)
def test_an_unknown_kind_of_export_names_those_that_are(words, capsys):
    assert main(["export", *words]) == 78
    assert "hf, onnx" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["hf", "onnx"])
def test_each_kind_of_export_explains_itself(kind, capsys):
    assert main(["export", kind, "--help"]) == 0
    assert f"vlbeit export {kind}" in capsys.readouterr().out


def test_without_the_extra_the_command_names_it(tmp_path, capsys, monkeypatch):
    task_run(tmp_path / "run", "classification")
    monkeypatch.delitem(sys.modules, "vlbeit.serve.onnx_session", raising=False)
    monkeypatch.delitem(sys.modules, "vlbeit.serve.onnx_cost", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    words = [str(tmp_path / "run"), str(tmp_path / "out"), "--mode", "classify"]
    assert main(["export", "onnx", *words]) == 78
    assert "vlbeit[export]" in capsys.readouterr().err


def test_one_side_makes_a_square():
    assert size_of([]) is None and size_of([32]) == (32, 32) and size_of([32, 48]) == (32, 48)


def test_the_check_asks_at_the_shortest_and_the_longest_text_and_no_traced_shape(runs, asked):
    run = runs["vqa"].run
    checked = check_graph(asked / MODEL, Graph(asked / MODEL), run, MODES["vqa"], run)
    assert checked.difference <= LIMIT
    longest = run.config.model.text_positions
    assert {words for _, words in checked.shapes} == {3, longest // 2, longest}
    assert TRACED[0] not in {batch for batch, _ in checked.shapes}
