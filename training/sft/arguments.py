"""What a trainer's arguments must be, said before anything is loaded or computed."""

from typing import TYPE_CHECKING

from torch import nn

from ...errors import RecipeError, TrainingError, UnsupportedError
from ...modeling import MetisHomeForConditionalGeneration
from .config import MetisSFTConfig
from .lora import add_adapter
from .plots import check_plotting

if TYPE_CHECKING:
    from peft import PeftConfig


def check_arguments(model: nn.Module, args: MetisSFTConfig, processor: object) -> None:
    """Raise unless these three can train together.

    Raises:
        TrainingError: another kind of model or arguments, no processor, plots without matplotlib. UnsupportedError: Liger.
    """
    if not isinstance(args, MetisSFTConfig):
        raise TrainingError(f"args must be a MetisSFTConfig; found {type(args).__name__}")
    if not isinstance(model, MetisHomeForConditionalGeneration):
        raise TrainingError(
            f"the model is a {type(model).__name__}; Stage-SFT trains a MetisHomeForConditionalGeneration. "
            "A dense model becomes one with `metis-home convert DENSE OUT`."
        )
    if processor is None:
        raise TrainingError("pass processing_class=MetisHomeProcessor.from_pretrained(...): rows are encoded with it.")
    if args.plots:
        check_plotting()
    if args.use_liger_kernel:
        raise UnsupportedError(
            "use_liger_kernel replaces the model's loss and FFN, which are our own: set it to False."
        )


def check_router_only(args: MetisSFTConfig) -> None:
    """The router alone trains on features that are computed in this process, with the whole tower and embeddings.

    Raises:
        RecipeError: a setting that needs another way of batching or of sharding.
    """
    for name, value in (
        ("packing", args.packing),
        ("max_tokens_per_batch", args.max_tokens_per_batch),
        ("dataloader_num_workers", args.dataloader_num_workers),
        ("fsdp", args.fsdp),
        ("deepspeed", args.deepspeed),
    ):
        if value:
            raise RecipeError(
                f"{name}={value!r} does not go with training the router alone, which runs no decoder and keeps one "
                "small vector per prompt. Leave it out."
            )


def with_adapter(model: nn.Module, peft_config: "PeftConfig", args: MetisSFTConfig) -> nn.Module:
    """The model with an adapter, which alone trains.

    Raises:
        TrainingError: freeze sets beside it, or peft is not installed.
    """
    if args.freeze or args.train_only:
        raise TrainingError(
            "with an adapter the adapter says what trains (target_modules, modules_to_save): leave `freeze` and "
            "`train_only` empty."
        )
    return add_adapter(model, peft_config)
