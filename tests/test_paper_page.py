"""docs/paper.md: every value that it gives for a setting is the one that `base` has."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlbeit.config import PretrainConfig, to_dict
from vlbeit.overrides import parse_config
from vlbeit.recipes import PRETRAIN, base
from vlbeit.validate import validate

PAGE = Path(__file__).resolve().parent.parent / "docs" / "paper.md"


def settings(text: str) -> list[tuple[str, list[str]]]:
    """Name and values of every `name value ...` in the last column of the page's tables."""
    found = []
    for line in text.splitlines():
        if line.startswith("|"):
            for code in re.findall(r"`([^`]+)`", line.rstrip("| ").rsplit("|", 1)[-1]):
                name, *values = code.split()
                if values and re.fullmatch(r"[a-z_.]+", name) and name != "vlbeit":
                    found.append((name, values))
    return found


def value_of(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = config[part]
    return config


def same(said: list[str], value: Any) -> bool:
    """Whether the words give the value."""
    values = value if isinstance(value, list) else [value]
    if len(said) != len(values):
        return False
    for word, one in zip(said, values, strict=True):
        if isinstance(one, str) or isinstance(one, bool):
            if yaml.safe_load(word) != one:
                return False
        elif float(word) != float(one):
            return False
    return True


def wrong(text: str) -> list[str]:
    tree = to_dict(base())
    return [
        f"{name}: the page says {said}, base has {value_of(tree, name)}"
        for name, said in settings(text)
        if not same(said, value_of(tree, name))
    ]


def test_every_value_on_the_page_is_that_of_base():
    text = PAGE.read_text()
    assert len(settings(text)) > 40
    assert wrong(text) == []


@pytest.mark.parametrize(
    ("said", "instead"),
    [
        ("`optim.lr 2e-3`", "`optim.lr 1e-3`"),
        ("`objective.mvlm two_views`", "`objective.mvlm half`"),
        ("`model.image_size 224 224`", "`model.image_size 224`"),
        ("`model.absolute_positions true`", "`model.absolute_positions false`"),
    ],
)
def test_a_wrong_value_is_found(said, instead):
    text = PAGE.read_text()
    assert said in text
    assert len(wrong(text.replace(said, instead))) == 1


def test_the_flags_of_the_ablations_are_a_run():
    rows = re.findall(r"\| `(--objective[^`]+)` \|", PAGE.read_text())
    assert len(rows) == 2
    for row in rows:
        words = ["base", "--data", "data", *row.split()]
        validate(parse_config(PretrainConfig, PRETRAIN, words, command="vlbeit pretrain"))
