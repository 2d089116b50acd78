"""Checks of a whole config that no single field can make. Standard library only."""

from vlbeit.config import (
    CropConfig,
    FinetuneConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    VisualTokenizerConfig,
)
from vlbeit.errors import ConfigError

WITHOUT_TEACHER = ("pixels", "random")
"""Values of a tokenizer's `teacher` with which the pixel decoder's loss is the only one."""
WITHOUT_TEXT = ("classification", "segmentation")
"""Tasks whose samples have no text."""


def require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def validate_model(model: ModelConfig) -> None:
    """Sizes that must divide each other and ranges, each named with limit and value found."""
    for name in ("width", "layers", "heads", "ffn", "patch", "vocab", "codes", "text_positions"):
        value = getattr(model, name)
        require(value >= 1, f"model.{name} must be at least 1, found {value}")
    require(
        model.width % model.heads == 0,
        f"model.width must be a multiple of model.heads ({model.heads}), found {model.width}",
    )
    require(
        0 <= model.vl_layers <= model.layers,
        f"model.vl_layers must be 0..{model.layers} (model.layers), found {model.vl_layers}",
    )
    check_size("model.image_size", model.image_size, "model.patch", model.patch)
    require(0 <= model.drop_path < 1, f"model.drop_path must be in [0, 1), found {model.drop_path}")
    check_spread("model.init_std", model.init_std)
    check_spread("model.position_std", model.position_std)
    require(model.layer_scale >= 0, f"model.layer_scale must be >= 0, found {model.layer_scale}")
    require(
        0 <= model.text_norm_eps < 1,
        f"model.text_norm_eps must be in [0, 1), found {model.text_norm_eps}",
    )


def check_spread(name: str, std: float) -> None:
    require(0 < std < 10, f"{name} must be above 0 and below 10, found {std}")


def check_size(name: str, size: tuple[int, int], patch_name: str, patch: int) -> None:
    for pixels in size:
        require(
            pixels >= patch and pixels % patch == 0,
            f"{name} must be multiples of {patch_name} ({patch}), found {size[0]} x {size[1]}",
        )


def check_crop(name: str, crop: CropConfig) -> None:
    low, high = crop.scale
    require(0 < low <= high <= 1, f"{name}.scale must be 0 < low <= high <= 1, found {low}, {high}")
    low, high = crop.ratio
    require(0 < low <= high, f"{name}.ratio must be 0 < low <= high, found {low}, {high}")
    require(0 <= crop.flip <= 1, f"{name}.flip must be in [0, 1], found {crop.flip}")
    require(0 <= crop.jitter < 1, f"{name}.jitter must be in [0, 1), found {crop.jitter}")


def validate_tokenizer(config: VisualTokenizerConfig, name: str) -> None:
    """The training settings of a visual tokenizer."""
    require(config.codes >= 2, f"{name}.codes must be at least 2, found {config.codes}")
    for sized in ("code_width", "width", "heads", "ffn", "patch", "batch"):
        value = getattr(config, sized)
        require(value >= 1, f"{name}.{sized} must be at least 1, found {value}")
    for counted in ("layers", "decoder_layers", "kmeans_iterations", "warmup_steps"):
        value = getattr(config, counted)
        require(value >= 0, f"{name}.{counted} must be at least 0, found {value}")
    require(
        config.width % config.heads == 0,
        f"{name}.width must be a multiple of {name}.heads ({config.heads}), found {config.width}",
    )
    check_size(f"{name}.image_size", config.image_size, f"{name}.patch", config.patch)
    require(0 < config.decay < 1, f"{name}.decay must be in (0, 1), found {config.decay}")
    require(
        0 <= config.revive_below < 1,
        f"{name}.revive_below must be in [0, 1), found {config.revive_below}",
    )
    for weight in ("pixel_loss", "commitment"):
        value = getattr(config, weight)
        require(value >= 0, f"{name}.{weight} must be at least 0, found {value}")
    require(
        config.pixel_loss > 0 or config.teacher not in WITHOUT_TEACHER,
        f"{name}.pixel_loss must be above 0 with the teacher {config.teacher!r}, found "
        f"{config.pixel_loss}: nothing else is left to learn",
    )
    check_crop(f"{name}.crop", config.crop)


