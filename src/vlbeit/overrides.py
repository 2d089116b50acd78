"""A run's config from the command line: recipe, then YAML file, then dotted flags.

    RECIPE [--config FILE] [--seed 1 --optim.lr 3e-4 ...] [--print-config]

Each step changes leaves of the tree the one before made. Nothing is ignored: a setting that does
not exist, twice the same flag, or twice the same key in a YAML file ends the command with the
full path of the setting and the nearest name that exists.
"""

import contextlib
import dataclasses
import difflib
import io
import json
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from vlbeit.config import from_dict, to_dict
from vlbeit.errors import ConfigError, InputError

C = TypeVar("C")
OWN_FLAGS = ("config", "print-config", "help")


class _StrictLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; this one refuses."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is set twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a YAML file.

    Raises:
        InputError: the file is missing or unreadable.
        ConfigError: it is not YAML, sets a key twice, or is not a mapping of settings.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: cannot be read: {error}") from None
    try:
        values = yaml.load(text, Loader=_StrictLoader)  # a SafeLoader: builds plain values only
    except (yaml.YAMLError, TypeError) as error:  # TypeError: a mapping or list used as a key
        raise ConfigError(f"--config {path}: not usable as YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: expected settings as `name: value`, found {values!r}")
    return values


def write_yaml(config: Any) -> str:
    """The tree as YAML that `--config` reads back to the same tree."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def parse_config(
    kind: type[C], recipes: Mapping[str, Callable[[], C]], argv: Sequence[str], *, command: str
) -> C:
    """The config that `argv` asks for; `command` is what stands before it, for messages.

    Prints and leaves with SystemExit(0) for `--help` and `--print-config`.

    Raises:
        ConfigError: an unknown recipe, setting or value, with the nearest name that exists.
        InputError: the file of `--config` cannot be read.
    """
    names = ", ".join(recipes)
    usage = f"usage: {command} RECIPE [--config FILE] [--SETTING VALUE ...]\nrecipes: {names}"
    if argv and argv[0] in ("-h", "--help"):
        print(usage)
        print("".join(f"  {name:<6}  {about}\n" for name, about in _abouts(recipes)), end="")
        print(f"`{command} RECIPE --help` lists every setting with the recipe's value.")
        print(f"`{command} RECIPE --print-config` prints them as YAML for `--config`.")
        raise SystemExit(0)
    if not argv or argv[0].startswith("-"):
        raise ConfigError(f"{command}: the recipe comes first\n{usage}")
    recipe, rest = argv[0], list(argv[1:])
    if recipe not in recipes:
        raise ConfigError(f"{command}: no recipe {recipe!r}{_nearest(recipe, recipes)} ({names})")
    config = recipes[recipe]()
    file, rest = _take_file(rest)
    if file is not None:
        values = read_yaml(Path(file))
        if values.get("recipe", recipe) != recipe:
            raise ConfigError(
                f"--config {file}: written for recipe {values['recipe']!r}, the command says "
                f"{recipe!r}; use the same name in both"
            )
        try:
            config = from_dict(kind, values, start=config)
        except ConfigError as error:
            raise ConfigError(f"--config {file}: {error}") from None
    print_only = "--print-config" in rest
    rest = [word for word in rest if word != "--print-config"]
    flags = list(_flags(config))
    rest = _bare_switches(flags, rest)
    _check_flags(iter(flags), rest)
    config = _apply_flags(kind, config, rest, f"{command} {recipe}")
    if print_only:
        print(write_yaml(config), end="")
        raise SystemExit(0)
    return config


def _abouts(recipes: Mapping[str, Callable[[], Any]]) -> Iterator[tuple[str, str]]:
    """The first paragraph of every recipe's docstring, for those that have one."""
    for name, recipe in recipes.items():
        about = (recipe.__doc__ or "").strip().split("\n\n")[0]
        if about:
            yield name, " ".join(about.split())


