"""The API reference is what the docstrings say now, and the docstrings say what a caller needs."""

import ast
import importlib.util
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import griffe
import pytest

EXCEPTIONS = re.compile(r"(?:Error|BadSample|StopRequested)$")


@pytest.fixture(scope="module")
def api() -> ModuleType:
    root = Path(__file__).resolve().parent.parent
    spec = importlib.util.spec_from_file_location("api_pages", root / "tools" / "api_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def package(api) -> griffe.Object:
    return api.load_package()


def public(api, package) -> Iterator[griffe.Object]:
    """Every public name, and the methods, properties and fields of the classes among them."""
    for _, _, names in api.PAGES.values():
        for name in names:
            thing = package[name]
            yield thing
            if thing.is_class:
                yield from api.public_members(thing)


def said(thing: griffe.Object) -> str:
    return "" if thing.docstring is None else thing.docstring.value


def section(text: str, name: str) -> str:
    """The lines below `name:` of a docstring."""
    found = re.search(rf"^{name}:\n((?:(?: {{4}}.*)?\n?)+)", text, re.MULTILINE)
    return found.group(1) if found else ""


def raised(thing: griffe.Object) -> set[str]:
    """Exceptions that the body of a function raises itself, by name; those caught inside too."""
    tree = ast.parse(textwrap.dedent("\n".join(thing.lines)))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            called = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = getattr(called, "id", getattr(called, "attr", ""))
            if EXCEPTIONS.search(name):
                names.add(name)
    return names


def faults(thing: griffe.Object) -> Iterator[str]:
    """What the docstring of a public function or class lacks."""
    text = said(thing)
    if not text and not thing.is_attribute:
        yield "no docstring"
    if "property" in thing.labels and not text:
        yield "no docstring"
    if not thing.is_function:
        return
    for name in sorted(raised(thing)):
        if not re.search(rf"\b{name}\b", section(text, "Raises")):
            yield f"raises {name}, which its docstring does not say"
    parameters = {p.name for p in thing.parameters} - {"self", "cls"}
    for row in re.findall(r"^    (?! )\*{0,2}([\w, *]+):", section(text, "Args"), re.MULTILINE):
        for name in (word.strip(" *") for word in row.split(",")):
            if name not in parameters:
                yield f"speaks of an argument {name!r} that it has not"
    tensors = [p.name for p in thing.parameters if str(p.annotation) == "Tensor"]
    if tensors and not re.search(r"\([A-Z]\w*[,)]", text):
        yield f"takes tensors ({', '.join(tensors)}) and gives no shape"


def test_the_committed_pages_are_what_the_docstrings_give_now(api, package, root):
    made = api.pages(package)
    there = {path.name: path.read_text() for path in (root / "docs" / "api").glob("*.md")}
    assert set(there) == set(made), "run `make api`"
    for name, text in made.items():
        assert there[name] == text, f"docs/api/{name} is old: run `make api`"


def test_a_changed_docstring_makes_the_pages_old(api, package, root, tmp_path):
    leave = shutil.ignore_patterns("__pycache__", "static")
    shutil.copytree(root / "src", tmp_path / "src", ignore=leave)
    assert api.pages(api.load_package(tmp_path / "src")) == api.pages(package)
    place = tmp_path / "src" / "vlbeit" / "config.py"
    place.write_text(place.read_text().replace("Hidden width of each expert.", "Width."))
    assert api.pages(api.load_package(tmp_path / "src")) != api.pages(package)


def test_every_public_name_says_what_it_takes_gives_and_raises(api, package):
    found = [f"{thing.path}: {fault}" for thing in public(api, package) for fault in faults(thing)]
    assert found == []


def test_what_the_package_exports_is_on_a_page(api):
    import vlbeit

    assert {f"vlbeit.{name}" for name in vlbeit.__all__ if name != "__version__"} == set(
        api.HOMES.values()
    )


PLANTED = '''
class InputError(Exception):
    """A."""

def silent(x): ...

def raises(path):
    """Reads.

    Raises:
        OSError: never.
    """
    raise InputError(path)

def stranger(path):
    """Reads.

    Args:
        paths: what to read.
    """

def shapeless(x: Tensor) -> Tensor:
    """Doubles x."""

def good(x: Tensor, path) -> Tensor:
    """(B, D) -> (B, D).

    Args:
        x, path: what to read.

    Raises:
        InputError: always.
    """
    raise InputError(path)
'''


def test_the_faults_of_a_docstring_are_found(tmp_path):
    (tmp_path / "planted.py").write_text(PLANTED)
    module = griffe.load("planted", search_paths=[str(tmp_path)], docstring_parser="google")
    found = {name: list(faults(module[name])) for name in module.functions}
    assert found == {
        "silent": ["no docstring"],
        "raises": ["raises InputError, which its docstring does not say"],
        "stranger": ["speaks of an argument 'paths' that it has not"],
        "shapeless": ["takes tensors (x) and gives no shape"],
        "good": [],
    }
