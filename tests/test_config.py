"""Laws of the config tree: what goes in comes out, and what does not exist is refused by name."""

import dataclasses
import json
import typing
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from vlbeit.config import (
    ModelConfig,
    PretrainConfig,
    TokenizerRunConfig,
    digest,
    from_dict,
    to_dict,
)
from vlbeit.errors import ConfigError

KINDS = (PretrainConfig, TokenizerRunConfig)


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Any value that a field with this type may hold."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return trees(hint)
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin is tuple and args[1] is Ellipsis:
        return st.lists(values_of(args[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values_of, args))
    if origin is dict:
        return st.dictionaries(values_of(args[0]), values_of(args[1]), max_size=3)
    return {
        bool: st.booleans(),
        int: st.integers(-(2**40), 2**40),
        float: st.floats(allow_nan=False).map(lambda x: x + 0.0),  # -0.0 equals 0.0, its text not
        str: st.text(
            st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Z")), max_size=9
        ),
    }[hint]


def trees(kind: Any) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(kind)
    fields = {f.name: values_of(hints[f.name]) for f in dataclasses.fields(kind)}
    return st.builds(kind, **fields)


def leaves(config: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Path -> type of every setting of the tree."""
    hints = typing.get_type_hints(type(config))
    found: dict[tuple[str, ...], Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= leaves(value, (*path, field.name))
        else:
            found[(*path, field.name)] = hints[field.name]
    return found


def nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    for name in reversed(path):
        value = {name: value}
    return value


PRETRAIN = PretrainConfig(recipe="x")
LEAVES = leaves(PRETRAIN)


@given(st.one_of(*map(trees, KINDS)))
def test_a_tree_survives_dict_json_and_yaml(config):
    plain = to_dict(config)
    for again in (plain, json.loads(json.dumps(plain)), yaml.safe_load(yaml.safe_dump(plain))):
        assert from_dict(type(config), again) == config
    assert digest(from_dict(type(config), plain)) == digest(config)


@given(st.sampled_from(sorted(LEAVES)), st.data())
def test_one_setting_changes_one_leaf_and_nothing_else(path, data):
    value = data.draw(values_of(LEAVES[path]))
    config = from_dict(PretrainConfig, nested(path, value), start=PRETRAIN)
    changed = to_dict(config)
    expected: Any = to_dict(PRETRAIN)
    at = expected
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = list(value) if isinstance(value, tuple) else value
    assert changed == expected
    assert (digest(config) == digest(PRETRAIN)) == (expected == to_dict(PRETRAIN))


@given(st.sampled_from(sorted(LEAVES)), st.data())
def test_an_unknown_key_is_refused_with_its_path_and_the_nearest_name(path, data):
    name = path[-1]
    at = data.draw(st.integers(0, len(name)))
    typo = name[:at] + data.draw(st.sampled_from("xqz")) + name[at:]
    with pytest.raises(ConfigError) as caught:
        from_dict(PretrainConfig, nested((*path[:-1], typo), 1), start=PRETRAIN)
    message = str(caught.value)
    assert f"unknown setting {'.'.join((*path[:-1], typo))}" in message
    if len(name) > 3:  # of very short names another may be nearer
        assert f"did you mean {'.'.join(path)}?" in message
    assert caught.value.exit_code == 78


WRONG = {
    bool: ["yes", 1, None, 0.5],
    int: ["3", 2.0, True, None, [1]],
    float: ["fast", True, None, [0.1]],
    str: [3, True, None, ["a"]],
}


@given(st.sampled_from(sorted(LEAVES)), st.data())
def test_a_value_of_the_wrong_type_is_refused_with_its_path(path, data):
    hint = LEAVES[path]
    value = data.draw(st.sampled_from(WRONG.get(hint, [3, "nonsense", {"a": "b"}, None])))
    with pytest.raises(ConfigError, match=r"\.".join(path)):
        from_dict(PretrainConfig, nested(path, value), start=PRETRAIN)


def test_a_wrong_item_of_a_tuple_is_named_by_its_place():
    with pytest.raises(ConfigError, match=r"optim\.betas\.1"):
        from_dict(PretrainConfig, {"optim": {"betas": [0.9, "high"]}}, start=PRETRAIN)
    with pytest.raises(ConfigError, match=r"model\.image_size: expected 2 values, found 3"):
        from_dict(PretrainConfig, {"model": {"image_size": [1, 2, 3]}}, start=PRETRAIN)


def test_a_tree_without_its_recipe_is_refused_and_says_so():
    with pytest.raises(ConfigError, match="recipe"):
        from_dict(PretrainConfig, {})


def test_the_exponent_that_yaml_reads_as_text_is_still_a_number():
    values = yaml.safe_load("layer_scale: 3e-4")
    assert values == {"layer_scale": "3e-4"}  # YAML 1.1 wants 3.0e-4: this is the trap
    assert from_dict(ModelConfig, values).layer_scale == 3e-4


def test_a_start_is_kept_where_nothing_is_said():
    start = dataclasses.replace(PRETRAIN, model=ModelConfig(width=32, layers=3))
    config = from_dict(PretrainConfig, {"model": {"layers": 5}}, start=start)
    assert (config.model.width, config.model.layers) == (32, 5)
    assert start.model.layers == 3


def test_every_setting_is_a_type_that_yaml_can_hold():
    # The other tests draw values by type; a new kind of type must not slip by them.
    for kind in KINDS:
        for path, hint in leaves(kind(recipe="x")).items():
            plain = typing.get_origin(hint) or hint
            assert plain in (bool, int, float, str, tuple, dict, typing.Literal), path
