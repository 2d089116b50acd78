"""`vlbeit bench data`: what reading, decoding, cropping, masking and collating cost.

Everything goes through the classes of a run (records, streams, loader) on generated files: photos
of 500 x 375 in JPEG quality 90, captions, documents, and 20,000 small records for the reader.
Rates are per core: samples over the CPU seconds of this process. Other jobs on the machine slow
them through shared caches and cores, so decoding and cropping by Pillow alone is timed beside them.
"""

import io
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlbeit.config import BatchConfig, CropConfig, PretrainConfig, TextTokenizerConfig
from vlbeit.data.loader import build_loader, build_streams
from vlbeit.data.records import RecordSource, write_shards
from vlbeit.data.transforms import augment, crop_box, decode_image, jpeg_decoder
from vlbeit.draws import Draws
from vlbeit.tokens.text import TextTokenizer, train_text_tokenizer
from vlbeit.tokens.vqkd import VQKD, VQKDTokenizer
from vlbeit.train.bench_step import BenchConfig, Took, describe_machine, machine, measure_step
from vlbeit.types import STREAMS, Batch, Stream

PHOTOS, SMALL_RECORDS, DOCUMENTS = 256, 20_000, 4_000
MICRO = 64
ROUNDS = 3
WORDS = (
    "a the man woman child dog red blue green black white small large two three on in near under "
    "street water grass table field snow beach runs stands holds plays jumps looks sits rides"
).split()


def photo(draws: Draws) -> bytes:
    """A JPEG of 500 x 375: smooth colours and grain, about as many bytes as a photo (115 kB)."""
    coarse = draws.integers(0, 256, 8 * 11 * 3).astype(np.uint8).reshape(8, 11, 3)
    smooth = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
    grain = draws.integers(-38, 39, 375 * 500).reshape(375, 500, 1)
    pixels = np.clip(np.asarray(smooth).astype(np.int64) + grain, 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=90)
    return out.getvalue()


def sentence(draws: Draws, words: int) -> str:
    return " ".join(WORDS[i] for i in draws.integers(0, len(WORDS), words))


