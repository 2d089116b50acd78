"""Laws of the contrastive loss and of hard negatives; two ranks against one process."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlbeit.tasks import contrast as module
from vlbeit.tasks.contrast import START_LOG_SCALE, contrast, draw_hard, keyed_uniforms

SOURCE = Path(module.__file__).parents[2]
PAIRS, WIDTH = 8, 6


def make_pairs(repeated: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Image inputs, text inputs and image ids of PAIRS pairs; `repeated`: 0, 3 and 6 are one."""
    gen = torch.Generator().manual_seed(seed)
    images = torch.randn(PAIRS, WIDTH, generator=gen)
    texts = images + 0.5 * torch.randn(PAIRS, WIDTH, generator=gen)
    ids = torch.arange(PAIRS) * 11
    if repeated:
        for place in (3, 6):
            images[place], ids[place] = images[0], ids[0]
    return images, texts, ids


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1)


def brute_mean(images: Tensor, texts: Tensor, scale: float, ids: list[int], repeated: str) -> float:
    """The mean over all 2 B questions, number by number."""
    losses = []
    for queries, answers in ((images, texts), (texts, images)):
        for i, query in enumerate(queries.double()):
            logits = [scale * float(query @ answer) for answer in answers.double()]
            rivals = [
                j for j in range(len(ids)) if repeated == "positives" or j == i or ids[j] != ids[i]
            ]
            right = [j for j in rivals if ids[j] == ids[i]]
            log_sum = math.log(sum(math.exp(logits[j]) for j in rivals))
            losses.append(sum(log_sum - logits[j] for j in right) / len(right))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("with_repeats", [False, True], ids=["distinct", "repeated"])
@pytest.mark.parametrize("repeated", ["positives", "masked"])
def test_the_loss_equals_its_definition_term_by_term(repeated, with_repeats):
    images, texts, ids = make_pairs(with_repeats)
    score = contrast(unit(images), unit(texts), torch.tensor(START_LOG_SCALE), ids, repeated).score
    expected = brute_mean(unit(images), unit(texts), 1 / 0.07, ids.tolist(), repeated)
    assert int(score.count) == 2 * PAIRS
    assert score.mean_loss().item() == pytest.approx(expected, abs=1e-5)


def test_without_repeats_it_is_the_symmetric_cross_entropy_of_clip():
    images, texts, ids = make_pairs(False)
    logits = math.exp(START_LOG_SCALE) * unit(images) @ unit(texts).T
    target = torch.arange(PAIRS)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    for repeated in ("positives", "masked"):
        found = contrast(unit(images), unit(texts), torch.tensor(START_LOG_SCALE), ids, repeated)
        assert torch.allclose(found.score.mean_loss(), expected, atol=1e-6)
        hits = (logits.argmax(1) == target).sum() + (logits.argmax(0) == target).sum()
        assert int(found.score.correct) == int(hits)


def gradient_of(texts: Tensor, images: Tensor, ids: Tensor, repeated: str) -> Tensor:
    texts = texts.clone().requires_grad_()
    contrast(unit(images), unit(texts), torch.tensor(2.0), ids, repeated).score.loss_sum.backward()
    return texts.grad


def test_masked_another_caption_of_the_same_image_changes_nothing_for_a_pair():
    images, texts, ids = make_pairs(True)
    parts = {}
    for name, given in (("as it is", texts), ("moved", texts.clone())):
        if name == "moved":
            given[3] = -given[3]
        for repeated in ("masked", "positives"):
            found = contrast(unit(images), unit(given), torch.tensor(2.0), ids, repeated)
            row = module.ask(found.text_logits[:1], found.same[:1], torch.tensor([0]), repeated)
            parts[name, repeated] = row.loss_sum.item()
    assert parts["as it is", "masked"] == parts["moved", "masked"]
    assert abs(parts["as it is", "positives"] - parts["moved", "positives"]) > 1e-2


