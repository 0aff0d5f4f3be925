"""The one entry to this folder: `metis_home.ops` imports it when the `triton` backend is asked for.

    available     can kernels run on this device?
    can_run       can they replace these modules?
    branch_ffn, route_queries

Shapes: B batch, T tokens, D hidden, E branches (2).
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from .interpreter import INTERPRETING
from .launch_table import table_for, target_of
from .reference import NUM_BRANCHES, Run
from .reference_route import RouterWeights
from .rows import RowBranches, row_branches

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_LINEARS = ("gate_proj", "up_proj", "down_proj")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class PlanLike(Protocol):
    """What is read of `metis_home.branch_plan.BranchPlan`."""

    branch_ids: Tensor
    runs: tuple[tuple[int, int, int], ...] | None


@torch.compiler.assume_constant_result
def available(device: torch.device | str) -> tuple[bool, str]:
    """(True, "") if the kernels run on `device`, else (False, the reason)."""
    device = torch.device(device)
    if device.type == "cuda":
        target = target_of(device)
        return (True, "") if target != "none" else (False, f"{torch.cuda.get_device_name(device)} is older than sm_80")
    if device.type == "cpu" and INTERPRETING:
        return True, ""
    return False, f"the kernels need a CUDA or ROCm device, found {device.type} (or TRITON_INTERPRET=1, for tests)"


@torch.compiler.assume_constant_result
def is_measured(device: torch.device | str) -> bool:
    """True if the launch table of `device` rests on measurements there: what `backend="auto"` asks for."""
    return available(device)[0] and table_for(torch.device(device)).measured


def can_run(x: Tensor, experts: Sequence[nn.Module] | nn.ModuleList) -> tuple[bool, str]:
    """(True, "") if the kernels compute exactly what calling `experts` would, else (False, the reason).

    They read the six weight matrices and call no module: adapters, quantised or sharded weights and hooks would be
    bypassed, so any of these sends the call to the modules.
    """
    if len(experts) != NUM_BRANCHES:
        return False, f"the kernels know {NUM_BRANCHES} branches, found {len(experts)} experts"
    for branch, expert in enumerate(experts):
        reason = _not_plain(expert)
        if reason:
            return False, f"experts[{branch}]{reason}"
    weights = _weights(experts)
    dtype = weights[0].dtype
    if any(weight.dtype != dtype or weight.device != x.device for weight in weights):
        return False, f"the six weights and the input must share one dtype and device ({dtype}, {x.device})"
    if dtype not in _DTYPES:
        return False, f"no kernel for {dtype}"
    if torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) != dtype:
        return False, f"autocast to {torch.get_autocast_dtype(x.device.type)} would copy the {dtype} weights"
    if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        return False, f"the input is {x.dtype}, the weights are {dtype}"
    return True, ""


def can_route(x: Tensor, router: nn.Module) -> tuple[bool, str]:
    """(True, "") if the router's parameters can be read without calling it, else (False, the reason)."""
    for name, parameter in router.named_parameters():
        if type(parameter) is not nn.Parameter or hasattr(parameter, "ds_id"):
            return False, f"router.{name} is sharded or quantised ({type(parameter).__name__})"
        if parameter.device != x.device:
            return False, f"router.{name} is on {parameter.device}, the input on {x.device}"
    if any(getattr(module, hooks) for module in router.modules() for hooks in _HOOKS):
        return False, "the router has hooks"
    return True, ""


def _not_plain(expert: nn.Module) -> str:
    if set(expert._modules) != {*_LINEARS, "act_fn"} or "forward" in expert.__dict__:
        return f" is a {type(expert).__name__}, not a plain gate/up/down FFN"
    if not isinstance(expert.act_fn, nn.SiLU) and type(expert.act_fn).__name__ != "SiLUActivation":
        return f".act_fn is {type(expert.act_fn).__name__}, not SiLU"
    for name in _LINEARS:
        linear = expert._modules[name]
        if type(linear) is not nn.Linear or linear.bias is not None or "forward" in linear.__dict__:
            return f".{name} is a {type(linear).__name__}, not a plain nn.Linear without bias"
        weight = linear.weight
        if type(weight) not in (nn.Parameter, Tensor) or hasattr(weight, "ds_id"):
            return f".{name}.weight is sharded or quantised ({type(weight).__name__})"
        if not weight.is_contiguous():
            return f".{name}.weight is not contiguous"
    if any(getattr(module, hooks) for module in expert.modules() for hooks in _HOOKS):
        return " has hooks"
    return ""


