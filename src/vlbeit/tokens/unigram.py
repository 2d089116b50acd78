"""Training of a Unigram vocabulary, the same one every time.

The trainer inside `tokenizers` walks over hash maps with a random seed, so two runs on the same
text give other scores, and near ties other pieces. A pretraining run that trains its own
vocabulary would then not repeat. This is the same algorithm (Kudo 2018, as in SentencePiece:
seed with frequent substrings, EM, prune the pieces that are cheapest to lose) on NumPy arrays in
a fixed order. Encoding stays with `tokenizers`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LONGEST_PIECE = 16
LONGEST_WORD = 40
"""Longer words are left out of training; it also keeps products of probabilities above the
smallest float64."""
MOST_WORDS = 400_000
"""Most different words that are looked at, the frequent ones first."""
MOST_SEEDS = 1_000_000
SHRINK = 0.75
EM_STEPS = 2


@dataclass(frozen=True)
class _Lattice:
    """All ways to cut each word into pieces.

    A node is a position in a word, an arc a piece between two nodes. Arcs are sorted by the
    position in the word where they end, then by their end node.
    """

    nodes: int
    first: np.ndarray  # (words,) node before the first character
    last: np.ndarray  # (words,) node after the last character
    word: np.ndarray  # (arcs,)
    start: np.ndarray  # (arcs,) node
    end: np.ndarray  # (arcs,) node
    piece: np.ndarray  # (arcs,)
    depth: np.ndarray  # (arcs,) position in the word where the arc ends

    def keep(self, arcs: np.ndarray, renamed: np.ndarray) -> "_Lattice":
        """Only the chosen arcs (bool), their pieces under new numbers."""
        return _Lattice(
            self.nodes,
            self.first,
            self.last,
            self.word[arcs],
            self.start[arcs],
            self.end[arcs],
            renamed[self.piece[arcs]],
            self.depth[arcs],
        )

    def layers(self, key: np.ndarray) -> list[slice]:
        """Slices of the arcs with equal depth (arcs are sorted by it)."""
        edges = np.flatnonzero(np.diff(key)) + 1
        bounds = [0, *edges.tolist(), len(key)]
        return [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if b > a]


def _build_lattice(
    words: Sequence[str], index: Mapping[str, int], *, whole: bool = True
) -> _Lattice:
    """Arcs for every piece of `index` inside every word; `whole`: also the word itself."""
    word, start, end, piece, depth = [], [], [], [], []
    first = np.zeros(len(words), dtype=np.int64)
    last = np.zeros(len(words), dtype=np.int64)
    node = 0
    for number, text in enumerate(words):
        length = len(text)
        first[number], last[number] = node, node + length
        for stop in range(1, length + 1):
            for begin in range(max(0, stop - LONGEST_PIECE), stop):
                found = index.get(text[begin:stop])
                if found is not None and (whole or stop - begin < length):
                    word.append(number)
                    start.append(node + begin)
                    end.append(node + stop)
                    piece.append(found)
                    depth.append(stop)
        node += length + 1
    order = np.argsort(np.asarray(depth), kind="stable")
    arrays = [np.asarray(a, dtype=np.int64)[order] for a in (word, start, end, piece, depth)]
    return _Lattice(node, first, last, *arrays)


def _expected_counts(lattice: _Lattice, counts: np.ndarray, logp: np.ndarray) -> np.ndarray:
    """How often each piece is expected in the words: forward and backward sums."""
    arc_p = np.exp(logp[lattice.piece])
    forward = np.zeros(lattice.nodes)
    forward[lattice.first] = 1.0
    layers = lattice.layers(lattice.depth)
    for layer in layers:
        ends = lattice.end[layer]
        edges = np.flatnonzero(np.r_[True, ends[1:] != ends[:-1]])
        paths = forward[lattice.start[layer]] * arc_p[layer]
        forward[ends[edges]] = np.add.reduceat(paths, edges)
    backward = np.zeros(lattice.nodes)
    backward[lattice.last] = 1.0
    # Arcs that end deeper are done first, so a node is complete before arcs into it are used.
    for layer in reversed(layers):
        paths = backward[lattice.end[layer]] * arc_p[layer]
        np.add.at(backward, lattice.start[layer], paths)
    weight = (counts / forward[lattice.last])[lattice.word]
    through = forward[lattice.start] * arc_p * backward[lattice.end] * weight
    return np.bincount(lattice.piece, through, minlength=len(logp))


def _best_cuts(lattice: _Lattice, logp: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The best way to cut each word, as steps from its end: (words still going, their arcs)."""
    arc_logp = logp[lattice.piece]
    best = np.full(lattice.nodes, -np.inf)
    best[lattice.first] = 0.0
    arc_into = np.full(lattice.nodes, -1, dtype=np.int64)
    for layer in lattice.layers(lattice.depth):
        ends = lattice.end[layer]
        edges = np.flatnonzero(np.r_[True, ends[1:] != ends[:-1]])
        value = best[lattice.start[layer]] + arc_logp[layer]
        top = np.maximum.reduceat(value, edges)
        best[ends[edges]] = top
        sizes = np.diff(np.r_[edges, len(ends)])
        winners = np.flatnonzero(value == np.repeat(top, sizes))
        # Of equal arcs the first (the longest piece) wins: write in reverse order.
        arc_into[ends[winners[::-1]]] = winners[::-1] + layer.start
    steps = []
    going, node = np.arange(len(lattice.last)), lattice.last.copy()
    while len(going):
        arcs = arc_into[node]
        steps.append((going, arcs))
        node = lattice.start[arcs]
        more = node != lattice.first[going]
        going, node = going[more], node[more]
    return steps


