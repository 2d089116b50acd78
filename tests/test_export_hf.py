"""`vlbeit export hf`: a run that others can load, a card of measured facts, and AutoModel."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from PIL import Image

import vlbeit
import vlbeit.hf
from hub_standin import hub_standin
from run_folders import STEP, pretrained_run, task_run
from test_hub import assert_same_tensors
from tiny_models import masked_batch
from vlbeit.checkpoint import find_checkpoint, verify_checkpoint
from vlbeit.cli import main
from vlbeit.config import ModelConfig
from vlbeit.data.transforms import plain
from vlbeit.errors import ConfigError, InputError
from vlbeit.eval.run_rows import EVALUATION
from vlbeit.modelcard import CardFacts, write_card
from vlbeit.nn.model import VLBeit
from vlbeit.serve.export_hf import export_hf
from vlbeit.train.verify import describe

CLOSE = 1e-6


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained_run(tmp_path_factory.mktemp("run") / "shades-run")


@pytest.fixture(scope="module")
def exported(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_hf(run_dir, tmp_path_factory.mktemp("out") / "export")


# -- the folder ------------------------------------------------------------------------------


def test_an_export_is_a_whole_checkpoint_without_the_optimizer(
    run_dir: Path, exported: Path
) -> None:
    source = find_checkpoint(run_dir, print)
    report = verify_checkpoint(exported)
    assert report["ok"] and not report["extra"] and report["step"] == STEP
    names = {p.relative_to(exported).as_posix() for p in exported.rglob("*") if p.is_file()}
    assert names == {
        "README.md", "config.json", "manifest.json", "model.safetensors", "preprocessor.json",
        "preprocessor_config.json", "state.json", "tokenizer.json", "visual/config.json",
        "visual/model.safetensors",
    }  # fmt: skip
    for same in ("model.safetensors", "tokenizer.json", "visual/model.safetensors"):
        assert (exported / same).read_bytes() == (source.folder / same).read_bytes()
    (exported / "stray").touch()
    assert verify_checkpoint(exported)["extra"] == ["stray"]  # the negative check
    (exported / "stray").unlink()


def test_an_export_is_asked_like_the_run(run_dir: Path, exported: Path) -> None:
    mine, theirs = vlbeit.load(run_dir, "cpu"), vlbeit.load(exported, "cpu")
    assert mine.modes == theirs.modes and mine.digest == theirs.digest
    assert_same_tensors(mine.model, theirs.model)
    picture = np.full((32, 32, 3), 80, dtype=np.uint8)
    assert mine.fill_words("red [MASK]", picture) == theirs.fill_words("red [MASK]", picture)
    assert set(describe(exported)["tensors"]) == {"model.safetensors"}
    assert_same_tensors(VLBeit.from_pretrained(exported), mine.model)


def test_nobody_learns_where_files_lay(run_dir: Path, exported: Path, tmp_path: Path) -> None:
    fine_tuned = export_hf(task_run(tmp_path / "run", "vqa"), tmp_path / "out")
    for folder in (exported, fine_tuned):
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix in (".json", ".md"):
                text = path.read_text()
                for told in ("/home/me", "private", str(run_dir.parent), "my-own-host"):
                    assert told not in text, (path.name, told)
    assert json.loads((exported / "config.json").read_text())["data"] == ["shades"]
    visual = json.loads((exported / "visual/config.json").read_text())
    assert visual["facts"]["training"]["teacher"] == "clip"
    # The negative check: the run's own config has the path.
    assert (
        "/home/me/private" in (find_checkpoint(run_dir, print).folder / "config.json").read_text()
    )


def test_an_export_is_replaced_and_nothing_else_is(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_hf(run_dir, out)
    export_hf(run_dir, out, licence="cc0-1.0")
    assert "license: cc0-1.0" in (out / "README.md").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="holds something else"):
        export_hf(run_dir, other)
    assert [p.name for p in other.iterdir()] == ["thesis.tex"]


def test_damaged_weights_are_not_handed_on(run_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    path = find_checkpoint(copy, print).folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"model.safetensors: is not what the manifest says"):
        export_hf(path.parent, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_exports_and_pushes_every_file(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    import huggingface_hub.constants

    out = tmp_path / "out"
    with hub_standin() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        words = ["export", "hf", str(run_dir), str(out), "--push", "somebody/shades"]
        assert main(words) == 0
        sent = server.repositories["somebody/shades"]
    assert server.address in capsys.readouterr().out
    names = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert set(sent) == names
    assert all(sent[name] == (out / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["onnx", "RUN", "OUT"],
        ["hf", "RUN", "OUT", "--private"],
        ["hf", "RUN", "OUT", "--push", "no-namespace"],
    ],
)
def test_words_that_do_not_go_together_are_bad_usage(words: list[str], run_dir: Path) -> None:
    assert main(["export", *(str(run_dir) if w == "RUN" else w for w in words)]) == 78


def test_a_run_without_a_checkpoint_is_missing_input(tmp_path: Path) -> None:
    assert main(["export", "hf", str(tmp_path), str(tmp_path / "out")]) == 66


# -- the card --------------------------------------------------------------------------------


def front(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_has_the_facts_of_the_run_and_of_no_later_step(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert front(card)["library_name"] == "vlbeit"
    for said in (
        "recipe `tiny`, 3 steps, seed 0",
        "| pair | shades | 23 |",
        "at step 2 (the weights here are of step 3)",
        "| mim accuracy | 0.3750 | loss 1.250 |",
        "time in steps: 1.50 hours",
        "1 process(es) on cpu, 2 core(s); vlbeit 0.1.0, torch 2.13.0",
        "pretrained by masked prediction on pairs",
        "state no licence",
    ):
        assert said in card, said


def test_what_nobody_stated_or_measured_is_not_in_the_card(
    run_dir: Path, exported: Path, tmp_path: Path
) -> None:
    card = (exported / "README.md").read_text()
    # A row of the training log is of other weights: it is no result of the model.
    assert "model-index" not in front(card) and "license" not in front(card)
    assert "The weights: not stated" in card
    bare = tmp_path / "run"
    shutil.copytree(run_dir, bare)
    for name in ("eval.jsonl", "metrics.jsonl", "env.json"):
        (bare / name).unlink()
    card = (export_hf(bare, tmp_path / "out") / "README.md").read_text()
    assert "Nothing was measured on held-out data" in card
    assert "hours" not in card and "machine:" not in card


def test_an_evaluation_of_these_weights_is_in_text_and_metadata(
    run_dir: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    found = {
        "step": STEP,
        "split": "val",
        "data": ["/somewhere/shades"],
        "figures": {
            "accuracy": {
                "value": 0.8125, "low": 0.75, "high": 0.875, "samples": 200,
                "baseline": {"value": 0.3},
            }
        },
    }  # fmt: skip
    (copy / EVALUATION).write_text(json.dumps(found))
    card = (
        export_hf(copy, tmp_path / "out", licence="mit", name="Shades") / "README.md"
    ).read_text()
    row = "| accuracy | 0.8125 | [0.7500, 0.8750], without looking 0.3000, 200 samples |"
    assert row in card and "# Shades" in card
    index = front(card)["model-index"][0]
    assert index["name"] == "Shades" and front(card)["license"] == "mit"
    result = index["results"][0]
    assert result["dataset"]["name"] == "shades"
    assert result["metrics"] == [{"type": "accuracy", "value": 0.8125}]
    (copy / EVALUATION).write_text(json.dumps(found | {"step": STEP - 1}))
    with pytest.raises(ConfigError, match=r"evaluates step 2, the checkpoint is of step 3"):
        export_hf(copy, tmp_path / "out")


def test_the_licence_of_the_data_is_told_as_its_folder_has_it(tmp_path: Path) -> None:
    from vlbeit.data.dataset import Dataset

    Dataset.write(tmp_path / "shades", "shades", [], {"licence": "CC BY 4.0, see its page"})
    run = pretrained_run(tmp_path / "run", data=tmp_path / "shades")
    card = (export_hf(run, tmp_path / "out") / "README.md").read_text()
    assert "Licence of `shades`, as its `dataset.json` has it: CC BY 4.0, see its page" in card


def test_a_name_cannot_break_out_of_its_cell() -> None:
    facts = CardFacts(
        model=ModelConfig(), parameters=1, step=0, sources={"pair": {"a | b\n| c": 1}},
        settings={"optim": {"total_steps": 1, "warmup_steps": 0}},
    )  # fmt: skip
    assert "| pair | a \\| b \\| c | 1 |" in write_card(facts)


# -- AutoModel -------------------------------------------------------------------------------


def outputs(model: VLBeit, auto: vlbeit.hf.VLBeitModel, batch) -> tuple[torch.Tensor, torch.Tensor]:
    if batch.stream == "text":
        states = model.embed_text(batch.words, batch.word_valid)
        given = {"input_ids": batch.words}
    elif batch.stream == "image":
        states = model.embed_image(batch.pixels, batch.patch_masked)
        given = {"pixel_values": batch.pixels.float() / 127.5 - 1}
    else:
        states = model.embed_pair(batch.words, batch.word_valid, batch.pixels, batch.patch_masked)
        given = {"input_ids": batch.words, "pixel_values": batch.pixels}
    if batch.word_valid is not None:
        given["attention_mask"] = batch.word_valid.long()
    if batch.patch_masked is not None:
        given["bool_masked_pos"] = batch.patch_masked
    with torch.no_grad():
        return model.backbone(states), auto(**given).last_hidden_state


@pytest.mark.parametrize("stream", ["text", "image", "pair"])
def test_automodel_gives_the_outputs_of_vlbeit(exported: Path, stream: str) -> None:
    auto = transformers.AutoModel.from_pretrained(exported)
    assert isinstance(auto, vlbeit.hf.VLBeitModel) and not auto.training
    model = VLBeit.from_pretrained(exported)
    batch = masked_batch(stream, config=model.config)
    mine, theirs = outputs(model, auto, batch)
    valid = slice(None) if batch.word_valid is None or stream == "pair" else batch.word_valid
    assert float((mine[valid] - theirs[valid]).abs().max()) <= CLOSE
    # The negative check: one disturbed tensor that all three pass through.
    with torch.no_grad():
        auto.backbone.norm.bias += 0.01
    mine, theirs = outputs(model, auto, batch)
    assert float((mine[valid] - theirs[valid]).abs().max()) > 1000 * CLOSE


def test_autoconfig_knows_the_sizes(exported: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(exported)
    assert isinstance(config, vlbeit.hf.VLBeitConfig)
    assert config.sizes() == VLBeit.from_pretrained(exported).config
    assert config.recipe == "tiny"


def test_what_transformers_saves_vlbeit_loads_bit_by_bit(exported: Path, tmp_path: Path) -> None:
    auto = transformers.AutoModel.from_pretrained(exported)
    auto.save_pretrained(tmp_path)
    model = VLBeit.from_pretrained(tmp_path)
    assert_same_tensors(model, VLBeit.from_pretrained(exported))
    again = transformers.AutoModel.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), auto.state_dict().values(), strict=True)
    )


def test_what_vlbeit_saves_automodel_loads(exported: Path, tmp_path: Path) -> None:
    model = VLBeit.from_pretrained(exported)
    auto = transformers.AutoModel.from_pretrained(model.save_pretrained(tmp_path))
    assert_same_tensors(auto.network, model)


@pytest.mark.parametrize("task", ["classification", "vqa", "statements", "retrieval", "entailment"])
def test_automodel_has_the_head_of_a_fine_tuned_run(tmp_path: Path, task: str) -> None:
    out = export_hf(task_run(tmp_path / "run", task), tmp_path / "out")
    auto = transformers.AutoModel.from_pretrained(out)
    run = vlbeit.load(out, "cpu")
    assert_same_tensors(auto.network, run.model)
    assert any(name.startswith("task.") for name in auto.state_dict())
    assert run.trained_for == task
    facts = json.loads((out / "config.json").read_text())["task_facts"]
    assert facts == json.loads((out / "task.json").read_text())


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_automodel_refuses_weights_that_do_not_fit(
    exported: Path, tmp_path: Path, change: str
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    tensors = load_file(folder / "model.safetensors")
    name = "backbone.blocks.1.norm1.bias"
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        name = "backbone.stranger"
        tensors[name] = torch.ones(2)
    else:
        tensors[name] = torch.ones(5)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        transformers.AutoModel.from_pretrained(folder)


def test_automodel_reads_no_pickle(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        transformers.AutoModel.from_pretrained(folder)


def test_automodel_takes_text_or_image_and_nothing_unknown(exported: Path) -> None:
    auto = transformers.AutoModel.from_pretrained(exported)
    with pytest.raises(ValueError, match="input_ids, pixel_values or both"):
        auto()
    with pytest.raises(ValueError, match="token_type_ids"):
        auto(input_ids=torch.zeros(1, 3).long(), token_type_ids=torch.ones(1, 3))


def test_the_image_processor_scales_and_squashes_as_evaluation_does(exported: Path) -> None:
    processor = transformers.AutoImageProcessor.from_pretrained(exported)
    size = VLBeit.from_pretrained(exported).config.image_size
    # Pillow's kernel, which the processor squashes with, is one level off ours in a few places.
    for given, most in ((size, CLOSE), ((47, 61), 1 / 127.5 + CLOSE)):
        picture = np.random.default_rng(0).integers(0, 256, (*given, 3), dtype=np.uint8)
        theirs = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"][0]
        mine = torch.from_numpy(plain(picture, size)).float() / 127.5 - 1
        assert theirs.shape == mine.shape
        assert float((theirs - mine).abs().max()) <= most
        assert float(((theirs - mine).abs() > CLOSE).float().mean()) < 0.02


def test_without_transformers_only_the_module_that_needs_it_is_missing() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import vlbeit; vlbeit.VLBeit\n"
        "try:\n    import vlbeit.hf\n"
        "except ModuleNotFoundError as error:\n"
        "    sys.exit(0 if 'vlbeit[hf]' in str(error) else 2)\n"
        "sys.exit(3)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
