"""Collects, without waiting for the device, what each query of a run gave, until it is time to report."""

import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...router import IGNORE
from . import metrics
from .losses import supervised_targets

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .trainer import Forward

GIB = 2**30
_NO_RECORD = -1  # fills up ranks that saw fewer queries


class Journal:
    """Lines about queries (see `metrics.py`) and how many tokens went by, since the last `clear`."""

    def __init__(self, accelerator: "Accelerator") -> None:
        self._accelerator = accelerator
        self.clear()

    @property
    def is_empty(self) -> bool:
        """Has nothing been added since `clear`?"""
        return not self._lines

    def clear(self) -> None:
        """Begin anew; the clock too."""
        self._lines: list[Tensor] = []
        self._tokens: list[Tensor] = []
        self._since = time.perf_counter()

    def add(self, inputs: Mapping[str, Tensor], forward: "Forward") -> None:
        """Note the queries of one micro-batch."""
        self._lines.append(query_lines(inputs, forward))
        if "features" not in inputs:  # of those, the router reads one vector per prompt
            self._tokens.append(_num_tokens(inputs))

    def report(
        self, source_of: Callable[[int], str], router_loss_weight: float, *, each_record_once: bool = False
    ) -> dict[str, float]:
        """Summarize the queries of all ranks; every rank must call it, and gets the same.

        Args:
            source_of: the source of a record, by index.
            each_record_once: leave out repetitions, which fill up the last evaluation batch of a distributed run.
        Returns:
            What `metrics.summarize` says; queries_per_second and tokens_per_second (all ranks, since `clear`; padding does
            not count); memory_gib (the peak of this process: the accelerator's where there is one, else the resident set).
        """
        device = self._accelerator.device
        lines = torch.cat(self._lines) if self._lines else torch.zeros(0, metrics.NUM_COLUMNS, device=device)
        tokens = torch.stack(self._tokens).sum() if self._tokens else torch.zeros((), device=device)
        if self._accelerator.num_processes > 1:
            lines = self._accelerator.pad_across_processes(lines, dim=0, pad_index=_NO_RECORD)
            lines = self._accelerator.gather(lines)
            tokens = self._accelerator.reduce(tokens, reduction="sum")
        table = lines.double().cpu().numpy()
        table = table[table[:, metrics.RECORD] != _NO_RECORD]
        if each_record_once:
            table = table[np.unique(table[:, metrics.RECORD], return_index=True)[1]]
        sources = [source_of(int(index)) for index in table[:, metrics.RECORD]]
        report = metrics.summarize(table, sources, router_loss_weight)
        seconds = time.perf_counter() - self._since
        report["queries_per_second"] = len(table) / seconds
        if self._tokens:
            report["tokens_per_second"] = float(tokens) / seconds
        report["memory_gib"] = peak_memory_gib(device)
        return report


def query_lines(inputs: Mapping[str, Tensor], forward: "Forward") -> Tensor:
    """One line per query, (Q, 7) float32, columns as in `metrics.py`."""
    labels_BT = inputs["labels"]
    device = labels_BT.device
    record_Q = inputs["record_index"].to(device)
    count = len(record_Q)
    targets_BT = supervised_targets(labels_BT)
    branch_ids = forward.outputs.branch_ids
    if "query_ids" in inputs:  # packed: a row holds several queries
        query_BT = inputs["query_ids"]
        branch_Q = torch.zeros(count, dtype=torch.long, device=device)
        inside = query_BT >= 0
        branch_Q[query_BT[inside]] = torch.as_tensor(branch_ids, device=device).expand_as(query_BT)[inside]
    else:
        query_BT = torch.arange(count, device=device)[:, None].expand_as(labels_BT)
        branch_Q = torch.as_tensor(branch_ids, device=device).expand(count)
    query_S = query_BT[targets_BT]
    lines = torch.full((count, metrics.NUM_COLUMNS), float("nan"), device=device)
    lines[:, metrics.RECORD] = record_Q.float()
    lines[:, metrics.BRANCH] = branch_Q.float()
    lines[:, metrics.LM_SUM] = _sums(forward.lm_losses_S.detach().float(), query_S, count)
    lines[:, metrics.TOKENS] = _sums(torch.ones_like(query_S, dtype=torch.float32), query_S, count)
    labels_Q = inputs.get("router_labels")
    lines[:, metrics.LABEL] = float(IGNORE) if labels_Q is None else labels_Q.float()
    if forward.outputs.router_logits is not None:
        logits_QE = forward.outputs.router_logits.detach().float()
        lines[:, metrics.PROBABILITY] = logits_QE.softmax(-1)[:, 1]
    if forward.router_losses_Q is not None:
        lines[:, metrics.ROUTER_LOSS] = forward.router_losses_Q.detach().float()
    return lines


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far, GiB: allocated on the accelerator, or resident on a CPU machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def _sums(values_S: Tensor, query_S: Tensor, count: int) -> Tensor:
    return torch.zeros(count, device=values_S.device).index_add_(0, query_S, values_S)


def _num_tokens(inputs: Mapping[str, Tensor]) -> Tensor:
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        return mask.sum().float()
    return torch.tensor(float(inputs["labels"].numel()), device=inputs["labels"].device)
