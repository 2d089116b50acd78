"""VQA as a task: one form of an answer everywhere, figures by type, questions without an answer."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny_run import grey_png
from toy_tasks import VAL, toy_config, write_tasks
from vlbeit.config import VqaConfig
from vlbeit.data.dataset import open_sources
from vlbeit.data.order import Visit
from vlbeit.data.records import BadSample, RecordSource, write_shards
from vlbeit.data.task_stream import TaskStream
from vlbeit.data.transforms import BadText
from vlbeit.data.vqa_answers import (
    answer_accuracy,
    answer_form,
    form_or_nothing,
    normalise_answer,
    vqa_accuracy,
)
from vlbeit.nn.model import VLBeit
from vlbeit.tasks.vqa import Vqa, learn_facts
from vlbeit.tokens.text import TextTokenizer

FACTS = {
    "answers": ["2", "red", "on left", "the", "yes"],
    "prior": {"how many": "2"},
    "most_frequent": "yes",
}


def source_of(folder: Path, records: list[list[dict[str, Any]]]) -> RecordSource:
    """One record a list of questions."""
    rows = [
        (f"{i:04d}", {"png": grey_png(9 * i), "json": json.dumps({"questions": asked}).encode()})
        for i, asked in enumerate(records)
    ]
    return RecordSource("vqa", [str(path) for path in write_shards(rows, folder, "train", 4)])


def stream_of(task: Vqa, source: RecordSource, words: Path, *, training: bool) -> TaskStream:
    return TaskStream(
        task, [source], TextTokenizer.load(words), toy_config("vqa"), training=training
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data") / "shades")


# ------------------------------------------------------------------ one form of an answer


@pytest.mark.parametrize(
    ("stored", "form"),
    [("  Red\u00a0 Car ", "red car"), ("Two", "2"), ("on the left.", "on left"), ("The", "the")],
)
def test_an_answer_has_one_form_and_is_never_lost(stored, form):
    assert answer_form(stored) == form
    assert answer_form(form) == form
    assert form_or_nothing(stored) == form and form_or_nothing(" \t") == ""
    assert normalise_answer("The") == ""  # which no list could hold
    with pytest.raises(BadText):
        answer_form(" \t")


def test_list_targets_and_prior_are_normalised_alike(tmp_path):
    asked = [
        {"question": "how many dogs", "answer": "Two"},
        {"question": "how many cats", "answer": "2."},
        {"question": "where is it", "answer": "on the left"},
        {"question": "which word", "answer": "The"},
    ]
    facts = learn_facts(toy_config("vqa"), [source_of(tmp_path, [[q] for q in asked])])
    assert facts["answers"] == ["2", "on left", "the"]
    assert facts["prior"] == {"how many": "2", "where is": "on left", "which word": "the"}
    task = Vqa(VqaConfig(), facts)
    targets = [task._target(question).tolist() for question in asked]
    assert targets == [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
    for question, answer in zip(asked, ("2", "2", "on left", "the"), strict=True):
        assert answer_accuracy(answer, [question["answer"]]) == 1


def test_the_target_of_an_answer_is_the_accuracy_it_would_get():
    """Two ways: the count of annotators, and the official evaluation on what they said."""
    rng = np.random.default_rng(0)
    task = Vqa(VqaConfig(), {**FACTS, "answers": ["red", "blue", "green"]})
    for _ in range(100):
        ten = [task.answers[i] for i in rng.integers(0, 3, 10)]
        target = task._target({"question": "q", "answer": ten[0], "answers": ten})
        expected = [vqa_accuracy(answer, ten) for answer in task.answers]
        assert target.tolist() == pytest.approx(expected)


def test_with_other_numbers_of_people_three_of_them_make_an_answer_right():
    rng = np.random.default_rng(0)
    for _ in range(200):
        given = [f"a{i}" for i in rng.integers(0, 3, 10)]
        for said in ("a0", "a1", "never"):
            nine = [min(1.0, sum(a == said for a in some) / 3) for some in combinations(given, 9)]
            assert answer_accuracy(said, given) == pytest.approx(np.mean(nine))
    assert answer_accuracy("Red.", ["red"]) == 1 and answer_accuracy("red", ["blue"]) == 0
    assert answer_accuracy("red", ["red", "blue"]) == 0.5
    assert answer_accuracy("red", ["red", "red", "blue", " "]) == pytest.approx(2 / 3)
    assert answer_accuracy("red", ["red"] * 5) == 1
    assert answer_accuracy("", ["", "red"]) == 0  # who says nothing is not right


# ------------------------------------------------------------------ figures


def test_figures_by_type_are_means_of_the_official_accuracy_and_without_types_by_kind():
    rng = np.random.default_rng(1)
    types = [("number", "how many"), ("other", "what color"), ("yes/no", "is the"), ("other", "is")]
    rows = []
    for i in range(80):
        answer_type, question_type = types[rng.integers(0, 4)]
        rows.append(
            {
                "answer": str(rng.choice(FACTS["answers"])),
                "answers": [str(a) for a in rng.choice(FACTS["answers"][:3], 10)],
                "kind": question_type,
                "answer_type": answer_type,
                "question_type": question_type,
                "sample_id": str(i),
            }
        )
    found = {
        name: figure.numerator.sum() / figure.denominator.sum()
        for name, figure in Vqa(VqaConfig(), FACTS).figures(rows).items()
    }
    names = {"accuracy"} | {f"answer_type/{name}" for name, _ in types}
    assert set(found) == names | {f"question_type/{name}" for _, name in types}
    for name, value in found.items():
        field, _, group = name.partition("/")
        own = [row for row in rows if field == "accuracy" or row[field] == group]
        accuracies = [vqa_accuracy(row["answer"], row["answers"]) for row in own]
        assert value == pytest.approx(np.mean(accuracies))
    for row in rows:  # without types the first words are the kind
        row["answer_type"] = row["question_type"] = None
    names = set(Vqa(VqaConfig(), FACTS).figures(rows))
    assert names == {"accuracy"} | {f"accuracy/{name}" for _, name in types}


# ------------------------------------------------------------------ questions without an answer


ASKED = [
    [{"question": "which colour is here", "answer": "red"}, {"question": "say green"}],
    [{"question": "say blue", "answer": " "}, {"question": "say", "answer": "purple"}],
]


@pytest.mark.parametrize("training", [True, False])
def test_a_question_without_an_answer_is_skipped_by_name(training, data, tmp_path):
    source = source_of(tmp_path, ASKED)
    stream = stream_of(Vqa(VqaConfig(), FACTS), source, data, training=training)
    # Training leaves out what the list does not hold (purple), but names what has no answer.
    assert stream.records == {"vqa": 3 if training else 4}
    stream.sample(Visit("vqa", 0, 0))
    for index in (1, 2):
        with pytest.raises(BadSample, match=r"has no answer; `vlbeit eval RUN --submission FILE`"):
            stream.sample(Visit("vqa", 0, index))


def test_for_a_submission_every_question_is_a_sample(data, tmp_path):
    task = Vqa(VqaConfig(), FACTS, unanswered=True)
    stream = stream_of(task, source_of(tmp_path, ASKED), data, training=False)
    made = [stream.sample(Visit("vqa", 0, index)) for index in range(4)]
    assert [sample.targets["answers"].sum() for sample in made] == [1, 0, 0, 0]
    assert stream.about(Visit("vqa", 0, 1))["answers"] == []


@pytest.mark.parametrize("question", [{}, {"question": "q", "answer": 3}, {"question": None}])
def test_no_question_at_all_is_still_bad_json(question, data, tmp_path):
    task = Vqa(VqaConfig(), FACTS, unanswered=True)
    stream = stream_of(task, source_of(tmp_path, [[question]]), data, training=False)
    with pytest.raises(BadSample, match="bad_json"):
        stream.sample(Visit("vqa", 0, 0))


# ------------------------------------------------------------------ reading


def test_what_is_said_about_a_sample_is_read_without_its_picture(data, monkeypatch):
    source = open_sources([data], "task:vqa", "val")[0]
    stream = stream_of(Vqa(VqaConfig(), FACTS), source, data, training=False)
    whole = [stream._task.about(source.read(i), n) for i in range(VAL) for n in range(2)]
    asked = []
    read = RecordSource.read

    def spy(self: RecordSource, index: int, only: Any = None) -> Any:
        found = read(self, index, only)
        asked.append(set(found.members))
        return found

    monkeypatch.setattr(RecordSource, "read", spy)
    found = [stream.about(Visit("vqa", 0, i)) for i in range(2 * VAL)]
    assert asked == [{"json"}] * (2 * VAL)
    assert [{k: v for k, v in row.items() if k != "record"} for row in found] == whole


def test_a_fresh_head_says_of_each_answer_how_often_it_is_given(tmp_path):
    asked = [{"question": f"what is {n} ?", "answer": "yes" if n < 6 else "no"} for n in range(8)]
    facts = learn_facts(toy_config("vqa"), [source_of(tmp_path, [[q] for q in asked])])
    task = Vqa(VqaConfig(), facts)
    assert facts["answers"] == ["yes", "no"]
    head = task.head(VLBeit(toy_config("vqa").model), seed=0)
    torch.testing.assert_close(head.fc2.bias.sigmoid(), torch.tensor([6 / 8, 2 / 8]))


def test_the_shuffle_window_counts_records_however_many_questions_each_has(tmp_path, data):
    # Shards that differ: the first holds questions 0 to 19, the second 20 to 39. Two windows of
    # eight questions would come from one shard, one of eight records is all there is.
    asked = [[{"question": "how many", "answer": "2"}] * 5] * 8
    source, task = source_of(tmp_path, asked), Vqa(VqaConfig(), FACTS)
    (order,) = stream_of(task, source, data, training=True).orders(window=8, bucket=1)
    drawn = order.ids(0, 40)
    assert sorted(drawn.tolist()) == list(range(40))
    first = (drawn[:16] < 20).sum()
    assert 2 <= first <= 14, f"{first} of the first 16 questions are of the first shard"
