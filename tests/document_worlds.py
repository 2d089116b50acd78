"""What a reader has before each guide begins: data, runs, photos and other people's files, tiny.

`build_world` is made once: a demo of all tasks with a model of a few thousand weights, and runs
under the names that the guides use. Each page gets what `SETUPS` says of it.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from foreign_files import (
    beit3_tensors,
    beit_tensors,
    save_peer,
    save_training_file,
    vlmo_tensors,
    write_vocabulary,
)
from prepare_files import drawn, prepare, put, put_rows, put_tar
from test_demo import COUNT, quick_config, quick_tasks
from test_imported_tokenizers import beitv2_training_file
from test_prepare import coco, imagenet, karpathy
from test_prepare_tasks import ade20k, class_map, nlvr2_row, vqav2
from vlbeit.config import (
    EntailmentRun,
    LogConfig,
    PretrainConfig,
    RuntimeConfig,
    TaskBatchConfig,
    TextTokenizerConfig,
)
from vlbeit.data.scenes import draw_scene
from vlbeit.recipes import FINETUNE
from vlbeit.tokens.text import train_text_tokenizer
from vlbeit.train.demo import run_demo
from vlbeit.train.demo_tasks import DRAWN_TASKS
from vlbeit.train.finetune import finetune

ENTAILMENT = ("entailment", "neutral", "contradiction")


def demo_config() -> PretrainConfig:
    """`tiny` with its four layers, each narrow."""
    config = quick_config(max_steps=2)
    return replace(config, model=replace(config.model, layers=4), save_every=2)


def demo_tasks(names: Sequence[str]) -> list:
    return [replace(config, max_steps=2, save_every=2) for config in quick_tasks(*names)]


def save_scene(path: Path, number: int) -> None:
    """A drawn scene in place of a photo."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_scene(seed=7, split="guide", index=number).image.save(path)


def build_world(folder: Path) -> Path:
    """The demo, data/scenes, and a run of each task; relative paths hold in `folder` only."""
    run_demo(Path("runs/demo"), demo_config(), COUNT, demo_tasks(tuple(DRAWN_TASKS)))
    shutil.copytree("runs/demo/scenes", "data/scenes")
    shutil.copytree("runs/demo/pretrain", "runs/tiny")
    shutil.copytree("runs/demo/pretrain/tokenizers/visual", "runs/visual/visual")
    names = {"classification": "tiny-classes", "segmentation": "segmentation"}
    for task in DRAWN_TASKS:
        shutil.copytree(f"runs/demo/tasks/{task}", f"runs/{names.get(task, f'tiny-{task}')}")
    for number in range(12):
        save_scene(Path(f"said/{number}.png"), number)
    rows = [
        {"image": f"{n}.png", "hypothesis": f"red ring {n % 2}", "label": ENTAILMENT[n % 3],
         "split": "val" if n > 8 else "train"}
        for n in range(12)
    ]  # fmt: skip
    put_rows(Path("said.jsonl"), rows)
    prepare("entailment", "said.jsonl", "--images", "said", "--out", "data/entailment")
    recipe = FINETUNE["entailment"]["tiny" if "tiny" in FINETUNE["entailment"] else "small"]()
    assert isinstance(recipe, EntailmentRun)
    model = demo_config().model
    finetune(
        replace(
            recipe, recipe="tiny", run_dir="runs/entailment", start="runs/tiny",
            data=("data/entailment",), max_steps=1, save_every=1, device="cpu", precision="fp32",
            model=model, input=replace(recipe.input, text_length=model.text_positions),
            batch=TaskBatchConfig(size=4, micro=4), log=LogConfig(eval_every=0),
            runtime=RuntimeConfig(threads=1),
        )
    )  # fmt: skip
    return folder


def take(world: Path, *names: str) -> None:
    """Copies of the world's folders, under the same names."""
    for name in names:
        shutil.copytree(world / name, name, dirs_exist_ok=True)


def photos(folder: str, count: int, kind: str = "JPEG") -> None:
    for number in range(count):
        put(Path(folder) / f"{number + 1:04d}.jpg", drawn(number, kind))


def readme(world: Path) -> None:
    take(world, "runs/tiny-retrieval")
    save_scene(Path("scene.png"), 0)
    streams()
    for stream in ("images", "texts", "pairs"):
        shutil.copytree(f"data/{stream}", f"data/my-{stream}")


