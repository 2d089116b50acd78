"""The figures of docs/model.md are what the code draws now, and show what the code does."""

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from run_folders import pretrained_run
from vlbeit.types import Modality

FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures"


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("model_figures", FIGURES / "model_figures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def base(figures):
    return figures.base_model()


def test_the_committed_figures_are_what_is_drawn_now(figures, base):
    assert (FIGURES / "block.svg").read_text() == figures.block_figure(base)
    assert (FIGURES / "routing.svg").read_text() == figures.routing_figure(base)
    drawn, there = figures.masks_figure(), Image.open(FIGURES / "masks.png").convert("RGB")
    assert drawn.size == there.size
    # Another release of the font or the scaler may move a shade, not a patch.
    difference = np.abs(np.asarray(drawn).astype(int) - np.asarray(there).astype(int))
    assert difference.max() <= 16 and difference.mean() < 0.5


def test_the_routing_is_that_of_the_paper_and_its_kin(figures, base):
    image, text, fused = Modality.IMAGE, Modality.TEXT, Modality.FUSED
    assert dict(figures.routing(base)) == {
        "an image alone": [image] * 12,
        "a text alone": [text] * 12,
        "a pair: its text": [text] * 10 + [fused] * 2,
        "a pair: its image": [image] * 10 + [fused] * 2,
    }


def test_a_model_without_vl_experts_gives_another_figure(figures, base, monkeypatch):
    recipe = figures.base()
    without = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, vl_layers=0))
    monkeypatch.setattr(figures, "base", lambda: without)
    other = figures.base_model()
    assert figures.routing_figure(other) != (FIGURES / "routing.svg").read_text()
    assert figures.block_figure(other) != (FIGURES / "block.svg").read_text()


def test_attention_is_drawn_by_any_pretrained_run(figures, tmp_path):
    run = str(pretrained_run(tmp_path / "run"))
    drawn = figures.attention_figure(run, layer=2, caption="red ring")
    assert np.asarray(drawn).std() > 10
