"""Reward functions with TRL's signature: called with columns, checked, weighted and added up.

    def reward(prompts, completions, completion_ids=None, **columns) -> list[float | None]

`completions` are conversational: one list of messages per rollout. None means that the function cannot score this
rollout.
"""

import asyncio
import inspect
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from metis_home.errors import RecipeError, RewardError

from ..reward_references import is_reference, load_reference
from ..rollouts.types import Rollout

RewardFunction = Callable[..., Any]
OVERLONG = "overlong"


@dataclass(slots=True, kw_only=True)
class Scores:
    """The rewards of the rollouts of one call, in their order."""

    components: dict[str, list[float | None]]
    """By name of the function, unweighted."""
    total: list[float | None]
    """The weighted sum, without the efficiency reward; None: not scored."""
    extra: dict[str, list[object]] = field(default_factory=dict)
    """What functions gave to `log_extra`: columns of the completions table."""
    metrics: dict[str, list[float]] = field(default_factory=dict)
    """What functions gave to `log_metric`."""


class Scorer:
    """Calls the reward functions.

    Args:
        functions: callables, names of functions in `metis_home.training.rewards`, or `module:function`.
        weights: one per function; None: 1 each.
        separate: names of functions that stay out of the total (HDPO's efficiency reward).
        overlong_buffer: adds a component `overlong` over so many last tokens; 0: off.
        overlong_weight: its weight.
        max_tokens: the limit that it refers to.
    Raises:
        RecipeError: no functions, weights that do not fit, or an unknown name.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction | str],
        weights: Sequence[float] | None = None,
        *,
        separate: Sequence[str] = (),
        overlong_buffer: int = 0,
        overlong_weight: float = 1.0,
        max_tokens: int = 0,
    ) -> None:
        resolved = [resolve(function) for function in functions]
        if not resolved:
            raise RecipeError("there is no reward function. Pass reward_funcs=['accuracy_reward', 'format_reward'].")
        weights = list(weights) if weights is not None else [1.0] * len(resolved)
        if len(weights) != len(resolved):
            raise RecipeError(f"{len(resolved)} reward functions came with {len(weights)} reward_weights")
        self.functions = dict(zip(_names(functions, resolved), resolved, strict=True))
        missing = set(separate) - set(self.functions)
        if missing:
            raise RecipeError(f"no reward function is called {sorted(missing)[0]!r}; found {', '.join(self.functions)}")
        self.weights = {
            name: weight for name, weight in zip(self.functions, weights, strict=True) if name not in separate
        }
        if not self.weights:
            raise RecipeError("only an efficiency reward was given: the accuracy loss needs a reward function too")
        if not any(self.weights.values()) or not all(map(math.isfinite, self.weights.values())):
            raise RecipeError(
                f"reward_weights are {weights}: expected finite numbers, not all 0; nothing would be learnt"
            )
        self.overlong_buffer, self.max_tokens = overlong_buffer, max_tokens
        if overlong_buffer:
            self.weights[OVERLONG] = overlong_weight

    @property
    def names(self) -> list[str]:
        """Names of all components."""
        return [*self.functions, *([OVERLONG] if self.overlong_buffer else [])]

    def score(self, groups: Sequence[Sequence[Rollout]], trainer_state: object = None) -> list[Scores]:
        """Score the rollouts of several prompts, each function called once with all of them.

        A component that is None for all rollouts of a prompt does not apply to it and is left out of their sums; one
        that is None for some could not score these, so their total is None. Components of weight 0 are only reported.

        Raises:
            RewardError: a function returned something else than one number or None per completion.
        """
        rollouts = [rollout for group in groups for rollout in group]
        if not rollouts:
            return []
        extra: dict[str, list[object]] = {}
        metrics: dict[str, list[float]] = {}
        columns = reward_columns(rollouts)
        columns["trainer_state"] = trainer_state
        columns["log_extra"] = lambda name, values: extra.__setitem__(name, list(values))
        columns["log_metric"] = lambda name, value: metrics.setdefault(name, []).append(float(value))
        components = {name: call(name, function, columns, len(rollouts)) for name, function in self.functions.items()}
        if self.overlong_buffer:
            components[OVERLONG] = self._overlong(rollouts, columns)
        scores, start = [], 0
        for group in groups:
            part = slice(start, start + len(group))
            start += len(group)
            own = {name: values[part] for name, values in components.items()}
            scores.append(
                Scores(
                    components=own,
                    total=self._total(own, len(group)),
                    extra={name: values[part] for name, values in extra.items()},
                )
            )
        scores[0].metrics = metrics
        return scores

    def _overlong(self, rollouts: Sequence[Rollout], columns: dict[str, Any]) -> list[float | None]:
        """DAPO's soft punishment of what the policy wrote; what tools returned does not count."""
        from ..rewards import overlong_reward

        own = [
            [token for token, counts in zip(rollout.completion_ids, rollout.loss_mask, strict=True) if counts]
            for rollout in rollouts
        ]
        return overlong_reward(
            columns["prompts"],
            columns["completions"],
            completion_ids=own,
            max_length=self.max_tokens,
            buffer=self.overlong_buffer,
        )

    def _total(self, components: dict[str, list[float | None]], size: int) -> list[float | None]:
        applicable = {
            name: values
            for name, values in components.items()
            if self.weights.get(name) and any(value is not None for value in values)
        }
        if not set(applicable) - {OVERLONG}:
            return [None] * size
        totals: list[float | None] = []
        for number in range(size):
            values = {name: column[number] for name, column in applicable.items()}
            scored = {name: value for name, value in values.items() if value is not None}
            complete = len(scored) == len(values)
            totals.append(sum(self.weights[name] * value for name, value in scored.items()) if complete else None)
        return totals


