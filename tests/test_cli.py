"""The command from outside: what it lists, what it answers, and the exit code of every ending."""

import argparse
import importlib
import json
import re
import subprocess
import sys

import pytest

from vlbeit import __version__, cli, errors
from vlbeit.cli import PREPARE_NAMES, VERBS, Verb, main
from vlbeit.errors import VLBeitError

ERRORS = sorted(VLBeitError.__subclasses__(), key=lambda kind: kind.exit_code)


def ending_with(monkeypatch, ending: BaseException | int | None) -> None:
    """Make `vlbeit demo` end as given."""

    def run(words: list[str]) -> int | None:
        if isinstance(ending, BaseException):
            raise ending
        return ending

    monkeypatch.setattr(cli, "toy_run", run, raising=False)
    monkeypatch.setitem(VERBS, "demo", Verb("toy", "vlbeit.cli:toy_run"))


def test_help_lists_every_verb_and_what_can_be_prepared(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {verb} " in text for verb in VERBS)
    assert all(name in text for name in PREPARE_NAMES)


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vlbeit {__version__}\n"


def test_no_command_prints_the_help_and_is_not_a_success(capsys):
    assert main([]) == 78
    assert "usage: vlbeit" in capsys.readouterr().err


@pytest.mark.parametrize("word, near", [("pretrian", "pretrain"), ("docter", "doctor")])
def test_an_unknown_command_names_the_nearest(word, near, capsys):
    assert main([word]) == 78
    captured = capsys.readouterr()
    assert f"`vlbeit {near}`" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_an_error_of_ours_is_its_message_and_its_exit_code(kind, monkeypatch, capsys):
    ending_with(monkeypatch, kind("shard-7: what happened and what to do"))
    assert main(["demo"]) == kind.exit_code
    captured = capsys.readouterr()
    assert captured.err == "vlbeit: shard-7: what happened and what to do\n"
    assert captured.out == ""


def test_the_exit_codes_are_the_contracts_and_no_two_errors_share_one():
    codes = [kind.exit_code for kind in ERRORS]
    assert codes == [65, 66, 70, 71, 73, 75, 77, 78]
    assert {kind.__name__ for kind in ERRORS} <= set(vars(errors))


def test_a_rank_says_which_it_is(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    ending_with(monkeypatch, errors.InputError("gone"))
    assert main(["demo"]) == 66
    assert capsys.readouterr().err == "vlbeit (rank 1): gone\n"


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        (None, 0),
        (0, 0),
        (1, 1),
        (KeyboardInterrupt(), 130),
        (SystemExit(0), 0),
        (SystemExit(None), 0),
        (SystemExit(2), 78),  # argparse's code for bad usage
        (SystemExit("stopped"), 1),
    ],
    ids=repr,
)
def test_every_other_ending_has_its_code(ending, code, monkeypatch):
    ending_with(monkeypatch, ending)
    assert main(["demo"]) == code


def test_a_missing_extra_is_named_and_any_other_missing_module_is_a_bug(monkeypatch, capsys):
    ending_with(monkeypatch, ModuleNotFoundError("no", name="tensorboard.compat"))
    assert main(["demo"]) == 78
    assert "vlbeit[train]" in capsys.readouterr().err
    ending_with(monkeypatch, ModuleNotFoundError("no", name="vlbeit.nowhere"))
    with pytest.raises(ModuleNotFoundError):
        main(["demo"])


def test_a_fault_of_ours_is_not_dressed_up_as_the_users(monkeypatch):
    ending_with(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["demo"])


