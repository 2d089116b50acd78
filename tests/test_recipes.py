"""Recipes are complete and say how to run them; `base` holds the paper's numbers (section 3.1)."""

from dataclasses import replace

import pytest

from vlbeit.config import PretrainConfig, finetune_config, from_dict, to_dict
from vlbeit.nn.model import VLBeit
from vlbeit.recipes import FINETUNE, PRETRAIN, base, large, small, tiny
from vlbeit.train.opening import flat
from vlbeit.validate import validate_finetune

every_recipe = pytest.mark.parametrize("name", PRETRAIN)


@every_recipe
def test_a_recipe_knows_its_own_name_and_folder(name):
    config = PRETRAIN[name]()
    assert config.recipe == name
    assert config.run_dir == f"runs/{name}"
    assert config.data == ()


@every_recipe
def test_a_recipe_says_with_which_command_it_runs(name):
    told = PRETRAIN[name].__doc__ or ""
    assert f"vlbeit pretrain {name} --data" in told


@every_recipe
def test_a_recipe_survives_its_own_config_file(name):
    config = PRETRAIN[name]()
    assert from_dict(PretrainConfig, to_dict(config)) == config
    assert PRETRAIN[name]() == config  # nothing that one caller could change for the next


@every_recipe
def test_the_tokenizers_that_a_recipe_trains_fit_its_model(name):
    config = PRETRAIN[name]()
    visual = config.tokenizers.train_visual
    assert visual.codes == config.model.codes
    assert visual.patch == config.model.patch
    assert visual.image_size == config.model.image_size
    assert config.tokenizers.train_text.vocab == config.model.vocab


@every_recipe
def test_a_recipes_schedule_ends_with_its_run(name):
    config = PRETRAIN[name]()
    assert config.optim.total_steps == config.max_steps
    assert config.optim.warmup_steps < config.max_steps / 10
    assert config.save_every <= config.max_steps


