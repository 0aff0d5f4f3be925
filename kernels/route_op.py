"""The router as `torch.library` operators: `metis_home::route_queries` and `metis_home::route_queries_backward`.

Shapes: B batch, T tokens, D hidden, H router hidden, E branches (2).
"""

import torch
from torch import Tensor

from . import reference_route
from .interpreter import INTERPRETING
from .reference import accumulation_dtype
from .reference_route import Pooled, RouterWeights


def _uses_kernels(x_BTD: Tensor, implementation: str) -> bool:
    if implementation == "auto":
        return x_BTD.device.type != "cpu" or INTERPRETING
    return implementation == "kernels"


@torch.library.custom_op("metis_home::route_queries", mutates_args=())
def route_queries(
    x_BTD: Tensor,
    mask_BT: Tensor,
    norm_D: Tensor,
    hidden_HD: Tensor,
    hidden_bias_H: Tensor,
    output_EH: Tensor,
    output_bias_E: Tensor,
    query_D: Tensor | None,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Decide on each query; the definition is `reference_route.route_queries`.

    Args:
        implementation: `auto`, `reference` or `kernels`.
    Returns:
        (branch_ids, probability, logits, pooled, peak, total); the last three are what the backward needs.
    """
    weights = RouterWeights(norm_D, hidden_HD, hidden_bias_H, output_EH, output_bias_E, query_D)
    if _uses_kernels(x_BTD, implementation) and x_BTD.shape[0]:
        from .route import route_queries as launch

        branch_ids_B, probability_B, logits_BE, pooled = launch(x_BTD, mask_BT, weights)
    else:
        branch_ids_B, probability_B, logits_BE, pooled = reference_route.route_queries(x_BTD, mask_BT, weights)
    return branch_ids_B, probability_B, logits_BE, *pooled


@route_queries.register_fake
def _(x_BTD, mask_BT, norm_D, hidden_HD, hidden_bias_H, output_EH, output_bias_E, query_D, implementation):
    batch, _, hidden = x_BTD.shape
    wide = accumulation_dtype(x_BTD.dtype)
    shapes = ((batch,), (batch, 2), (batch, hidden), (batch,), (batch,))
    return x_BTD.new_empty(batch, dtype=torch.long), *(x_BTD.new_empty(shape, dtype=wide) for shape in shapes)


@torch.library.custom_op("metis_home::route_queries_backward", mutates_args=())
def route_queries_backward(
    grad_logits_BE: Tensor,
    x_BTD: Tensor,
    mask_BT: Tensor,
    norm_D: Tensor,
    hidden_HD: Tensor,
    hidden_bias_H: Tensor,
    output_EH: Tensor,
    output_bias_E: Tensor,
    query_D: Tensor | None,
    pooled_BD: Tensor,
    peak_B: Tensor,
    total_B: Tensor,
    need_tokens: bool,
    implementation: str,
) -> list[Tensor]:
    """Gradients of the logits.

    Args:
        need_tokens: also of x, and of the query if there is one. They cost a pass over x, the others touch (B, D) only.
    Returns:
        [norm, hidden, hidden bias, output, output bias]; if `need_tokens`, x and (attention pooling) the query.
    """
    weights = RouterWeights(norm_D, hidden_HD, hidden_bias_H, output_EH, output_bias_E, query_D)
    pooled = Pooled(pooled_BD, peak_B, total_B)
    grad_pooled_BD, *gradients = reference_route.decide_backward(grad_logits_BE, pooled_BD, weights)
    parameters = (norm_D, hidden_HD, hidden_bias_H, output_EH, output_bias_E)
    gradients = [gradient.to(weight.dtype) for gradient, weight in zip(gradients, parameters, strict=True)]
    if not need_tokens:
        return gradients
    if _uses_kernels(x_BTD, implementation) and x_BTD.numel():
        from .route_backward import pool_backward
    else:
        from .reference_route import pool_backward
    grad_x_BTD, grad_query_D = pool_backward(grad_pooled_BD, x_BTD, mask_BT, query_D, pooled)
    return [
        *gradients,
        grad_x_BTD,
        *([] if query_D is None or grad_query_D is None else [grad_query_D.to(query_D.dtype)]),
    ]


@route_queries_backward.register_fake
def _(
    grad_logits_BE,
    x_BTD,
    mask_BT,
    norm_D,
    hidden_HD,
    hidden_bias_H,
    output_EH,
    output_bias_E,
    query_D,
    pooled_BD,
    peak_B,
    total_B,
    need_tokens,
    implementation,
):
    tensors = [norm_D, hidden_HD, hidden_bias_H, output_EH, output_bias_E]
    gradients = [torch.empty_like(tensor) for tensor in tensors]
    if need_tokens:
        gradients.append(x_BTD.new_empty(x_BTD.shape))
        if query_D is not None:
            gradients.append(torch.empty_like(query_D))
    return gradients


def _keep_for_backward(ctx, inputs, output) -> None:
    *tensors, query_D, implementation = inputs
    branch_ids_B, probability_B, _, *pooled = output
    ctx.mark_non_differentiable(branch_ids_B)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, probability_B, *pooled, *([] if query_D is None else [query_D]))
    ctx.implementation = implementation


def _backward(ctx, _grad_ids, grad_probability_B, grad_logits_BE, _grad_pooled, _grad_peak, _grad_total):
    *tensors, probability_B, pooled_BD, peak_B, total_B = ctx.saved_tensors[:11]
    query_D = ctx.saved_tensors[11] if len(ctx.saved_tensors) > 11 else None
    if grad_logits_BE is None:
        grad_logits_BE = torch.zeros((*probability_B.shape, 2), dtype=probability_B.dtype, device=probability_B.device)
    if grad_probability_B is not None:
        slope_B = grad_probability_B * probability_B * (1 - probability_B)
        grad_logits_BE = grad_logits_BE + torch.stack([-slope_B, slope_B], -1)
    need_x, *_, need_query, _ = ctx.needs_input_grad
    gradients = route_queries_backward(
        grad_logits_BE,
        *tensors,
        query_D,
        pooled_BD,
        peak_B,
        total_B,
        need_x or need_query,
        ctx.implementation,
    )
    of_weights, of_tokens = gradients[:5], [*gradients[5:], None, None][:2]
    return of_tokens[0], None, *of_weights, of_tokens[1] if query_D is not None else None, None


route_queries.register_autograd(_backward, setup_context=_keep_for_backward)