def generate(folder: Path) -> dict[str, RecordSource]:
    """Sources "photos" (pairs, used for images too), "documents" and "small"."""

    def pairs() -> Iterator[tuple[str, dict[str, bytes]]]:
        for index in range(PHOTOS):
            draws = Draws("bench", "pair", index)
            captions = [sentence(draws, draws.integer(6, 16)) for _ in range(5)]
            text = json.dumps({"captions": captions}).encode()
            yield f"{index:06d}", {"jpg": photo(draws), "json": text}

    def documents() -> Iterator[tuple[str, dict[str, bytes]]]:
        for index in range(DOCUMENTS // 100):
            draws = Draws("bench", "documents", index)
            lines = [sentence(draws, draws.integer(20, 180)) for _ in range(100)]
            yield f"{index:06d}", {"txt": "\n".join(lines).encode()}

    def small() -> Iterator[tuple[str, dict[str, bytes]]]:
        for index in range(SMALL_RECORDS):
            content = Draws("bench", "small", index).raw(128).tobytes()  # 1 kB
            yield f"{index:06d}", {"jpg": content, "json": b'{"label": 3, "class": "shoe"}'}

    made = {"photos": pairs(), "documents": documents(), "small": small()}
    return {
        name: RecordSource(name, [str(p) for p in write_shards(records, folder, name)])
        for name, records in made.items()
    }


def per_core(call: Callable[[], int]) -> dict[str, float]:
    """How many a second `call` makes, over CPU seconds of this process and by the wall: the best
    of `ROUNDS` calls, for neighbours on the machine can only slow it."""
    walls, processors = [], []
    for _ in range(ROUNDS):
        wall, processor = time.perf_counter(), time.process_time()
        count = call()
        processors.append(time.process_time() - processor)
        walls.append(time.perf_counter() - wall)
    wall, processor = min(walls), min(processors)
    return {
        "count": count,
        "per_core": round(count / processor, 1),
        "per_second": round(count / wall, 1),
    }


def read_all(source: RecordSource) -> int:
    """Every record, in random order, digests checked."""
    for index in Draws("bench", "order").permutation(len(source)).tolist():
        source.read(index)
    return len(source)


def pillow_alone(data: bytes, draws: Draws, size: tuple[int, int], crop: CropConfig) -> Image.Image:
    """Decode, crop, resize and flip as a loader without this package would: what to compare with.

    The draws and the crop are those of `augment`.
    """
    image = Image.open(io.BytesIO(data))
    image.load()
    top, left, rows, columns = crop_box(image.height, image.width, draws, crop.scale, crop.ratio)
    box = (left, top, left + columns, top + rows)
    part = image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
    flipped = draws.uniform() < crop.flip
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else part


class Padding:
    """Places of the model's input that hold no token, counted over micro-batches."""

    def __init__(self) -> None:
        self.tokens = self.empty = 0

    def add(self, batch: Batch) -> None:
        self.tokens += batch.tokens()
        self.empty += batch.padding()

    @property
    def share(self) -> float:
        """In [0, 1): of all places that the model computes."""
        return self.empty / (self.tokens + self.empty)


def load_steps(
    config: PretrainConfig,
    stream: Stream,
    sources: dict[Stream, list[RecordSource]],
    tokenizer: TextTokenizer,
    folder: Path,
    steps: int,
    padding: Padding | None = None,
) -> Callable[[], int]:
    """A call that makes `steps` micro-batches of one stream as the loader does.

    Args:
        padding: counts what was made.
    """
    counts = {f"{name}s": MICRO if name == stream else 0 for name in STREAMS}
    config = replace(config, batch=BatchConfig(micro=MICRO, **counts))
    streams = build_streams(config, sources, tokenizer, cache=folder / "packed")
    loader = build_loader(config, streams)

    def call() -> int:
        made = 0
        for data in loader.steps(loader.start_cursors(), 1, steps):
            for batch in data.batches[stream]:
                made += len(batch)
                if padding is not None:
                    padding.add(batch)
        return made

    return call


def measure_data(bench: BenchConfig) -> dict[str, Any]:
    """Rates of reader, decoder and loader, and the loader's share of a step of the same size."""
    config = bench.run
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rates: dict[str, dict[str, float]] = {}
    padding: dict[str, Padding] = {}
    with tempfile.TemporaryDirectory(prefix="vlbeit-bench-") as name:
        folder = Path(name)
        sources = generate(folder)
        read_all(sources["small"])  # warm: the page cache and the manifests
        rates["reader"] = per_core(lambda: read_all(sources["small"]))
        photos = [sources["photos"].read(i).image() for i in range(PHOTOS)]
        rates["decode"] = per_core(lambda: sum(decode_image(p) is not None for p in photos))

        size, crop = config.model.image_size, config.input.images
        still = replace(crop, jitter=0.0)

        def by_pillow() -> int:
            for index, data in enumerate(photos):
                pillow_alone(data, Draws("bench", "crop", index), size, crop)
            return len(photos)

        def crops(crop: CropConfig) -> int:
            for index, data in enumerate(photos):
                augment(decode_image(data), Draws("bench", "crop", index), size, crop)
            return len(photos)

        rates["Pillow alone"] = per_core(by_pillow)
        rates["decode and crop"] = per_core(lambda: crops(still))
        if crop.jitter > 0:
            rates["with jitter"] = per_core(lambda: crops(crop))
        lines = (sentence(Draws("bench", "vocabulary", i), 30) for i in range(200))
        tokenizer = train_text_tokenizer(lines, TextTokenizerConfig(kind="wordpiece", vocab=256))
        streams: dict[Stream, list[RecordSource]] = {
            "image": [sources["photos"]],
            "text": [sources["documents"]],
            "pair": [sources["photos"]],
        }
        no_jitter = replace(config, input=replace(config.input, images=still))
        load = load_steps(no_jitter, "image", streams, tokenizer, folder, PHOTOS // MICRO)
        load()
        rates["images, no jitter"] = per_core(load)
        for stream in STREAMS:
            counted = padding[stream] = Padding()
            load = load_steps(config, stream, streams, tokenizer, folder, PHOTOS // MICRO, counted)
            load()
            rates[f"{stream}s loaded"] = per_core(load)
    codes = online_codes(config, bench.device)
    torch.set_num_threads(threads)
    step = measure_step(bench)
    core_seconds = sum(
        count / rates[f"{stream}s loaded"]["per_core"] for stream, count in step["samples"].items()
    )
    seconds = step.get("step_cpu_seconds", step["step_seconds"])
    pictures = step["samples"]["image"] + step["samples"]["pair"]
    return {
        **machine(bench.device),
        "jpeg_decoder": jpeg_decoder(),
        "recipe": config.recipe,
        "image_size": list(config.model.image_size),
        "jitter": config.input.images.jitter,
        "photo_bytes": round(sum(map(len, photos)) / len(photos)),
        "rates": rates,
        "step": step,
        "loader_seconds_a_step": round(core_seconds, 4),
        # By CPU time where it is known: what others do on the machine then plays no part.
        "loader_share_of_step": round(core_seconds / seconds, 4),
        "padding_share": {stream: round(found.share, 4) for stream, found in padding.items()},
        "online_codes_per_second": round(codes, 2),
        # With stored codes a step takes 1; with the tokenizer in it, this many times as long.
        "online_codes_slow_down": round(1.0 + pictures / codes / seconds, 3),
    }


def online_codes(config: PretrainConfig, device: torch.device) -> float:
    """Pictures a second (on a CPU: a core's second) whose codes the recipe's tokenizer names.

    Its encoder is as the recipe trains it, with weights as drawn: the work is the same.
    """
    shape = replace(config.tokenizers.train_visual, teacher="pixels")
    tokenizer = VQKDTokenizer(VQKD(shape)).to(device)
    count = max(config.batch.micro, 8)
    noise = Draws("bench", "codes").integers(0, 256, count * 3 * math.prod(shape.image_size))
    pixels = torch.from_numpy(noise.astype(np.uint8)).view(count, 3, *shape.image_size).to(device)
    tokenizer.encode(pixels)
    took = [Took(lambda: tokenizer.encode(pixels), device) for _ in range(3)]
    by_processor = device.type == "cpu"
    return count / min(t.processor if by_processor else t.wall for t in took)


def describe_data(report: dict[str, Any]) -> str:
    """The report as lines for a person."""
    height, width = report["image_size"]
    lines = [
        f"machine            {describe_machine(report)}",
        f"photos             500 x 375 JPEG, {report['photo_bytes'] / 1000:.0f} kB, to {height} x "
        f"{width}, colour jitter {report['jitter']:g}",
        f"{'JPEGs by':<18} {report['jpeg_decoder']}",
        f"{'':<18} {'a second and core':>18}",
    ]
    for name, rate in report["rates"].items():
        lines.append(f"{name:<18} {rate['per_core']:>18,.0f}")
    samples = " + ".join(f"{n} {name}s" for name, n in report["step"]["samples"].items())
    lines.append(
        f"step data          {1000 * report['loader_seconds_a_step']:.0f} ms of one core for "
        f"{samples} of {report['recipe']}: {100 * report['loader_share_of_step']:.1f} % of the "
        f"step's time ({report['step']['step_seconds']:.3f} s)"
    )
    shares = ", ".join(f"{name}s {100 * s:.1f} %" for name, s in report["padding_share"].items())
    lines.append(f"padding            {shares} of the places that the model computes")
    lines.append(
        f"codes              {report['online_codes_per_second']:.1f} pictures a second by the "
        f"recipe's tokenizer: a step takes {report['online_codes_slow_down']:.2f} times as long as "
        "with stored codes"
    )
    return "\n".join(lines)
