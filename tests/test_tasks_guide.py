"""docs/tasks.md: the task that the page builds is made of its own code, trained and evaluated."""

import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import vlbeit.config
import vlbeit.recipes
from document_blocks import blocks_of, commands
from tiny_run import grey_png
from tiny_tasks import MODEL, write_start
from toy_run import training_here
from vlbeit.cli import main
from vlbeit.config import TextTokenizerConfig
from vlbeit.data.dataset import Dataset, SourceInfo
from vlbeit.data.records import write_shards
from vlbeit.tasks import TASKS
from vlbeit.tokens.text import train_text_tokenizer


@pytest.fixture
def blocks(root: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (root / "docs/tasks.md").read_text(), re.DOTALL)


@pytest.fixture
def installed(blocks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's code, where the page says it stands; gone after the test."""
    settings, task, recipe = blocks
    monkeypatch.setattr(vlbeit.config, "FINETUNE_CONFIGS", dict(vlbeit.config.FINETUNE_CONFIGS))
    for name in ("vlbeit.cli", "vlbeit.recipes"):  # what was imported by name
        module = sys.modules[name]
        if hasattr(module, "FINETUNE_CONFIGS"):
            monkeypatch.setattr(module, "FINETUNE_CONFIGS", vlbeit.config.FINETUNE_CONFIGS)
    space = dict(vars(vlbeit.config))
    exec(compile(settings, "docs/tasks.md: settings", "exec"), space)
    module = types.ModuleType("counting_of_the_guide")
    exec(compile(task, "docs/tasks.md: task", "exec"), vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(TASKS, "counting", module.__name__)
    recipes = dict(vars(vlbeit.recipes)) | {"CountingRun": space["CountingRun"]}
    recipes["FINETUNE"] = added = {}
    exec(compile(recipe, "docs/tasks.md: recipe", "exec"), recipes)
    monkeypatch.setitem(vlbeit.recipes.FINETUNE, "counting", added["counting"])


@pytest.fixture(autouse=True)
def process_as_before():
    with training_here():
        yield


def write_counting(folder: Path) -> Path:
    """The brighter the picture, the larger the count; record 3 is bad."""

    def rows(first: int, count: int):
        for i in range(first, first + count):
            number = int(np.random.default_rng(i).integers(0, 4))
            body = {"phrase": "things here", "count": 99 if i == 3 else number}
            yield f"{i:03d}", {"png": grey_png(20 + 70 * number), "json": json.dumps(body).encode()}

    def shards(stem: str, made) -> list[str]:
        return [str(path) for path in write_shards(made, folder, stem)]

    line = "things here and there"
    text = {"txt": f"{line}\n".encode() * 200}
    Dataset.write(
        folder,
        "counting",
        [
            SourceInfo("counting", "task:counting", "train", shards("train", rows(0, 200)), 200),
            SourceInfo("counting", "task:counting", "val", shards("val", rows(200, 60)), 60),
            SourceInfo("words", "text", "train", shards("words", [("0", text)]), 1),
        ],
    )
    tokenizer = TextTokenizerConfig(kind="wordpiece", vocab=80)
    train_text_tokenizer([line] * 200, tokenizer).save(folder)
    return folder


def test_the_task_of_the_guide_is_trained_and_evaluated_by_its_commands(
    installed, root, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    found = blocks_of("docs/tasks.md", (root / "docs/tasks.md").read_text())
    (shown,) = [block for block in found if block.language == "bash"]
    train, evaluate = (list(command.vlbeit or ()) for command in commands(shown))
    write_start(Path("runs/tiny"), write_counting(tmp_path / "data/counting"), MODEL)
    words = ["--device", "cpu", "--precision", "fp32", "--runtime.threads", "1"]
    assert main([*train, *words, "--log.eval-every", "0"]) == 0
    told = capsys.readouterr().out
    assert "counting, tiny" in told
    skips = Path("runs/tiny-counting/skips.jsonl").read_text()
    assert '"count\\" is 99; counting.largest is 9' in skips
    assert main([*evaluate, "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == 60
    exact = found["figures"]["exact"]
    assert exact["value"] > 0.6 > 0.5 > exact["baseline"]["value"]
    assert exact["gain"]["low"] > 0


def test_the_page_names_places_that_exist(root):
    page = (root / "docs/tasks.md").read_text()
    for place in re.findall(r"\]\((\.\./[^)]+)\)", page):
        assert (root / "docs" / place.replace("\\_", "_")).is_file(), place
    assert "CONFIGS" in (root / "tests/tiny_tasks.py").read_text()
