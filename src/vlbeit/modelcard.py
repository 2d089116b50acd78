"""The model card (README.md) of a folder for the Hugging Face hub: what was measured, and no more.

A fact that the run folder does not have is not in the card, or the card says that it is not
known.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlbeit.config import ModelConfig

PAPER = "https://arxiv.org/abs/2206.01127"
PIPELINES = {
    "vqa": "visual-question-answering",
    "classification": "image-classification",
    "segmentation": "image-segmentation",
}
"""The hub's names of tasks, where it has one."""
UNKNOWN = "not stated"


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card is made of. Only `model` and `parameters` are known of a model without a run."""

    model: ModelConfig
    parameters: int
    name: str = "A VL-BEiT model"
    task: str = ""
    """That it was fine-tuned for; "": pretrained."""
    start: str = ""
    """Name of the run that a fine-tuned one began from."""
    recipe: str = ""
    step: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The resolved config of the run."""
    sources: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Records by stream and source."""
    data_licences: Mapping[str, str] = field(default_factory=dict)
    """By prepared folder, where its dataset.json has one."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """env.json of the run."""
    seconds: float | None = None
    """Of all steps, from metrics.jsonl."""
    held_out: Mapping[str, Any] = field(default_factory=dict)
    """The last row of eval.jsonl up to `step`."""
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """What `vlbeit eval --json` printed of this checkpoint."""
    licence: str = ""
    """SPDX identifier of the weights."""


def write_card(facts: CardFacts) -> str:
    """README.md with the hub's metadata in front."""
    parts = [
        f"# {facts.name}",
        _summary(facts),
        *_section("Use", _use(facts)),
        *_section("Training", _training(facts)),
        *_section("Data", _data(facts)),
        *_section("Evaluation", _evaluation(facts)),
        *_section("Limits", _limits(facts)),
        *_section("Licence", _licence(facts)),
    ]
    return f"---\n{_metadata(facts)}\n---\n\n" + "\n\n".join(parts) + "\n"


def _metadata(facts: CardFacts) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    task = facts.task or "pretraining"
    # Only what `vlbeit eval` said of these weights; a row of the training log may be of others.
    measured = _measured(facts) if facts.evaluation else ()
    results = [
        EvalResult(
            task_type=PIPELINES.get(facts.task, "image-text-to-text"),
            dataset_type=_data_name(facts),
            dataset_name=_data_name(facts),
            dataset_split=str(facts.evaluation.get("split", "val")),
            metric_type=name,
            metric_value=round(value, 6),
        )
        for name, value, _ in measured
    ]
    data = ModelCardData(
        library_name="vlbeit",
        license=facts.licence or None,
        tags=["vl-beit", "vision-language", "mixture-of-experts", task],
        pipeline_tag=PIPELINES.get(facts.task),
        model_name=facts.name if results else None,
        eval_results=results or None,
    )
    text: str = data.to_yaml()
    return text.strip()


def _section(title: str, lines: Iterator[str]) -> list[str]:
    found = "\n".join(lines)
    return [f"## {title}", found] if found else []


