"""Laws of the cosine codebook: the peer's closed form, k-means, revival, ranks, eval."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from vector_quantize_pytorch import VectorQuantize

from vlbeit.draws import Draws
from vlbeit.tokens.quantizer import CosineCodebook, code_use

CODES, WIDTH = 12, 6


def units(gen: torch.Generator, *shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, WIDTH, generator=gen), dim=-1)


@pytest.fixture
def codebook() -> CosineCodebook:
    book = CosineCodebook(CODES, WIDTH, decay=0.99)
    book.start_random(Draws("codebook"))
    return book


def test_lookup_is_the_nearest_code_by_distance(
    codebook: CosineCodebook, gen: torch.Generator
) -> None:
    z = units(gen, 5, 7)
    far = torch.cdist(z.reshape(-1, WIDTH).double(), codebook.weight.double())
    assert torch.equal(codebook.lookup(z), far.argmin(dim=-1).reshape(5, 7))


def test_lookup_names_the_codes_that_vector_quantize_pytorch_names(gen: torch.Generator) -> None:
    """Assignments alone: its update averages running sums before it normalises, unilm's does not.

    Its vectors are not of length one, as an encoder's are not.
    """
    codebook = CosineCodebook(200, WIDTH)
    codebook.start_random(Draws("peer"))
    z = torch.randn(3, 500, WIDTH, generator=gen) * torch.rand(3, 500, 1, generator=gen)
    theirs = VectorQuantize(WIDTH, codebook_size=200, use_cosine_sim=True).eval()
    theirs._codebook.embed.copy_(codebook.weight[None])
    vectors, codes, _ = theirs(z)
    found = codebook(z)
    assert torch.equal(found.codes, codes)
    assert float((found.vectors - vectors).abs().max()) <= 1e-5
    assert len(codes.unique()) > 150
    # A codebook whose length is left in the product names others.
    lengths = torch.linspace(0.5, 2, 200)[:, None]
    assert not torch.equal((z @ (codebook.weight * lengths).T).argmax(dim=-1), codes)


def test_update_is_the_closed_form_of_norm_ema(
    codebook: CosineCodebook, gen: torch.Generator
) -> None:
    # unilm's norm-EMA (BEiT v2), written out code by code.
    z = units(gen, 15)
    before = codebook.weight.clone()
    found = codebook(z)
    counts = codebook.update(found.units, found.codes)
    assert 0 < (counts > 0).sum() < CODES, "some codes must be taken and some not"
    for code in range(CODES):
        assigned = z[found.codes == code]
        wanted = before[code]
        if len(assigned):
            mean = F.normalize(assigned.mean(dim=0), dim=0)
            wanted = F.normalize(0.99 * before[code] + 0.01 * mean, dim=0)
        torch.testing.assert_close(codebook.weight[code], wanted, atol=1e-6, rtol=0)
        assert counts[code] == len(assigned)
    # The negative check: a mean that is not brought to length one gives another codebook.
    taken = int(counts.argmax())
    plain = z[found.codes == taken].mean(dim=0)
    other = F.normalize(0.99 * before[taken] + 0.01 * plain, dim=0)
    assert not torch.allclose(codebook.weight[taken], other, atol=1e-6, rtol=0)


def test_commitment_is_the_mean_squared_difference(
    codebook: CosineCodebook, gen: torch.Generator
) -> None:
    z = torch.randn(3, 4, WIDTH, generator=gen, requires_grad=True)
    found = codebook(z)
    near = codebook.weight[found.codes]
    torch.testing.assert_close(found.commitment, (F.normalize(z, dim=-1) - near).pow(2).mean())
    torch.testing.assert_close(found.vectors, near)


def test_the_gradient_goes_straight_through(codebook: CosineCodebook, gen: torch.Generator) -> None:
    z = torch.randn(9, WIDTH, generator=gen, requires_grad=True)
    pull = torch.randn(9, WIDTH, generator=gen)
    (codebook(z).vectors * pull).sum().backward()
    free = z.detach().clone().requires_grad_()
    (F.normalize(free, dim=-1) * pull).sum().backward()
    torch.testing.assert_close(z.grad, free.grad)


@pytest.mark.parametrize("training", [True, False])
def test_a_lookup_changes_nothing(
    codebook: CosineCodebook, gen: torch.Generator, training: bool
) -> None:
    before = copy.deepcopy(codebook.state_dict())
    codebook.train(training)(torch.randn(50, WIDTH, generator=gen))
    after = codebook.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_lookup_is_float32_under_autocast(codebook: CosineCodebook, gen: torch.Generator) -> None:
    # Codes that differ by less than bfloat16 can tell.
    close = units(gen, 1).repeat(CODES, 1) + 1e-3 * torch.randn(CODES, WIDTH, generator=gen)
    codebook.weight.copy_(F.normalize(close, dim=-1))
    z = codebook.weight + 1e-5
    alone = codebook(z).codes
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codebook(z).codes, alone)
        naive = (F.normalize(z, dim=-1) @ codebook.weight.T).argmax(dim=-1)
    assert torch.equal(alone, torch.arange(CODES))
    assert not torch.equal(naive, alone), "in bfloat16 they would have been confused"


def test_k_means_finds_separate_groups_however_unequal(gen: torch.Generator) -> None:
    centres = F.normalize(torch.eye(WIDTH)[:4] + 0.05, dim=-1)
    sizes = torch.tensor([200, 40, 8, 8])  # plain ground, and rare things on it
    z = F.normalize(
        centres.repeat_interleave(sizes, 0) + 0.02 * torch.randn(256, WIDTH, generator=gen), dim=-1
    )
    book = CosineCodebook(4, WIDTH)
    book.start(z, Draws("k-means"), iterations=10)
    best = (centres @ book.weight.T).max(dim=-1).values
    assert (best > 0.999).all()
    torch.testing.assert_close(book.share.sort().values, (sizes / 256).sort().values)


def test_k_means_with_few_different_vectors_still_gives_unit_rows(gen: torch.Generator) -> None:
    z = units(gen, 3).repeat(20, 1)
    book = CosineCodebook(CODES, WIDTH)
    book.start(z, Draws("k-means"), iterations=3)
    torch.testing.assert_close(book.weight.norm(dim=-1), torch.ones(CODES))
    assert set(book.lookup(z).unique().tolist()) == set(book.lookup(z[:3]).tolist())


def test_dead_codes_come_back_and_living_ones_stay(
    codebook: CosineCodebook, gen: torch.Generator
) -> None:
    z = units(gen, 200)
    codebook.share.fill_(1 / CODES)
    codebook.share[[2, 7]] = 1e-6
    before = codebook.weight.clone()
    revived = codebook.revive(z, codebook.lookup(z), Draws("revive"), below=0.1)
    assert revived == 2
    for code in (2, 7):
        assert ((z @ codebook.weight[code]).max() - 1).abs() < 1e-6, "it is a vector of the batch"
        assert codebook.share[code] == pytest.approx(1 / CODES)
    assert not torch.equal(codebook.weight[2], codebook.weight[7])
    kept = [code for code in range(CODES) if code not in (2, 7)]
    assert torch.equal(codebook.weight[kept], before[kept])
    assert codebook.revive(z, codebook.lookup(z), Draws("revive"), below=0.1) == 0


def test_revival_can_be_switched_off(codebook: CosineCodebook, gen: torch.Generator) -> None:
    codebook.share.zero_()
    before = codebook.weight.clone()
    z = units(gen, 20)
    assert codebook.revive(z, codebook.lookup(z), Draws("revive"), below=0.0) == 0
    assert torch.equal(codebook.weight, before)


def test_without_revival_and_k_means_a_codebook_on_close_vectors_stays_mostly_dead(
    gen: torch.Generator,
) -> None:
    # What the two are for: vectors in a narrow cone, as an untrained encoder gives them.
    def used_after(remedies: bool) -> float:
        book = CosineCodebook(64, WIDTH, decay=0.9)
        around = units(torch.Generator().manual_seed(1), 1)
        for step in range(60):
            z = F.normalize(around + 0.05 * torch.randn(512, WIDTH, generator=gen), dim=-1)
            if step == 0 and remedies:
                book.start(z, Draws("start"), 10)
            elif step == 0:
                book.start_random(Draws("start"))
            found = book(z)
            counts = book.update(found.units, found.codes)
            if remedies:
                book.revive(found.units, found.codes, Draws("revive", step), 0.1)
        return code_use(counts).used

    assert used_after(remedies=True) > 0.9
    assert used_after(remedies=False) < 0.3


def test_code_use_of_known_counts() -> None:
    even = code_use(torch.full((8,), 5))
    assert even.perplexity == pytest.approx(8)
    assert (even.used, even.top) == (1.0, 0.125)
    one = code_use(torch.tensor([0, 9, 0, 0]))
    assert (one.used, one.perplexity, one.entropy, one.top) == (0.25, 1.0, 0.0, 1.0)
    assert code_use(torch.zeros(4)).perplexity == 0.0


RANK_SCRIPT = """
import sys
import torch
import torch.distributed as dist
import torch.nn.functional as F
from vlbeit.draws import Draws
from vlbeit.tokens.quantizer import CosineCodebook

