"""Runs of ours as folders of transformers' BEiT, and back: outputs equal, tensors bit for bit.

The other direction and FLAVA's encoders too. transformers itself loads what was written, and says
that nothing was missing or left over.
"""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    FlavaImageConfig,
    FlavaImageModel,
    FlavaTextConfig,
    FlavaTextModel,
    ViltConfig,
    ViltModel,
)
from transformers.models.beit.modeling_beit import BeitForSemanticSegmentation

from foreign_files import (
    FFN,
    GRID,
    HEADS,
    LAYERS,
    PATCH,
    SIDE,
    TEXTS,
    WIDTH,
    WORDS,
    bert_ids,
    imported,
    model_of,
    request,
    save_peer,
    save_training_file,
    worst,
    write_vocabulary,
)
from tiny_models import exactly, fill_normal, masked_batch, random_pixels, tiny_config
from vlbeit.cli import main
from vlbeit.config import (
    ClassificationRun,
    ModelConfig,
    PretrainConfig,
    SegmentationConfig,
    SegmentationRun,
    TaskBatchConfig,
)
from vlbeit.convert.folder import blank_model, write_run
from vlbeit.convert.hf_export import export_hf_beit
from vlbeit.convert.importing import convert
from vlbeit.convert.rewriting import Plan, Receipt
from vlbeit.errors import ConfigError, InputError
from vlbeit.nn.model import VLBeit
from vlbeit.tasks import build_task
from vlbeit.tokens.text import special_tokens_only

MODEL = ModelConfig(
    width=WIDTH, layers=6, heads=HEADS, ffn=FFN, vl_layers=1, image_size=(SIDE, SIDE), patch=PATCH,
    vocab=5, codes=20, text_positions=TEXTS, layer_scale=0.1, drop_path=0.0,
)  # fmt: skip
PEERS = {
    "pretrained": BeitForMaskedImageModeling,
    "classification": BeitForImageClassification,
    "segmentation": BeitForSemanticSegmentation,
}


def run_of(kind: str, model: ModelConfig):
    """Settings and facts of a run of ours."""
    if kind == "pretrained":
        return PretrainConfig(recipe="toy", model=model), None
    classes = {"classes": ["cat", "dog", "owl"], "most_frequent": 0}
    if kind == "classification":
        return ClassificationRun(recipe="toy", model=model), classes
    settings = SegmentationConfig(norm="batch", channels=WIDTH, auxiliary_channels=8)
    batch = TaskBatchConfig(size=4, micro=4)
    run = SegmentationRun(recipe="toy", model=model, segmentation=settings, batch=batch)
    return run, classes


def write_ours(folder, kind: str, **changes) -> VLBeit:
    """A run of ours with random weights, statistics of batch norm included."""
    config, facts = run_of(kind, replace(MODEL, **changes))
    plan = Plan(config=config, rules=(), facts=facts)
    model = VLBeit(config.model, seed=None)
    if facts is not None:
        model.put_on(build_task(config, facts).head(model, 0))
    fill_normal(model, seed=5)
    generator = torch.Generator().manual_seed(6)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
        elif name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    assert set(blank_model(plan).state_dict()) == set(model.state_dict())
    receipt = Receipt(layout="ours", origin="here")
    write_run(folder, plan, model.state_dict(), special_tokens_only(), receipt)
    return model.eval()


def outputs(kind: str, model: VLBeit, pixels: Tensor, masked: Tensor) -> Tensor:
    """Of our model: logits of codes, of classes, or the map of scores."""
    with torch.no_grad():
        if kind == "pretrained":
            return model.heads["mim"](model.backbone(model.embed_image(pixels, masked))[:, 1:])
        if kind == "classification":
            states = model.embed_image(pixels)
            return model.task(model.backbone.taps(states, [MODEL.layers])[0][:, 1:].mean(dim=1))
        config, facts = run_of(kind, MODEL)
        return build_task(config, facts).outputs(model, model.task, pixels)["segmentation"]


def peer_outputs(kind: str, peer, pixels: Tensor, masked: Tensor) -> Tensor:
    more = {"bool_masked_pos": masked} if kind == "pretrained" else {}
    with torch.no_grad():
        return peer(pixels.float() / 127.5 - 1, **more).logits


