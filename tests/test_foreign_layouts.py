"""Files of each layout (made here, with its names, container, prefixes, buffers) load strictly.

unilm's BEiT is compared with transformers' under the same weights; VLMo with a straightforward
reading of its own names, written here in loops.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import BeitConfig, BeitForImageClassification, BeitForMaskedImageModeling

from foreign_files import (
    CLASSES,
    CODES,
    FFN,
    GRID,
    HEADS,
    LAYERS,
    PATCH,
    SIDE,
    TABLE_ROWS,
    TEXTS,
    WIDTH,
    WORDS,
    beit3_tensors,
    beit_tensors,
    bert_ids,
    imported,
    model_of,
    request,
    save_training_file,
    vlmo_tensors,
    worst,
    write_vocabulary,
)
from tiny_models import exactly, masked_batch, random_pixels, tiny_config
from vlbeit.cli import main
from vlbeit.config import ModelConfig
from vlbeit.convert.importing import convert
from vlbeit.convert.layouts import LAYOUTS
from vlbeit.convert.pixels import IMAGENET
from vlbeit.errors import ConfigError, InputError
from vlbeit.tasks import build_task
from vlbeit.types import TaskBatch

TABLE = "relative_position_bias_table"


# ------------------------------------------------------------ unilm's BEiT against transformers'


def to_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """unilm's names to those of transformers in memory, written apart from the converter."""
    found = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if name.endswith("relative_position_index"):
            continue
        if name.startswith("blocks."):
            block, rest = f"beit.layers.{parts[1]}.", ".".join(parts[2:])
            if rest == "attn.qkv.weight":
                for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                    found[f"{block}attention.{part}_proj.weight"] = rows
                continue
            for old, new in (
                ("attn.q_bias", "attention.q_proj.bias"),
                ("attn.v_bias", "attention.v_proj.bias"),
                ("attn.proj", "attention.o_proj"),
                (f"attn.{TABLE}", f"relative_position_bias.{TABLE}"),
                ("norm1", "layernorm_before"),
                ("norm2", "layernorm_after"),
                ("gamma", "lambda"),
            ):
                rest = rest.replace(old, new)
            found[block + rest] = tensor
            continue
        for old, new in (
            ("patch_embed.proj", "beit.embeddings.patch_embeddings.projection"),
            ("cls_token", "beit.embeddings.cls_token"),
            ("mask_token", "beit.embeddings.mask_token"),
            (f"rel_pos_bias.{TABLE}", f"beit.shared_position_bias.{TABLE}"),
            ("fc_norm", "beit.pooler.layernorm"),
            ("head.", "classifier."),
        ):
            if name.startswith(old):
                name = name.replace(old, new)
                break
        found[name.replace("norm.", "layernorm.") if name.startswith("norm.") else name] = tensor
    return found


def peer_of(tensors: dict[str, Tensor], kind: str):
    config = BeitConfig(
        vocab_size=CODES, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=FFN, image_size=SIDE, patch_size=PATCH, layer_norm_eps=1e-6,
        use_mask_token=kind == "pretrained", num_labels=CLASSES,
        use_shared_relative_position_bias=kind == "pretrained",
        use_relative_position_bias=kind != "pretrained",
    )  # fmt: skip
    types = {"pretrained": BeitForMaskedImageModeling, "classifier": BeitForImageClassification}
    peer = types[kind](config)
    peer.load_state_dict(to_transformers(tensors))
    return peer.eval()


