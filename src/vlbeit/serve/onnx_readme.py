"""README.md of an exported graph: inputs, outputs, what was measured, and a program for it."""

import json
from collections.abc import Mapping
from typing import Any

from vlbeit import __version__
from vlbeit.serve.onnx_graph import FEWEST_WORDS, MODES, Run, outputs_of

MODEL, INT8 = "model.onnx", "model.int8.onnx"
PREPROCESSOR, LABELS = "preprocessor.json", "labels.json"


def readme(run: Run, mode_name: str, facts: Mapping[str, Any]) -> str:
    """README.md of the folder."""
    mode = MODES[mode_name]
    height, width = run.config.model.image_size
    shapes = {
        "words": "(B, W) int64: [T_CLS], the text, [T_SEP], then [PAD]",
        "word_valid": "(B, W) bool: false at [PAD]",
    }
    inputs = [
        (
            name,
            shapes.get(name, f"(B, 3, {height}, {width}) uint8: RGB, the whole picture squashed"),
        )
        for name in mode.inputs
    ]
    longest = f", W from {FEWEST_WORDS} to {run.config.model.text_positions}"
    packages = ["onnxruntime", "numpy", *["pillow"] * bool(mode.pictures)]
    packages += ["tokenizers"] * ("words" in mode.inputs)
    rows = "\n".join(
        f"| {kind} | `{name}` | {meaning} |"
        for kind, pairs in (("input", inputs), ("output", outputs_of(mode, run).items()))
        for name, meaning in pairs
    )
    return f"""# {mode.help[0].upper()}{mode.help[1:]}

`{MODEL}` was written by vlbeit {__version__} from a run trained for {facts["trained_for"]} (step \
{facts["step"]:,}).
{check_line(facts)}.

| | name | shape and meaning |
|---|---|---|
{rows}

B samples and W words are free{longest * ("words" in mode.inputs)}.
{cost_lines(facts)}
Run in this folder, with `pip install {" ".join(packages)}`:

```python
{program(mode_name)}```
"""


def check_line(facts: Mapping[str, Any]) -> str:
    """How near the graph is to torch."""
    check = facts["check"]
    shapes = ", ".join(
        f"{batch} x {words}" if words else f"{batch}" for batch, words in check["samples_and_words"]
    )
    texts = any(words for _, words in check["samples_and_words"])
    return (
        f"In float32 it is within {check['largest_difference']:.1e} of torch (limit "
        f"{check['limit']:.0e}) for {shapes} samples{' x words' * texts}"
    )


def cost_lines(facts: Mapping[str, Any]) -> str:
    """What int8 costs and what everything takes, as Markdown; nothing about int8 without it."""
    lines = []
    if "int8" in facts:
        cost = facts["int8"]
        skipped = f", {cost['skipped']} skipped" * bool(cost["skipped"])
        lines += [
            "",
            f"`{INT8}` has int8 weights. On {cost['samples']:,} held-out samples of "
            f"{', '.join(cost['data'])} ({cost['split']}{skipped}):",
            "",
            "| | float32 | int8 |",
            "|---|---|---|",
            *(
                f"| {name} | {row['float32']:.4f} | {row['int8']:.4f} |"
                for name, row in cost["figures"].items()
            ),
        ]
    kinds = list(next(iter(facts["milliseconds"].values())))
    lines += [
        "",
        f"Milliseconds on the machine that wrote it ({facts['threads']} thread"
        f"{'s' * (facts['threads'] > 1)}), the median of several:",
        "",
        f"| | {' | '.join(kinds)} |",
        "|---" * (1 + len(kinds)) + "|",
        *(
            f"| {name} | {' | '.join(f'{row[kind]:.1f}' for kind in kinds)} |"
            for name, row in facts["milliseconds"].items()
        ),
        "",
    ]
    return "\n".join(lines)


TEXT_CODE = """
def read_texts(texts):
    ids = [[2, *tokenizer.encode(text).ids[: facts["text_length"] - 2], 3] for text in texts]
    width = max(map(len, ids))
    words = np.array([row + [0] * (width - len(row)) for row in ids], dtype=np.int64)
    return {"words": words, "word_valid": words != 0}

"""
FILL_CODE = """
def read_texts(texts):
    ids = []
    for text in texts:
        parts = [tokenizer.encode(part.strip()).ids for part in text.split("[MASK]")]
        ids.append([2, *parts[0], *(i for part in parts[1:] for i in (4, *part)), 3])
    width = max(map(len, ids))
    words = np.array([row + [0] * (width - len(row)) for row in ids], dtype=np.int64)
    return {"words": words, "word_valid": words != 0}

"""
PICTURE_CODE = """
def read_pictures(paths):
    height, width = facts["image_size"]
    pictures = [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in paths]
    squashed = [one.resize((width, height), Image.Resampling.BICUBIC) for one in pictures]
    return np.stack([np.asarray(one).transpose(2, 0, 1) for one in squashed])

"""
READ_VECTOR = """
vectors = found["vector"] / np.linalg.norm(found["vector"], axis=1, keepdims=True)
print(vectors @ vectors.T)  # cosines
"""
READ_FIRST = """
for row in found["probabilities"]:
    print(labels[row.argmax()], row.max())
"""
READ_FILLED = """
for row in found["probabilities"][given["words"] == 4]:
    print(tokenizer.id_to_token(int(row.argmax())), row.max())
"""
READ_MATCHED = """
print(found)
"""
SHOWN_TEXTS = {
    "fill": "a [MASK] ring",
    "fill-text": "a [MASK] ring",
    "vqa": "what colour is the ring?",
    "compare": "both have a ring",
}
"""What the program asks; where it is not said, "a red ring"."""


def program(mode_name: str) -> str:
    """A program that asks the graph with NumPy, onnxruntime, Pillow and tokenizers alone."""
    mode = MODES[mode_name]
    texts, fills = "words" in mode.inputs, mode.method == "fill_words"
    head = ["import json", "", "import numpy as np", "import onnxruntime"]
    head += ["from PIL import Image, ImageOps"] * bool(mode.pictures)
    head += ["from tokenizers import Tokenizer"] * texts
    head += ["", 'facts = json.load(open("preprocessor.json"))']
    head += ['labels = json.load(open("labels.json"))'] * ("logits" in mode.outputs)
    head += ['tokenizer = Tokenizer.from_file("tokenizer.json")'] * texts
    head += ['graph = onnxruntime.InferenceSession("model.onnx")', "", ""]
    asked = [f'"{name}": read_pictures(["{name}.png"])' for name in mode.pictures]
    given = " | ".join(
        [f"read_texts([{json.dumps(SHOWN_TEXTS.get(mode_name, 'a red ring'))}])"] * texts
        + ["{" + ", ".join(asked) + "}"] * bool(asked)
    )
    last = READ_MATCHED
    if "vector" in mode.outputs:
        last = READ_VECTOR
    elif "logits" in mode.outputs:
        last = READ_FIRST
    elif fills:
        last = READ_FILLED
    return (
        "\n".join(head)
        + (FILL_CODE if fills else TEXT_CODE) * texts
        + PICTURE_CODE * bool(mode.pictures)
        + f"\ngiven = {given}\n"
        + 'found = dict(zip(facts["outputs"], graph.run(None, given), strict=True))'
        + last
    )