def reward_columns(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """The keyword arguments of reward functions: one value per rollout in each list."""
    columns: dict[str, Any] = {}
    for name in dict.fromkeys(name for rollout in rollouts for name in (*rollout.prompt.columns, *rollout.columns)):
        columns[name] = [rollout.columns.get(name, rollout.prompt.columns.get(name)) for rollout in rollouts]
    return columns | {
        "prompts": [rollout.prompt.messages for rollout in rollouts],
        "completions": [rollout.messages or [{"role": "assistant", "content": rollout.text}] for rollout in rollouts],
        "completion_ids": [rollout.completion_ids for rollout in rollouts],
        "tool_calls": [rollout.tool_calls for rollout in rollouts],
        "branch": [rollout.branch for rollout in rollouts],
        "finished": [rollout.finished for rollout in rollouts],
    }


def call(name: str, function: RewardFunction, columns: dict[str, Any], expected: int) -> list[float | None]:
    """Call one function, awaiting it if need be, and check what it returns.

    Raises:
        RewardError: not `expected` entries, or one that is neither a finite number nor None.
    """
    values = function(**columns)
    if inspect.isawaitable(values):
        with ThreadPoolExecutor(1) as thread:  # a thread has no event loop; this one may have, in a notebook
            values = thread.submit(asyncio.run, _await(values)).result()
    values = list(values) if isinstance(values, Sequence | map) or hasattr(values, "__iter__") else [values]
    if len(values) != expected:
        raise RewardError(f"{name} returned {len(values)} rewards for {expected} completions; expected one each")
    checked: list[float | None] = []
    for number, value in enumerate(values):
        value = value.item() if hasattr(value, "item") else value
        if value is not None and (not isinstance(value, int | float) or not math.isfinite(value)):
            raise RewardError(f"{name} returned {value!r} for completion {number}; expected a finite number or None")
        checked.append(None if value is None else float(value))
    return checked


def resolve(function: RewardFunction | str) -> RewardFunction:
    """A callable as it is; a name as the function of that name in `metis_home.training.rewards`; `module:function` as
    that function, the module also sought in the working directory.

    Raises:
        RecipeError: there is no such function.
    """
    if not isinstance(function, str):
        return function
    if is_reference(function):
        return load_reference(function)
    from .. import rewards

    found = getattr(rewards, function, None)
    if not callable(found):
        raise RecipeError(f"metis_home.training.rewards has no reward function {function!r}; pass a callable instead")
    return found


def _names(given: Sequence[RewardFunction | str], resolved: Sequence[RewardFunction]) -> list[str]:
    names: list[str] = []
    for asked, function in zip(given, resolved, strict=True):
        name = getattr(function, "__name__", type(function).__name__)
        if isinstance(asked, str):
            name = asked.rpartition(":")[2]
        names.append(name if name not in names else f"{name}_{len(names)}")
    return names


async def _await(value: Any) -> Any:
    return await value
