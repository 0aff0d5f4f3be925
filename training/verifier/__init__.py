"""The rule-based verifier: is the answer in a generated text the gold answer? See `docs/rewards.md`."""

from .cascade import gold_problem, verify_answer, verify_answer_async
from .counting import VerdictCounter, verdict_counts
from .extract import extract_answer
from .kinds import KINDS
from .verdict import Verdict

__all__ = [
    "KINDS",
    "Verdict",
    "VerdictCounter",
    "extract_answer",
    "gold_problem",
    "verdict_counts",
    "verify_answer",
    "verify_answer_async",
]
