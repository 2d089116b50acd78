"""BEiT v2's and DALL-E's visual tokenizers: weights of the foreign layouts, and of nobody else.

The peers are transformers' classes with random weights, none of them zero. BEiT v2's tokenizer is
not in transformers: it is written here a second time, on transformers' BEiT layers, from the
description of its layout (encoder, unit vectors, nearest by distance, decoder).
"""

import argparse
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BeitConfig, BeitModel, FlavaImageCodebook, FlavaImageCodebookConfig

from tiny_models import random_pixels
from vlbeit.errors import ConfigError, InputError, UnsafeError
from vlbeit.tokens.beitv2 import BeitV2Network, import_beitv2
from vlbeit.tokens.dalle import import_dalle
from vlbeit.tokens.imported import ImportedTokenizer, import_tokenizer, with_pictures
from vlbeit.tokens.visual import load_visual_tokenizer

WIDTH, HEADS, FFN, LAYERS, DECODER_LAYERS = 32, 2, 48, 3, 2
CODES, CODE_WIDTH, PATCH, SIDE, FEATURES = 40, 8, 8, 32, 20
GRID = SIDE // PATCH
CLOSE = 1e-5

Tensors = dict[str, Tensor]


def worst(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# -- BEiT v2 ---------------------------------------------------------------------------------


def vit_tensors(draw: Callable[..., Tensor], channels: int, patch: int, layers: int) -> Tensors:
    """A ViT of unilm's beit2 as its tokenizer has it: no gamma, no relative bias, fc_norm."""
    found = {
        "cls_token": draw(1, 1, WIDTH),
        "pos_embed": draw(1, GRID * GRID + 1, WIDTH),
        "patch_embed.proj.weight": draw(WIDTH, channels, patch, patch),
        "patch_embed.proj.bias": draw(WIDTH),
        "fc_norm.weight": 1 + draw(WIDTH),
        "fc_norm.bias": draw(WIDTH),
    }
    for i in range(layers):
        block = f"blocks.{i}."
        for norm in ("norm1", "norm2"):
            found[f"{block}{norm}.weight"] = 1 + draw(WIDTH)
            found[f"{block}{norm}.bias"] = draw(WIDTH)
        found |= {
            f"{block}attn.qkv.weight": draw(3 * WIDTH, WIDTH),
            f"{block}attn.q_bias": draw(WIDTH),
            f"{block}attn.v_bias": draw(WIDTH),
            f"{block}attn.proj.weight": draw(WIDTH, WIDTH),
            f"{block}attn.proj.bias": draw(WIDTH),
            f"{block}mlp.fc1.weight": draw(FFN, WIDTH),
            f"{block}mlp.fc1.bias": draw(FFN),
            f"{block}mlp.fc2.weight": draw(WIDTH, FFN),
            f"{block}mlp.fc2.bias": draw(WIDTH),
        }
    return found


@pytest.fixture
def beitv2_file(gen: torch.Generator) -> Tensors:
    return beitv2_training_file(gen)


def beitv2_training_file(gen: torch.Generator) -> Tensors:
    """A whole training file in unilm's layout, with what only training needs."""

    def draw(*shape: int, std: float = 0.2) -> Tensor:
        return std * torch.randn(*shape, generator=gen)

    parts = {
        "encoder": vit_tensors(draw, 3, PATCH, LAYERS),
        "decoder": vit_tensors(draw, CODE_WIDTH, 1, DECODER_LAYERS),
    }
    found = {f"{part}.{name}": t for part, tensors in parts.items() for name, t in tensors.items()}
    for layer, out in (("encode_task_layer", CODE_WIDTH), ("decode_task_layer", FEATURES)):
        found |= {f"{layer}.0.weight": draw(WIDTH, WIDTH), f"{layer}.0.bias": draw(WIDTH)}
        found |= {f"{layer}.2.weight": draw(out, WIDTH), f"{layer}.2.bias": draw(out)}
    found |= {
        "quantize.embedding.weight": F.normalize(draw(CODES, CODE_WIDTH), dim=-1),
        "quantize.cluster_size": torch.arange(1.0, CODES + 1),
        "quantize.embedding.cluster_size": torch.zeros(CODES),
        "quantize.embedding.embed_avg": draw(CODES, CODE_WIDTH),
        "quantize.embedding.initted": torch.tensor([1.0]),
        "scaling_layer.shift": draw(1, 3, 1, 1),
        "teacher_model.visual.proj": draw(4, 4),
        "loss.weight": draw(3),
    }
    return found


class SecondWriting(nn.Module):
    """BEiT v2's tokenizer on transformers' BEiT layers, filled from unilm's names."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self.encoder = self.vit(tensors, "encoder", 3, SIDE, PATCH, LAYERS)
        self.decoder = self.vit(tensors, "decoder", CODE_WIDTH, GRID, 1, DECODER_LAYERS)
        self.t = tensors

    @staticmethod
    def vit(tensors: Tensors, part: str, channels: int, side: int, patch: int, layers: int):
        model = BeitModel(
            BeitConfig(
                num_channels=channels,
                hidden_size=WIDTH,
                num_hidden_layers=layers,
                num_attention_heads=HEADS,
                intermediate_size=FFN,
                image_size=side,
                patch_size=patch,
                use_absolute_position_embeddings=True,
                use_mask_token=False,
                use_mean_pooling=True,
                layer_scale_init_value=0.0,
                layer_norm_eps=1e-6,
            ),
            add_pooling_layer=False,
        )
        names = {
            "embeddings.cls_token": "cls_token",
            "embeddings.position_embeddings": "pos_embed",
            "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
            "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
        }
        for i in range(layers):
            for theirs, unilm in {
                "layernorm_before": "norm1",
                "layernorm_after": "norm2",
                "attention.o_proj": "attn.proj",
                "mlp.fc1": "mlp.fc1",
                "mlp.fc2": "mlp.fc2",
            }.items():
                for leaf in ("weight", "bias"):
                    names[f"layers.{i}.{theirs}.{leaf}"] = f"blocks.{i}.{unilm}.{leaf}"
            names[f"layers.{i}.attention.q_proj.bias"] = f"blocks.{i}.attn.q_bias"
            names[f"layers.{i}.attention.v_proj.bias"] = f"blocks.{i}.attn.v_bias"
        filled = {theirs: tensors[f"{part}.{name}"] for theirs, name in names.items()}
        for i in range(layers):
            fused = tensors[f"{part}.blocks.{i}.attn.qkv.weight"].split(WIDTH)
            for letter, weight in zip("qkv", fused, strict=True):
                filled[f"layers.{i}.attention.{letter}_proj.weight"] = weight
        model.load_state_dict(filled)
        return model.eval()

    def tokens(self, part: str, pictures: Tensor) -> Tensor:
        states = getattr(self, part)(pictures).last_hidden_state[:, 1:]
        norm = [self.t[f"{part}.fc_norm.{leaf}"] for leaf in ("weight", "bias")]
        return F.layer_norm(states, (WIDTH,), *norm, eps=1e-6)

    def task(self, layer: str, x: Tensor) -> Tensor:
        first, second = (
            [self.t[f"{layer}.{i}.{leaf}"] for leaf in ("weight", "bias")] for i in (0, 2)
        )
        return F.linear(torch.tanh(F.linear(x, *first)), *second)

    def vectors(self, pixels: Tensor) -> Tensor:
        """What is compared with the codebook."""
        x = self.tokens("encoder", pixels.float() / 127.5 - 1)
        return F.normalize(self.task("encode_task_layer", x), dim=-1)

    def codes(self, pixels: Tensor) -> Tensor:
        """Nearest by squared distance, as unilm computes it."""
        z = self.vectors(pixels)
        table = self.t["quantize.embedding.weight"]
        distance = z.pow(2).sum(-1, keepdim=True) + table.pow(2).sum(-1) - 2 * z @ table.T
        return distance.argmin(-1)

    def features(self, codes: Tensor) -> Tensor:
        vectors = F.embedding(codes, self.t["quantize.embedding.weight"])
        square = vectors.mT.reshape(len(codes), CODE_WIDTH, GRID, GRID)
        return self.task("decode_task_layer", self.tokens("decoder", square))


def our_vectors(network: BeitV2Network, pixels: Tensor) -> Tensor:
    """The unit vectors before the codebook: those whose cosine with every code is ours."""
    from vlbeit.tokens.vqkd import image_states

    grid = network.grid(pixels)
    return F.normalize(
        network.to_code(image_states(network.encoder, network.image(pixels), grid)), dim=-1
    )


@torch.no_grad()
def test_beitv2_gives_the_vectors_codes_and_features_of_a_second_writing(
    beitv2_file: Tensors,
) -> None:
    network, _ = import_beitv2(beitv2_file, heads=HEADS, origin="a test")
    peer = SecondWriting(beitv2_file)
    pixels = random_pixels(6, (SIDE, SIDE))
    assert worst(our_vectors(network, pixels), peer.vectors(pixels)) <= CLOSE
    codes = network.lookup(pixels)
    assert len(codes.unique()) > CODES // 3, "too few codes occur to tell anything"
    assert torch.equal(codes, peer.codes(pixels))
    mine = network.code_features(codes.reshape(-1, GRID, GRID))
    theirs = peer.features(codes)
    assert theirs.std() > 0.1
    assert worst(mine, theirs) <= CLOSE


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("encoder.blocks.0.attn.q_bias", "encoder.blocks.0.attn.v_bias"),
        ("encoder.blocks.1.norm1.weight", "encoder.blocks.1.norm2.weight"),
        ("encoder.blocks.0.mlp.fc1.weight", "encoder.blocks.2.mlp.fc1.weight"),
        ("encoder.fc_norm.bias", "encoder.patch_embed.proj.bias"),
        ("encode_task_layer.0.weight", "decode_task_layer.0.weight"),
        ("decoder.blocks.0.attn.proj.weight", "decoder.blocks.1.attn.proj.weight"),
        ("decoder.cls_token", "encoder.cls_token"),
        ("decoder.pos_embed", "encoder.pos_embed"),
    ],
)
@torch.no_grad()
def test_two_tensors_of_beitv2_that_change_places_are_noticed(
    beitv2_file: Tensors, one: str, other: str
) -> None:
    swapped = beitv2_file | {one: beitv2_file[other], other: beitv2_file[one]}
    network, _ = import_beitv2(swapped, heads=HEADS, origin="a test")
    peer = SecondWriting(beitv2_file)
    pixels = random_pixels(2, (SIDE, SIDE))
    codes = torch.arange(2 * GRID * GRID).reshape(2, -1)
    vectors = worst(our_vectors(network, pixels), peer.vectors(pixels))
    features = worst(network.code_features(codes.reshape(2, GRID, GRID)), peer.features(codes))
    assert max(vectors, features) > 100 * CLOSE


def test_every_tensor_of_beitv2_has_a_part_in_vectors_or_features(beitv2_file: Tensors) -> None:
    network, _ = import_beitv2(beitv2_file, heads=HEADS, origin="a test")
    network.requires_grad_(True)
    codes = torch.arange(2 * GRID * GRID).reshape(2, GRID, GRID)
    vectors = our_vectors(network, random_pixels(2, (SIDE, SIDE)))
    (vectors.square().mean(0)[..., 0].sum() + network.code_features(codes).sum()).backward()
    idle = {n for n, p in network.named_parameters() if p.grad is None or not bool(p.grad.any())}
    assert idle == {"image.masked_patch"}


@torch.no_grad()
def test_a_turned_codebook_gives_other_codes(beitv2_file: Tensors) -> None:
    pixels = random_pixels(2, (SIDE, SIDE))
    network, _ = import_beitv2(beitv2_file, heads=HEADS, origin="a test")
    table = beitv2_file["quantize.embedding.weight"].roll(1, dims=0)
    other, _ = import_beitv2(
        beitv2_file | {"quantize.embedding.weight": table}, heads=HEADS, origin="a test"
    )
    assert torch.equal(other.lookup(pixels), (network.lookup(pixels) + 1) % CODES)


def test_the_receipts_of_beitv2_name_every_tensor_of_the_file_once(beitv2_file: Tensors) -> None:
    network, accounts = import_beitv2(beitv2_file, heads=HEADS, origin="a test")
    taken = [row.source for row in accounts if row.action != "initialised"]
    assert sorted(taken) == sorted(beitv2_file)
    made = {row.tensor for row in accounts if row.action == "initialised"}
    assert made == {"image.masked_patch"}
    folded = [(row.tensor, row.source) for row in accounts if row.action == "folded"]
    assert folded == [("codebook.share", "quantize.cluster_size")]
    ours = {row.tensor for row in accounts if row.action != "dropped"}
    assert ours == set(network.state_dict())
    share = network.codebook.share
    assert float(share.sum()) == pytest.approx(1) and float(share[-1] / share[0]) == CODES


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("encoder.blocks.1.attn.q_bias", None, "missing encoder.blocks.1.attn.q_bias"),
        ("encoder.blocks.1.gamma_1", torch.ones(WIDTH), "unknown encoder.blocks.1.gamma_1"),
        ("decoder.fc_norm.bias", torch.ones(9), r"decoder.fc_norm.bias is \(9,\)"),
        ("encode_task_layer.2.bias", torch.full((CODE_WIDTH,), torch.nan), "NaN"),
        ("quantize.embedding.weight", torch.ones(CODES, CODE_WIDTH), "differ from length 1"),
        ("quantize.embedding.initted", torch.tensor([0.0]), "never started"),
        ("encoder.pos_embed", torch.ones(1, 18, WIDTH), "square"),
        ("quantize.embedding.weight", None, "quantize.embedding.weight"),
    ],
)
def test_a_beitv2_file_with_one_wrong_tensor_is_refused_by_its_name(
    beitv2_file: Tensors, name: str, change: Tensor | None, said: str
) -> None:
    changed = {key: tensor for key, tensor in beitv2_file.items() if key != name}
    if change is not None:
        changed[name] = change
    with pytest.raises(InputError, match=said):
        import_beitv2(changed, heads=HEADS, origin="odd.safetensors")


def test_heads_must_divide_the_width(beitv2_file: Tensors) -> None:
    with pytest.raises(InputError, match="--heads"):
        import_beitv2(beitv2_file, heads=5, origin="a test")


# -- DALL-E ----------------------------------------------------------------------------------


def fill(module: nn.Module) -> None:
    """Weights that keep the size of a signal, so that codes differ; the residual paths, which
    count a sixty-fourth, are larger."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            std = 0.1
            if parameter.dim() == 4:
                std = (2 / parameter[0].numel()) ** 0.5 * (2 if "res_path" in name else 1)
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


def coloured(count: int, height: int, width: int) -> Tensor:
    """Pictures of plain 8 x 8 squares with some noise: noise alone looks the same everywhere."""
    squares = random_pixels(count, (height // 8, width // 8), seed=7)
    large = squares.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    return large // 2 + random_pixels(count, (height, width)) // 8


@pytest.fixture(params=[2, 1], ids=["two blocks", "one block"])
def codebook(request) -> FlavaImageCodebook:
    peer = FlavaImageCodebook(
        FlavaImageCodebookConfig(hidden_size=16, vocab_size=50, num_blocks_per_group=request.param)
    )
    fill(peer)
    return peer.eval()


def flava_pixels(pixels: Tensor) -> Tensor:
    """As FlavaImageProcessor makes them: [0, 1], then (1 - 2 * 0.1) x + 0.1."""
    return 0.8 * (pixels.float() / 255) + 0.1


@torch.no_grad()
def test_dalle_gives_the_logits_and_codes_of_flava(codebook: FlavaImageCodebook) -> None:
    network, accounts = import_dalle(codebook.state_dict(), origin="a test")
    assert {row.action for row in accounts} == {"copied"}
    pixels = coloured(3, 40, 24)
    theirs = codebook(flava_pixels(pixels))
    assert theirs.std() > 0.1
    assert worst(network.logits(pixels), theirs) <= CLOSE
    codes = network.lookup(pixels)
    assert len(codes.unique()) > 3
    assert torch.equal(codes, codebook.get_codebook_indices(flava_pixels(pixels)).flatten(1))


def test_the_pixels_of_dalle_are_those_of_flavas_image_processor() -> None:
    from transformers import FlavaImageProcessorPil

    pixels = random_pixels(1, (112, 112))
    processor = FlavaImageProcessorPil()
    made = processor(
        pixels[0].permute(1, 2, 0).numpy(),
        return_codebook_pixels=True,
        return_tensors="pt",
    )["codebook_pixel_values"]
    assert worst(made, flava_pixels(pixels)) <= 1e-6


@torch.no_grad()
def test_two_tensors_of_dalle_that_change_places_are_noticed(codebook: FlavaImageCodebook) -> None:
    tensors, pixels = dict(codebook.state_dict()), coloured(2, 16, 16)
    theirs = codebook(flava_pixels(pixels))
    path = "blocks.group_3.group.block_1.res_path.path."
    for one, other in (
        (f"{path}conv_1.bias", f"{path}conv_3.bias"),
        (f"{path}conv_2.weight", f"{path}conv_3.weight"),
    ):
        swapped = tensors | {one: tensors[other], other: tensors[one]}
        network, _ = import_dalle(swapped, origin="a test")
        assert worst(network.logits(pixels), theirs) > 10 * CLOSE, one


def test_every_tensor_of_dalle_has_a_part_in_the_logits(codebook: FlavaImageCodebook) -> None:
    network, _ = import_dalle(codebook.state_dict(), origin="a test")
    network.requires_grad_(True)
    network.logits(coloured(2, 16, 16)).square().mean().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def dalle_names(tensors: Tensors) -> Tensors:
    """FlavaImageCodebook's state dict under the names of DALL-E's own encoder."""

    def older(name: str) -> str:
        name = name.replace(".group.", ".").replace("res_path.path.", "res_path.")
        return name.removesuffix("weight").removesuffix("bias") + (
            "w" if name.endswith("weight") else "b"
        )

    return {older(name): tensor for name, tensor in tensors.items()}


@torch.no_grad()
def test_dalles_own_names_and_a_whole_flava_give_the_same_network(
    codebook: FlavaImageCodebook,
) -> None:
    tensors, pixels = dict(codebook.state_dict()), random_pixels(2, (16, 16))
    wanted = import_dalle(tensors, origin="a test")[0].logits(pixels)
    older = dalle_names(tensors)
    assert "blocks.group_1.block_1.res_path.conv_1.w" in older and "blocks.output.conv.b" in older
    network, accounts = import_dalle(older, origin="a test")
    assert torch.equal(network.logits(pixels), wanted)
    assert {row.action for row in accounts} == {"renamed"}
    flava = {f"image_codebook.{n}": t for n, t in tensors.items()} | {
        "mim_head.bias": torch.ones(3)
    }
    network, accounts = import_dalle(flava, origin="a test")
    assert torch.equal(network.logits(pixels), wanted)
    assert [row.source for row in accounts if row.action == "dropped"] == ["mim_head.bias"]


def test_a_dalle_file_with_one_wrong_tensor_is_refused_by_its_name(
    codebook: FlavaImageCodebook,
) -> None:
    tensors = dict(codebook.state_dict())
    name = "blocks.group_2.group.block_1.id_path.bias"
    for changed, said in (
        ({k: t for k, t in tensors.items() if k != name}, f"missing {name}"),
        (tensors | {"blocks.extra": torch.ones(1)}, "unknown blocks.extra"),
        (tensors | {name: torch.ones(7)}, rf"{name} is \(7,\)"),
        (tensors | {name: tensors[name].long()}, "floating point"),
    ):
        with pytest.raises(InputError, match=said):
            import_dalle(changed, origin="odd.safetensors")


@torch.no_grad()
def test_a_patch_of_sixteen_shows_dalle_the_picture_at_half_size(
    codebook: FlavaImageCodebook,
) -> None:
    network, _ = import_dalle(codebook.state_dict(), patch=16, origin="a test")
    small = random_pixels(2, (16, 24)) // 2 * 2
    large = small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert network.lookup(large).shape == (2, 2 * 3)
    assert network.image_size == (224, 224)
    # A plain picture keeps its colour at any size: its codes are those of the small one.
    plain = torch.full((1, 3, 32, 32), 200, dtype=torch.uint8)
    native, _ = import_dalle(codebook.state_dict(), origin="a test")
    assert worst(network.logits(plain), native.logits(plain[..., :16, :16])) <= 1e-4
    with pytest.raises(ConfigError, match="multiple of 8"):
        import_dalle(codebook.state_dict(), patch=12, origin="a test")


# -- both, as tokenizers ---------------------------------------------------------------------


@pytest.fixture(params=["beitv2", "dalle"])
def tokenizer(request, beitv2_file: Tensors) -> ImportedTokenizer:
    if request.param == "beitv2":
        return import_tokenizer(beitv2_file, heads=HEADS, origin="vqkd.safetensors")[0]
    peer = FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=16, vocab_size=50))
    fill(peer)
    return import_tokenizer(peer.state_dict(), origin="dalle.safetensors")[0]


def test_codes_of_a_picture_do_not_depend_on_the_batch(tokenizer: ImportedTokenizer) -> None:
    # Trap T7: unilm scales by the largest value of the batch.
    pixels = coloured(5, SIDE, SIDE)
    pixels[0] = pixels[0] > 60  # 0 or 1: unilm's rule would take it for a picture in [0, 1]
    together = tokenizer.encode(pixels)
    for i in range(len(pixels)):
        assert torch.equal(tokenizer.encode(pixels[i : i + 1]), together[i : i + 1])
    # The negative check: under that rule the dark picture, alone, has other codes.
    assert not torch.equal(tokenizer.encode(pixels[:1] * 255), together[:1])


def test_looking_up_changes_nothing_and_odd_input_is_refused(tokenizer: ImportedTokenizer) -> None:
    before, pixels = tokenizer.digest, random_pixels(2, (SIDE, SIDE))
    assert torch.equal(tokenizer.encode(pixels), tokenizer.encode(pixels))
    assert ImportedTokenizer(tokenizer.network).digest == before
    assert not tokenizer.encode(pixels).requires_grad
    with pytest.raises(ValueError, match="uint8"):
        tokenizer.encode(pixels.float())
    with pytest.raises(ValueError, match="multiple"):
        tokenizer.encode(random_pixels(1, (SIDE, SIDE + 4)))
    wide = tokenizer.encode(random_pixels(2, (SIDE, 2 * SIDE)))
    assert wide.shape == (2, 2 * GRID * GRID)  # the patch of both is 8


def test_in_bf16_autocast_the_codes_are_those_of_float32(tokenizer: ImportedTokenizer) -> None:
    pixels = coloured(16, SIDE, SIDE)
    wanted = tokenizer.encode(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encode(pixels), wanted)
        with torch.no_grad():  # the negative check: bf16 would have moved some
            assert not torch.equal(tokenizer.network.lookup(pixels), wanted)


def test_saved_and_loaded_it_gives_the_same_codes(
    tokenizer: ImportedTokenizer, tmp_path: Path
) -> None:
    folder = tokenizer.save(tmp_path / "visual")
    again = load_visual_tokenizer(folder)
    pixels = random_pixels(3, (SIDE, SIDE))
    assert torch.equal(again.encode(pixels), tokenizer.encode(pixels))
    assert (again.digest, again.codes, again.patch, again.image_size, again.facts) == (
        tokenizer.digest, tokenizer.codes, tokenizer.patch, tokenizer.image_size, tokenizer.facts,
    )  # fmt: skip
    assert not again.draws
    with pytest.raises(InputError, match="--pictures"):
        again.decode(torch.zeros(1, 2, 2, dtype=torch.int64))
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match="digest"):
        load_visual_tokenizer(folder)


