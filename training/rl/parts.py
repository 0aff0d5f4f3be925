"""What of a model trains by reward, which tokens it must not write, and what it is compared with."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from metis_home.branch import Branch
from metis_home.errors import RecipeError

from ..freezing import freeze_parameters, sets_trained_by_reward
from .config import MetisRLConfig


def base_of(model: nn.Module) -> nn.Module:
    """The model below an adapter's wrapper; the model itself without one."""
    return model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]


def choose_parts(model: nn.Module, args: MetisRLConfig) -> bool:
    """Freeze what does not train; returns whether the router trains (by reward).

    Raises:
        RecipeError: settings that do not fit the model.
    """
    base: Any = base_of(model)
    has_branches = base.config.model_type == "metis_home"
    if has_branches != (args.thinking is not None):
        raise RecipeError(
            "the model has two branches: set thinking to true, false, 'sample' or 'router'"
            if has_branches
            else f"thinking is {args.thinking!r}, and a dense model has no branches. Leave it out."
        )
    if not has_branches and (args.freeze or args.train_only):
        raise RecipeError("freeze and train_only name parts of the two-branch model; dense models have freeze_vision")
    if base is model:  # adapters have frozen the rest already
        if has_branches:
            freeze_parameters(base, sets_trained_by_reward(args.thinking, args.freeze, args.train_only))
        elif args.freeze_vision:
            for name, parameter in base.named_parameters():
                if ".visual." in f".{name}":
                    parameter.requires_grad_(False)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise RecipeError("no parameter trains")
    trains_router = any(".router." in f".{name}" for name in trained)
    if trains_router and args.thinking != "sample":
        raise RecipeError(
            f"the router trains by reward only where its decisions are drawn from it: thinking is {args.thinking!r}. "
            "Set thinking: sample, or freeze the router (freeze: [router])."
        )
    return trains_router


class Reference:
    """The policy before training: a frozen copy, or the model without its adapter."""

    def __init__(self, model: nn.Module, *, is_adapter: bool) -> None:
        self._model, self._is_adapter = model, is_adapter

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """Within it, the returned model is the reference."""
        if not self._is_adapter:
            yield self._model
            return
        with self._model.disable_adapter():  # type: ignore[operator]
            yield self._model


def reference_of(model: nn.Module, given: nn.Module | None, args: MetisRLConfig) -> Reference | None:
    """What the KL term compares with; None without one."""
    if not args.kl_coef:
        return None
    if given is None and hasattr(model, "peft_config"):
        return Reference(model, is_adapter=True)
    copied = given if given is not None else copy.deepcopy(base_of(model))
    return Reference(copied.eval().requires_grad_(False).to(args.device), is_adapter=False)


def wanted_branch(args: MetisRLConfig) -> Any:
    """`Sampling.branch` for these settings."""
    return Branch(int(args.thinking)) if isinstance(args.thinking, bool) else args.thinking