@every_recipe
def test_a_recipe_hides_what_the_paper_hides(name):
    config = PRETRAIN[name]()
    assert (config.masking.text, config.masking.pair_text) == (0.15, 0.50)
    assert (config.masking.to_mask, config.masking.to_random) == (0.8, 0.1)
    assert config.masking.image == 75 / 196
    rows, columns = (side // config.model.patch for side in config.model.image_size)
    hidden = round(config.masking.image * rows * columns)
    assert 0.35 < hidden / (rows * columns) < 0.42  # "40 %", block-wise
    assert config.masking.min_block <= hidden


PAPER = {
    "model.layers": 12,
    "model.width": 768,
    "model.heads": 12,
    "model.ffn": 3072,
    "model.image_size": [224, 224],
    "model.patch": 16,
    "model.vocab": 64_000,
    "model.codes": 8192,
    "model.drop_path": 0.1,
    "tokenizers.train_text.vocab": 64_000,
    "tokenizers.train_text.kind": "unigram",
    "tokenizers.train_visual.codes": 8192,
    "masking.text": 0.15,
    "masking.pair_text": 0.50,
    "masking.to_mask": 0.8,
    "masking.to_random": 0.1,
    "batch.images": 2048,
    "batch.texts": 2048,
    "batch.pairs": 2048,
    "max_steps": 480_000,
    "optim.total_steps": 480_000,
    "optim.warmup_steps": 10_000,
    "optim.schedule": "cosine",
    "optim.lr": 2e-3,
    "optim.betas": [0.9, 0.999],
    "optim.weight_decay": 0.05,
    "objective.mlm": 1.0,
    "objective.mim": 1.0,
    "objective.mvlm_text": 1.0,
    "objective.mvlm_image": 1.0,
    "objective.mvlm": "two_views",
}
"""What VL-BEiT (2206.01127v2, sections 2.1 to 3.1 and figure 1c) gives for its base model."""


@pytest.mark.parametrize("setting", PAPER)
def test_base_has_the_papers_number(setting):
    assert flat(to_dict(base()))[setting] == PAPER[setting]


def test_base_hides_75_of_196_patches():
    model, masking = base().model, base().masking
    patches = (model.image_size[0] // model.patch) * (model.image_size[1] // model.patch)
    assert patches == 196 and round(masking.image * patches) == 75
    assert round(replace(masking, image=0.40).image * patches) != 75  # the count is BEiT's, not .40


def test_where_the_paper_is_silent_base_takes_its_kin():
    model, optim, images = base().model, base().optim, base().input.images
    assert (model.vl_layers, model.layer_scale, model.relative_bias) == (2, 0.1, "none")
    assert (optim.eps, optim.clip, optim.min_lr) == (1e-8, 3.0, 1e-5)
    assert (images.scale, images.flip, images.jitter) == ((0.08, 1.0), 0.5, 0.4)
    assert (base().input.text_length, base().input.pair_text_length) == (196, 64)


def test_base_is_made_of_the_defaults():
    assert base() == PretrainConfig(recipe="base", run_dir="runs/base")


def test_large_is_base_but_for_the_size_of_its_model():
    one, other = flat(to_dict(base())), flat(to_dict(large()))
    differ = {name: other[name] for name in one if one[name] != other[name]}
    assert differ == {
        "recipe": "large",
        "run_dir": "runs/large",
        "model.width": 1024,
        "model.layers": 24,
        "model.heads": 16,
        "model.ffn": 4096,
        "model.vl_layers": 3,
        "model.layer_scale": 1e-5,
    }
    assert one.keys() == other.keys()


def test_the_recipes_of_a_cpu_are_ordered_by_size():
    sizes = [recipe().model for recipe in (tiny, small, base, large)]
    for field in ("width", "layers", "ffn", "vocab", "codes"):
        found = [getattr(model, field) for model in sizes]
        assert found == sorted(found), field


def test_tiny_has_the_parameters_that_its_docstring_claims():
    count = sum(p.numel() for p in VLBeit(tiny().model).parameters())
    assert f"{count / 1e6:.1f} M parameters" in (tiny.__doc__ or "")


# ------------------------------------------------------------------ fine-tuning

TASK_RECIPES = [(task, name) for task in FINETUNE for name in FINETUNE[task]]
every_task_recipe = pytest.mark.parametrize(("task", "name"), TASK_RECIPES)


@every_task_recipe
def test_a_task_recipe_is_complete_and_survives_its_own_config_file(task, name):
    config = FINETUNE[task][name]()
    assert (config.task, config.recipe, config.run_dir) == (task, name, f"runs/{name}-{task}")
    assert finetune_config(to_dict(config)) == config
    validate_finetune(replace(config, start="somewhere", data=("somewhere",)))
    assert config.optim.total_steps == config.max_steps
    assert config.optim.warmup_steps <= config.max_steps / 5
    assert f"vlbeit finetune {task} {name} --start" in (FINETUNE[task][name].__doc__ or "")


@every_task_recipe
def test_a_task_recipes_model_is_that_of_pretraining_but_for_what_a_task_may_set(task, name):
    one, other = FINETUNE[task][name]().model, PRETRAIN[name]().model
    free = {"image_size": other.image_size, "drop_path": other.drop_path}
    assert replace(one, **free, text_positions=other.text_positions) == other


KIN = {
    "vqa": {
        "model.image_size": [480, 480],
        "optim.lr": 3e-5,
        "optim.head_lr": 20.0,
        "batch.size": 128,
        "optim.schedule": "linear",
        "optim.min_lr": 0.0,
        "optim.betas": [0.9, 0.98],
        "optim.eps": 1e-8,
        "optim.weight_decay": 0.01,
        "model.drop_path": 0.15,
        "input.text_length": 40,
        "input.rand_augment.operations": 2,
        "input.rand_augment.magnitude": 7.0,
        "input.crop.scale": [0.5, 1.0],
        "vqa.min_count": 9,
    },
    "classification": {
        "model.image_size": [224, 224],
        "optim.lr": 4e-3,
        "batch.size": 1024,
        "optim.layer_decay": 0.65,
        "optim.weight_decay": 0.05,
        "optim.clip": 3.0,
        "model.drop_path": 0.1,
        "classification.mixup": 0.8,
        "classification.cutmix": 1.0,
        "classification.label_smoothing": 0.1,
        "classification.erase": 0.25,
        "input.rand_augment.magnitude": 9.0,
        "input.rand_augment.spread": 0.5,
    },
}
"""VLMo's fine-tuning on VQAv2 and BEiT's on ImageNet-1K without the 22K stage; the paper gives the
picture's size only (section 3.2)."""


@pytest.mark.parametrize(("task", "setting"), [(t, s) for t in KIN for s in KIN[t]])
def test_a_base_task_has_the_number_of_its_kin(task, setting):
    assert flat(to_dict(FINETUNE[task]["base"]()))[setting] == KIN[task][setting]