def floats(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


@pytest.mark.parametrize("layout", ["beit", "beitv2"])
@pytest.mark.parametrize("container", ["model", "module", ""])
def test_logits_of_a_pretraining_file_are_those_of_transformers(tmp_path, layout, container):
    tensors = beit_tensors()
    more = {}
    if layout == "beitv2":
        more = {
            "cls_pt_layers.0.norm1.weight": torch.ones(WIDTH),
            "cls_pt_norm.bias": torch.ones(3),
        }
    prefix = "module." if container == "module" else ""
    saved = {prefix + name: tensor for name, tensor in (tensors | more).items()}
    path = save_training_file(tmp_path / "beit.pth", saved, container)
    converted = imported(layout, path)
    model, pixels, masked = model_of(converted), random_pixels(2, (SIDE, SIDE)), exactly(6, 2, 16)
    with torch.no_grad():
        expected = peer_of(tensors, "pretrained")(floats(pixels), bool_masked_pos=masked).logits
        states = model.backbone(model.embed_image(pixels, masked))
        found = model.heads["mim"](states[:, 1:])
    assert expected.std() > 0.05
    assert worst(found, expected) <= 1e-5
    dropped = {entry.sources[0] for entry in converted.receipt.named("dropped")}
    assert dropped == {"rel_pos_bias.relative_position_index", *more}


def test_a_shared_table_can_be_tiled_and_the_function_stays(tmp_path):
    path = save_training_file(tmp_path / "beit.pth", beit_tensors(), "model")
    shared, each = imported("beit", path), imported("beit", path, per_layer_bias=True)
    assert each.plan.config.model.relative_bias == "per_layer"
    assert [e.target for e in each.receipt.named("tiled")] == ["backbone.relative_bias.table"]
    pixels = random_pixels(2, (SIDE, SIDE))
    with torch.no_grad():
        a, b = (
            model.backbone(model.embed_image(pixels)) for model in map(model_of, (shared, each))
        )
    assert worst(a, b) == 0


def test_class_logits_of_a_fine_tuned_file_are_those_of_transformers(tmp_path):
    tensors = beit_tensors("classifier")
    path = save_training_file(tmp_path / "beit.pth", tensors, "model")
    names = tuple("abcde")
    converted = imported("beit", path, classes=names)
    model, pixels = model_of(converted), random_pixels(3, (SIDE, SIDE))
    task = build_task(converted.plan.config, converted.plan.facts)
    batch = TaskBatch(
        stream="task:classification", sample_ids=("a", "b", "c"), pixels=pixels[:, None], targets={}
    )
    with torch.no_grad():
        expected = peer_of(tensors, "classifier")(floats(pixels)).logits
        found = task.logits(model, model.task, batch)
    assert task.classes == list(names)
    assert worst(found, expected) <= 1e-5
    with pytest.raises(ConfigError, match="5 classes, 2 names"):
        imported("beit", path, classes=("a", "b"))


def test_a_model_for_other_pixels_sees_the_same_picture(tmp_path):
    """The peer is given pixels as ImageNet models are, ours the bytes."""
    tensors = beit_tensors()
    path = save_training_file(tmp_path / "beit.pth", tensors, "model")
    pixels, none = random_pixels(2, (SIDE, SIDE)), torch.zeros(2, 16, dtype=torch.bool)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET.mean, IMAGENET.std))
    with torch.no_grad():
        scaled = (pixels.float() / 255 - mean) / std
        expected = peer_of(tensors, "pretrained")(scaled, bool_masked_pos=none).logits
        for pixels_of, agrees in ((IMAGENET, True), (None, False)):
            model = model_of(imported("beit", path, pixels=pixels_of))
            found = model.heads["mim"](model.backbone(model.embed_image(pixels))[:, 1:])
            assert (worst(found, expected) <= 1e-5) == agrees


def test_copied_experts_answer_as_the_one_they_are_copied_from(tmp_path):
    path = save_training_file(tmp_path / "beit.pth", beit_tensors(), "model")
    converted = imported("beit", path, copy_experts=True, vl_layers=1)
    model = model_of(converted)
    assert set(model.backbone.blocks[LAYERS - 1].experts) == {"v", "l", "vl"}
    for block in model.backbone.blocks:
        for expert in block.experts.values():
            for mine, first in zip(
                expert.parameters(), block.experts["v"].parameters(), strict=True
            ):
                assert torch.equal(mine, first)
    assert len(converted.receipt.named("tiled")) == 6 * (LAYERS + 1)


# ---------------------------------------------------------------- VLMo


