"""Positions: the relative table against its description, and tables that fit any grid.

The reference index is derived again, pair by pair, from the description of VLMo's table: image
offsets first, then [I_CLS]-to-patch, patch-to-[I_CLS], [I_CLS] to itself, word-to-patch,
patch-to-word, and two rows per text position of which the last three belong to [T_CLS].
"""

import pytest
import torch

from tiny_models import fill_normal, random_pixels, tiny_model
from vlbeit.nn.positions import RelativeBias, grid_offsets, resize_grid
from vlbeit.types import Modality, Span

BASE_GRID, BASE_TEXT = (14, 14), 196


def relative(grid=(4, 4), text=12, layers=3, heads=2, per_layer=True) -> RelativeBias:
    return RelativeBias(grid, text, layers, heads, per_layer)


def pair_route(words: int, patches: int) -> tuple[Span, ...]:
    return (Span(Modality.TEXT, words), Span(Modality.IMAGE, patches + 1))


def expected_row(query: int, key: int, words: int, grid: tuple[int, int], longest: int) -> int:
    """The row for one query and key of a pair, told token by token."""
    rows, columns = grid
    image = (2 * rows - 1) * (2 * columns - 1)
    text = image + 3 + 2
    if query < words and key < words:
        last = text + 2 * longest - 1
        if query == 0 and key == 0:
            return last
        if key == 0:
            return last - 1
        if query == 0:
            return last - 2
        smallest = -(longest - 2)  # the offset from the last word back to the first
        return text + (key - query) - smallest
    if query < words:
        return image + 3
    if key < words:
        return image + 4
    q, k = query - words, key - words
    if q == 0 and k == 0:
        return image + 2
    if k == 0:
        return image + 1
    if q == 0:
        return image
    down = (q - 1) // columns - (k - 1) // columns
    right = (q - 1) % columns - (k - 1) % columns
    return (down + rows - 1) * (2 * columns - 1) + right + columns - 1


def test_the_base_table_has_the_rows_of_vlmo():
    table = RelativeBias(BASE_GRID, BASE_TEXT, layers=12, heads=12, per_layer=True).table
    assert tuple(table.shape) == (1126, 144)
    shared = RelativeBias(BASE_GRID, BASE_TEXT, layers=12, heads=12, per_layer=False).table
    assert tuple(shared.shape) == (1126, 12)


@pytest.mark.parametrize(
    ("grid", "longest", "words"), [((14, 14), 196, 40), ((3, 5), 9, 9), ((4, 2), 9, 5)]
)
def test_the_index_is_the_description_pair_by_pair(grid, longest, words):
    patches = grid[0] * grid[1]
    index = relative(grid, longest).index(pair_route(words, patches), grid)
    length = words + patches + 1
    wanted = [
        [expected_row(q, k, words, grid, longest) for k in range(length)] for q in range(length)
    ]
    assert torch.equal(index, torch.tensor(wanted))


def test_the_longest_pair_uses_every_row_and_no_other():
    bias = relative((14, 14), 196)
    index = bias.index(pair_route(196, 196), (14, 14))
    assert index.unique().tolist() == list(range(1126))


def test_an_index_that_swaps_query_and_key_would_be_noticed():
    index = relative((3, 3), 6).index(pair_route(6, 9), (3, 3))
    assert not torch.equal(index, index.T)


def test_a_pair_reads_the_rows_that_its_parts_read_alone():
    bias, grid = relative(), (4, 4)
    pair = bias.index(pair_route(7, 16), grid)
    text = bias.index((Span(Modality.TEXT, 7),), None)
    image = bias.index((Span(Modality.IMAGE, 17),), grid)
    assert torch.equal(pair[:7, :7], text)
    assert torch.equal(pair[7:, 7:], image)


def test_a_short_text_reads_the_corner_of_the_longest():
    bias = relative(text=12)
    longest = bias.index((Span(Modality.TEXT, 12),), None)
    short = bias.index((Span(Modality.TEXT, 5),), None)
    assert torch.equal(short, longest[:5, :5])


def test_columns_are_layer_major():
    bias = relative(layers=3, heads=2)
    fill_normal(bias)
    route = (Span(Modality.TEXT, 5),)
    parts = bias(route, None)
    index = bias.index(route, None)
    for layer, part in enumerate(parts):
        for head in range(2):
            assert torch.equal(part[0, head], bias.table[:, 2 * layer + head][index])
    assert not torch.equal(parts[0], parts[1])


def test_a_shared_table_gives_every_layer_the_same_bias():
    bias = relative(layers=3, heads=2, per_layer=False)
    fill_normal(bias)
    parts = bias((Span(Modality.TEXT, 5),), None)
    assert len(parts) == 3 and all(torch.equal(part, parts[0]) for part in parts)


