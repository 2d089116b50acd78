"""VQA accuracy against a second, plodding implementation of the official rule.

The second one is written here from the official tool's description and behaviour, record by record
and letter by letter, and shares nothing with the package. What it is held against is the way of
`vlbeit eval`: the task's `about` and `figures`, and the driver's `estimates`.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from vlbeit.config import VqaConfig
from vlbeit.data.records import Record
from vlbeit.data.vqa_answers import vqa_accuracy
from vlbeit.draws import Draws
from vlbeit.eval.downstream import estimates
from vlbeit.tasks import Figure
from vlbeit.tasks.vqa import Vqa

# -- the second implementation ---------------------------------------------------------------

SPELLINGS = dict(
    pair.split(":")
    for pair in """
    aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've
    couldnt've:couldn't've didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've
    hadn'tve:hadn't've hasnt:hasn't havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's
    howd:how'd howll:how'll hows:how's isnt:isn't itd:it'd itd've:it'd've it'dve:it'd've itll:it'll
    maam:ma'am mightnt:mightn't mightnt've:mightn't've mightn'tve:mightn't've mightve:might've
    mustnt:mustn't mustve:must've neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't
    shant:shan't shed've:she'd've she'dve:she'd've shouldve:should've shouldnt:shouldn't
    somebodyll:somebody'll somebodys:somebody's someoned:someone'd someonell:someone'll
    someones:someone's somethingd:something'd somethingll:something'll thats:that's thered:there'd
    therere:there're theres:there's theyd:they'd theyll:they'll theyre:they're theyve:they've
    twas:'twas wasnt:wasn't weve:we've werent:weren't whatll:what'll whatre:what're whats:what's
    whatve:what've whens:when's whered:where'd wheres:where's whereve:where've whod:who'd
    wholl:who'll whos:who's whove:who've whyll:why'll whyre:why're whys:why's wont:won't
    wouldve:would've wouldnt:wouldn't yall:y'all youd:you'd youll:you'll youre:you're youve:you've
    """.split()
)
DIGITS = {w: str(n) for n, w in enumerate(
    ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
)}  # fmt: skip
DIGITS["none"] = "0"
MARKS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@",
         "`", ",", "?", "!"]  # fmt: skip


def process_punctuation(text: str) -> str:
    thousands = any(
        text[i - 1].isdigit() and text[i] == "," and text[i + 1].isdigit()
        for i in range(1, len(text) - 1)
    )
    out = text
    for mark in MARKS:
        beside_blank = (mark + " ") in text or (" " + mark) in text
        out = out.replace(mark, "" if beside_blank or thousands else " ")
    kept, gone = [], 0
    for i, letter in enumerate(out):
        number_follows = i + 1 < len(out) and out[i + 1].isdigit()
        if letter == "." and not number_follows and gone < 32:
            gone += 1
        else:
            kept.append(letter)
    return "".join(kept)


def process_digit_article(text: str) -> str:
    words = []
    for word in text.lower().split():
        word = DIGITS.get(word, word)
        if word not in ("a", "an", "the"):
            words.append(SPELLINGS.get(word, word))
    return " ".join(words)


def official(prediction: str, annotation: dict) -> float:
    """One question as the tool's loop treats it."""
    records = [dict(record) for record in annotation["answers"]]
    for record in records:
        record["answer"] = record["answer"].replace("\n", " ").replace("\t", " ").strip()
    said = prediction.replace("\n", " ").replace("\t", " ").strip()
    if len({record["answer"] for record in records}) > 1:
        for record in records:
            record["answer"] = process_digit_article(process_punctuation(record["answer"]))
        said = process_digit_article(process_punctuation(said))
    accuracies = []
    for left_out in records:
        others = [record for record in records if record != left_out]
        agreeing = [record for record in others if record["answer"] == said]
        accuracies.append(min(1, float(len(agreeing)) / 3))
    return float(sum(accuracies)) / len(accuracies)


# -- the data --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def annotations(shared_data: Path) -> list[dict]:
    file = shared_data / "vqa_v2_micro" / "v2_mscoco_train2014_annotations.json"
    return json.loads(file.read_text())["annotations"]


def disguised(text: str, draws: Draws) -> str:
    """The same answer, or another one, in one of many spellings."""
    turn = draws.integer(0, 14)
    words = text.split() or [""]
    if turn == 0:
        return text.upper()
    if turn == 1:
        return f"the {text}"
    if turn == 2:
        return f" {text}.\n"
    if turn == 3:
        return "-".join(words)
    if turn == 4:
        return ", ".join(words)
    if turn == 5:
        return f"{text}\t!"
    if turn == 6:
        names = {number: word for word, number in DIGITS.items()}
        return " ".join(names.get(word, word) for word in words)
    if turn == 7:
        return text.replace("'", "")
    if turn == 8:
        return f"{text} {draws.choice(sorted(SPELLINGS))}"
    if turn == 9:
        return f"{draws.choice(['1,000', '2.5', 'U.S.', 'a', 'none'])} {text}"
    if turn == 10:
        return "".join(draws.choice(MARKS + list(" .'ab19")) for _ in range(draws.integer(0, 9)))
    return text


