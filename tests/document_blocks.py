"""The code blocks of the guides: what each is, and how one is parsed or run.

A fenced block has a language, and may have a remark: an HTML comment on the line before it, which a
reader of the page does not see.

    <!-- not run: WHY -->   it cannot run here; it is parsed
    <!-- file: NAME -->     the contents of a file that later commands of the page read
    <!-- printed -->        what the command before it prints; `...` stands for anything
    <!-- ends with CODE --> the command ends with this exit code
    <!-- run by: TEST -->   another test runs it
"""

import argparse
import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import vlbeit.overrides
from vlbeit.cli import main
from vlbeit.validate import validate, validate_finetune

FENCE = re.compile(r"^ *```(.*)$")
REMARK = re.compile(r"^<!-- (not run|file|printed|ends with|run by)(?:: | )?(.*?) ?-->$")
LANGUAGES = ("bash", "python", "yaml", "json", "csv", "text")
PARSED = "parsed"
KINDS = ("run", PARSED, "file", "printed", "elsewhere", "described")
"""What becomes of a block: done as a reader would, parsed only, written to a file, compared with
what was printed, run by another test, or plain words that describe a layout."""


class WrongPageError(AssertionError):
    """A block of a page is not as it must be; the message names page and line."""


@dataclass(frozen=True)
class Block:
    """One fenced block; `line` is that of its first fence, from 1."""

    page: str
    line: int
    language: str
    text: str
    remark: str = ""
    about: str = ""

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def kind(self) -> str:
        """One of KINDS.

        Raises:
            WrongPageError: a language that is not known, or a remark that the block lacks.
        """
        if self.language not in LANGUAGES:
            raise WrongPageError(
                f"{self.where}: a block in {self.language or 'no language'!r}; "
                f"known: {', '.join(LANGUAGES)}"
            )
        if self.remark in ("not run", "run by") and not self.about:
            raise WrongPageError(f"{self.where}: the remark gives no reason")
        if self.remark in ("file", "printed"):
            return self.remark
        if self.remark == "run by":
            return "elsewhere"
        if self.remark == "not run":
            return "described" if self.language == "text" else PARSED
        if self.language in ("bash", "python"):
            return "run"
        if self.language in ("yaml", "json", "csv"):
            return PARSED
        raise WrongPageError(
            f"{self.where}: a block of text needs a remark: <!-- printed -->, <!-- file: NAME --> "
            "or <!-- not run: WHY -->"
        )


def blocks_of(page: str, text: str) -> list[Block]:
    """The fenced blocks of a page in their order.

    Raises:
        WrongPageError: a fence is not closed, or code is set off by indentation alone.
    """
    found: list[Block] = []
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        opened = FENCE.match(lines[at])
        if opened is None:
            before = lines[at - 1].strip() if at else ""
            if re.match(r" {4}\S", lines[at]) and not before:
                raise WrongPageError(f"{page}:{at + 1}: an indented block; fence it")
            at += 1
            continue
        closed = next((n for n in range(at + 1, len(lines)) if FENCE.match(lines[n])), None)
        if closed is None:
            raise WrongPageError(f"{page}:{at + 1}: this fence is not closed")
        said = REMARK.match(lines[at - 1]) if at else None
        if said is None and at and lines[at - 1].startswith("<!--"):
            raise WrongPageError(f"{page}:{at}: an unknown remark {lines[at - 1]}")
        body = "".join(f"{line}\n" for line in lines[at + 1 : closed])
        remark, about = said.groups() if said else ("", "")
        found.append(Block(page, at + 1, opened.group(1).strip(), body, remark, about))
        at = closed + 1
    return found


@dataclass(frozen=True)
class Command:
    """One command of a shell block: its words, and the file that `>` sends its output to."""

    words: tuple[str, ...]
    into: str = ""

    @property
    def vlbeit(self) -> tuple[str, ...] | None:
        """The words after `vlbeit`, also behind torchrun, srun and the like; None: another
        program."""
        for at, word in enumerate(self.words):
            if word != "vlbeit":
                continue
            if at == 0 or self.words[at - 1] == "-m" or self.words[at - 2 : at] == ("-m", "--"):
                return self.words[at + 1 :]
        return None


def commands(block: Block) -> list[Command]:
    """The commands of a shell block, comments left out and lines that end in \\ joined.

    Raises:
        WrongPageError: bash finds a fault in its grammar.
    """
    checked = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
    if checked.returncode:
        raise WrongPageError(f"{block.where}: bash -n: {checked.stderr.strip()}")
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        into = ""
        if ">" in words:
            at = words.index(">")
            words, into = words[:at], words[at + 1]
        found.append(Command(tuple(words), into))
    return found


class Parsed(BaseException):
    """Raised in place of the work, once the words were taken in full. Not an Exception, so that no
    handler on the way takes it for a fault."""


