"""`vlbeit finetune TASK`: a pretrained trunk with a task's head, trained on the task's records."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from vlbeit.checkpoint import (
    SQUASHED,
    TASK_FILE,
    Checkpoint,
    find_checkpoint,
    preprocessing,
)
from vlbeit.config import FinetuneConfig, ModelConfig, from_dict
from vlbeit.data.records import RecordSource
from vlbeit.data.task_stream import TaskStream, open_task, task_loader
from vlbeit.errors import ConfigError, InputError
from vlbeit.eval.downstream import TaskHeldOut
from vlbeit.jsonfile import read_json
from vlbeit.nn.flops import task_flops
from vlbeit.nn.model import VLBeit
from vlbeit.nn.transfer import transfer
from vlbeit.recipes import FINETUNE
from vlbeit.tasks import Task, build_task, learn_facts, reached, same_outputs
from vlbeit.tokens.text import TextTokenizer
from vlbeit.train.block_settings import set_blocks
from vlbeit.train.limit import matrix_limit
from vlbeit.train.loop import Learning
from vlbeit.train.opening import (
    Opened,
    check_same_data,
    check_same_run,
    learn,
    open_run,
    source_contents,
)
from vlbeit.train.optim import build_optimizer
from vlbeit.types import Score, TaskBatch
from vlbeit.validate import validate_finetune

TASK_MAY_SET = ("image_size", "drop_path", "text_positions")
"""Settings of the model that fine-tuning may choose; the others are the start's."""


def finetune(config: FinetuneConfig) -> Path:
    """Run or resume; returns the run folder.

    Raises:
        VLBeitError: every way to end early has its exit code (errors.py).
    """
    validate_finetune(config)
    with open_run(config) as opened:
        return _finetune(config, opened)


def _finetune(config: FinetuneConfig, opened: Opened) -> Path:
    world, checkpoint = opened.world, opened.checkpoint

    # ---- where it starts: the run's own checkpoint, else the one it is told to start from
    begin = checkpoint or find_checkpoint(config.start, opened.log)
    config = replace(config, model=model_of(config, begin))
    validate_finetune(config)
    check_same_run(opened, config)
    text = TextTokenizer.load(begin.text_tokenizer)

    # ---- task and data
    stream_name = f"task:{config.task}"
    sources = open_task(config.data, stream_name, "train")
    if checkpoint is not None:
        facts = read_json(checkpoint.folder / TASK_FILE)
    else:
        facts = learn_facts(config, sources)
    task = build_task(config, facts, str(begin.folder))
    gathers = getattr(task, "gathers", False)
    if gathers:
        check_shares(config, world.size)
    stream = TaskStream(task, sources, text, config, training=True, passes=len(task.paths))
    world.on_main(stream.check)
    aligned = gathers or config.runtime.sharding == "full"
    loader = task_loader(config, stream, rank=world.rank, world=world.size, aligned=aligned)
    samples = {stream_name: stream.records}
    contents = source_contents({stream_name: sources})
    if checkpoint is not None:
        check_same_data(checkpoint, samples, contents)

    # ---- model and optimizer
    model = VLBeit(config.model, seed=config.seed)
    model.put_on(task.head(model, config.seed))
    if checkpoint is None:
        opened.log(begin_weights(config, model, task, begin))
    freeze(model, task)
    model.to(world.device)
    set_blocks(model, config.runtime, world.device)
    held_out = TaskHeldOut(config, task, text)

    return learn(
        opened,
        config,
        model=model,
        optimizer=lambda: build_optimizer(
            model, config.optim, config.model.layers, config.optim.head_lr
        ),
        learning=task_learning(config, model, task),
        loader=loader,
        sources=samples,
        contents=contents,
        preprocessor=preprocessing(config, getattr(task, "resize", SQUASHED)),
        text=text,
        visual=None,
        evaluate=lambda: held_out.measure(model, world.device),
        summary=summary(config, model, stream, sources, opened),
        matrix_limit=matrix_limit(world.device, config.precision),
        files={TASK_FILE: task.facts},
        ema=config.optim.ema,
    )