def _weights(experts: Sequence[nn.Module] | nn.ModuleList) -> list[Tensor]:
    return [expert.get_parameter(f"{name}.weight") for expert in experts for name in _LINEARS]


def branch_ffn(
    x_BTD: Tensor,
    experts: Sequence[nn.Module] | nn.ModuleList,
    branch_ids: int | Tensor | PlanLike,
    *,
    residual_BTD: Tensor | None = None,
    recompute: bool = False,
    empty_gradient: Literal["zeros", "none"] = "zeros",
    implementation: str = "auto",
) -> Tensor:
    """Send each row through the FFN of its branch.

    Ask `available` and `can_run` first. For (B,) and (B, T) ids on the host, or a plan with runs, the cuBLAS-slices
    implementation is possible beside the kernels; the launch table chooses by row count.

    Args:
        x_BTD: (B, T, D); copied only if its rows are not evenly spaced.
        experts: (non-thinking, thinking) plain SwiGLU modules.
        branch_ids: int, (B,), (B, T) or the model's plan of this forward.
        residual_BTD: added to the result before it is rounded, or None.
        recompute: keep only X for the backward and compute the pre-activations again (+33 % backward FLOPs, activation
            memory H instead of 2 I + H per row).
        empty_gradient: what an expert without rows gets: exact `zeros` (as DDP and FSDP need), or `none` where the host
            knows that it has no rows.
        implementation: `auto` (the table decides), `reference`, `slices`, `grouped` or `decode`; for tests, benchmarks.
    Returns:
        (B, T, D), dtype of the weights.
    """
    from .ffn_op import branch_ffn as op

    batch, tokens, hidden = x_BTD.shape
    rows = _rows(branch_ids, batch, tokens, x_BTD.device)
    weights = _weights(experts)
    x_ND = _even_rows(x_BTD.to(weights[0].dtype), hidden)
    residual_ND = None if residual_BTD is None else _even_rows(residual_BTD.to(x_ND.dtype), hidden)
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x_ND, *weights))
    y_ND, _, _ = op(
        x_ND,
        *weights,
        rows.ids_S,
        rows.rows_per_id,
        rows.flat_runs,
        residual_ND,
        # decode keeps nothing: its backward recomputes
        trains and not recompute and implementation != "decode",
        empty_gradient,
        implementation,
    )
    return y_ND.view(batch, tokens, hidden)


def _rows(branch_ids: int | Tensor | PlanLike, batch: int, tokens: int, device: torch.device) -> RowBranches:
    if isinstance(branch_ids, int | Tensor):
        return row_branches(branch_ids, batch, tokens, device)
    rows = row_branches(branch_ids.branch_ids, batch, tokens, device)
    if branch_ids.runs is None or rows.runs is not None:
        return rows
    return RowBranches(rows.ids_S, rows.rows_per_id, tuple(Run(*run) for run in branch_ids.runs))


def _even_rows(x_BTD: Tensor, hidden: int) -> Tensor:
    x_ND = x_BTD.reshape(-1, hidden)
    # reshape keeps any stride that fits; the kernels want neighbours in a row to be neighbours in memory, and rows
    # that do not overlap (an expanded tensor has stride 0).
    return x_ND if x_ND.stride(1) == 1 and x_ND.stride(0) >= hidden else x_ND.contiguous()


def route_queries(x_BTD: Tensor, mask_BT: Tensor | None, router: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Let the router decide on each query.

    Args:
        x_BTD: input embeddings, any float dtype. mask_BT: true at prompt tokens; None means all.
        router: a `MetisHomeRouter`, parameters in any float dtype (they are used in float32).
    Returns:
        (branch_ids (B,) int64, P(thinking) (B,) float32, logits (B, 2) float32).
    """
    from .route_op import route_queries as op

    if mask_BT is None:
        mask_BT = torch.ones(x_BTD.shape[:2], dtype=torch.bool, device=x_BTD.device)
    parameters = dict(router.named_parameters())
    names = ("norm.weight", "hidden.weight", "hidden.bias", "output.weight", "output.bias")
    norm_D, hidden_HD, hidden_bias_H, output_EH, output_bias_E = (parameters[name] for name in names)
    query_D = parameters.get("query")
    weights = RouterWeights(norm_D, hidden_HD, hidden_bias_H, output_EH, output_bias_E, query_D)
    x_BTD = x_BTD if x_BTD.stride(-1) == 1 else x_BTD.contiguous()
    branch_ids, probability, logits, *_ = op(
        x_BTD, mask_BT.to(device=x_BTD.device, dtype=torch.bool).contiguous(), *weights, "auto"
    )
    return branch_ids, probability, logits
