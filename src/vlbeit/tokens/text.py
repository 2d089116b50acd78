"""Subword vocabulary: text to ids, with five ids that no text can produce.

One file, `tokenizer.json` of the `tokenizers` library, holds everything. [PAD], [UNK], [T_CLS],
[T_SEP] and [MASK] are ids 0 to 4 in every vocabulary, trained or imported. They are plain rows of
the vocabulary and not "added tokens" of the library, which would be found in text; and a text
that spells one of them is cut inside the name before the vocabulary is asked.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from vlbeit.config import TextTokenizerConfig
from vlbeit.errors import ConfigError, InputError, UnsafeError
from vlbeit.tokens.sentencepiece import read_sentencepiece
from vlbeit.tokens.unigram import train_unigram

PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[T_CLS]", "[T_SEP]", "[MASK]"
SPECIALS = (PAD, UNK, CLS, SEP, MASK)
FILE_NAME = "tokenizer.json"
MAX_FILE = 64 << 20
"""Largest tokenizer file in bytes; 64k pieces are about 3 MB."""
MAX_VOCAB = 1_000_000
MAX_WORDS_COUNTED = 4_000_000
"""Different words held while counting; beyond it the rarest are forgotten (lossy counting)."""
MAX_WORDS_SHOWN = 100_000_000
"""Running words shown to the WordPiece trainer; counts of larger corpora are scaled down."""
COVERAGE = 0.9995
"""Share of all characters that the trained alphabet covers, as SentencePiece's default."""

_SPACE = "\u2581"
_SURROGATES = re.compile("[\ud800-\udfff]")
_NAMES = "|".join(re.escape(name[1:-1]) for name in SPECIALS)
# BERT files call their own special tokens so; ours stand in for them.
_BERT_SPECIALS = frozenset({"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"})


class TextTokenizer:
    """A vocabulary and its rules.

    Ids are int32. `encode` adds no special tokens: collate puts [T_CLS] and [T_SEP] where the
    model wants them. The object can be pickled and used after a fork.
    """

    pad, unk, cls, sep, mask = range(5)

    def __init__(self, tokenizer: Tokenizer) -> None:
        # The library's thread pool does not survive a fork, and loaders fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._tokenizer = tokenizer
        self.size: int = tokenizer.get_vocab_size()
        found = [tokenizer.id_to_token(i) for i in range(len(SPECIALS))]
        if found != list(SPECIALS):
            raise InputError(
                f"text tokenizer: ids 0 to 4 are {found}, expected {list(SPECIALS)}; "
                "bring a foreign vocabulary in with `vlbeit tokenizer import`"
            )
        self._check_specials_are_out_of_reach()

    def _check_specials_are_out_of_reach(self) -> None:
        for name in SPECIALS:
            for text in (name, f"a {name} b", f"a{name}{name}b"):
                ids = self.encode(text)
                if ((ids < len(SPECIALS)) & (ids != self.unk)).any():
                    raise InputError(
                        f"text tokenizer: the text {text!r} becomes a special token; "
                        "bring the vocabulary in with `vlbeit tokenizer import`"
                    )

    def encode(self, text: str) -> np.ndarray:
        """(W,) int32 ids of a text, without special tokens; empty for blank text.

        Never 0, 2, 3 or 4, whatever the text; 1 ([UNK]) for characters the vocabulary lacks.
        """
        return np.asarray(self._tokenizer.encode(_plain(text)).ids, dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        encodings = self._tokenizer.encode_batch_fast([_plain(text) for text in texts])
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def word_ids(self, text: str) -> list[int]:
        """For each piece of `encode(text)` the number of its word; a punctuation mark is one."""
        return [
            -1 if word is None else word for word in self._tokenizer.encode(_plain(text)).word_ids
        ]

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The vocabulary's own spelling of each id.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        found = []
        for number in ids:
            piece = self._tokenizer.id_to_token(int(number)) if number >= 0 else None
            if piece is None:
                raise ValueError(f"token id {number} is not in 0..{self.size - 1}")
            found.append(piece)
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """Text again; [PAD], [T_CLS] and [T_SEP] are left out, [MASK] and [UNK] are shown."""
        is_unigram = isinstance(self._tokenizer.model, models.Unigram)
        shown = []
        for piece in self.pieces(ids):
            if piece in (PAD, CLS, SEP):
                continue
            shown.append(_SPACE + piece if is_unigram and piece in SPECIALS else piece)
        decoded: str = self._tokenizer.decoder.decode(shown)
        return decoded.strip()

    @property
    def kind(self) -> str:
        """The word "unigram" or "wordpiece"."""
        return type(self._tokenizer.model).__name__.lower()

    def to_json(self) -> str:
        """The canonical tokenizer.json: sorted keys, no spaces."""
        return _canonical(self._tokenizer.to_str())

    @property
    def digest(self) -> str:
        """sha256 of the canonical tokenizer.json, in hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, folder: Path | str) -> Path:
        """Write `tokenizer.json` into the folder (made if missing), whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE_NAME
        aside = folder / f"{FILE_NAME}.part"
        with aside.open("wb") as file:
            file.write(self.to_json().encode())
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        return path

    @classmethod
    def load(cls, path: Path | str) -> "TextTokenizer":
        """Read a `tokenizer.json`, or the one in a folder.

        Raises:
            InputError: missing, not such a file, or special ids that are not ours or that text
                can produce.
            UnsafeError: larger than 64 MiB.
        """
        path = Path(path)
        if path.is_dir():
            path = path / FILE_NAME
        text = _read_limited(path).decode("utf-8", "replace")
        try:
            if json.loads(text).get("added_tokens"):
                raise InputError(
                    f"{path}: has added tokens, which text could produce; "
                    "bring the vocabulary in with `vlbeit tokenizer import`"
                )
            tokenizer = Tokenizer.from_str(text)
        except InputError:
            raise
        except Exception as error:  # the library raises bare Exception for a file it cannot read
            raise InputError(f"{path}: is not a tokenizer.json ({error})") from None
        return cls(tokenizer)


def _plain(text: str) -> str:
    """Lone surrogates cannot be written as UTF-8; the replacement character stands in."""
    return text if text.isascii() else _SURROGATES.sub("\ufffd", text)


def _canonical(text: str) -> str:
    return json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _read_limited(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_FILE:
            raise UnsafeError(f"{path}: {size} bytes, the limit for a vocabulary is {MAX_FILE}")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _build_unigram(
    pieces: Sequence[tuple[str, float]],
    normalizer: normalizers.Normalizer,
    cut: pre_tokenizers.PreTokenizer,
) -> Tokenizer:
    """A Unigram tokenizer; `cut` divides words further after the space sign is in."""
    vocab = [(name, 0.0) for name in SPECIALS] + list(pieces)
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=TextTokenizer.unk, byte_fallback=False))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always"), cut]
    )
    tokenizer.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")
    return tokenizer