@pytest.fixture(scope="module")
def scored(annotations: list[dict]) -> list[tuple[str, dict, float]]:
    """Prediction, annotation and the second implementation's accuracy, 10,000 times."""
    made = predictions(annotations, 10_000)
    return [(said, one, official(said, one)) for said, one in made]


def predictions(annotations: list[dict], count: int) -> list[tuple[str, dict]]:
    draws = Draws("vqa accuracy test")
    every = [record["answer"] for one in annotations for record in one["answers"]]
    made = []
    for number in range(count):
        one = annotations[number % len(annotations)]
        own = [record["answer"] for record in one["answers"]]
        word = draws.choice(own if draws.uniform() < 0.7 else every)
        made.append((disguised(word, draws), one))
    return made


def question_record(one: dict) -> Record:
    """The annotation as `prepare vqav2` stores it, without the picture."""
    question = {
        "question": "?",
        "answer": one["multiple_choice_answer"],
        "answers": [record["answer"] for record in one["answers"]],
        "answer_type": one["answer_type"],
        "question_type": one["question_type"],
    }
    return Record("0000", "q.tar", {"json": json.dumps({"questions": [question]}).encode()})


def figures_of(scored: list[tuple[str, dict, float]]) -> dict[str, Figure]:
    """What `vlbeit eval` makes of its rows: what was said, beside what the task's record says."""
    task = Vqa(VqaConfig(), {"answers": ["yes"], "prior": {}, "most_frequent": "yes"})
    return task.figures(
        [{"answer": said, **task.about(question_record(one), 0)} for said, one, _ in scored]
    )


# -- the laws --------------------------------------------------------------------------------


def test_ten_thousand_predictions_score_as_a_second_implementation_of_the_official_rule(
    scored,
):
    found = figures_of(scored)["accuracy"]
    expected = np.array([accuracy for _, _, accuracy in scored])
    assert len(expected) == 10_000 and (found.denominator == 1).all()
    assert np.abs(found.numerator - expected).max() <= 1e-12
    for value in (0.0, 0.3, 0.6, 0.9, 1.0):
        assert np.isclose(expected, value).sum() > 100, value  # every case came up
    blind = np.array([official("yes", one) for _, one, _ in scored])
    assert found.baseline is not None and np.abs(found.baseline[0] - blind).max() <= 1e-12
    records = [str(one["image_id"]) for _, one, _ in scored]
    told = estimates({"accuracy": found}, records)["accuracy"]
    assert told["value"] == pytest.approx(expected.mean(), abs=1e-12)
    assert told["baseline"]["value"] == pytest.approx(blind.mean(), abs=1e-12)


def test_each_part_of_the_rule_is_seen_by_the_comparison(scored):
    """The negative control: a rule without one of its parts differs on the same predictions."""

    def normalise(text: str) -> str:
        return process_digit_article(process_punctuation(text.strip()))

    def without(part: str, said: str, answers: list[str]) -> float:
        if part == "normalisation":
            same = answers.count(said)
            return 1.0 if same > 3 else 0.3 * same
        same = sum(normalise(answer) == normalise(said) for answer in answers)
        if part == "leaving one out":
            return min(1.0, same / 3)
        return 1.0 if same > 3 else 0.3 * same  # normalised even where all ten agree

    for part in ("normalisation", "leaving one out", "the rule for ten equal answers"):
        different = sum(
            abs(without(part, said, [r["answer"] for r in one["answers"]]) - expected) > 1e-9
            for said, one, expected in scored
        )
        assert different > 100, part


@pytest.mark.parametrize(
    ("same", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)]
)
def test_the_accuracy_of_so_many_equal_answers(same, accuracy):
    answers = ["dog"] * same + [f"cat {i}" for i in range(10 - same)]
    assert vqa_accuracy("A dog!", answers) == pytest.approx(accuracy)


def test_where_all_ten_agree_nothing_is_normalised():
    assert vqa_accuracy("2", ["2"] * 10) == 1
    assert vqa_accuracy(" 2\n", ["2", "2\t"] * 5) == 1
    assert vqa_accuracy("two", ["2"] * 10) == 0
    assert vqa_accuracy("two", ["2"] * 9 + ["3"]) == 1
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0
    assert vqa_accuracy("Yes", ["Yes"] * 10) == 1


def test_figures_by_type_mean_over_the_questions_of_each(scored):
    found = figures_of(scored)
    expected = {"accuracy": [accuracy for _, _, accuracy in scored]}
    for field in ("answer_type", "question_type"):
        for _, one, accuracy in scored:
            expected.setdefault(f"{field}/{one[field]}", []).append(accuracy)
    assert {"answer_type/yes/no", "answer_type/number", "answer_type/other"} < set(expected)
    assert set(found) == set(expected)
    for name, own in expected.items():
        assert found[name].denominator.sum() == len(own)
        assert found[name].numerator.sum() == pytest.approx(sum(own))
    for name, figure in figures_of(scored[::-1]).items():
        assert np.array_equal(figure.numerator[::-1], found[name].numerator)


def test_other_numbers_of_answers_are_refused():
    with pytest.raises(ValueError, match="3 answers; the official accuracy needs 10"):
        vqa_accuracy("dog", ["dog"] * 3)