def model_of(config: FinetuneConfig, begin: Checkpoint) -> ModelConfig:
    """The start's model with what the config may set.

    Raises:
        ConfigError: the config sets something else: neither the recipe's value nor the start's.
        InputError: the start's config holds no model.
    """
    try:
        start = from_dict(ModelConfig, begin.config["model"])
    except (KeyError, ConfigError) as error:
        raise InputError(f"{begin.folder}: its config.json holds no model ({error})") from None
    recipe = FINETUNE[config.task].get(config.recipe)
    preset = start if recipe is None else recipe().model
    for name in vars(start):
        value = getattr(config.model, name)
        if name in TASK_MAY_SET or value in (getattr(start, name), getattr(preset, name)):
            continue
        raise ConfigError(
            f"model.{name} is {value!r}; fine-tuning keeps that of {begin.folder} "
            f"({getattr(start, name)!r}) and sets {', '.join(TASK_MAY_SET)} only"
        )
    chosen = {name: getattr(config.model, name) for name in TASK_MAY_SET}
    return replace(start, **chosen)


def check_shares(config: FinetuneConfig, processes: int) -> None:
    """Raise ConfigError when processes would have unlike numbers of micro-batches."""
    if config.batch.size % processes:
        raise ConfigError(
            f"batch.size {config.batch.size} over {processes} processes: {config.task} compares "
            f"over all of them and needs equal shares; give a multiple of {processes}"
        )


def begin_weights(config: FinetuneConfig, model: VLBeit, task: Task, begin: Checkpoint) -> str:
    """Fill a new run's model from the start, unless it is to be fresh; returns what was done.

    Raises:
        InputError: a tensor of the trunk is missing or of another shape.
    """
    if config.scratch:
        return f"from scratch: model and tokenizer of {begin.folder}, fresh weights"
    tensors = begin.model_tensors()
    its_facts = begin.folder / TASK_FILE
    if its_facts.is_file() and (
        begin.config.get("task") != config.task
        or not same_outputs(read_json(its_facts), task.facts)
    ):
        # A head with the same shape may still stand for other answers or classes.
        own = {name for name in model.state_dict() if name.startswith("task.")}
        tensors = {f"task.other.{k}" if k in own else k: v for k, v in tensors.items()}
    start = from_dict(ModelConfig, begin.config["model"])
    rows, columns = (side // start.patch for side in start.image_size)
    found = transfer(model, tensors, (rows, columns), str(begin.folder))
    return f"start: {begin.folder} (step {begin.step}): {found.describe()}"


def freeze(model: VLBeit, task: Task) -> None:
    """Leave learning to what the task reaches, so that weight decay does not eat the rest."""
    learns = set(reached(model, task.paths))
    for name, parameter in model.named_parameters():
        head = name.startswith("task.")
        parameter.requires_grad_(name in learns and (head or not task.frozen(name)))


def task_learning(config: FinetuneConfig, model: VLBeit, task: Task) -> Learning[TaskBatch]:
    """The task, as the loop sees it."""
    head = head_of(model)
    trunk_learns = any(
        p.requires_grad for n, p in model.named_parameters() if not n.startswith("task.")
    )

    def score(batch: TaskBatch) -> dict[str, Score]:
        return task.score(model, head, batch)

    return Learning(
        weights=dict(task.weights),
        score=score,
        count=task.count,
        prepare=lambda batch: batch,
        tokens=lambda batch: batch.tokens(config.model.patch),
        flops=lambda batch: task_flops(config.model, batch, task.paths, not trunk_learns),
        gathers=getattr(task, "gathers", False),
    )


def head_of(model: VLBeit) -> nn.Module:
    """The task's head on a model."""
    if model.task is None:
        raise ValueError("a model without a task's head")
    return model.task


def summary(
    config: FinetuneConfig,
    model: VLBeit,
    stream: TaskStream,
    sources: Sequence[RecordSource],
    opened: Opened,
) -> str:
    """One line about what is trained on what, where."""
    parameters = [(p.numel(), p.requires_grad) for p in model.parameters()]
    records = {source.name: len(source) for source in sources}
    data = ", ".join(
        f"{name} {count}" + (f" in {records[name]} records" if records[name] != count else "")
        for name, count in stream.records.items()
    )
    return (
        f"{config.task}, {config.recipe}: {sum(n for n, _ in parameters) / 1e6:.1f} M parameters, "
        f"{sum(n for n, learns in parameters if learns) / 1e6:.1f} M of them learn; {data}; "
        f"{opened.world.size} process(es) x {opened.threads} thread(s) on {opened.world.device}, "
        f"{config.precision}"
    )
