"""`vlbeit bench plan`: time, cost and needs of a pretraining run, from measured or stated rates.

    vlbeit bench plan --recipe base --gpus 8 --measured step.json --price 3.5
    vlbeit bench plan --recipe base --gpus 8 --peak-tflops 989 --share 0.45 --json

The arithmetic of a step follows from the recipe (nn/flops.py). How fast a device does it comes
from `vlbeit bench step --json` on one such device, or from a stated share of a stated peak. Every
number that the plan rests on is in its list of assumptions, with where it comes from. Nothing is
built or timed here.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vlbeit.config import PretrainConfig
from vlbeit.errors import ConfigError, InputError
from vlbeit.nn.flops import encoder_flops, head_flops, patch_flops, sample_flops
from vlbeit.nn.model import VLBeit
from vlbeit.objectives import views
from vlbeit.overrides import parse_config
from vlbeit.recipes import PRETRAIN

COMMAND = "vlbeit bench plan"
DECODED_PER_CORE = 639.0
"""Pictures of 500 x 375 in JPEG, read by simplejpeg, cropped to 224 px by torch, a second and core
of a Zen 4 with AVX-512."""
LINK_GB = 370.0
"""GB/s of an all-reduce between GPUs on NVLink of one host."""
RECORD_KB = 114.0
"""A JPEG of 500 x 375 in quality 90."""
GRADIENT_BYTES = 4
"""fp32, as DDP sums them."""
STATE_BYTES = 12
"""Of a parameter in a checkpoint: weight and AdamW's two moments, fp32."""
TRAINED_BYTES = STATE_BYTES + GRADIENT_BYTES
"""Of a parameter in memory while training."""
UPDATE_BYTES = 28
"""A fused AdamW reads weight, gradient and two moments, and writes all but the gradient."""
HOUR = 3600.0
STEP_FIELDS = (
    "needed_tflop", "step_seconds", "precision", "samples", "recipe", "machine", "threads", "torch",
)  # fmt: skip
"""Of a report of `vlbeit bench step --json`."""


