"""The three layers of a run's config (recipe, YAML file, flags) and every way to get them wrong."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from vlbeit.config import InputConfig, LogConfig, ModelConfig, PretrainConfig, from_dict, to_dict
from vlbeit.errors import ConfigError, InputError
from vlbeit.overrides import parse_config, read_yaml, write_yaml

START = PretrainConfig(
    recipe="toy", seed=3, model=ModelConfig(width=32), log=LogConfig(tensorboard=True)
)


def parse(*words: str, start: PretrainConfig = START) -> PretrainConfig:
    recipes = {"toy": lambda: start, "giant": lambda: start}
    return parse_config(PretrainConfig, recipes, words, command="vlbeit pretrain")


def written(folder: Path, text: str) -> str:
    path = folder / "my.yaml"
    path.write_text(text)
    return str(path)


def test_a_recipe_alone_is_the_recipe():
    assert parse("toy") == START


def test_flags_beat_the_file_and_the_file_beats_the_recipe(tmp_path):
    file = written(tmp_path, "seed: 4\nmax_steps: 7\noptim: {lr: 3e-4}")
    config = parse("toy", "--max-steps", "9", "--config", file)
    assert (config.model.width, config.seed, config.optim.lr) == (32, 4, 3e-4)
    assert config.max_steps == 9


def test_the_fixed_flags_of_every_training_command_are_there():
    config = parse(
        *"toy --run-dir r --data a b c --seed 5 --max-steps 6 --save-every 2".split(),
        *"--device cpu --precision fp32".split(),
    )
    assert config == dataclasses.replace(
        START,
        run_dir="r",
        data=("a", "b", "c"),
        seed=5,
        max_steps=6,
        save_every=2,
        device="cpu",
        precision="fp32",
    )


@pytest.mark.parametrize(
    "words", ["--run-dir r", "--run_dir r", "--run-dir=r", "--run_dir=r", "--optim.min-lr 0.5"]
)
def test_hyphens_underscores_and_equal_signs_mean_the_same(words):
    config = parse("toy", *words.split())
    assert config.run_dir == "r" or config.optim.min_lr == 0.5


def test_switches_have_a_no_form():
    assert parse("toy", "--log.no-tensorboard").log.tensorboard is False
    assert parse("toy", "--model.no_absolute_positions").model.absolute_positions is False
    assert parse("toy", "--input.images-from-pairs").input.images_from_pairs is True


def test_weights_of_sources_can_be_set_with_or_without_a_file():
    assert parse("toy", "--input.weights", "flickr8k", "2", "vg", "1").input.weights == {
        "flickr8k": 2.0,
        "vg": 1.0,
    }
    start = dataclasses.replace(START, input=InputConfig(weights={"my_set-1": 1.0}))
    assert parse("toy", "--input.weights.my_set-1", "4", start=start).input.weights == {
        "my_set-1": 4.0
    }


def test_what_print_config_prints_is_the_same_run_again(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("toy", "--optim.lr", "1e-5", "--data", "a", "--print-config")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    config = parse("toy", "--config", written(tmp_path, printed))
    assert config == parse("toy", "--optim.lr", "1e-5", "--data", "a")
    assert from_dict(PretrainConfig, yaml.safe_load(write_yaml(config))) == config


def test_help_lists_every_setting_with_the_recipes_value(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("toy", "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for branch, values in to_dict(START).items():
        for name in values if isinstance(values, dict) else ():
            assert f"--{branch}.{name}".replace("_", "-") in text
    assert "(default: 32)" in text


MISTAKES = {
    "unknown flag": ("toy --optim.lrr 3", "--optim.lrr; did you mean --optim.lr?"),
    "unknown flag without its branch": ("toy --lr 3", "did you mean --optim.lr or"),
    "typo in a top flag": ("toy --max-step 3", "did you mean --max-steps?"),
    "typo with an equal sign": ("toy --sed=3", "--sed; did you mean --seed?"),
    "abbreviation": ("toy --prec bf16", "unknown setting --prec"),
    "unknown recipe": ("toi", "'toi'; did you mean toy?"),
    "no recipe": ("--seed 3", "the recipe comes first"),
    "nothing": ("", "the recipe comes first"),
    "recipe as a flag": ("toy --recipe giant", "first word"),
    "twice": ("toy --seed 1 --seed 2", "twice"),
    "on and off": ("toy --log.tensorboard --log.no-tensorboard", "twice"),
    "text for an int": ("toy --seed x", "--seed"),
    "float for an int": ("toy --batch.images 2.5", "--batch.images"),
    "not a choice": ("toy --device gpu", "'auto', 'cpu', 'cuda'"),
    "too few values": ("toy --optim.betas 0.9", "--optim.betas"),
    "too many values": ("toy --optim.betas 0.9 0.9 0.9", "0.9"),
    "no value": ("toy --seed", "--seed"),
    "a word too many": ("toy big", "big"),
    "a short flag": ("toy -x", "-x"),
    "no file name": ("toy --config", "--config"),
    "two files": ("toy --config a.yaml --config=b.yaml", "a.yaml and b.yaml"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_config_error_that_names_it(mistake, capsys):
    words, named = MISTAKES[mistake]
    with pytest.raises(ConfigError) as caught:
        parse(*words.split())
    assert named in str(caught.value)
    assert caught.value.exit_code == 78
    assert capsys.readouterr() == ("", "")  # the message is the error's, nothing is printed beside


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("optim: {lrr: 1}", "optim.lrr; did you mean optim.lr?"),
        ("seed: one", "seed: expected int, found 'one'"),
        ("seed: 1\nseed: 2", "'seed' is set twice"),
        ("optim:\n  lr: 1\n  lr: 2", "'lr' is set twice"),
        ("a: [1", "not usable as YAML"),
        ("{[1]: 2}", "not usable as YAML"),
        ("", "expected settings"),
        ("- seed", "expected settings"),
        ("recipe: giant", "'giant'"),
        ("a: !!python/object/apply:os.getcwd []", "not usable as YAML"),
    ],
)
def test_a_mistake_in_the_file_names_the_file_and_the_setting(tmp_path, text, named):
    file = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        parse("toy", "--config", file)
    assert named in str(caught.value)
    assert file in str(caught.value)


def test_a_missing_or_binary_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="nowhere.yaml"):
        parse("toy", "--config", str(tmp_path / "nowhere.yaml"))
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"b\.yaml"):
        read_yaml(tmp_path / "b.yaml")
