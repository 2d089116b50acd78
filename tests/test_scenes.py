"""Laws of the drawn world: what a text gives away, what a picture shows, the same bytes twice."""

import hashlib
import io
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlbeit.data import scene_text
from vlbeit.data.dataset import Dataset, open_sources
from vlbeit.data.scene_text import KIND_OF, STATEMENT_KINDS, draw_comparison, figures, shows
from vlbeit.data.scene_world import COLOURS, COUNTS, PATTERNS, SHAPES, TONES, Ground, World, paint
from vlbeit.data.scenes import (
    ANSWERS,
    ATTRIBUTE_WORDS,
    CLASSES,
    Scene,
    blind_baselines,
    draw_scene,
    draw_statement,
    prepare_scenes,
    prior_by_kind,
)
from vlbeit.draws import Draws
from vlbeit.errors import ConfigError
from vlbeit.tokens.text import TextTokenizer

SCENES = 1500


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(3, "test", i) for i in range(SCENES)]


@pytest.fixture(scope="module")
def lines() -> list[list[str]]:
    """5,000 captions and more, as words."""
    drawn = (draw_scene(4, "test", i) for i in range(3000))
    return [line.split() for scene in drawn for line in scene.captions]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "data"
    prepare_scenes(out, count=30, seed=0)
    return out


def template_of(words: list[str]) -> str:
    return " ".join(f"<{KIND_OF[w]}>" if w in KIND_OF else w for w in words)


def lifts_over_prior(lines: list[list[str]]) -> dict[str, float]:
    """How far the best guess from text alone lies over the prior, by kind.

    The guesser knows the template, the position and, at its choice, one other word; the rule it
    then uses is learned on one half of the captions and measured on the other.
    """
    by_template: dict[str, list[list[str]]] = defaultdict(list)
    for words in lines:
        by_template[template_of(words)].append(words)
    best: dict[str, list[float]] = defaultdict(list)
    weights: dict[str, list[int]] = defaultdict(list)
    for template, members in by_template.items():
        learn, measure = members[::2], members[1::2]
        for at, slot in enumerate(template.split()):
            if not slot.startswith("<"):
                continue
            found = []
            for given in [None, *(i for i in range(len(members[0])) if i != at)]:
                seen: dict[str, Counter[str]] = defaultdict(Counter)
                for words in learn:
                    seen[words[given] if given is not None else ""][words[at]] += 1
                rule = {key: counts.most_common(1)[0][0] for key, counts in seen.items()}
                key_of = [words[given] if given is not None else "" for words in measure]
                right = [rule.get(k) == w[at] for k, w in zip(key_of, measure, strict=True)]
                found.append(float(np.mean(right)))
            best[slot[1:-1]].append(max(found))
            weights[slot[1:-1]].append(len(measure))
    prior = prior_by_kind(" ".join(words) for words in lines)
    return {
        kind: float(np.average(best[kind], weights=weights[kind])) - prior[kind] for kind in best
    }


def test_a_caption_gives_no_hidden_word_away(lines: list[list[str]]) -> None:
    lifts = lifts_over_prior(lines)
    assert set(lifts) == set(ATTRIBUTE_WORDS)
    assert max(lifts.values()) < 0.03, lifts


def test_the_guesser_of_that_test_does_find_a_leak(lines: list[list[str]]) -> None:
    # every figure has the shape that belongs to the first colour of its caption
    leaky = []
    for words in lines:
        colour = next(COLOURS.index(w) for w in words if w in COLOURS)
        leaky.append([SHAPES[colour % 5] if w in SHAPES else w for w in words])
    assert lifts_over_prior(leaky)["shape"] > 0.05


def test_words_of_a_kind_are_equally_frequent(lines: list[list[str]]) -> None:
    counts = Counter(word for words in lines for word in words if word in KIND_OF)
    for kind, words in ATTRIBUTE_WORDS.items():
        if kind != "place":  # left and right are places and directions
            shares = np.array([counts[word] for word in words]) / sum(counts[w] for w in words)
            assert np.abs(shares - 1 / len(words)).max() < 0.025, (kind, shares)


