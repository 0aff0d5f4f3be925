"""A Trainer that may be watched: base of the trainers of this package."""

from collections.abc import Callable

from transformers import Trainer

from .watchdog_callback import WatchdogCallback


class WatchedTrainer(Trainer):
    """`Trainer` with an optional watchdog, which stops watching however training ends."""

    watchdog: WatchdogCallback | None = None

    def watch(self, seconds: float | None, name_of: Callable[[int], str] = str) -> None:
        """Watch `train` from now on. `seconds`: the longest that a stage may take; None: do not watch."""
        if seconds is not None:
            self.watchdog = WatchdogCallback(seconds, name_of)
            self.add_callback(self.watchdog)

    def train(self, *args, **kwargs):
        """As in Trainer."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.watchdog is not None:
                self.watchdog.close()