def validate(config: PretrainConfig) -> None:
    """Raise ConfigError for the first setting of a pretraining run that cannot work."""
    model, masking, batch, optim = config.model, config.masking, config.batch, config.optim
    validate_model(model)
    if not config.tokenizers.visual:
        validate_tokenizer(config.tokenizers.train_visual, "tokenizers.train_visual")
    check_crop("input.images", config.input.images)
    check_crop("input.pairs", config.input.pairs)
    require(
        not config.tokenizers.codes or bool(fixed_streams(config)),
        f"tokenizers.codes: found {config.tokenizers.codes}, but no stream that predicts codes "
        "shows whole pictures: set scale 1 1, flip 0 and jitter 0 in input.images or input.pairs, "
        "or leave tokenizers.codes out",
    )
    for name in ("text_length", "pair_text_length"):
        length = getattr(config.input, name)
        require(
            3 <= length <= model.text_positions,
            f"input.{name} must be 3..{model.text_positions} (model.text_positions), "
            f"found {length}",
        )
    for name in ("text", "pair_text", "image"):
        share = getattr(masking, name)
        require(0 < share < 1, f"masking.{name} must be in (0, 1), found {share}")
    require(
        masking.to_mask >= 0
        and masking.to_random >= 0
        and masking.to_mask + masking.to_random <= 1,
        "masking.to_mask and masking.to_random must be >= 0 and add up to at most 1, found "
        f"{masking.to_mask} and {masking.to_random}",
    )
    require(
        masking.min_block >= 1, f"masking.min_block must be at least 1, found {masking.min_block}"
    )
    require(
        masking.max_aspect >= 1,
        f"masking.max_aspect must be at least 1, found {masking.max_aspect}",
    )
    for name in ("images", "texts", "pairs"):
        size = getattr(batch, name)
        require(size >= 0, f"batch.{name} must be at least 0, found {size}")
    require(
        batch.images + batch.texts + batch.pairs > 0,
        "batch.images, batch.texts and batch.pairs are all 0: nothing to train on",
    )
    require(batch.micro >= 1, f"batch.micro must be at least 1, found {batch.micro}")
    for name in ("mlm", "mim", "mvlm_text", "mvlm_image"):
        weight = getattr(config.objective, name)
        require(weight >= 0, f"objective.{name} must be at least 0, found {weight}")
    for stream, size, used in (
        ("images", batch.images, config.objective.mim),
        ("texts", batch.texts, config.objective.mlm),
        ("pairs", batch.pairs, config.objective.mvlm_text + config.objective.mvlm_image),
    ):
        require(
            size == 0 or used > 0,
            f"batch.{stream} is {size}, but the weight of its objective is 0: set batch.{stream} 0",
        )
    validate_optim(optim)
    validate_run(config)


def coded_streams(config: PretrainConfig) -> dict[str, CropConfig]:
    """The crops of the streams in which some objective predicts visual codes."""
    found: dict[str, CropConfig] = {}
    if config.batch.images > 0 and config.objective.mim > 0:
        found["image"] = config.input.images
    if config.batch.pairs > 0 and config.objective.mvlm_image > 0:
        found["pair"] = config.input.pairs
    return found


def fixed_streams(config: PretrainConfig) -> list[str]:
    """Those of them that show every record the same way each time: their codes can be stored."""
    return [stream for stream, crop in coded_streams(config).items() if crop.fixed]


def validate_optim(optim: OptimConfig) -> None:
    """AdamW's settings and the schedule."""
    require(optim.lr > 0, f"optim.lr must be above 0, found {optim.lr}")
    require(
        0 <= optim.min_lr <= optim.lr,
        f"optim.min_lr must be 0..{optim.lr} (optim.lr), found {optim.min_lr}",
    )
    require(
        all(0 <= beta < 1 for beta in optim.betas),
        f"optim.betas must be in [0, 1), found {optim.betas[0]} and {optim.betas[1]}",
    )
    require(optim.eps > 0, f"optim.eps must be above 0, found {optim.eps}")
    for name in ("weight_decay", "clip"):
        value = getattr(optim, name)
        require(value >= 0, f"optim.{name} must be at least 0, found {value}")
    require(
        optim.nonfinite_limit >= 1,
        f"optim.nonfinite_limit must be at least 1, found {optim.nonfinite_limit}",
    )
    require(
        0 <= optim.warmup_steps <= optim.total_steps,
        f"optim.warmup_steps must be 0..{optim.total_steps} (optim.total_steps), "
        f"found {optim.warmup_steps}",
    )
    require(
        0 < optim.layer_decay <= 1,
        f"optim.layer_decay must be in (0, 1], found {optim.layer_decay}",
    )