@contextlib.contextmanager
def parsing_only() -> Iterator[None]:
    """Within this, every command stops after its own parser has taken all its words."""
    parse_args, parse_config = argparse.ArgumentParser.parse_args, vlbeit.overrides.parse_config

    def stop_after_words(self: Any, *args: Any, **more: Any) -> Any:
        parse_args(self, *args, **more)
        raise Parsed

    def stop_after_config(*args: Any, command: str, **more: Any) -> Any:
        config = parse_config(*args, command=command, **more)
        if command == "vlbeit pretrain":
            validate(config)
        elif command.startswith("vlbeit finetune"):
            validate_finetune(config)
        raise Parsed

    homes = [vlbeit.overrides, *(m for n, m in sys.modules.items() if n.startswith("vlbeit."))]
    homes = [home for home in homes if getattr(home, "parse_config", None) is parse_config]
    argparse.ArgumentParser.parse_args = stop_after_words  # type: ignore[method-assign]
    for home in homes:
        home.parse_config = stop_after_config  # type: ignore[attr-defined]
    try:
        yield
    finally:
        argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign]
        for home in homes:
            home.parse_config = parse_config  # type: ignore[attr-defined]


def parse_words(words: Sequence[str], where: str) -> None:
    """The words after `vlbeit`, all of them, through the parser of the command itself.

    Raises:
        WrongPageError: the command refuses them; the message has what it says.
    """
    import vlbeit.train.bench  # noqa: F401  imports parse_config by name, so before it is replaced
    import vlbeit.train.tokenizer_cli  # noqa: F401

    said = io.StringIO()
    with parsing_only(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = main(list(words))
        except Parsed:
            return
    # Done without a parser of arguments: `--help` and what else ends by itself.
    if code != 0:
        raise WrongPageError(f"{where}: vlbeit {shlex.join(words)}: {said.getvalue().strip()}")


def parse_torchrun(words: Sequence[str], where: str) -> None:
    """The words of torchrun through torchrun's own parser.

    Raises:
        WrongPageError: it refuses them, or takes an option of the command for its own.
    """
    from torch.distributed.run import get_args_parser

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            given = get_args_parser().parse_args(list(words))
        except SystemExit:
            told = said.getvalue().strip().splitlines()[-1]
            raise WrongPageError(f"{where}: {shlex.join(words)}: {told}") from None
    rest = [word for word in given.training_script_args if word != "--"]
    if not given.module or "vlbeit" not in (given.training_script, *rest[:1]):
        raise WrongPageError(f"{where}: torchrun would not start `-m vlbeit`")


def check_parsed(block: Block) -> None:
    """A block that is not run: its grammar, and the words of every vlbeit command in it.

    Raises:
        WrongPageError: something in it cannot be read.
    """
    if block.language == "python":
        compile(block.text, block.where, "exec")
    elif block.language == "yaml":
        read = list(yaml.safe_load_all(block.text))
        if not read:
            raise WrongPageError(f"{block.where}: no YAML in it")
        for words in commands_in(read):
            check_command(Command(tuple(words)), block.where)
    elif block.language == "json":
        for line in block.text.splitlines():
            json.loads(line)
    elif block.language == "bash":
        for command in commands(block):
            check_command(command, block.where)


def commands_in(tree: Any) -> Iterator[list[str]]:
    """The words of every container of a manifest: `command`, then `args`."""
    if isinstance(tree, dict):
        if "command" in tree:
            yield [str(word) for word in (*tree["command"], *tree.get("args", ()))]
        tree = list(tree.values())
    if isinstance(tree, list):
        for part in tree:
            yield from commands_in(part)


def check_command(command: Command, where: str) -> None:
    """The words of torchrun and of vlbeit, each through its own parser."""
    if "torchrun" in command.words:
        after = command.words[command.words.index("torchrun") + 1 :]
        parse_torchrun(after, where)
    if command.vlbeit is not None:
        parse_words(command.vlbeit, where)


def compare_printed(block: Block, printed: str) -> None:
    """Fails unless the block is part of what was printed; `...` matches anything."""

    def even(text: str) -> str:
        return "\n".join(" ".join(line.split()) for line in text.strip().splitlines())

    wanted = re.escape(even(block.text)).replace(r"\.\.\.", ".*?")
    if not re.search(wanted, even(printed), re.DOTALL):
        raise WrongPageError(f"{block.where}: it shows\n{block.text}\nbut printed was\n{printed}")


def smaller(words: Sequence[str], flags: Mapping[str, str]) -> list[str]:
    """The words with the values of these flags replaced; a flag that is not there is added. What
    the page sets to 0 (a stream that is left out) stays 0."""
    changed = list(words)
    for flag, value in flags.items():
        new = [flag, *value.split()]
        if flag in changed:
            at = changed.index(flag)
            if changed[at + 1 : at + 2] == ["0"]:
                continue
            end = at + 1
            while end < len(changed) and not changed[end].startswith("--"):
                end += 1
            changed[at:end] = new
        else:
            changed += new
    return changed


def write_file(block: Block, folder: Path) -> None:
    """The block as a file of its page's folder, before the rows that are there already."""
    path = folder / block.about
    path.parent.mkdir(parents=True, exist_ok=True)
    rest = path.read_text() if path.exists() else ""
    path.write_text(block.text + rest)
