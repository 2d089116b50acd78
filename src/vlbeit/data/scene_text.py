"""What is said about the drawn world: captions, questions with answers, statements.

Captions are written as a catalogue writes ("three x small red star"), so that no ending agrees
with a count. Every template has a length of its own, so that the kind of a hidden word is known
even when half of the words are hidden, while its value is not: see scene_world for why.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Final, NamedTuple

from vlbeit.data.scene_world import (
    COLOURS,
    COUNTS,
    DIRECTIONS,
    PATTERNS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    TONES,
    Ground,
    Group,
    World,
    draw_world,
)
from vlbeit.draws import Draws

ATTRIBUTE_WORDS: Final[dict[str, tuple[str, ...]]] = {
    "colour": COLOURS,
    "shape": SHAPES,
    "size": SIZES,
    "count": COUNTS,
    "place": tuple(dict.fromkeys(PLACES + DIRECTIONS)),
    "texture": TEXTURES,
    "tone": TONES,
    "pattern": PATTERNS,
}
"""The words of each kind; no word belongs to two kinds. Everything else is a function word."""

KIND_OF: Final[dict[str, str]] = {
    word: kind for kind, words in ATTRIBUTE_WORDS.items() for word in words
}

_DESCRIBING: Final = ("size", "texture", "colour", "shape")
"""Kinds that may describe a figure in a question or statement, in English word order."""


EXISTENCE: Final = 3
"""Questions a scene whether something is there. With one they stayed at chance beside the others;
three, in steps of 128 questions at a lower rate, were learned. Which of these changes it took was
not tried one by one (docs/notebook.md)."""


Feature = tuple[tuple[str, str], ...]
"""Values by kind that one group must have together, such as (("colour", "red"),)."""


class Question(NamedTuple):
    """One question about one picture. `kind` is the attribute asked for, or exists, relation."""

    text: str
    answer: str
    kind: str


class Comparison(NamedTuple):
    """A statement about two worlds. `kind` is one of STATEMENT_KINDS."""

    text: str
    truth: bool
    kind: str
    left: World
    right: World


# --- captions ---------------------------------------------------------------------------------


def captions(world: World, draws: Draws) -> tuple[str, ...]:
    """Five captions of the world, the last one the fullest (`describe`).

    Which of two groups comes first is drawn anew for every caption.
    """
    if len(world.groups) == 1:
        return _captions_of_one(world.groups[0], world.ground)
    swapped = draws.uniforms(5) < 0.5
    pairs = [world.groups[::-1] if swap else world.groups for swap in swapped]
    a, b = pairs[0]
    first = f"{_figure(a)} with {_figure(b)} {direction(b)}"
    a, b = pairs[1]
    second = (
        f"{a.count} x {a.texture} {a.colour} {a.shape} and {direction(b)} "
        f"{b.count} x {b.texture} {b.colour} {b.shape}"
    )
    a, b = pairs[2]
    third = f"look {direction(b)} from {_figure(a)} to {b.count} x {b.size} {b.colour} {b.shape}"
    a, b = pairs[3]
    return first, second, third, _at_place(pairs[4][0]), describe(World((a, b), world.ground))


def describe(world: World) -> str:
    """The caption with every attribute of every figure (not of the ground)."""
    if len(world.groups) == 1:
        (g,) = world.groups
        return f"{g.count} x {_figure(g)} {g.place}"
    a, b = world.groups
    return f"{a.count} x {_figure(a)} and {direction(b)} {b.count} x {_figure(b)}"


def direction(group: Group) -> str:
    """Where this group lies as seen from the other one of its scene."""
    return {"left": "left", "right": "right", "top": "above", "bottom": "below"}[group.place]


def _captions_of_one(g: Group, ground: Ground) -> tuple[str, ...]:
    return (
        f"{g.size} {g.colour} {g.shape} at the {g.place}",
        f"{g.size} {g.texture} {g.shape} in {g.colour} at the {g.place}",
        _at_place(g),
        f"on a {ground.tone} {ground.pattern} ground {g.count} x {_figure(g)}",
        describe(World((g,), ground)),
    )


def _at_place(g: Group) -> str:
    return f"at the {g.place} {g.count} x {_figure(g)}"


def _figure(g: Group) -> str:
    """One figure of the group, all that can be said of it alone."""
    return f"{g.size} {g.texture} {g.colour} {g.shape}"


def prior_by_kind(lines: Iterable[str]) -> dict[str, float]:
    """The share of the most frequent word among the words of each kind: what a guesser reaches
    who knows the kind of a hidden word and nothing else. Kinds without a word are left out."""
    counts: dict[str, Counter[str]] = {}
    for line in lines:
        for word in line.split():
            if word in KIND_OF:
                counts.setdefault(KIND_OF[word], Counter())[word] += 1
    return {kind: max(c.values()) / c.total() for kind, c in sorted(counts.items())}


# --- questions --------------------------------------------------------------------------------

_ASK: Final = {
    "colour": "what colour is the {} ?",
    "shape": "what shape is the {} ?",
    "size": "what size is the {} ?",
    "texture": "what texture is the {} ?",
    "count": "how many of the {} are there ?",
    "place": "where is the {} ?",
}


def questions(world: World, draws: Draws) -> tuple[Question, ...]:
    """Six or seven questions: three about attributes of different kinds, `EXISTENCE` whether
    something is there, and with two groups one about how they lie.

    A question names exactly one group by values other than the one it asks for. Since values
    are independent and yes and no are equally likely, its words say nothing about its answer.
    """
    kinds = (*_ASK, "ground")
    asked: list[Question] = []
    for index in draws.permutation(len(kinds)).tolist():
        kind = kinds[index]
        if kind == "ground":
            asked.append(Question("what tone has the ground ?", world.ground.tone, kind))
        else:
            group = draws.choice(world.groups)
            name = _name(world, group, kind, draws)
            if name is not None:
                asked.append(Question(_ASK[kind].format(name), getattr(group, kind), kind))
        if len(asked) == 3:
            break
    existence: list[Question] = []
    while len(existence) < EXISTENCE:
        question = _ask_existence(world, draws)
        if question not in existence:
            existence.append(question)
    asked.extend(existence)
    if len(world.groups) == 2:
        asked.extend(_ask_relation(world, draws))
    return tuple(asked)


def shows(world: World, wanted: Feature) -> bool:
    """Whether one group has all these values."""
    return any(all(getattr(g, kind) == value for kind, value in wanted) for g in world.groups)


def phrase(wanted: Feature) -> str:
    """Values in English order; "figure" where the shape is not among them.

    >>> phrase((("colour", "red"), ("size", "small")))
    'small red figure'
    """
    values = {"shape": "figure", **dict(wanted)}
    return " ".join(values[kind] for kind in _DESCRIBING if kind in values)


def _article(wanted: Feature) -> str:
    words = phrase(wanted)
    return f"{'an' if words.startswith('orange') else 'a'} {words}"


def _name(world: World, group: Group, asked: str, draws: Draws) -> str | None:
    """A phrase true of this group alone that does not use the kind asked for, or None."""
    kinds = [kind for kind in _DESCRIBING if kind != asked]
    order = [kinds[i] for i in draws.permutation(len(kinds)).tolist()]
    for used in range(1 + draws.integer(0, 2), len(order) + 1):
        wanted = tuple((kind, str(getattr(group, kind))) for kind in order[:used])
        others = [g for g in world.groups if g is not group]
        if not any(shows(World((g,), world.ground), wanted) for g in others):
            return phrase(wanted)
    return None if asked == "place" else f"figure at the {group.place}"


def _ask_existence(world: World, draws: Draws) -> Question:
    truth = draws.uniform() < 0.5
    wanted = _draw_feature(draws, 2, draws.choice(world.groups))
    while not truth and shows(world, wanted):
        wanted = tuple((kind, draws.choice(ATTRIBUTE_WORDS[kind])) for kind, _ in wanted)
    return Question(f"is there {_article(wanted)} ?", "yes" if truth else "no", "exists")


def _draw_feature(draws: Draws, kinds: int, group: Group | None = None) -> Feature:
    """Values of that many kinds, chosen by lot: those of the group, or uniform without one."""
    chosen = [_DESCRIBING[i] for i in sorted(draws.permutation(len(_DESCRIBING))[:kinds].tolist())]
    if group is None:
        return tuple((kind, draws.choice(ATTRIBUTE_WORDS[kind])) for kind in chosen)
    return tuple((kind, str(getattr(group, kind))) for kind in chosen)


def _ask_relation(world: World, draws: Draws) -> list[Question]:
    a, b = world.groups if draws.uniform() < 0.5 else world.groups[::-1]
    names = [_name(world, g, "place", draws) for g in (a, b)]
    if None in names:  # two groups that differ in number only
        return []
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    truth = draws.uniform() < 0.5
    word = direction(a) if truth else opposite[direction(a)]
    relation = f"{word} of" if word in ("left", "right") else word
    text = f"is the {names[0]} {relation} the {names[1]} ?"
    return [Question(text, "yes" if truth else "no", "relation")]


# --- statements about two pictures --------------------------------------------------------------

_SHOWN: Final[dict[str, tuple[str, dict[bool, tuple[tuple[bool, bool], ...]]]]] = {
    # kind: text, and by truth the (left, right) pictures that show the feature
    "left": (
        "the left picture shows {} .",
        {True: ((True, False), (True, True)), False: ((False, False), (False, True))},
    ),
    "right": (
        "the right picture shows {} .",
        {True: ((False, True), (True, True)), False: ((False, False), (True, False))},
    ),
    "both": (
        "both pictures show {} .",
        {True: ((True, True),), False: ((True, False), (False, True))},
    ),
    "one": (
        "exactly one picture shows {} .",
        # False with neither three times in four: were it as often both, what one picture shows
        # would say nothing of the truth, and `tiny` then never looks (docs/notebook.md).
        {True: ((True, False), (False, True)), False: ((True, True), *((False, False),) * 3)},
    ),
    "none": (
        "no picture shows {} .",
        {True: ((False, False),), False: ((True, False), (False, True))},
    ),
}
STATEMENT_KINDS: Final = (*_SHOWN, "more")


def draw_comparison(draws: Draws) -> Comparison:
    """A statement and its two worlds by lot.

    Kind, truth and feature are drawn first and independently, then worlds that make it so: the
    words alone leave the truth at one half.
    """
    kind, truth = draws.choice(STATEMENT_KINDS), draws.uniform() < 0.5
    if kind == "more":
        side = draws.choice(("left", "right"))
        text = f"the {side} picture shows more figures than the other picture ."
        while True:
            left, right = draw_world(draws), draw_world(draws)
            surplus = figures(left) - figures(right)
            if surplus and (surplus > 0) == (truth == (side == "left")):
                return Comparison(text, truth, kind, left, right)
    text, sides = _SHOWN[kind]
    feature = _draw_feature(draws, draws.choice((1, 2)))
    on_left, on_right = draws.choice(sides[truth])
    left = _world_that_shows(draws, feature, on_left)
    right = _world_that_shows(draws, feature, on_right)
    return Comparison(text.format(_article(feature)), truth, kind, left, right)


def figures(world: World) -> int:
    """How many figures the picture shows."""
    return sum(1 + COUNTS.index(group.count) for group in world.groups)


def _world_that_shows(draws: Draws, feature: Feature, wanted: bool) -> World:
    while True:
        world = draw_world(draws, feature if wanted else ())
        if shows(world, feature) == wanted:
            return world