def bias_row(i: int, j: int, kinds: list[tuple[str, int]]) -> int:
    """VLMo's row for query i and key j; a token is ("text" or "image", place), 0 is [CLS]."""
    (a, m), (b, n) = kinds[i], kinds[j]
    text = TABLE_ROWS + 2
    if a != b:
        return TABLE_ROWS + (0 if a == "text" else 1)
    last = TABLE_ROWS if a == "image" else text + 2 * TEXTS
    if m == 0 and n == 0:
        return last - 1
    if n == 0:
        return last - 2
    if m == 0:
        return last - 3
    if a == "text":
        return text + (n - m) + TEXTS - 2
    down = (m - 1) // GRID - (n - 1) // GRID
    across = (m - 1) % GRID - (n - 1) % GRID
    return (down + GRID - 1) * (2 * GRID - 1) + across + GRID - 1


def vlmo_states(t: dict[str, Tensor], ids: Tensor | None, pixels: Tensor | None) -> Tensor:
    """One sample without padding through VLMo, by its own names: text, image or both."""
    kinds: list[tuple[str, int]] = []
    pieces = []
    table = t.get(TABLE)

    def layer_norm(name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
        return F.layer_norm(x, (WIDTH,), t[f"{name}.weight"], t[f"{name}.bias"], eps)

    if ids is not None:
        words = t["text_embeddings.word_embeddings.weight"][ids]
        words = words + t["text_embeddings.token_type_embeddings.weight"][0]
        if table is None:
            words = words + t["text_embeddings.position_embeddings.weight"][: len(ids)]
        words = layer_norm("text_embeddings.LayerNorm", words, 1e-12)
        pieces.append(words + t["token_type_embeddings.weight"][0])
        kinds += [("text", place) for place in range(len(ids))]
    if pixels is not None:
        weight, bias = (t[f"transformer.patch_embed.proj.{leaf}"] for leaf in ("weight", "bias"))
        patches = F.conv2d(floats(pixels)[None], weight, bias, stride=PATCH)
        x = torch.cat((t["transformer.cls_token"][0], patches[0].flatten(1).T))
        if table is None:
            x = x + t["transformer.pos_embed"][0]
        pieces.append(x + t["token_type_embeddings.weight"][1])
        kinds += [("image", place) for place in range(len(x))]
    x, length = torch.cat(pieces), len(kinds)
    rows = torch.tensor([[bias_row(i, j, kinds) for j in range(length)] for i in range(length)])
    for layer in range(LAYERS):
        block = f"transformer.blocks.{layer}"
        gammas = [t.get(f"{block}.gamma_{n}", torch.ones(WIDTH)) for n in (1, 2)]
        h = layer_norm(f"{block}.norm1", x)
        q_bias, v_bias = (t[f"{block}.attn.{part}_bias"] for part in "qv")
        qkv = h @ t[f"{block}.attn.qkv.weight"].T + torch.cat((q_bias, 0 * q_bias, v_bias))
        q, k, v = (part.view(length, HEADS, -1).transpose(0, 1) for part in qkv.chunk(3, dim=1))
        scores = q @ k.transpose(1, 2) / math.sqrt(WIDTH // HEADS)
        if table is not None:
            columns = table[:, layer * HEADS : (layer + 1) * HEADS]
            scores = scores + columns[rows].permute(2, 0, 1)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, WIDTH)
        mixed = mixed @ t[f"{block}.attn.proj.weight"].T + t[f"{block}.attn.proj.bias"]
        x = x + gammas[0] * mixed
        branches = torch.empty_like(x)
        for place, (kind, _) in enumerate(kinds):
            suffix = "_text" if kind == "text" else "_imag"
            if ids is not None and pixels is not None and f"{block}.norm2_vl.weight" in t:
                suffix = "_vl"
            h = layer_norm(f"{block}.norm2{suffix}", x[place])
            fc1, fc2 = f"{block}.mlp{suffix}.fc1", f"{block}.mlp{suffix}.fc2"
            h = F.gelu(t[f"{fc1}.weight"] @ h + t[f"{fc1}.bias"])
            branches[place] = t[f"{fc2}.weight"] @ h + t[f"{fc2}.bias"]
        x = x + gammas[1] * branches
    return layer_norm("transformer.norm", x)


@pytest.fixture(params=["base", "base-plus"])
def vlmo(request, tmp_path):
    tensors = vlmo_tensors(absolute=request.param == "base-plus")
    write_vocabulary(tmp_path)
    saved = {f"module.{name}": tensor for name, tensor in tensors.items()}
    path = save_training_file(tmp_path / "mp_rank_00_model_states.pt", saved, "module")
    return tensors, path


def vlmo_found(converted, words: Tensor | None, pixels: Tensor | None) -> Tensor:
    model = model_of(converted)
    if words is None:
        states = model.embed_image(pixels[None])
    elif pixels is None:
        states = model.embed_text(words[None])
    else:
        states = model.embed_pair(words[None], None, pixels[None])
    with torch.no_grad():
        return model.backbone(states)[0]


@pytest.mark.parametrize("which", ["text", "image", "pair"])
def test_states_of_a_vlmo_file_are_those_of_vlmo(vlmo, which):
    tensors, path = vlmo
    converted = imported("vlmo", path, heads=HEADS)
    assert converted.plan.config.model.vl_layers == 1
    batch = masked_batch("pair", 1, lengths=(9,), config=tiny_config(vocab=WORDS))
    words = batch.words[0] if which != "image" else None
    pixels = batch.pixels[0] if which != "text" else None
    ids = None if words is None else bert_ids(words)
    expected = vlmo_states(tensors, ids, pixels)
    assert worst(vlmo_found(converted, words, pixels), expected) <= 1e-5
    # Each of these is read on the way, and a file that has it otherwise must disagree.
    for name in ("token_type_embeddings.weight", "transformer.blocks.2.norm2_vl.weight", TABLE):
        if name in tensors and (which == "pair" or "vl" not in name):
            broken = tensors | {name: tensors[name] + 0.3 * torch.randn(tensors[name].shape)}
            assert worst(vlmo_states(broken, ids, pixels), expected) > 1e-3, name


def test_a_cut_table_is_exact_for_texts_that_fit_into_it(vlmo):
    tensors, path = vlmo
    converted = imported("vlmo", path, heads=HEADS, resized={"text_positions": 8})
    batch = masked_batch("pair", 1, lengths=(8,), config=tiny_config(vocab=WORDS))
    expected = vlmo_states(tensors, bert_ids(batch.words[0]), batch.pixels[0])
    assert worst(vlmo_found(converted, batch.words[0], batch.pixels[0]), expected) <= 1e-5
    notes = [entry.note for entry in converted.receipt.entries]
    assert any("cut to texts of 8" in note or "first 8 of 12" in note for note in notes)
    with pytest.raises(ConfigError, match="3 to 12"):
        imported("vlmo", path, heads=HEADS, resized={"text_positions": 13})


def test_the_three_published_sizes_are_read_off_their_shapes():
    """Shapes only: base, large and base-plus as unilm builds them."""
    from vlbeit.convert.vlmo import model_of as sizes_of_vlmo

    place = request(".")
    for width, layers, heads, vl, rows in (
        (768, 12, 12, 2, 1126),
        (1024, 24, 16, 3, 1126),
        (544, 24, 16, 3, 0),
    ):
        shapes = {
            "transformer.patch_embed.proj.weight": (width, 3, 16, 16),
            "text_embeddings.position_embeddings.weight": (196, width),
            "transformer.blocks.0.mlp_imag.fc1.weight": (4 * width, width),
            **{f"transformer.blocks.{i}.norm1.weight": (width,) for i in range(layers)},
            **{
                f"transformer.blocks.{layers - i}.norm2_vl.weight": (width,) for i in (1, 2, 3)[:vl]
            },
        }
        if rows:
            shapes |= {TABLE: (rows, layers * heads), "transformer.blocks.0.gamma_1": (width,)}
        else:
            shapes["transformer.pos_embed"] = (1, 197, width)
        tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        found = sizes_of_vlmo(tensors, place, 30522)
        assert isinstance(found, ModelConfig)
        assert (found.width, found.layers, found.heads, found.vl_layers) == (
            width,
            layers,
            heads,
            vl,
        )
        assert found.image_size == (224, 224) and found.text_positions == 196
        assert found.absolute_positions == (rows == 0) == (found.layer_scale == 0)


# ---------------------------------------------------------------- strictness


def files_of(layout: str, folder) -> dict[str, Tensor]:
    write_vocabulary(folder)
    if layout == "vlmo":
        return vlmo_tensors()
    return beit_tensors("classifier" if layout == "beitv2" else "pretrained")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["beit", "beitv2", "vlmo"])
