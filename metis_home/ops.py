"""The only door to the kernels: what the model computes that a dense model does not.

`torch` calls the layer's modules, so LoRA, quantised linears, hooks and sharded parameters all act. `triton` is the
fused path of `metis_home.kernels`. `auto` takes the fused path where it runs and is known to be faster.

Shapes: B batch, T tokens, N = B * T rows, D hidden size.
"""

import logging
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Literal, cast

import torch
from torch import Tensor, nn

from .branch_plan import BranchIds, BranchPlan, plan_branches
from .errors import BackendError
from .router import MetisHomeRouter, RouterDecision, decide

logger = logging.getLogger(__name__)

Backend = Literal["auto", "torch", "triton"]
BACKENDS: tuple[str, ...] = ("auto", "torch", "triton")
_ENVIRONMENT_VARIABLE = "METIS_HOME_BACKEND"


def check_backend(backend: str, where: str = "backend") -> Backend:
    """Return `backend` if it is one.

    Raises:
        BackendError: it is not; `where` names the place it was found in.
    """
    if backend not in BACKENDS:
        raise BackendError(f"{where} must be one of {', '.join(BACKENDS)}; found {backend!r}")
    return cast(Backend, backend)


_backend: str = check_backend(os.environ.get(_ENVIRONMENT_VARIABLE, "auto"), f"environment {_ENVIRONMENT_VARIABLE}")


def set_backend(backend: Backend) -> None:
    """Choose the backend for every call that does not name one (process-wide).

    Raises:
        BackendError: unknown backend.
    """
    global _backend
    _backend = check_backend(backend)


def get_backend() -> str:
    """The process-wide backend: `auto`, `torch` or `triton`."""
    return _backend


def kernels_usable(device: torch.device | str) -> tuple[bool, str]:
    """Can the fused kernels run on `device`? With the reason if not, else with what `auto` does there."""
    dispatch = _import_kernels()
    if isinstance(dispatch, str):
        return False, dispatch
    usable, reason = dispatch.available(device)
    if not usable:
        return False, reason
    return True, "auto uses it" if dispatch.is_measured(device) else "not measured here, so auto uses torch"


class _KeepUnused(torch.autograd.Function):
    """Return `y` as it is, and tie `unused` (0 rows) into the graph with a zero gradient."""

    @staticmethod
    def forward(ctx, y: Tensor, unused: Tensor) -> Tensor:
        ctx.unused_shape = unused.shape
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor, Tensor]:
        return grad_y, grad_y.new_zeros(ctx.unused_shape)


