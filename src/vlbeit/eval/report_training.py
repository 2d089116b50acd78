"""The parts of report.html about the training itself: curves, time, data, machine, settings."""

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from vlbeit import __version__
from vlbeit.config import digest, to_dict
from vlbeit.eval.curves import Line, line_chart
from vlbeit.eval.evaluate import LoadedRun
from vlbeit.eval.report_html import key, paragraph, percent, section, table

OBJECTIVE_NAMES = {
    "mlm": "MLM: hidden words of texts",
    "mim": "MIM: hidden patches of images",
    "mvlm_text": "MVLM: hidden words of pairs, image seen",
    "mvlm_image": "MVLM: hidden patches of pairs, text seen",
}
SPEED_CAPTION = "Medians over all logged steps. On a machine that others used too they say little."


def duration(seconds: float) -> str:
    """Such as "8 min 05 s"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def trained_seconds(metrics: Sequence[Mapping[str, Any]]) -> float:
    return sum(float(row.get("seconds", 0.0)) + float(row.get("waited", 0.0)) for row in metrics)


def speed_rows(metrics: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
    """How fast the logged steps were, for people; None where the log does not say it."""

    def median(name: str) -> float | None:
        values = [float(row[name]) for row in metrics if row.get(name) is not None]
        return float(np.median(values)) if values else None

    total = trained_seconds(metrics)
    waited = sum(float(row.get("waited", 0.0)) for row in metrics)
    memory = [float(row["memory_mb"]) for row in metrics if "memory_mb" in row]
    figures: dict[str, tuple[float | None, Callable[[float], str]]] = {
        "steps logged": (len(metrics), "{:,}".format),
        "samples a second": (median("samples_per_second"), "{:,.1f}".format),
        "tokens a second": (median("tokens_per_second"), "{:,.0f}".format),
        "seconds a step": (median("seconds"), "{:.3f}".format),
        "share of the machine's matrix limit": (median("limit_share"), percent),
        "share of the time waiting for data": (waited / total if total else None, percent),
        "most memory (MB)": (max(memory, default=None), "{:,.0f}".format),
        "time of all logged steps": (total, duration),
    }
    return {
        name: None if value is None else shown(value) for name, (value, shown) in figures.items()
    }


def curves_part(
    metrics: Sequence[Mapping[str, Any]],
    evals: Sequence[Mapping[str, Any]],
    evaluation: Mapping[str, Any],
) -> list[str]:
    """Loss and accuracy of each objective over the steps."""
    charts = []
    for name, words in OBJECTIVE_NAMES.items():
        train = [(r["step"], r["objectives"][name]) for r in metrics if name in r["objectives"]]
        # A run stopped before its first checkpoint evaluates step 0 once more at its next start.
        held = sorted({r["step"]: r["objectives"].get(name) for r in evals}.items())
        held = [(step, found) for step, found in held if found is not None]
        if not train and not held:
            continue
        last = float(max(step for step, _ in [*train, *held]))
        cells = []
        for what, title in (("loss", "loss (nats)"), ("accuracy", "accuracy")):
            lines = [
                Line.smoothed(
                    "training", "train", [(s, number(r[what]), r["count"]) for s, r in train]
                ),
                Line(
                    name="held out",
                    kind="held",
                    steps=np.array([s for s, _ in held], dtype=np.float64),
                    values=np.array([number(r[what]) for _, r in held]),
                ),
            ]
            if what == "accuracy" and name in evaluation["objectives"]:
                share = evaluation["objectives"][name]["top_share"]
                level = Line(
                    name="most frequent answer",
                    kind="level",
                    steps=np.array([0.0, last]),
                    values=np.array([share, share]),
                )
                lines.insert(0, level)
            label = f"{words}, {title} over steps. " + " ".join(
                f"{line.name} from {line.values[0]:.3g} to {line.values[-1]:.3g}."
                for line in lines
                if len(line.values)
            )
            cells.append(
                f'<figure class="panel"><h3>{escape(words)}</h3><figcaption>{title}</figcaption>'
                f"{line_chart(label, lines, last, percent=what == 'accuracy')}</figure>"
            )
        charts.append(f'<div class="grid">{"".join(cells)}</div>')
    if not charts:
        return []
    return [
        section(
            "Training",
            paragraph(
                "Training steps (means of neighbouring steps) and the same held-out samples each "
                "time. In training one hidden word in ten is left readable and one is replaced by "
                "a random word (BERT's 80 / 10 / 10); held-out words are all really hidden, so "
                "the held-out line of words may lie a little above or below."
            ),
            key(
                [
                    ("train", "training"),
                    ("held line", "held out"),
                    ("level", "the most frequent answer"),
                ]
            ),
            *charts,
        )
    ]


def number(value: Any) -> float:
    """A number of a row: "nan" and hexadecimal floats are strings there."""
    return float.fromhex(value) if isinstance(value, str) else float(value)


def settings_part(
    run: LoadedRun,
    run_dir: Path,
    evaluation: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    seconds: Mapping[str, float],
) -> str:
    """How long it took, on what, from which data, with which settings."""
    times = [(name, duration(s)) for name, s in seconds.items()]
    if seconds:
        times.append(("together", duration(sum(seconds.values()))))
    elif metrics:
        times.append((f"{len(metrics):,} steps", duration(trained_seconds(metrics))))
    samples = ", ".join(f"{count:,} {name}s" for name, count in evaluation["samples"].items())
    if evaluation["skipped"]:
        samples += f"; {len(evaluation['skipped'])} bad ones left out"
    environment = machine(run_dir / "env.json")
    rows = [
        ("recipe", escape(run.config.recipe)),
        ("checkpoint", escape(Path(evaluation["checkpoint"]).name)),
        ("data", escape(", ".join(evaluation["data"]))),
        (f"evaluated on ({escape(evaluation['split'])})", escape(samples)),
        ("config digest", f"{digest(run.config)[:16]}\u2026"),
        ("text tokenizer", f"{run.text.size} pieces, {run.text.digest[:16]}\u2026"),
        *([] if run.visual is None else [visual_row(run)]),
        ("vlbeit", escape(__version__)),
        *environment,
    ]
    parts = []
    if times:
        parts.append(table("Wall time.", (), [[escape(n), t] for n, t in times]))
    speed = [(name, shown) for name, shown in speed_rows(metrics).items() if shown is not None]
    if metrics:
        parts.append(table(f"Speed. {SPEED_CAPTION}", (), speed))
    parts.append(table("Run and machine.", (), rows))
    config = json.dumps(to_dict(run.config), indent=2)
    parts.append(
        f"<details><summary>Every setting of the run</summary><pre>{escape(config)}</pre></details>"
    )
    shown = json.dumps(dict(evaluation), indent=1)
    parts.append(
        f"<details><summary>The evaluation as JSON</summary><pre>{escape(shown)}</pre></details>"
    )
    parts.append(
        '<footer class="soft"><p>Written by vlbeit. Method: VL-BEiT (Bao et al., 2022), '
        "arXiv 2206.01127. The page is one file: no script, nothing is loaded from "
        "elsewhere.</p></footer>"
    )
    return section("How it was made", *parts)


def visual_row(run: LoadedRun) -> tuple[str, str]:
    assert run.visual is not None
    return "visual tokenizer", f"{run.visual.codes} codes, {run.visual.digest[:16]}\u2026"


def machine(path: Path) -> list[tuple[str, str]]:
    """Rows about where it ran, from env.json; none without that file."""
    if not path.is_file():
        return []
    found = json.loads(path.read_text())
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items() if v and k != "vlbeit")
    device = found["gpu"] or found["device"]
    processes = f"{found['world_size']} process(es) x {found['threads']} thread(s)"
    return [
        ("device", escape(f"{device}, {found['cores']} cores, {processes}")),
        ("platform", escape(f"{found['platform']}, Python {found['python']}")),
        ("packages", escape(versions)),
    ]
