"""The saved index: what is searched is what was saved, and nothing else is accepted."""

import json
import os

import pytest
import torch
import torch.nn.functional as F

from vlbeit.errors import InputError, SaveError, UnsafeError
from vlbeit.tasks.retrieval_index import IDS, VECTORS, Index

MODEL = "a" * 64


@pytest.fixture
def index(gen: torch.Generator) -> Index:
    vectors = F.normalize(torch.randn(30, 5, generator=gen), dim=1)
    vectors[17] = vectors[4]  # equal ones: the first comes first
    ids = tuple(f"photos:{i}" for i in range(30))
    return Index(kind="image", model=MODEL, ids=ids, vectors=vectors)


def test_a_loaded_index_gives_the_answers_of_the_saved_one_and_of_brute_force(index, tmp_path, gen):
    index.save(tmp_path / "made" / "index")
    again = Index.load(tmp_path / "made" / "index")
    assert again.ids == index.ids and again.kind == "image" and again.model == MODEL
    assert torch.equal(again.vectors, index.vectors)
    queries = F.normalize(torch.randn(6, 5, generator=gen), dim=1)
    queries[0] = index.vectors[4]
    found = again.search(queries, 7, MODEL)
    assert found == index.search(queries, 7, MODEL)
    for query, answers in zip(queries, found, strict=True):
        scores = (index.vectors @ query).tolist()
        order = sorted(range(30), key=lambda j: (-scores[j], j))[:7]
        assert [answer.id for answer in answers] == [index.ids[j] for j in order]
        assert [a.similarity for a in answers] == pytest.approx([scores[j] for j in order])
    assert [a.id for a in found[0][:2]] == ["photos:4", "photos:17"]


def test_a_folder_that_is_there_is_left_alone(index, tmp_path):
    index.save(tmp_path / "index")
    before = (tmp_path / "index" / VECTORS).read_bytes()
    with pytest.raises(SaveError, match="exists already"):
        index.save(tmp_path / "index")
    assert (tmp_path / "index" / VECTORS).read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["index"]  # nothing half-made lies about


def test_queries_of_another_model_are_refused(index):
    with pytest.raises(InputError, match="made by the model aaaa.*build the index anew"):
        index.search(index.vectors, 3, "b" * 64)
    with pytest.raises(InputError, match="width 5.*width 4"):
        index.search(index.vectors[:, :4], 3, MODEL)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (IDS, lambda b: b[:40], "not JSON"),
        (IDS, lambda b: b.replace(b"index-1", b"index-9"), "format 'vlbeit-index-9'"),
        (IDS, lambda b: b.replace(b'"image"', b'"video"'), "kind, model or ids"),
        (IDS, lambda b: b.replace(b"photos:3", b"photos:4", 1), "stands twice"),
        (IDS, lambda b: json.dumps({**json.loads(b), "ids": ["x"]}).encode(), "for 1 ids"),
        (VECTORS, lambda b: b[:-1], "cut or damaged"),
        (VECTORS, lambda b: b"\x80\x04" + b[2:], "header"),
    ],
)
def test_damaged_files_are_named(index, tmp_path, file, damage, message):
    index.save(tmp_path / "index")
    path = tmp_path / "index" / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises((InputError, UnsafeError), match=message) as caught:
        Index.load(tmp_path / "index")
    assert str(tmp_path / "index") in str(caught.value)


def test_missing_files_are_named(index, tmp_path):
    with pytest.raises(InputError, match="expected an index folder"):
        Index.load(tmp_path)
    index.save(tmp_path / "index")
    (tmp_path / "index" / VECTORS).unlink()
    with pytest.raises(InputError, match=VECTORS):
        Index.load(tmp_path / "index")
