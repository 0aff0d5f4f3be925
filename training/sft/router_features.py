"""What the router reads of each prompt, computed once: training it then needs no decoder layer and no vision tower.

The router sees the embeddings that enter layer 0. Where embeddings and vision tower are frozen these never change, and of
mean pooling only the pooled vector matters. So each prompt is embedded once and kept: with mean pooling as one float32
vector (14 KB at 7B), with attention pooling as all its embeddings in the model's own type, as far as memory allows; what
does not fit is embedded again when it is needed.

Shapes: B batch, T tokens, D hidden size. With mean pooling T is 1: the mean of one vector is the vector.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ... import ops
from ...modeling import MetisHomeModel, MetisHomeModelOutputWithPast
from ..data.encode import IGNORE
from ..data.records import Record
from .replacing import replaced

if TYPE_CHECKING:
    from ..data.encode import Encoder, Example

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterFeature:
    """One prompt for the router."""

    x_TD: Tensor
    """(T, D): all input embeddings of the prompt, or (1, D) float32: their mean."""
    router_label: int
    """The branch that should answer, or -100."""
    record_index: int


class FeatureDataset(Dataset):
    """Records as `RouterFeature`s of `model`, computed when first asked for.

    Args:
        model: embeddings, vision tower and router; their weights must not change, but for the router's.
        cache_gib: keep features up to this size.
    """

    def __init__(
        self, records: Sequence[Record], encoder: "Encoder", model: MetisHomeModel, *, cache_gib: float
    ) -> None:
        self.records = records
        self._encoder = encoder
        self._model = model
        self._room = int(cache_gib * GIB)
        self._kept: dict[int, Tensor] = {}
        self.embedded = 0
        """How many prompts were embedded so far, repetitions included."""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> RouterFeature:
        x_TD = self._kept.get(index)
        if x_TD is None:
            x_TD = self._feature(self._encoder.prompt(self.records[index]))
            if x_TD.nbytes <= self._room:
                self._room -= x_TD.nbytes
                self._kept[index] = x_TD
        mode = self.records[index].mode
        return RouterFeature(x_TD=x_TD, router_label=IGNORE if mode is None else int(mode), record_index=index)

    @property
    def kept(self) -> int:
        """How many prompts are in memory."""
        return len(self._kept)

    def name(self, index: int) -> str:
        """The record's id, for messages."""
        return self.records[index].id

    @torch.no_grad()
    def _feature(self, example: "Example") -> Tensor:
        self.embedded += 1
        device = self._model.get_input_embeddings().weight.device
        input_ids = torch.tensor([example.input_ids], device=device)
        if example.pixel_values is None or example.image_grid_thw is None:
            x_BTD = self._model.embed(input_ids)
        else:
            pixels, grid = example.pixel_values.to(device), example.image_grid_thw.to(device)
            x_BTD = self._model.embed(input_ids, pixel_values=pixels, image_grid_thw=grid)
        if self._model.router.pooling == "mean":
            return self._model.router.pool(x_BTD.float(), None).cpu()
        return x_BTD[0].cpu()


def collate_features(features: Sequence[RouterFeature]) -> dict[str, Tensor]:
    """Stack prompts.

    Returns:
        features (B, T, D), padded with zeros; feature_mask (B, T) bool; router_labels, record_index (B,) int64; labels
        (B, T) int64, all -100: the language model has nothing to predict here.
    """
    lengths = torch.tensor([len(feature.x_TD) for feature in features])
    x_BTD = nn.utils.rnn.pad_sequence([feature.x_TD for feature in features], batch_first=True)
    mask_BT = torch.arange(x_BTD.shape[1]) < lengths[:, None]
    return {
        "features": x_BTD,
        "feature_mask": mask_BT,
        "router_labels": torch.tensor([feature.router_label for feature in features]),
        "record_index": torch.tensor([feature.record_index for feature in features]),
        "labels": torch.full(mask_BT.shape, IGNORE),
    }


@contextmanager
def router_forward(model: nn.Module, router: nn.Module, backend: str) -> Iterator[None]:
    """Within it, `model(features=, feature_mask=)` asks the router alone, also through DistributedDataParallel."""

    def forward(features: Tensor, feature_mask: Tensor, **ignored: object) -> MetisHomeModelOutputWithPast:
        decision = ops.route_queries(features, feature_mask, router, backend=backend)  # type: ignore[arg-type]
        return MetisHomeModelOutputWithPast(router_logits=decision.logits, branch_ids=decision.branch_ids)

    with replaced(model, "forward", forward):
        yield
