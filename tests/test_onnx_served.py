"""The server answers as the exported graphs do: 500 mixed requests, alone and together."""

import copy
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from tokenizers import Tokenizer

from serving import Running, running, served_of_all_tasks
from test_serve import asked_together, close, made_request, moved
from toy_tasks import write_tasks
from vlbeit.data.transforms import decode_image, plain
from vlbeit.jsonfile import read_json
from vlbeit.serve.export_onnx import export_onnx
from vlbeit.serve.onnx_graph import MODES
from vlbeit.serve.served_runs import ServedRuns

TOLERANCE = 1e-4
GRAPHS = {
    "encode_image": ("image",),
    "encode_text": ("text",),
    "encode_pair": ("pair",),
    "fill_words": ("fill", "fill-text"),
    "answer": ("vqa",),
    "classify": ("classify",),
    "compare": ("compare",),
    "entail": ("entail",),
    "match": ("match",),
}
"""The graphs that answer a mode of the server; its other modes draw, or have none."""

# Ten graphs are traced first: half a minute of a core, more where others want it too.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Exported:
    """An exported folder, asked by JSON, NumPy, tokenizers and onnxruntime.

    Pictures are squashed as the server does it: Pillow's kernel is a level off ours in places.
    """

    def __init__(self, folder: Path) -> None:
        self.facts = read_json(folder / "preprocessor.json")
        self.labels = folder / "labels.json"
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
        if "words" in self.facts["inputs"]:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def pixels(self, encoded: bytes) -> np.ndarray:
        return plain(decode_image(encoded), tuple(self.facts["image_size"]))[None]

    def words(self, text: str) -> np.ndarray:
        if not self.facts["mode"].startswith("fill"):
            ids = self.tokenizer.encode(text).ids[: self.facts["text_length"] - 2]
        else:
            parts = [self.tokenizer.encode(part.strip()).ids for part in text.split("[MASK]")]
            ids = [*parts[0], *(i for part in parts[1:] for i in (4, *part))]
        return np.array([[2, *ids, 3]], dtype=np.int64)

    def ask(self, text: str | None, pictures: Mapping[str, bytes]) -> dict[str, np.ndarray]:
        """The outputs' rows of one question, by name, and its words."""
        given = {name: self.pixels(encoded) for name, encoded in pictures.items()}
        if text is not None:
            given["words"] = self.words(text)
            given["word_valid"] = np.ones_like(given["words"], dtype=bool)
        rows = [output[0] for output in self.session.run(None, given)]
        found = dict(zip(self.facts["outputs"], rows, strict=True))
        return found | {"words": given["words"][0]} if text is not None else found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedRuns:
    data = write_tasks(tmp_path_factory.mktemp("data") / "shades")
    return served_of_all_tasks(data, tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def server(served: ServedRuns) -> Iterator[Running]:
    with running(served) as found:
        yield found


@pytest.fixture(scope="module")
def graphs(served: ServedRuns, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """Of the very run that answers the mode at the server."""
    folder = tmp_path_factory.mktemp("exports")
    for mode, names in GRAPHS.items():
        for name in names:
            assert MODES[name].method == mode
            export_onnx(served.answering[mode], folder / name, name)
    return {name: Exported(folder / name) for names in GRAPHS.values() for name in names}


def from_graph(graphs: Mapping[str, Exported], mode: str, fields: Mapping[str, Any]) -> Any:
    """The server's answer as the graph gives it."""
    pictures = {
        {"image": "pixels"}.get(name, name): value
        for name, value in fields.items()
        if isinstance(value, bytes)
    }
    texts = [v for name, v in fields.items() if isinstance(v, str)]
    graph = graphs[GRAPHS[mode][0 if pictures or len(GRAPHS[mode]) == 1 else 1]]
    found = graph.ask(texts[0] if texts else None, pictures)
    top = fields.get("top", 5)
    if "vector" in found:
        return {"vector": (found["vector"] / np.linalg.norm(found["vector"])).tolist()}
    if mode == "match":
        return {name: float(found[name]) for name in ("similarity", "probability")}
    shares = found["probabilities"]
    if mode == "compare":
        return {"true": bool(shares[1] > 0.5), "probability": float(shares[1])}
    if mode == "entail":
        return dict(zip(("entailment", "neutral", "contradiction"), shares.tolist(), strict=True))
    if mode == "fill_words":
        return [
            [
                (graph.tokenizer.id_to_token(int(i)), float(row[i]))
                for i in np.argsort(-row, kind="stable")[:top]
            ]
            for row in shares[found["words"] == 4]
        ]
    names = json.loads(graph.labels.read_text())
    order = np.argsort(-shares, kind="stable")[:top]
    return {"answers": [{"name": names[i], "probability": float(shares[i])} for i in order]}


def comparable(mode: str, found: dict[str, Any]) -> Any:
    if mode == "fill_words":
        return [[(one["piece"], one["probability"]) for one in row] for row in found["guesses"]]
    return found


def test_500_mixed_answers_of_the_server_equal_those_of_the_graphs_alone_and_together(
    server, graphs
):
    draw = random.Random(11)
    modes = [list(GRAPHS)[number % len(GRAPHS)] for number in range(500)]
    requests = [(mode, made_request(mode, draw)) for mode in modes]
    expected = [from_graph(graphs, mode, fields) for mode, fields in requests]
    with server.client() as client:
        for number, ((mode, fields), wanted) in enumerate(zip(requests, expected, strict=True)):
            said = comparable(mode, client.ask(mode, fields).json())
            assert close(said, wanted, TOLERANCE), (mode, said, wanted)
            # The comparison would see a difference of twice what it lets pass.
            if number < 3 * len(GRAPHS) and isinstance(wanted, dict):
                other = copy.deepcopy(wanted)
                assert moved(other) and moved(other) and not close(said, other, TOLERANCE)
    before = {mode: server.batches(mode) for mode in GRAPHS}
    # Requests of a mode side by side, so that they do meet in the queue.
    order = sorted(range(500), key=lambda number: modes[number])
    together = asked_together(server, [requests[number] for number in order], clients=16)
    for number, found in zip(order, together, strict=True):
        said = comparable(modes[number], found)
        assert close(said, expected[number], TOLERANCE), (modes[number], said, expected[number])
    new = [np.subtract(server.batches(mode), before[mode]) for mode in GRAPHS]
    assert sum(batches for batches, _ in new) < 0.8 * sum(asked for _, asked in new) == 0.8 * 500
