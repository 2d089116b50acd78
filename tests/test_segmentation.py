"""Segmentation as a task: crops of picture and map, sizes, windows, figures, refusals."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny_models import fill_normal
from tiny_tasks import (
    CLASSES,
    CONFIGS,
    TRAIN,
    batch_of,
    block_picture,
    png,
    segmentation_members,
    toy_config,
    toy_task,
    write_tasks,
)
from vlbeit.config import CropConfig, SegmentationConfig
from vlbeit.data.collate import stack_filled
from vlbeit.data.order import Visit
from vlbeit.data.records import BadSample
from vlbeit.data.task_stream import Pictures, open_task
from vlbeit.data.transforms import BadImage, decode_map
from vlbeit.draws import Draws
from vlbeit.errors import ConfigError, InputError
from vlbeit.eval.downstream import value_of
from vlbeit.nn.model import VLBeit
from vlbeit.tasks import build_task, learn_facts
from vlbeit.tasks.segmentation import (
    Segmentation,
    class_weights,
    largest_share,
    scaled,
    tap_layers,
    training_crop,
)
from vlbeit.tasks.segmentation_metrics import confusion_matrix, segmentation_figures

WIDE = SegmentationConfig(scale=(0.5, 2.0), max_share=1.0)
FLIPS = CropConfig(scale=(1.0, 1.0), flip=0.5, jitter=0.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data") / "toy")


def test_the_taps_are_the_peers_and_exist_in_every_depth():
    assert tap_layers(12) == [4, 6, 8, 12]  # BEiT base
    assert tap_layers(24) == [8, 12, 16, 24]  # BEiT large
    for layers in range(1, 25):
        taps = tap_layers(layers)
        assert taps == sorted(taps) and taps[0] >= 1 and taps[-1] == layers


def lively(model: VLBeit) -> None:
    """Random weights that name several classes in one picture."""
    fill_normal(model)
    with torch.no_grad():
        classifier = model.task.upper.classifier
        classifier.weight.sub_(classifier.weight.mean(dim=1, keepdim=True)).mul_(30)
        classifier.bias.zero_()


def coded(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture that says what class each of its pixels has: blocks of 14, the class as red."""
    classes = (np.arange(rows)[:, None] // 14 * 2 + np.arange(columns)[None] // 14) % 5
    image = np.zeros((rows, columns, 3), dtype=np.uint8)
    image[..., 0] = 40 * classes + 20
    return image, classes.astype(np.uint8)


def test_picture_and_map_are_cut_and_mirrored_as_one():
    image, classes = coded(42, 70)
    agreeing, astray, flipped, filled, before = [], [], 0, 0, None
    for number in range(60):
        part, its_map = training_crop(image, classes, Draws(number), (32, 48), WIDE, FLIPS)
        assert part.shape == (32, 48, 3) and its_map.shape == (32, 48)
        assert set(np.unique(its_map)) <= {0, 1, 2, 3, 4, 255}  # classes are never mixed
        there = its_map != 255
        filled += not there.all()
        assert (part[~there] == 128).all()
        read = np.rint((part[..., 0].astype(float) - 20) / 40)
        agreeing.append((read == its_map)[there].mean())
        if before is not None:  # the negative control: another crop's map
            astray.append((read == before)[there].mean())
        before = its_map
        again = training_crop(image, classes, Draws(number), (32, 48), WIDE, FLIPS)
        assert np.array_equal(again[0], part) and np.array_equal(again[1], its_map)
        still = training_crop(image, classes, Draws(number), (32, 48), WIDE, replace(FLIPS, flip=0))
        if not np.array_equal(still[1], its_map):
            flipped += 1
            assert np.array_equal(still[1][:, ::-1], its_map)
            assert np.array_equal(still[0][:, ::-1], part)
    # All but the edges of the blocks.
    assert min(agreeing) > 0.8 and np.mean(agreeing) > 0.9 and np.mean(astray) < 0.4
    assert 15 < flipped < 45 and 0 < filled < 60


def test_a_crop_of_nearly_one_class_is_drawn_again():
    image, classes = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
    classes[24:40, 24:40] = 1
    near = SegmentationConfig(scale=(3.0, 3.0), max_share=0.75)
    never = replace(near, max_share=1.0)
    shares = [
        np.mean(
            [
                largest_share(training_crop(image, classes, Draws(i), (32, 32), given, FLIPS)[1])
                <= 0.75
                for i in range(40)
            ]
        )
        for given in (near, never)
    ]
    assert shares[0] > shares[1] + 0.3


def test_a_picture_keeps_its_shape_and_a_very_long_one_is_made_smaller():
    assert scaled((480, 640), (512, 512)) == (512, 683)
    assert scaled((640, 480), (512, 512), 0.5) == (341, 256)
    assert scaled((100, 1000), (512, 512)) == (205, 2048)  # BEiT: 2048 x 512 at most
    assert scaled((1, 9), (32, 48)) == (14, 128)


def test_pictures_of_many_sizes_share_a_batch_and_what_fills_it_up_is_no_class(data):
    _, stream, _ = toy_task("segmentation", data, training=False)
    batch = batch_of(stream, "segmentation", [0, 1, 2, 3])
    for place in range(4):
        image, classes = block_picture(place)
        height, width, rows, columns = batch.targets["sizes"][place].tolist()
        assert (rows, columns) == classes.shape and min(height, width) == 32
        own = batch.targets["map"][place]
        assert np.array_equal(own[:rows, :columns].numpy(), classes)
        assert (own[rows:] == 255).all() and (own[:, columns:] == 255).all()
        assert (batch.pixels[place, 0, :, height:] == 255).all()
    assert len({tuple(row) for row in batch.targets["sizes"].tolist()}) > 1
    with pytest.raises(ValueError):  # only bytes may differ in size
        stack_filled([np.zeros(2), np.zeros(3)])


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_figures_are_those_of_the_confusion_matrix_of_all_pixels(mode, data):
    made, stream, model = toy_task(
        "segmentation", data, {"segmentation.inference": mode}, training=False
    )
    assert isinstance(made, Segmentation)
    lively(model)
    matrix, table = torch.zeros(3, 3, dtype=torch.int64), []
    for place in range(10):
        batch = batch_of(stream, "segmentation", [place])
        _, classes = block_picture(place)
        with torch.no_grad():
            shares = made.class_shares(model, model.task, batch.image(), classes.shape)
            table += made.predict(model, model.task, batch)
        matrix += confusion_matrix(shares[0].argmax(dim=0), torch.from_numpy(classes), 3)
    assert (matrix.sum(dim=0) > 20).sum() > 1  # it names several classes
    expected = segmentation_figures(matrix)
    found = made.figures(table)
    values = {name: value_of(f.numerator, f.denominator) for name, f in found.items()}
    assert values.pop("mean_iou") == pytest.approx(expected.mean_iou)
    assert values.pop("pixel_accuracy") == pytest.approx(expected.pixel_accuracy)
    for name, iou in zip(CLASSES, expected.iou, strict=True):
        assert values.pop(f"iou/{name}", None) == pytest.approx(iou)
    assert not values
    # The baseline is what a map of the most frequent class would get.
    ground = torch.zeros(3, 3, dtype=torch.int64)
    for place in range(10):
        classes = torch.from_numpy(block_picture(place)[1])
        ground += confusion_matrix(torch.zeros_like(classes), classes, 3)
    blind = segmentation_figures(ground)
    assert made.facts["most_frequent"] == 0
    assert value_of(*found["mean_iou"].baseline) == pytest.approx(blind.mean_iou)
    assert value_of(*found["pixel_accuracy"].baseline) == pytest.approx(blind.pixel_accuracy)


def test_scales_the_mirror_image_and_windows_are_averaged_in(data):
    noise = torch.randint(0, 256, (1, 3, 32, 70), generator=torch.Generator().manual_seed(1))
    pixels, shares = noise.to(torch.uint8), {}
    for name, settings in {
        "whole": {"inference": "whole"},
        "slide": {"inference": "slide"},
        "scales": {"inference": "whole", "scales": [0.75, 1.5]},
        "flip": {"inference": "whole", "flip": True},
    }.items():
        made, _, model = toy_task(
            "segmentation", data, {f"segmentation.{k}": v for k, v in settings.items()}
        )
        lively(model)
        with torch.no_grad():
            shares[name] = made.class_shares(model, model.task, pixels, (40, 88))
            straight = made.class_shares(model, model.task, pixels[..., 6:], (40, 80))
            mirrored = made.class_shares(model, model.task, pixels[..., 6:].flip(3), (40, 80))
        assert shares[name].shape == (1, 3, 40, 88)
        torch.testing.assert_close(shares[name].sum(dim=1), torch.ones(1, 40, 88))
        same = torch.allclose(mirrored.flip(3), straight, atol=1e-4)
        assert same == (name == "flip")
    for name in ("slide", "scales", "flip"):
        assert (shares[name] - shares["whole"]).abs().max() > 1e-3


def test_without_the_auxiliary_head_there_is_neither_its_loss_nor_its_weights(data):
    made, stream, model = toy_task("segmentation", data, {"segmentation.auxiliary": 0.0})
    batch = batch_of(stream, "segmentation", [0, 1])
    assert set(made.score(model, model.task, batch)) == set(made.weights) == {"segmentation"}
    assert not any("auxiliary" in name for name, _ in model.named_parameters())


def test_pixels_without_a_class_teach_nothing(data):
    made, stream, model = toy_task("segmentation", data)
    fill_normal(model)
    batch = batch_of(stream, "segmentation", [0, 1])
    batch.targets["map"][:, :16] = 255
    half = made.score(model, model.task, batch)["segmentation"]
    batch.targets["map"][:] = 255
    nothing = made.score(model, model.task, batch)["segmentation"]
    assert 0 < int(half.count) <= 2 * 16 * 32
    assert int(nothing.count) == 0 and float(nothing.loss_sum.detach()) == 0
    nothing.loss_sum.backward()  # there still is a gradient, of zeros


def test_full_balance_weighs_classes_by_the_median_frequency_of_the_maps_that_show_them(data):
    """The weights beside a count over whole maps, and the loss beside a sum pixel by pixel."""
    made, stream, model = toy_task("segmentation", data, {"segmentation.balance": 1.0})
    maps = [block_picture(i)[1].ravel() for i in range(TRAIN)]
    share = [
        sum((m == k).sum() for m in maps) / sum((m != 255).sum() for m in maps if (m == k).any())
        for k in range(len(CLASSES))
    ]
    pixels = np.bincount(np.concatenate(maps), minlength=256)[: len(CLASSES)]
    wanted = np.median(share) / np.array(share)
    wanted *= pixels.sum() / (pixels * wanted).sum()
    np.testing.assert_allclose(made.facts["class_weights"], wanted, rtol=1e-12)
    assert wanted[0] < 0.8 < 1.2 < wanted[1:].min()  # most of a picture is ground

    fill_normal(model)
    batch = batch_of(stream, "segmentation", [0, 1, 2])
    plain, _, _ = toy_task("segmentation", data)
    found, even = (task.score(model, model.task, batch)["segmentation"] for task in (made, plain))
    by_class = []
    for k in range(len(CLASSES)):
        only = replace(batch, targets=dict(batch.targets))
        only.targets["map"] = torch.where(
            batch.targets["map"] == k, batch.targets["map"], torch.tensor(255, dtype=torch.uint8)
        )
        by_class.append(
            float(plain.score(model, model.task, only)["segmentation"].loss_sum.detach())
        )
    assert float(found.loss_sum.detach()) == pytest.approx(
        float(np.dot(by_class, wanted)), rel=1e-5
    )
    assert float(even.loss_sum.detach()) == pytest.approx(sum(by_class), rel=1e-5)
    assert float(found.loss_sum.detach()) != pytest.approx(
        sum(by_class), rel=1e-2
    )  # negative control
    assert (int(found.count), int(found.correct)) == (int(even.count), int(even.correct))


def test_balance_keeps_the_mean_weight_and_narrows_with_its_power():
    counts, shown = np.array([900, 90, 10, 0]), np.array([1000, 1000, 100, 0])
    for balance in (0.25, 0.5, 1.0):
        weights = class_weights(counts, shown, balance)
        assert (counts * weights).sum() == pytest.approx(counts.sum())
        # Class 1 is 9 % of the maps that show it, class 2 is 10 %, class 0 is 90 %.
        assert weights[1] / weights[0] == pytest.approx(10**balance)
        assert weights[2] / weights[0] == pytest.approx(9**balance)
        assert weights[3] == weights[1]  # never seen: as the rarest


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seg.png": None}, "no_map.*no seg.png; it has"),
        ({"seg.png": png(np.zeros((3, 5), np.uint8))}, r"map_size \(3 x 5 pixels, its picture"),
        ({"seg.png": png(np.full(block_picture(0)[1].shape, 3, np.uint8))}, r"class 3; .* 0 to 2"),
        ({"seg.png": png(block_picture(0)[0])}, "unsupported_mode.*8-bit grey PNG"),
        ({"seg.png": b"GIF89a"}, "damaged|truncated|not_an_image"),
        ({"png": b"<html>"}, "not_an_image"),
    ],
)
def test_a_bad_record_is_named_with_what_was_expected_and_found(change, told, tmp_path):
    members = {k: v for k, v in (segmentation_members(0) | change).items() if v is not None}
    data = write_tasks(tmp_path / "data", {("segmentation", 0): members})
    config = toy_config("segmentation", data)
    made = build_task(config, {"classes": list(CLASSES), "most_frequent": 0})
    source = open_task(config.data, "task:segmentation", "train")[0]
    pictures = Pictures(image_size=(32, 32), config=config, training=True)
    with pytest.raises((BadSample, BadImage), match=told):
        made.example(source, 0, 0, pictures, Draws(0))
    made.example(source, 1, 0, pictures, Draws(0))


