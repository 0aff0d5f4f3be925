"""Counts of verdicts that a trainer can log."""

import threading
from collections import Counter

from .verdict import Verdict


class VerdictCounter:
    """Counts verdicts until they are taken; safe in threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._methods: Counter[str] = Counter()
        self._outcomes: Counter[str] = Counter()
        self._correct = 0

    def add(self, verdict: Verdict) -> None:
        """Count one verdict."""
        with self._lock:
            self._methods[verdict.method] += 1
            self._outcomes[verdict.outcome] += 1
            self._correct += verdict.correct is True

    def take(self) -> dict[str, float]:
        """What was counted since the last call, and start again.

        `verify/{method}_frac` are shares of all verdicts in [0, 1]; `verify/verdicts`, `correct`, `no_answer`,
        `unparsed_prediction`, `unparsed_gold`, `timed_out` and `judged` are counts. Empty where nothing was counted.
        """
        with self._lock:
            methods, outcomes, correct = self._methods, self._outcomes, self._correct
            self._methods, self._outcomes, self._correct = Counter(), Counter(), 0
        total = sum(methods.values())
        if not total:
            return {}
        counts = {f"verify/{method}_frac": count / total for method, count in sorted(methods.items())}
        counts |= {"verify/verdicts": float(total), "verify/correct": float(correct)}
        for outcome in ("no_answer", "unparsed_prediction", "unparsed_gold", "timed_out", "judged"):
            counts[f"verify/{outcome}"] = float(outcomes[outcome])
        return counts


verdict_counts = VerdictCounter()  # of all rewards of this process