def branch_ffn(
    x_BTD: Tensor,
    experts: Sequence[nn.Module] | nn.ModuleList,
    branch_ids: BranchIds | BranchPlan,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Send each row through the FFN of its branch.

    Args:
        x_BTD: hidden states, (B, T, D).
        experts: the layer's two FFN modules, (non-thinking, thinking).
        branch_ids: an int for the whole batch (then this *is* the dense FFN, bit for bit), (B,) per query, (B, T) per
            token (packed rows), or the plan of this forward.
        backend: see the module's head.
    Returns:
        (B, T, D), dtype of the experts' output.
    Raises:
        BranchError: branch_ids of a wrong type, shape or range.
        BackendError: `triton` was asked for and cannot run here.

    While training, both experts are called, the one without rows on 0 rows: its gradients are then zeros instead of
    missing, and all ranks of a distributed run issue the same collectives in the same order.
    """
    plan: int | BranchPlan
    # This runs for every layer and token: one branch of a forward whose plan was made takes the short way.
    if isinstance(branch_ids, BranchPlan) or (type(branch_ids) is int and 0 <= branch_ids <= 1):
        plan = branch_ids
    else:
        plan = plan_branches(branch_ids, x_BTD.shape[0], x_BTD.shape[1], x_BTD.device)
    # One branch, unless the kernels were asked for by name: the modules themselves, so bit for bit the dense model.
    chosen = _chosen(backend)
    kernels = None if chosen == "auto" and isinstance(plan, int) else _kernels(chosen, x_BTD.device)
    if kernels is not None:
        usable, reason = kernels.can_run(x_BTD, experts)
        if usable:
            return kernels.branch_ffn(x_BTD, experts, plan if isinstance(plan, int) else plan.to(x_BTD.device))
        _log_fallback(f"the modules compute the FFN, not the kernels: {reason}")
    if isinstance(plan, int):
        return _one_branch(x_BTD, experts, plan)
    plan = plan.to(x_BTD.device)
    if plan.rows is None:
        y_NON, y_THINK = experts[0](x_BTD), experts[1](x_BTD)  # plain ints: dynamo cannot index with an enum
        is_thinking = plan.branch_ids == 1
        return torch.where(is_thinking.view(*is_thinking.shape, *[1] * (3 - is_thinking.dim())), y_THINK, y_NON)
    return _by_rows(x_BTD, experts, plan.rows)


def _one_branch(x_BTD: Tensor, experts: Sequence[nn.Module] | nn.ModuleList, branch: int) -> Tensor:
    expert = experts[branch]
    if not _calls_every_expert(expert):
        return expert(x_BTD)
    other = 1 - branch
    # Index order on every rank, whichever branch it trains.
    outputs = {index: experts[index](x_BTD if index == branch else x_BTD[:0]) for index in (0, 1)}
    return _KeepUnused.apply(outputs[branch], outputs[other])


def _by_rows(x_BTD: Tensor, experts: Sequence[nn.Module] | nn.ModuleList, rows: tuple[Tensor, Tensor]) -> Tensor:
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    y_ND: Tensor | None = None
    for expert, index in zip(experts, rows, strict=True):
        if index.numel() == 0 and not _calls_every_expert(expert):
            continue
        part = expert(x_ND.index_select(0, index))
        if y_ND is None:
            y_ND = part.new_empty(x_ND.shape)  # every row is in one of the two indices
        y_ND.index_copy_(0, index, part)
    if y_ND is None:  # no rows at all
        return torch.zeros_like(x_BTD)
    return y_ND.view_as(x_BTD)


def _calls_every_expert(expert: nn.Module) -> bool:
    """Must both experts of a layer be called, the one without rows on 0 rows? `expert` is either of them."""
    return expert.training or _is_sharded(expert)


def _is_sharded(expert: nn.Module) -> bool:
    # Sharded parameters are gathered by collectives: every rank has to call the same modules in the same order.
    weight = getattr(expert._modules.get("down_proj"), "weight", None)
    return hasattr(weight, "ds_id") or hasattr(weight, "placements")  # DeepSpeed ZeRO-3, torch DTensor


def route_queries(
    x_BTD: Tensor, mask_BT: Tensor | None, router: MetisHomeRouter, *, backend: Backend = "auto"
) -> RouterDecision:
    """Let the router decide on each query, at threshold 0.5.

    Args:
        x_BTD: input embeddings with visual features merged in, (B, T, D).
        mask_BT: true at prompt tokens, (B, T); None means all. With x of shape (1, T, D) it may have any number of
            rows: queries whose tokens stand in one row (the modules then do it, on every backend).
        router: the model's router.
        backend: see the module's head.
    Raises:
        BackendError: `triton` was asked for and cannot run here.
    """
    kernels = _kernels(_chosen(backend), x_BTD.device)
    if kernels is not None:
        usable, reason = kernels.can_route(x_BTD, router)
        if usable and mask_BT is not None and mask_BT.shape[0] != x_BTD.shape[0]:
            usable, reason = False, "several queries share a row"
        if usable:
            branch_ids_B, probability_B, logits_BE = kernels.route_queries(x_BTD, mask_BT, router)
            return RouterDecision(branch_ids=branch_ids_B, thinking_probability=probability_B, logits=logits_BE)
        _log_fallback(f"the module computes the routing, not the kernels: {reason}")
    return decide(router(x_BTD, mask_BT))


def _chosen(backend: str) -> str:
    """The backend of one call: its own, else the process-wide one."""
    return check_backend(backend) if backend != "auto" else _backend


def _kernels(chosen: str, device: torch.device) -> ModuleType | None:
    """The entry to the kernels if this call should use them, else None.

    `auto` takes them on an accelerator whose launch table rests on measurements.

    Raises:
        BackendError: `triton` was asked for and cannot run here.
    """
    if chosen == "torch" or (chosen == "auto" and device.type == "cpu"):
        return None
    dispatch = _import_kernels()
    if isinstance(dispatch, str):
        reason = dispatch
    else:
        usable, reason = dispatch.available(device)
        if usable and (chosen == "triton" or dispatch.is_measured(device)):
            return dispatch
        reason = reason or "nothing was measured on this device (`python -m metis_home.kernels.tune` does that)"
    if chosen == "triton":
        raise BackendError(f"backend 'triton' cannot run here: {reason}. Choose 'torch' or 'auto'.")
    _log_fallback(f"backend 'auto' uses torch: {reason}")
    return None


def _import_kernels() -> ModuleType | str:
    """`metis_home.kernels.dispatch`, or why it cannot be imported.

    By its full name: this file is also exported as remote code, into a folder without kernels. As a statement in a
    `try`: `torch.compile` can trace that, and transformers does not count it as something the remote code needs.
    """
    try:
        from metis_home.kernels import dispatch
    except ImportError as error:
        return f"the kernels cannot be imported ({error})"
    return dispatch


_logged: set[str] = set()


def _log_fallback(message: str) -> None:
    # Once per reason and process; never while compiling, where a log call would break the graph.
    if torch.compiler.is_compiling() or message in _logged:
        return
    _logged.add(message)
    logger.warning(message)