rank, size, meeting, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
if size > 1:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
gen = torch.Generator().manual_seed(3)
book = CosineCodebook(16, 6, decay=0.9)
book.across_ranks = size > 1
for step in range(30):
    z = F.normalize(torch.randn(50, 6, generator=gen) + (step > 10), dim=-1)
    edges = [0, 50] if size == 1 else [0, 21, 50]  # ranks with unequal parts of the batch
    mine = z[edges[rank] : edges[rank + 1]]
    if step == 0:
        book.start(mine, Draws("start"), 5)
    found = book(mine)
    book.update(found.units, found.codes)
    book.revive(found.units, found.codes, Draws("revive", step), 0.5)
if rank == size - 1:
    torch.save(book.state_dict(), out)
if size > 1:
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_hold_the_codebook_of_one(tmp_path: Path, root: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(root / "src")}

    def run(size: int) -> dict[str, torch.Tensor]:
        out = tmp_path / f"{size}.pt"
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", RANK_SCRIPT, str(r), str(size), tmp_path / "meet", out],
                env=environment,
            )
            for r in range(size)
        ]
        assert [rank.wait(timeout=240) for rank in ranks] == [0] * size
        found: dict[str, torch.Tensor] = torch.load(out, weights_only=True)
        return found

    alone, together = run(1), run(2)
    assert set(alone) == {"weight", "share"}
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], atol=1e-5, rtol=0)