def test_no_word_belongs_to_two_kinds() -> None:
    assert len(KIND_OF) == sum(len(words) for words in ATTRIBUTE_WORDS.values())


def test_the_length_of_a_caption_tells_its_template(lines: list[list[str]]) -> None:
    templates: dict[int, set[str]] = defaultdict(set)
    for words in lines:
        templates[len(words)].add(template_of(words))
    assert all(len(found) == 1 for found in templates.values()), templates


def test_captions_are_true(scenes: list[Scene]) -> None:
    """Read back the fullest caption and compare it with the groups."""
    for scene in scenes:
        words = scene.description.split()
        found = [tuple(words[i - 1 : i + 5]) for i, word in enumerate(words) if word == "x"]
        truth = [(g.count, "x", g.size, g.texture, g.colour, g.shape) for g in scene.groups]
        assert Counter(found) == Counter(truth)
        if len(truth) == 2 and truth[0] != truth[1]:
            second = next(g for g, t in zip(scene.groups, truth, strict=True) if t == found[1])
            said = {"above": "top", "below": "bottom"}.get(words[7], words[7])
            assert said == second.place


def test_the_picture_shows_what_the_groups_say(scenes: list[Scene]) -> None:
    """Shape, number, place and area of the figures, measured in the map."""
    for scene in scenes[:300]:
        painted = np.asarray(scene.segmentation)
        assert painted.shape == (40, 40)
        assert set(np.unique(painted)) == {0} | {1 + SHAPES.index(g.shape) for g in scene.groups}
        if len(scene.groups) == 1:
            (group,) = scene.groups
            rows, columns = np.nonzero(painted)
            x, y = columns.mean() + 0.5 - 20, rows.mean() + 0.5 - 20
            side = {"left": -x, "right": x, "top": -y, "bottom": y}
            if group.place == "middle":
                assert max(side.values()) < 4
            else:
                assert max(side, key=lambda place: side[place]) == group.place
                assert side[group.place] > 6


def test_large_figures_cover_more_than_small_ones(scenes: list[Scene]) -> None:
    area: dict[str, list[float]] = {"small": [], "large": []}
    for scene in scenes[:300]:
        if len(scene.groups) == 1:
            number = 1 + COUNTS.index(scene.groups[0].count)
            pixels = int((np.asarray(scene.segmentation) > 0).sum())
            area[scene.groups[0].size].append(pixels / number)
    same_shape = 1.5  # a cross covers less than a square of the same size
    assert np.mean(area["large"]) > same_shape * np.mean(area["small"])


def test_figures_stay_whole() -> None:
    """A figure's area is the same at every place: none is cut off or covered by another."""
    areas: dict[tuple[str, str], list[float]] = defaultdict(list)
    for scene in (draw_scene(3, "test", i, 120) for i in range(600)):
        painted = np.asarray(scene.segmentation)
        if len({g.shape for g in scene.groups}) == len(scene.groups):
            for group in scene.groups:
                pixels = int((painted == 1 + SHAPES.index(group.shape)).sum())
                areas[group.shape, group.size].append(pixels / (1 + COUNTS.index(group.count)))
    assert len(areas) == 10
    for what, found in areas.items():
        assert min(found) > 0.95 * np.median(found), (what, min(found), np.median(found))


def test_textures_change_the_picture_and_not_the_map(scenes: list[Scene]) -> None:
    for scene in scenes[:50]:
        pictures, maps = set(), set()
        for texture in ATTRIBUTE_WORDS["texture"]:
            world = replace(
                scene.world, groups=tuple(replace(g, texture=texture) for g in scene.groups)
            )
            other = replace(scene, world=world)
            pictures.add(other.image.tobytes())
            maps.add(other.segmentation.tobytes())
        assert (len(pictures), len(maps)) == (3, 1)


def test_no_patch_look_dominates(scenes: list[Scene]) -> None:
    looks: Counter[bytes] = Counter()
    for scene in scenes:
        pixels = np.asarray(scene.image).reshape(5, 8, 5, 8, 3).transpose(0, 2, 1, 3, 4)
        looks.update(patch.tobytes() for patch in pixels.reshape(25, -1))
    assert max(looks.values()) / looks.total() < 0.05


