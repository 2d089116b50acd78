"""Models in and out of folders and the hub: the same numbers, every fault named, no pickle read."""

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

import vlbeit
from hub_standin import StandIn, hub_standin
from run_folders import pretrained_run, task_run
from test_model import states_of
from tiny_models import tiny_config, tiny_model
from untrained_run import noise
from vlbeit import hub
from vlbeit.checkpoint import find_checkpoint
from vlbeit.config import to_dict
from vlbeit.errors import ConfigError, InputError, SaveError, UnsafeError
from vlbeit.nn.model import VLBeit
from vlbeit.serve.export_hf import export_hf
from vlbeit.serve.served_runs import name_of

REPOSITORY = "somebody/tiny"


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch):
    with hub_standin() as server:
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


def assert_same_tensors(a: VLBeit, b: VLBeit) -> None:
    mine, theirs = a.state_dict(), b.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


# -- folders ---------------------------------------------------------------------------------


def test_a_checkpoint_of_a_run_is_a_pretrained_folder(tmp_path: Path) -> None:
    run_dir = pretrained_run(tmp_path / "run")
    checkpoint = find_checkpoint(run_dir, print)
    model = VLBeit.from_pretrained(checkpoint.folder)
    stored = load_file(checkpoint.folder / "model.safetensors")
    assert model.state_dict().keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())
    assert not model.training and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("relative", ["none", "shared", "per_layer"])
def test_saved_and_loaded_a_model_is_the_same_bit_by_bit(tmp_path: Path, relative: str) -> None:
    model = tiny_model(relative_bias=relative, layer_scale=0.1)
    folder = model.save_pretrained(tmp_path / "model")
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    again = VLBeit.from_pretrained(folder)
    assert again.config == model.config
    assert_same_tensors(again, model)
    states = states_of(model, "pair")
    with torch.no_grad():
        assert torch.equal(again.backbone(states), model.backbone(states))
        # The negative check: a bit of difference in one tensor would be seen.
        again.text.words.weight[7] += 1e-3
        assert not torch.equal(again.text.words.weight, model.text.words.weight)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    VLBeit.from_pretrained(folder).save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_half_precision_on_disk_is_float32_in_memory(tmp_path: Path) -> None:
    model = tiny_model()
    folder = model.save_pretrained(tmp_path)
    half = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    save_file(half, folder / "model.safetensors")
    loaded = VLBeit.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in half.items())


