"""What `vlbeit convert` writes is a run like any other: fine-tuned, evaluated, asked, inspected."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import vlbeit
from foreign_files import (
    HEADS,
    beit_tensors,
    random_tensors,
    save_training_file,
    vlmo_tensors,
    write_vocabulary,
)
from toy_tasks import toy_config, toy_finetune, write_start, write_tasks
from untrained_run import noise
from vlbeit.checkpoint import find_checkpoint
from vlbeit.cli import main
from vlbeit.config import (
    ModelConfig,
    SegmentationConfig,
    SegmentationRun,
    finetune_config,
    from_dict,
)
from vlbeit.convert.folder import RECEIPT
from vlbeit.errors import ConfigError
from vlbeit.nn.model import VLBeit
from vlbeit.nn.weights import initialise
from vlbeit.tasks import build_task
from vlbeit.train.finetune import finetune
from vlbeit.train.opening import check_same_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("shades"))


def convert(*words: object) -> None:
    assert main(["convert", *map(str, words)]) == 0


def fine_tuned(task: str, start, data, run_dir, **model):
    """A run of two steps from a converted one."""
    found = from_dict(ModelConfig, find_checkpoint(start, print).config["model"])
    config = toy_config(task, {"max_steps": 2, "save_every": 2})
    config = replace(
        config, start=str(start), data=(str(data),), run_dir=str(run_dir),
        model=replace(found, **model),
    )  # fmt: skip
    return finetune(config)


@pytest.mark.slow
def test_a_converted_beit_is_fine_tuned_for_classes_at_another_size(tmp_path, data, capsys):
    path = save_training_file(tmp_path / "beit.pth", beit_tensors(), "model")
    convert("beit", path, "--out", tmp_path / "run", "--text-tokenizer", data, "--copy-experts",
            "--text-positions", 16, "--fresh", "text.*", "heads.mlm.*", "*:text")  # fmt: skip
    assert main(["verify", str(tmp_path / "run")]) == 0
    assert main(["inspect", str(tmp_path / "run"), "--json"]) == 0
    assert vlbeit.load(tmp_path / "run").modes == ("encode_image",)  # it knows no text yet
    run = fine_tuned(
        "classification", tmp_path / "run", data, tmp_path / "classes", image_size=(48, 48)
    )
    log = (run / "log.txt").read_text()
    assert "backbone.relative_bias.table (" in log and "resized" in log
    capsys.readouterr()
    assert main(["eval", str(run), "--json"]) == 0
    assert "top1" in json.loads(capsys.readouterr().out)["figures"]
    assert vlbeit.load(run).classify(noise(1))[0].name


def test_a_converted_vlmo_answers_questions_after_fine_tuning(tmp_path, data):
    write_vocabulary(tmp_path)
    path = save_training_file(tmp_path / "vlmo.pt", vlmo_tensors(), "module")
    convert("vlmo", path, "--heads", HEADS, "--out", tmp_path / "run", "--fresh",
            "image.masked_patch", "heads.*")  # fmt: skip
    run = fine_tuned("vqa", tmp_path / "run", data, tmp_path / "vqa")
    assert vlbeit.load(run).answer(noise(1), "which colour")[0].name
    pretrained = vlbeit.load(tmp_path / "run")
    # Its heads are fresh: it has vectors for everything and cannot fill in anything.
    assert pretrained.modes == ("encode_image", "encode_text", "encode_pair", "attention")
    assert pretrained.encode_pair(noise(1), "w1 w3").shape == (16,)
    (pretrained.run.folder / RECEIPT).unlink()  # read once, not at every question
    with pytest.raises(ConfigError, match="has no fill_words"):
        pretrained.fill_words("w1 [MASK] w3", noise(1))


def test_a_converted_classifier_is_asked_and_evaluated_as_it_is(tmp_path, data, capsys):
    tensors = beit_tensors("classifier")
    tensors |= random_tensors({"head.weight": (4, 16), "head.bias": (4,)})
    path = save_training_file(tmp_path / "beit.pth", tensors, "model")
    names = tmp_path / "names.txt"
    names.write_text("black\ndark\nlight\nwhite\n")
    convert("beit", path, "--out", tmp_path / "run", "--classes", names, "--fresh", "*")
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--data", str(data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"]["top1"]
    answers = vlbeit.load(tmp_path / "run").classify(noise(1))
    assert {answer.name for answer in answers} == {"black", "dark", "light", "white"}


def test_the_receipt_lies_in_the_checkpoint_and_accounts_for_every_tensor(tmp_path, data):
    tensors = beit_tensors()
    path = save_training_file(tmp_path / "beit.pth", tensors, "model")
    convert("beit", path, "--out", tmp_path / "run", "--text-tokenizer", data, "--fresh", "*")
    checkpoint = find_checkpoint(tmp_path / "run", print)
    receipt = json.loads((checkpoint.folder / "receipt.json").read_text())
    assert {name for row in receipt["tensors"] for name in row.get("sources", [])} == set(tensors)
    targets = {row["target"] for row in receipt["tensors"] if "target" in row}
    assert {name for name in targets if ":" not in name} == set(checkpoint.model_tensors())
    assert sum(receipt["counts"].values()) == len(receipt["tensors"])
    model = VLBeit.from_pretrained(checkpoint.folder)
    assert torch.equal(model.image.cls, tensors["cls_token"].flatten())


def test_a_dry_run_shows_the_receipt_and_writes_nothing(tmp_path, capsys):
    path = save_training_file(tmp_path / "beit.pth", beit_tensors(), "model")
    convert("beit", path, "--dry-run", "--json", "--fresh", "*")
    assert json.loads(capsys.readouterr().out)["layout"] == "beit"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["beit.pth"]
    assert main(["convert", "beit", str(path)]) == 78


def test_a_run_from_before_a_setting_was_made_goes_on(tmp_path, data):
    """config.json of an older release lacks model.text_norm_eps; its default then was today's."""
    start = write_start(tmp_path / "start", data)
    settings = {"max_steps": 1, "save_every": 1}
    run = toy_finetune("classification", start, data, tmp_path / "run", settings)
    folder = find_checkpoint(run, print).folder
    tree = json.loads((folder / "config.json").read_text())
    del tree["model"]["text_norm_eps"]
    older = replace(find_checkpoint(run, print), config=tree)
    log = SimpleNamespace(checkpoint=older, world=SimpleNamespace(size=1), threads=1, log=print)
    config = finetune_config(json.loads((folder / "config.json").read_text()))
    check_same_run(log, config)
    with pytest.raises(ConfigError, match="model.text_norm_eps was 0.0 and is 1e-12"):
        changed = replace(config.model, text_norm_eps=1e-12)
        check_same_run(log, replace(config, model=changed))


def test_only_the_named_tensors_are_filled_and_as_in_a_fresh_model():
    config = toy_config("classification").model
    whole = VLBeit(config, seed=3).state_dict()
    names = {"backbone.blocks.1.experts.l.fc2.weight", "heads.mlm.weight", "text.positions"}
    model = VLBeit(config, seed=None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    initialise(model, 3, config.init_std, config.position_std, only=names)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (whole if name in names else before)[name]), name


@pytest.mark.parametrize("taps", [(1, 2, 3), (2, 1, 3, 4), (0, 1, 2, 3), (1, 2, 3, 5)])
def test_taps_that_a_trunk_of_four_blocks_does_not_have_are_refused(taps):
    model = ModelConfig(layers=4)
    run = SegmentationRun(recipe="toy", model=model, segmentation=SegmentationConfig(taps=taps))
    with pytest.raises(ConfigError, match="segmentation.taps must be four blocks of 1..4"):
        build_task(run, {"classes": ["a", "b"], "most_frequent": 0})
