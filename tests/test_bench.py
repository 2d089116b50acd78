"""The benchmark counts what it says it counts, and the peer hook trains on the shared batch."""

import importlib.util
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tiny_models import masked_batch, tiny_config, tiny_model
from vlbeit.cli import main
from vlbeit.config import (
    CropConfig,
    ObjectiveConfig,
    OptimConfig,
    PretrainConfig,
    TextTokenizerConfig,
)
from vlbeit.data.transforms import augment, decode_image
from vlbeit.draws import Draws
from vlbeit.errors import ConfigError
from vlbeit.nn import backbone
from vlbeit.nn.flops import training_flops
from vlbeit.objectives import count_targets, score_batch
from vlbeit.recipes import PRETRAIN
from vlbeit.tokens.text import train_text_tokenizer
from vlbeit.train.bench import parse
from vlbeit.train.bench_data import (
    Padding,
    generate,
    load_steps,
    photo,
    pillow_alone,
    read_all,
    sentence,
)
from vlbeit.train.bench_step import Step, random_batch
from vlbeit.train.limit import matrix_limit
from vlbeit.types import STREAMS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def hook(request):
    path = request.config.rootpath / "benchmarks" / "peer_hook.py"
    spec = importlib.util.spec_from_file_location("peer_hook", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["peer_hook"] = module
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------ the step


def run_config(**changes) -> PretrainConfig:
    config = PretrainConfig(recipe="t", model=tiny_config(), precision="fp32")
    return replace(config, optim=OptimConfig(clip=0.0), **changes)


def test_a_step_minimises_the_sum_of_mean_losses():
    model = tiny_model()
    batches = [masked_batch(name) for name in STREAMS]
    wanted = sum(
        score.mean_loss().item()
        for batch in batches
        for score in score_batch(model, batch, ObjectiveConfig()).values()
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = Step(model, batches, optimizer, run_config(), CPU)
    assert step() == pytest.approx(wanted, rel=1e-5)
    losses = [step() for _ in range(10)]
    assert losses[-1] < wanted


def test_cutting_a_batch_into_micro_batches_leaves_the_step_as_it_is():
    losses = []
    for cut in (False, True):
        model = tiny_model()
        whole = masked_batch("pair", 4)
        batches = [whole.pick([0, 1]), whole.pick([2, 3])] if cut else [whole]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        step = Step(model, batches, optimizer, run_config(), CPU)
        losses.append([step(), step()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("stream", STREAMS)
def test_random_input_is_masked_as_in_a_run(stream):
    config = PRETRAIN["base"]()
    batch = random_batch(stream, 2, config)
    if stream != "text":
        assert batch.patch_masked.sum(dim=1).tolist() == [75, 75]
        assert batch.pixels.shape == (2, 3, 224, 224) and batch.patch_codes.max() < 8192
    if stream != "image":
        length, rate = (196, 0.15) if stream == "text" else (64, 0.5)
        assert batch.words.shape == (2, length) and batch.word_valid.all()
        assert batch.word_masked.sum(dim=1).tolist() == [round((length - 2) * rate)] * 2
    passes = 2 if stream == "pair" else 1
    assert batch.depth_draws.shape == (2, passes, 24)


def test_the_machine_limit_is_measured_even_where_a_product_takes_too_long():
    assert matrix_limit(CPU, "fp32", seconds=0.0) > 0


@pytest.fixture
def restored_kernels():
    """The command chooses deterministic kernels for its process, which is ours here."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


def test_the_command_prints_rates_that_agree_with_each_other(capsys, restored_kernels):
    words = ["bench", "--recipe", "tiny", "--samples", "2", "--steps", "1", "--threads", "1"]
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["samples"] == {"image": 2, "text": 2, "pair": 2}
    seconds = report["step_seconds"]
    assert report["samples_per_second"] == pytest.approx(6 / seconds, rel=0.01)
    assert report["tokens_per_second"] == pytest.approx(
        sum(report["tokens"].values()) / seconds, rel=0.01
    )
    assert 0 < report["limit_share"] and 0 < report["limit_share_cpu"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "samples/s" in text and "tokens/s" in text and "of the limit" in text


def test_settings_of_the_recipe_reach_the_benchmark_and_strangers_are_refused():
    bench = parse(["--recipe", "tiny", "--precision", "bf16", "--samples", "3"], "vlbeit bench")
    assert bench.run.precision == "bf16" and bench.run.batch.pairs == 3
    with pytest.raises(ConfigError, match="precison"):
        parse(["--recipe", "tiny", "--precison", "bf16"], "vlbeit bench")
    with pytest.raises(ConfigError, match="--samples"):
        parse(["--samples", "0"], "vlbeit bench")


# ------------------------------------------------------------------------ the data


def test_generated_photos_are_pictures_of_the_size_that_is_claimed():
    data = photo(Draws("a"))
    assert decode_image(data).shape == (375, 500, 3)
    assert 95_000 < len(data) < 135_000
    assert data == photo(Draws("a")) != photo(Draws("b"))


def test_every_stream_is_loaded_through_the_loader_of_a_run(tmp_path, monkeypatch):
    from vlbeit.train import bench_data

    monkeypatch.setattr(bench_data, "PHOTOS", 8)
    monkeypatch.setattr(bench_data, "SMALL_RECORDS", 50)
    monkeypatch.setattr(bench_data, "DOCUMENTS", 400)
    monkeypatch.setattr(bench_data, "MICRO", 4)
    sources = generate(tmp_path)
    assert read_all(sources["small"]) == 50
    lines = [sentence(Draws("x", i), 20) for i in range(50)]
    tokenizer = train_text_tokenizer(lines, TextTokenizerConfig(kind="wordpiece", vocab=256))
    streams = {
        "image": [sources["photos"]],
        "text": [sources["documents"]],
        "pair": [sources["photos"]],
    }
    for stream in STREAMS:
        config = PRETRAIN["tiny"]()
        padding = Padding()
        load = load_steps(config, stream, streams, tokenizer, tmp_path, 2, padding)
        assert load() == 8
        assert load() == 8
        assert padding.tokens > 0
        assert (padding.share > 0) == (stream == "pair")  # texts are packed into full chunks


def test_what_is_compared_with_is_the_same_crop_by_pillow_alone():
    """Otherwise the ratio between the two would say nothing."""
    crop = CropConfig(jitter=0.0)
    for number in range(6):
        data = photo(Draws("compared", number))
        theirs = np.asarray(pillow_alone(data, Draws(number), (64, 64), crop)).astype(int)
        ours = augment(decode_image(data), Draws(number), (64, 64), crop).transpose(1, 2, 0)
        # Pillow's box has half a support of context beyond its edge, the crop has not.
        assert np.abs(ours - theirs)[2:-2, 2:-2].mean() < 0.5
        other = np.asarray(pillow_alone(data, Draws(number + 50), (64, 64), crop)).astype(int)
        assert np.abs(ours - other).mean() > 5


# ------------------------------------------------------------------------ the peer hook


def shared_batch(work, *, lengths: list[int]):
    """A batch in the shape the peer benchmark hands out."""
    generator = torch.Generator().manual_seed(0)
    patches = (work.image_size // work.patch) ** 2

    def words(length: int):
        clean = torch.randint(5, work.vocab, (len(lengths), length), generator=generator)
        valid = torch.arange(length)[None] < torch.tensor(lengths)[:, None]
        clean = clean.masked_fill(~valid, 0)
        hide = valid & (torch.rand(clean.shape, generator=generator) < 0.4)
        hide[:, 1] = True
        return {
            "clean": clean,
            "ids": clean.masked_fill(hide, 4),
            "labels": clean.masked_fill(~hide, -100),
            "valid": valid.long(),
            "lengths": lengths,
        }

    def picture():
        hide = torch.zeros(len(lengths), patches, dtype=torch.bool)
        hide[:, :5] = True
        size = (len(lengths), 3, work.image_size, work.image_size)
        return {
            "pixels": torch.randn(size, generator=generator),
            "codes": torch.randint(0, work.codes, hide.shape, generator=generator),
            "mask": hide,
        }

    longest = max(lengths)
    return {"image": picture(), "text": words(longest), "pair": {**picture(), **words(longest)}}


WORK = SimpleNamespace(
    image_size=32, patch=8, width=32, heads=4, layers=2, ffn=48, vl_layers=1, vocab=50, codes=40,
    text_len=12, pair_text_len=12, dtype="fp32", seed=0,
)  # fmt: skip


def test_the_hook_gives_what_the_peer_benchmark_asks_for(hook):
    made = hook.make_bench(WORK, shared_batch(WORK, lengths=[12, 7, 4]))
    assert set(made["streams"]) == set(STREAMS) == set(made["encode"])
    first = made["step"]()
    assert made["step"]() < first
    assert made["params"] > 10_000 and made["version"].startswith("vlbeit ")
    for encode in made["encode"].values():
        encode()


def test_without_its_padding_a_step_has_the_same_loss(hook, monkeypatch):
    batch = shared_batch(WORK, lengths=[12, 2, 4] * 22)
    losses = []
    for share in (0.15, 1.1):  # of padding, from which the real tokens are packed
        monkeypatch.setattr(backbone, "PACKED_FROM", share)
        losses.append(hook.make_bench(WORK, batch)["step"]())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_memory_of_a_peer_is_what_its_forward_pass_keeps(hook, request):
    spec = importlib.util.spec_from_file_location(
        "peer_memory", request.config.rootpath / "benchmarks" / "peer_memory.py"
    )
    memory = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(memory)
    net = torch.nn.Linear(1, 1_000_000)

    def losses(batch):
        return net(batch).exp().sin().sum()  # exp keeps its result, sin what it was given: the same

    peer = SimpleNamespace(net=net, losses=losses)
    mb = memory.of_peer(peer, SimpleNamespace(dtype="fp32"), torch.ones(2, 1))
    assert mb == pytest.approx(2 * 4_000_000 / 2**20, rel=0.02)
    ours = memory.of_ours(WORK, shared_batch(WORK, lengths=[12, 7, 4]))
    assert set(ours) == set(STREAMS) and min(ours.values()) > 0


def test_needed_work_is_counted_as_the_peer_benchmark_counts_it(shared_data, hook):
    """The same number, derived from its tensors by us and from its sizes by the benchmark."""
    path = shared_data.parent / "bench" / "peers.py"
    spec = importlib.util.spec_from_file_location("peers", path)
    peers = importlib.util.module_from_spec(spec)
    sys.modules["peers"] = peers
    spec.loader.exec_module(peers)
    work = peers.Work(images=2, texts=3, pairs=3, text_fill=0.6, pair_text_fill=0.6)
    shared = peers.make_batch(work)
    model = replace(
        PRETRAIN["base"]().model, vocab=work.vocab, codes=work.codes, vl_layers=work.vl_layers
    )
    for stream in STREAMS:
        batch = hook.to_batch(stream, shared[stream])
        counts = count_targets(batch, ObjectiveConfig(mvlm="joint"))
        ours = training_flops(model, batch, 1, counts)
        # it adds a (width, width) layer to the word head, which ours does not have
        words = 0 if batch.word_masked is None else int(batch.word_masked.sum())
        theirs = work.useful_flops(stream) - 3 * words * 2 * work.width**2
        assert ours == theirs
        assert batch.tokens() == work.tokens(stream)
