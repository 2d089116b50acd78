"""What is exported, converted or fetched from the hub is gone on with: `--start` takes it as it
takes a run, and refuses what is less than that with the command that helps."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import transformers

import vlbeit
import vlbeit.hf
from foreign_files import beit_tensors, save_training_file
from hub_standin import hub_standin
from run_folders import pretrained_run
from toy_run import training_here
from toy_tasks import toy_config, toy_finetune, write_start, write_tasks
from untrained_run import noise
from vlbeit.checkpoint import find_checkpoint
from vlbeit.cli import main
from vlbeit.config import ModelConfig, from_dict
from vlbeit.convert.hf_export import export_hf_beit
from vlbeit.errors import InputError
from vlbeit.hub import local_folder
from vlbeit.nn.model import VLBeit
from vlbeit.serve.export_hf import export_hf
from vlbeit.train.finetune import finetune

SHORT = {"max_steps": 2, "save_every": 2}


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    with training_here():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data") / "shades")


@pytest.fixture(scope="module")
def start(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with training_here(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLBEIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield write_start(tmp_path_factory.mktemp("runs") / "start", data)


def learned(run: Path) -> dict[str, str]:
    """sha256 of weights, optimizer and tokenizer of the newest checkpoint."""
    files = find_checkpoint(run, print).manifest["files"]
    return {name: files[name]["sha256"] for name in files if name != "config.json"}


@pytest.mark.parametrize("task", ["classification", "vqa"])
def test_an_export_is_fine_tuned_to_the_same_weights_as_its_run(
    task: str, start: Path, data: Path, tmp_path: Path
) -> None:
    exported = export_hf(start, tmp_path / "export")
    mine = toy_finetune(task, start, data, tmp_path / "from-run", SHORT)
    theirs = toy_finetune(task, exported, data, tmp_path / "from-export", SHORT)
    assert learned(theirs) == learned(mine)
    other = toy_finetune(task, exported, data, tmp_path / "fresh", SHORT | {"scratch": True})
    assert learned(other) != learned(mine)  # the negative check: the start does matter


def test_an_export_of_a_fine_tuned_run_is_the_start_of_another_task(
    start: Path, data: Path, tmp_path: Path
) -> None:
    classes = toy_finetune("classification", start, data, tmp_path / "classes", SHORT)
    exported = export_hf(classes, tmp_path / "export")
    mine = toy_finetune("vqa", classes, data, tmp_path / "from-run", SHORT)
    theirs = toy_finetune("vqa", exported, data, tmp_path / "from-export", SHORT)
    assert learned(theirs) == learned(mine)
    assert vlbeit.load(theirs).answer(noise(1), "which colour is here")[0].name


def test_a_run_goes_through_the_hub_and_on(
    start: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_standin() as server:
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        words = ["export", "hf", str(start), str(tmp_path / "out"), "--push", "somebody/shades"]
        assert main(words) == 0
        fetched = local_folder("somebody/shades", cache_dir=tmp_path / "cache")
    assert main(["verify", str(fetched)]) == 0
    links = [path for path in fetched.iterdir() if path.is_symlink()]
    assert links  # into the cache's blobs
    mine = toy_finetune("classification", start, data, tmp_path / "from-run", SHORT)
    theirs = toy_finetune("classification", fetched, data, tmp_path / "from-hub", SHORT)
    assert learned(theirs) == learned(mine)
    # The negative check: a link to anywhere else is no file of the folder.
    shutil.copyfile(links[0].resolve(), tmp_path / "elsewhere")
    links[0].unlink()
    links[0].symlink_to(tmp_path / "elsewhere")
    assert main(["verify", str(fetched)]) == 1


def test_a_converted_model_is_exported_and_fine_tuned_like_the_conversion(
    data: Path, tmp_path: Path
) -> None:
    path = save_training_file(tmp_path / "beit.pth", beit_tensors(), "model")
    words = ["convert", "beit", path, "--out", tmp_path / "run", "--text-tokenizer", data]
    assert main([*map(str, words), "--fresh", "*"]) == 0
    exported = export_hf(tmp_path / "run", tmp_path / "export")
    model = from_dict(ModelConfig, find_checkpoint(exported, print).config["model"])

    def tuned(begin: Path, out: str) -> Path:
        config = replace(toy_config("classification", SHORT), model=model, start=str(begin))
        return finetune(replace(config, data=(str(data),), run_dir=str(tmp_path / out)))

    theirs = tuned(exported, "from-export")
    assert learned(theirs) == learned(tuned(tmp_path / "run", "from-run"))
    assert vlbeit.load(theirs).classify(noise(1))[0].name


def test_weights_without_a_run_are_refused_with_what_to_do(data: Path, tmp_path: Path) -> None:
    run = pretrained_run(tmp_path / "run")
    exported = export_hf(run, tmp_path / "export")
    alone = VLBeit.from_pretrained(exported).save_pretrained(tmp_path / "alone")
    transformers.AutoModel.from_pretrained(exported).save_pretrained(tmp_path / "auto")
    export_hf_beit(run, tmp_path / "beit")
    for folder, told in (
        (alone, "export hf RUN OUT"),
        (tmp_path / "auto", "export hf RUN OUT"),
        (tmp_path / "beit", "convert LAYOUT FOLDER"),
        (Path("nobody/shades"), "local_folder"),
        (tmp_path / "nowhere", "expected a run folder or a checkpoint$"),
    ):
        with pytest.raises(InputError, match=told):
            toy_finetune("classification", folder, data, tmp_path / "out", SHORT)
    assert find_checkpoint(exported, print).step  # the negative check: a whole export is taken
