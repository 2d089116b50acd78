"""A config that cannot work is refused at once: setting, limit and the value found are named."""

import sys
from dataclasses import replace

import pytest

import vlbeit.validate
from toy_run import changed
from vlbeit.config import VisualTokenizerConfig
from vlbeit.errors import ConfigError
from vlbeit.recipes import PRETRAIN, base
from vlbeit.validate import validate, validate_model, validate_tokenizer

READY = replace(base(), data=("somewhere",))

REFUSED: list[tuple[str, object, str]] = [
    # setting, a bad value, the limit and what else the message must say
    *((f"model.{name}", 0, "at least 1") for name in
      ("width", "layers", "heads", "ffn", "patch", "vocab", "codes", "text_positions")),
    ("model.width", 770, "multiple of model.heads (12)"),
    ("model.vl_layers", -1, "0..12 (model.layers)"),
    ("model.vl_layers", 13, "0..12 (model.layers)"),
    ("model.image_size", (224, 230), "multiples of model.patch (16), found 224 x 230"),
    ("model.image_size", (224, 8), "multiples of model.patch (16), found 224 x 8"),
    ("model.drop_path", 1.0, "[0, 1)"),
    ("model.drop_path", -0.1, "[0, 1)"),
    ("model.init_std", 0.0, "above 0 and below 10"),
    ("model.position_std", 10.0, "above 0 and below 10"),
    ("model.layer_scale", -1e-5, ">= 0"),
    ("model.text_norm_eps", 1.0, "[0, 1)"),
    ("tokenizers.train_visual.codes", 1, "at least 2"),
    ("tokenizers.train_visual.width", 97, "multiple of tokenizers.train_visual.heads (12)"),
    ("tokenizers.train_visual.image_size", (224, 41), "tokenizers.train_visual.patch (16)"),
    *((f"tokenizers.train_visual.{name}", 0, "at least 1") for name in
      ("code_width", "width", "heads", "ffn", "patch", "batch")),
    *((f"tokenizers.train_visual.{name}", -1, "at least 0") for name in
      ("layers", "decoder_layers", "kmeans_iterations", "warmup_steps")),
    ("tokenizers.train_visual.decay", 1.0, "(0, 1)"),
    ("tokenizers.train_visual.revive_below", 1.0, "[0, 1)"),
    ("tokenizers.train_visual.pixel_loss", -1.0, "at least 0"),
    ("tokenizers.train_visual.pixel_loss", 0.0, "must be above 0 with the teacher 'pixels'"),
    ("tokenizers.train_visual.commitment", -1.0, "at least 0"),
    ("tokenizers.codes", "some/folder", "scale 1 1, flip 0 and jitter 0"),
    ("tokenizers.train_visual.crop.flip", 2.0, "[0, 1]"),
    ("input.images.scale", (0.0, 1.0), "0 < low <= high <= 1"),
    ("input.images.scale", (0.9, 0.5), "0 < low <= high <= 1, found 0.9, 0.5"),
    ("input.pairs.scale", (0.5, 1.1), "0 < low <= high <= 1"),
    ("input.images.ratio", (0.0, 1.0), "0 < low <= high"),
    ("input.pairs.ratio", (2.0, 1.0), "0 < low <= high"),
    ("input.images.flip", -0.5, "[0, 1]"),
    ("input.pairs.flip", 1.5, "[0, 1]"),
    ("input.images.jitter", 1.0, "[0, 1)"),
    ("input.pairs.jitter", -0.1, "[0, 1)"),
    ("input.text_length", 2, "3..196 (model.text_positions)"),
    ("input.text_length", 197, "3..196 (model.text_positions)"),
    ("input.pair_text_length", 2, "3..196 (model.text_positions)"),
    ("input.pair_text_length", 197, "3..196 (model.text_positions)"),
    ("input.skip_budget", 1.0, "[0, 1)"),
    ("input.skip_budget", -0.01, "[0, 1)"),
    ("input.shuffle_window", 0, "at least 1"),
    ("input.workers", -1, "at least 0"),
    ("input.loader_timeout", 0.0, "above 0"),
    *((f"masking.{name}", value, "(0, 1)") for name in ("text", "pair_text", "image")
      for value in (0.0, 1.0)),
    ("masking.min_block", 0, "at least 1"),
    ("masking.max_aspect", 0.5, "at least 1"),
    ("masking.to_mask", -0.1, "add up to at most 1"),
    ("masking.to_random", -0.1, "add up to at most 1"),
    ("masking.to_random", 0.3, "add up to at most 1, found 0.8 and 0.3"),
    ("batch.images", -1, "at least 0"),
    ("batch.texts", -1, "at least 0"),
    ("batch.pairs", -1, "at least 0"),
    ("batch.micro", 0, "at least 1"),
    *((f"objective.{name}", -0.5, "at least 0")
      for name in ("mlm", "mim", "mvlm_text", "mvlm_image")),
    ("optim.lr", 0.0, "above 0"),
    ("optim.min_lr", -1e-6, "0..0.002 (optim.lr)"),
    ("optim.min_lr", 1.0, "0..0.002 (optim.lr)"),
    ("optim.betas", (0.9, 1.0), "[0, 1)"),
    ("optim.betas", (-0.1, 0.9), "[0, 1)"),
    ("optim.eps", 0.0, "above 0"),
    ("optim.weight_decay", -0.05, "at least 0"),
    ("optim.clip", -1.0, "at least 0"),
    ("optim.warmup_steps", -1, "0..480000 (optim.total_steps)"),
    ("optim.warmup_steps", 480_001, "0..480000 (optim.total_steps)"),
    ("optim.layer_decay", 0.0, "(0, 1]"),
    ("optim.layer_decay", 1.1, "(0, 1]"),
    ("optim.nonfinite_limit", 0, "at least 1"),
    ("max_steps", 0, "at least 1"),
    ("save_every", 0, "at least 1"),
    ("log.every", 0, "at least 1"),
    ("log.print_every", 0, "at least 1"),
    ("log.eval_every", -1, "at least 0"),
    ("log.eval_samples", -1, "at least 0"),
    ("log.keep", -1, "at least 0"),
    ("runtime.threads", -1, "at least 0"),
    ("runtime.exact", 3, "power of two"),
    ("runtime.exact", 4, "found runtime.threads 0"),
    ("runtime.step_timeout", 0.0, "above 0"),
]  # fmt: skip

