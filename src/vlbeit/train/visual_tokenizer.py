"""Training of the visual tokenizer (VQ-KD): one loop, watched for a collapsing codebook."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlbeit.checkpoint import Checkpoint
from vlbeit.config import InputConfig, OptimConfig, VisualTokenizerConfig, to_dict
from vlbeit.data.order import SourceOrder, StreamOrder, Visit, source_weights
from vlbeit.data.records import BadSample, RecordSource
from vlbeit.data.transforms import BadImage, augment, decode_image, plain
from vlbeit.draws import Draws
from vlbeit.errors import DataBudgetError, InputError, NonFiniteError, StopRequested
from vlbeit.nn.linear import autocast
from vlbeit.nn.weights import BEIT_STD, initialise
from vlbeit.tokens.quantizer import CodeUse, code_use
from vlbeit.tokens.teachers import RANDOM, Teacher, build_teacher
from vlbeit.tokens.visual import VisualTokenizer
from vlbeit.tokens.vqkd import VQKD, VQKDTokenizer
from vlbeit.train.distributed import World
from vlbeit.train.gradients import sum_gradients
from vlbeit.train.optim import (
    decays,
    load_optimizer_tensors,
    lr_at,
    optimizer_tensors,
    set_lr,
)
from vlbeit.validate import validate_tokenizer

LOG_EVERY = 20
"""Steps between two rows of the log."""
START_SAMPLES = 8
"""k-means starts from at least this many patch vectors a code; the use of codes in the log is
that of the last steps with as many."""
LOW_USE = 0.5
"""Below this share of used codes the log raises an alarm ..."""
FALLEN_USE = 0.75
"""... and below this share of the most that this run used: a collapse that has begun."""
CACHE_BYTES = 512 << 20
"""Decoded pictures kept in memory; a larger set is decoded again at each visit."""
FINAL_IMAGES = 2048
"""Pictures on which the finished tokenizer's use of codes is measured."""
AHEAD = 2
"""Batches prepared while the model works."""
JUDGED_FROM = 200
"""Visits before the share of bad pictures is held against the budget."""

TRUNCATED = 0.5396
"""Standard deviation of a standard normal cut off at -1 and 1."""

Log = Callable[[dict[str, Any]], None]


Save = Callable[[int, Mapping[str, Tensor], Mapping[str, Tensor], dict[str, Any]], None]
"""(step, model tensors, optimizer tensors, state): see `checkpoint.save_checkpoint`."""


@dataclass(frozen=True)
class Keeping:
    """How a training is saved on its way: every `every` steps, and `resume` to go on from."""

    every: int
    save: Save
    resume: Checkpoint | None = None


