"""Stops a run on a loss or gradient that is no number, before the weights and the last good checkpoint change.

Losses are remembered without waiting for the device and judged once per optimizer step, together with the gradients;
the verdict is shared by all ranks, so that all of them stop (one alone would leave the others waiting).
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..errors import TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator


class NanGuard(TrainerCallback):
    """Judges each optimizer step of a Trainer. `watch` every micro-batch's loss; the rest happens by itself.

    Args:
        accelerator: the trainer's, for sharing the verdict.
        name_of: the name of a record by its index, for the message.
        engine: returns DeepSpeed's engine where there is one, else None.
    """

    def __init__(
        self,
        accelerator: "Accelerator",
        name_of: Callable[[int], str],
        engine: Callable[[], object | None] = lambda: None,
    ) -> None:
        self._accelerator = accelerator
        self._name_of = name_of
        self._engine = engine
        self._losses: list[Tensor] = []
        self._rows: list[Tensor] = []

    def watch(self, loss: Tensor, record_index: Tensor) -> None:
        """Remember the loss of a micro-batch, a scalar, and which records were in it, (rows,).

        Raises:
            TrainingError: with DeepSpeed, whose backward also steps, a loss that is no number.
        """
        self._losses.append(loss.detach())
        self._rows.append(record_index)
        if self._engine() is not None and self._any_rank(not bool(torch.isfinite(loss.detach()))):
            self._stop("the loss")

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Forget the last step."""
        self._losses, self._rows = [], []
        self._step = state.global_step + 1

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        """Judge the step that is about to change the weights.

        Raises:
            TrainingError: a loss or a gradient of this step is no number, on any rank.
        """
        losses = torch.stack(self._losses) if self._losses else torch.zeros(1)
        bad_loss = not bool(torch.isfinite(losses).all())
        # The gradient scaler of fp16 meets infinite gradients all the time, and skips those steps itself.
        bad_gradient = self._accelerator.scaler is None and not _all_finite(self._gradient_sizes(model))
        if self._any_rank(bad_loss or bad_gradient):
            self._stop("the loss" if self._any_rank(bad_loss) else "a gradient")

    def _gradient_sizes(self, model: torch.nn.Module) -> Iterable[Tensor | float]:
        engine = self._engine()
        if engine is not None:
            norm = engine.get_global_grad_norm()  # type: ignore[attr-defined]
            yield 0.0 if norm is None else norm
            return
        for parameter in model.parameters():
            gradient = parameter.grad
            if gradient is not None and gradient.numel():
                local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
                if local.numel():
                    yield local.detach().abs().max()

    def _any_rank(self, is_bad: bool) -> bool:
        if self._accelerator.num_processes == 1:
            return is_bad
        flag = torch.tensor(float(is_bad), device=self._accelerator.device)
        return bool(self._accelerator.reduce(flag, reduction="sum") > 0)

    def _stop(self, what: str) -> None:
        from accelerate.utils import gather_object

        batches = []
        for loss, rows in zip(self._losses, self._rows, strict=True):
            names = [self._name_of(int(index)) for index in rows.tolist()]
            batches.append(f"  loss {float(loss):.6g}: rows {', '.join(names)}")
        if self._accelerator.num_processes > 1:
            batches = gather_object(batches)
        raise TrainingError(
            f"step {self._step}: {what} is not a finite number; the weights were not changed and no checkpoint was "
            "written. The micro-batches of this step:\n" + "\n".join(batches) + "\n"
            "Look at these rows, lower the learning rate or max_grad_norm, or train in bf16 instead of fp16; then resume "
            "from the last checkpoint."
        )


def _all_finite(sizes: Iterable[Tensor | float]) -> bool:
    values = list(sizes)
    tensors = [value.float().reshape(()) for value in values if isinstance(value, Tensor)]
    numbers = [value for value in values if not isinstance(value, Tensor)]
    is_finite = all(torch.isfinite(torch.tensor(numbers)).tolist()) if numbers else True
    return is_finite and (not tensors or bool(torch.isfinite(torch.stack(tensors)).all()))
