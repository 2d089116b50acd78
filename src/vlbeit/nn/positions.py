"""Positions: absolute tables that fit any image size, and VLMo's relative position bias."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlbeit.types import Modality, Span


def resize_grid(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A table of one row per grid place, resampled bicubically to another grid.

    Shapes: table (old rows * old columns, C), return (new rows * new columns, C).
    """
    if old == new:
        return table
    square = table.float().T.reshape(1, -1, *old)
    resized = F.interpolate(square, size=new, mode="bicubic", align_corners=False)
    return resized.reshape(table.shape[1], -1).T.to(table.dtype)


@lru_cache(maxsize=32)
def grid_offsets(grid: tuple[int, int]) -> Tensor:
    """(P, P) int64: the row of the image table for each ordered pair of patches (BEiT)."""
    rows, columns = grid
    place = torch.stack(
        torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    ).flatten(1)
    offset = place[:, :, None] - place[:, None, :]  # (2, P, P)
    return (offset[0] + rows - 1) * (2 * columns - 1) + offset[1] + columns - 1


class RelativeBias(nn.Module):
    """Relative position bias with VLMo's rows, for one layer group.

    Rows of a table, in this order (VLMo, docs/convert.md):
        (2R-1)(2C-1)  offsets between patches
        3             [I_CLS] to patch, patch to [I_CLS], [I_CLS] to itself
        2             any word to any patch, any patch to any word
        2T            offsets between words, the last three for [T_CLS]: to word, from word, to
                      itself (T: longest text)

    `per_layer` keeps one column per layer and head, layer-major; otherwise all layers share one
    column per head.
    """

    def __init__(
        self, grid: tuple[int, int], text_positions: int, layers: int, heads: int, per_layer: bool
    ) -> None:
        super().__init__()
        self.grid, self.text_positions = grid, text_positions
        self.layers, self.heads, self.per_layer = layers, heads, per_layer
        self.image_rows = (2 * grid[0] - 1) * (2 * grid[1] - 1)
        rows = self.image_rows + 3 + 2 + 2 * text_positions
        self.table = nn.Parameter(torch.zeros(rows, heads * (layers if per_layer else 1)))

    def index(self, route: tuple[Span, ...], grid: tuple[int, int] | None) -> Tensor:
        """(L, L) int64: the row of the (resized) table for each query and key of a sequence."""
        image_rows = 0 if grid is None else (2 * grid[0] - 1) * (2 * grid[1] - 1)
        image_rows = image_rows or self.image_rows
        cross = image_rows + 3
        text = cross + 2
        pieces = []
        for query in route:
            row = []
            for key in route:
                if query.modality != key.modality:
                    # VLMo: word-to-patch is row 0 of the two, patch-to-word row 1.
                    which = cross + (0 if query.modality == Modality.TEXT else 1)
                    row.append(torch.full((query.length, key.length), which))
                elif query.modality == Modality.TEXT:
                    row.append(self._text_index(query.length, text))
                else:
                    row.append(self._image_index(grid, query.length, image_rows))
            pieces.append(torch.cat(row, dim=1))
        return torch.cat(pieces, dim=0)

    @staticmethod
    def _image_index(grid: tuple[int, int] | None, length: int, image_rows: int) -> Tensor:
        if grid is None or grid[0] * grid[1] + 1 != length:
            raise ValueError(f"an image span of {length} tokens does not fit the grid {grid}")
        index = torch.empty(length, length, dtype=torch.long)
        index[1:, 1:] = grid_offsets(grid)
        index[0, :], index[:, 0], index[0, 0] = image_rows, image_rows + 1, image_rows + 2
        return index

    def _text_index(self, length: int, start: int) -> Tensor:
        rows = 2 * self.text_positions
        place = torch.arange(length - 1)
        index = torch.empty(length, length, dtype=torch.long)
        # VLMo: key minus query, shifted by (longest text - 2) so that the smallest is 0.
        index[1:, 1:] = place[None, :] - place[:, None] + self.text_positions - 2 + start
        index[0, :], index[:, 0], index[0, 0] = (
            start + rows - 3,
            start + rows - 2,
            start + rows - 1,
        )
        return index

    def forward(self, route: tuple[Span, ...], grid: tuple[int, int] | None) -> list[Tensor]:
        """One (1, H, L, L) bias per layer (the same tensor for every layer when shared)."""
        table: Tensor = self.table
        if grid is not None and grid != self.grid:
            old, new = ((2 * g[0] - 1, 2 * g[1] - 1) for g in (self.grid, grid))
            image = resize_grid(table[: self.image_rows], old, new)
            table = torch.cat((image, table[self.image_rows :]))
        index = self.index(route, grid).to(table.device)
        bias = F.embedding(index, table).permute(2, 0, 1)  # (columns, L, L)
        if not self.per_layer:
            return [bias.unsqueeze(0)] * self.layers
        return [part.unsqueeze(0) for part in bias.split(self.heads)]