@dataclass(frozen=True, kw_only=True)
class Assumption:
    """A number that the plan rests on, and where it comes from."""

    name: str
    value: float
    unit: str
    source: str
    """Begins with "measured", "given" or "assumed"."""


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """What one optimizer step has to do, over all devices.

    flop    products of forward and backward, padding not counted
    tokens  real ones of all forward inputs, a pair in two views counted once
    images  to decode
    coding  FLOPs of a visual tokenizer that codes them on the way; not in `flop`
    """

    flop: float
    tokens: int
    images: int
    coding: float


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What the words of the command ask for."""

    run: PretrainConfig
    gpus: int
    assumptions: dict[str, Assumption]
    """By what they are for: rate, scaling, fill, pair fill, codes, decode, link, record, price."""
    activation_bytes: dict[str, float] = field(default_factory=dict)
    """Measured, of one sample in the backward pass, by stream; empty: not known."""
    as_json: bool = False

    def value(self, name: str) -> float:
        return self.assumptions[name].value


# ---- what the arithmetic says


def step_work(config: PretrainConfig, text_fill: float = 1.0, pair_fill: float = 1.0) -> StepWork:
    """The work of a step.

    Args:
        text_fill, pair_fill: mean length of a text or caption over the longest, in (0, 1].
    """
    model, batch, masking = config.model, config.batch, config.masking
    patches = math.prod(side // model.patch for side in model.image_size)
    words = max(round(config.input.text_length * text_fill), 3)
    said = max(round(config.input.pair_text_length * pair_fill), 3)
    hidden = round(masking.image * patches)
    pairs = batch.pairs * (0.5 if config.objective.mvlm == "half" else 1)  # of each view
    targets = {
        "mlm": batch.texts * round(masking.text * (words - 2)),
        "mim": batch.images * hidden,
        "mvlm_text": pairs * round(masking.pair_text * (said - 2)),
        "mvlm_image": pairs * hidden,
    }
    targets = {name: n for name, n in targets.items() if getattr(config.objective, name)}
    images = batch.images + batch.pairs
    visual = config.tokenizers.train_visual
    places = math.prod(side // visual.patch for side in visual.image_size)
    return StepWork(
        flop=batch.images * sample_flops(model, patches, 0)
        + batch.texts * sample_flops(model, 0, words)
        + views(config.objective) * batch.pairs * sample_flops(model, patches, said)
        + head_flops(model, targets),
        tokens=batch.images * (patches + 1)
        + batch.texts * words
        + batch.pairs * (patches + 1 + said),
        images=images,
        coding=images * (encoder_flops(visual, places + 1) + patch_flops(visual, places)),
    )


def all_reduce_bytes(parameters: int, devices: int, each: int = GRADIENT_BYTES) -> float:
    """What every device sends in a ring all-reduce of the gradients."""
    return 2 * (devices - 1) / devices * parameters * each


def num_parameters(config: PretrainConfig) -> int:
    """Of the whole model, heads included; no memory is taken for them."""
    with torch.device("meta"):
        return sum(p.numel() for p in VLBeit(config.model, seed=None).parameters())


def plan(asked: PlanConfig) -> dict[str, Any]:
    """The plan as one JSON object: step, run, data, storage, gradients, memory, assumptions."""
    config = asked.run
    work = step_work(config, asked.value("fill"), asked.value("pair fill"))
    parameters = num_parameters(config)
    coding = asked.value("codes")
    flop = work.flop + coding * 1e12
    rate = asked.value("rate") * 1e12 * asked.gpus * asked.value("scaling")
    seconds = flop / rate
    hours = seconds * config.max_steps / HOUR
    images = work.images / seconds
    patches = math.prod(side // config.model.patch for side in config.model.image_size)
    sent = all_reduce_bytes(parameters, asked.gpus)
    checkpoint = parameters * STATE_BYTES
    found: dict[str, Any] = {
        "recipe": config.recipe,
        "gpus": asked.gpus,
        "parameters": parameters,
        "step": {
            "tflop": round(flop / 1e12, 3),
            "coding_tflop": round(coding, 3),
            "tokens": work.tokens,
            "seconds": float(f"{seconds:.4g}"),
            "tokens_per_second": round(work.tokens / seconds),
        },
        "run": {
            "steps": config.max_steps,
            "hours": float(f"{hours:.4g}"),
            "gpu_hours": float(f"{hours * asked.gpus:.4g}"),
            "tokens": work.tokens * config.max_steps,
        },
        "data": {
            "images_per_second": float(f"{images:.4g}"),
            "cores_to_decode": math.ceil(images / asked.value("decode")),
            "read_gb_per_second": float(f"{images * asked.value('record') / 1e6:.3g}"),
        },
        "storage": {
            "gb_per_million_images": round(asked.value("record"), 1),
            "gb_per_million_stored_codes": round(2 * patches / 1e3, 3),
            "checkpoint_gb": round(checkpoint / 1e9, 2),
            "checkpoints_gb": round(checkpoint * max(config.log.keep, 1) / 1e9, 2),
        },
        "gradients": {
            "gb_sent_per_gpu_and_step": round(sent / 1e9, 3),
            "seconds": float(f"{sent / (asked.value('link') * 1e9):.3g}"),
        },
        "memory": {
            "weights_gradients_moments_gb": round(parameters * TRAINED_BYTES / 1e9, 2),
            "adamw_traffic_gb": round(parameters * UPDATE_BYTES / 1e9, 2),
            **activations(asked),
        },
        "assumptions": [vars(one) for one in asked.assumptions.values()],
    }
    if "price" in asked.assumptions:
        found["run"]["cost"] = round(hours * asked.gpus * asked.value("price"), 2)
    return found


def activations(asked: PlanConfig) -> dict[str, float]:
    """GB of the largest stream's micro-batch on one device, where its bytes are known."""
    batch = asked.run.batch
    counts = {"image": batch.images, "text": batch.texts, "pair": batch.pairs}
    largest = [
        each * min(batch.micro, math.ceil(counts[stream] / asked.gpus))
        for stream, each in asked.activation_bytes.items()
    ]
    return {"activations_gb": round(max(largest) / 1e9, 3)} if largest else {}


# ---- what is asked