def test_one_tensor_missing_or_too_many_or_of_another_shape_is_named(tmp_path, layout):
    tensors = files_of(layout, tmp_path)
    converted = imported(layout, save_training_file(tmp_path / "whole.pth", tensors, "model"))
    needed = {name for entry in converted.receipt.entries if entry.target for name in entry.sources}
    assert len(needed) > 30
    for number, name in enumerate(sorted(needed)):
        without = {key: tensor for key, tensor in tensors.items() if key != name}
        with pytest.raises((InputError, ConfigError)) as raised:
            path = save_training_file(tmp_path / f"{number}.pth", without, "model")
            convert(layout, request(path), accepted=(), dry=True)
        said = str(raised.value)
        # What is one tensor and may be left out (a mask vector) is named by our name.
        assert name in said or (name == "mask_token" and "image.masked_patch" in said), said
    for name, shape in (("surprise.weight", (3, 4)), ("blocks.0.attn.k_bias", (WIDTH,))):
        path = save_training_file(
            tmp_path / "more.pth", tensors | {name: torch.ones(shape)}, "model"
        )
        with pytest.raises(InputError, match=f"unknown {name}"):
            convert(layout, request(path), accepted=("*",))
    for name in sorted(needed)[::5]:
        bent = tensors | {name: torch.ones(*tensors[name].shape[:-1], tensors[name].shape[-1] + 1)}
        path = save_training_file(tmp_path / "bent.pth", bent, "model")
        with pytest.raises(InputError):
            convert(layout, request(path), accepted=("*",))


