"""Laws of the text tokenizer: our ids hold, text cannot reach them, training repeats."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlbeit.config import TextTokenizerConfig
from vlbeit.draws import Draws
from vlbeit.errors import ConfigError, InputError, UnsafeError
from vlbeit.tokens.text import (
    SPECIALS,
    TextTokenizer,
    import_bert_vocab,
    import_sentencepiece,
    train_text_tokenizer,
)
from vlbeit.tokens.unigram import (
    _best_cuts,
    _build_lattice,
    _expected_counts,
    train_unigram,
)

LINES = [
    f"{number} {size} {colour} {shape}s {place} the {other} star, isn't it? (no. {number})"
    for number in ("one", "two", "three")
    for size in ("small", "big")
    for colour in ("red", "green", "blue", "yellow")
    for shape in ("circle", "square", "triangle")
    for place in ("left of", "above", "below")
    for other in ("white", "black")
]
KINDS = ("unigram", "wordpiece")

# The kinds of text that rule D05 names, beside what hypothesis finds.
ODD_TEXTS = [
    "",
    " \t\n\u3000",
    "word " * 20_000,
    "x" * 100_000,
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 family \U0001f1ea\U0001f1fa",
    "\u0634\u0643\u0631\u0627 \u05e9\u05dc\u05d5\u05dd",
    "nul \x00 inside",
    "\ufeffbom first",
    "lone \ud83d surrogate \udc00",
    "\ufffd\ufffd",
    "\uff3bMASK\uff3d",
    "\u2581[MASK]\u2581",
    *SPECIALS,
    *(f"a{name}b {name}{name} [{name}]" for name in SPECIALS),
    "[MASK [MASK]] [[T_SEP]",
    "[CLS] [SEP] <s> </s> <unk> <pad> <mask>",
]


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest) -> TextTokenizer:
    return train_text_tokenizer(LINES, TextTokenizerConfig(kind=request.param, vocab=120))


def forbidden(ids: np.ndarray) -> list[int]:
    return [i for i in ids.tolist() if i in (0, 2, 3, 4)]


def test_special_tokens_have_the_first_five_ids(trained: TextTokenizer) -> None:
    assert trained.pieces(range(5)) == ["[PAD]", "[UNK]", "[T_CLS]", "[T_SEP]", "[MASK]"]
    assert (trained.pad, trained.unk, trained.cls, trained.sep, trained.mask) == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("text", ODD_TEXTS, ids=lambda text: ascii(text[:20]))
def test_odd_texts_never_give_special_ids(trained: TextTokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert ids.dtype == np.int32
    assert forbidden(ids) == []
    assert len(trained.word_ids(text)) == len(ids)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=6),
            st.sampled_from([*SPECIALS, "[", "]", "MASK", "T_", "\u2581", " ", "\uff3b"]),
        ),
        max_size=8,
    ).map("".join)
)
def test_no_text_gives_special_ids(trained: TextTokenizer, text: str) -> None:
    assert forbidden(trained.encode(text)) == []


def test_a_vocabulary_that_text_can_reach_is_refused(
    trained: TextTokenizer, tmp_path: Path
) -> None:
    # The negative check of the laws above: with the guard taken out, "[MASK]" is found in text.
    tree = json.loads(trained.to_json())
    tree["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(InputError, match="special token"):
        TextTokenizer.load(tmp_path)


def test_added_tokens_are_refused(trained: TextTokenizer, tmp_path: Path) -> None:
    tree = json.loads(trained.to_json())
    tree["added_tokens"] = [
        {
            "id": 4,
            "content": "[MASK]",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(InputError, match="added tokens"):
        TextTokenizer.load(tmp_path)


def test_known_words_come_back(trained: TextTokenizer) -> None:
    text = "two big red circles left of the white star"
    assert trained.decode(trained.encode(text)) == text
    assert trained.unk not in trained.encode(text)


def test_frequent_words_are_one_piece_and_keep_their_word_number(trained: TextTokenizer) -> None:
    text = "red green, blue"
    assert len(trained.encode(text)) == 4
    assert trained.word_ids(text) == [0, 1, 2, 3]


def test_masked_words_are_shown_and_other_special_tokens_are_not(trained: TextTokenizer) -> None:
    red, star = trained.encode("red")[0], trained.encode("star")[0]
    shown = trained.decode([trained.cls, red, trained.mask, star, trained.sep, trained.pad])
    assert shown == "red [MASK] star"


def test_a_batch_is_encoded_like_its_texts(trained: TextTokenizer) -> None:
    texts = LINES[:5] + ODD_TEXTS[:2] + ["", "unseen Zebra"]
    for text, ids in zip(texts, trained.encode_batch(texts), strict=True):
        assert ids.tolist() == trained.encode(text).tolist()


def test_saved_and_loaded_it_is_the_same(trained: TextTokenizer, tmp_path: Path) -> None:
    path = trained.save(tmp_path / "folder")
    for place in (path, path.parent):
        again = TextTokenizer.load(place)
        assert again.digest == trained.digest
        assert again.encode(LINES[0]).tolist() == trained.encode(LINES[0]).tolist()
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]
    assert pickle.loads(pickle.dumps(trained)).digest == trained.digest


TRAIN_ONCE = """
import sys
from tests.test_text_tokenizer import LINES
from vlbeit.config import TextTokenizerConfig
from vlbeit.tokens.text import train_text_tokenizer
print(train_text_tokenizer(LINES, TextTokenizerConfig(kind=sys.argv[1], vocab=120)).digest)
"""


def test_training_twice_gives_the_same_digest(trained: TextTokenizer) -> None:
    # In other processes: hash seeds, of Python and of the library, differ there.
    root = Path(__file__).parent.parent
    for seed in ("1", "2"):
        environment = os.environ | {
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}",
        }
        command = [sys.executable, "-c", TRAIN_ONCE, trained.kind]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == trained.digest


def test_other_text_gives_another_digest(trained: TextTokenizer) -> None:
    config = TextTokenizerConfig(kind=trained.kind, vocab=120)  # type: ignore[arg-type]
    assert (
        train_text_tokenizer([*LINES, *["purple hexagons"] * 500], config).digest != trained.digest
    )


def test_the_order_of_lines_does_not_matter(trained: TextTokenizer) -> None:
    config = TextTokenizerConfig(kind=trained.kind, vocab=120)  # type: ignore[arg-type]
    assert train_text_tokenizer(reversed(LINES), config).digest == trained.digest


@pytest.mark.parametrize("kind", KINDS)
def test_lowercase_is_followed(kind: str) -> None:
    config = TextTokenizerConfig(kind=kind, vocab=120, lowercase=True)  # type: ignore[arg-type]
    tokenizer = train_text_tokenizer(LINES, config)
    assert tokenizer.encode("RED Circle").tolist() == tokenizer.encode("red circle").tolist()
    assert tokenizer.unk not in tokenizer.encode("RED")


@pytest.mark.parametrize("kind", KINDS)
def test_rare_characters_give_way_when_the_alphabet_does_not_fit(kind: str) -> None:
    lines = ["plain words " * 50, " ".join(chr(0x4E00 + i) for i in range(500))]
    config = TextTokenizerConfig(kind=kind, vocab=60)  # type: ignore[arg-type]
    tokenizer = train_text_tokenizer(lines, config)
    assert tokenizer.size <= 60
    assert tokenizer.unk not in tokenizer.encode("plain words")
    assert tokenizer.unk in tokenizer.encode(chr(0x4E00 + 400))


def test_impossible_settings_and_empty_text_are_refused() -> None:
    with pytest.raises(ConfigError, match="vocab"):
        train_text_tokenizer(LINES, TextTokenizerConfig(vocab=8))
    with pytest.raises(InputError, match="no text"):
        train_text_tokenizer(["", "  "], TextTokenizerConfig(vocab=100))


def test_frequent_words_become_pieces_and_all_characters_are_kept() -> None:
    counts = {"circle": 400, "circles": 100, "square": 300, "squid": 1, "quad": 1, "cell": 1}
    alphabet = set("".join(counts))
    pieces = train_unigram(counts, len(alphabet) + 3)
    assert alphabet | {"circle", "square"} <= {piece for piece, _ in pieces}
    assert [score for _, score in pieces] == sorted((s for _, s in pieces), reverse=True)
    with pytest.raises(ValueError, match="characters"):
        train_unigram(counts, 5)


def cuts(word: str, index: dict[str, int]) -> list[list[int]]:
    """All ways to write a word in pieces, by recursion."""
    if not word:
        return [[]]
    return [
        [index[word[:n]], *rest]
        for n in range(1, len(word) + 1)
        if word[:n] in index
        for rest in cuts(word[n:], index)
    ]


def test_expected_counts_and_best_cuts_agree_with_listing_all_cuts() -> None:
    words, counts = ["abab", "bba", "aab", "b"], np.array([3.0, 2.0, 5.0, 1.0])
    index = {piece: i for i, piece in enumerate(["a", "b", "ab", "ba", "bab", "aab", "bb"])}
    logp = np.log((Draws("unigram-test").uniforms(len(index)) + 0.1) / 4)
    lattice = _build_lattice(words, index)
    expected, best = np.zeros(len(index)), np.zeros(len(index))
    for word, count in zip(words, counts, strict=True):
        ways = cuts(word, index)
        chance = np.exp([logp[way].sum() for way in ways])
        for way, share in zip(ways, chance / chance.sum(), strict=True):
            np.add.at(expected, way, count * share)
        np.add.at(best, ways[int(chance.argmax())], count)
    np.testing.assert_allclose(_expected_counts(lattice, counts, logp), expected, rtol=1e-12)
    found = np.zeros(len(index))
    for going, arcs in _best_cuts(lattice, logp):
        np.add.at(found, lattice.piece[arcs], counts[going])
    np.testing.assert_allclose(found, best)


def text_lines(shared_data: Path, each: int) -> list[str]:
    files = sorted((shared_data / "text").glob("*.train.txt"))
    assert files
    return [line for file in files for line in file.read_text().splitlines()[:each]]


def test_imported_sentencepiece_cuts_as_sentencepiece_does(shared_data: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    path = shared_data / "vocab" / "unilm3-cased.model"
    ours = import_sentencepiece(path)
    theirs = sentencepiece.SentencePieceProcessor(str(path))
    lines = text_lines(shared_data, 600) + ODD_TEXTS[4:6] + ["two  spaces", "\uff34\uff25\uff33"]
    assert len(lines) > 2000
    # Documented rule: <unk>, <s>, </s> go, five of ours come.
    wanted = [[1 if i == 0 else i + 2 for i in ids] for ids in theirs.encode(lines)]
    found = [ids.tolist() for ids in ours.encode_batch(lines)]
    differing = [line for line, a, b in zip(lines, wanted, found, strict=True) if a != b]
    assert differing == []
    assert ours.pieces([5, 6]) == [theirs.id_to_piece(3), theirs.id_to_piece(4)]
    assert ours.size == theirs.vocab_size() + 2


@pytest.mark.parametrize("name", ["bert-base-uncased-vocab.txt", "wordpiece-8k-vocab.txt"])
def test_imported_bert_vocabulary_cuts_as_bert_does(shared_data: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    path = shared_data / "vocab" / name
    ours, theirs = import_bert_vocab(path), transformers.BertTokenizer(str(path))
    # BERT's own tokenizer finds its special tokens in text, ours must not: leave those lines out.
    lines = [line for line in text_lines(shared_data, 300) if "[UNK]" not in line]
    assert len(lines) > 900
    for line in lines:
        assert ours.pieces(ours.encode(line)) == theirs.tokenize(line), line
    listed = path.read_text().splitlines()
    assert ours.size == len(listed)
    if listed[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]:
        assert ours.pieces(range(5, 50)) == listed[5:50]


@pytest.mark.parametrize("name", ["unilm3-cased.model", "bert-base-uncased-vocab.txt"])
def test_imported_vocabularies_keep_special_ids_out_of_reach(
    shared_data: Path, tmp_path: Path, name: str
) -> None:
    path = shared_data / "vocab" / name
    importer = import_sentencepiece if path.suffix == ".model" else import_bert_vocab
    tokenizer = importer(path)
    for text in ODD_TEXTS:
        assert forbidden(tokenizer.encode(text)) == [], ascii(text[:20])
    tokenizer.save(tmp_path)
    assert TextTokenizer.load(tmp_path).digest == tokenizer.digest


def test_files_that_are_no_vocabulary_are_named(tmp_path: Path) -> None:
    junk = tmp_path / "junk"
    junk.write_bytes(b"\x0a\xff\xff\xff\xff\x0fnot a model")
    for read in (import_sentencepiece, import_bert_vocab, TextTokenizer.load):
        with pytest.raises(InputError, match="junk"):
            read(junk)
        with pytest.raises(InputError, match="missing"):
            read(tmp_path / "missing")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(UnsafeError, match="limit"):
        TextTokenizer.load(tmp_path / "huge")


def test_a_damaged_sentencepiece_file_never_does_anything_but_raise(shared_data: Path) -> None:
    from vlbeit.tokens.sentencepiece import read_sentencepiece

    data = (shared_data / "vocab" / "unilm3-cased.model").read_bytes()[:4000]
    for cut in range(0, 400, 7):
        for flipped in (data[:cut], data[:cut] + b"\xff" + data[cut + 1 : 800]):
            try:
                read_sentencepiece(flipped, "cut.model")
            except InputError as error:
                assert "cut.model" in str(error)
