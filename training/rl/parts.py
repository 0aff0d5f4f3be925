"""What of a model trains by reward, which tokens it must not write, and what it is compared with."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from metis_home.branch import Branch
from metis_home.errors import RecipeError

from ..freezing import freeze_parameters, set_of, sets_trained_by_reward, trainable_sets
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
    if base is not model:
        _freeze_adapters(model, args, has_branches=has_branches)
    elif has_branches:
        freeze_parameters(base, sets_trained_by_reward(args.thinking, args.freeze, args.train_only))
    elif args.freeze_vision:
        _freeze(base, lambda name: ".visual." in f".{name}")
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


def _freeze_adapters(model: nn.Module, args: MetisRLConfig, *, has_branches: bool) -> None:
    """What is not an adapter is frozen already; here, adapters on parts that should not train."""
    if has_branches and (args.freeze or args.train_only):
        trained = trainable_sets(args.freeze, args.train_only)
        _freeze(model, lambda name: set_of(name) not in trained)
    elif not has_branches and args.freeze_vision:
        _freeze(model, lambda name: ".visual." in name)


def _freeze(model: nn.Module, chosen: Callable[[str], bool]) -> None:
    for name, parameter in model.named_parameters():
        if chosen(name):
            parameter.requires_grad_(False)


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
    """What the KL term, or the KL metric, compares with; None without either."""
    if given is None and not args.kl_coef and not args.log_kl:
        return None
    if given is None and hasattr(model, "peft_config"):
        return Reference(model, is_adapter=True)
    copied = given if given is not None else copy.deepcopy(base_of(model))
    return Reference(copied.eval().requires_grad_(False).to(args.device), is_adapter=False)


def wanted_branch(args: MetisRLConfig) -> Any:
    """`Sampling.branch` for these settings."""
    return Branch(int(args.thinking)) if isinstance(args.thinking, bool) else args.thinking