def test_every_ground_repeats_after_a_patch_or_changes_with_height_only() -> None:
    for tone in TONES:
        for pattern in PATTERNS:
            pixels = np.asarray(paint(World((), Ground(tone, pattern)))).astype(int)
            assert np.array_equal(pixels[:, 8:], pixels[:, :-8])
            if pattern != "shaded":
                assert np.array_equal(pixels[8:], pixels[:-8])


def test_a_scene_depends_on_its_key_alone() -> None:
    def digest(scene: Scene) -> str:
        said = json.dumps([scene.captions, scene.questions, scene.label]).encode()
        return hashlib.sha256(
            said + scene.image.tobytes() + scene.segmentation.tobytes()
        ).hexdigest()

    forward = [digest(draw_scene(0, "val", i)) for i in range(20)]
    backward = [digest(draw_scene(0, "val", i)) for i in reversed(range(20))]
    assert forward == backward[::-1]
    assert len(set(forward)) == 20
    assert digest(draw_scene(1, "val", 0)) != forward[0] != digest(draw_scene(0, "train", 0))


@pytest.mark.parametrize("size", [16, 40, 64, 224])
def test_a_scene_can_be_drawn_at_any_size(size: int) -> None:
    scene, small = draw_scene(0, "val", 1, size), draw_scene(0, "val", 1)
    assert scene.image.size == scene.segmentation.size == (size, size)
    assert scene.captions == small.captions
    wanted = np.asarray(small.image).mean(axis=(0, 1))
    assert np.abs(np.asarray(scene.image).mean(axis=(0, 1)) - wanted).max() < 8


def test_a_size_too_small_for_figures_is_refused() -> None:
    with pytest.raises(ConfigError, match="15 is below 16"):
        draw_scene(0, "val", 0, 15)


# --- questions, statements, labels ----------------------------------------------------------------


def test_a_question_names_one_group_and_its_answer_is_true(scenes: list[Scene]) -> None:
    asked = Counter(q.kind for scene in scenes for q in scene.questions)
    assert set(asked) == {
        "colour", "shape", "size", "texture", "count", "place", "ground", "exists", "relation"
    }  # fmt: skip
    for scene in scenes:
        for q in scene.questions:
            assert q.answer in ANSWERS
            values = [(KIND_OF[w], w) for w in q.text.split() if w in KIND_OF]
            if q.kind in ("colour", "shape", "size", "texture", "count", "place"):
                named = [g for g in scene.groups if all(getattr(g, k) == v for k, v in values)]
                assert [getattr(g, q.kind) for g in named] == [q.answer], q
                assert q.kind not in [k for k, _ in values]
            elif q.kind == "exists":
                assert (q.answer == "yes") == shows(scene.world, tuple(values)), q


def test_a_relation_question_is_answered_by_the_places(scenes: list[Scene]) -> None:
    checked = 0
    for scene in scenes:
        for q in scene.questions:
            if q.kind != "relation":
                continue
            for word in ("left of", "right of", "above", "below"):
                if f" {word} " in q.text:
                    first, _ = q.text.removeprefix("is ").split(f" {word} ")
                    values = [(KIND_OF[w], w) for w in first.split() if w in KIND_OF]
                    (a,) = [g for g in scene.groups if all(getattr(g, k) == v for k, v in values)]
                    place = {"above": "top", "below": "bottom"}.get(word, word.split()[0])
                    assert (q.answer == "yes") == (a.place == place), q
                    checked += 1
    assert checked > len(scenes) // 10


def test_the_words_of_a_question_leave_its_answer_open() -> None:
    """Any one word of the question, with its kind, moves the best guess by less than 8 points."""
    drawn = [q for i in range(6000) for q in draw_scene(5, "test", i).questions]
    by_kind: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for q in drawn:
        by_kind[q.kind].append((q.text, q.answer))
    for kind, rows in by_kind.items():
        prior = max(Counter(answer for _, answer in rows).values()) / len(rows)
        words = {word for text, _ in rows for word in text.split()}
        for word in words:
            answers = Counter(answer for text, answer in rows if word in text.split())
            if answers.total() >= 300:
                share = max(answers.values()) / answers.total()
                assert share < prior + 0.08, (kind, word, share, prior)