def parse_plan(words: Sequence[str]) -> PlanConfig:
    """The plan's own flags; the others are settings of the recipe.

    Raises:
        ConfigError: a number that makes no sense, no rate or two, or a setting that is none.
        InputError: --measured cannot be read or is no report of `vlbeit bench step --json`.
    """
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Any setting of the recipe may follow, such as --objective.mvlm joint.",
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", default="base", choices=list(PRETRAIN))
    parser.add_argument("--gpus", type=int, default=1, help="devices of the measured kind")
    parser.add_argument(
        "--measured",
        metavar="JSON",
        help="what `vlbeit bench step --json` or `bench data --json` printed on one such device",
    )
    parser.add_argument("--peak-tflops", type=float, help="peak of one device, instead")
    parser.add_argument("--share", type=float, help="of that peak that useful work reaches, (0, 1]")
    parser.add_argument("--scaling", type=float, help="share kept on --gpus devices, (0, 1]")
    parser.add_argument("--text-fill", type=float, help="mean length of texts, (0, 1] of longest")
    parser.add_argument("--pair-text-fill", type=float, help="the same of captions")
    parser.add_argument("--decode-rate", type=float, help="images a second that one core prepares")
    parser.add_argument("--record-kb", type=float, help="mean size of a stored picture")
    parser.add_argument("--link-gbs", type=float, help="GB/s of an all-reduce between the devices")
    parser.add_argument("--price", type=float, help="of one device for an hour, in any currency")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    own, rest = parser.parse_known_args(list(words))
    if own.gpus < 1:
        raise ConfigError(f"--gpus must be at least 1, found {own.gpus}")
    for name in ("share", "scaling", "text_fill", "pair_text_fill"):
        check_number(name, getattr(own, name), most=1.0)
    for name in ("peak_tflops", "decode_rate", "record_kb", "link_gbs", "price"):
        check_number(name, getattr(own, name))
    run = parse_config(PretrainConfig, PRETRAIN, [own.recipe, *rest], command=COMMAND)
    report = read_report(Path(own.measured), run) if own.measured else {}
    found = {"rate": rate_of(own, report)}
    for name, given, default, unit, why in (
        ("scaling", own.scaling, 1.0, "of one device's rate", "the sums hide behind the backward"),
        ("fill", own.text_fill, 1.0, "of the longest text", "documents are cut into full chunks"),
        ("pair fill", own.pair_text_fill, 1.0, "of the longest caption", "no caption is shorter"),
        ("record", own.record_kb, RECORD_KB, "kB a picture", "500 x 375, JPEG quality 90"),
        ("link", own.link_gbs, LINK_GB, "GB/s", "NVLink of one host"),
    ):
        found[name] = Assumption(
            name=name,
            value=default if given is None else given,
            unit=unit,
            source=f"assumed: {why}" if given is None else "given",
        )
    coding = step_work(run).coding / 1e12
    found["codes"] = Assumption(
        name="codes",
        value=0.0 if run.tokenizers.codes else coding,
        unit="TFLOP a step",
        source="given: tokenizers.codes, stored"
        if run.tokenizers.codes
        else "assumed: a VQ-KD of tokenizers.train_visual codes every picture at the rate above",
    )
    found["decode"] = decode_rate(own.decode_rate, own.measured, report)
    if own.price is not None:
        found["price"] = Assumption(
            name="price", value=own.price, unit="a device and hour", source="given"
        )
    step = report.get("step", report)
    return PlanConfig(
        run=run,
        gpus=own.gpus,
        assumptions=found,
        activation_bytes={
            stream: mb * 2**20 / step["samples"][stream]
            for stream, mb in step.get("activation_mb", {}).items()
        },
        as_json=own.json,
    )


def check_number(name: str, value: float | None, most: float = math.inf) -> None:
    """Raise ConfigError for what is not in (0, most]; NaN and infinity are not."""
    if value is not None and not (0 < value <= most and math.isfinite(value)):
        limit = f"in (0, {most:g}]" if math.isfinite(most) else "a number above 0"
        raise ConfigError(f"--{name.replace('_', '-')} must be {limit}, found {value}")


