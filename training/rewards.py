"""Reward functions with TRL's signature: `(prompts, completions, **columns) -> list[float | None]`.

All are called by keyword, take unknown columns, and return one number per completion; None means "cannot be scored"
and must not count as zero. A completion is a text, or a list of `{"role", "content"}` messages whose last assistant
message is the answer: what a tool returned is never read as one.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence

from metis_home.branch import Branch
from metis_home.errors import RewardError
from metis_home.prompts import MAX_NEW_TOKENS, THINK_CLOSE, THINK_OPEN
from metis_home.responses import END_TOKENS

from .data.formats import is_blank
from .judging import best_verdict, is_list, is_missing, plain
from .verifier import Verdict, verdict_counts, verify_answer

Completion = str | Sequence[Mapping[str, object]]
Rewards = list[float | None]
RewardFunction = Callable[..., Rewards]

OVERLONG_BUFFER = MAX_NEW_TOKENS // 5  # DAPO's share: 4,096 of 20,480 tokens
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_FORMAT = re.compile(r"<think>(?P<thought>.*?)</think>\s*<answer>(?P<answer>.+?)</answer>\s*", re.DOTALL)

__all__ = [
    "accuracy_reward",
    "accuracy_verdicts",
    "combine_rewards",
    "efficiency_reward",
    "format_reward",
    "overlong_reward",
    "overlong_reward_for",
    "verify_answer",
]


def accuracy_reward(
    prompts: Sequence[object], completions: Sequence[Completion], solution: Sequence[object], **columns: object
) -> Rewards:
    """1 where the rule-based verifier finds the answer right, 0 where wrong, None where the gold cannot be read.

    Columns that it reads, each a list with one entry per completion: `kind`, `options`, `tolerance`, see
    `verify_answer`; None, NaN and "" say nothing. A `solution` may be a list of golds, any of which is right.

    Raises:
        RewardError: lengths that do not match, an unknown kind, or a column that is of another type.
    Source: Metis-RISE (binary rule-verified accuracy).
    """
    return [score(verdict) for verdict in accuracy_verdicts(prompts, completions, solution, **columns)]


def accuracy_verdicts(
    prompts: Sequence[object], completions: Sequence[Completion], solution: Sequence[object], **columns: object
) -> list[Verdict]:
    """The verdicts behind `accuracy_reward`; each is counted in `verdict_counts`."""
    total = _same_length(prompts, completions=completions, solution=solution)
    kinds, options, tolerances = (_column(columns, name, total) for name in ("kind", "options", "tolerance"))
    verdicts = [
        best_verdict(answer_text(completion), gold, kind, option, tolerance)
        for completion, gold, kind, option, tolerance in zip(
            completions, solution, kinds, options, tolerances, strict=True
        )
    ]
    for verdict in verdicts:
        verdict_counts.add(verdict)
    return verdicts


def format_reward(prompts: Sequence[object], completions: Sequence[Completion], **columns: object) -> Rewards:
    """1 for `<think>...</think><answer>...</answer>` and nothing else, each tag exactly once, else 0.

    The thought must be empty where the rollout's branch is non-thinking, and must not be anywhere else. The branch comes
    from the column `branch_ids`, `branch` or `mode` (0 / 1, `non_thinking` / `thinking`, a `Branch`); without one every
    rollout thinks, as a dense model's do. A prompt that already ends with `<think>` or `<think></think>` counts as the
    beginning of the completion.

    Source: Metis-RISE, Metis-HOME (formats); strictness is ours.
    """
    total = _same_length(prompts, completions=completions)
    branches = _branches(columns, total)
    return [
        float(_has_format(_opened_thought(prompt) + answer_text(completion), _is_thinking(branch)))
        for prompt, completion, branch in zip(prompts, completions, branches, strict=True)
    ]


def efficiency_reward(
    prompts: Sequence[object],
    completions: Sequence[Completion],
    solution: Sequence[object] | None = None,
    tool_calls: Sequence[object] | None = None,
    **columns: object,
) -> Rewards:
    """1 / (T + 1) for a correct rollout with T executed tool calls, 0 for a wrong one, None where accuracy is None.

    Args:
        solution: golds; not needed where a column `accuracy` holds the accuracy rewards (None or NaN: not known).
        tool_calls: T per rollout, or the list of its calls. None: counted as the `tool` messages of each completion.
    Raises:
        RewardError: T is neither given nor countable, or there is nothing to tell correct from wrong.
    Source: HDPO ("Act Wisely"), r_tool.
    """
    _same_length(prompts, completions=completions)
    given = columns.pop("accuracy", None)
    if given is not None:
        accuracy = _accuracies(given)
    else:
        if solution is None:
            raise RewardError("efficiency_reward needs a `solution` or an `accuracy` column to know what is correct.")
        accuracy = accuracy_reward(prompts, completions, solution, **columns)
    calls = _tool_calls(completions, tool_calls)
    _same_length(prompts, accuracy=accuracy, tool_calls=calls)
    return [
        None if right is None else (1.0 / (count + 1) if right > 0 else 0.0)
        for right, count in zip(accuracy, calls, strict=True)
    ]


def overlong_reward(
    prompts: Sequence[object],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    max_length: int = MAX_NEW_TOKENS,
    buffer: int = OVERLONG_BUFFER,
    **columns: object,
) -> Rewards:
    """Soft punishment of length L in tokens, in [-1, 0].

    0 if L <= max_length - buffer; (max_length - buffer - L) / buffer in between; -1 if L > max_length.

    Raises:
        RewardError: no `completion_ids`, or a buffer outside [0, max_length].
    Source: DAPO (soft overlong punishment).
    """
    if completion_ids is None:
        raise RewardError("overlong_reward measures tokens: it needs `completion_ids`.")
    if not 0 <= buffer <= max_length:
        raise RewardError(f"overlong_reward: buffer {buffer} is outside [0, max_length = {max_length}] tokens.")
    _same_length(prompts, completions=completions, completion_ids=completion_ids)
    return [_overlong(len(ids), max_length, buffer) for ids in completion_ids]


def overlong_reward_for(max_length: int, buffer: int) -> RewardFunction:
    """`overlong_reward` with these limits in tokens, as a named function that trainers can list."""

    def reward(prompts: Sequence[object], completions: Sequence[Completion], **columns: object) -> Rewards:
        return overlong_reward(prompts, completions, **{**columns, "max_length": max_length, "buffer": buffer})  # type: ignore[arg-type]

    reward.__name__ = "overlong_reward"
    return reward


def combine_rewards(rewards: Mapping[str, Sequence[float | None]], weights: Mapping[str, float]) -> Rewards:
    """The weighted sum per rollout; None where a component with a weight other than 0 is None.

    Not nansum, as in TRL: without its accuracy a rollout would keep the format reward alone and look wrong. Leave such
    rollouts out of their group's statistics.

    Args:
        rewards: name -> one number or None per rollout.
        weights: name -> weight, for the same names.
    Raises:
        RewardError: names or lengths that do not match, or a value that is not finite.
    """
    if not rewards or set(rewards) != set(weights):
        raise RewardError(f"rewards {sorted(rewards)} and weights {sorted(weights)} must name the same components.")
    lengths = {name: len(values) for name, values in rewards.items()}
    if len(set(lengths.values())) != 1:
        raise RewardError(f"components have different lengths: {lengths}.")
    for name, values in rewards.items():
        for index, value in enumerate(values):
            if value is not None and not math.isfinite(value):
                raise RewardError(f"reward {name!r} of rollout {index} is {value}; expected a number or None.")
    total: Rewards = []
    for index in range(next(iter(lengths.values()))):
        parts = [(weights[name], values[index]) for name, values in rewards.items() if weights[name] != 0]
        missing = any(value is None for _, value in parts)
        total.append(None if missing else math.fsum(weight * float(value) for weight, value in parts))  # type: ignore[arg-type]
    return total


def score(verdict: Verdict) -> float | None:
    """1, 0 or None."""
    return None if verdict.correct is None else float(verdict.correct)


def answer_text(completion: Completion) -> str:
    """The text to judge: the completion itself, or its last assistant message.

    Raises:
        RewardError: neither a text nor a list of messages.
    """
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, Sequence):
        raise RewardError(f"a completion is a text or a list of messages, found {type(completion).__name__}.")
    for message in reversed(completion):
        if not isinstance(message, Mapping):
            raise RewardError(f"a message is a dictionary with role and content, found {message!r:.80}.")
        if message.get("role", "assistant") == "assistant":
            return message_text(message)
    return ""


def message_text(message: Mapping[str, object]) -> str:
    """The text of a message; its reasoning, where a server split it off, goes back between the tags."""
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(str(block.get("text") or "") for block in content if isinstance(block, Mapping))
    text = str(content or "")
    reasoning = message.get("reasoning_content")
    return f"{THINK_OPEN}{reasoning}{THINK_CLOSE}{text}" if reasoning and THINK_OPEN not in text else text


def _has_format(text: str, thinks: bool) -> bool:
    for token in END_TOKENS:
        text = text.removesuffix(token)
    found = _FORMAT.fullmatch(text)
    if found is None or any(text.count(tag) != 1 for tag in _TAGS):
        return False
    return not is_blank(found["answer"]) and is_blank(found["thought"]) != thinks


def _opened_thought(prompt: object) -> str:
    """What the prompt already holds of the completion: `<think>`, `<think></think>` or nothing."""
    if isinstance(prompt, Sequence) and not isinstance(prompt, str) and prompt and isinstance(prompt[-1], Mapping):
        prompt = message_text(prompt[-1]) if prompt[-1].get("role") == "assistant" else ""
    if isinstance(prompt, str):
        for ending in (THINK_OPEN + THINK_CLOSE, THINK_OPEN):
            if prompt.rstrip().endswith(ending):
                return ending
    return ""


def _is_thinking(branch: object) -> bool:
    branch = plain(branch)
    if is_missing(branch):
        return True
    if isinstance(branch, str):
        name = branch.strip().lower().replace("-", "_")
        if name in ("thinking", "non_thinking"):
            return name == "thinking"
    else:
        try:
            return Branch(branch) is Branch.THINKING  # type: ignore[arg-type]
        except ValueError:  # 0.7 too
            pass
    raise RewardError(f"branch {branch!r} of a rollout is none: expected 0, 1, 'thinking', 'non_thinking' or None.")


def _branches(columns: Mapping[str, object], total: int) -> list[object]:
    """The first branch column that says anything."""
    for name in ("branch_ids", "branch", "mode"):
        values = _column(columns, name, total)
        if not all(map(is_missing, values)):
            return values
    return [None] * total


def _tool_calls(completions: Sequence[Completion], tool_calls: Sequence[object] | None) -> list[int]:
    if tool_calls is None:
        if any(isinstance(completion, str) for completion in completions):
            raise RewardError(
                "efficiency_reward needs a `tool_calls` column: the executed calls of a plain text cannot be counted."
            )
        return [sum(m.get("role") == "tool" for m in c if isinstance(m, Mapping)) for c in completions]
    return [_call_count(plain(one)) for one in tool_calls]


def _call_count(calls: object) -> int:
    if is_list(calls):
        return len(calls)
    if isinstance(calls, int | float) and calls >= 0 and calls % 1 == 0:  # neither NaN nor infinity
        return int(calls)
    raise RewardError(f"tool_calls holds {calls!r:.80}; expected a number of calls, 0 or more, or a list of calls.")


def _accuracies(given: object) -> Rewards:
    values = plain(given)
    if not is_list(values):
        raise RewardError(f"accuracy is {values!r:.80}; expected one number or None per completion.")
    accuracies = [plain(value) for value in values]
    for value in accuracies:
        if not isinstance(value, float | int | None):
            raise RewardError(f"accuracy holds {value!r:.80}; expected a number or None.")
    return [None if is_missing(value) else value for value in accuracies]  # type: ignore[misc]


def _overlong(length: int, max_length: int, buffer: int) -> float:
    if length > max_length:
        return -1.0
    return min(0.0, (max_length - buffer - length) / buffer) if buffer else 0.0


def _column(columns: Mapping[str, object], name: str, total: int) -> list[object]:
    values = plain(columns.get(name))
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__len__"):  # the same for every row
        return [values] * total
    if len(values) != total:
        raise RewardError(f"column {name!r} has {len(values)} entries for {total} prompts.")
    return list(values)  # type: ignore[call-overload]


def _same_length(prompts: Sequence[object], **others: Sequence[object]) -> int:
    for name, values in others.items():
        if len(values) != len(prompts):
            raise RewardError(f"{name} has {len(values)} entries for {len(prompts)} prompts; expected one each.")
    return len(prompts)