def test_settings_that_do_not_fit_the_tensors_are_refused(
    tokenizer: ImportedTokenizer, tmp_path: Path
) -> None:
    folder = tokenizer.save(tmp_path / "visual")
    path = folder / "config.json"
    tree = json.loads(path.read_text())

    def refused(said: str, **changes: object) -> None:
        path.write_text(json.dumps(tree | {"config": tree["config"] | changes}))
        with pytest.raises(InputError, match=said):
            load_visual_tokenizer(folder)

    sizes = tree["config"]["sizes"]
    refused("'unheard'", network="unheard")
    refused("config.json asks for", sizes=sizes | {"codes": sizes["codes"] + 1})
    refused("coodes", sizes=sizes | {"coodes": 3})
    refused("pictures", draws=True)
    refused("network, sizes and draws", more=1)


def test_the_picture_of_a_code_is_the_mean_of_its_patches(tokenizer: ImportedTokenizer) -> None:
    batches = [random_pixels(4, (SIDE, SIDE), seed) for seed in (1, 2)]
    drawing = with_pictures(tokenizer, batches)
    assert drawing.draws and drawing.facts["pictures"]["images"] == 8
    pixels = torch.cat(batches)
    codes = drawing.encode(pixels)
    assert torch.equal(codes, tokenizer.encode(pixels))
    side = tokenizer.patch
    code = int(codes.flatten().bincount().argmax())
    mine = [
        pixels[b, :, r * side : (r + 1) * side, c * side : (c + 1) * side].double()
        for b, place in (codes == code).nonzero().tolist()
        for r, c in [divmod(place, SIDE // side)]
    ]
    assert len(mine) > 1
    wanted = torch.stack(mine).mean(dim=0).round().to(torch.uint8)
    drawn = drawing.decode(torch.tensor([[[code, code]]]))
    assert torch.equal(drawn[0], torch.cat((wanted, wanted), dim=-1))
    unseen = next(c for c in range(drawing.codes) if not bool((codes == c).any()))
    assert bool((drawing.decode(torch.tensor([[[unseen]]])) == 128).all())
    with pytest.raises(ValueError, match="codes must be"):
        drawing.decode(torch.tensor([[[drawing.codes]]]))
    with pytest.raises(InputError, match="no picture"):
        with_pictures(tokenizer, iter(()))


def test_pictures_survive_being_saved(tokenizer: ImportedTokenizer, tmp_path: Path) -> None:
    drawing = with_pictures(tokenizer, [random_pixels(3, (SIDE, SIDE))])
    again = load_visual_tokenizer(drawing.save(tmp_path / "visual"))
    codes = torch.arange(6).reshape(1, 2, 3)
    assert again.draws and torch.equal(again.decode(codes), drawing.decode(codes))
    assert again.digest == drawing.digest != tokenizer.digest


def test_a_file_of_neither_layout_is_refused_with_what_is_in_it() -> None:
    with pytest.raises(InputError, match="stranger"):
        import_tokenizer({"stranger": torch.ones(1)}, origin="odd.safetensors")


def test_an_argument_of_the_other_layout_is_refused(beitv2_file: Tensors) -> None:
    with pytest.raises(ConfigError, match="--patch"):
        import_tokenizer(beitv2_file, patch=16, origin="a test")
    with pytest.raises(ConfigError, match="--heads"):
        import_tokenizer({"blocks.input.w": torch.ones(1)}, heads=2, origin="a test")


# -- the command -----------------------------------------------------------------------------


def imported(*words: object) -> int:
    from vlbeit.train.tokenizer_cli import main

    return main(["import", *map(str, words)])


def test_the_command_writes_a_tokenizer_that_pretraining_takes(
    beitv2_file: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from test_vqkd import write_scenes
    from vlbeit.config import PretrainConfig
    from vlbeit.data.dataset import Dataset, SourceInfo
    from vlbeit.train.tokenizers import find_tokenizers

    data, path = tmp_path / "data", tmp_path / "vqkd.safetensors"
    save_file(beitv2_file, path)
    write_scenes(data / "scenes.tar", 12, bad=0)
    shards = [str(data / "scenes.tar")]
    Dataset.write(data, "drawn", [SourceInfo("scenes", "image", "train", shards, 12)])
    out = tmp_path / "visual"
    assert imported(path, "--out", out, "--heads", HEADS, "--pictures", data, "--count", 8) == 0
    said = capsys.readouterr().out
    tokenizer = load_visual_tokenizer(out)
    assert tokenizer.digest in said and "from 8 pictures" in said
    assert tokenizer.facts["file"] == "vqkd.safetensors"
    assert tokenizer.facts["dropped"] and tokenizer.draws
    receipt = json.loads((out / "receipt.json").read_text())
    assert set(receipt["counts"]) == {"copied", "renamed", "folded", "initialised", "dropped"}
    named = [name for row in receipt["tensors"] for name in row.get("sources", ())]
    assert sorted(named) == sorted(beitv2_file)
    config = PretrainConfig(recipe="tiny", run_dir=str(tmp_path), data=())
    named = dataclasses.replace(config.tokenizers, visual=str(out))
    assert find_tokenizers(dataclasses.replace(config, tokenizers=named), None).visual == out
    # A checkpoint keeps the tokenizer: written once more it is the same.
    assert load_visual_tokenizer(tokenizer.save(tmp_path / "again")).digest == tokenizer.digest


def test_the_command_reads_a_folder_and_refuses_what_does_not_belong_together(
    beitv2_file: Tensors, tmp_path: Path
) -> None:
    peer = FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=16, vocab_size=50))
    fill(peer)
    peer.save_pretrained(tmp_path / "flava")
    assert imported(tmp_path / "flava", "--out", tmp_path / "dalle", "--patch", 16) == 0
    assert load_visual_tokenizer(tmp_path / "dalle").patch == 16
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    with pytest.raises(ConfigError, match="--patch"):
        imported(tmp_path / "vocab.txt", "--out", tmp_path / "x", "--patch", 16)
    with pytest.raises(InputError, match="missing.safetensors"):
        imported(tmp_path / "missing.safetensors", "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_training_file_of_unilm_is_read_and_a_pickled_module_is_not(
    beitv2_file: Tensors, tmp_path: Path
) -> None:
    # BEiT v2's tokenizer is published as a training file; DALL-E's encoder as a pickled module.
    training = {"model": beitv2_file, "epoch": 99, "args": argparse.Namespace(lr=2e-4)}
    torch.save(training, tmp_path / "vqkd.pth")
    assert imported(tmp_path / "vqkd.pth", "--out", tmp_path / "a", "--heads", HEADS) == 0
    wanted, _ = import_beitv2(beitv2_file, heads=HEADS, origin="a test")
    pixels = random_pixels(3, (SIDE, SIDE))
    codes = load_visual_tokenizer(tmp_path / "a").encode(pixels)
    assert torch.equal(codes, wanted.lookup(pixels))
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 1)), tmp_path / "encoder.pkl")
    with pytest.raises(UnsafeError, match=r"encoder.pkl"):
        imported(tmp_path / "encoder.pkl", "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_run_pretrains_on_imported_codes_and_goes_on_with_those_of_its_checkpoint(
    beitv2_file: Tensors, tmp_path: Path
) -> None:
    import vlbeit
    from toy_run import losses, toy_run, write_toy_data
    from vlbeit.checkpoint import find_checkpoint

    data = write_toy_data(tmp_path / "data")
    tokenizer, _ = import_tokenizer(beitv2_file, heads=HEADS, origin="vqkd.safetensors")
    visual = with_pictures(tokenizer, [coloured(8, SIDE, SIDE)]).save(tmp_path / "vqkd")
    settings = {"tokenizers.visual": str(visual), "model.codes": CODES, "save_every": 2}
    whole = toy_run(data, tmp_path / "whole", {**settings, "max_steps": 4})
    toy_run(data, tmp_path / "cut", {**settings, "max_steps": 2})
    shutil.rmtree(visual)  # the checkpoint has its own
    cut = toy_run(data, tmp_path / "cut", {**settings, "tokenizers.visual": "", "max_steps": 4})
    assert losses(cut) == losses(whole)
    checkpoint = find_checkpoint(cut, print)
    kept = load_visual_tokenizer(checkpoint.visual_tokenizer)
    assert checkpoint.manifest["tokenizer_digests"]["visual"] == kept.digest
    assert isinstance(kept, ImportedTokenizer) and kept.draws
    # Other codes are another task: the same run on codes that are numbered otherwise.
    toy = toy_run(data, tmp_path / "toy", {"save_every": 2, "max_steps": 4})
    assert losses(toy) != losses(whole)
    picture = coloured(1, SIDE, SIDE)[0].permute(1, 2, 0).numpy()
    filled = vlbeit.load(cut, "cpu").fill_patches(picture)
    assert filled.filled_decoded.shape == (SIDE, SIDE, 3)


@pytest.mark.parametrize("name", ["vqkd", "dalle"])
def test_convert_says_which_command_takes_a_visual_tokenizer(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlbeit.cli import main

    assert main(["convert", name, "x.pth", "--out", "y"]) == 78
    assert "vlbeit tokenizer import" in capsys.readouterr().err
