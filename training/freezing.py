"""Which parameters train: eight named sets that together hold every parameter of the two-branch model, each one once.

router                model.router.*
vision                model.visual.* (vision blocks and the merger into the text width)
embeddings            embed_tokens
attention             every layer's self_attn
norms                 every layer's norms and the final one
non_thinking_branch   every layer's mlp.experts.0
thinking_branch       every layer's mlp.experts.1
lm_head               lm_head
"""

import difflib
import re
from collections.abc import Sequence

from torch import nn

from ..errors import RecipeError

FREEZE_SETS = (
    "router",
    "thinking_branch",
    "non_thinking_branch",
    "attention",
    "embeddings",
    "vision",
    "lm_head",
    "norms",
)
ALL_BUT = "all_but:"

# First match wins: vision blocks have attention, norms and an `mlp` of their own.
_PATTERNS = tuple(
    (name, re.compile(pattern))
    for name, pattern in (
        ("router", r"(^|\.)router\."),
        ("vision", r"(^|\.)visual\."),
        ("embeddings", r"(^|\.)embed_tokens\."),
        ("lm_head", r"(^|\.)lm_head\."),
        ("non_thinking_branch", r"\.mlp\.experts\.0\."),
        ("thinking_branch", r"\.mlp\.experts\.1\."),
        ("attention", r"\.self_attn\."),
        ("norms", r"\.(input_layernorm|post_attention_layernorm|norm)\."),
    )
)


def set_of(parameter_name: str) -> str:
    """The name of the set that holds this parameter (as `named_parameters` spells it, wrapped or not).

    Raises:
        RecipeError: no set holds it: the model is no two-branch model, or has layers that this file does not know.
    """
    for name, pattern in _PATTERNS:
        if pattern.search(parameter_name):
            return name
    raise RecipeError(
        f"parameter {parameter_name!r} belongs to none of the sets {', '.join(FREEZE_SETS)}. "
        "Freezing by name works on two-branch models; set requires_grad yourself for others."
    )


def trainable_sets(freeze: Sequence[str] | None = None, train_only: Sequence[str] | None = None) -> frozenset[str]:
    """Return the sets that train.

    Args:
        freeze: sets that do not train; `"all_but:router"` (or `"all_but:router+norms"`) freezes the others.
        train_only: sets that train, all others do not; the same thing said the other way round.
    Raises:
        RecipeError: an unknown name, both arguments at once, or nothing is left to train.
    """
    if freeze and train_only:
        raise RecipeError(
            f"freeze={list(freeze)} and train_only={list(train_only)} were both given: say it one way, for example "
            "train_only=['router'] or freeze=['all_but:router']."
        )
    if train_only:
        return frozenset(_known(name, "train_only") for name in train_only)
    frozen: set[str] = set()
    for entry in freeze or ():
        if entry.startswith(ALL_BUT):
            kept = {_known(name, "freeze") for name in entry[len(ALL_BUT) :].split("+")}
            frozen |= set(FREEZE_SETS) - kept
        else:
            frozen.add(_known(entry, "freeze"))
    if frozen == set(FREEZE_SETS):
        raise RecipeError(f"freeze={list(freeze or ())} freezes every set: nothing is left to train.")
    return frozenset(set(FREEZE_SETS) - frozen)


def sets_trained_by_reward(
    thinking: bool | str | None, freeze: Sequence[str] | None = None, train_only: Sequence[str] | None = None
) -> frozenset[str]:
    """Return the sets of a two-branch model that Stage-RL trains.

    Args:
        thinking: which branch answers, as in `MetisRLConfig`. Without `freeze` and `train_only` that branch trains; both
            where it differs among rollouts, and the router where its decisions are drawn.
    Raises:
        RecipeError: see `trainable_sets`.
    """
    if freeze or train_only:
        return trainable_sets(freeze, train_only)
    if isinstance(thinking, bool):
        return frozenset({"thinking_branch" if thinking else "non_thinking_branch"})
    both = frozenset({"thinking_branch", "non_thinking_branch"})
    return both | {"router"} if thinking == "sample" else both


def freeze_parameters(model: nn.Module, trainable: frozenset[str]) -> dict[str, int]:
    """Set `requires_grad` of every parameter and return how many numbers train, {set: count}.

    Args:
        model: a two-branch model, not yet wrapped for distributed training.
        trainable: names from `FREEZE_SETS`.
    Raises:
        RecipeError: the embeddings and the head are one tensor (tied), and only one of the two should train.
    """
    shared = _tied_head(model)
    if shared and ("embeddings" in trainable) != ("lm_head" in trainable):
        frozen, training = ("lm_head", "embeddings") if "embeddings" in trainable else ("embeddings", "lm_head")
        raise RecipeError(
            f"{frozen} should be frozen and {training} should train, but this model ties them: they are one tensor "
            f"(tie_word_embeddings). Freeze both or neither: freeze=[..., 'embeddings', 'lm_head']."
        )
    counts = dict.fromkeys(sorted(trainable), 0)
    for name, parameter in model.named_parameters():
        owner = set_of(name)
        parameter.requires_grad_(owner in trainable)
        if owner in trainable:
            # DeepSpeed ZeRO-3 empties its parameters and keeps their size beside them.
            counts[owner] += int(getattr(parameter, "ds_numel", parameter.numel()))
    return counts


def _known(name: str, argument: str) -> str:
    if name in FREEZE_SETS:
        return name
    near = difflib.get_close_matches(name, FREEZE_SETS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise RecipeError(f"{argument} names {name!r}; the sets are {', '.join(FREEZE_SETS)}.{hint}")


def _tied_head(model: nn.Module) -> bool:
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    return head is not None and head.weight is embeddings.weight