def test_captions_of_one_image_do_not_push_each_other_away():
    """Where ids are told apart (VLMo's code), a caption is pushed from a copy of its own image."""
    images = torch.eye(WIDTH)[[0, 0, 1]]
    texts = unit(images + 0.1)
    own, apart = torch.tensor([5, 5, 9]), torch.tensor([5, 6, 9])
    for repeated in ("positives", "masked"):
        scores = [
            contrast(images, texts, torch.tensor(3.0), ids, repeated).score for ids in (own, apart)
        ]
        if repeated == "masked":
            assert scores[0].mean_loss() < 0.1
        assert scores[0].correct == 6
        assert scores[1].mean_loss() > 0.4


def test_the_order_of_pairs_changes_no_sum():
    images, texts, ids = make_pairs(True)
    turned = torch.randperm(PAIRS)
    for repeated in ("positives", "masked"):
        first = contrast(unit(images), unit(texts), torch.tensor(2.0), ids, repeated).score
        second = contrast(
            unit(images)[turned], unit(texts)[turned], torch.tensor(2.0), ids[turned], repeated
        ).score
        assert torch.allclose(first.loss_sum, second.loss_sum, atol=1e-5)
        assert first.correct == second.correct


def test_the_temperature_learns_and_low_precision_is_left_outside():
    images, texts, ids = make_pairs(True)
    log_scale = torch.tensor(START_LOG_SCALE, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = contrast(unit(images), unit(texts), log_scale, ids)
    full = contrast(unit(images), unit(texts), log_scale, ids)
    assert torch.equal(low.score.loss_sum, full.score.loss_sum)
    full.score.loss_sum.backward()
    assert log_scale.grad is not None and log_scale.grad.abs() > 1e-3


# -- hard negatives --------------------------------------------------------------------------


@pytest.mark.parametrize("hardness", [1.0, 0.5, 0.0])
def test_hard_negatives_follow_the_softmax_and_avoid_the_own_image(hardness):
    gen = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 7, generator=gen) * 2
    same = torch.zeros(3, 7, dtype=torch.bool)
    same[0, [0, 4]] = same[1, 6] = same[2, 5] = True
    rows = 4000
    for row in range(3):
        drawn = draw_hard(
            logits[row].expand(rows, -1),
            same[row].expand(rows, -1),
            keyed_uniforms([f"s:{i}" for i in range(rows)], 0, "hard", row),
            hardness,
        )
        share = torch.bincount(drawn, minlength=7) / rows
        expected = (hardness * logits[row]).masked_fill(same[row], float("-inf")).softmax(dim=0)
        assert (share[same[row]] == 0).all()
        assert (share - expected).abs().max() < 4 * (0.25 / rows) ** 0.5
    # Negative control: the same draws are not those of another hardness.
    other = 1.0 if hardness < 1 else 0.0
    wrong = (other * logits[2]).masked_fill(same[2], float("-inf")).softmax(dim=0)
    assert (share - wrong).abs().max() > 4 * (0.25 / rows) ** 0.5


def test_a_draw_depends_on_its_sample_and_its_scores_alone():
    gen = torch.Generator().manual_seed(2)
    logits, same = torch.randn(5, 9, generator=gen), torch.zeros(5, 9, dtype=torch.bool)
    names = [f"pairs:0:{i}" for i in range(5)]
    drawn = draw_hard(logits, same, keyed_uniforms(names, 7, "hard text"))
    apart = [
        draw_hard(logits[i : i + 1], same[:1], keyed_uniforms(names[i : i + 1], 7, "hard text"))
        for i in (4, 2, 0, 1, 3)
    ]
    assert [int(a) for a in apart] == [int(drawn[i]) for i in (4, 2, 0, 1, 3)]
    many = [keyed_uniforms(names, 7, kind).tolist() for kind in ("hard text", "hard image")]
    assert not set(many[0]) & set(many[1])


def test_the_ends_of_the_range_draw_something_allowed():
    logits = torch.tensor([[0.0, 1.0, -2.0, 500.0, -500.0]])
    same = torch.tensor([[True, False, False, False, True]])
    for uniform in (0.0, 0.5, 1.0 - 2**-53, 1.0):
        found = int(draw_hard(logits, same, torch.tensor([uniform], dtype=torch.float64)))
        assert not same[0, found]
    first = draw_hard(logits[:, :3], same[:, :3], torch.zeros(1, dtype=torch.float64))
    assert int(first) == 1
    nobody = draw_hard(logits, torch.ones_like(same), torch.tensor([0.3], dtype=torch.float64))
    assert int(nobody) == -1