def test_a_reader_that_leaves_early_causes_no_traceback():
    script = (
        "import sys; from vlbeit.cli import main; sys.exit(main(['--help']) or main(['--help']))"
    )
    with subprocess.Popen(
        [sys.executable, "-u", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert "Traceback" not in process.stderr.read().decode()
        assert process.wait() in (0, 141)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_leads_to_a_function(verb):
    module, _, function = VERBS[verb].target.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize(
    "words",
    [[verb] for verb in VERBS]
    + [["prepare", name] for name in PREPARE_NAMES]
    + [["tokenizer", name] for name in ("train-text", "train-visual", "import", "show")],
    ids=" ".join,
)
def test_every_verb_explains_itself(words, capsys):
    assert main([*words, "--help"]) == 0
    captured = capsys.readouterr()
    assert "usage" in captured.out.lower()
    assert captured.err == ""


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_a_flag_that_does_not_exist(verb, capsys):
    assert main([verb, "--no-such-flag"]) == 78
    assert capsys.readouterr().err != ""


def test_pretrain_hands_the_parsed_config_to_the_run(monkeypatch):
    seen = []
    monkeypatch.setattr("vlbeit.train.pretrain.pretrain", seen.append)
    assert main(["pretrain", "tiny", "--seed", "5", "--run-dir", "r"]) == 0
    assert (seen[0].recipe, seen[0].seed, seen[0].run_dir) == ("tiny", 5, "r")


def test_pretrain_refuses_an_unknown_setting_with_the_nearest_name(capsys):
    assert main(["pretrain", "tiny", "--optim.lrr", "1"]) == 78
    assert "did you mean --optim.lr?" in capsys.readouterr().err


def test_print_config_prints_yaml_and_trains_nothing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vlbeit.train.pretrain", None)
    assert main(["pretrain", "tiny", "--print-config"]) == 0
    assert "recipe: tiny" in capsys.readouterr().out


def test_doctor_answers_as_the_module_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "vlbeit", "doctor", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["vlbeit"] == __version__


FLAGS_OF_THEIR_OWN = (
    "demo", "prepare", "tokenizer train-text", "tokenizer import x", "tokenizer encode",
    "tokenizer show", "convert beit x", "convert x --to hf-beit", "eval", "predict", "index",
    "search", "serve", "report", "export hf", "bench", "bench data", "bench serve", "doctor",
    "verify", "inspect",
)  # fmt: skip
"""Commands with flags of their own; the others take the settings of a recipe."""


class Asked(BaseException):
    """In place of the work; holds the parser."""


def arguments_without_help(parser: argparse.ArgumentParser) -> list[str]:
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for part in action.choices.values():
                found += arguments_without_help(part)
        elif not action.help:
            found.append(f"{parser.prog} {' '.join(action.option_strings) or action.dest}")
    return found


@pytest.mark.parametrize("command", FLAGS_OF_THEIR_OWN)
def test_every_argument_of_a_command_says_what_it_is_for(command, monkeypatch):
    def asked(self, *_, **__):
        raise Asked(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", asked)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", asked)
    with pytest.raises(Asked) as stopped:
        main(command.split())
    assert arguments_without_help(stopped.value.args[0]) == []


def test_an_argument_without_a_word_is_found():
    parser = argparse.ArgumentParser(prog="toy")
    parser.add_argument("--count")
    parser.add_subparsers().add_parser("inner").add_argument("file")
    assert arguments_without_help(parser) == ["toy --count", "toy inner file"]


def test_every_command_is_among_those_with_flags_or_takes_a_recipe():
    named = {command.split()[0] for command in FLAGS_OF_THEIR_OWN}
    assert named | {"pretrain", "finetune"} == set(VERBS)


def test_the_help_of_recipes_says_what_each_is_for(capsys):
    assert main(["pretrain", "--help"]) == 0
    said = capsys.readouterr().out
    for name in ("tiny", "small", "base", "large"):
        assert re.search(rf"^  {name} +A|^  {name} +The|^  {name} +BEiT", said, re.MULTILINE), said
    assert main(["finetune", "vqa", "--help"]) == 0
    assert "VQAv2 at the paper's 480 px" in capsys.readouterr().out
    assert main(["bench", "--help"]) == 0
    assert "bench serve RUN" in capsys.readouterr().out
