"""VQA accuracy as the official evaluation counts it (GT-Vision-Lab/VQA, vqaEval.py).

Ten people answered each question. A prediction is held against nine of them at a time: it scores
min(1, how many of the nine say the same / 3), and the mean over the ten ways to leave one out is
its accuracy. So 0, 1, 2, 3 and 4 or more equal answers give 0, 0.3, 0.6, 0.9 and 1.

Three things in which the tool is stranger than its description, kept because the figure must be
comparable:
  - Both sides are normalised only if the ten answers are not all the same string. Where everybody
    said "2", "two" is wrong, and so is "Yes" where everybody said "yes".
  - Being the same string is asked after line breaks and tabs became blanks and the ends were
    stripped, which happens always, but before anything else.
  - Of two equal answers only one is left out at a time: the tool compares whole records, which
    differ in their number.
The tool rounds percentages to two digits; nothing is rounded here. Releases of the tool before
2017 normalised less of the people's answers; this is the later one, which the challenge used.
"""

from collections.abc import Sequence

from vlbeit.data.vqa_answers import form_or_nothing, normalise_answer

PEOPLE = 10
"""Answers to a question of VQA v2."""


def single_spaced_ends(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The accuracy of one prediction, in [0, 1].

    Raises:
        ValueError: there are not ten answers; with fewer the rule cannot reach 1.
    """
    if len(answers) != PEOPLE:
        raise ValueError(f"{len(answers)} answers; the official accuracy needs {PEOPLE}")
    said = single_spaced_ends(prediction)
    given = [single_spaced_ends(answer) for answer in answers]
    if len(set(given)) > 1:
        said = normalise_answer(said)
        given = [normalise_answer(answer) for answer in given]
    return score_of(given.count(said), PEOPLE)


def score_of(same: int, people: int) -> float:
    """The score of an answer that `same` of `people` gave: 0, 0.3, 0.6, 0.9, 1 of ten. Of another
    number min(1, same / 3), the rule without leaving one out; with fewer than three, all of them
    make it 1."""
    if people != PEOPLE:
        return min(1.0, same / min(3, people))
    # The same others remain when one of those who disagree is left out, one less otherwise.
    tenths = (PEOPLE - same) * min(3, same) + same * min(3, max(same - 1, 0))
    return tenths / (3 * PEOPLE)


def answer_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """`vqa_accuracy` where ten people answered; else `score_of` those whose answer has the same
    form.

    Args:
        answers: as stored, at least one.
    """
    if len(answers) == PEOPLE:
        return vqa_accuracy(prediction, answers)
    said = form_or_nothing(prediction)
    same = sum(form_or_nothing(answer) == said for answer in answers) if said else 0
    return score_of(same, len(answers))