def test_a_class_without_a_name_and_data_without_names_are_refused(tmp_path):
    changed = segmentation_members(0) | {
        "seg.png": png(np.full(block_picture(0)[1].shape, 9, np.uint8))
    }
    data = write_tasks(tmp_path / "data", {("segmentation", 0): changed})
    config = toy_config("segmentation", data)
    sources = open_task(config.data, "task:segmentation", "train")
    with pytest.raises(InputError, match=r"class 9 in a map .* names 3 classes \(0 to 2\)"):
        learn_facts(config, sources)
    nothing = {
        ("segmentation", i): segmentation_members(i)
        | {"seg.png": png(np.full(block_picture(i)[1].shape, 255, np.uint8))}
        for i in range(TRAIN)
    }
    blank = toy_config("segmentation", write_tasks(tmp_path / "blank", nothing))
    with pytest.raises(InputError, match="no map that was read has a pixel of a class"):
        learn_facts(blank, open_task(blank.data, "task:segmentation", "train"))
    file = data / "dataset.json"
    file.write_text(file.read_text().replace("segmentation_classes", "other"))
    with pytest.raises(InputError, match=r"no facts\.segmentation_classes"):
        learn_facts(config, sources)


def test_a_palette_map_counts_by_number_and_not_by_colour():
    from io import BytesIO

    from PIL import Image

    classes = block_picture(0)[1]
    image = Image.fromarray(classes).copy()
    image.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0] + [0] * 759)
    file = BytesIO()
    image.save(file, "PNG")
    assert Image.open(BytesIO(file.getvalue())).mode == "P"
    assert np.array_equal(decode_map(file.getvalue()), classes)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"input.crop.scale": [0.5, 1.0]}, "would move the picture and not its map"),
        ({"input.rand_augment.operations": 2}, "would move the picture and not its map"),
        ({"segmentation.scale": [2.0, 0.5]}, r"scale must be 0 < low <= high <= 10, found 2\.0"),
        ({"segmentation.balance": 1.5}, r"balance must be 0 to 1, found 1\.5"),
        ({"segmentation.stride": 1.5}, r"stride must be above 0 and at most 1, found 1\.5"),
        ({"segmentation.max_share": 0.0}, "max_share must be above 0"),
        ({"segmentation.scales": []}, "scales must be one or more"),
        ({"segmentation.auxiliary": -1.0}, "auxiliary must be at least 0"),
        ({"segmentation.channels": 40}, "channels must be a multiple of 16"),
        ({"model.image_size": [8, 64]}, "8 pixels are one patch"),
        ({"segmentation.inference": "whole", "segmentation.scales": [0.25]}, "8 pixels are one"),
        ({"segmentation.norm": "batch", "batch.micro": 4}, r"batch\.micro \(4\) must be batch\.s"),
    ],
)
def test_settings_that_cannot_work_or_would_do_nothing_are_refused(settings, told, data):
    config = toy_config("segmentation", data, settings)
    with pytest.raises(ConfigError, match=told):
        build_task(config, {"classes": list(CLASSES), "most_frequent": 0})
    build_task(CONFIGS["segmentation"], {"classes": list(CLASSES), "most_frequent": 0})


def test_a_training_sample_is_a_crop_of_the_models_size(data):
    _, stream, _ = toy_task("segmentation", data, {"model.image_size": [32, 48]})
    sample = stream.sample(Visit("segmentation", 0, 5))
    assert sample.pixels.shape == (1, 3, 32, 48) and sample.targets["map"].shape == (32, 48)
    assert sample.targets["sizes"].tolist() == [32, 48, 32, 48]
