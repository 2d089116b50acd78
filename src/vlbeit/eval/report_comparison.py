"""Runs of one kind side by side, as one page: figures, curves, speed, settings that differ; of a
single fine-tuned run the same with all of its settings.

All of it comes from the run folders' own files (config.json, metrics.jsonl, eval.jsonl, env.json
and, where it is there, what `vlbeit eval RUN --out RUN/evaluation.json` wrote). Nothing is
evaluated, so neither the data nor the checkpoints need be there any more.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from vlbeit import __version__
from vlbeit.data.manifest import write_atomic
from vlbeit.errors import ConfigError, InputError
from vlbeit.eval.curves import Line, line_chart
from vlbeit.eval.report_html import key, page, paragraph, percent, section, table, with_interval
from vlbeit.eval.report_tokenizer import is_tokenizer_run
from vlbeit.eval.report_training import OBJECTIVE_NAMES, SPEED_CAPTION, number, speed_rows
from vlbeit.eval.run_rows import EVALUATION, read_rows
from vlbeit.jsonfile import read_json

MOST_RUNS = 8
"""As many colours as can be told apart."""
LAST_ROWS = 20
"""Rows of the log that the end of training is."""
MISSING = "\u2014"
PRETRAINING = "pretraining"
UNCOMPARED = ("run_dir",)
"""Settings that differ by nature."""
MACHINE = ("device", "gpu", "cores", "world_size", "threads", "platform", "python")
"""Of env.json; the host's name is left out."""


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """What a run folder says of itself."""

    name: str
    """The shortest end of its path that no other run has."""
    kind: str
    """PRETRAINING or the name of the task."""
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    """By step, each step once."""
    evaluation: dict[str, Any]

    @property
    def step(self) -> int:
        """The last one that was logged."""
        return int(self.metrics[-1]["step"])