IN_RANGE: list[tuple[str, object]] = [
    ("model.vl_layers", 0),
    ("model.vl_layers", 12),
    ("model.image_size", (16, 320)),
    ("model.drop_path", 0.99),
    ("model.layer_scale", 0.0),
    ("input.text_length", 3),
    ("input.text_length", 196),
    ("input.skip_budget", 0.0),
    ("input.images.scale", (1.0, 1.0)),
    ("masking.to_random", 0.2),
    ("masking.max_aspect", 1.0),
    ("batch.texts", 0),
    ("optim.warmup_steps", 0),
    ("optim.warmup_steps", 480_000),
    ("optim.min_lr", 2e-3),
    ("optim.clip", 0.0),
    ("optim.layer_decay", 1.0),
    ("optim.nonfinite_limit", 1),
    ("log.eval_every", 0),
    ("log.keep", 0),
    ("max_steps", 1),
]


def named(value: object) -> list[str]:
    """How a message may write a value."""
    return [str(part) for part in value] if isinstance(value, tuple) else [str(value)]


@pytest.mark.parametrize("name", PRETRAIN)
def test_every_recipe_passes_once_it_has_data(name):
    recipe = PRETRAIN[name]()
    validate(replace(recipe, data=("somewhere",)))
    with pytest.raises(ConfigError, match=r"no data: give --data .*`vlbeit prepare`"):
        validate(recipe)


@pytest.mark.parametrize(("setting", "value", "words"), REFUSED, ids=lambda part: str(part))
def test_a_bad_value_is_refused_by_name_with_its_limit(setting, value, words):
    with pytest.raises(ConfigError) as refused:
        validate(changed(READY, {setting: value}))
    told = str(refused.value)
    assert setting in told and words in told, told
    assert all(part in told for part in named(value)), told
    assert refused.value.exit_code == 78


