"""The `vlbeit` command: a table of verbs. Words are parsed first, torch is imported after.

Exit codes are the run-folder contract's: 0 done, 65 data outside the budget, 66 input missing or
changed, 70 non-finite, 71 lost rank or worker, 73 cannot save, 75 stopped on request and saved,
77 refused as unsafe, 78 bad configuration or usage, 130 interrupted with nothing to save.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from vlbeit import __version__
from vlbeit.errors import ConfigError, LostWorkerError, VLBeitError

PREPARE_NAMES = (
    "scenes", "remote", "images", "pairs", "text",
    "imagenet", "coco", "flickr30k", "vg", "cc3m", "sbu",
    "vqa", "statements", "retrieval", "classification", "segmentation", "entailment",
    "vqav2", "nlvr2", "ade20k", "snli-ve",
)  # fmt: skip


class Verb(NamedTuple):
    """What `vlbeit --help` says, and the function that takes the words after the verb."""

    help: str
    target: str
    """`module:function`, imported only when the verb is used; (list of words) -> exit code."""


VERBS: dict[str, Verb] = {
    "demo": Verb(
        "the first minutes: draw a small world, pretrain and fine-tune on it, write report.html",
        "vlbeit.train.demo:main",
    ),
    "prepare": Verb(
        "turn files into records: " + " ".join(PREPARE_NAMES),
        "vlbeit.data.prepare:main",
    ),
    "tokenizer": Verb(
        "make the two tokenizers: train-text train-visual import encode show",
        "vlbeit.train.tokenizer_cli:main",
    ),
    "pretrain": Verb(
        "pretrain by a recipe; the same command again goes on where it stopped",
        "vlbeit.cli:pretrain",
    ),
    "finetune": Verb(
        "train a pretrained model for a task: vqa statements retrieval classification ...",
        "vlbeit.cli:finetune",
    ),
    "convert": Verb(
        "weights of BEiT, VLMo and others in and out, with an account of every tensor",
        "vlbeit.convert.cli:main",
    ),
    "eval": Verb(
        "held-out loss and accuracy of a run, and what the picture adds to the text",
        "vlbeit.eval.cli:main",
    ),
    "predict": Verb(
        "ask a run, pretrained or fine-tuned for any task, and draw its answer",
        "vlbeit.serve.predict:main",
    ),
    "index": Verb(
        "encode pictures or texts once with a retrieval run, to be searched",
        "vlbeit.serve.search:index",
    ),
    "search": Verb(
        "find pictures for a text, or texts for a picture, in an index",
        "vlbeit.serve.search:search",
    ),
    "serve": Verb(
        "answer over HTTP, with a page to play with: every mode of one or more runs",
        "vlbeit.serve.server:main",
    ),
    "report": Verb(
        "one page about a run: curves, filled-in words and patches; several runs side by side",
        "vlbeit.eval.report:main",
    ),
    "export": Verb(
        "write a run for others: hf (a folder for the Hugging Face hub), onnx (for onnxruntime)",
        "vlbeit.serve.export_cli:main",
    ),
    "bench": Verb(
        "time a step, the data loading or the server; plan a run's time and cost",
        "vlbeit.train.bench:main",
    ),
    "doctor": Verb(
        "what this machine and installation can do",
        "vlbeit.doctor:main",
    ),
    "verify": Verb(
        "check a checkpoint, run folder or shards against their digests",
        "vlbeit.train.verify:main",
    ),
    "inspect": Verb(
        "show what is in a checkpoint, run folder or data folder",
        "vlbeit.train.verify:inspect",
    ),
}


def command() -> NoReturn:
    """The process behind `vlbeit` and `python -m vlbeit`: `main`, then leave."""
    code = main()
    if code == LostWorkerError.exit_code:
        # The library behind the lost rank may hold the interpreter's exit up for many seconds.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    distributed = sys.modules.get("vlbeit.train.distributed")
    if distributed is not None:  # only what trains loads it
        distributed.leave_group()
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; a user's error is one message on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except VLBeitError as error:
        _complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        # A run that saves on Ctrl-C raises StopRequested (75); here nothing was left to save.
        _complain("interrupted")
        return 130
    except BrokenPipeError:
        # The reader of our output left (`vlbeit ... | head`). Keep the exit from flushing into it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ModuleNotFoundError as error:
        from vlbeit.doctor import extra_of

        extra = extra_of(error.name or "")
        if extra is None:
            raise
        _complain(f"{error.name} is not installed; run: pip install 'vlbeit[{extra}]'")
        return ConfigError.exit_code
    except SystemExit as stop:
        # argparse leaves with 2 after its message; the contract's code for bad usage is 78.
        if isinstance(stop.code, str):
            _complain(stop.code)
            return 1
        return ConfigError.exit_code if stop.code == 2 else int(stop.code or 0)


def pretrain(words: list[str]) -> int:
    """`vlbeit pretrain RECIPE [--config FILE] [--SETTING VALUE ...]`."""
    from vlbeit.config import PretrainConfig
    from vlbeit.overrides import parse_config
    from vlbeit.recipes import PRETRAIN

    config = parse_config(PretrainConfig, PRETRAIN, words, command="vlbeit pretrain")
    run = importlib.import_module("vlbeit.train.pretrain")
    run.pretrain(config)
    return 0


def finetune(words: list[str]) -> int:
    """`vlbeit finetune TASK [RECIPE] --start RUN --data DIR ... [--SETTING VALUE ...]`."""
    from vlbeit.config import FINETUNE_CONFIGS
    from vlbeit.overrides import parse_config, recipe_of_start
    from vlbeit.recipes import FINETUNE

    tasks = ", ".join(FINETUNE)
    if not words or words[0] in ("-h", "--help"):
        print(
            "usage: vlbeit finetune TASK [RECIPE] --start RUN --data DIR ... --run-dir DIR "
            f"[--SETTING VALUE ...]\ntasks: {tasks}\n"
            "--start: a pretrained run; its recipe is taken where RECIPE is left out\n"
            "`vlbeit finetune TASK --help` says what its recipes are for;\n"
            "`vlbeit finetune TASK RECIPE --help` lists every setting with the recipe's value."
        )
        return 0 if words else ConfigError.exit_code
    task, rest = words[0], words[1:]
    if task not in FINETUNE:
        near = difflib.get_close_matches(task, FINETUNE, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"vlbeit finetune: no task {task!r}{hint} (tasks: {tasks})")
    command = f"vlbeit finetune {task}"
    rest = list(recipe_of_start(rest, FINETUNE[task], command))
    config = parse_config(FINETUNE_CONFIGS[task], FINETUNE[task], rest, command=command)
    run = importlib.import_module("vlbeit.train.finetune")
    run.finetune(config)
    return 0


def _dispatch(words: list[str]) -> int:
    if not words:
        print(_overview(), file=sys.stderr)
        return ConfigError.exit_code
    verb, rest = words[0], words[1:]
    if verb in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if verb in ("-V", "--version"):
        print(f"vlbeit {__version__}")
        return 0
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"; did you mean `vlbeit {near[0]}`?" if near else ""
        raise ConfigError(f"no command {verb!r}{hint} (known: {', '.join(VERBS)})")
    module, _, function = VERBS[verb].target.partition(":")
    run: Callable[[list[str]], int | None] = getattr(importlib.import_module(module), function)
    return run(rest) or 0


def _overview() -> str:
    lines = [f"  {name:<10} {verb.help}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            f"vlbeit {__version__}: vision-language pretraining by masked prediction (VL-BEiT)",
            "",
            "usage: vlbeit COMMAND ...      `vlbeit COMMAND --help` for one command",
            "",
            *lines,
            "",
            "First steps: `vlbeit demo`, docs/quickstart.md. More processes:",
            "torchrun --nproc-per-node N -m -- vlbeit pretrain ... (docs/scale.md)",
        ]
    )


def _complain(message: str) -> None:
    rank = f" (rank {os.environ['RANK']})" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    print(f"vlbeit{rank}: {message}", file=sys.stderr, flush=True)
