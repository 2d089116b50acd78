"""One vector of a picture, a text or a pair: the one that the run's own training has shaped.

pretraining      mean over the patches, the words, or both, after the final norm; no objective of
                 pretraining reads [T_CLS] or [I_CLS], so these are left out (as is [T_SEP])
classification   mean over the patches before the final norm, which its head reads
retrieval        image and text: the projections of the dual encoder, whose cosines `match` and
                 `search` give; pair: the fused [T_CLS], which its matching head reads
other tasks      pair: the fused [T_CLS], which their heads read
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlbeit.eval.downstream import TaskRun
from vlbeit.eval.evaluate import LoadedRun
from vlbeit.tasks.classification import Classification
from vlbeit.tasks.retrieval import RetrievalHead, fuse, project_images, project_texts
from vlbeit.types import States


def image_vectors(run: LoadedRun | TaskRun, pixels: Tensor) -> Tensor:
    """(B, 3, height, width) uint8 to (B, D) float32, not normalised."""
    if isinstance(run, TaskRun):
        if isinstance(run.head, RetrievalHead):
            return project_images(run.model, run.head, pixels)
        assert isinstance(run.task, Classification)
        return run.task.features(run.model, pixels).float()
    states = run.model.embed_image(pixels)
    return run.model.backbone.mean(states, patches_of(states)).float()


def text_vectors(run: LoadedRun | TaskRun, words: Tensor, valid: Tensor) -> Tensor:
    """(B, W) int64 with [T_CLS] and [T_SEP], (B, W) bool, to (B, D) float32, not normalised."""
    if isinstance(run, TaskRun):
        assert isinstance(run.head, RetrievalHead)
        return project_texts(run.model, run.head, words, valid)
    states = run.model.embed_text(words, valid)
    return run.model.backbone.mean(states, between_specials(valid)).float()


def pair_vectors(run: LoadedRun | TaskRun, words: Tensor, valid: Tensor, pixels: Tensor) -> Tensor:
    """Arguments as above; (B, D) float32, not normalised."""
    if isinstance(run, TaskRun):
        return fuse(run.model, words, valid, pixels).float()
    states = run.model.embed_pair(words, valid, pixels)
    wanted = patches_of(states)
    wanted[:, : words.shape[1]] = between_specials(valid)
    return run.model.backbone.mean(states, wanted).float()


def patches_of(states: States) -> Tensor:
    """(B, L) bool: the patches, which stand at the end of a sequence, after [I_CLS]."""
    assert states.grid is not None
    patches = states.grid[0] * states.grid[1]
    wanted = torch.zeros(states.x.shape[:2], dtype=torch.bool, device=states.x.device)
    wanted[:, -patches:] = True
    return wanted


def between_specials(valid: Tensor) -> Tensor:
    """(B, W) bool: the real words without [T_CLS], the first, and [T_SEP], the last of them."""
    is_last = valid & ~F.pad(valid[:, 1:], (0, 1), value=False)
    inner = valid & ~is_last
    inner[:, 0] = False
    return inner