def _summary(facts: CardFacts) -> str:
    model = facts.model
    made = (
        f"fine-tuned for {facts.task} by `vlbeit finetune`"
        if facts.task
        else "pretrained by masked prediction on " + " and ".join(f"{s}s" for s in facts.sources)
        if facts.step is not None
        else "whose training this folder says nothing of"
    )
    rows, columns = (side // model.patch for side in model.image_size)
    return (
        f"A bidirectional vision-language Transformer ([VL-BEiT]({PAPER})) with modality experts, "
        f"{made}. {facts.parameters:,} parameters: {model.layers} layers of width {model.width}, "
        f"{model.heads} heads, a vision-language expert in the top {model.vl_layers}; "
        f"{model.image_size[0]} x {model.image_size[1]} pixels in {rows} x {columns} patches, "
        f"texts of up to {model.text_positions} tokens from a vocabulary of {model.vocab:,}, "
        f"{model.codes:,} visual codes. Not the authors' weights: none were published."
    )


def _use(facts: CardFacts) -> Iterator[str]:
    yield "```python"
    yield "import vlbeit"
    yield ""
    if facts.step is None:
        yield 'model = vlbeit.VLBeit.from_pretrained("FOLDER")'
    else:
        yield 'run = vlbeit.load("NAMESPACE/NAME")  # or the folder itself'
        yield "run.modes  # what it can be asked"
    yield "```"


def _training(facts: CardFacts) -> Iterator[str]:
    if facts.step is None:
        return
    settings, machine = facts.settings, facts.environment
    optim, batch = settings.get("optim", {}), settings.get("batch", {})
    sizes = ", ".join(f"{name} {size}" for name, size in batch.items() if name != "micro")
    yield f"- recipe `{facts.recipe}`, {facts.step:,} steps, seed {settings.get('seed')}"
    if facts.start:
        begin = "its sizes only, weights from scratch" if settings.get("scratch") else "its weights"
        yield f"- start: `{facts.start}` ({begin})"
    yield f"- samples a step: {sizes}; precision {settings.get('precision')}"
    yield (
        f"- AdamW, peak learning rate {optim.get('lr')}, {optim.get('schedule')} over "
        f"{optim.get('total_steps'):,} steps, {optim.get('warmup_steps'):,} of warmup, weight "
        f"decay {optim.get('weight_decay')}"
    )
    if machine:
        versions = machine.get("versions", {})
        device = machine.get("gpu") or f"{machine.get('device')}, {machine.get('cores')} core(s)"
        yield (
            f"- machine: {machine.get('world_size')} process(es) on {device}; vlbeit "
            f"{versions.get('vlbeit')}, torch {versions.get('torch')}"
        )
    if facts.seconds is not None:
        yield f"- time in steps: {facts.seconds / 3600:.2f} hours"
    yield "- every setting: `config.json`"


def _data(facts: CardFacts) -> Iterator[str]:
    if not facts.sources:
        return
    yield "| stream | source | samples |"
    yield "|---|---|---|"
    for stream, group in facts.sources.items():
        for name, records in group.items():
            yield f"| {_cell(stream)} | {_cell(name)} | {records:,} |"
    yield ""
    for folder, licence in facts.data_licences.items():
        yield f"Licence of `{folder}`, as its `dataset.json` has it: {licence}."
    if not facts.data_licences:
        yield "The data folders state no licence."


def _evaluation(facts: CardFacts) -> Iterator[str]:
    rows = list(_measured(facts))
    if not rows:
        yield "Nothing was measured on held-out data."
        return
    if facts.evaluation:
        split = facts.evaluation.get("split")
        yield (
            f"By `vlbeit eval`, split {split} of {_data_name(facts)}, in brackets 95 % bootstrap "
            "intervals:"
        )
    else:
        yield (
            f"While training, at step {facts.held_out['step']:,} (the weights here are of step "
            f"{facts.step:,}), on the few samples of the val split that `log.eval_samples` names; "
            "no interval was taken:"
        )
    yield ""
    yield "| figure | value | |"
    yield "|---|---|---|"
    for name, value, words in rows:
        yield f"| {_cell(name)} | {value:.4f} | {_cell(words)} |"


def _measured(facts: CardFacts) -> Iterator[tuple[str, float, str]]:
    """(figure, value, the rest in words) of the evaluation, else of the last held-out row."""
    if facts.evaluation:
        for name, row in facts.evaluation.get("figures", {}).items():
            yield name, float(row["value"]), _words_of(row)
        for name, row in facts.evaluation.get("objectives", {}).items():
            yield f"{name} accuracy", *_accuracy(row)
        return
    for name, value in facts.held_out.get("figures", {}).items():
        yield name, float(value), ""
    for name, row in facts.held_out.get("objectives", {}).items():
        yield f"{name} accuracy", float(row["accuracy"]), f"loss {row['loss']:.3f}"


def _accuracy(row: Mapping[str, Any]) -> tuple[float, str]:
    """An objective's accuracy is a number, or one with its interval."""
    found = row["accuracy"]
    words = f"loss {row['loss']:.3f}" if isinstance(row.get("loss"), float) else ""
    if isinstance(found, Mapping):
        return float(found["value"]), ", ".join(filter(None, (_words_of(found), words)))
    return float(found), words


def _words_of(row: Mapping[str, Any]) -> str:
    parts = []
    if "low" in row and "high" in row:
        parts.append(f"[{row['low']:.4f}, {row['high']:.4f}]")
    if "baseline" in row:
        parts.append(f"without looking {row['baseline']['value']:.4f}")
    if "samples" in row:
        parts.append(f"{row['samples']:,} samples")
    return ", ".join(parts)


def _limits(facts: CardFacts) -> Iterator[str]:
    if facts.step is None:
        yield "- What it was trained on and how well it does is not known here."
        return
    samples = sum(sum(group.values()) for group in facts.sources.values())
    before = f"; what `{facts.start}` saw before is not in this card" if facts.start else ""
    yield (
        f"- It was trained on the {samples:,} samples above{before}. On pictures and texts unlike "
        "these nothing was measured."
    )
    yield "- Bias, safety and behaviour on people were not measured."
    yield (
        f"- Pictures are squashed to {facts.model.image_size[0]} x {facts.model.image_size[1]}, "
        "other sizes go through resized position tables."
    )
    if facts.task == "vqa":
        yield "- It picks one of the answers in `task.json`; it cannot say anything else."
    if not facts.evaluation:
        yield "- No evaluation with intervals was in the folder it was exported from."


def _licence(facts: CardFacts) -> Iterator[str]:
    if facts.licence:
        yield f"The weights: {facts.licence}, as stated by whoever exported them."
    else:
        yield (
            f"The weights: {UNKNOWN}. Whoever publishes them decides, within what the data above "
            "allow."
        )
    yield "The code that reads them, vlbeit: Apache-2.0."


def _data_name(facts: CardFacts) -> str:
    names: Sequence[str] = facts.evaluation.get("data") or facts.settings.get("data") or ()
    return ", ".join(name.rstrip("/").rsplit("/", 1)[-1] for name in names) or "held-out data"


def _cell(text: str) -> str:
    """Text that cannot leave its cell of a table."""
    return str(text).replace("|", "\\|").replace("\n", " ")
