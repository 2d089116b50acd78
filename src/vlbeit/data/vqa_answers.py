"""Answers to visual questions as the official VQA evaluation compares them.

The rule is that of the VQA authors' evaluation tool (GT-Vision-Lab/VQA, vqaEval.py), oddities
included: a score that anybody shall be able to compare has to normalise as that tool does.
"""

import functools
import re
from typing import Final

from vlbeit.data.transforms import BadText, clean_text

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


def normalise_answer(text: str) -> str:
    """An answer as the evaluation compares it; may be empty (of "the" nothing is left).

    >>> normalise_answer("Two  dogs, on the left.")
    '2 dogs on left'
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return normalise_words(strip_punctuation(text))


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