def _build_wordpiece(pieces: Sequence[str], lowercase: bool) -> Tokenizer:
    """BERT's rules. Punctuation stands alone, so no text reaches a name in brackets."""
    vocab = {piece: number for number, piece in enumerate([*SPECIALS, *pieces])}
    model = models.WordPiece(vocab, unk_token=UNK, max_input_chars_per_word=100)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return tokenizer


def _cut_special_names() -> pre_tokenizers.PreTokenizer:
    """Cut "[MASK]" and the like after the bracket; touches nothing else."""
    return pre_tokenizers.Split(Regex(rf"\[(?=(?:{_NAMES})\])"), "merged_with_previous")


def _cut_punctuation() -> pre_tokenizers.PreTokenizer:
    """Each punctuation mark alone, with the space before it. Cuts special names as well."""
    return pre_tokenizers.Split(Regex(rf"{_SPACE}?[\p{{P}}$+<=>^`|~]"), "isolated")


def _count_words(lines: Iterable[str], tokenizer: Tokenizer) -> dict[str, int]:
    """How often each word (as the pre-tokenizer makes it) is in the lines."""
    spaced: dict[str, int] = {}
    forget = 1
    for line in lines:
        for word in _plain(line).split():
            spaced[word] = spaced.get(word, 0) + 1
        while len(spaced) > MAX_WORDS_COUNTED:
            spaced = {word: count for word, count in spaced.items() if count > forget}
            forget *= 2
    words: dict[str, int] = {}
    for text, count in spaced.items():
        normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal):
            words[word] = words.get(word, 0) + count
    return words


def _covered(words: dict[str, int], most: int) -> tuple[dict[str, int], list[str]]:
    """Words that need only the frequent characters, and those characters, sorted.

    Rare characters (the last 0.05 % of the text) become [UNK]: a large corpus holds thousands
    that occur once.
    """
    seen: dict[str, int] = {}
    for word, count in words.items():
        for character in word:
            seen[character] = seen.get(character, 0) + count
    total = sum(seen.values())
    alphabet: list[str] = []
    covered = 0
    for character, count in sorted(seen.items(), key=lambda item: (-item[1], item[0])):
        if (covered >= COVERAGE * total and len(alphabet) >= 256) or len(alphabet) >= most:
            break
        alphabet.append(character)
        covered += count
    known = set(alphabet)
    kept = {word: count for word, count in words.items() if known.issuperset(word)}
    return kept, sorted(alphabet)