class PictureReader:
    """Pictures of some sources: decoded once if there is room, bad ones counted by name."""

    def __init__(self, sources: Sequence[RecordSource], skip_budget: float, log: Log) -> None:
        self._sources = {source.name: source for source in sources}
        self._kept: dict[tuple[str, int], np.ndarray] = {}
        self._bytes = 0
        self._budget = skip_budget
        self._log = log
        self._bad: dict[tuple[str, int], str] = {}
        self._visits = 0

    def state(self) -> dict[str, Any]:
        """For a checkpoint; plain JSON."""
        return {"visits": self._visits, "bad": [[*key, why] for key, why in self._bad.items()]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`: nothing is counted or logged twice."""
        self._visits = state["visits"]
        self._bad = {(source, index): reason for source, index, reason in state["bad"]}

    def picture(self, source: str, index: int) -> np.ndarray | None:
        """(H, W, 3) uint8; None for a bad record, which is logged at its first visit.

        Raises:
            DataBudgetError: the share of bad records is above the budget.
        """
        key = (source, index)
        self._visits += 1
        if key in self._kept:
            return self._kept[key]
        if key in self._bad:
            return None
        try:
            image = decode_image(self._sources[source].read(index).image())
        except BadSample as sample:
            self._refuse(key, sample.shard, sample.member, sample.reason)
            return None
        except BadImage as bad:
            shard, _, member = self._sources[source].label(index).partition(":")
            self._refuse(key, shard, member, bad.reason)
            return None
        if self._bytes + image.nbytes <= CACHE_BYTES:
            self._kept[key] = image
            self._bytes += image.nbytes
        return image

    def _refuse(self, key: tuple[str, int], shard: str, member: str, reason: str) -> None:
        self._bad[key] = reason
        self._log({"skipped": f"{shard}:{member}", "source": key[0], "reason": reason})
        allowed = self._budget * self._visits
        judged = self._visits >= JUDGED_FROM or self._budget == 0
        # Three standard errors, so that a cluster of bad records in a good source stops nothing.
        if judged and len(self._bad) > allowed + 3 * allowed**0.5:
            raise DataBudgetError(
                f"source {key[0]}: {len(self._bad)} bad pictures in the first {self._visits} "
                f"visits, the last for {reason} ({shard}:{member}); input.skip_budget allows "
                f"{self._budget:.2%}. Repair the source or raise the budget"
            )


def train_visual_tokenizer(
    config: VisualTokenizerConfig,
    sources: Sequence[RecordSource],
    out: Path,
    *,
    seed: int,
    device: torch.device | str,
    log: Log,
    max_steps: int | None = None,
    input: InputConfig | None = None,
    precision: str = "fp32",
    world: World | None = None,
    stop: Callable[[], bool] = lambda: False,
    keeping: Keeping | None = None,
    log_every: int = LOG_EVERY,
) -> VisualTokenizer:
    """Train on the pictures of `sources` and save into the folder `out`.

    The same config, pictures and seed give the same tokenizer (on one device and thread count).
    Every rank of `world` takes a slice of each batch; gradients and codebook are those of the
    whole batch.

    Args:
        log: gets a row every `log_every` steps (`step`, `loss`, `pixel_loss`, `feature_loss`,
            `commitment`, `lr`, `pictures_per_second`, and after the warmup `used`, `perplexity`,
            `entropy`, `top_code_share`, `revived`), rows with `alarm` when few codes are used, rows
            with `skipped` for bad pictures, and one with `done` at the end.
        max_steps: stop earlier; the learning-rate schedule keeps its length.
        input: order and budget for bad pictures.
        precision: "bf16" runs the network under autocast; the lookup stays in fp32.
        world: ranks that take part; None: this process alone.
        stop: asked after every step, with one answer on all ranks; True saves and stops.
        keeping: saves on the way, and what to go on from; the result is the same.

    Raises:
        ConfigError: settings that do not fit together.
        InputError: no pictures.
        DataBudgetError: too many bad pictures.
        NonFiniteError: a loss that is no number.
        StopRequested: `stop` said so.
    """
    validate_tokenizer(config, "tokenizer")
    world = world or World(device=torch.device(device))
    input = input or InputConfig()
    if not sources:
        raise InputError("visual tokenizer: no source with pictures; look at --data")
    say: Log = log if world.main else _silent
    reader = PictureReader(sources, input.skip_budget, say)

    # ---- model
    teacher = build_teacher(config.teacher)
    model = VQKD(config, None if teacher is None else teacher.width)
    _initialise(model, seed)
    if config.teacher == RANDOM:
        model.freeze_encoder()
    model.to(device)
    if teacher is not None:
        teacher = teacher.to(device)
    model.codebook.across_ranks = world.size > 1
    optim = OptimConfig(
        lr=config.lr,
        min_lr=config.min_lr,
        warmup_steps=config.warmup_steps,
        total_steps=config.total_steps,
    )
    optimizer = torch.optim.AdamW(_groups(model, config), betas=config.betas, fused=True)
    parameters = [p for p in model.parameters() if p.requires_grad]

    # ---- data
    orders = [SourceOrder(s.name, s.sizes, seed, input.shuffle_window) for s in sources]
    records = {order.name: len(order) for order in orders}
    stream = StreamOrder(orders, source_weights(records, input.weights))
    steps = min(max_steps or config.total_steps, config.total_steps)

    # ---- where a run before this one was
    done, started, cursors = 0, False, stream.start()
    if keeping is not None and keeping.resume is not None:
        found = keeping.resume
        model.load_state_dict(found.model_tensors())
        load_optimizer_tensors(optimizer, found.optimizer_tensors())
        done, started, cursors = found.step, found.state["started"], found.state["cursors"]
        reader.restore(found.state["reader"])

    def save(step: int) -> None:
        if keeping is not None:
            state = {"started": started, "cursors": cursors, "reader": reader.state()}
            keeping.save(step, model.state_dict(), optimizer_tensors(optimizer), state)

    # ---- go
    patches = (config.image_size[0] // config.patch) * (config.image_size[1] // config.patch)
    recent: deque[Tensor] = deque(
        maxlen=max(1, -(-START_SAMPLES * config.codes // (config.batch * patches)))
    )
    watch = _Watch(config, say)
    revived, since, shown_pictures = 0, time.monotonic(), 0
    step = done
    batches = _batches(config, stream, cursors, reader, seed, world, steps - done)
    for step, (pixels, after) in enumerate(batches, start=done + 1):
        cursors = after
        pixels = pixels.to(device, non_blocking=True)
        # Until the warmup is over the encoder learns without the codebook; see VQKD.forward.
        coded = step > config.warmup_steps or not config.kmeans_iterations
        if coded and not started:
            started = True
            _start_codebook(model, config, stream, reader, seed, world, device)
        set_lr(optimizer, lr_at(step, optim))
        counted = float(world.sum_over_ranks(torch.tensor([float(len(pixels))], device=device)))
        if not counted:
            raise DataBudgetError(
                f"visual tokenizer: all {config.batch} pictures of step {step} were bad, from "
                f"{', '.join(source.name for source in sources)}; repair or leave out the source"
            )
        optimizer.zero_grad(set_to_none=True)
        units = torch.zeros(0, config.code_width, device=device)
        codes = torch.zeros(0, dtype=torch.int64, device=device)
        values = torch.zeros(4, device=device)
        if len(pixels):  # a rank's whole part may have been bad
            with autocast(torch.device(device), precision):
                features = None if teacher is None else _features(teacher, model, pixels)
                losses = model(pixels, features, coded=coded)
            # The mean over the pictures of all ranks, which may hold different numbers of them.
            share = len(pixels) / counted
            (losses.total * share).backward()
            units, codes = losses.quantized.units, losses.quantized.codes
            parts = (losses.total, losses.pixels, losses.features, losses.quantized.commitment)
            values = torch.stack([part.detach().float() for part in parts]) * share
        if world.size > 1:
            sum_gradients(parameters, world)
        torch.nn.utils.clip_grad_norm_(parameters, config.clip or float("inf"))
        optimizer.step()

        if coded:
            draws = Draws(seed, "revive", step)
            with world.guard("moving the codebook"):
                recent.append(model.codebook.update(units, codes))
                revived += model.codebook.revive(units, codes, draws, config.revive_below)
        shown_pictures += int(counted)
        if step % log_every == 0 or step == steps:
            total, pixel, feature, commitment = world.sum_over_ranks(values).tolist()
            if not np.isfinite(total):
                raise NonFiniteError(
                    f"visual tokenizer: loss {total} at step {step}; lower tokenizer.lr "
                    f"({config.lr}) or use --precision fp32"
                )
            use = code_use(sum(recent, torch.zeros(config.codes, device=device)))
            seconds = time.monotonic() - since
            say(
                {
                    "step": step,
                    "loss": total,
                    "pixel_loss": pixel,
                    "feature_loss": feature,
                    "commitment": commitment,
                    **(_use_row(use) | {"revived": revived} if coded else {}),
                    "lr": optimizer.param_groups[0]["lr"],
                    "pictures_per_second": shown_pictures / max(seconds, 1e-9),
                }
            )
            if len(recent) == recent.maxlen:  # fewer vectors cannot use every code
                watch.look(step, steps, use)
            revived, since, shown_pictures = 0, time.monotonic(), 0
        stopping = stop()
        if stopping or step == steps or (keeping is not None and step % keeping.every == 0):
            save(step)
        if stopping and step < steps:
            raise StopRequested(
                f"visual tokenizer: stopped on request after step {step} of {steps}"
            )
    if not started:  # stopped within the warmup
        _start_codebook(model, config, stream, reader, seed, world, device)

    # ---- done
    facts: dict[str, Any] = {
        "seed": seed,
        "steps": step,
        "teacher": config.teacher if teacher is None else teacher.digest,
        "training": to_dict(config),
        "sources": {source.name: len(source) for source in sources},
    }
    tokenizer = VQKDTokenizer(model, facts)
    use = _final_use(tokenizer, reader, stream, config, device)
    tokenizer.facts["code_use"] = _use_row(use)
    watch.look(step, steps, use)
    say({"done": str(out), "digest": tokenizer.digest, "steps": step, **_use_row(use)})
    if world.main:
        tokenizer.save(out)
    world.barrier()
    return tokenizer


def _initialise(model: VQKD, seed: int) -> None:
    """BEiT's scheme, with matrices scaled to their number of inputs.

    A standard deviation of 0.02 suits a width of 768. At 96 it leaves an encoder that needs
    thousands of steps before its vectors differ.
    """
    initialise(model, seed)
    drawn = BEIT_STD * TRUNCATED
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.Linear):
                part.weight.mul_(1 / (drawn * part.in_features**0.5))


def _silent(_: dict[str, Any]) -> None:
    """Ranks other than the first say nothing."""


def _use_row(use: CodeUse) -> dict[str, float]:
    return {
        "used": use.used,
        "perplexity": use.perplexity,
        "entropy": use.entropy,
        "top_code_share": use.top,
    }


class _Watch:
    """Raises the alarm when the codebook collapses, and names the remedy."""

    def __init__(self, config: VisualTokenizerConfig, say: Log) -> None:
        self._config = config
        self._say = say
        self._next = config.warmup_steps
        self._best = 0.0

    def look(self, step: int, steps: int, use: CodeUse) -> None:
        self._best = max(self._best, use.used)
        if step <= self._next or use.used >= max(LOW_USE, FALLEN_USE * self._best):
            return
        self._next = step + max(1, steps // 10)
        config, remedies = self._config, []
        if not config.kmeans_iterations:
            remedies.append("start by k-means (kmeans_iterations 10)")
        if config.revive_below < 0.1:
            remedies.append(
                f"restart rare codes sooner (revive_below {config.revive_below} -> 0.1)"
            )
        if config.decay > 0.95:
            remedies.append(f"let codes follow faster (decay {config.decay} -> 0.95)")
        remedies.append(f"ask for fewer codes (codes {config.codes})")
        remedies.append("show more varied pictures")
        self._say(
            {
                "alarm": f"step {step}: only {use.used:.0%} of {config.codes} codes are used "
                f"(at most {self._best:.0%} before), perplexity {use.perplexity:.1f}: the codebook "
                "is collapsing. "
                f"Remedies, likely first: {'; '.join(remedies)}",
                "step": step,
            }
        )


def _groups(model: VQKD, config: VisualTokenizerConfig) -> list[dict[str, object]]:
    named = list(model.named_parameters())
    return [
        {
            "params": [p for name, p in named if decays(name, p) == decay],
            "names": [name for name, p in named if decays(name, p) == decay],
            "weight_decay": config.weight_decay if decay else 0.0,
            "lr": config.lr,
        }
        for decay in (True, False)
    ]


def _features(teacher: Teacher, model: VQKD, pixels: Tensor) -> Tensor:
    return teacher.features(pixels, model.image.grid(pixels))


def _rank_slice(visits: list[Visit], world: World) -> list[Visit]:
    """This rank's part of a batch; the parts in rank order are the batch."""
    edges = [len(visits) * rank // world.size for rank in range(world.size + 1)]
    return visits[edges[world.rank] : edges[world.rank + 1]]


def _load(
    config: VisualTokenizerConfig, reader: PictureReader, visits: list[Visit], seed: int
) -> Tensor:
    """(n, 3, H, W) uint8, bad pictures left out."""
    made = []
    for source, epoch, index in visits:
        image = reader.picture(source, index)
        if image is not None:
            draws = Draws(seed, "visual-tokenizer", source, epoch, index)
            made.append(torch.from_numpy(augment(image, draws, config.image_size, config.crop)))
    if made:
        return torch.stack(made)
    return torch.zeros(0, 3, *config.image_size, dtype=torch.uint8)


def _batches(
    config: VisualTokenizerConfig,
    order: StreamOrder,
    cursors: dict[str, int],
    reader: PictureReader,
    seed: int,
    world: World,
    steps: int,
) -> Iterator[tuple[Tensor, dict[str, int]]]:
    """This rank's pictures of each step and the cursors after it.

    Prepared ahead by one thread (Pillow frees the interpreter's lock).
    """
    with ThreadPoolExecutor(1) as thread:
        waiting: deque[tuple[Future[Tensor], dict[str, int]]] = deque()
        for made in range(steps + AHEAD):
            if made < steps:
                visits, cursors = order.take(cursors, config.batch)
                mine = _rank_slice(visits, world)
                waiting.append((thread.submit(_load, config, reader, mine, seed), cursors))
            if made >= min(AHEAD, steps) and waiting:
                future, after = waiting.popleft()
                yield future.result(), after


def _start_codebook(
    model: VQKD,
    config: VisualTokenizerConfig,
    stream: StreamOrder,
    reader: PictureReader,
    seed: int,
    world: World,
    device: torch.device | str,
) -> None:
    """k-means on the vectors of the first pictures, as many as the codebook needs."""
    patches = (config.image_size[0] // config.patch) * (config.image_size[1] // config.patch)
    pictures = max(config.batch, -(-START_SAMPLES * config.codes // patches))
    visits, _ = stream.take(stream.start(), pictures)
    mine = _rank_slice(visits, world)
    found = []
    with torch.no_grad():
        for at in range(0, len(mine), config.batch):
            pixels = _load(config, reader, mine[at : at + config.batch], seed)
            if len(pixels):
                found.append(
                    F.normalize(model.embed(pixels.to(device)).float(), dim=-1).flatten(0, 1)
                )
    units = torch.cat(found) if found else torch.zeros(0, config.code_width, device=device)
    if config.kmeans_iterations:
        model.codebook.start(units, Draws(seed, "k-means"), config.kmeans_iterations)
    else:
        model.codebook.start_random(Draws(seed, "random-codes"))


def _final_use(
    tokenizer: VQKDTokenizer,
    reader: PictureReader,
    stream: StreamOrder,
    config: VisualTokenizerConfig,
    device: torch.device | str,
) -> CodeUse:
    """How the finished tokenizer uses its codes, on whole pictures of the training data."""
    count = min(FINAL_IMAGES, sum(len(order) for order in stream.orders.values()))
    visits, _ = stream.take(stream.start(), count)
    images = (reader.picture(visit.source, visit.index) for visit in visits)
    shown = [torch.from_numpy(plain(i, config.image_size)) for i in images if i is not None]
    if not shown:
        raise DataBudgetError(f"none of {count} pictures of {', '.join(stream.orders)} can be read")
    counts = torch.zeros(config.codes, dtype=torch.int64)
    for at in range(0, len(shown), config.batch):
        codes = tokenizer.encode(torch.stack(shown[at : at + config.batch]).to(device))
        counts += torch.bincount(codes.flatten().cpu(), minlength=config.codes)
    return code_use(counts)
