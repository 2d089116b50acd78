"""What a forward pass leaves to the backward pass, beside BEiT-3's: same batch, same counting.

    PYTHONPATH=src python benchmarks/peer_memory.py PEERS.py --dtype bf16

PEERS.py is the peer benchmark that peer_hook.py is for; what it takes (`--images`, `--dtype` ...)
can follow. Counted are the bytes that malloc holds more after a forward pass than before
(train/memory.py), in MiB, of the second pass. BEiT-3 takes its streams together in one backward
pass; ours go one after the other, so that the largest counts.
"""

import gc
import importlib.util
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from peer_hook import make_bench

from vlbeit.train.memory import ActivationMemory
from vlbeit.types import STREAMS

CPU = torch.device("cpu")


def of_ours(work: Any, batch: Any) -> dict[str, float]:
    """MiB by stream."""
    step = make_bench(work, batch)["step"]
    step()
    step.held = ActivationMemory(CPU)
    step()
    return step.held.mb()


def of_peer(peer: Any, work: Any, batch: Any) -> float:
    """MiB of one forward pass of all streams of the batch."""
    held = ActivationMemory(CPU)
    for _ in range(2):
        cast = torch.autocast("cpu", torch.bfloat16) if work.dtype == "bf16" else nullcontext()
        with held.forward("all"), cast:
            loss = peer.losses(batch)
        loss.backward()
        peer.net.zero_grad(set_to_none=True)
    return held.mb()["all"]


def main(argv: list[str]) -> int:
    spec = importlib.util.spec_from_file_location("peers", argv[0])
    assert spec is not None and spec.loader is not None
    peers = importlib.util.module_from_spec(spec)
    sys.modules["peers"] = peers
    spec.loader.exec_module(peers)
    peers.declare_torchvision_ops()
    words = dict(zip(argv[1::2], argv[2::2], strict=True))
    given = {name.removeprefix("--").replace("-", "_"): value for name, value in words.items()}
    plain = peers.Work()
    work = replace(plain, **{k: type(getattr(plain, k))(v) for k, v in given.items()})
    ours = of_ours(work, peers.make_batch(work))
    gc.collect()
    print(f"{'':8}{'ours':>8}{'BEiT-3':>8}{'ratio':>7}   MiB, {work.dtype}")
    for stream in (*STREAMS, "all"):
        counts = {s: getattr(work, f"{s}s") * (stream in (s, "all")) for s in STREAMS}
        part = replace(work, **{f"{s}s": count for s, count in counts.items()})
        torch.manual_seed(0)
        theirs = of_peer(peers.Beit3(part, SimpleNamespace()), part, peers.make_batch(part))
        mine = max(ours.values()) if stream == "all" else ours[stream]
        print(f"{stream:8}{mine:8.0f}{theirs:8.0f}{theirs / mine:7.2f}")
        gc.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
