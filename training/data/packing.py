"""Packing: which rows share a row, and the M-RoPE positions of each.

Shapes: T tokens.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import TYPE_CHECKING

from metis_home.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


def pack_lengths(
    lengths: Sequence[int], *, max_tokens: int, max_rows: int | None = None, order: Sequence[int] | None = None
) -> list[list[int]]:
    """Put rows into as few bins as best-fit decreasing needs: each goes to the fullest bin that still takes it.

    The same for the same arguments; at most 11/9 of the fewest bins possible, plus one, with the default order.

    Args:
        lengths: tokens of each row. max_tokens: most tokens of a bin. max_rows: most rows of a bin.
        order: the order in which rows are placed; default: by length, longest first.
    Returns:
        Lists of row numbers, one per bin.
    Raises:
        DataError: a row is longer than a bin.
    Source: best-fit decreasing, Johnson et al., SIAM J. Computing 3 (1974).
    """
    if order is None:
        order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, bin), ascending: the first that is large enough is the fullest
    for row in order:
        length = lengths[row]
        if length > max_tokens:
            raise DataError(
                f"row {row} has {length} tokens and a packed row holds {max_tokens}. Rows are not truncated: raise "
                "the limit, or leave this row out."
            )
        place = bisect_left(free, (length, -1))
        if place == len(free):
            bins.append([row])
            left, chosen = max_tokens - length, len(bins) - 1
        else:
            left, chosen = free.pop(place)
            bins[chosen].append(row)
            left -= length
        if left > 0 and (max_rows is None or len(bins[chosen]) < max_rows):
            insort(free, (left, chosen))
    return bins


def mrope_positions(
    mm_token_type_ids: Sequence[int], image_grid_thw: "Tensor | None", spatial_merge_size: int
) -> "Tensor":
    """M-RoPE positions of one sequence of text and images, as Qwen2.5-VL counts them.

    A text token is one step further than all before it, in all three dimensions. An image begins where a text token
    would stand: its patch (row, column) is at (start, start + row, start + column), and what follows begins after its
    longer side.

    Args:
        mm_token_type_ids: 0 text, 1 image, of each token.
        image_grid_thw: (images, 3), in patches, in order; None without images.
        spatial_merge_size: patches that make a token, per side.
    Returns:
        (3, T) int64: temporal, height, width.
    Raises:
        DataError: image tokens and grids do not fit together, or there are video tokens.
    Source: Qwen2-VL (arXiv 2409.12191), M-RoPE; `get_rope_index` of transformers.
    """
    import torch

    grids = [] if image_grid_thw is None else [tuple(map(int, grid)) for grid in image_grid_thw.tolist()]
    parts, position, token, image = [], 0, 0, 0
    while token < len(mm_token_type_ids):
        kind = mm_token_type_ids[token]
        end = token + 1
        if kind == 0:
            while end < len(mm_token_type_ids) and mm_token_type_ids[end] == 0:
                end += 1
            parts.append(torch.arange(position, position + end - token).expand(3, -1))
            position += end - token
        elif kind == 1 and image < len(grids):
            time, height, width = grids[image]
            image += 1
            height, width = height // spatial_merge_size, width // spatial_merge_size
            end = token + time * height * width
            if any(kind != 1 for kind in mm_token_type_ids[token:end]) or end > len(mm_token_type_ids):
                raise DataError(f"image {image - 1} needs {end - token} image tokens in a row, and there are fewer.")
            axes = torch.meshgrid(torch.arange(time), torch.arange(height), torch.arange(width), indexing="ij")
            parts.append(torch.stack(axes).reshape(3, -1) + position)
            position += max(height, width)
        else:
            raise DataError(
                "videos cannot be packed. Pad them, or pass frames as images."
                if kind == 2
                else f"there are image tokens for more than the {len(grids)} images."
            )
        token = end
    if image < len(grids):
        raise DataError(f"there are {len(grids)} images and image tokens for {image} of them.")
    return torch.cat(parts, dim=1) if parts else torch.zeros(3, 0, dtype=torch.long)
