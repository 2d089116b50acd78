"""Fill in what is hidden: [MASK] words for an image, hidden patches for a text; and draw it."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from vlbeit.data.transforms import clean_text, decode_image, plain
from vlbeit.draws import Draws
from vlbeit.errors import InputError
from vlbeit.eval.evaluate import LoadedRun
from vlbeit.masking import block_masked
from vlbeit.objectives import after_class
from vlbeit.tokens.text import MASK

HIDDEN_GREY = 128


class Guess(NamedTuple):
    """One candidate for a hidden word."""

    piece: str
    probability: float


@dataclass(frozen=True, kw_only=True)
class FilledWords:
    """`guesses[i]` are the candidates for the i-th [MASK], the most probable first."""

    text: str
    guesses: list[list[Guess]]

    def best(self) -> str:
        """The text with each [MASK] replaced by its most probable piece."""
        parts = self.text.split(MASK)
        filled = parts[0]
        for guesses, part in zip(self.guesses, parts[1:], strict=True):
            filled += guesses[0].piece + part
        return filled


@dataclass(frozen=True, kw_only=True)
class FilledPatches:
    """Codes of every patch: the tokenizer's own and, at hidden places, the model's guesses.

    Shapes: hidden (P,) bool; answers, filled (P,) int64; probabilities (P,) float32, that of the
    code which was filled in, 1 where nothing was hidden; pictures (height, width, 3) uint8.
    """

    grid: tuple[int, int]
    hidden: np.ndarray
    answers: np.ndarray
    filled: np.ndarray
    probabilities: np.ndarray
    picture: np.ndarray
    answers_decoded: np.ndarray
    filled_decoded: np.ndarray

    @property
    def right(self) -> int:
        """Hidden patches whose code was named exactly."""
        return int((self.filled == self.answers)[self.hidden].sum())


def open_picture(run: LoadedRun, data: bytes) -> np.ndarray:
    """(3, height, width) uint8 at the model's size: decoded and squashed as in evaluation.

    Raises:
        BadImage: see `decode_image`.
    """
    return plain(decode_image(data), run.config.model.image_size)


def masked_ids(run: LoadedRun, text: str) -> np.ndarray:
    """[T_CLS] text [T_SEP] with the [MASK] id wherever the text says [MASK].

    Raises:
        InputError: the text is longer than the model's position table.
    """
    ids: list[int] = [run.text.cls]
    for number, part in enumerate(text.split(MASK)):
        if number:
            ids.append(run.text.mask)
        if part.strip():
            ids += run.text.encode(clean_text(part)).tolist()
    ids.append(run.text.sep)
    longest = run.config.model.text_positions
    if len(ids) > longest:
        raise InputError(f"the text has {len(ids)} tokens, the model takes at most {longest}")
    return np.array(ids, dtype=np.int64)


def fill_words(
    run: LoadedRun, text: str, picture: np.ndarray | None = None, top: int = 5
) -> FilledWords:
    """Candidates for every [MASK] of the text, with the picture or from the text alone.

    Raises:
        InputError: the text has no [MASK], or is too long.
    """
    ids = masked_ids(run, text)
    hidden = ids == run.text.mask
    if not hidden.any():
        raise InputError(f"nothing to fill: the text {text!r} has no {MASK}")
    return FilledWords(text=text, guesses=guess_words(run, ids, hidden, picture, top))


def guess_words(
    run: LoadedRun,
    ids: np.ndarray,
    hidden: np.ndarray,
    picture: np.ndarray | None = None,
    top: int = 5,
) -> list[list[Guess]]:
    """Candidates for each hidden position, the most probable first.

    Shapes: ids (W,) with [MASK] at the hidden positions, hidden (W,) bool, picture
    (3, height, width) uint8 or None.
    """
    words = torch.from_numpy(ids.astype(np.int64))[None].to(run.device)
    wanted = torch.from_numpy(hidden)[None].to(run.device)
    with torch.no_grad():
        if picture is None:
            states = run.model.embed_text(words)
        else:
            states = run.model.embed_pair(words, None, pixels_of(run, picture))
            wanted = torch.nn.functional.pad(wanted, (0, states.x.shape[1] - len(ids)))
        logits = run.model.heads["mlm"](run.model.backbone.rows(states, wanted)).float()
    shares = word_probabilities(run, logits)
    best = shares.topk(min(top, run.text.size - run.text.mask - 1), dim=-1)
    return [
        [
            Guess(piece, float(p))
            for piece, p in zip(run.text.pieces(row.tolist()), values, strict=True)
        ]
        for row, values in zip(best.indices, best.values, strict=True)
    ]


def word_probabilities(run: LoadedRun, logits: torch.Tensor) -> torch.Tensor:
    """(..., V) logits of the vocabulary's table to (..., V) probabilities; 0 for special tokens and
    for rows of the table that the vocabulary does not use, which are no words."""
    piece = torch.arange(logits.shape[-1], device=logits.device)
    no_word = (piece <= run.text.mask) | (piece >= run.text.size)
    return logits.masked_fill(no_word, -torch.inf).softmax(-1)


def hide_share(run: LoadedRun, share: float, seed: int = 0) -> np.ndarray:
    """(P,) bool: blocks of patches, as in pretraining, exactly the rounded share of them."""
    rows, columns = grid_of(run)
    masking = run.config.masking
    return block_masked(
        Draws(seed, "predict"),
        (rows, columns),
        round(share * rows * columns),
        masking.min_block,
        masking.max_aspect,
    )


def grid_of(run: LoadedRun) -> tuple[int, int]:
    model = run.config.model
    return model.image_size[0] // model.patch, model.image_size[1] // model.patch


def pixels_of(run: LoadedRun, picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture)[None].to(run.device)


def fill_patches(
    run: LoadedRun, picture: np.ndarray, hidden: np.ndarray, text: str | None = None
) -> FilledPatches:
    """The model's codes for the hidden patches, with the text or from the image alone.

    Shapes: picture (3, height, width) uint8, hidden (P,) bool.

    Raises:
        InputError: the checkpoint has no visual tokenizer, nothing is hidden, or the text is too
            long.
    """
    return guess_patches(run, picture, hidden, None if text is None else masked_ids(run, text))


def guess_patches(
    run: LoadedRun, picture: np.ndarray, hidden: np.ndarray, ids: np.ndarray | None
) -> FilledPatches:
    """`fill_patches` for a text that is already ids (W,), [T_CLS] and [T_SEP] included.

    Raises:
        InputError: the checkpoint has no visual tokenizer, or nothing is hidden.
    """
    if run.visual is None:
        raise InputError(f"{run.folder} has no visual tokenizer: it was trained on words only")
    if not hidden.any():
        raise InputError("nothing to fill: no patch is hidden")
    pixels = pixels_of(run, picture)
    masked = torch.from_numpy(hidden)[None].to(run.device)
    with torch.no_grad():
        answers = run.visual.encode(pixels)[0]
        if ids is None:
            states = run.model.embed_image(pixels, masked)
            wanted = after_class(masked)
        else:
            words = torch.from_numpy(ids.astype(np.int64))[None].to(run.device)
            states = run.model.embed_pair(words, None, pixels, masked)
            wanted = torch.nn.functional.pad(masked, (states.x.shape[1] - masked.shape[1], 0))
        logits = run.model.heads["mim"](run.model.backbone.rows(states, wanted)).float()
        best = logits.softmax(-1).max(dim=-1)
        filled = answers.clone()
        filled[masked[0]] = best.indices
        probabilities = torch.ones(masked.shape[1], device=run.device)
        probabilities[masked[0]] = best.values
        rows, columns = grid_of(run)
        decoded = run.visual.decode(torch.stack((answers, filled)).view(2, rows, columns))
    shown = decoded.permute(0, 2, 3, 1).cpu().numpy()
    return FilledPatches(
        grid=(rows, columns),
        hidden=hidden,
        answers=answers.cpu().numpy(),
        filled=filled.cpu().numpy(),
        probabilities=probabilities.cpu().numpy(),
        picture=np.ascontiguousarray(picture.transpose(1, 2, 0)),
        answers_decoded=shown[0],
        filled_decoded=shown[1],
    )


def hidden_pixels(filled: FilledPatches) -> np.ndarray:
    """(height, width) bool: pixels of hidden patches."""
    rows, columns = filled.grid
    height, width = filled.picture.shape[:2]
    hidden = filled.hidden.reshape(rows, columns)
    return hidden.repeat(height // rows, axis=0).repeat(width // columns, axis=1)


def panels(filled: FilledPatches) -> dict[str, np.ndarray]:
    """The pictures of one filling, by title, each (height, width, 3) uint8."""
    where = hidden_pixels(filled)[..., None]
    return {
        "picture": filled.picture,
        "hidden": np.where(where, np.uint8(HIDDEN_GREY), filled.picture),
        "filled in": np.where(where, filled.filled_decoded, filled.picture),
        "codes decoded": filled.filled_decoded,
        "tokenizer's own": filled.answers_decoded,
    }


def draw_filled(filled: FilledPatches, caption: str = "", side: int = 240) -> Image.Image:
    """The panels side by side with titles; `side` is the height of a panel in pixels."""
    titled = panels(filled)
    height, width = filled.picture.shape[:2]
    shown_width = round(side * width / height)
    gap, head = 8, 22
    foot = 24 if caption else 0
    sheet = Image.new(
        "RGB", (gap + (shown_width + gap) * len(titled), head + side + gap + foot), "white"
    )
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    for number, (title, pixels) in enumerate(titled.items()):
        left = gap + number * (shown_width + gap)
        pen.text((left, 4), title, fill="black", font=font)
        # Few pixels are shown as they are; many are smoothed.
        kind = Image.Resampling.NEAREST if side >= 2 * height else Image.Resampling.LANCZOS
        sheet.paste(Image.fromarray(pixels).resize((shown_width, side), kind), (left, head))
    if caption:
        pen.text((gap, head + side + 4), caption, fill="black", font=font)
    return sheet