def streams() -> None:
    """A small prepared folder for each stream of pretraining."""
    for number in range(6):
        save_scene(Path(f"photos/{number}.png"), number)
    prepare("images", "photos", "--out", "data/images", "--val-fraction", "0.2")
    put(Path("words.txt"), "a red ring above a blue star on a grey ground\n" * 60)
    prepare("text", "words.txt", "--out", "data/texts")
    put_rows(Path("said.jsonl"), [{"image": f"{n}.png", "caption": "a ring"} for n in range(6)])
    prepare("pairs", "said.jsonl", "--images", "photos", "--out", "data/pairs")


def quickstart(world: Path) -> None:
    """Own pictures, and more rows for the two files that the page begins."""
    for number in range(1, 81):
        save_scene(Path(f"photos/{number:04d}.jpg"), number)
    names = [f"{number:04d}.jpg" for number in range(3, 81)]
    put_rows(Path("captions.jsonl"), [{"image": name, "caption": "a worn gear"} for name in names])
    rows = [
        {"image": name, "question": "is it broken?", "answer": ("yes", "no")[n % 2]}
        for n, name in enumerate(names)
    ]
    put_rows(Path("questions.jsonl"), rows)


def nothing(world: Path) -> None:
    """The page makes all it needs."""


def convert(world: Path) -> None:
    from transformers import FlavaImageConfig, FlavaImageModel

    from test_convert_hf import CLIP, SIZES, write_ours
    from test_parity_beit import build_peer as build_beit
    from test_parity_vilt import build_peer as build_vilt

    texts = Path("data/texts")
    shutil.copytree(world / "data/scenes", texts)
    words = TextTokenizerConfig(kind="wordpiece", vocab=40)  # no more than the file's table
    train_text_tokenizer(["a red ring"] * 9, words).save(Path("data/beit3-words"))
    for name in ("beit_base_patch16_224_pt22k.pth", "beitv2_base_patch16_224_pt1k.pth", "beit.pth"):
        save_training_file(Path(name), beit_tensors(), "model")
    save_training_file(Path("vlmo_base_patch16_224.pt"), vlmo_tensors(), "module")
    save_training_file(Path("beit3_base_patch16_224.pth"), beit3_tensors(), "model")
    write_vocabulary(Path("bert")).rename("bert-base-uncased-vocab.txt")
    save_peer(build_beit("shared"), Path("beit-base-patch16-224-pt22k-ft22k"))
    write_vocabulary(save_peer(build_vilt(), Path("vilt-b32-mlm")))
    flava = FlavaImageModel(FlavaImageConfig(**SIZES, image_size=32, patch_size=8))
    save_peer(flava, Path("flava-image-encoder"), **CLIP)
    write_ours(Path("runs/beit-classes"), "classification")


def data(world: Path) -> None:
    """Own files as the page describes them, and every public data set in its own layout."""
    photos("photos", 60)
    for number in range(1, 6):
        put(Path(f"photos/{number}.jpg"), drawn(100 + number, "JPEG"))
        put(Path(f"photos/ward3/{number:04d}.jpg"), drawn(200 + number, "JPEG"))
    for name in "ab":
        put(Path(f"photos/{name}.jpg"), drawn(300 + ord(name), "JPEG"))
    rows = [{"image": f"{n:04d}.jpg", "caption": f"caption {n}"} for n in range(3, 60)]
    put_rows(Path("captions.jsonl"), rows)
    put(Path("captions.csv"), "".join(f"{n:04d}.jpg,caption {n}\n" for n in range(3, 9)))
    put(Path("web.csv"), "filepath,title\n" + "".join(f"w{n}.jpg,title {n}\n" for n in range(5)))
    for number in range(5):
        put(Path(f"w{number}.jpg"), drawn(400 + number, "JPEG"))
    lines = [json.dumps({"image": f"{n:04d}.jpg", "caption": f"said {n}"}) for n in range(1, 61)]
    lines[39] = lines[39].replace(",", "")
    put(Path("collected.jsonl"), "\n".join(lines) + "\n")
    photos("collected", 60)
    whole = Path("collected/0017.jpg").read_bytes()
    put(Path("collected/0017.jpg"), whole[:-30])
    for number in range(332):
        member = {f"{number:06d}.jpg": drawn(number, "JPEG"), f"{number:06d}.txt": b"a picture"}
        put_tar(Path(f"web/{number:05d}.tar"), member)
    put(Path("documents.jsonl"), '{"text": "Another document."}\n' * 3)
    for name in ("wiki.train.txt", "wiki.val.txt", "books.txt"):
        put(Path(name), "".join(f"{name} has a line {n}\n" for n in range(40)))
    questions(Path("questions.jsonl"))
    put_rows(Path("retrieval.jsonl"), [{"image": "0001.jpg", "captions": ["one"]}])
    put_rows(
        Path("nlvr.jsonl"),
        [{"image": f"{n}.jpg", "sentence": "s", "label": "True"} for n in range(3)],
    )
    for number in range(3):
        put(Path(f"nlvr/{number}.jpg"), drawn(500 + number, "JPEG", (720, 110)))
    put_rows(Path("labels.jsonl"), [{"image": f"{n}.jpg", "label": n % 3} for n in (2, 3, 4, 5)])
    put(Path("classes.json"), json.dumps({"classes": ["axe", "saw", "plane", "chain saw"]}))
    for number in range(10):
        put(Path(f"tools/{('axe', 'saw')[number % 2]}/{number}.jpg"), drawn(600 + number, "JPEG"))
    put(Path("streets.json"), json.dumps({"classes": ["nothing", "road", "sky"]}))
    put(Path("streets/1.jpg"), drawn(700, "JPEG"))
    put(Path("streets/1-map.png"), class_map(np.random.randint(0, 3, (16, 24))))
    put_rows(Path("hypotheses.jsonl"), [{"image": "2.jpg", "hypothesis": "a", "label": 0}])
    public_data_sets()