@pytest.mark.parametrize("kind", PEERS)
@pytest.mark.parametrize(
    "changes",
    [
        {"relative_bias": "per_layer", "absolute_positions": False},
        {"relative_bias": "shared", "absolute_positions": True},
        {"layer_scale": 0.0},
    ],
    ids=["per layer", "shared and absolute", "no LayerScale"],
)
def test_transformers_answers_as_ours_and_the_way_back_is_bit_equal(tmp_path, kind, changes):
    model = write_ours(tmp_path / "run", kind, **changes)
    receipt = export_hf_beit(tmp_path / "run", tmp_path / "hf")
    peer, info = PEERS[kind].from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pixels, masked = random_pixels(2, (SIDE, SIDE)), exactly(6, 2, GRID * GRID)
    mine = outputs(kind, model, pixels, masked)
    theirs = peer_outputs(kind, peer.eval(), pixels, masked)
    assert mine.std() > 1e-2
    assert worst(mine, theirs) <= 1e-5
    # A wrong eps, or a tensor that is read and was disturbed, would show.
    with torch.no_grad():
        peer.beit.layers[0].attention.v_proj.bias.add_(3.0)
    assert worst(mine, peer_outputs(kind, peer, pixels, masked)) > 1e-4

    back = imported("hf-beit", tmp_path / "hf")
    kept = model.state_dict()
    taken = {e.sources[0] for e in receipt.entries if e.target and e.sources}
    for name in taken - {"backbone.relative_bias.table"}:
        assert torch.equal(back.tensors[name], kept[name]), name
    if model.backbone.relative_bias is not None:
        rows = (2 * GRID - 1) ** 2 + 3
        name = "backbone.relative_bias.table"
        assert torch.equal(back.tensors[name][:rows], kept[name][:rows])
    again = model_of(back)
    assert worst(outputs(kind, again, pixels, masked), mine) == 0
    assert len(again.backbone.blocks) == MODEL.layers  # the inert block does not come back


def test_what_stays_behind_is_in_the_receipt(tmp_path):
    write_ours(tmp_path / "run", "classification")
    receipt = export_hf_beit(tmp_path / "run", tmp_path / "hf")
    dropped = {entry.sources[0] for entry in receipt.named("dropped")}
    assert {"text.words.weight", "backbone.norm.weight"} <= dropped
    assert any(".experts.vl." in name for name in dropped)
    tree = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert tree["id2label"] == {"0": "cat", "1": "dog", "2": "owl"}
    assert tree["layer_norm_eps"] == 1e-6 and tree["use_mean_pooling"] is True
    saved = json.loads((tmp_path / "hf" / "receipt.json").read_text())
    assert saved["counts"] == receipt.counts()


def test_another_eps_would_be_seen(tmp_path):
    """The negative control of the config: transformers' default eps is another function."""
    model = write_ours(tmp_path / "run", "pretrained")
    export_hf_beit(tmp_path / "run", tmp_path / "hf")
    peer = BeitForMaskedImageModeling.from_pretrained(tmp_path / "hf", layer_norm_eps=1e-2)
    pixels, masked = random_pixels(2, (SIDE, SIDE)), exactly(6, 2, GRID * GRID)
    theirs = peer_outputs("pretrained", peer.eval(), pixels, masked)
    assert worst(outputs("pretrained", model, pixels, masked), theirs) > 1e-4


def test_what_transformers_cannot_be_is_refused(tmp_path):
    write_ours(tmp_path / "wide", "pretrained", image_size=(SIDE, 2 * SIDE))
    with pytest.raises(ConfigError, match="not square"):
        export_hf_beit(tmp_path / "wide", tmp_path / "hf")
    write_ours(tmp_path / "shallow", "segmentation", layers=4)
    with pytest.raises(ConfigError, match="name a block twice"):
        export_hf_beit(tmp_path / "shallow", tmp_path / "hf")
    assert main(["convert", str(tmp_path / "wide"), "--to", "hf-beit", "--out", "x"]) == 78
    assert main(["convert", str(tmp_path / "wide"), "--to", "nothing", "--out", "x"]) == 78


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
def test_names_of_transformers_memory_are_taken_as_well(tmp_path, kind):
    """torch.save(model.state_dict()) of 5.x has other names than save_pretrained (T3)."""
    model = write_ours(tmp_path / "run", kind, relative_bias="per_layer")
    export_hf_beit(tmp_path / "run", tmp_path / "hf")
    peer = PEERS[kind].from_pretrained(tmp_path / "hf")
    assert any(name.startswith("beit.layers.0.mlp.") for name in peer.state_dict())
    (tmp_path / "hf" / "model.safetensors").unlink()
    save_training_file(tmp_path / "hf" / "pytorch_model.bin", peer.state_dict(), "")
    again = model_of(imported("hf-beit", tmp_path / "hf"))
    pixels, masked = random_pixels(2, (SIDE, SIDE)), exactly(6, 2, GRID * GRID)
    assert worst(outputs(kind, again, pixels, masked), outputs(kind, model, pixels, masked)) == 0


# ---------------------------------------------------------------- FLAVA's encoders

SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": FFN,
}
CLIP = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}


