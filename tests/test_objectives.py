"""Laws of the pretraining objectives. Each test name is the reason it must hold."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tiny_models import MASK_ID, TINY, gradients, masked_batch, random_pixels, tiny_model
from vlbeit.config import ObjectiveConfig
from vlbeit.nn.model import VLBeit
from vlbeit.objectives import OBJECTIVES, half_view, score_batch, score_rows, views
from vlbeit.types import Batch, Score

STREAMS = ("image", "text", "pair")
MODES = ("two_views", "half", "joint")
EXPECTED = {"image": {"mim"}, "text": {"mlm"}, "pair": {"mvlm_text", "mvlm_image"}}


def total(scores: dict[str, Score]) -> Tensor:
    return sum(score.loss_sum for score in scores.values())


def learn(
    model: VLBeit, batch: Batch, config: ObjectiveConfig | None = None
) -> tuple[dict[str, Score], dict[str, Tensor]]:
    model.zero_grad()
    scores = score_batch(model, batch, config or ObjectiveConfig())
    total(scores).backward()
    return {name: score.detach() for name, score in scores.items()}, gradients(model)


# ------------------------------------------------------------------------ who learns


def experts_that_learn(grads: dict[str, Tensor]) -> set[tuple[int, str]]:
    names = [name.split(".") for name in grads if ".experts." in name]
    return {(int(parts[2]), parts[4]) for parts in names}


@pytest.mark.parametrize("vl_layers", [0, 2, 4])
def test_an_image_batch_leaves_text_and_vl_experts_without_gradient(vl_layers):
    _, grads = learn(tiny_model(vl_layers=vl_layers), masked_batch("image"))
    assert experts_that_learn(grads) == {(layer, "v") for layer in range(4)}
    assert all(grad.abs().max() > 0 for grad in grads.values())
    assert not [name for name in grads if name.startswith(("text.", "heads.mlm"))]


@pytest.mark.parametrize("vl_layers", [0, 2, 4])
def test_a_text_batch_leaves_image_and_vl_experts_without_gradient(vl_layers):
    _, grads = learn(tiny_model(vl_layers=vl_layers), masked_batch("text"))
    assert experts_that_learn(grads) == {(layer, "l") for layer in range(4)}
    assert all(grad.abs().max() > 0 for grad in grads.values())
    assert not [name for name in grads if name.startswith(("image.", "heads.mim"))]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vl_layers", [0, 1, 2, 4])
def test_a_pair_batch_teaches_both_experts_below_and_one_on_top(vl_layers, mode):
    config = ObjectiveConfig(mvlm=mode)
    _, grads = learn(tiny_model(vl_layers=vl_layers), masked_batch("pair"), config)
    below = {(layer, expert) for layer in range(4 - vl_layers) for expert in ("v", "l")}
    above = {(layer, "vl") for layer in range(4 - vl_layers, 4)}
    assert experts_that_learn(grads) == below | above
    assert all(grad.abs().max() > 0 for grad in grads.values())


# ------------------------------------------------------------------------ what is asked


@pytest.mark.parametrize("stream", STREAMS)
def test_scores_are_named_by_stream_and_a_weight_of_zero_leaves_one_out(stream):
    model, batch = tiny_model(), masked_batch(stream)
    for mode in MODES:
        assert set(score_batch(model, batch, ObjectiveConfig(mvlm=mode))) == EXPECTED[stream]
        for name in OBJECTIVES:
            config = replace(ObjectiveConfig(mvlm=mode), **{name: 0.0})
            assert set(score_batch(model, batch, config)) == EXPECTED[stream] - {name}


@pytest.mark.parametrize("stream", STREAMS)
def test_counts_are_the_masked_positions(stream):
    batch = masked_batch(stream)
    scores = score_batch(tiny_model(), batch, ObjectiveConfig())
    for name, score in scores.items():
        masked = batch.patch_masked if name in ("mim", "mvlm_image") else batch.word_masked
        assert int(score.count) == int(masked.sum())
        assert 0 <= int(score.correct) <= int(score.count)


def test_a_head_that_knows_nothing_pays_log_vocabulary():
    model = tiny_model()
    for head in model.heads.values():
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    for stream in STREAMS:
        for name, score in score_batch(model, masked_batch(stream), ObjectiveConfig()).items():
            size = TINY.codes if name in ("mim", "mvlm_image") else TINY.vocab
            assert score.mean_loss().item() == pytest.approx(math.log(size), rel=1e-5)


def test_a_head_that_knows_the_answer_is_always_right():
    rows, answers = torch.eye(6) * 50, torch.arange(6)
    score = score_rows(rows, answers, nn.Identity())
    assert score.accuracy() == 1 and score.mean_loss() < 1e-6
    wrong = score_rows(rows, answers.flip(0), nn.Identity())
    assert wrong.accuracy() == 0 and wrong.mean_loss() > 10


@pytest.mark.parametrize("stream", STREAMS)
def test_a_score_is_the_plain_cross_entropy_of_the_whole_forward(stream):
    """The long way: all positions through the last block and the head, then the masked ones."""
    model, batch = tiny_model(), masked_batch(stream)
    scores = score_batch(model, batch, ObjectiveConfig())

    def plain(out: Tensor, head: str, masked: Tensor, answers: Tensor) -> Tensor:
        logs = model.heads[head](out).log_softmax(dim=-1)
        return -logs.gather(-1, answers[..., None])[..., 0][masked].sum()

    wanted = {}
    if stream == "image":
        out = model.backbone(model.embed_image(batch.pixels, batch.patch_masked))
        wanted["mim"] = plain(out[:, 1:], "mim", batch.patch_masked, batch.patch_codes)
    elif stream == "text":
        out = model.backbone(model.embed_text(batch.words_given, batch.word_valid))
        wanted["mlm"] = plain(out, "mlm", batch.word_masked, batch.words)
    else:
        width, valid = batch.words.shape[1], batch.word_valid
        text_view = model.embed_pair(batch.words_given, valid, batch.pixels)
        image_view = model.embed_pair(batch.words, valid, batch.pixels, batch.patch_masked)
        out = model.backbone(text_view)[:, :width]
        wanted["mvlm_text"] = plain(out, "mlm", batch.word_masked, batch.words)
        out = model.backbone(image_view)[:, width + 1 :]
        wanted["mvlm_image"] = plain(out, "mim", batch.patch_masked, batch.patch_codes)
    assert scores.keys() == wanted.keys()
    for name, score in scores.items():
        torch.testing.assert_close(score.loss_sum, wanted[name], rtol=1e-5, atol=1e-4)


# ------------------------------------------------------------------------ what may not leak


def losses(model: VLBeit, batch: Batch, config: ObjectiveConfig | None = None) -> dict[str, float]:
    with torch.no_grad():
        scores = score_batch(model, batch, config or ObjectiveConfig())
    return {name: score.loss_sum.item() for name, score in scores.items()}


@pytest.mark.parametrize("stream", ["image", "pair"])
def test_codes_at_visible_patches_change_nothing(stream):
    model, batch = tiny_model(), masked_batch(stream)
    other = (batch.patch_codes + 1) % TINY.codes
    visible = torch.where(batch.patch_masked, batch.patch_codes, other)
    hidden = torch.where(batch.patch_masked, other, batch.patch_codes)
    before = losses(model, batch)
    assert losses(model, replace(batch, patch_codes=visible)) == before
    assert losses(model, replace(batch, patch_codes=hidden)) != before


@pytest.mark.parametrize("stream", ["text", "pair"])
def test_words_as_answers_at_visible_positions_change_nothing(stream):
    model, batch = tiny_model(), masked_batch(stream)
    config = ObjectiveConfig(mvlm_image=0.0)  # the image view reads the words, rightly
    other = torch.full_like(batch.words, 17)
    visible = torch.where(batch.word_masked, batch.words, other)
    hidden = torch.where(batch.word_masked, other, batch.words)
    before = losses(model, batch, config)
    assert losses(model, replace(batch, words=visible), config) == before
    assert losses(model, replace(batch, words=hidden), config) != before


def scribble_under_masked(batch: Batch) -> Tensor:
    hidden = batch.patch_masked.reshape(-1, 1, 4, 4)
    hidden = hidden.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    return torch.where(hidden, random_pixels(len(batch), (32, 32), seed=9), batch.pixels)


def test_each_view_of_a_pair_hides_one_modality_and_shows_the_other():
    model, batch = tiny_model(), masked_batch("pair")
    before = losses(model, batch)
    pixels = losses(model, replace(batch, pixels=scribble_under_masked(batch)))
    assert pixels["mvlm_image"] == before["mvlm_image"]  # those patches are hidden there
    assert pixels["mvlm_text"] != before["mvlm_text"]  # the text view sees the whole image
    given = torch.where(batch.word_masked, torch.full_like(batch.words, 17), batch.words)
    words = losses(model, replace(batch, words_given=given))
    assert words["mvlm_image"] == before["mvlm_image"]  # the image view sees the whole text
    assert words["mvlm_text"] != before["mvlm_text"]


def test_the_joint_view_hides_both_modalities():
    model, batch = tiny_model(), masked_batch("pair")
    config = ObjectiveConfig(mvlm="joint")
    before = losses(model, batch, config)
    assert losses(model, replace(batch, pixels=scribble_under_masked(batch)), config) == before
    assert (batch.words_given[batch.word_masked] == MASK_ID).all()
    alone = losses(model, batch)  # two views are another, easier question
    assert alone["mvlm_text"] != before["mvlm_text"]
    assert alone["mvlm_image"] != before["mvlm_image"]


def test_the_joint_view_is_one_pass():
    model, calls = tiny_model(), []
    model.backbone.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    for mode, passes in {"two_views": 2, "joint": 1}.items():
        calls.clear()
        score_batch(model, masked_batch("pair"), ObjectiveConfig(mvlm=mode))
        assert len(calls) == passes
        assert views(ObjectiveConfig(mvlm=mode)) == passes


# ------------------------------------------------------------------------ sums


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stream", STREAMS)
def test_micro_batches_add_up_to_the_batch(stream, mode):
    config = ObjectiveConfig(mvlm=mode)
    model = tiny_model(drop_path=0.4)
    batch = masked_batch(stream, 6, depth_draws=True)
    whole, whole_grads = learn(model, batch, config)
    parts: dict[str, Score] = {}
    grads: dict[str, Tensor] = {}
    for places in ([0, 1, 2], [3], [4, 5]):
        scores, some = learn(model, batch.pick(places), config)
        for name, score in scores.items():
            parts[name] = parts[name] + score if name in parts else score
        for name, grad in some.items():
            grads[name] = grads[name] + grad if name in grads else grad
    assert parts.keys() == whole.keys()
    for name, score in whole.items():
        torch.testing.assert_close(parts[name].loss_sum, score.loss_sum, rtol=1e-5, atol=1e-4)
        assert int(parts[name].count) == int(score.count)
        assert int(parts[name].correct) == int(score.correct)
    for name, wanted in whole_grads.items():
        scale = wanted.abs().max().item()
        assert (grads[name] - wanted).abs().max() <= 1e-4 * scale + 1e-6, name


def test_a_mean_of_means_would_be_another_loss():
    model, batch = tiny_model(), masked_batch("text", lengths=(10, 9, 5, 4))
    whole = score_batch(model, batch, ObjectiveConfig())["mlm"].mean_loss()
    halves = [
        score_batch(model, batch.pick(places), ObjectiveConfig())["mlm"].mean_loss()
        for places in ([0, 1], [2, 3])
    ]
    assert abs(whole - sum(halves) / 2) > 1e-3


# ------------------------------------------------------------------------ half


def test_half_shows_each_pair_the_other_view_in_the_next_epoch():
    for index in range(5):
        seen = [half_view(f"coco:{epoch}:{index}") for epoch in range(6)]
        assert set(seen) == {"mvlm_text", "mvlm_image"}
        assert all(a != b for a, b in zip(seen, seen[1:], strict=False))


def test_half_splits_an_epoch_evenly_and_reads_names_with_colons():
    seen = [half_view(f"a:b:0:{index}") for index in range(10)]
    assert seen.count("mvlm_text") == seen.count("mvlm_image") == 5


def test_two_epochs_of_half_are_one_epoch_of_two_views():
    model = tiny_model()
    epochs = [masked_batch("pair", 4, epoch=epoch) for epoch in (0, 1)]
    half = [score_batch(model, batch, ObjectiveConfig(mvlm="half")) for batch in epochs]
    both = score_batch(model, epochs[0], ObjectiveConfig())
    for name, score in both.items():
        added = half[0][name] + half[1][name]
        assert 0 < int(half[0][name].count) < int(score.count)
        assert int(added.count) == int(score.count)
        torch.testing.assert_close(added.loss_sum, score.loss_sum, rtol=1e-5, atol=1e-4)


def test_half_does_not_depend_on_the_company_of_a_pair():
    model, config = tiny_model(), ObjectiveConfig(mvlm="half")
    batch = masked_batch("pair", 4)
    for place in range(4):
        alone = score_batch(model, batch.pick([place]), config)
        assert [name for name, score in alone.items() if score.count] == [
            half_view(batch.sample_ids[place])
        ]


# ------------------------------------------------------------------------ nothing to predict


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stream", STREAMS)
def test_nothing_masked_is_zero_loss_with_a_gradient_and_never_nan(stream, mode, precision):
    model, batch = tiny_model(drop_path=0.3), masked_batch(stream, depth_draws=True)
    nothing = {
        name: torch.zeros_like(value)
        for name in ("patch_masked", "word_masked")
        if (value := getattr(batch, name)) is not None
    }
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        scores = score_batch(model, replace(batch, **nothing), ObjectiveConfig(mvlm=mode))
    assert set(scores) == EXPECTED[stream]
    for score in scores.values():
        assert score.loss_sum.item() == 0 and int(score.count) == 0 and int(score.correct) == 0
        assert score.mean_loss().item() == 0 and score.accuracy().item() == 0
        assert score.loss_sum.requires_grad
    total(scores).backward()
    arrived = gradients(model)
    assert arrived, "the sum must reach the parameters"
    assert all(grad.isfinite().all() and grad.abs().max() == 0 for grad in arrived.values())


def test_a_batch_that_lacks_its_codes_says_so():
    with pytest.raises(ValueError, match="image batch without patch_codes"):
        score_batch(
            tiny_model(), replace(masked_batch("image"), patch_codes=None), ObjectiveConfig()
        )


# ------------------------------------------------------------------------ draws


def test_the_two_views_of_a_pair_drop_their_own_paths():
    model = tiny_model(drop_path=0.5)
    batch = masked_batch("pair", depth_draws=True)
    before = losses(model, batch)
    assert losses(model, batch) == before
    for view, name in enumerate(("mvlm_text", "mvlm_image")):
        draws = batch.depth_draws.clone()
        draws[:, view] = 1 - draws[:, view]
        after = losses(model, replace(batch, depth_draws=draws))
        changed = {n for n in before if after[n] != before[n]}
        assert changed == {name}


def test_picking_samples_keeps_every_field_in_step():
    batch = masked_batch("pair", 4, depth_draws=True)
    picked = batch.pick([2, 0])
    assert picked.sample_ids == (batch.sample_ids[2], batch.sample_ids[0]) and len(picked) == 2
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            assert torch.equal(getattr(picked, name), value[[2, 0]]), name


def test_bf16_scores_stay_near_fp32_scores():
    model = tiny_model()
    for stream in STREAMS:
        batch = masked_batch(stream)
        exact = losses(model, batch)
        with torch.autocast("cpu", torch.bfloat16):
            low = losses(model, batch)
        for name, loss in exact.items():
            assert low[name] == pytest.approx(loss, rel=0.02)
            assert low[name] != loss
