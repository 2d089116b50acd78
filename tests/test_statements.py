"""Figures of statements and entailment against counting by hand; NLVR2's rule of consistency."""

import json
import random

import pytest

from vlbeit.data.records import BadSample, Record
from vlbeit.eval.downstream import value_of
from vlbeit.tasks.entailment import CLASSES, Entailment
from vlbeit.tasks.statements import Statements, picture, sentence_of


def values(figures, baseline: bool = False) -> dict[str, float]:
    return {
        name: value_of(*(f.baseline if baseline else (f.numerator, f.denominator)))
        for name, f in figures.items()
    }


def judged(count: int = 60) -> list[dict[str, object]]:
    """Rows in no order, four to a sentence; the last sentence is cut short."""
    draw = random.Random(1)
    rows = [
        {
            "identifier": f"dev-{i // 8}-{i % 4}-{i // 4 % 2}",
            "kind": ("left", "both", "one")[i // 4 % 3],
            "truth": draw.random() < 0.6,
            "answer": True,
        }
        for i in range(count - 2)
    ]
    for row in rows:
        row["answer"] = row["truth"] if draw.random() < 0.8 else not row["truth"]
    draw.shuffle(rows)
    return rows


TASK = Statements({"prior": {"left": False, "both": True, "one": True}, "most_frequent": True})


def official(rows: list[dict[str, object]], answers: list[object]) -> tuple[float, float]:
    """NLVR2's nlvr2/eval/metrics.py in other words: precision and consistency."""
    by_sentence: dict[tuple[str, ...], list[bool]] = {}
    for row, answer in zip(rows, answers, strict=True):
        part, group, _, sentence = str(row["identifier"]).split("-")
        by_sentence.setdefault((part, group, sentence), []).append(answer == row["truth"])
    right = [r for group in by_sentence.values() for r in group]
    return sum(right) / len(right), sum(map(all, by_sentence.values())) / len(by_sentence)


def test_accuracy_and_consistency_are_the_official_ones_and_so_are_the_guesses():
    rows = judged()
    figures = TASK.figures(rows)
    precision, consistent = official(rows, [row["answer"] for row in rows])
    found = values(figures)
    assert list(found)[:2] == ["accuracy", "consistency"]
    assert found["accuracy"] == pytest.approx(precision)
    assert found["consistency"] == pytest.approx(consistent)
    assert 0 < consistent < precision < 1
    guesses = official(rows, [row["kind"] != "left" for row in rows])
    blind = values(figures, baseline=True)
    assert (blind["accuracy"], blind["consistency"]) == pytest.approx(guesses)


def test_accuracy_of_a_kind_counts_its_own_statements_only():
    rows = judged()
    found = values(TASK.figures(rows))
    for kind in ("left", "both", "one"):
        own = [row["answer"] == row["truth"] for row in rows if row["kind"] == kind]
        assert found[f"accuracy/{kind}"] == pytest.approx(sum(own) / len(own))


def test_figures_do_not_depend_on_the_order_of_the_rows():
    rows = judged()
    assert values(TASK.figures(rows)) == pytest.approx(values(TASK.figures(rows[::-1])))


def test_without_kinds_and_shared_sentences_there_is_accuracy_alone():
    rows = [row | {"kind": "", "identifier": i} for i, row in enumerate(judged())]
    assert set(TASK.figures(rows)) == {"accuracy"}
    alone = [row | {"kind": "", "identifier": f"dev-{i}-0-0"} for i, row in enumerate(judged())]
    assert set(TASK.figures(alone)) == {"accuracy"}
    nameless = [row | {"kind": "", "identifier": None} for row in judged()]
    assert set(TASK.figures(nameless)) == {"accuracy"}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("dev-850-0-0", "dev-850-3-0", True),
        ("dev-850-0-0", "dev-850-0-1", False),
        ("dev-850-0-0", "test1-850-0-0", False),
        ("dev-850-0-0", "dev-851-0-0", False),
    ],
)
def test_records_of_one_sentence_differ_in_the_pair_alone(one, other, same):
    assert (sentence_of(one) == sentence_of(other)) == same
    assert sentence_of("12") == sentence_of("a-b") == sentence_of("None") == ""


def test_identifiers_of_nlvr2_that_we_group_share_their_sentence(shared_data):
    path = shared_data / "official_formats" / "nlvr2_dev_sample.json"
    groups: dict[str, set[str]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        groups.setdefault(sentence_of(row["identifier"]), set()).add(row["sentence"])
    assert len(groups) > 20 and all(len(sentences) == 1 for sentences in groups.values())


def test_a_picture_of_any_format_is_found_and_a_missing_side_is_named():
    record = Record("7", "shard", {"left.jpg": b"l", "right.webp": b"r", "json": b"{}"})
    assert (picture(record, "left"), picture(record, "right")) == (b"l", b"r")
    with pytest.raises(BadSample, match="no right picture; it has left.jpg, json"):
        picture(Record("7", "shard", {"left.jpg": b"l", "json": b"{}"}), "right")


def test_entailment_counts_by_label_beside_the_most_frequent_label():
    draw = random.Random(2)
    rows = [{"label": draw.choice((0, 0, 1, 2)), "answer": draw.randrange(3)} for _ in range(50)]
    found = Entailment({"most_frequent": 0}).figures(rows)
    shares = values(found)
    assert shares["accuracy"] == sum(r["label"] == r["answer"] for r in rows) / 50
    baseline = found["accuracy"].baseline
    assert baseline is not None
    assert value_of(*baseline) == sum(r["label"] == 0 for r in rows) / 50
    for label, name in enumerate(CLASSES):
        own = [r["answer"] == label for r in rows if r["label"] == label]
        assert shares[f"accuracy/{name}"] == pytest.approx(sum(own) / len(own))
