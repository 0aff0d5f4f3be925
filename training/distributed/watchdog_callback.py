"""The watchdog of a Trainer: it knows the stages of training from the Trainer's own events."""

from collections.abc import Callable, Sequence

from transformers import TrainerCallback

from .watchdog import Watchdog


class WatchdogCallback(TrainerCallback):
    """Ends a training run that hangs, and says where each rank was; see `watchdog.py`.

    Args:
        seconds: the longest that one stage may take: a micro-batch, an optimizer step, an evaluation batch, a save.
        name_of: the name of a record by its index; then `rows_of_step` tells which rows a rank was working on.
        start: makes the watchdog when training begins.
    """

    def __init__(
        self,
        seconds: float,
        name_of: Callable[[int], str] = str,
        start: Callable[[float], Watchdog] = Watchdog.of_process_group,
    ) -> None:
        self._seconds = seconds
        self._name_of = name_of
        self._start = start
        self._watchdog: Watchdog | None = None
        self._rows: list[Sequence[int]] = []
        self._micro_batch = 0

    def rows_of_step(self, rows: list[Sequence[int]]) -> None:
        """The records of each micro-batch of the step that begins, by index."""
        self._rows = rows

    def enter(self, stage: str, **facts: object) -> None:
        """A stage that Trainer has no event for, such as rollouts."""
        if self._watchdog is not None:
            self._watchdog.enter(stage, **facts)

    def close(self) -> None:
        """Stop watching; the next training starts anew."""
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Start watching."""
        self.close()
        self._watchdog = self._start(self._seconds)
        self.enter("start of training", step=state.global_step + 1)

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        """Watch the first rows being read."""
        self.enter("reading rows", step=state.global_step + 1)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Watch the first micro-batch."""
        self._micro_batch = 0
        self._enter_micro_batch(args, state)

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        """Watch the next micro-batch."""
        self._micro_batch += 1
        self._enter_micro_batch(args, state)

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Watch the optimizer (with DeepSpeed it already ran)."""
        self.enter("optimizer", step=state.global_step + 1)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Watch logs, and the rows of the next step."""
        self.enter("logs, then the next rows", step=state.global_step)

    def on_prediction_step(self, args, state, control, **kwargs) -> None:
        """Watch the next evaluation batch."""
        self.enter("evaluation batch", step=state.global_step)

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        """Watch what follows an evaluation."""
        self.enter("after an evaluation: checkpoint, or the next rows", step=state.global_step)

    def on_save(self, args, state, control, **kwargs) -> None:
        """Watch what follows a checkpoint."""
        self.enter("after a checkpoint: the next rows", step=state.global_step)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Stop watching."""
        self.close()

    def _enter_micro_batch(self, args, state) -> None:
        number, rows = self._micro_batch, ""
        if number < len(self._rows):
            rows = ", ".join(self._name_of(int(index)) for index in self._rows[number])
        count = len(self._rows) or args.gradient_accumulation_steps
        self.enter(
            f"micro-batch {number + 1} of {count}", step=state.global_step + 1, **({"rows": rows} if rows else {})
        )
