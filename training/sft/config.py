"""`MetisSFTConfig`: everything that says how Stage-SFT trains, beside what every Trainer of transformers takes."""

# No `from __future__ import annotations`: command line parsers read the types of these fields.
from dataclasses import dataclass, field

from transformers import TrainingArguments

from ...errors import RecipeError
from ...prompts import SYSTEM_PROMPT
from ..freezing import trainable_sets


@dataclass
class MetisSFTConfig(TrainingArguments):
    """Settings of Stage-SFT: all fields of `TrainingArguments`, and those below.

    Metis-HOME publishes the loss (prediction and router, 1:1) and the data (about 8K thinking and 8K non-thinking
    rows); learning rate, batch size and epochs are not published: the defaults here are ours.

    Raises:
        RecipeError: unknown freeze sets, both ways of freezing at once, numbers out of range, or settings of
            `TrainingArguments` that this trainer cannot honour.
    """

    router_loss_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the router's cross entropy beside the language model's. None: the model config's "
            "router_loss_weight, 1.0 unless changed (Metis-HOME: L_prediction + L_router)."
        },
    )
    router_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the router, which starts from random numbers; None: as the rest (ours: 1e-3 suits "
            "it). Follows the same schedule."
        },
    )
    freeze: list[str] | None = field(
        default=None,
        metadata={
            "help": "Parameter sets that do not train: router, thinking_branch, non_thinking_branch, attention, "
            "embeddings, vision, lm_head, norms; or 'all_but:router' (several: 'all_but:router+norms'). None: all train."
        },
    )
    train_only: list[str] | None = field(
        default=None, metadata={"help": "The sets that train, all others do not. Instead of `freeze`."}
    )
    system_prompt: str | None = field(
        default=SYSTEM_PROMPT,
        metadata={"help": "System prompt of rows without one; None: the chat template's own. Default: Metis-RISE's."},
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Longest row in tokens, image tokens included. Longer rows are an error, never truncated."},
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Fill each micro-batch with rows of similar length up to this many tokens (padding counts), instead "
            "of per_device_train_batch_size rows. With `packing`: tokens per packed row."
        },
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Put the rows of a micro-batch into one row without padding; rows never see each other."},
    )
    check_data: bool = field(
        default=True, metadata={"help": "Validate all rows before training; every bad row is reported by number."}
    )
    cache_gib: float = field(
        default=2.0,
        metadata={
            "help": "Keep encoded rows (tokens and image patches) in memory up to this size, in GiB per process."
        },
    )
    stop_on_nan: bool = field(
        default=True,
        metadata={
            "help": "Stop with an error, before weights or checkpoints change, when a loss or gradient is no number."
        },
    )
    watchdog_seconds: float | None = field(
        default=None,
        metadata={
            "help": "End a run that hangs: the longest that a micro-batch, an optimizer step, an evaluation batch or a "
            "checkpoint may take, in seconds; the report says where each rank is. None: wait for ever."
        },
    )
    plots: bool = field(
        default=True, metadata={"help": "Draw the logged curves as PNG into output_dir/plots at the end of training."}
    )

    # Other defaults than transformers'.
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must be False: rows are records, not columns."}
    )
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"],
        metadata={"help": "What a batch must have for an evaluation loss; batches need no router labels."},
    )
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate (ours; not published)."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Rows of a micro-batch on each device."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule (ours)."})
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Steps of linear warm-up; below 1: a share of all steps (ours)."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps (ours)."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide losses that are no numbers. Off: `stop_on_nan` reports them."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Not needed: every branch, the router and the vision tower are part of every step."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        trainable_sets(self.freeze, self.train_only)
        _positive("router_loss_weight", self.router_loss_weight, zero=True)
        _positive("router_learning_rate", self.router_learning_rate)
        _positive("max_length", self.max_length)
        _positive("max_tokens_per_batch", self.max_tokens_per_batch)
        _positive("cache_gib", self.cache_gib, zero=True)
        _positive("watchdog_seconds", self.watchdog_seconds)
        if self.remove_unused_columns:
            raise RecipeError("remove_unused_columns must be False: the trainer encodes whole records, not columns.")
        if self.label_smoothing_factor:
            raise RecipeError(
                f"label_smoothing_factor is {self.label_smoothing_factor}: this trainer computes its own two losses "
                "and has no label smoothing. Set it to 0."
            )
        if self.train_sampling_strategy != "random" and self.max_tokens_per_batch is not None:
            raise RecipeError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} and max_tokens_per_batch both decide which "
                "rows share a batch: leave one of them out."
            )


def _positive(name: str, value: float | None, *, zero: bool = False) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or (value == 0 and not zero):
        raise RecipeError(f"{name} must be a number {'>= 0' if zero else '> 0'}; found {value!r}")