def validate_run(config: PretrainConfig | FinetuneConfig) -> None:
    """What every training run has: steps, log, loading, threads, data."""
    for name in ("max_steps", "save_every"):
        steps = getattr(config, name)
        require(steps >= 1, f"{name} must be at least 1, found {steps}")
    for name in ("every", "print_every"):
        steps = getattr(config.log, name)
        require(steps >= 1, f"log.{name} must be at least 1, found {steps}")
    for name in ("eval_every", "eval_samples", "keep"):
        count = getattr(config.log, name)
        require(count >= 0, f"log.{name} must be at least 0, found {count}")
    window, workers = config.input.shuffle_window, config.input.workers
    require(window >= 1, f"input.shuffle_window must be at least 1, found {window}")
    require(workers >= 0, f"input.workers must be at least 0, found {workers}")
    threads = config.runtime.threads
    require(threads >= 0, f"runtime.threads must be at least 0, found {threads}")
    exact = config.runtime.exact
    require(
        exact == 0 or (exact > 0 and exact & (exact - 1) == 0),
        f"runtime.exact must be 0 (off) or a power of two, found {exact}",
    )
    require(
        exact == 0 or threads > 0,
        f"runtime.exact is {exact} and needs a fixed number of threads, as another number rounds "
        "otherwise: set runtime.threads to at least 1, found runtime.threads 0 (all cores)",
    )
    require(
        exact == 0 or config.runtime.sharding == "none",
        f"runtime.exact is {exact} and runtime.sharding is {config.runtime.sharding!r}: shards are "
        "added in an order of their own; choose one of the two",
    )
    for name, seconds in (
        ("input.loader_timeout", config.input.loader_timeout),
        ("runtime.step_timeout", config.runtime.step_timeout),
    ):
        require(seconds > 0, f"{name} must be above 0, found {seconds}")
    require(
        0 <= config.input.skip_budget < 1,
        f"input.skip_budget must be in [0, 1), found {config.input.skip_budget}",
    )
    require(
        len(config.data) > 0, "no data: give --data and one or more folders of `vlbeit prepare`"
    )


def validate_finetune(config: FinetuneConfig) -> None:
    """Raise ConfigError for the first setting of a fine-tuning run that cannot work."""
    validate_model(config.model)
    check_crop("input.crop", config.input.crop)
    augment = config.input.rand_augment
    require(
        augment.operations >= 0,
        f"input.rand_augment.operations must be at least 0, found {augment.operations}",
    )
    require(
        0 <= augment.magnitude <= 10,
        f"input.rand_augment.magnitude must be in [0, 10], found {augment.magnitude}",
    )
    require(
        augment.spread >= 0,
        f"input.rand_augment.spread must be at least 0, found {augment.spread}",
    )
    length, longest = config.input.text_length, config.model.text_positions
    if config.task in WITHOUT_TEXT:
        require(
            length == 0,
            f"input.text_length is {length}, but {config.task} has no text: leave it at 0",
        )
    else:
        require(
            3 <= length <= longest,
            f"input.text_length must be 3..{longest} (model.text_positions), found {length}",
        )
    for name in ("size", "micro"):
        count = getattr(config.batch, name)
        require(count >= 1, f"batch.{name} must be at least 1, found {count}")
    require(
        config.optim.head_lr > 0, f"optim.head_lr must be above 0, found {config.optim.head_lr}"
    )
    require(0 <= config.optim.ema < 1, f"optim.ema must be in [0, 1), found {config.optim.ema}")
    validate_optim(config.optim)
    validate_run(config)
    require(
        bool(config.start),
        "no start: give --start and a run folder or checkpoint of `vlbeit pretrain` (with "
        "--scratch only its model and tokenizer are used)",
    )