def described(text: str) -> tuple[tuple[str, str], ...]:
    """Values of figures in a statement; its "left", "right" and "one" speak of pictures."""
    found = ((KIND_OF[w], w) for w in text.split() if w in KIND_OF)
    return tuple((kind, word) for kind, word in found if kind not in ("place", "count"))


def test_half_of_the_statements_are_true_whatever_their_words_and_all_are_what_they_say() -> None:
    drawn = [draw_comparison(Draws(6, i)) for i in range(3000)]
    for kind in STATEMENT_KINDS:
        truths = [s.truth for s in drawn if s.kind == kind]
        assert abs(np.mean(truths) - 0.5) < 0.08
    for s in drawn:
        values = described(s.text)
        sides = shows(s.left, values), shows(s.right, values)
        surplus = figures(s.left) - figures(s.right)
        truth = {
            "left": sides[0],
            "right": sides[1],
            "both": all(sides),
            "one": sum(sides) == 1,
            "none": not any(sides),
            "more": surplus > 0 if "the left picture" in s.text else surplus < 0,
        }[s.kind]
        assert truth == s.truth, s


def guess_from(side: str, kind: str) -> float:
    """The share of statements of a kind that are judged rightly by one picture alone: by whether
    it shows what is named."""
    seen: dict[bool, Counter[bool]] = defaultdict(Counter)
    for i in range(3000):
        s = draw_comparison(Draws(7, i))
        if s.kind == kind:
            seen[shows(getattr(s, side), described(s.text))][s.truth] += 1
    return sum(max(c.values()) for c in seen.values()) / sum(c.total() for c in seen.values())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["both", "one", "none"])
def test_one_picture_says_something_of_every_statement_and_settles_few(kind, side) -> None:
    """Half of "exactly one" was once an exclusive or, of which one picture alone says nothing: the
    guess stood at a half, and a small model never began to look."""
    assert 0.58 < guess_from(side, kind) < 0.8


def test_an_exclusive_or_is_told_from_it(monkeypatch) -> None:
    text, sides = scene_text._SHOWN["one"]
    even = {True: sides[True], False: ((True, True), (False, False))}
    monkeypatch.setitem(scene_text._SHOWN, "one", (text, even))
    assert guess_from("left", "one") < 0.56


def test_all_classes_are_equally_likely_with_one_group(scenes: list[Scene]) -> None:
    counts = Counter(s.label for s in scenes if len(s.groups) == 1)
    assert set(counts) == set(range(len(CLASSES)))
    assert max(counts.values()) < 2 / len(CLASSES) * counts.total()


# --- the prepared folder --------------------------------------------------------------------------


def members_of(folder: Path, stream: str, split: str) -> Iterable[dict[str, bytes]]:
    for source in open_sources([folder], stream, split):
        for index in range(len(source)):
            yield source.read(index).members


def test_a_prepared_folder_feeds_every_stream_and_task(folder: Path) -> None:
    counts = Counter[tuple[str, str]]()
    for source in Dataset.open(folder).sources:
        counts[source.stream, source.split] += source.records
    for stream in ("pair", "image"):
        assert (counts[stream, "train"], counts[stream, "val"]) == (30, 200)
    for task in ("vqa", "statements", "segmentation"):
        assert (counts[f"task:{task}", "train"], counts[f"task:{task}", "val"]) == (90, 200)
    for (stream, split), records in counts.items():
        assert sum(1 for _ in members_of(folder, stream, split)) == records, (stream, split)


def test_records_hold_the_scenes_of_their_numbers(folder: Path) -> None:
    for index, members in enumerate(members_of(folder, "pair", "train")):
        scene = draw_scene(0, "pair-train", index)
        assert json.loads(members["json"])["captions"] == list(scene.captions)
        assert Image.open(io.BytesIO(members["png"])).tobytes() == scene.image.tobytes()


