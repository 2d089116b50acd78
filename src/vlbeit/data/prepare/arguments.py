"""Arguments that several verbs of `vlbeit prepare` share."""

import argparse
from pathlib import Path
from typing import NoReturn

from vlbeit.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Wrong usage is a ConfigError, so that it leaves with the contract's exit code."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message} (see {self.prog} --help)")


def add_verb(
    verbs: "argparse._SubParsersAction[Parser]", name: str, help_text: str
) -> argparse.ArgumentParser:
    """A verb with the options that all of them have."""
    parser = verbs.add_parser(name, help=help_text, description=help_text)
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help="folder to write; must not exist")
    add("--check", action="store_true", help="read everything, write nothing, name what is bad")
    add("--name", help="name of the dataset and of its source (default: that of --out)")
    add("--split", choices=("train", "val", "test"), default="",
        help="split of records whose file names none of these three")  # fmt: skip
    add("--val-fraction", type=float, default=0.0, metavar="X",
        help="share of records without a split that becomes val, drawn by content")  # fmt: skip
    add("--per-shard", type=int, default=1000, metavar="N", help="records of a tar (1000)")
    add("--max-size", type=int, default=0, metavar="N",
        help="store larger images with a shorter side of N pixels")  # fmt: skip
    add(
        "--budget",
        type=float,
        default=0.01,
        metavar="X",
        help="largest share of bad records (0.01); more: exit code 65",
    )
    add("--workers", type=int, default=1, metavar="N", help="threads that open images")
    add("--allow-absolute", action="store_true", help="rows may name files anywhere")
    add("--eval-against", nargs="+", default=[], metavar="DIR",
        help="dataset folders whose val and test images are looked for in this one")  # fmt: skip
    add("--drop-overlap", action="store_true", help="leave those out of training")
    add("--json", action="store_true", help="print the report as JSON")
    return parser


def root_argument(parser: argparse.ArgumentParser) -> None:
    """The folder of a public data set."""
    parser.add_argument("root", type=Path, metavar="FOLDER", help="as downloaded and unpacked")


def images_option(parser: argparse.ArgumentParser) -> None:
    """Where the images of rows are."""
    parser.add_argument(
        "--images", nargs="+", default=[], metavar="PLACE", help="folders or tars of the images"
    )


def shard_options(parser: argparse.ArgumentParser) -> None:
    """For verbs that take tar shards as they are."""
    parser.add_argument(
        "--val-shards", nargs="+", default=[], metavar="PATTERN", help="tars that are the val split"
    )
    parser.add_argument("--copy", action="store_true", help="write new shards instead of naming")
