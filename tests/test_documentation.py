"""Every code block of the README and the guides does what a reader would see it do.

Blocks of a page are followed in order, in one folder a page, on tiny data and tiny models
(document_runs.py); what cannot run here is parsed. No block is left out.
"""

import signal
from collections import Counter
from pathlib import Path

import pytest
import torch

from document_blocks import (
    KINDS,
    Block,
    WrongPageError,
    blocks_of,
    check_parsed,
    commands,
    compare_printed,
    parse_words,
    smaller,
)
from document_runs import SMALLER, PageRun, key_of, smaller_constants
from document_worlds import SETUPS, build_world
from test_hub import standin  # noqa: F401  a fixture

ROOT = Path(__file__).resolve().parent.parent


def pages() -> dict[str, str]:
    """The text of every page that tells a reader what to type, by its path in the project."""
    paths = [ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted(ROOT.glob("docs/**/*.md"))]
    return {
        str(path.relative_to(ROOT)): path.read_text()
        for path in paths
        if "decisions" not in path.parts
    }


PAGES = pages()
RUNNING = [
    page
    for page, text in PAGES.items()
    if any(
        block.kind not in ("parsed", "described", "elsewhere") for block in blocks_of(page, text)
    )
]


@pytest.fixture(autouse=True)
def process_as_before():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The demo and runs that pages begin with; made once."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("VLBEIT_CACHE", str(folder / "cache"))
        build_world(folder)
    return folder