def test_a_card_that_is_there_is_kept_and_one_that_is_given_is_written(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    generated = (tmp_path / "README.md").read_text()
    assert (
        "not known" in generated and f"{sum(p.numel() for p in model.parameters()):,}" in generated
    )
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    model.save_pretrained(tmp_path, card="another")
    assert (tmp_path / "README.md").read_text() == "another"


def test_a_fine_tuned_model_says_how_it_is_loaded_and_gives_its_trunk(tmp_path: Path) -> None:
    folder = find_checkpoint(task_run(tmp_path / "run", "vqa"), print).folder
    with pytest.raises(InputError, match=r"fine-tuned for vqa.*vlbeit.load"):
        VLBeit.from_pretrained(folder)
    trunk = VLBeit.from_pretrained(folder, trunk_only=True)
    stored = load_file(folder / "model.safetensors")
    assert set(trunk.state_dict()) == {n for n in stored if not n.startswith("task.")}
    assert len(trunk.heads) == 0 and trunk.task is None
    with pytest.raises(ConfigError, match="export hf"):
        vlbeit.load(folder, "cpu").model.save_pretrained(tmp_path / "out")


def write(folder: Path, tree: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(tree if isinstance(tree, str) else json.dumps(tree))
    save_file(tiny_model().state_dict(), folder / "model.safetensors")
    return folder


MODEL = to_dict(tiny_config())


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ("{", "not JSON"),
        ([1], "expected a JSON object"),
        ({"model_type": "beit", "hidden_size": 768}, "'beit'"),
        ({"model": {**MODEL, "widht": 3}}, "widht"),
        ({"model": {**MODEL, "width": "x"}}, "width"),
        ({"model": {**MODEL, "layers": 10**9}}, "1000000000 layers"),
        ({"model": {**MODEL, "vocab": 10**12}}, "text.words.weight"),
        ({"model": {**MODEL, "codes": 41}}, r"heads.mim.bias is \(40,\), the model has \(41,\)"),
    ],
)
def test_settings_that_are_not_of_this_model_are_refused(
    tmp_path: Path, tree: object, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        VLBeit.from_pretrained(write(tmp_path / "model", tree))


def test_weights_as_a_pickle_are_never_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model": MODEL}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02not even a pickle")
    with pytest.raises(UnsafeError, match="pytorch_model.bin"):
        VLBeit.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("nowhere", "no such folder"),
        ("./runs/tiny", "no such folder"),
        ("a/b/c", "no such folder"),
        ("../x", "no such folder"),
    ],
)
def test_what_is_no_folder_and_no_repository_is_refused_without_the_network(
    standin: StandIn, place: str, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        VLBeit.from_pretrained(place)
    assert standin.asked == []


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    folder = tiny_model().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        VLBeit.from_pretrained(folder / "model.safetensors")


# -- the hub ---------------------------------------------------------------------------------


def test_pushed_and_pulled_a_model_is_the_same_bit_by_bit(standin: StandIn, tmp_path: Path) -> None:
    model = tiny_model(seed=3)
    address = model.push_to_hub(REPOSITORY, token="hf_secret", commit_message="first")
    assert address.startswith(standin.address)
    assert "Bearer hf_secret" in standin.tokens
    assert set(standin.repositories[REPOSITORY]) == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    again = VLBeit.from_pretrained(REPOSITORY, cache_dir=tmp_path)
    assert again.config == model.config
    assert_same_tensors(again, model)


def test_only_json_and_safetensors_are_fetched(standin: StandIn, tmp_path: Path) -> None:
    tiny_model().push_to_hub(REPOSITORY, token="x")
    files = standin.repositories[REPOSITORY]
    files |= {"pytorch_model.bin": b"\x80\x02.", "code.py": b"1 / 0", "optimizer.safetensors": b"x"}
    files |= {"tokenizer.json": b"{}", "visual/config.json": b"{}"}
    VLBeit.from_pretrained(REPOSITORY, cache_dir=tmp_path / "model")
    fetched = {a.split("/resolve/")[1].split("/", 1)[1] for a in standin.asked if "/resolve/" in a}
    assert fetched == {"config.json", "model.safetensors"}
    whole = hub.local_folder(REPOSITORY, cache_dir=tmp_path / "whole")
    there = {p.relative_to(whole).as_posix() for p in whole.rglob("*") if p.is_file()}
    assert there == {
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "visual/config.json",
    }  # fmt: skip
    del files["model.safetensors"]
    with pytest.raises(InputError, match=r"no model.safetensors"):
        VLBeit.from_pretrained(REPOSITORY, cache_dir=tmp_path / "without")
    assert not any("pytorch_model.bin" in path for path in standin.asked)


def test_a_run_is_loaded_by_the_name_of_its_repository(
    standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Head, tokenizer and answers come along, and a folder of that name goes first."""
    exported = export_hf(task_run(tmp_path / "run", "vqa"), tmp_path / "out")
    hub.upload(exported, REPOSITORY, token="x")
    here, there = (vlbeit.load(exported, "cpu"), vlbeit.load(REPOSITORY, cache_dir=tmp_path / "c"))
    assert any("model.safetensors" in path for path in standin.asked)
    assert there.digest == here.digest and there.modes == here.modes
    assert there.answer(noise(1), "say red") == here.answer(noise(1), "say red")
    assert name_of(there) == REPOSITORY and name_of(here) == "out"
    standin.asked.clear()
    again = vlbeit.load(REPOSITORY, cache_dir=tmp_path / "c", local_files_only=True)
    assert again.digest == here.digest and standin.asked == []

    with pytest.raises(InputError, match="nobody/nothing: no folder of that name"):
        vlbeit.load("nobody/nothing", cache_dir=tmp_path / "c")
    with pytest.raises(InputError, match="tiny at v9: .*no such revision"):
        vlbeit.load(REPOSITORY, revision="v9", cache_dir=tmp_path / "c")
    standin.asked.clear()
    monkeypatch.chdir(tmp_path)
    other = task_run(tmp_path / REPOSITORY, "classification")
    assert vlbeit.load(REPOSITORY).modes == vlbeit.load(other).modes != here.modes
    with pytest.raises(InputError, match="no checkpoint here"):
        vlbeit.load("no-such-run")  # one word is no repository
    assert standin.asked == []


def test_a_repository_that_is_not_there_is_named(standin: StandIn, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nobody/nothing: no folder of that name.*no repository"):
        VLBeit.from_pretrained("nobody/nothing", cache_dir=tmp_path)
    tiny_model().push_to_hub(REPOSITORY, token="x")
    with pytest.raises(InputError, match=r"tiny at v9: .*no such revision"):
        VLBeit.from_pretrained(REPOSITORY, revision="v9", cache_dir=tmp_path)


def test_offline_the_cache_is_enough_and_without_it_the_error_says_so(
    standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    model.push_to_hub(REPOSITORY, token="x")
    VLBeit.from_pretrained(REPOSITORY, cache_dir=tmp_path)
    standin.asked.clear()
    again = VLBeit.from_pretrained(REPOSITORY, cache_dir=tmp_path, local_files_only=True)
    assert_same_tensors(again, model)
    with pytest.raises(InputError, match=r"not in the cache.*local_files_only"):
        VLBeit.from_pretrained(REPOSITORY, cache_dir=tmp_path / "x", local_files_only=True)
    assert standin.asked == []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_same_tensors(VLBeit.from_pretrained(REPOSITORY, cache_dir=tmp_path), model)
    with pytest.raises(InputError, match="offline"):
        VLBeit.from_pretrained(REPOSITORY, cache_dir=tmp_path / "y")


def test_a_hub_that_cannot_be_reached_ends_push_and_pull_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = "http://127.0.0.1:9"  # the discard port: nothing listens
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", closed)
    template = closed + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(SaveError, match=r"somebody/tiny: the upload"):
        tiny_model().push_to_hub(REPOSITORY, token="x")
    with pytest.raises(InputError, match="the hub cannot be asked"):
        VLBeit.from_pretrained(REPOSITORY, cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "../b", "a/", "a b/c"])
def test_a_name_that_is_no_repository_is_not_pushed_to(standin: StandIn, name: str) -> None:
    with pytest.raises(ConfigError, match="NAMESPACE/NAME"):
        tiny_model().push_to_hub(name)
    assert standin.asked == []
