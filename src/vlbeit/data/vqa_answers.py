"""Answers to visual questions as the official VQA evaluation compares and scores them.

The rule is that of the VQA authors' evaluation tool (GT-Vision-Lab/VQA, vqaEval.py), oddities
included: a score that anybody shall be able to compare has to normalise as that tool does.

Ten people answered each question. A prediction is held against nine of them at a time: it scores
min(1, how many of the nine say the same / 3), and the mean over the ten ways to leave one out is
its accuracy. So 0, 1, 2, 3 and 4 or more equal answers give 0, 0.3, 0.6, 0.9 and 1.

Three things in which the tool is stranger than its description:
  - Both sides are normalised only if the ten answers are not all the same string. Where everybody
    said "2", "two" is wrong, and so is "Yes" where everybody said "yes".
  - Being the same string is asked after line breaks and tabs became blanks and the ends were
    stripped, which happens always, but before anything else.
  - Of two equal answers only one is left out at a time: the tool compares whole records, which
    differ in their number.
The tool rounds percentages to two digits; nothing is rounded here. Releases of the tool before
2017 normalised less of the people's answers; this is the later one, which the challenge used.
"""

import functools
import re
from collections.abc import Sequence
from typing import Final

from vlbeit.data.transforms import BadText, clean_text

PEOPLE: Final = 10
"""Answers to a question of VQA v2."""
NUMBERS: Final = {
    word: str(value)
    for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
ARTICLES: Final = frozenset(("a", "an", "the"))

_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't
    mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
    should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't
    what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
    who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
    you'd've you'll you're you've
"""
CONTRACTIONS: Final = {
    word[:at] + word[at + 1 :]: word
    for word in _CONTRACTIONS.split()
    for at, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}
"""Spelling with one apostrophe missing -> spelling. The last one is the tool's own slip; kept."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32
"""The tool passes re.UNICODE, which is 32, where `sub` takes the largest number of replacements."""
_THOUSANDS = re.compile(r"\d,\d")


def strip_punctuation(text: str) -> str:
    """Without punctuation: a mark beside a blank goes, one between letters becomes a blank.

    In a text with a number such as 1,000 every mark goes without a blank. A full stop goes unless
    a digit follows it; apostrophes and colons stay.
    """
    thousands = _THOUSANDS.search(text) is not None
    stripped = text
    for mark in _PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if beside_blank or thousands else " ")
    return _PERIOD.sub("", stripped, count=_MOST_PERIODS)


def normalise_words(text: str) -> str:
    """Lower case, single blanks, number words up to ten as digits, no articles, apostrophes put
    back into contractions."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def single_spaced_ends(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalise_answer(text: str) -> str:
    """An answer as the evaluation compares it; may be empty (of "the" nothing is left).

    >>> normalise_answer("Two  dogs, on the left.")
    '2 dogs on left'
    """
    return normalise_words(strip_punctuation(single_spaced_ends(text)))


@functools.lru_cache(maxsize=1 << 16)
def answer_form(text: str) -> str:
    """An answer as it stands in answer lists, targets and comparisons: cleaned and normalised.
    Where that leaves nothing ("the"), the cleaned text in lower case.

    Raises:
        BadText: there is nothing in it.
    """
    cleaned = clean_text(text)
    return normalise_answer(cleaned) or cleaned.lower()


def form_or_nothing(text: str) -> str:
    """`answer_form`, empty where there is nothing in the text."""
    try:
        return answer_form(text)
    except BadText:
        return ""


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