def questions(path: Path) -> None:
    """Rows beside the page's one, so that its answer is given often enough for the list."""
    rows = [
        {"image": f"{n}.jpg", "question": f"what is {n}?", "answer": "blue", "question_id": 10 + n}
        for n in (2, 3, 4)
    ]
    put_rows(path, rows)


def public_data_sets() -> None:
    """Each in the layout it is handed out in, with a few drawn pictures."""
    wnids = imagenet(Path("ILSVRC2012"))
    lines = "".join(f"ILSVRC2012_val_0000000{n} {wnids[n - 1]}\n" for n in (1, 2, 3))
    put(Path("ILSVRC2012/val_labels.txt"), lines)
    coco(Path("COCO"))
    put(Path("dataset_coco.json"), json.dumps(karpathy()))
    images = [
        {"filename": f"{n}.jpg", "split": split, "sentences": [{"raw": "a man"}]}
        for n, split in ((11, "train"), (12, "train"), (13, "val"), (14, "test"))
    ]
    put(Path("dataset_flickr30k.json"), json.dumps({"images": images}))
    for number in (11, 12, 13, 14):
        for place in ("Flickr30k/flickr30k-images", "flickr30k-images"):
            put(Path(f"{place}/{number}.jpg"), drawn(800 + number, "JPEG"))
    facts, regions = [], []
    for number in (1, 2, 3):
        put(Path(f"VG/VG_100K/{number}.jpg"), drawn(900 + number, "JPEG"))
        url = f"https://cs.stanford.edu/people/rak248/VG_100K/{number}.jpg"
        facts.append({"image_id": number, "url": url, "coco_id": None})
        regions.append({"id": number, "regions": [{"region_id": 1, "phrase": f"part {number}"}]})
    put(Path("VG/image_data.json"), json.dumps(facts))
    put(Path("VG/region_descriptions.json"), json.dumps(regions))
    for name, count in (("cc3m", 332), ("sbu", 100)):
        for number in range(count):
            key = f"{number:05d}0000"
            member = {f"{key}.jpg": drawn(1000 + number, "JPEG"), f"{key}.txt": b"a picture"}
            put_tar(Path(f"{name}/{number:05d}.tar"), member)
    for name in ("wikipedia.txt", "bookcorpus.txt"):
        put(Path(name), "".join(f"{name} has a line {n}\n" for n in range(40)))
    vqav2(Path("VQAv2"))
    for year in ("train2014", "val2014", "test2015"):
        shutil.copytree(f"VQAv2/{year}", f"COCO/{year}", dirs_exist_ok=True)
        shutil.rmtree(f"VQAv2/{year}")
    for part, folder in (("train", "train/7"), ("dev", "dev"), ("test1", "test1")):
        for side in (0, 1):
            name = f"{part}-3-0-img{side}.png"
            put(Path("NLVR2/images") / folder / name, drawn(1500 + len(part) + side))
        more = {"directory": 7} if part == "train" else {}
        put_rows(Path(f"NLVR2/data/{part}.json"), [nlvr2_row(f"{part}-3-0-0", **more)])
    ade20k(Path("ADEChallengeData2016"))
    for part, number in (("train", 11), ("dev", 13), ("test", 14)):
        rows = [
            {"Flickr30K_ID": number, "gold_label": label, "pairID": f"p{k}", "sentence1": "s",
             "sentence2": f"{part} {k}"}
            for k, label in enumerate(ENTAILMENT)
        ]  # fmt: skip
        put_rows(Path(f"SNLI-VE/snli_ve_{part}.jsonl"), rows)


