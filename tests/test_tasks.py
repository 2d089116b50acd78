"""The parts of the tasks one by one: targets, mixing, answer lists, accuracies, intervals."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toy_tasks import ASK, CLASSIFY, TRAIN, VAL, toy_config, write_tasks
from vlbeit.config import ClassificationConfig, RandAugmentConfig, VqaConfig
from vlbeit.data.dataset import open_sources
from vlbeit.data.randaugment import OPERATIONS, rand_augment
from vlbeit.data.task_stream import facts_of
from vlbeit.draws import Draws
from vlbeit.errors import InputError
from vlbeit.eval.bootstrap import difference, resample_counts
from vlbeit.eval.downstream import estimates, value_of
from vlbeit.tasks import Figure
from vlbeit.tasks.classification import Classification, beta, erased, mixed
from vlbeit.tasks.vqa import Vqa, answer_list, learn_facts


def pixels(seed: int, height: int = 12, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)


# ------------------------------------------------------------------ classification


@given(st.integers(0, 10_000), st.sampled_from(["mixup", "cutmix"]))
def test_a_mixed_picture_holds_the_share_that_its_target_says(key, kind):
    one, other = np.zeros((3, 12, 16), np.uint8), np.full((3, 12, 16), 200, np.uint8)
    both, share = mixed(one, other, ClassificationConfig(**{kind: 0.8}), Draws(key))
    assert 0 <= share <= 1
    assert both.mean() / 200 == pytest.approx(1 - share, abs=0.01 if kind == "mixup" else 1e-9)
    if kind == "cutmix":
        assert set(np.unique(both)) <= {0, 200}


def test_with_both_on_each_picture_draws_one_of_the_two():
    one, other = np.zeros((3, 12, 16), np.uint8), np.full((3, 12, 16), 200, np.uint8)
    settings = ClassificationConfig(mixup=1.0, cutmix=1.0)
    cut = [set(np.unique(mixed(one, other, settings, Draws(k))[0])) <= {0, 200} for k in range(300)]
    assert 0.4 < np.mean(cut) < 0.65  # a mixup may by chance round to either


def test_the_beta_numbers_have_its_mean_and_variance():
    for alpha in (0.4, 0.8, 1.0, 2.0):
        draws = Draws("beta", str(alpha))
        found = np.array([beta(draws, alpha) for _ in range(4000)])
        assert found.mean() == pytest.approx(0.5, abs=0.02)
        assert found.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.08)


def test_erasing_fills_a_rectangle_and_leaves_the_rest():
    picture = np.full((3, 24, 24), 255, np.uint8)
    changed = [(erased(picture, Draws(k), 1.0) != picture).any(0) for k in range(50)]
    for where in changed:
        rows, columns = np.nonzero(where.any(1))[0], np.nonzero(where.any(0))[0]
        assert len(rows) and where.mean() <= 0.37
        box = where[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.mean() > 0.9  # noise equals the picture in one of 16 million pixels
    assert (erased(picture, Draws(1), 0.0) == picture).all()
    share = np.mean([(erased(picture, Draws(k), 0.25) != picture).any() for k in range(400)])
    assert 0.18 < share < 0.32


def test_smoothed_and_mixed_targets_add_up_to_one(tmp_path):
    folder = write_tasks(tmp_path)
    source = open_sources([folder], "task:classification", "train")[0]
    config = toy_config(
        "classification", {"classification.mixup": 0.8, "classification.label_smoothing": 0.2}
    )
    from vlbeit.data.task_stream import Pictures

    task = Classification(config, {"classes": facts_of([str(folder)], "classes")})
    for training, peaks in ((True, 2), (False, 1)):
        pictures = Pictures(image_size=(32, 32), config=config, training=training)
        made = [task.example(source, i, 0, pictures, Draws("mix", i)) for i in range(TRAIN)]
        targets = np.stack([example.targets["classes"] for example in made])
        assert targets.sum(axis=1) == pytest.approx(1.0, abs=1e-6)
        assert targets.min() >= 0.2 / 4 - 1e-6
        assert (targets > 0.2 / 4 + 1e-4).sum(axis=1).max() == peaks
    again = task.example(source, 3, 0, pictures, Draws("other key"))
    assert (again.pixels == made[3].pixels).all()  # evaluation draws nothing


# ------------------------------------------------------------------ RandAugment


def test_rand_augment_is_a_function_of_its_key():
    config = RandAugmentConfig(operations=2)
    found = [rand_augment(pixels(0), Draws("a", k), config) for k in range(20)]
    again = [rand_augment(pixels(0), Draws("a", k), config) for k in range(20)]
    assert all((x == y).all() for x, y in zip(found, again, strict=True))
    assert len({x.tobytes() for x in found}) > 10
    assert all(x.shape == (3, 12, 16) and x.dtype == np.uint8 for x in found)
    assert rand_augment(pixels(0), Draws("a"), RandAugmentConfig()) is not None
    assert (rand_augment(pixels(0), Draws("a"), RandAugmentConfig()) == pixels(0)).all()


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_works_at_every_strength_and_grows_with_it(name):
    from PIL import Image

    smooth = np.linspace(30, 220, 24 * 24).reshape(24, 24)
    smooth[8:16, 8:16] += 25  # an edge, for sharpness
    image = Image.fromarray(np.stack([smooth, smooth.T, 250 - smooth], -1).astype(np.uint8))
    moved = []
    for strength in (0.0, 0.5, 1.0):
        out = OPERATIONS[name](image, strength, 1.0)
        assert out.size == image.size and out.mode == "RGB"
        moved.append(np.abs(np.asarray(out, float) - np.asarray(image, float)).mean())
    if name not in ("autocontrast", "equalize", "invert"):
        assert moved[0] <= moved[1] <= moved[2] and moved[0] < moved[2]


# ------------------------------------------------------------------ VQA


def test_soft_targets_are_those_of_the_number_of_annotators():
    task = Vqa(VqaConfig(), {"answers": ["red", "blue", "2"], "prior": {}, "most_frequent": ""})
    ten = ["Red"] * 5 + ["blue"] * 2 + ["two"] + ["unlisted"] * 2
    target = task._target({"question": "q", "answer": "red", "answers": ten})
    assert target.tolist() == pytest.approx([1.0, 0.6, 0.3])
    assert task._target({"question": "q", "answer": "blue"}).tolist() == [0, 1, 0]
    assert not task._target({"question": "q", "answer": "green"}).any()


def test_the_answer_list_comes_from_the_file_else_the_data_else_the_rule(tmp_path):
    folder = write_tasks(tmp_path / "data")
    sources = open_sources([folder], "task:vqa", "train")
    config = toy_config("vqa", {"vqa.min_count": 16})
    from dataclasses import replace

    config = replace(config, data=(str(folder),))
    by_rule = learn_facts(config, sources)
    counts: dict[str, int] = {}
    from toy_tasks import questions_of

    for i in range(TRAIN):
        for question in questions_of(i):
            counts[question["answer"]] = counts.get(question["answer"], 0) + 1
    kept = sorted((a for a in counts if counts[a] >= 16), key=lambda a: (-counts[a], a))
    assert by_rule["answers"] == kept
    tree = json.loads((folder / "dataset.json").read_text())
    tree["facts"]["answers"] = ["white", "Red", "blue"]
    (folder / "dataset.json").write_text(json.dumps(tree))
    assert learn_facts(config, sources)["answers"] == ["white", "red", "blue"]
    for name, text in (("a.json", '["blue", "red"]'), ("a.txt", "blue\nred\n")):
        (tmp_path / name).write_text(text)
        named = replace(config, vqa=VqaConfig(answers=str(tmp_path / name)))
        assert learn_facts(named, sources)["answers"] == ["blue", "red"]
    (tmp_path / "twice.txt").write_text("blue\nBlue\n")
    with pytest.raises(InputError, match="'blue' stands there twice"):
        answer_list(replace(config, vqa=VqaConfig(answers=str(tmp_path / "twice.txt"))), None)
    (tmp_path / "none.txt").write_text("purple\n")
    with pytest.raises(InputError, match="none of the 1 answers"):
        learn_facts(replace(config, vqa=VqaConfig(answers=str(tmp_path / "none.txt"))), sources)


def test_training_leaves_out_questions_without_a_listed_answer_and_evaluation_keeps_them(tmp_path):
    source = open_sources([write_tasks(tmp_path)], "task:vqa", "train")[0]
    task = Vqa(VqaConfig(), {"answers": ["red"], "prior": {}, "most_frequent": "red"})
    from toy_tasks import questions_of

    red = [
        (i, n) for i in range(TRAIN) for n, q in enumerate(questions_of(i)) if q["answer"] == "red"
    ]
    items = task.items(source, training=True)
    assert list(zip(items.record.tolist(), items.number.tolist(), strict=True)) == red
    assert len(task.items(source, training=False).record) == 2 * TRAIN
    assert VAL < TRAIN


def test_the_toy_configs_are_their_tasks_own():
    assert (CLASSIFY.task, ASK.task) == ("classification", "vqa")


# ------------------------------------------------------------------ figures


def test_a_share_and_its_interval_are_those_of_the_pretraining_evaluation():
    right = np.random.default_rng(0).integers(0, 2, 50)
    figure = Figure.share(right.tolist(), [0.0] * 50)
    found = estimates({"accuracy": figure}, [f"{i:02d}" for i in range(50)])["accuracy"]
    counts = resample_counts(50, 2000, 50)
    expected = difference((right, np.ones(50)), None, counts)
    assert (found["value"], found["low"], found["high"]) == pytest.approx(
        (expected.value, expected.low, expected.high)
    )
    assert found["gain"] == pytest.approx(expected.to_dict())


def test_samples_of_one_record_are_resampled_together():
    right = np.repeat(np.random.default_rng(0).integers(0, 2, 20), 5)
    figure = Figure.share(right.tolist())
    alone = estimates({"a": figure}, [str(i) for i in range(100)])["a"]
    together = estimates({"a": figure}, [str(i // 5) for i in range(100)])["a"]
    assert together["value"] == alone["value"]
    assert together["high"] - together["low"] > 1.7 * (alone["high"] - alone["low"])


def test_a_figure_of_several_columns_is_the_mean_of_their_ratios():
    top = np.array([[1.0, 0, 0], [3, 2, 0]])
    bottom = np.array([[4.0, 2, 0], [4, 2, 0]])
    assert value_of(top, bottom) == pytest.approx((4 / 8 + 2 / 4) / 2)  # the third has none
    assert value_of(np.zeros(3), np.zeros(3)) == 0.0


def test_the_order_of_rows_changes_no_figure(tmp_path: Path):
    rows = [
        {"top": [i % 4, 3], "label": (i * i) % 4, "sample_id": str(i), "record": str(i)}
        for i in range(30)
    ]
    task = Classification(CLASSIFY, {"classes": list("abcd"), "most_frequent": 1})
    one = estimates(task.figures(rows), [row["record"] for row in rows])
    other = estimates(task.figures(rows[::-1]), [row["record"] for row in rows[::-1]])
    assert one == other