@pytest.fixture
def follow(world, tmp_path, monkeypatch, request):
    """Follow a page's text as a reader would; returns the finished PageRun."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLBEIT_CACHE", str(world / "cache"))

    def run(page: str, text: str) -> PageRun:
        if page == "docs/hub.md":
            request.getfixturevalue("standin")
        SETUPS[page](world)
        found = PageRun(page, ROOT)
        with smaller_constants():
            try:
                for block in blocks_of(page, text):
                    found.follow(block)
            finally:
                found.close()
        return found

    return run


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNING)
def test_every_block_of_the_page_does_what_it_says(page, follow):
    done = follow(page, PAGES[page])
    assert sum(done.done.values()) == PAGES[page].count("\n```") // 2


@pytest.mark.slow
def test_a_page_with_a_wrong_path_fails_when_it_is_followed(follow):
    wrong = PAGES["docs/hub.md"].replace(
        "export hf runs/tiny out/tiny", "export hf runs/tny out/tiny"
    )
    with pytest.raises(WrongPageError, match=r"runs/tny.* ended with 66"):
        follow("docs/hub.md", wrong)


# -- what holds for the pages as they stand --------------------------------------------------


def test_every_block_has_a_kind_and_every_fence_a_block():
    for page, text in PAGES.items():
        found = blocks_of(page, text)
        assert 2 * len(found) == sum(line.lstrip().startswith("```") for line in text.splitlines())
        assert all(block.kind in KINDS for block in found)


def test_most_blocks_are_run_and_what_is_not_run_says_why():
    kinds = Counter(block.kind for page, text in PAGES.items() for block in blocks_of(page, text))
    assert kinds["run"] > 50 and kinds["run"] > 3 * kinds["parsed"]
    for page, text in PAGES.items():
        for block in blocks_of(page, text):
            if block.remark in ("not run", "run by"):
                assert len(block.about) > 8, block.where
            if block.remark == "run by":
                test = (ROOT / "tests" / block.about).read_text()
                assert Path(page).name in test, f"{block.where}: {block.about} does not read it"


def test_what_is_not_run_is_parsed_in_full():
    for page, text in PAGES.items():
        for block in blocks_of(page, text):
            if block.kind == "parsed":
                check_parsed(block)


def test_every_entry_that_makes_a_command_smaller_is_used():
    shown = [
        command.vlbeit
        for page, text in PAGES.items()
        for block in blocks_of(page, text)
        if block.kind == "run" and block.language == "bash"
        for command in commands(block)
        if command.vlbeit
    ]
    assert {key_of(words) for words in shown} - {None} == set(SMALLER)


def test_every_page_that_is_run_has_a_beginning_and_every_beginning_a_page():
    assert set(RUNNING) == set(SETUPS)


# -- that a wrong page is found --------------------------------------------------------------


def block(text: str, language: str = "bash", remark: str = "") -> Block:
    return blocks_of("page.md", f"{remark}\n```{language}\n{text}\n```\n")[0]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("pretrain tiny --optim.lrr 1e-3", "unknown setting --optim.lrr; did you mean"),
        ("pretrain tiny --optim.lr much", "optim.lr"),
        ("finetune vqq tiny --start a --data b", "did you mean vqa"),
        ("eval runs/tiny --sample-count 3", "unrecognized arguments: --sample-count 3"),
        ("prepare pairs a.jsonl --picture b --out c", "--picture"),
        ("prepare paris a.jsonl --out c", "paris"),
        ("tokenizer train-texts --data a --out b", "train-texts"),
        ("convert beit a.pth --out b --copy-expert-s", "--copy-expert-s"),
        ("serve runs/demo --ports 80", "--ports"),
        ("export hf runs/tiny", "out"),
        ("bench --recipe bsae", "bsae"),
        ("predct runs/tiny", "predict"),
    ],
)
def test_a_wrong_word_of_a_command_is_found_by_the_commands_own_parser(words, told):
    with pytest.raises(WrongPageError, match=told):
        parse_words(words.split(), "page.md:1")


def test_a_flag_that_torchrun_would_take_for_its_own_is_found():
    remark = "<!-- not run: several hosts -->"
    good = "torchrun --nproc-per-node 8 -m -- vlbeit finetune vqa base --start a --data b"
    check_parsed(block(good, remark=remark))
    with pytest.raises(WrongPageError, match="ambiguous"):
        check_parsed(block(good.replace("-- ", ""), remark=remark))
    with pytest.raises(WrongPageError, match="nproc-per-nod"):
        check_parsed(block(good.replace("per-node", "per-nods"), remark=remark))


def test_a_page_with_a_wrong_flag_fails_in_its_own_block():
    page = PAGES["docs/finetune.md"]
    wrong = page.replace("--classification.probe", "--classification.prob")
    assert wrong != page
    (bad,) = [b for b in blocks_of("finetune.md", wrong) if "--classification.prob " in b.text]
    last = [command for command in commands(bad) if command.vlbeit][-1]
    with pytest.raises(WrongPageError, match=r"finetune.md:\d+.*--classification.prob"):
        parse_words(last.vlbeit, bad.where)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("```rust\nfn main() {}\n```\n", "page.md:1: a block in 'rust'"),
        ("```\nvlbeit doctor\n```\n", "page.md:1: a block in 'no language'"),
        ("```text\nlayout\n```\n", "needs a remark"),
        ("<!-- not run: -->\n```bash\nls\n```\n", "gives no reason"),
    ],
)
def test_a_block_of_no_known_kind_is_refused(text, told):
    (found,) = blocks_of("page.md", text)
    with pytest.raises(WrongPageError, match=told):
        _ = found.kind


def test_what_is_set_off_by_blanks_or_never_closed_is_refused():
    with pytest.raises(WrongPageError, match="page.md:3: an indented block"):
        blocks_of("page.md", "Type:\n\n    vlbeit doctor\n")
    with pytest.raises(WrongPageError, match="page.md:1: this fence is not closed"):
        blocks_of("page.md", "```bash\nvlbeit doctor\n")
    with pytest.raises(WrongPageError, match="unknown remark"):
        blocks_of("page.md", "<!-- skip: later -->\n```bash\nls\n```\n")


def test_the_grammar_of_what_is_not_run_is_checked():
    remark = "<!-- not run: needs a cluster -->"
    with pytest.raises(WrongPageError, match="bash -n"):
        check_parsed(block("if true; then vlbeit doctor", remark=remark))
    with pytest.raises(SyntaxError):
        check_parsed(block("run = vlbeit.load(", "python", remark))
    with pytest.raises(Exception, match="mapping"):
        check_parsed(block("a: b: c", "yaml", remark))
    with pytest.raises(WrongPageError, match="optim.lrr"):
        words = "args: [vlbeit, pretrain, base, --data, x, --optim.lrr, '1']"
        check_parsed(block(f"spec:\n - command: [torchrun, -m]\n   {words}", "yaml", remark))


def test_printed_lines_are_compared_and_three_dots_stand_for_anything():
    quoted = block("step ... of 10\nsaved in ... s", "text", "<!-- printed -->")
    compare_printed(quoted, "x\nstep  4 of 10\nsaved in 0.1 s\n")
    with pytest.raises(WrongPageError, match="but printed was"):
        compare_printed(quoted, "step 4 of 11\nsaved in 0.1 s\n")


def test_making_a_command_smaller_changes_the_named_flags_alone():
    words = ["pretrain", "tiny", "--data", "a", "b", "--max-steps", "9", "--seed", "1"]
    changes = {"--max-steps": "2", "--model.image-size": "8 8"}
    assert smaller(words, changes) == [
        "pretrain", "tiny", "--data", "a", "b", "--max-steps", "2", "--seed", "1",
        "--model.image-size", "8", "8",
    ]  # fmt: skip
