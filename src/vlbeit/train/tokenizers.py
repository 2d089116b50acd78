"""Where a run's two tokenizers are, and the training of those that are nowhere."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlbeit.config import PretrainConfig
from vlbeit.data.records import BadSample, RecordSource
from vlbeit.data.stored_codes import CodeFolder, SourceCodes
from vlbeit.data.transforms import BadText, clean_text
from vlbeit.errors import InputError
from vlbeit.tokens.text import special_tokens_only, train_text_tokenizer
from vlbeit.tokens.visual import VisualTokenizer
from vlbeit.train.visual_tokenizer import train_visual_tokenizer
from vlbeit.types import Stream
from vlbeit.validate import coded_streams, fixed_streams


@dataclass(frozen=True)
class TokenizerPaths:
    """`text` is a folder with tokenizer.json or that file, `visual` a folder with config.json."""

    text: Path
    visual: Path | None
    """None: no objective of the run predicts codes."""

    def has_text(self) -> bool:
        return self.text.is_file() or (self.text / "tokenizer.json").is_file()

    def has_visual(self) -> bool:
        return self.visual is None or (self.visual / "config.json").is_file()

    def complete(self) -> bool:
        return self.has_text() and self.has_visual()

    def missing(self) -> bool:
        return not self.complete()


def find_tokenizers(config: PretrainConfig, checkpoint: Path | None) -> TokenizerPaths:
    """The tokenizers of a run.

    In this order: those of the checkpoint that is resumed; those named in the config; those in
    a data folder (`tokenizer.json`, `visual/`); those in the run folder, which
    `train_missing_tokenizers` makes when they are not there. A run that predicts no codes has
    no visual one.

    Raises:
        InputError: a named one is not there.
    """
    coded = bool(coded_streams(config))
    if checkpoint is not None:
        visual_there = checkpoint / "visual" if coded else None
        return TokenizerPaths(checkpoint / "tokenizer.json", visual_there)
    made = Path(config.run_dir) / "tokenizers"
    places = [Path(folder) for folder in config.data]
    text = next((p for p in places if (p / "tokenizer.json").is_file()), made / "text")
    visual = next((p / "visual" for p in places if (p / "visual/config.json").is_file()), None)
    visual = Path(config.tokenizers.visual) if config.tokenizers.visual else visual
    paths = TokenizerPaths(
        Path(config.tokenizers.text) if config.tokenizers.text else text,
        (visual or made / "visual") if coded else None,
    )
    if config.tokenizers.text and not paths.has_text():
        raise InputError(f"tokenizers.text: {paths.text} is no tokenizer.json and holds none")
    if config.tokenizers.visual and not paths.has_visual():
        raise InputError(f"tokenizers.visual: {paths.visual} holds no config.json")
    return paths


def train_missing_tokenizers(
    config: PretrainConfig,
    paths: TokenizerPaths,
    sources: Mapping[Stream, Sequence[RecordSource]],
    device: torch.device,
    log: Callable[[str], None],
) -> None:
    """Train what `find_tokenizers` did not find, on the run's own data, into the run folder.

    The same data and seed give the same tokenizers, so a run killed in here starts over.
    """
    if not paths.has_text() and config.batch.texts + config.batch.pairs == 0:
        special_tokens_only().save(paths.text)
        log(
            "no text in this run: its text tokenizer holds the special tokens only; give "
            "--tokenizers.text to keep a vocabulary for what comes after"
        )
    elif not paths.has_text():
        settings = config.tokenizers.train_text
        log(f"no text tokenizer found: training {settings.kind} with {settings.vocab} pieces")
        tokenizer = train_text_tokenizer(all_texts(sources), settings)
        tokenizer.save(paths.text)
        log(f"text tokenizer: {tokenizer.size} pieces in {paths.text}")
    if paths.visual is not None and not paths.has_visual():
        visual = config.tokenizers.train_visual
        log(
            f"no visual tokenizer found: training {visual.codes} codes for {visual.total_steps} "
            f"steps (teacher: {visual.teacher})"
        )

        def row(values: dict[str, Any]) -> None:
            log("visual tokenizer: " + ", ".join(f"{k} {shown(v)}" for k, v in values.items()))

        pictures = list(sources.get("image") or sources.get("pair") or ())
        train_visual_tokenizer(
            visual,
            pictures,
            paths.visual,
            seed=config.seed,
            device=device,
            log=row,
            precision=config.precision,
        )
        log(f"visual tokenizer in {paths.visual}")


def find_stored_codes(
    config: PretrainConfig,
    sources: Mapping[Stream, Sequence[RecordSource]],
    visual: VisualTokenizer | None,
    log: Callable[[str], None],
) -> dict[str, dict[str, SourceCodes]]:
    """The stored codes by stream and source; empty where `tokenizers.codes` names none.

    A stream with random crops is left to the tokenizer, which the log says.

    Raises:
        InputError: codes of another tokenizer, picture size or data (`CodeFolder.find`).
    """
    if not config.tokenizers.codes or visual is None:
        return {}
    folder = CodeFolder.open(config.tokenizers.codes)
    found = {
        str(stream): folder.find(group, visual.digest, config.model.image_size)
        for stream, group in sources.items()
        if stream in fixed_streams(config)
    }
    for stream in coded_streams(config):
        if stream in found:
            log(f"codes of the {stream} stream: stored in {folder.folder}")
        else:
            log(f"codes of the {stream} stream: by the tokenizer, as its crops are random")
    return found


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def all_texts(sources: Mapping[Stream, Sequence[RecordSource]]) -> Iterator[str]:
    """Every cleaned caption and document of the run's text and pair sources.

    What cannot be read or cleaned is left out here; training meets it again and counts it.
    """
    for stream in ("text", "pair"):
        for source in sources.get(stream, ()):
            for index in range(len(source)):
                try:
                    record = source.read(index)
                    lines = (
                        record.members["txt"].splitlines()
                        if stream == "text" and "txt" in record.members
                        else record.captions()
                    )
                except BadSample:
                    continue
                for line in lines:
                    try:
                        yield clean_text(line)
                    except BadText:
                        continue