@pytest.mark.parametrize(("setting", "value"), IN_RANGE, ids=lambda part: str(part))
def test_the_last_value_inside_a_limit_passes(setting, value):
    validate(changed(READY, {setting: value}))


def test_not_a_number_is_in_no_range():
    for setting in (
        "optim.lr",
        "optim.clip",
        "masking.image",
        "model.init_std",
        "input.pairs.flip",
    ):
        with pytest.raises(ConfigError, match=f"{setting}.*nan"):
            validate(changed(READY, {setting: float("nan")}))


def test_a_batch_of_nothing_is_refused():
    empty = {"batch.images": 0, "batch.texts": 0, "batch.pairs": 0}
    with pytest.raises(ConfigError, match="images, batch.texts and batch.pairs are all 0"):
        validate(changed(READY, empty))
    for name in empty:
        validate(changed(READY, empty | {name: 1}))


STREAMS = {
    "images": ("mim",),
    "texts": ("mlm",),
    "pairs": ("mvlm_text", "mvlm_image"),
}


@pytest.mark.parametrize("stream", STREAMS)
def test_a_stream_that_no_objective_uses_is_refused_until_its_batch_is_0(stream):
    off = {f"objective.{name}": 0.0 for name in STREAMS[stream]}
    count = getattr(READY.batch, stream)
    with pytest.raises(ConfigError, match=rf"batch.{stream} is {count}, .* set batch.{stream} 0"):
        validate(changed(READY, off))
    validate(changed(READY, off | {f"batch.{stream}": 0}))
    if len(off) > 1:  # one of the two views is use enough
        for name in off:
            validate(changed(READY, off | {name: 1.0}))


def test_a_tokenizer_that_is_given_needs_no_settings_for_its_training():
    bad = {"tokenizers.train_visual.codes": 1}
    validate(changed(READY, bad | {"tokenizers.visual": "codes"}))
    with pytest.raises(ConfigError, match=r"tokenizers\.train_visual\.codes"):
        validate(changed(READY, bad))


def test_a_tokenizers_settings_are_named_as_the_caller_calls_them():
    validate_tokenizer(VisualTokenizerConfig(), "tokenizer")
    with pytest.raises(ConfigError, match=r"^tokenizer\.decay must be in \(0, 1\), found 1\.5"):
        validate_tokenizer(VisualTokenizerConfig(decay=1.5), "tokenizer")


def test_a_model_can_be_checked_alone():
    validate_model(base().model)
    with pytest.raises(ConfigError, match=r"model\.heads must be at least 1, found -3"):
        validate_model(replace(base().model, heads=-3))


EXACT_SHARDS = {"runtime.exact": 4, "runtime.threads": 1, "runtime.sharding": "full"}


def test_an_exact_run_cannot_be_sharded():
    validate(changed(READY, EXACT_SHARDS | {"runtime.sharding": "none"}))
    with pytest.raises(ConfigError, match="choose one of the two"):
        validate(changed(READY, EXACT_SHARDS))


def test_no_rule_is_without_its_bad_value(monkeypatch):
    """Every place in the module that a good config passes is one where a bad config fails."""
    passed, failed = set(), set()

    def recorded(holds: bool, message: str) -> None:
        caller = sys._getframe(1)
        (passed if holds else failed).add((caller.f_code.co_name, caller.f_lineno))
        require(holds, message)

    require = vlbeit.validate.require
    monkeypatch.setattr(vlbeit.validate, "require", recorded)
    validate(READY)
    assert len(passed) > 30 and not failed
    bad = [{setting: value} for setting, value, _ in REFUSED]
    bad += [{f"objective.{name}": 0.0 for name in names} for names in STREAMS.values()]
    bad += [{"batch.images": 0, "batch.texts": 0, "batch.pairs": 0}, {"data": []}, EXACT_SHARDS]
    for settings in bad:
        with pytest.raises(ConfigError):
            validate(changed(READY, settings))
    assert passed - failed == set()
