"""Low-rank adapters (LoRA, the package peft) on the experts of one branch, or of both."""

from typing import TYPE_CHECKING, Literal

from torch import nn

from ...branch import Branch
from ...errors import RecipeError, TrainingError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig, PeftModel

LoraBranch = Literal["thinking", "non_thinking", "both"]
_EXPERTS = {"thinking": str(int(Branch.THINKING)), "non_thinking": str(int(Branch.NON_THINKING)), "both": "[01]"}


def branch_lora_config(
    branch: LoraBranch, *, r: int = 16, alpha: int = 32, dropout: float = 0.0, train_router: bool = True
) -> "LoraConfig":
    """A peft configuration that adapts the FFNs of `branch` in every layer; everything else is frozen.

    Args:
        branch: thinking, non_thinking or both.
        r, alpha, dropout: LoRA's rank, scale (applied as alpha / r) and dropout; 16, 32 and 0 are ours.
        train_router: train the whole router beside it (`modules_to_save`).
    Raises:
        RecipeError: unknown branch. TrainingError: peft is not installed.
    """
    if branch not in _EXPERTS:
        raise RecipeError(f"branch must be one of {', '.join(_EXPERTS)}; found {branch!r}")
    return _peft().LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        # A text is a regular expression for peft, matched against the whole module name.
        target_modules=rf".*\.mlp\.experts\.{_EXPERTS[branch]}\.(gate|up|down)_proj",
        modules_to_save=["router"] if train_router else None,
    )


def dense_lora_config(*, r: int = 16, alpha: int = 32, dropout: float = 0.0) -> "LoraConfig":
    """A peft configuration that adapts attention and FFN of a dense model's text layers; arguments as above.

    Raises:
        TrainingError: peft is not installed.
    """
    return _peft().LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=r".*\.language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
    )


def add_adapter(model: nn.Module, peft_config: "PeftConfig") -> "PeftModel":
    """`model` with an adapter that trains; all its own parameters are frozen.

    Raises:
        TrainingError: peft is not installed.
    """
    return _peft().get_peft_model(model, peft_config)


def merge_branch_lora(model: "PeftModel") -> nn.Module:
    """Fold the active adapter into the weights and return the plain model, ready for `save_pretrained`.

    A router that was trained beside the adapter becomes the model's, and the config says that it is trained.
    """
    saved = {name for config in model.peft_config.values() for name in (config.modules_to_save or ())}
    merged = model.merge_and_unload()
    if "router" in saved:
        merged.config.router_trained = True
    return merged


def _peft():
    try:
        import peft
    except ImportError as error:
        raise TrainingError(f'LoRA needs the package peft ({error}): pip install "metis_home[train]"') from error
    return peft