def test_pairs_images_and_tasks_show_different_pictures(folder: Path) -> None:
    found = [
        {members["png"] for members in members_of(folder, stream, split)}
        for stream in ("pair", "image", "task:vqa", "task:retrieval")
        for split in ("train", "val")
        if (stream, split) != ("task:retrieval", "train")  # reads the shards of vqa
    ]
    assert len(set().union(*found)) == sum(len(pictures) for pictures in found)


def test_texts_hold_one_document_a_line(folder: Path) -> None:
    (members,) = members_of(folder, "text", "train")
    documents = members["txt"].decode().splitlines()
    assert len(documents) == 30
    said = set(documents[0].split(" . "))
    assert said == set(draw_scene(0, "text-train", 0).captions)


def test_no_two_held_out_retrieval_scenes_have_the_same_description(folder: Path) -> None:
    said = [json.loads(m["json"])["captions"] for m in members_of(folder, "task:retrieval", "val")]
    assert len({caption for (caption,) in said}) == len(said) == 500


def test_statement_records_hold_two_pictures(folder: Path) -> None:
    for index, members in enumerate(members_of(folder, "task:statements", "train")):
        statement = draw_statement(0, "task-train", index)
        fields = json.loads(members["json"])
        assert (fields["statement"], fields["truth"]) == (statement.text, statement.truth)
        left = Image.open(io.BytesIO(members["left.png"]))
        assert left.tobytes() == statement.left.tobytes()
        assert members["left.png"] != members["right.png"]


def test_every_word_of_the_world_is_one_piece(folder: Path) -> None:
    tokenizer = TextTokenizer.load(folder)
    lines = {
        c for m in members_of(folder, "pair", "val") for c in json.loads(m["json"])["captions"]
    }
    lines |= {
        q["question"]
        for m in members_of(folder, "task:vqa", "val")
        for q in json.loads(m["json"])["questions"]
    }
    lines |= {
        json.loads(m["json"])["statement"] for m in members_of(folder, "task:statements", "val")
    }
    for line in [*lines, *ANSWERS]:
        ids = tokenizer.encode(line)
        assert len(ids) == len(line.split()), line
        assert tokenizer.unk not in ids


@pytest.mark.slow
def test_the_same_command_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    def digests(root: Path) -> dict[str, str]:
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(root.iterdir())
        }

    prepare_scenes(tmp_path / "again", count=30, seed=0)
    assert digests(folder) == digests(tmp_path / "again")
    prepare_scenes(tmp_path / "other", count=30, seed=1)
    other = digests(tmp_path / "other")
    # So few scenes may have none with two groups, and then no shard of them.
    trained = {name: value for name, value in digests(folder).items() if "train" in name}
    assert all(other.get(name) != value for name, value in trained.items())


def test_a_prepared_folder_is_not_overwritten(folder: Path) -> None:
    with pytest.raises(ConfigError, match="prepared folder already"):
        prepare_scenes(folder, count=30, seed=0)


def test_blind_baselines_are_those_of_uniform_values(scenes: list[Scene]) -> None:
    found = blind_baselines(scenes, [draw_statement(0, "test", i) for i in range(300)])
    for kind, words in ATTRIBUTE_WORDS.items():
        if kind != "place":
            assert found["captions"][kind] == pytest.approx(1 / len(words), abs=0.03)
    assert found["statements"]["majority"] == pytest.approx(0.5, abs=0.08)
    assert found["vqa"]["accuracy"] < 0.45
    assert found["segmentation"]["miou"] < 1 / 6


def test_four_hundred_scenes_a_second_are_drawn() -> None:
    start = time.process_time()
    for index in range(200):
        scene = draw_scene(8, "test", index)
        buffer = io.BytesIO()
        scene.image.save(buffer, "PNG")
        _ = scene.captions
    assert 200 / (time.process_time() - start) > 400


def test_a_relative_folder_is_prepared_like_an_absolute_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare_scenes(Path("here/scenes"), count=4, seed=0)
    assert len(open_sources([Path("here/scenes")], "pair", "train")[0]) == 4