def read_report(path: Path, run: PretrainConfig) -> dict[str, Any]:
    """A report of `vlbeit bench step --json` or `vlbeit bench data --json`."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--measured {path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"--measured {path}: is not JSON ({error})") from None
    step = report.get("step", report) if isinstance(report, dict) else {}
    step = step if isinstance(step, dict) else {}
    missing = [name for name in STEP_FIELDS if name not in step]
    if missing:
        raise InputError(
            f"--measured {path}: has no {', '.join(missing)}; give what `vlbeit bench step --json` "
            "printed"
        )
    for name in ("needed_tflop", "step_seconds"):
        if not isinstance(step[name], int | float) or not step[name] > 0:
            raise InputError(f"--measured {path}: {name} must be above 0, found {step[name]!r}")
    found = step["precision"]
    if found != run.precision:
        raise ConfigError(
            f"--measured {path}: was measured in {found}, the recipe runs in {run.precision}; "
            f"measure again, or set --precision {found}"
        )
    return dict(report)


def rate_of(own: argparse.Namespace, report: dict[str, Any]) -> Assumption:
    """TFLOP/s of useful work on one device."""
    stated = (own.peak_tflops is not None, own.share is not None)
    if report and any(stated):
        raise ConfigError("--measured and --peak-tflops with --share both give the rate; give one")
    if not report:
        if not all(stated):
            raise ConfigError(
                "no rate: give --measured JSON of `vlbeit bench step --json`, or --peak-tflops "
                "with --share"
            )
        return Assumption(
            name="rate",
            value=own.peak_tflops * own.share,
            unit="useful TFLOP/s a device",
            source=f"given: {100 * own.share:g} % of {own.peak_tflops:g} TFLOP/s",
        )
    step = report.get("step", report)
    # By CPU time where it is known: what others do on the machine then plays no part.
    seconds = step.get("step_cpu_seconds", step["step_seconds"])
    samples = " + ".join(f"{count} {name}s" for name, count in step["samples"].items())
    return Assumption(
        name="rate",
        value=step["needed_tflop"] / seconds,
        unit="useful TFLOP/s a device",
        source=f"measured: {own.measured}, {step['recipe']} with {samples} on {step['machine']}, "
        f"{step['threads']} thread(s), torch {step['torch']}",
    )


def decode_rate(given: float | None, path: str | None, report: dict[str, Any]) -> Assumption:
    """Images a second that one core decodes, crops, masks and collates."""
    unit = "images a second and core"
    if given is not None:
        return Assumption(name="decode", value=given, unit=unit, source="given")
    if "rates" in report:
        value = float(report["rates"]["images loaded"]["per_core"])
        source = f"measured: {path}, the loader's image stream"
        return Assumption(name="decode", value=value, unit=unit, source=source)
    source = "assumed: 500 x 375 JPEG by simplejpeg and torch on a Zen 4 core"
    return Assumption(name="decode", value=DECODED_PER_CORE, unit=unit, source=source)


def describe_plan(found: dict[str, Any]) -> str:
    """The plan as lines for a person."""
    step, run, data = found["step"], found["run"], found["data"]
    storage, gradients, memory = found["storage"], found["gradients"], found["memory"]
    coding = step["coding_tflop"]
    coded = f", {coding:,.1f} of them the visual tokenizer's" if coding else ", codes stored"
    device = f"{found['gpus']} device(s)"
    rows = [
        ("model", f"{found['recipe']}, {found['parameters'] / 1e6:.1f} M parameters"),
        ("step", f"{step['tflop']:,.1f} TFLOP{coded}; {step['tokens']:,} tokens"),
        ("time", f"{step['seconds']:g} s a step, {run['hours']:,.1f} h for {run['steps']:,} steps"),
        ("device hours", f"{run['gpu_hours']:,.1f} on {device}"),
        ("tokens", f"{run['tokens'] / 1e9:,.1f} billion, {step['tokens_per_second']:,} a second"),
        (
            "images",
            f"{data['images_per_second']:,.0f} a second to decode: {data['cores_to_decode']} "
            f"core(s); {data['read_gb_per_second']:g} GB/s to read",
        ),
        (
            "storage",
            f"{storage['gb_per_million_images']:g} GB a million images, "
            f"{storage['gb_per_million_stored_codes']:g} GB of stored codes; "
            f"{storage['checkpoint_gb']:g} GB a checkpoint, {storage['checkpoints_gb']:g} GB kept",
        ),
        (
            "gradients",
            f"{gradients['gb_sent_per_gpu_and_step']:g} GB sent by each device a step, "
            f"{1000 * gradients['seconds']:.1f} ms of {1000 * step['seconds']:,.0f}",
        ),
        (
            "memory",
            f"{memory['weights_gradients_moments_gb']:g} GB a device before activations"
            + (f", {memory['activations_gb']:g} GB of them" if "activations_gb" in memory else ""),
        ),
    ]
    if "cost" in run:
        rows.insert(4, ("cost", f"{run['cost']:,.2f}"))
    lines = [f"{name:<14} {value}" for name, value in rows]
    lines += ["", "It rests on"]
    for one in found["assumptions"]:
        lines.append(f"{one['name']:<14} {one['value']:g} {one['unit']} ({one['source']})")
    return "\n".join(lines)


def main(words: list[str]) -> int:
    """Print the plan, as text or as one JSON object."""
    asked = parse_plan(words)
    found = plan(asked)
    print(json.dumps(found, indent=1) if asked.as_json else describe_plan(found))
    return 0