def write_comparison(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page.

    Args:
        folders: run folders, one to eight, of pretraining or of one task.
        out: the page; None: comparison.html beside the first run.

    Raises:
        ConfigError: a run that is named twice, runs of different kinds, a tokenizer's, or too many.
        InputError: a folder without a run, or a run that has logged no step yet.
        SaveError: the page cannot be written.
    """
    runs = read_runs(folders)
    out = out or folders[0].absolute().parent / "comparison.html"
    names = [run.name for run in runs]
    if len(runs) == 1:
        settings = section("Settings", all_settings(runs[0]))
    else:
        settings = section("Settings that differ", *settings_tables(runs))
    parts = [
        header_part(runs),
        section("Figures", *figure_tables(runs)),
        *curves_part(runs),
        section("Speed", speed_table(runs)),
        settings,
        footer(),
    ]
    write_atomic(out, page(" / ".join(names), parts).encode())
    return out


# --- what is read --------------------------------------------------------------------------------


def read_runs(folders: Sequence[Path]) -> list[ComparedRun]:
    """The runs, in the order given; `write_comparison` says what is refused."""
    if len(folders) > MOST_RUNS:
        raise ConfigError(
            f"{len(folders)} runs: at most {MOST_RUNS} can be told apart on a page; leave some out"
        )
    places = [folder.resolve() for folder in folders]
    for count, place in enumerate(places):
        if place in places[:count]:
            first = folders[places.index(place)]
            raise ConfigError(f"{folders[count]}: the same run as {first}; name each run once")
    runs = [
        read_run(folder, name) for folder, name in zip(folders, short_names(places), strict=True)
    ]
    kinds = {run.kind for run in runs}
    if len(kinds) > 1:
        found = "; ".join(f"{run.name}: {run.kind}" for run in runs)
        raise ConfigError(
            f"runs of different kinds have no curves or figures in common ({found}); compare those "
            "of pretraining, or those of one task"
        )
    return runs


def read_run(folder: Path, name: str) -> ComparedRun:
    """Raises InputError: no run there; ConfigError: one of a tokenizer."""
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder}: no run there: it has no config.json; name a folder that `vlbeit pretrain` "
            "or `vlbeit finetune` wrote (--run-dir)"
        )
    if is_tokenizer_run(folder):
        raise ConfigError(
            f"{folder}: a tokenizer's training; `vlbeit report {folder}` shows it by itself"
        )
    metrics = read_rows(folder / "metrics.jsonl")
    if not metrics:
        raise InputError(
            f"{folder}: nothing to show: its metrics.jsonl is missing or has no whole row yet"
        )
    config = read_json(folder / "config.json")
    evals = {row["step"]: row for row in read_rows(folder / "eval.jsonl")}
    return ComparedRun(
        name=name,
        kind=str(config.get("task", PRETRAINING)),
        config=config,
        environment=read_json(folder / "env.json") if (folder / "env.json").is_file() else {},
        metrics=metrics,
        evals=[evals[step] for step in sorted(evals)],
        evaluation=read_json(folder / EVALUATION) if (folder / EVALUATION).is_file() else {},
    )


def short_names(places: Sequence[Path]) -> list[str]:
    """The last part of each path, and as many before it as tell it from all others.

    Args:
        places: different absolute paths.
    """
    found = []
    for place in places:
        others = [other.parts for other in places if other != place]
        count = next(
            n
            for n in range(1, len(place.parts) + 1)
            if all(other[-n:] != place.parts[-n:] for other in others)
        )
        found.append(str(Path(*place.parts[-count:])))
    return found


# --- the parts of the page -----------------------------------------------------------------------


def header_part(runs: Sequence[ComparedRun]) -> str:
    kind = runs[0].kind if runs[0].kind == PRETRAINING else f"fine-tuning ({runs[0].kind})"
    steps = ", ".join(f"{run.name} {run.step:,}" for run in runs)
    title = f"{len(runs)} runs side by side"
    text = (
        f"Runs of {kind}, from their own logs. Steps logged: {steps}. A difference between two "
        "runs holds for their seeds; with one seed each it may be chance."
    )
    if len(runs) == 1:
        title = runs[0].name
        text = f"A run of {kind}, from its own log. Steps logged: {runs[0].step:,}."
    return "\n".join(
        [
            "<header>",
            f"<h1>{escape(title)}</h1>",
            paragraph(text, "soft"),
            legend(runs),
            "</header>",
        ]
    )


def legend(runs: Sequence[ComparedRun]) -> str:
    return key((f"line run{place}", run.name) for place, run in enumerate(runs))


def row_of(name: str, values: Sequence[str | None]) -> list[str]:
    """A row of a table: HTML; None is shown as missing."""
    return [escape(name), *(MISSING if value is None else value for value in values)]


def figure_tables(runs: Sequence[ComparedRun]) -> list[str]:
    """The end of training, the last held-out rows, and the evaluations that are there."""
    head = ("", *(run.name for run in runs))
    ends = [end_of_training(run) for run in runs]
    rows = [row_of("last step", [f"{run.step:,}" for run in runs])]
    parts = [
        table(
            f"In training, means over the last {LAST_ROWS} logged steps.",
            head,
            rows + objective_rows(ends),
        )
    ]
    lasts = [run.evals[-1] if run.evals else {} for run in runs]
    if any(lasts):
        rows = [row_of("held out at step", [f"{r['step']:,}" if r else None for r in lasts])]
        rows += objective_rows([row.get("objectives", {}) for row in lasts])
        for name in united(row.get("figures", {}) for row in lasts):
            values = [row.get("figures", {}).get(name) for row in lasts]
            rows.append(row_of(name, [None if v is None else f"{number(v):.4f}" for v in values]))
        parts.append(
            table(
                "The last held-out row of each log: the part of the held-out samples that a run "
                "looks at while it trains, without an interval. Losses and figures are comparable "
                "between runs with the same data and tokenizers.",
                head,
                rows,
            )
        )
    else:
        parts.append(
            paragraph("No run here looked at held-out samples while it trained (log.eval_every 0).")
        )
    evaluations = [evaluated(run.evaluation) for run in runs]
    if any(evaluations):
        steps = [run.evaluation.get("step") for run in runs]
        rows = [row_of("step", [None if step is None else f"{step:,}" for step in steps])]
        for name in united(evaluations):
            estimates = [found.get(name) for found in evaluations]
            rows.append(row_of(name, [None if e is None else with_interval(e) for e in estimates]))
        parts.append(
            table(
                f"What `vlbeit eval` found on all held-out samples ({EVALUATION} of each run), "
                "with 95 % bootstrap intervals over samples.",
                head,
                rows,
            )
        )
    else:
        parts.append(
            paragraph(
                "For figures of all held-out samples with intervals: "
                f"`vlbeit eval RUN --out RUN/{EVALUATION}` of each run, then this command again."
            )
        )
    return parts


def end_of_training(run: ComparedRun) -> dict[str, dict[str, float]]:
    """Loss and accuracy of each objective over the last rows of the log, by what was counted."""
    found = {}
    for name in objectives_of([run]):
        rows = [r["objectives"][name] for r in run.metrics[-LAST_ROWS:] if name in r["objectives"]]
        counts = np.array([row["count"] for row in rows], dtype=np.float64)
        if counts.sum() > 0:
            found[name] = {
                what: float(np.average([number(row[what]) for row in rows], weights=counts))
                for what in ("loss", "accuracy")
            }
    return found


def objective_rows(found: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[list[str]]:
    """Rows of a table: loss and accuracy of each objective that a run has."""
    rows = []
    for name in united(found):
        title = OBJECTIVE_NAMES.get(name, name)
        scores = [one.get(name) for one in found]
        losses = [f"{number(score['loss']):.4f}" if score else None for score in scores]
        shares = [percent(number(score["accuracy"])) if score else None for score in scores]
        rows += [row_of(f"{title}, loss (nats)", losses), row_of(f"{title}, accuracy", shares)]
    return rows


def evaluated(evaluation: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Estimates (value, low, high) by name, from what `vlbeit eval` wrote."""
    if "figures" in evaluation:
        return dict(evaluation["figures"])
    found = {
        f"{OBJECTIVE_NAMES.get(name, name)}, accuracy": row["accuracy"]
        for name, row in evaluation.get("objectives", {}).items()
    }
    gap = evaluation.get("word_gap", {}).get("sighted_minus_blind")
    if gap is not None:
        found["hidden words, sighted minus blind"] = gap["accuracy"]
    return found


def united(mappings: Iterator[Mapping[str, Any]] | Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of all, in the order in which they first occur."""
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def objectives_of(runs: Sequence[ComparedRun]) -> list[str]:
    rows = (row["objectives"] for run in runs for row in (*run.metrics[-1:], *run.evals[-1:]))
    return united(rows)


def curves_part(runs: Sequence[ComparedRun]) -> list[str]:
    """Loss and accuracy of each objective, then the task's figures, one line a run."""
    last = float(max(run.step for run in runs))
    panels = [
        objective_chart(runs, name, what, title, last)
        for name in objectives_of(runs)
        for what, title in (("loss", "loss (nats)"), ("accuracy", "accuracy"))
    ]
    figures = united(row.get("figures", {}) for run in runs for row in run.evals)
    panels += [figure_chart(runs, name, last) for name in figures if "/" not in name]
    return [
        section(
            "Training",
            paragraph(
                "Thin lines: training steps, means of neighbouring ones. Lines with dots: the same "
                "held-out samples each time."
            ),
            legend(runs),
            f'<div class="grid">{"".join(panels)}</div>',
        )
    ]


def objective_chart(
    runs: Sequence[ComparedRun], name: str, what: str, title: str, last: float
) -> str:
    lines = []
    for place, run in enumerate(runs):
        rows = [(r["step"], r["objectives"][name]) for r in run.metrics if name in r["objectives"]]
        lines.append(
            Line.smoothed(
                f"{run.name} in training",
                f"train run{place}",
                [(step, number(row[what]), row["count"]) for step, row in rows],
            )
        )
    for place, run in enumerate(runs):
        held = [(r["step"], r["objectives"][name]) for r in run.evals if name in r["objectives"]]
        lines.append(held_line(run, place, [(step, number(row[what])) for step, row in held]))
    return chart(OBJECTIVE_NAMES.get(name, name), title, lines, last, shares=what == "accuracy")


def figure_chart(runs: Sequence[ComparedRun], name: str, last: float) -> str:
    lines = []
    for place, run in enumerate(runs):
        rows = [(r["step"], r["figures"][name]) for r in run.evals if name in r.get("figures", {})]
        lines.append(held_line(run, place, [(step, number(value)) for step, value in rows]))
    shares = all(value <= 1.0 for line in lines for value in line.values)
    return chart(name, "held-out figure of the task", lines, last, shares=shares)


def held_line(run: ComparedRun, place: int, points: Sequence[tuple[float, float]]) -> Line:
    finite = [(step, value) for step, value in points if np.isfinite(value)]
    return Line(
        name=f"{run.name} held out",
        kind=f"held run{place}",
        steps=np.array([step for step, _ in finite], dtype=np.float64),
        values=np.array([value for _, value in finite], dtype=np.float64),
    )


def chart(name: str, title: str, lines: Sequence[Line], last: float, *, shares: bool) -> str:
    label = f"{name}, {title} over steps. " + " ".join(
        f"{line.name} from {line.values[0]:.3g} to {line.values[-1]:.3g}."
        for line in lines
        if len(line.values)
    )
    return (
        f'<figure class="panel"><h3>{escape(name)}</h3><figcaption>{escape(title)}</figcaption>'
        f"{line_chart(label, lines, last, percent=shares)}</figure>"
    )


def speed_table(runs: Sequence[ComparedRun]) -> str:
    """How fast the steps were and on what."""
    found = [speed_rows(run.metrics) for run in runs]
    rows = [row_of(name, [one[name] for one in found]) for name in found[0]]
    for name in MACHINE:
        told = [run.environment.get(name) for run in runs]
        if any(value is not None for value in told):
            rows.append(
                row_of(
                    name.replace("_", " "),
                    [None if v is None else wrapped(str(v)) for v in told],
                )
            )
    return table(
        SPEED_CAPTION,
        ("", *(run.name for run in runs)),
        rows,
    )


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by full name ("optim.lr")."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= flattened(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def settings_tables(runs: Sequence[ComparedRun]) -> list[str]:
    """Settings and versions of packages that are not the same in all runs."""
    settings = [
        {name: v for name, v in flattened(run.config).items() if name not in UNCOMPARED}
        for run in runs
    ]
    versions = [dict(run.environment.get("versions", {})) for run in runs]
    parts = []
    for what, found in (("settings", settings), ("packages", versions)):
        names = united(found)
        rows = differing(names, found)
        if rows:
            caption = f"{len(rows)} of {len(names)} {what} differ; {MISSING}: not in this run."
            parts.append(table(caption, ("", *(run.name for run in runs)), rows))
        elif names:
            parts.append(paragraph(f"All {len(names)} {what} are the same."))
    return parts


def all_settings(run: ComparedRun) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in run.environment.get("versions", {}).items() if v)
    said = paragraph(f"Packages: {versions}.", "soft") if versions else ""
    config = escape(json.dumps(run.config, indent=2))
    return (
        f"{said}<details><summary>Every setting of the run</summary><pre>{config}</pre></details>"
    )


def differing(names: Sequence[str], found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of a table for the names whose values are not all the same."""
    rows = []
    for name in names:
        shown = [json.dumps(tree[name]) if name in tree else None for tree in found]
        if len(set(shown)) > 1:
            cells = [None if text is None else wrapped(text) for text in shown]
            rows.append(row_of(name, cells))
    return rows


def wrapped(text: str) -> str:
    """HTML of a value that may be long."""
    return f'<span class="value">{escape(text)}</span>'


def footer() -> str:
    return (
        f'<footer class="soft"><p>Written by vlbeit {__version__}. The page is one file: no '
        "script, nothing is loaded from elsewhere.</p></footer>"
    )
