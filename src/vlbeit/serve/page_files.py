"""The page's files: a fixed list, read once at the start, so that no request names a path."""

import json
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any, NamedTuple

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".webp": "image/webp",
    ".woff2": "font/woff2",
    ".txt": "text/plain; charset=utf-8",
}
"""What is served, by the end of its name."""
PAGE = "index.html"
EXAMPLES = "examples/examples.json"
"""A list of {"name", "title", "text", "question", "source"}; the picture is examples/NAME.png."""


class PageFile(NamedTuple):
    content: bytes
    media_type: str


def package_files() -> dict[str, PageFile]:
    """The files of `vlbeit/serve/static`, by their path inside it."""
    return files_below(resources.files("vlbeit.serve") / "static")


def files_below(folder: Traversable) -> dict[str, PageFile]:
    """Files with a name that ends as in TYPES, by their path below the folder."""
    found: dict[str, PageFile] = {}

    def walk(place: Traversable, prefix: str) -> None:
        for entry in sorted(place.iterdir(), key=lambda one: one.name):
            if entry.is_dir():
                walk(entry, f"{prefix}{entry.name}/")
            elif (end := "." + entry.name.rpartition(".")[2]) in TYPES:
                found[prefix + entry.name] = PageFile(entry.read_bytes(), TYPES[end])

    if folder.is_dir():
        walk(folder, "")
    return found


def examples(files: dict[str, PageFile]) -> list[dict[str, Any]]:
    """The example pictures with their addresses."""
    if EXAMPLES not in files:
        return []
    listed = json.loads(files[EXAMPLES].content)
    return [{**one, "url": f"/static/examples/{one['name']}.png"} for one in listed]