def _digamma(x: np.ndarray) -> np.ndarray:
    """Derivative of log gamma for x > 0 (recurrence to x >= 7, then the asymptotic series)."""
    x = x.astype(np.float64).copy()
    shift = np.zeros_like(x)
    while (small := x < 7).any():
        shift[small] -= 1 / x[small]
        x[small] += 1
    inverse = 1 / (x * x)
    series = inverse * (1 / 12 - inverse * (1 / 120 - inverse * (1 / 252 - inverse / 240)))
    return np.asarray(shift + np.log(x) - 0.5 / x - series)


def _seeds(words: Sequence[str], counts: np.ndarray, alphabet: Sequence[str]) -> list[str]:
    """Single characters, then substrings seen at least twice, those covering most text first."""
    seen: dict[str, float] = {}
    for text, count in zip(words, counts.tolist(), strict=True):
        for begin in range(len(text) - 1):
            for stop in range(begin + 2, min(len(text), begin + LONGEST_PIECE) + 1):
                part = text[begin:stop]
                seen[part] = seen.get(part, 0.0) + count
    ranked = sorted((-count * len(part), part) for part, count in seen.items() if count > 1)
    return [*alphabet, *(part for _, part in ranked[:MOST_SEEDS])]


def _losses(pieces: Sequence[str], single: int, freq: np.ndarray, logp: np.ndarray) -> np.ndarray:
    """What the text's likelihood loses when a piece goes and its best other cut stands in.

    Infinite for the `single` first pieces (characters: text must stay writable), -inf for pieces
    that no best cut uses. SentencePiece's formula.
    """
    loss = np.full(len(pieces), -np.inf)
    loss[:single] = np.inf
    used = np.flatnonzero((freq > 0) & (np.arange(len(pieces)) >= single))
    if not len(used):
        return loss
    index = {piece: number for number, piece in enumerate(pieces)}
    lattice = _build_lattice([pieces[int(i)] for i in used], index, whole=False)
    total = freq.sum()
    mine = freq[used]
    other = np.zeros(len(used))
    parts = np.zeros(len(used))
    for going, arcs in _best_cuts(lattice, logp):
        other[going] += np.log(freq[lattice.piece[arcs]] + mine[going])
        parts[going] += 1
    other -= parts * np.log(total + mine * (parts - 1))
    loss[used] = mine / total * (np.log(mine) - np.log(total) - other)
    return loss


def train_unigram(counts: Mapping[str, int], size: int) -> list[tuple[str, float]]:
    """The best pieces for these words.

    Args:
        counts: how often each word was seen; words as the encoder's pre-tokenizer makes them
            (with its space sign).
        size: most pieces to return.

    Returns:
        (piece, log probability) sorted by falling probability; every character of the words is
        a piece. Fewer than `size` when the text does not hold more.

    Raises:
        ValueError: more characters than `size`, or no word.
    """
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ranked = [item for item in ranked if 0 < len(item[0]) <= LONGEST_WORD][:MOST_WORDS]
    if not ranked:
        raise ValueError("there is no word to learn pieces from")
    words = [word for word, _ in ranked]
    weights = np.asarray([count for _, count in ranked], dtype=np.float64)
    alphabet = sorted(set().union(*words))
    if len(alphabet) > size:
        raise ValueError(f"{len(alphabet)} characters do not fit into {size} pieces")

    pieces = _seeds(words, weights, alphabet)
    single = len(alphabet)
    lattice = _build_lattice(words, {piece: number for number, piece in enumerate(pieces)})
    first = np.bincount(lattice.piece, weights[lattice.word], minlength=len(pieces))
    first *= [len(piece) for piece in pieces]
    logp = np.log(first) - np.log(first.sum())
    wanted = int(size * 1.1)  # SentencePiece goes a little above and takes the best at the end
    while True:
        for _ in range(EM_STEPS):
            expected = _expected_counts(lattice, weights, logp)
            # Bayesian estimate: digamma gives rare pieces less than their share.
            logp = _digamma(np.maximum(expected, 0.5)) - _digamma(expected.sum(keepdims=True))
        if len(pieces) <= wanted:
            break
        freq = np.zeros(len(pieces))
        for going, arcs in _best_cuts(lattice, logp):
            freq += np.bincount(lattice.piece[arcs], weights[going], minlength=len(pieces))
        loss = _losses(pieces, single, freq, logp)
        room = max(wanted, int(len(pieces) * SHRINK))
        order = sorted(range(len(pieces)), key=lambda i: (-loss[i], pieces[i]))[:room]
        kept = np.sort(np.asarray([i for i in order if loss[i] > -np.inf], dtype=np.int64))
        renamed = np.full(len(pieces), -1, dtype=np.int64)
        renamed[kept] = np.arange(len(kept))
        lattice = lattice.keep(renamed[lattice.piece] >= 0, renamed)
        pieces = [pieces[i] for i in kept]
        logp = logp[kept]

    rest = sorted(range(single, len(pieces)), key=lambda i: (-logp[i], pieces[i]))
    chosen = [*range(single), *rest[: size - single]]
    # Six digits: the last bits of exp and log differ between machines.
    result = [(pieces[i], round(float(logp[i]), 6)) for i in chosen]
    return sorted(result, key=lambda item: (-item[1], item[0]))
