"""The program that runs math-verify in its own process. Started by `pool.py` by its path; imports nothing of metis_home.

Lines of JSON. The first on stdin is `{"path": sys.path, "memory": bytes, "processor": seconds, "wall": seconds}`,
answered with `{"ready": true}` or `{"missing": why}`. Then each `{"id", "gold", "prediction", "tolerance"}` is answered
with `{"id", "gold_read": bool}` as soon as the gold is parsed, and with
`{"id", "result": "equal" | "different" | "unreadable"}`.

It may hang or eat memory on what a policy writes, so it is built to be killed: kernel timers end it even while Python
cannot run (a huge power holds the interpreter) and the parent is gone; the end of stdin ends it when it is idle.
"""

import contextlib
import json
import os
import signal
import sys
from functools import lru_cache
from typing import IO, Any


def main() -> None:
    """Answer lines until stdin ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # nothing that a library prints may look like an answer
    settings = json.loads(sys.stdin.readline() or "{}")
    if not settings:
        return
    sys.path[:] = settings["path"]
    _limit_memory(settings["memory"])
    try:
        import math_verify  # noqa: F401

        _compare("$x+1$", "$1+x$", None, lambda read: None)  # loads what the first comparison would load
    except ImportError as error:
        _say(replies, {"missing": str(error)})
        return
    _say(replies, {"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        number = request["id"]
        _set_alarm(settings["processor"], settings["wall"])
        try:
            result = _compare(
                request["gold"],
                request["prediction"],
                request["tolerance"],
                lambda read, number=number: _say(replies, {"id": number, "gold_read": read}),
            )
        finally:
            _set_alarm(0, 0)
        _say(replies, {"id": number, "result": result})


def _compare(gold: str, prediction: str, tolerance: float | None, tell: Any) -> str:
    from math_verify import verify

    parsed_gold = _parse_gold(gold)
    tell(bool(parsed_gold))
    if not parsed_gold:
        return "different"
    parsed = _parse(prediction)
    if not parsed:
        return "unreadable"
    try:
        if verify(list(parsed_gold), list(parsed), timeout_seconds=None):
            return "equal"
        return "equal" if tolerance is not None and _near(parsed_gold[0], parsed[0], tolerance) else "different"
    except (Exception, RecursionError, MemoryError):
        return "different"


@lru_cache(maxsize=512)
def _parse_gold(gold: str) -> tuple[Any, ...]:
    """The parsed gold, after one comparison with a number: what takes too long there is the gold's fault."""
    from math_verify import verify

    parsed = _parse(gold)
    if parsed:
        with contextlib.suppress(Exception, RecursionError, MemoryError):
            verify(list(parsed), list(_parse("$1234.5$")), timeout_seconds=None)
    return parsed


@lru_cache(maxsize=512)
def _parse(text: str) -> tuple[Any, ...]:
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    config = LatexExtractionConfig(
        boxed_match_priority=-1,  # boxes were opened before
        normalization_config=NormalizationConfig(
            basic_latex=True,
            units=False,  # "4 cm" is not "4 m": units were read before
            malformed_operators=True,  # \sqrt3, \frac12
            nits=False,
            boxed="none",
            equations=False,
        ),
    )
    try:
        return tuple(parse(text, [config], fallback_mode="no_fallback", parsing_timeout=None))
    except (Exception, RecursionError, MemoryError):
        return ()


def _near(gold: Any, prediction: Any, tolerance: float) -> bool:
    return abs(complex(gold.evalf()) - complex(prediction.evalf())) <= tolerance


def _say(replies: IO[str], message: dict[str, object]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def _set_alarm(processor: float, wall: float) -> None:
    # No handler: the default action of SIGPROF and SIGALRM ends the process in the kernel.
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, processor)
        signal.setitimer(signal.ITIMER_REAL, wall)


def _limit_memory(limit: int) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


if __name__ == "__main__":
    main()
