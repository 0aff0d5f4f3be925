"""Examples to a batch: padded, one per row, or packed, all in one row.

Shapes: B batch, T tokens, S queries (segments) of a packed row, D values of a patch.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from metis_home.errors import DataError

from .encode import IGNORE, Example
from .packing import mrope_positions

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Batch = dict[str, Tensor | int]
_PACKABLE = ("metis_home", "qwen2_5_vl")


class PaddingCollator:
    """Pad examples to the longest.

    Args:
        pad_token_id: what `input_ids` are filled with; masked, so any token does.
        side: where the padding goes. Training takes "right", generation needs "left".
    """

    def __init__(self, pad_token_id: int, side: Literal["right", "left"] = "right") -> None:
        if side not in ("right", "left"):
            raise DataError(f'side must be "right" or "left"; found {side!r}.')
        self.pad_token_id = pad_token_id
        self.side = side

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Stack examples.

        Returns:
            input_ids, attention_mask, labels, mm_token_type_ids, each (B, T) int64; router_labels, record_index, each
            (B,) int64; with images also pixel_values (patches, D) float32 and image_grid_thw (images, 3) int64.
        """
        longest = max(len(example) for example in examples)

        def padded(values: list[int], fill: int) -> list[int]:
            padding = [fill] * (longest - len(values))
            return values + padding if self.side == "right" else padding + values

        return {
            "input_ids": torch.tensor([padded(example.input_ids, self.pad_token_id) for example in examples]),
            "attention_mask": torch.tensor([padded([1] * len(example), 0) for example in examples]),
            "labels": torch.tensor([padded(example.labels, IGNORE) for example in examples]),
            "mm_token_type_ids": torch.tensor([padded(example.mm_token_type_ids, 0) for example in examples]),
            **_per_query(examples),
            **_images(examples),
        }


class PackingCollator:
    """Put examples one after the other into one row, with positions that start again at each.

    The row has no attention mask: models of transformers read from the text positions, which start again at 0, where
    a segment begins, and keep segments apart in eager, sdpa and flash attention.

    Args:
        config: the model's configuration; says how many patches make an image token.
        pad_token_id: unused while nothing is padded; kept so that both collators are made alike.
        flash_attention: also return the segments' bounds as flash attention takes them (cu_seq_lens_q, cu_seq_lens_k,
            max_length_q, max_length_k), which spares it a look at the positions in every layer.
    Raises:
        DataError: models of this kind cannot be packed.
    """

    def __init__(self, config: "PretrainedConfig", pad_token_id: int, *, flash_attention: bool = False) -> None:
        if config.model_type not in _PACKABLE:
            raise DataError(
                f"rows of a {config.model_type} model cannot be packed: its positions are not known here. Expected "
                f"{' or '.join(_PACKABLE)}; pad the rows instead."
            )
        self.spatial_merge_size = config.vision_config.spatial_merge_size
        self.pad_token_id = pad_token_id
        self.flash_attention = flash_attention

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Pack examples.

        Returns:
            input_ids, labels, mm_token_type_ids, query_ids (the segment of each token, from 0), each (1, T) int64;
            position_ids (4, 1, T) int64: the position within the segment, then its M-RoPE positions; router_labels,
            record_index, each (S,) int64; branch_ids (1, T) int64 if every example has a router label; images as in
            `PaddingCollator`. The first label of each segment is -100: the token before it is another segment's.
        Raises:
            DataError: an example holds a video, or image tokens that do not fit its images.
        """
        lengths = [len(example) for example in examples]
        positions = [
            torch.cat(
                [
                    torch.arange(len(example))[None],
                    mrope_positions(example.mm_token_type_ids, example.image_grid_thw, self.spatial_merge_size),
                ]
            )
            for example in examples
        ]
        per_query = _per_query(examples)
        batch: Batch = {
            "input_ids": torch.tensor([[token for example in examples for token in example.input_ids]]),
            "labels": torch.tensor([[label for example in examples for label in [IGNORE, *example.labels[1:]]]]),
            "mm_token_type_ids": torch.tensor([[kind for example in examples for kind in example.mm_token_type_ids]]),
            "position_ids": torch.cat(positions, dim=1)[:, None],
            "query_ids": torch.arange(len(examples)).repeat_interleave(torch.tensor(lengths))[None],
            **per_query,
            **_images(examples),
        }
        router_labels = per_query["router_labels"]
        if bool((router_labels != IGNORE).all()):
            batch["branch_ids"] = router_labels[batch["query_ids"]]
        if self.flash_attention:
            bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            batch |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
            batch |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        return batch


def _per_query(examples: Sequence[Example]) -> dict[str, Tensor]:
    return {
        "router_labels": torch.tensor([example.router_label for example in examples]),
        "record_index": torch.tensor([example.record_index for example in examples]),
    }


def _images(examples: Sequence[Example]) -> dict[str, Tensor]:
    patches = [example.pixel_values for example in examples if example.pixel_values is not None]
    grids = [example.image_grid_thw for example in examples if example.image_grid_thw is not None]
    return {"pixel_values": torch.cat(patches), "image_grid_thw": torch.cat(grids)} if patches else {}