def test_an_image_span_must_fit_its_grid():
    with pytest.raises(ValueError, match="17 tokens"):
        relative().index((Span(Modality.IMAGE, 17),), (3, 4))


# ------------------------------------------------------------------------ other grids


def test_the_native_grid_leaves_a_table_as_it_is():
    table = torch.randn(12, 3)
    assert resize_grid(table, (3, 4), (3, 4)) is table


def test_a_constant_table_stays_constant_on_any_grid():
    table = torch.full((12, 2), 0.7)
    resized = resize_grid(table, (3, 4), (7, 5))
    assert resized.shape == (35, 2)
    torch.testing.assert_close(resized, torch.full((35, 2), 0.7))


def test_resizing_goes_with_mirroring_and_with_turning():
    table = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    resized = resize_grid(table.reshape(12, 2), (3, 4), (6, 5)).reshape(6, 5, 2)
    mirrored = resize_grid(table.flip(1).reshape(12, 2), (3, 4), (6, 5)).reshape(6, 5, 2)
    turned = resize_grid(table.transpose(0, 1).reshape(12, 2), (4, 3), (5, 6)).reshape(5, 6, 2)
    torch.testing.assert_close(mirrored.flip(1), resized)
    torch.testing.assert_close(turned.transpose(0, 1), resized)


def test_offsets_of_a_grid_that_is_not_square_tell_rows_from_columns():
    offsets = grid_offsets((2, 3))
    right = offsets[1, 0]  # one column to the right
    down = offsets[3, 0]  # one row down
    centre = offsets[0, 0]
    assert (right - centre).item() == 1
    assert (down - centre).item() == 5
    assert offsets.unique().numel() == 3 * 5


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (16, 40)])
@pytest.mark.parametrize("positions", ["absolute", "shared", "per_layer"])
def test_any_image_size_passes_through(size, positions):
    absolute = positions == "absolute"
    model = tiny_model(absolute_positions=absolute, relative_bias="none" if absolute else positions)
    states = model.embed_image(random_pixels(2, size))
    assert states.grid == (size[0] // 8, size[1] // 8)
    out = model.backbone(states)
    assert out.shape == (2, size[0] * size[1] // 64 + 1, 32)
    assert out.isfinite().all()


def test_a_larger_image_gets_interpolated_positions_and_its_own_class_token():
    model = tiny_model()
    table = model.image.positions
    x = model.image(torch.zeros(1, 3, 48, 32))
    assert x.shape == (1, 25, 32)
    torch.testing.assert_close(x[0, 0], model.image.cls + table[0])
    content = x[0, 1:] - model.image.proj.bias
    torch.testing.assert_close(content, resize_grid(table[1:], (4, 4), (6, 4)))


def test_another_grid_moves_only_the_image_rows_of_the_relative_table():
    bias = relative()
    fill_normal(bias)
    native = bias(pair_route(5, 16), (4, 4))[0]
    larger = bias(pair_route(5, 24), (6, 4))[0]
    torch.testing.assert_close(larger[..., :5, :5], native[..., :5, :5])  # word to word
    assert torch.equal(larger[..., :5, 5], native[..., :5, 5])  # word to patch
    assert torch.equal(larger[..., 5:8, :5], native[..., 5:8, :5])  # patch to word
    assert torch.equal(larger[..., 5, 5:8], native[..., 5, 5:8])  # [I_CLS] to patch
    assert not torch.equal(larger[..., 6:22, 6:22], native[..., 6:22, 6:22])  # rows of patches


def test_a_constant_relative_table_means_the_same_on_every_grid():
    bias = relative()
    with torch.no_grad():
        bias.table.fill_(0.3)
    for grid in ((4, 4), (2, 6), (8, 8)):
        part = bias(pair_route(5, grid[0] * grid[1]), grid)[0]
        torch.testing.assert_close(part, torch.full_like(part, 0.3))


def test_a_text_longer_than_the_table_is_refused_with_both_numbers():
    model = tiny_model()
    with pytest.raises(ValueError, match="13 tokens.*12"):
        model.embed_text(torch.zeros(1, 13, dtype=torch.long))
    bare = tiny_model(absolute_positions=False, relative_bias="shared")
    with pytest.raises(ValueError, match="13 tokens.*12"):
        bare.embed_text(torch.zeros(1, 13, dtype=torch.long))


def test_an_image_that_is_no_multiple_of_the_patch_is_refused():
    with pytest.raises(ValueError, match="33 x 32"):
        tiny_model().embed_image(torch.zeros(1, 3, 33, 32))