def test_what_stays_as_initialised_must_be_accepted_by_name(tmp_path, capsys):
    path, run = tmp_path / "beit.safetensors", tmp_path / "run"
    save_file(beit_tensors(), path)
    words = ["convert", "beit", str(path), "--out", str(run)]
    assert main(words) == 78
    said = capsys.readouterr().err
    accepted = said.split("--fresh ")[1].replace("'", "").split()
    assert "heads.mlm.*" in accepted and not run.exists()
    assert main([*words, "--fresh", *accepted[:-1]]) == 78
    assert main([*words, "--fresh", *accepted, "heads.mim.*"]) == 78
    assert "'heads.mim.*': nothing of that name" in capsys.readouterr().err
    assert main([*words, "--fresh", *accepted]) == 0
    assert main([*words, "--fresh", *accepted]) == 73
    assert "not empty" in capsys.readouterr().err
    assert main(["verify", str(run)]) == 0


def test_beit3_is_refused_with_the_reason_or_taken_in_part(tmp_path):
    path = save_training_file(tmp_path / "beit3.pth", beit3_tensors(), "model")
    with pytest.raises(InputError, match="attention projections for each modality"):
        imported("beit3", path)
    converted = imported("beit3", path, partial=True)
    taken = {entry.target for entry in converted.receipt.named("renamed")}
    assert taken == {"image.proj.weight", "image.proj.bias", "image.cls", "image.masked_patch"}
    dropped = {entry.sources[0] for entry in converted.receipt.named("dropped")}
    assert "beit3.encoder.layers.1.ffn.B.ffn_layernorm.bias" in dropped
    tensors = beit3_tensors() | {"beit3.encoder.layers.0.ffn.A.fc3.weight": torch.ones(2)}
    tensors |= {"stray": torch.ones(2)}
    with pytest.raises(InputError, match="unknown stray"):
        imported("beit3", save_training_file(tmp_path / "b.pth", tensors, "model"), partial=True)


def test_the_layouts_are_listed_and_an_unknown_one_names_the_nearest(capsys):
    assert main(["convert", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in LAYOUTS)
    assert main(["convert", "biet", "x"]) == 78
    assert "did you mean beit?" in capsys.readouterr().err
    assert main(["convert", "beit", "nowhere.pth", "--out", "x"]) == 66
