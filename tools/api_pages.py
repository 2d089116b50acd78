"""Write docs/api/*.md from the docstrings of the public names: `python tools/api_pages.py`.

The pages are committed; tests/test_api_pages.py fails when they are not what this script writes.
Sources are read, not imported (griffe; docs/decisions/0012).
"""

import logging
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "api"

PAGES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "predictor": (
        "Ask a run",
        "`vlbeit.load` and what it gives. Guide: [asking a run](../finetune.md#asking-a-run).",
        (
            "serve.predictor.load", "serve.predictor.Predictor", "serve.predictor.Answer",
            "serve.predictor.Verdict", "serve.predictor.Relation", "serve.predictor.Match",
            "serve.predictor.Segmented", "serve.predictor.ClassShare", "eval.fill.FilledWords",
            "eval.fill.Guess", "eval.fill.FilledPatches", "eval.word_attention.Attended",
            "tasks.retrieval_index.Index", "tasks.retrieval_index.Found",
        ),
    ),
    "model": (
        "The model",
        "The network and the types that go through it. Guide: [the model](../model.md).",
        (
            "nn.model.VLBeit", "nn.embed.TextEmbed", "nn.embed.ImageEmbed",
            "nn.backbone.Backbone", "nn.mome.Block", "nn.mome.Expert", "nn.attention.Attention",
            "types.Modality", "types.Span", "types.Batch", "types.TaskBatch", "types.States",
            "types.Score",
        ),
    ),
    "config": (
        "Settings and recipes",
        "Every setting of a run, its default and its meaning; the same names are flags of the "
        "command line and keys of YAML.",
        (
            "config.PretrainConfig", "config.ModelConfig", "config.InputConfig",
            "config.CropConfig", "config.BatchConfig", "config.MaskingConfig",
            "config.ObjectiveConfig", "config.OptimConfig", "config.TokenizersConfig",
            "config.TextTokenizerConfig", "config.VisualTokenizerConfig", "config.LogConfig",
            "config.RuntimeConfig", "config.FinetuneConfig", "config.TaskInputConfig",
            "config.RandAugmentConfig", "config.TaskBatchConfig", "config.FinetuneOptimConfig",
            "config.ClassificationConfig", "config.VqaConfig", "config.RetrievalConfig",
            "config.SegmentationConfig", "config.TokenizerRunConfig", "config.ServeConfig",
            "config.to_dict", "config.from_dict", "config.finetune_config", "config.digest",
            "recipes.tiny", "recipes.small", "recipes.base", "recipes.large",
        ),
    ),
    "training": (
        "Masks, objectives, training",
        "What is hidden, what is learned from it, and the runs. Guide: [the model](../model.md).",
        (
            "masking.block_masked", "masking.word_masked", "masking.replace_words",
            "objectives.score_batch", "objectives.count_targets",
            "train.pretrain.pretrain", "train.finetune.finetune", "train.demo.run_demo",
            "eval.evaluate.load_run", "eval.evaluate.evaluate_run",
            "eval.downstream.load_task_run", "eval.downstream.evaluate_task",
        ),
    ),
    "tasks": (
        "Tasks",
        "What a downstream task is made of. Guide: [add your own task](../tasks.md).",
        (
            "tasks.Task", "tasks.Figure", "tasks.learn_facts", "tasks.build_task",
            "data.task_stream.TaskData", "data.task_stream.Example", "data.task_stream.Items",
            "data.task_stream.Pictures", "data.task_stream.read_field",
        ),
    ),
    "tokenizers": (
        "Tokenizers",
        "Text to pieces, pictures to codes. Guide: [tokenizers](../tokenizers.md).",
        (
            "tokens.text.TextTokenizer", "tokens.text.train_text_tokenizer",
            "tokens.text.import_sentencepiece", "tokens.text.import_bert_vocab",
            "tokens.text.special_tokens_only", "tokens.visual.VisualTokenizer",
            "tokens.visual.load_visual_tokenizer", "tokens.vqkd.VQKDTokenizer",
            "tokens.imported.ImportedTokenizer", "tokens.imported.import_tokenizer",
        ),
    ),
    "data": (
        "Data",
        "Records on disk, dataset folders, pictures and texts as every command reads them. "
        "Guide: [data](../data.md).",
        (
            "data.records.Record", "data.records.RecordSource", "data.records.ShardWriter",
            "data.records.write_shards", "data.records.verify_shards", "data.records.BadSample",
            "data.dataset.Dataset", "data.dataset.SourceInfo", "data.dataset.open_sources",
            "data.transforms.decode_image", "data.transforms.clean_text",
            "data.scenes.draw_scene", "data.scenes.draw_statement", "data.scenes.prepare_scenes",
        ),
    ),
    "convert": (
        "Convert",
        "Weights of other models in, BEiT out. Guide: [weights in and out](../convert.md).",
        (
            "convert.importing.convert", "convert.importing.import_run",
            "convert.importing.Converted", "convert.layouts.Request", "convert.rewriting.Receipt",
            "convert.hf_export.export_hf_beit",
        ),
    ),
    "checkpoints": (
        "Checkpoints and the hub",
        "Run folders, checkpoints and repositories. Guide: [folders and the hub](../hub.md).",
        (
            "checkpoint.Checkpoint", "checkpoint.find_checkpoint", "checkpoint.list_checkpoints",
            "checkpoint.open_checkpoint", "checkpoint.load_newest", "checkpoint.save_checkpoint",
            "hub.is_repository", "hub.local_folder",
        ),
    ),
    "errors": (
        "Errors",
        "What a user can cause or meet, each with the exit code that ends a command.",
        (
            "errors.VLBeitError", "errors.DataBudgetError", "errors.InputError",
            "errors.NonFiniteError", "errors.LostWorkerError", "errors.SaveError",
            "errors.StopRequested", "errors.UnsafeError", "errors.ConfigError",
        ),
    ),
}  # fmt: skip
"""Page -> its title, its first words, and the public names on it, below `vlbeit`."""
HOMES = {"serve.predictor.load": "vlbeit.load", "serve.predictor.Predictor": "vlbeit.Predictor"}
HOMES |= {"nn.model.VLBeit": "vlbeit.VLBeit"}
"""Names that are imported from the package itself."""
HIDDEN = ("__init__", "forward", "__call__")
"""Methods without a public name that a reader still calls: shown where they have a docstring."""


