"""What a GPU is given, checked without one: nothing waits for the device, the numbers are the same.

Tensors on the device "meta" have a type and a shape but no content. Whatever asks for content
(`.item()`, `nonzero`, an index of bools) is what a GPU would have to be waited for; here it raises.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tiny_models import TINY, gradients, masked_batch, tiny_config, tiny_model
from vlbeit.config import ObjectiveConfig, RuntimeConfig
from vlbeit.nn.backbone import places_of
from vlbeit.nn.model import VLBeit
from vlbeit.objectives import count_targets, score_batch
from vlbeit.train.block_settings import compiles, set_blocks
from vlbeit.types import STREAMS, Batch

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")
DROPPING = tiny_config(drop_path=0.4)


def batch_of(stream: str, *, dropping: bool = False) -> Batch:
    return masked_batch(stream, 6, config=DROPPING if dropping else TINY, depth_draws=dropping)


def step_without_content(batch: Batch, *, static: bool = True) -> dict[str, tuple[int, ...]]:
    """Forward and backward of a micro-batch that is on "meta"; shapes of the gradients by name."""
    with META:
        model = VLBeit(DROPPING, seed=None)
    if static:
        set_blocks(model, RuntimeConfig(compile="off"), CUDA)
    scores = score_batch(model, batch, ObjectiveConfig())
    torch.stack([score.loss_sum for score in scores.values()]).sum().backward()
    return {n: tuple(p.grad.shape) for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dropping", [False, True], ids=["", "drop path"])
@pytest.mark.parametrize("stream", STREAMS)
def test_forward_and_backward_never_wait_for_the_device(stream, dropping):
    batch = batch_of(stream, dropping=dropping).to(CPU)
    found = step_without_content(batch.to(META))
    model = tiny_model(drop_path=0.4)
    sum(s.loss_sum for s in score_batch(model, batch, ObjectiveConfig()).values()).backward()
    assert set(found) >= set(gradients(model)) > set()


def without_counts(batch: Batch) -> Batch:
    return replace(batch, known=None)


@pytest.mark.parametrize(
    ("stream", "change", "static"),
    [
        ("image", without_counts, True),
        ("text", without_counts, True),
        ("pair", without_counts, True),
        ("pair", lambda batch: batch, False),
    ],
    ids=["image uncounted", "text uncounted", "pair uncounted", "kept samples only"],
)
def test_without_counts_or_static_shapes_it_would_wait(
    stream: str, change: Callable[[Batch], Batch], static: bool
):
    batch = change(batch_of(stream, dropping=True).to(META))
    with pytest.raises((RuntimeError, NotImplementedError), match="[Mm]eta"):
        step_without_content(batch, static=static)


@pytest.mark.parametrize("stream", STREAMS)
def test_counted_on_the_host_a_batch_gives_the_same_numbers(stream):
    found = []
    for batch in (batch_of(stream), batch_of(stream).to(CPU)):
        model = tiny_model()
        scores = score_batch(model, batch, ObjectiveConfig())
        sum(s.loss_sum for s in scores.values()).backward()
        found.append((scores, gradients(model), count_targets(batch, ObjectiveConfig())))
    (plain, grads, counts), (counted, counted_grads, known) = found
    assert counts == known == {name: int(score.count) for name, score in plain.items()}
    assert all(torch.equal(counted[name].loss_sum, s.loss_sum) for name, s in plain.items())
    assert all(torch.equal(counted_grads[name], grad) for name, grad in grads.items())


def test_counts_are_of_the_batch_they_stand_in():
    batch = batch_of("pair").to(CPU)
    assert batch.known == batch.count()
    assert batch.pick([0, 2]).known is None
    assert batch.pick([0, 2]).to(CPU).known.words == int(batch.word_masked[[0, 2]].sum())
    full = masked_batch("text", 3, lengths=(9, 9, 9))
    assert full.to(CPU).valid_words() is None and full.valid_words() is not None
    assert batch_of("text").to(CPU).valid_words() is not None
    wanted = torch.tensor([[True, False], [True, True]])
    assert places_of(wanted, 3).tolist() == places_of(wanted).tolist() == [0, 2, 3]
    with pytest.raises(ValueError, match="3 are wanted, 2 were counted"):
        places_of(wanted, 2)


@pytest.mark.parametrize("stream", STREAMS)
def test_multiplying_dropped_branches_by_0_is_leaving_them_out(stream):
    batch, found = batch_of(stream, dropping=True), []
    for static in (False, True):
        model = tiny_model(drop_path=0.4)
        for block in model.backbone.blocks:
            block.static_shapes = static
        sum(s.loss_sum for s in score_batch(model, batch, ObjectiveConfig()).values()).backward()
        found.append(gradients(model))
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-5, msg=name)
    undropped = tiny_model(drop_path=0.0)
    sum(s.loss_sum for s in score_batch(undropped, batch, ObjectiveConfig()).values()).backward()
    # The first block is never dropped from, but all that stand on it are.
    name = "backbone.blocks.0.attention.qkv.weight"
    assert not torch.allclose(gradients(undropped)[name], found[0][name], rtol=1e-2)


def test_blocks_are_compiled_on_a_gpu_and_not_on_a_cpu_unless_asked():
    assert compiles(RuntimeConfig(), CUDA) and not compiles(RuntimeConfig(), CPU)
    assert compiles(RuntimeConfig(compile="on"), CPU)
    assert not compiles(RuntimeConfig(compile="off"), CUDA)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_blocks_give_the_same_gradients_under_the_same_names():
    found = []
    for setting in ("off", "on"):
        model = tiny_model(drop_path=0.4, layers=2, vl_layers=1)
        names = list(model.state_dict())
        set_blocks(model, RuntimeConfig(compile=setting), CPU)
        assert list(model.state_dict()) == names
        batch = masked_batch("pair", 6, config=model.config, depth_draws=True).to(CPU)
        scores = score_batch(model, batch, ObjectiveConfig())
        sum(s.loss_sum for s in scores.values()).backward()
        found.append(gradients(model))
        compiled = [b._compiled_call_impl is not None for b in model.backbone.blocks]
        assert all(compiled) if setting == "on" else not any(compiled)
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-3, atol=1e-5, msg=name)