# -- two ranks -------------------------------------------------------------------------------

RANK = """
import json, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
import test_contrast as laws
from vlbeit.tasks import contrast as module
from vlbeit.train.distributed import init_world

world = init_world("cpu", 60)
first = laws.PAIRS // 2 + 1  # the ranks have different numbers of pairs
part = slice(0, first) if world.rank == 0 else slice(first, laws.PAIRS)
told = {}
for name in ("positives", "masked", "local gradient"):
    if name == "local gradient":  # VLMo's gather: only the own part keeps its gradient
        def local(x, shares):
            whole, own = module.gather_values(x, shares), shares.places
            return torch.cat((whole[:own.start], x, whole[own.stop:]))
        module.gather_with_gradient = local
    told[name] = laws.one_step(
        "masked" if name == "masked" else "positives", part, world.sum_over_ranks,
    )
words = torch.full((2, 3 + world.rank), 5 + world.rank)
shares = module.share_sizes(2, words.device)
every, valid = module.gather_words(words, words > 0, shares)
told["words"], told["valid"] = every.tolist(), valid.tolist()
Path(sys.argv[2], f"told-{world.rank}.json").write_text(json.dumps(told))
world.close()
"""


def one_step(repeated: str, part: slice, add: object) -> dict[str, list]:
    """Loss, gradients and hard negatives of two small encoders over a part of the pairs."""
    images, texts, ids = make_pairs(True)
    towers = nn.ModuleDict({"i": nn.Linear(WIDTH, 5), "t": nn.Linear(WIDTH, 5)})
    gen = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in towers.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=gen))
    log_scale = nn.Parameter(torch.tensor(1.5))
    found = contrast(
        unit(towers["i"](images[part])), unit(towers["t"](texts[part])), log_scale, ids[part],
        repeated,
    )  # fmt: skip
    found.score.loss_sum.backward()
    gradients = [p.grad for p in (*towers.parameters(), log_scale)]
    numbers = torch.cat([found.score.loss_sum.detach().view(1), *(g.flatten() for g in gradients)])
    counts = torch.stack((found.score.count, found.score.correct))
    names = [f"pairs:0:{i}" for i in range(PAIRS)][part]
    drawn = draw_hard(found.text_logits, found.same, keyed_uniforms(names, 0, "hard text"))
    places = torch.full((PAIRS,), 0)
    places[part] = drawn
    return {
        "numbers": add(numbers).tolist(),
        "counts": add(counts).tolist(),
        "negatives": add(places).tolist(),
    }


@pytest.mark.slow
def test_two_ranks_have_the_loss_gradient_and_negatives_of_one_process(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        + ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        + [str(script), str(Path(__file__).parent), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Files: lines as long as these, on one output, run into each other.
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0] == told[1]
    alone = {r: one_step(r, slice(0, PAIRS), lambda x: x) for r in ("positives", "masked")}
    for repeated, expected in alone.items():
        found = told[0][repeated]
        assert found["counts"] == expected["counts"] and found["counts"][0] == 2 * PAIRS
        assert found["negatives"] == expected["negatives"]
        assert worst(found, expected) <= 1e-5
    # The negative control: a gather that loses gradient has the loss, and not the gradient.
    losses = [one["numbers"][0] for one in (told[0]["local gradient"], alone["positives"])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert worst(told[0]["local gradient"], alone["positives"]) > 1e-2
    assert worst(alone["masked"], alone["positives"]) > 1e-2
    assert told[0]["words"] == [[5, 5, 5, 0]] * 2 + [[6] * 4] * 2
    assert told[0]["valid"] == [[True] * 3 + [False]] * 2 + [[True] * 4] * 2


def worst(one: dict[str, list], other: dict[str, list]) -> float:
    """The largest difference, relative where the numbers are above 1."""
    pairs = zip(one["numbers"], other["numbers"], strict=True)
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)