def load_package(sources: Path = ROOT / "src") -> griffe.Object:
    """The package as griffe reads it from its sources; nothing of it is imported."""
    # "text, image: ..." for two parameters is this house's way; griffe only knows one a line.
    logging.getLogger("griffe").setLevel(logging.ERROR)
    package = griffe.load("vlbeit", search_paths=[str(sources)], docstring_parser="google")
    assert isinstance(package, griffe.Object)
    return package


def public_members(thing: griffe.Object) -> Iterator[griffe.Object]:
    """Methods, properties and fields of a class that its page shows, in their order."""
    for name, member in thing.members.items():
        if member.is_alias or (name.startswith("_") and name not in HIDDEN):
            continue
        if name in HIDDEN and member.docstring is None:
            continue
        inside = member.is_attribute and "class-attribute" not in member.labels
        if inside and member.annotation is None:  # type: ignore[attr-defined]
            continue  # set by __init__ for the class's own use
        yield member


def pages(package: griffe.Object) -> dict[str, str]:
    """The text of every page by its file's name."""
    made = {}
    for name, (title, about, names) in PAGES.items():
        parts = [
            "<!-- written by tools/api_pages.py from the docstrings; change those -->",
            f"# {title}",
            about,
        ]
        for below in names:
            parts += list(_entry(below, package[below]))
        made[f"{name}.md"] = "\n\n".join(parts) + "\n"
    rows = [
        f"- [{title}]({name}.md): " + ", ".join(f"`{below.rsplit('.', 1)[-1]}`" for below in names)
        for name, (title, _, names) in PAGES.items()
    ]
    made["README.md"] = "\n\n".join(
        [
            "<!-- written by tools/api_pages.py from the docstrings; change those -->",
            "# API reference",
            "From the docstrings of the code. What is not listed here may change without a word in "
            "the changelog.",
            "\n".join(rows),
        ]
    )
    made["README.md"] += "\n"
    return made


