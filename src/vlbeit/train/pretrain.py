"""`vlbeit pretrain`: from a config to a finished run folder, or from where it was left."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlbeit.checkpoint import preprocessing
from vlbeit.config import PretrainConfig
from vlbeit.data.loader import build_loader, build_streams, check_fed, open_streams
from vlbeit.data.probe import check_sources
from vlbeit.data.records import RecordSource
from vlbeit.data.streams import TextStream
from vlbeit.errors import ConfigError
from vlbeit.eval.heldout import HeldOut
from vlbeit.nn.flops import training_flops
from vlbeit.nn.model import VLBeit
from vlbeit.objectives import OBJECTIVES, count_targets, score_batch, views
from vlbeit.tasks import Path as Way
from vlbeit.tasks import reached
from vlbeit.tokens.text import TextTokenizer
from vlbeit.tokens.visual import VisualTokenizer, load_visual_tokenizer
from vlbeit.train.block_settings import set_blocks
from vlbeit.train.distributed import World
from vlbeit.train.limit import matrix_limit
from vlbeit.train.loop import Learning
from vlbeit.train.opening import (
    MAY_CHANGE,
    Opened,
    check_same_data,
    check_same_run,
    learn,
    open_run,
    source_contents,
    source_facts,
    wait_for,
)
from vlbeit.train.optim import build_optimizer
from vlbeit.train.tokenizers import (
    find_stored_codes,
    find_tokenizers,
    train_missing_tokenizers,
)
from vlbeit.types import Batch, Score, Stream
from vlbeit.validate import validate


def pretrain(config: PretrainConfig) -> Path:
    """Run or resume; returns the run folder.

    Raises:
        VLBeitError: every way to end early has its exit code (errors.py).
    """
    validate(config)
    with open_run(config) as opened:
        return _pretrain(config, opened)


def _pretrain(config: PretrainConfig, opened: Opened) -> Path:
    world, checkpoint = opened.world, opened.checkpoint
    # A resumed run has the tokenizers of its checkpoint, whatever the config says.
    check_same_run(opened, config, (*MAY_CHANGE, "tokenizers"))

    # ---- tokenizers and data
    sources = open_streams(config, "train")
    check_fed(config, sources)
    world.on_main(lambda: check_sources(sources))
    paths = find_tokenizers(config, None if checkpoint is None else checkpoint.folder)
    if paths.missing():
        if world.main:
            train_missing_tokenizers(config, paths, sources, world.device, opened.log)
        else:
            wait_for(paths.complete, "rank 0 to train the tokenizers")
    text = TextTokenizer.load(paths.text)
    visual = load_visual_tokenizer(paths.visual).to(world.device) if paths.visual else None
    check_tokenizers(config, text, visual)
    codes = find_stored_codes(config, sources, visual, opened.log)
    streams = build_streams(config, sources, text, codes=codes, log=opened.log)
    loader = build_loader(config, streams, rank=world.rank, world=world.size)
    by_stream = {str(stream): group for stream, group in sources.items()}
    facts, contents = source_facts(by_stream), source_contents(by_stream)
    if checkpoint is not None:
        check_same_data(checkpoint, facts, contents)

    # ---- model and optimizer
    model = VLBeit(config.model, seed=config.seed).to(world.device)
    freeze_unreached(config, model)
    set_blocks(model, config.runtime, world.device)
    held_out = HeldOut(config, text, visual)

    def evaluate() -> Mapping[str, Any]:
        found = held_out.measure(model, world.device)
        return {"objectives": found} if found else {}

    return learn(
        opened,
        config,
        model=model,
        optimizer=lambda: build_optimizer(model, config.optim, config.model.layers),
        learning=masked_prediction(config, model, visual),
        loader=loader,
        sources=facts,
        contents=contents,
        preprocessor=preprocessing(config),
        text=text,
        visual=visual,
        evaluate=evaluate,
        summary=summary(config, model, sources, world, opened.threads),
        matrix_limit=matrix_limit(world.device, config.precision),
        first_skips=[row for s in streams if isinstance(s, TextStream) for row in s.skips()],
    )


def freeze_unreached(config: PretrainConfig, model: VLBeit) -> None:
    """Leave learning to what some objective reaches, so that weight decay does not eat the rest.

    A run of pairs alone, for one, never asks the V- and L-experts below a VL-expert.
    """
    batch, objective = config.batch, config.objective
    paths: dict[Way, int] = {"image": batch.images, "text": batch.texts, "pair": batch.pairs}
    learns = set(reached(model, [path for path, count in paths.items() if count]))
    words = batch.texts or (batch.pairs and objective.mvlm_text)
    patches = batch.images or (batch.pairs and objective.mvlm_image)
    for name, parameter in model.named_parameters():
        if name.startswith("heads.mlm."):
            asked = bool(words)
        elif name.startswith("heads.mim.") or name == "image.masked_patch":
            asked = bool(patches)
        else:
            asked = name in learns
        parameter.requires_grad_(asked)


def masked_prediction(
    config: PretrainConfig, model: VLBeit, visual: VisualTokenizer | None
) -> Learning[Batch]:
    """The objectives of pretraining, as the loop sees them."""
    objective = config.objective

    def with_codes(batch: Batch) -> Batch:
        if visual is None or batch.pixels is None or batch.patch_codes is not None:
            return batch
        return batch.with_codes(visual.encode(batch.pixels))

    def score(batch: Batch) -> dict[str, Score]:
        return score_batch(model, batch, objective)

    def flops(batch: Batch) -> int:
        passes = views(objective) if batch.stream == "pair" else 1
        return training_flops(config.model, batch, passes, count_targets(batch, objective))

    return Learning(
        weights={name: getattr(objective, name) for name in OBJECTIVES},
        score=score,
        count=lambda batch: count_targets(batch, objective),
        prepare=with_codes,
        tokens=Batch.tokens,
        flops=flops,
    )


def check_tokenizers(
    config: PretrainConfig, text: TextTokenizer, visual: VisualTokenizer | None
) -> None:
    """Raise ConfigError when the tokenizers do not fit the model."""
    if text.size > config.model.vocab:
        raise ConfigError(
            f"model.vocab is {config.model.vocab}, the text tokenizer has {text.size} pieces: "
            f"set --model.vocab {text.size} or train a smaller one"
        )
    if visual is None:
        return
    if visual.codes != config.model.codes:
        raise ConfigError(
            f"model.codes is {config.model.codes}, the visual tokenizer has {visual.codes} codes: "
            f"set --model.codes {visual.codes}"
        )
    if visual.patch != config.model.patch:
        raise ConfigError(
            f"model.patch is {config.model.patch}, the visual tokenizer's is {visual.patch}: "
            "every patch needs one code"
        )


def summary(
    config: PretrainConfig,
    model: VLBeit,
    sources: dict[Stream, list[RecordSource]],
    world: World,
    threads: int,
) -> str:
    """One line about what is trained on what, where."""
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    data = "; ".join(
        f"{stream}s: " + ", ".join(f"{s.name} {len(s)}" for s in group)
        for stream, group in sources.items()
    )
    return (
        f"{config.recipe}: {parameters:.1f} M parameters, {data}; {world.size} process(es) x "
        f"{threads} thread(s) on {world.device}, {config.precision}"
    )