def recipe_of_start(
    words: Sequence[str], recipes: Mapping[str, Any], command: str
) -> Sequence[str]:
    """The words with a recipe before them: where none is given, that of `--start`'s config.json.

    Raises:
        ConfigError: `--start` was made by no recipe that the task has.
    """
    if not words or not words[0].startswith("--") or words[0] == "--help":
        return words
    start = next(
        (w.split("=", 1)[1] for w in words if w.startswith("--start=")),
        next((after for w, after in zip(words, words[1:], strict=False) if w == "--start"), ""),
    )
    if not start:
        return words
    try:
        tree = json.loads((Path(start) / "config.json").read_text())
        recipe = str(tree["recipe"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"--start {start}: no config.json with a recipe there; expected a run folder or a "
            "checkpoint"
        ) from None
    if recipe not in recipes:
        raise ConfigError(
            f"--start {start} was made by the recipe {recipe!r}; say which one to fine-tune by: "
            f"{command} RECIPE, one of {', '.join(recipes)}"
        )
    return [recipe, *words]


def _take_file(words: list[str]) -> tuple[str | None, list[str]]:
    """The value of --config, and the words without it."""
    file, rest, at = None, [], 0
    while at < len(words):
        word, here = words[at], None
        if word == "--config":
            at += 1
            if at == len(words):
                raise ConfigError("--config: the name of a YAML file must follow")
            here = words[at]
        elif word.startswith("--config="):
            here = word.removeprefix("--config=")
        else:
            rest.append(word)
        if here is not None:
            if file is not None:
                raise ConfigError(f"--config given twice: {file} and {here}; merge the files")
            file = here
        at += 1
    return file, rest


def _flags(config: Any, path: str = "") -> Iterator[str]:
    """Every flag of the tree, underscores kept: `optim.lr`, `log.tensorboard`, `log.no_...`."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _flags(value, f"{path}{field.name}.")
            continue
        yield path + field.name
        if hints[field.name] is bool:
            yield f"{path}no_{field.name}"
        if isinstance(value, dict):  # tyro: one flag a key that the YAML file gave
            yield from (f"{path}{field.name}.{key}" for key in value)


def _bare_switches(flags: Sequence[str], words: Sequence[str]) -> list[str]:
    """`--switch true` as `--switch`, `--switch false` as `--no-switch`."""
    switches = {
        name.replace("_", "-") for name in flags if re.sub(r"([^.]+)$", r"no_\1", name) in flags
    }
    made: list[str] = []
    at = 0
    while at < len(words):
        name, _, value = words[at].partition("=")
        path = name.removeprefix("--").replace("_", "-")
        if name.startswith("--") and path in switches:
            if not value and words[at + 1 : at + 2] and words[at + 1].lower() in ("true", "false"):
                at += 1
                value = words[at]
            if value.lower() == "false":
                name = "--" + re.sub(r"([^.]+)$", r"no-\1", path)
            made.append(name if value.lower() in ("", "true", "false") else words[at])
        else:
            made.append(words[at])
        at += 1
    return made


def _check_flags(known: Iterator[str], words: Sequence[str]) -> None:
    flags = {name.replace("_", "-"): name for name in known}
    seen: dict[str, str] = {}
    for word in words:
        if not word.startswith("--"):
            continue
        name = word[2:].split("=", 1)[0].replace("_", "-")
        if name == "recipe":
            raise ConfigError("--recipe: the recipe is the first word of the command, not a flag")
        if name not in flags and name not in OWN_FLAGS:
            hint = _nearest(name, flags, "--")
            raise ConfigError(f"unknown setting {word.split('=', 1)[0]}{hint}")
        setting = re.sub(r"(^|\.)no-", r"\1", name)
        if setting in seen:
            raise ConfigError(f"{word}: set twice on the command line ({seen[setting]} before)")
        seen[setting] = word


def _nearest(name: str, known: Mapping[str, Any], prefix: str = "") -> str:
    """`; did you mean X?`, where X ends in the same words if only the path before it is wrong."""
    near = [k for k in known if k.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not near:  # `--lrr` is far from `--optim.lr` and near to its last word
        leaves: dict[str, list[str]] = {}
        for k in known:
            leaves.setdefault(k.rsplit(".", 1)[-1], []).append(k)
        leaf = difflib.get_close_matches(name.rsplit(".", 1)[-1], leaves, n=1, cutoff=0.5)
        near = leaves[leaf[0]] if leaf else []
    return f"; did you mean {' or '.join(prefix + k for k in near)}?" if near else ""


def _apply_flags(kind: type[C], config: C, words: Sequence[str], command: str) -> C:
    import tyro

    if any(word in ("-h", "--help") for word in words):
        return tyro.cli(kind, default=config, args=["--help"], prog=command)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, default=config, args=words, prog=command)
    except SystemExit:
        reason = _reason(complaint.getvalue())
        raise ConfigError(f"{reason} (`{command} --help` lists the settings)") from None


def _reason(box: str) -> str:
    """What tyro complains about, out of the box it draws: title line, reason, rule, hints."""
    parts: list[list[str]] = [[]]
    for line in box.strip().splitlines()[1:]:
        text = line.strip(" │╰╯")
        if text and not text.strip("-─"):
            parts.append([])
        else:
            parts[-1].append(text)
    said = (" ".join(part).strip() for part in parts)
    return next((text for text in said if text), "unreadable arguments")
