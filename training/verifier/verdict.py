"""What verification says, and the one exception its parts talk with. Standard library only."""

from dataclasses import dataclass
from typing import Literal

# compared: both sides were read; differs only in `correct`.
# no_answer, unparsed_prediction, timed_out: the prediction's fault, `correct` is False.
# unparsed_gold: the data's fault, `correct` is None.
# judged: a judge model decided, or could not (None).
Outcome = Literal["compared", "no_answer", "unparsed_prediction", "timed_out", "unparsed_gold", "judged"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an answer is right, and how that was found out."""

    correct: bool | None  # None: cannot be scored, which is never the prediction's fault
    method: str  # the kind that compared, such as "number"; "expression" is math-verify; "none" before any was chosen
    extracted: str | None  # the answer that was found in the prediction; None if there is none
    reason: str  # one line for a person
    outcome: Outcome = "compared"


class Unreadable(Exception):
    """A text is not of the kind it was read as; the message says why. Never leaves the verifier."""


class TimedOut(Unreadable):
    """Reading or comparing took too long and was stopped."""