def _entry(below: str, thing: griffe.Object) -> Iterator[str]:
    home = HOMES.get(below, f"vlbeit.{below}")
    yield f"## {home.rsplit('.', 1)[-1]}"
    place = f"../../src/{str(thing.relative_package_filepath)}"
    yield f"`{_signature(thing, home)}` ([source]({place}))"
    yield from _docstring(thing)
    if not thing.is_class:
        return
    fields = [m for m in public_members(thing) if m.is_attribute and "property" not in m.labels]
    if fields:
        yield "\n".join(["| field | type | default | |", "|---|---|---|---|", *map(_field, fields)])
    for member in public_members(thing):
        if member.is_function or "property" in member.labels:
            yield f"### {home.rsplit('.', 1)[-1]}.{member.name}"
            forms = getattr(member, "overloads", None) or [member]
            yield "\\\n".join(f"`{_signature(form, member.name)}`" for form in forms)
            yield from _docstring(member)


def _signature(thing: griffe.Object, shown: str) -> str:
    if thing.is_class:
        return f"class {shown}"
    if not thing.is_function:
        return f"{shown}: {thing.annotation}"  # type: ignore[attr-defined]
    words: list[str] = []
    star = False
    for parameter in thing.parameters:  # type: ignore[attr-defined]
        if parameter.name in ("self", "cls"):
            continue
        kind = parameter.kind.value
        if kind == "keyword-only" and not star:
            words.append("*")
            star = True
        name = {"variadic positional": "*", "variadic keyword": "**"}.get(kind, "") + parameter.name
        star = star or kind == "variadic positional"
        note = f": {parameter.annotation}" if parameter.annotation is not None else ""
        plain = kind not in ("variadic positional", "variadic keyword")
        default = parameter.default if plain else None
        words.append(name + note + (f" = {default}" if default is not None else ""))
    returns = f" -> {thing.returns}" if thing.returns is not None else ""  # type: ignore[attr-defined]
    return f"{shown}({', '.join(words)}){returns}"


def _field(field: griffe.Object) -> str:
    note, value = field.annotation, field.value  # type: ignore[attr-defined]
    default = "" if value is None else str(value)
    made = re.fullmatch(r"field\(default_factory=(.*)\)", default, re.DOTALL)
    if made:
        default = made.group(1).removeprefix("lambda: ") + ("" if "(" in default[23:] else "()")
    about = "" if field.docstring is None else " ".join(field.docstring.value.split())
    cells = (
        f"`{field.name}`",
        f"`{note}`" if note else "",
        f"`{default}`" if default else "",
        about,
    )
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _docstring(thing: griffe.Object) -> Iterator[str]:
    if thing.docstring is None:
        return
    for section in thing.docstring.parsed:
        kind = section.kind.value
        if kind == "text":
            yield _prose(section.value)
        elif kind in ("parameters", "raises"):
            title = {"parameters": "Args", "raises": "Raises"}[kind]
            rows = [
                f"- `{row.annotation if kind == 'raises' else row.name}`: "
                + " ".join(row.description.split())
                for row in section.value
            ]
            yield f"{title}:\n\n" + "\n".join(rows)
        elif kind == "admonition":  # Shapes and the like: a table set in columns
            text = textwrap.dedent(section.value.description)
            yield f"{section.title}:\n\n<!-- not run: from a docstring -->\n```text\n{text}\n```"
        elif kind == "returns":
            yield "Returns: " + " ".join(section.value[0].description.split())
        else:
            raise SystemExit(f"{thing.path}: a section that is not known: {kind}")


def _prose(text: str) -> str:
    """Paragraphs; those set off by four blanks become blocks."""
    parts = []
    for paragraph in re.split(r"\n\s*\n", text):
        if paragraph.startswith("    "):
            body = textwrap.dedent(paragraph)
            parts.append(f"<!-- not run: from a docstring -->\n```text\n{body}\n```")
        else:
            parts.append("\n".join(line.strip() for line in paragraph.strip().splitlines()))
    return "\n\n".join(parts)


def main() -> int:
    """Write the pages; remove those that are no longer made."""
    made = pages(load_package())
    OUT.mkdir(parents=True, exist_ok=True)
    for old in OUT.glob("*.md"):
        if old.name not in made:
            old.unlink()
    for name, text in made.items():
        (OUT / name).write_text(text)
    print(f"{len(made)} pages in {OUT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