def test_flavas_image_encoder_gives_the_same_states(tmp_path):
    peer = FlavaImageModel(FlavaImageConfig(**SIZES, image_size=SIDE, patch_size=PATCH)).eval()
    fill_normal(peer, seed=1)
    model = model_of(imported("hf-flava", save_peer(peer, tmp_path, **CLIP)))
    pixels, masked = random_pixels(2, (SIDE, SIDE)), exactly(5, 2, GRID * GRID)
    mean, std = (torch.tensor(CLIP[name])[:, None, None] for name in CLIP)
    with torch.no_grad():
        scaled = (pixels.float() / 255 - mean) / std
        expected = peer(scaled, bool_masked_pos=masked).last_hidden_state
        found = model.backbone(model.embed_image(pixels, masked))
        assert worst(found, expected) <= 1e-5
        model.backbone.blocks[1].experts["v"].fc1.bias.add_(0.5)
        assert worst(model.backbone(model.embed_image(pixels, masked)), expected) > 1e-3


def test_flavas_text_encoder_gives_the_same_states_at_real_tokens(tmp_path):
    peer = FlavaTextModel(
        FlavaTextConfig(**SIZES, vocab_size=WORDS, max_position_embeddings=TEXTS)
    ).eval()
    fill_normal(peer, seed=1)
    write_vocabulary(save_peer(peer, tmp_path))
    model = model_of(imported("hf-flava", tmp_path))
    batch = masked_batch("text", 3, lengths=(10, 7, 4), config=tiny_config(vocab=WORDS))
    valid = batch.word_valid
    with torch.no_grad():
        expected = peer(bert_ids(batch.words), attention_mask=valid.long()).last_hidden_state
        found = model.backbone(model.embed_text(batch.words, valid))
        assert worst(found[valid], expected[valid]) <= 1e-5
        model.text.norm.bias.add_(torch.linspace(-1, 1, WIDTH))
        found = model.backbone(model.embed_text(batch.words, valid))
        assert worst(found[valid], expected[valid]) > 1e-3


def test_the_whole_of_flava_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "flava"}))
    save_training_file(tmp_path / "pytorch_model.bin", {"a": torch.ones(1)}, "")
    with pytest.raises(InputError, match="image_model or .text_model"):
        imported("hf-flava", tmp_path)


# ---------------------------------------------------------------- strictness


def beit_folder(folder):
    write_ours(folder.parent / "run", "classification", relative_bias="per_layer")
    export_hf_beit(folder.parent / "run", folder)


def flava_text_folder(folder):
    peer = FlavaTextModel(FlavaTextConfig(**SIZES, vocab_size=WORDS, max_position_embeddings=TEXTS))
    write_vocabulary(save_peer(peer, folder))


def flava_image_folder(folder):
    config = FlavaImageConfig(**SIZES, image_size=SIDE, patch_size=PATCH)
    save_peer(FlavaImageModel(config), folder)


def vilt_folder(folder):
    config = ViltConfig(
        **SIZES, vocab_size=WORDS, image_size=SIDE, patch_size=PATCH, max_position_embeddings=TEXTS
    )
    write_vocabulary(save_peer(ViltModel(config, add_pooling_layer=False), folder))


@pytest.mark.parametrize(
    ("layout", "write"),
    [
        ("hf-beit", beit_folder),
        ("hf-vilt", vilt_folder),
        ("hf-flava", flava_image_folder),
        ("hf-flava", flava_text_folder),
    ],
    ids=["BEiT", "ViLT", "FLAVA's images", "FLAVA's texts"],
)
def test_one_tensor_missing_or_too_many_or_of_another_shape_is_named(tmp_path, layout, write):
    folder = tmp_path / "peer"
    write(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    taken = imported(layout, folder).receipt.entries
    needed = sorted({name for entry in taken if entry.target for name in entry.sources})
    assert len(needed) > 30 and set(needed) <= set(tensors)

    def said(changed):
        save_file(changed, path, metadata={"format": "pt"})
        with pytest.raises((InputError, ConfigError)) as raised:
            convert(layout, request(folder), accepted=(), dry=True)
        return str(raised.value)

    for name in needed:
        found = said({key: tensor for key, tensor in tensors.items() if key != name})
        # What is one tensor and may be left out (a mask vector) is named by our name.
        assert name in found or (name.endswith("mask_token") and "masked_patch" in found), found
    for name in ("surprise.weight", needed[0] + "_more"):
        assert f"unknown {name}" in said(tensors | {name: torch.ones(3, 4)})
    for name in needed[::4]:
        bent = torch.ones(*tensors[name].shape[:-1], tensors[name].shape[-1] + 1)
        assert name in said(tensors | {name: bent})