def finetuned(world: Path) -> None:
    take(
        world, "data/scenes", "data/entailment", "runs/demo/scenes", "runs/tiny",
        "runs/tiny-statements", "runs/segmentation", "runs/entailment",
    )  # fmt: skip
    for number, name in enumerate(("dog", "left", "right", "street", "a", "b", "c")):
        save_scene(Path(f"{name}.jpg"), number)
    for number in range(5):
        save_scene(Path(f"photos/{number}.jpg"), number)
    put(Path("captions.txt"), "large red star\nsmall blue ring\n")
    vqav2(Path("VQAv2"))
    prepare("vqav2", "VQAv2", "--out", "data/vqav2")
    prepare("vqav2", "VQAv2", "--parts", "test-dev", "--out", "data/vqav2-test-dev")
    shutil.copytree(world / "runs/tiny-vqa", "runs/vqa")
    shutil.copytree("runs/tiny", "runs/base")


def hub(world: Path) -> None:
    take(world, "runs/demo/scenes", "runs/tiny", "runs/tiny-vqa")


def page(world: Path) -> None:
    take(world, "data/scenes", "runs/demo")


def scale(world: Path) -> None:
    streams()


def scenes(world: Path) -> None:
    """A demo that has come as far as its pretraining; the page's commands go on with it."""
    take(world, "runs/demo")
    shutil.rmtree("runs/demo/tasks")


def serve(world: Path) -> None:
    take(world, "data/scenes", "runs/demo")
    shutil.copytree("runs/demo/pretrain", "runs/mine")
    shutil.copytree("runs/demo/tasks/vqa", "runs/mine-vqa")
    shutil.copytree("runs/demo/tasks/retrieval", "runs/mine-retrieval")
    for number in range(4):
        save_scene(Path(f"photos/{number}.png"), number)
    save_scene(Path("dog.jpg"), 0)
    put(Path("token.txt"), "a secret of sixteen characters or more\n")


def tokenizers(world: Path) -> None:
    import sentencepiece
    from transformers.models.flava.modeling_flava import (
        FlavaImageCodebook,
        FlavaImageCodebookConfig,
    )

    take(world, "data/scenes")
    for name, number in (("cat.jpg", 0), ("dog.jpg", 1)):
        save_scene(Path(name), number)
    put(Path("lines.txt"), "large red star\nsmall blue ring with a dotted green cross\n" * 40)
    sentencepiece.SentencePieceTrainer.train(
        input="lines.txt", model_prefix="unilm3-cased", vocab_size=24, model_type="unigram",
        minloglevel=2,
    )  # fmt: skip
    write_vocabulary(Path("bert")).rename("bert-base-uncased-vocab.txt")
    tensors = beitv2_training_file(torch.Generator().manual_seed(0))
    save_file({k: v.contiguous() for k, v in tensors.items()}, "vqkd.safetensors")
    save_training_file(Path("vqkd_encoder_base_decoder_3x768x12_clip.pth"), tensors, "model")
    config = FlavaImageCodebookConfig(
        num_groups=4, input_channels=3, num_blocks_per_group=1, hidden_size=8, vocab_size=24
    )
    FlavaImageCodebook(config).save_pretrained("flava-image-codebook")
    prepare_images("data/images")


def prepare_images(out: str) -> None:
    for number in range(6):
        save_scene(Path(f"drawings/{number}.png"), number)
    prepare("images", "drawings", "--out", out)


SETUPS: dict[str, Callable[[Path], None]] = {
    "README.md": readme,
    "benchmarks/README.md": nothing,
    "docs/performance.md": nothing,
    "docs/convert.md": convert,
    "docs/data.md": data,
    "docs/finetune.md": finetuned,
    "docs/hub.md": hub,
    "docs/model.md": nothing,
    "docs/page.md": page,
    "docs/quickstart.md": quickstart,
    "docs/scale.md": scale,
    "docs/scenes.md": scenes,
    "docs/serve.md": serve,
    "docs/tokenizers.md": tokenizers,
}
"""Pages with a block that is run; what each finds when its first command is given."""
