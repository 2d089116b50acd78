"""What codes look like: sheets, pictures through codes, and the page of a tokenizer's run."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from test_vqkd import CONFIG, scene_pictures, write_scenes
from tiny_run import Shades
from vlbeit.data.dataset import Dataset, SourceInfo
from vlbeit.errors import ConfigError, InputError, SaveError
from vlbeit.eval import report
from vlbeit.eval.code_pictures import by_likeness, code_patches, code_sheet, decoded, in_rows
from vlbeit.eval.report_tokenizer import is_tokenizer_run
from vlbeit.nn.weights import initialise
from vlbeit.tokens.vqkd import VQKD, VQKDTokenizer
from vlbeit.train.tokenizer_cli import main


def test_a_code_is_drawn_as_the_middle_of_its_like() -> None:
    # A decoder that shows each code as its own grey: the patch must be that grey, and all of it.
    patches = code_patches(Shades(), torch.arange(16))
    assert patches.shape == (16, 8, 8, 3)
    assert (patches == (np.arange(16) * 16 + 8)[:, None, None, None]).all()


def test_a_sheet_holds_every_code_once_dark_above_and_bright_below() -> None:
    sheet = np.asarray(code_sheet(Shades()))
    assert sheet.shape == (4 * 24, 4 * 24, 3)
    cells = sheet[12::24, 12::24, 0]
    assert sorted(cells.flatten().tolist()) == (np.arange(16) * 16 + 8).tolist()
    assert (np.diff(cells.astype(int).max(axis=1)) > 0).all()


def test_the_order_of_a_sheet_is_a_permutation_with_warm_to_the_right(
    gen: torch.Generator,
) -> None:
    patches = torch.randint(0, 256, (50, 4, 4, 3), generator=gen, dtype=torch.uint8).numpy()
    order = by_likeness(patches)
    assert sorted(order.tolist()) == list(range(50))
    first = patches[order[:7]].reshape(7, -1, 3).mean(axis=1)
    assert (np.diff(first[:, 0] - first[:, 2]) >= 0).all()


def test_pictures_through_codes_keep_their_place() -> None:
    pixels = torch.zeros(2, 3, 16, 24, dtype=torch.uint8)
    pixels[1, :, 8:, 16:] = 200
    codes, drawn = decoded(Shades(), pixels)
    assert codes.shape == (2, 2, 3) and drawn.shape == pixels.shape
    assert codes.nonzero().tolist() == [[1, 1, 2]]
    sheet = np.asarray(in_rows((pixels, drawn), scale=2))
    assert sheet.shape == (2 * 32 + 4, 2 * 48 + 4, 3)
    assert (sheet[16:32, 48 + 4 + 32 :] == 200).all(), "the original stands above"
    assert (sheet[36 + 16 :, 48 + 4 + 32 :] == 200).all(), "what its codes say below"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A tokenizer's run folder as train-visual leaves it, its metrics written by hand."""
    data, folder = tmp_path / "data", tmp_path / "run"
    write_scenes(data / "scenes.tar", 12, bad=1)
    shards = [str(data / "scenes.tar")]
    Dataset.write(data, "drawn", [SourceInfo("scenes", "image", "train", shards, 12)])
    settings = [f"--data={data}", "--max-steps=4", "--input.skip-budget=0.2", "--log.every=1"]
    settings += [f"--tokenizer.{name}=8" for name in ("width", "heads", "ffn", "codes", "batch")]
    settings += ["--tokenizer.warmup-steps=1", "--tokenizer.total-steps=4", "--runtime.threads=1"]
    settings.remove("--tokenizer.heads=8")
    assert main(["train-visual", "tiny", f"--run-dir={folder}", *settings]) == 0
    return folder


def test_the_page_of_a_tokenizer_run_draws_use_losses_pictures_and_codes(run: Path) -> None:
    assert is_tokenizer_run(run)
    assert report.main([str(run)]) == 0
    page = (run / "report.html").read_text()
    for words in (
        "8 codes, teacher pixels",
        "codes in use over steps",
        "perplexity of the codes over steps",
        "entropy of the codes (nats) over steps",
        "pixels, mean squared error over steps",
        "training pictures",
        "the same decoded from its codes",
        "Every code",
    ):
        assert words in page, words
    assert "teacher&#x27;s features" not in page, "there is none"
    assert page.count('alt="the same decoded from its codes"') == 11, "the bad one is left out"
    # The negative check: a run of pretraining is none of these.
    (run / "config.json").write_text(json.dumps({"model": {}, "tokenizers": {}}))
    assert not is_tokenizer_run(run)
    assert not is_tokenizer_run(run / "nowhere")


def test_a_run_without_rows_is_told_to_wait(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match=r"no row in metrics\.jsonl yet"):
        report.main([str(run)])


def test_show_draws_pictures_and_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = VQKD(CONFIG)
    initialise(model, 0)
    folder = VQKDTokenizer(model).save(tmp_path / "visual")
    names = []
    for number, pixels in enumerate(scene_pictures(2)):
        names.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(names[-1])
    seen, codes = tmp_path / "seen.png", tmp_path / "codes.png"
    words = ["show", str(folder), "--image", *names, "--out", str(seen), "--codes", str(codes)]
    assert main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert np.shape(facts["image_codes"]) == (2, 3, 4)
    with Image.open(io.BytesIO(seen.read_bytes())) as sheet:
        assert sheet.size == (2 * 160 + 4, 2 * 120 + 4)
    with Image.open(codes) as sheet:
        assert sheet.size == (6 * 24, 6 * 24)
    with pytest.raises(ConfigError, match="--out needs --image"):
        main(["show", str(folder), "--out", str(seen)])
    with pytest.raises(InputError, match=r"nowhere\.png: cannot be read"):
        main(["show", str(folder), "--image", "nowhere.png"])
    with pytest.raises(SaveError, match="cannot be written"):
        main(["show", str(folder), "--codes", str(tmp_path / "no" / "codes.png")])