def train_text_tokenizer(lines: Iterable[str], config: TextTokenizerConfig) -> TextTokenizer:
    """Learn a vocabulary from lines of text. The same lines give the same vocabulary, bit for bit.

    Raises:
        ConfigError: `vocab` too small for the special tokens and an alphabet.
        InputError: no text in the lines.
    """
    if not 32 <= config.vocab <= MAX_VOCAB:
        raise ConfigError(f"vocab: {config.vocab} is not in 32..{MAX_VOCAB}")
    room = config.vocab - len(SPECIALS)
    if config.kind == "unigram":
        rules: list[normalizers.Normalizer] = [
            normalizers.NFKC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
        if config.lowercase:
            rules.insert(1, normalizers.Lowercase())
        normalizer = normalizers.Sequence(rules)
        cut = _cut_punctuation()
        words = _count_words(lines, _build_unigram([], normalizer, cut))
        words, _ = _covered(words, room // 2)
        _refuse_nothing(words)
        return TextTokenizer(_build_unigram(train_unigram(words, room), normalizer, cut))
    words = _count_words(lines, _build_wordpiece([], config.lowercase))
    words, alphabet = _covered(words, room // 4)
    _refuse_nothing(words)
    pieces = _train_wordpiece(words, alphabet, room)
    return TextTokenizer(_build_wordpiece(pieces, config.lowercase))


def special_tokens_only() -> TextTokenizer:
    """The tokenizer of a run without text: every word is [UNK]."""
    return TextTokenizer(_build_wordpiece([], lowercase=False))


def _refuse_nothing(words: dict[str, int]) -> None:
    if not words:
        raise InputError("text tokenizer: no text to train on; look at the text and pair sources")


def _train_wordpiece(words: dict[str, int], alphabet: list[str], room: int) -> list[str]:
    """WordPieces by `tokenizers`, made repeatable.

    Its trainer numbers the "##x" pieces in the order of a randomly seeded hash map and breaks
    ties by those numbers. Naming all of them in advance, sorted, fixes the numbers.
    """
    inner = sorted({character for word in words for character in word[1:]})
    ordered = [*alphabet, *(f"##{character}" for character in inner)]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=room, special_tokens=ordered, show_progress=False, min_frequency=1
    )
    # The trainer wants text, not counts.
    scale = max(1, sum(words.values()) // MAX_WORDS_SHOWN)
    lines = (
        " ".join([word] * min(1000, -(-count // scale) - done))
        for word, count in sorted(words.items())
        for done in range(0, -(-count // scale), 1000)
    )
    tokenizer.train_from_iterator(lines, trainer)
    vocab: dict[str, int] = tokenizer.get_vocab()
    return sorted(vocab, key=vocab.__getitem__)


def import_sentencepiece(path: Path | str) -> TextTokenizer:
    """A SentencePiece Unigram `.model` under our ids; same pieces as SentencePiece makes.

    Rule for ids: ours are 0 to 4, then the file's ordinary pieces in their order. The file's
    unknown, control and unused pieces (<unk>, <s>, </s>, ...) are left out: none of them comes
    from text. So an ordinary piece with id i in a file that starts with those three has id i + 2.

    Raises:
        InputError: not such a file, or of a kind that cannot be represented (BPE, byte fallback,
            user-defined pieces).
    """
    path = Path(path)
    model = read_sentencepiece(_read_limited(path), str(path))
    rules: list[normalizers.Normalizer] = []
    if model.charsmap:
        rules.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_spaces:
        rules += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    return TextTokenizer(
        _build_unigram(model.pieces, normalizers.Sequence(rules), _cut_special_names())
    )


def import_bert_vocab(path: Path | str) -> TextTokenizer:
    """A BERT `vocab.txt` (one WordPiece a line) under our ids.

    Rule for ids: ours are 0 to 4, then the file's pieces in their order without its [PAD], [UNK],
    [CLS], [SEP] and [MASK]. A file that starts with those five keeps every id. Lower-casing (and
    stripping of accents, as BERT does) is on when no piece outside brackets has a capital.

    Raises:
        InputError: not such a file.
    """
    path = Path(path)
    try:
        listed = _read_limited(path).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 at byte {error.start}") from None
    pieces = [line.rstrip("\r\n") for line in listed]
    while pieces and not pieces[-1]:
        pieces.pop()
    missing = sorted(_BERT_SPECIALS - set(pieces))
    if missing:
        raise InputError(f"{path}: is not a BERT vocabulary, {', '.join(missing)} not found")
    ordinary = [piece for piece in pieces if piece not in _BERT_SPECIALS and piece not in SPECIALS]
    repeated = len(ordinary) - len(set(ordinary))
    if repeated or not all(ordinary) or len(ordinary) > MAX_VOCAB:
        raise InputError(
            f"{path}: {len(ordinary)} pieces, {repeated} of them twice, "
            f"{sum(not piece for piece in ordinary)} empty; expected different pieces, one a line"
        )
    lowercase = not any(piece != piece.lower() for piece in ordinary if not piece.startswith("["))
    return TextTokenizer(_build_wordpiece(ordinary, lowercase))


def tokenizer_facts(tokenizer: TextTokenizer) -> dict[str, Any]:
    """What `vlbeit tokenizer show` prints."""
    return {
        "kind": tokenizer.kind,
        "size": tokenizer.size,
        "special_ids": {name: number for number, name in enumerate(SPECIALS)},
        "digest": tokenizer.digest,
    }
