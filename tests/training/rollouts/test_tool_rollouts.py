"""Conversations with tools through a real engine and real tiny models: ids, log-probabilities, masks, limits, failures."""

import logging
import math
import threading
import time
from dataclasses import dataclass

import pytest
import torch
from PIL import Image

from metis_home import Branch
from metis_home.training.logprobs import score_tokens
from metis_home.training.rl.batches import collate_rollouts, shared_images
from metis_home.training.rollouts.engine import RolloutEngine
from metis_home.training.rollouts.positions import rope_index_of
from metis_home.training.rollouts.types import Rollout, check_rollouts
from metis_home.training.tools.environment import ConversationLimits
from metis_home.training.tools.protocol import ToolContext, ToolResult, parse_calls
from metis_home.training.tools.registry import make_tools
from metis_home.training.tools.safe import SafeTool
from metis_home.training.tools.sandbox import sandbox_available
from tests.training.rollouts.pico_tools import CALL_A, END, Echo, caller, engine, prompts, sampling, tool_processor

PROCESSOR = tool_processor()
DENSE = caller(PROCESSOR)
TWO_BRANCHES = caller(PROCESSOR, branches=True)


def flat(groups: list[list[Rollout]]) -> list[Rollout]:
    return [rollout for group in groups for rollout in group]


def roll(model=DENSE, tool=None, generations: int = 6, count: int = 4, seed: int = 3, options=None, **fields):
    tool = tool or Echo()
    built = engine(model, PROCESSOR, [tool], seed=seed, **(options or {}))
    groups = built.generate(prompts(PROCESSOR, count), generations, sampling(PROCESSOR, model, **fields))
    return groups, tool, built


@pytest.mark.parametrize("kind", ["dense", "two branches", "half as hot"])
def test_log_probabilities_of_conversations_with_images_of_tools_are_those_of_the_trainers_forward(kind: str) -> None:
    model, fields = (TWO_BRANCHES, {"branch": "sample"}) if kind == "two branches" else (DENSE, {})
    temperature = 0.5 if kind == "half as hot" else 1.0
    groups, _, _ = roll(model, temperature=temperature, **fields)
    settings = sampling(PROCESSOR, model)

    for branch in (None, *Branch):
        chosen = [rollout for rollout in flat(groups) if rollout.branch == branch]
        if not chosen:
            continue
        batch = collate_rollouts(chosen, rope_index_of(model), torch.device("cpu"))
        with torch.no_grad(), shared_images(model, batch.image_order):
            scores = score_tokens(
                model,
                batch.inputs,
                batch.mask_BT,
                temperature=temperature,
                suppress_token_ids=settings.suppress_token_ids,
            )
        for row, rollout in enumerate(chosen):
            found = scores.logp_BT[row, len(rollout.prompt) : len(rollout)]
            torch.testing.assert_close(torch.tensor(rollout.logprobs), found, rtol=0, atol=2e-5)
    rollouts = flat(groups)
    assert sum(rollout.observation_grid_thw is not None for rollout in rollouts) > 3
    assert sum(rollout.tool_calls > 1 for rollout in rollouts) > 1
    assert any(rollout.tool_calls == 0 for rollout in rollouts)
    check_rollouts(rollouts, settings.suppress_token_ids)


@pytest.mark.parametrize("branches", [False, True])
def test_a_rollout_scored_as_one_plain_row_gives_its_log_probabilities(branches: bool) -> None:
    """Without the trainer's code: full logits, positions by the model itself, images in the order of their tokens."""
    model = TWO_BRANCHES if branches else DENSE
    groups, _, _ = roll(model, branch=Branch.THINKING if branches else None)
    settings = sampling(PROCESSOR, model)
    image = PROCESSOR.image_token_id

    with_images = [rollout for rollout in flat(groups) if rollout.observation_grid_thw is not None]
    assert any(rollout.prompt.pixel_values is not None for rollout in with_images)
    for rollout in with_images:
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        pixels = [rollout.prompt.pixel_values, rollout.observation_pixel_values]
        grids = [rollout.prompt.image_grid_thw, rollout.observation_grid_thw]
        with torch.no_grad():
            logits = model(
                input_ids=ids,
                mm_token_type_ids=(ids == image).long(),
                pixel_values=torch.cat([part for part in pixels if part is not None]),
                image_grid_thw=torch.cat([part for part in grids if part is not None]),
                **({"branch_ids": rollout.branch} if branches else {}),
            ).logits[0]
        logits[:, list(settings.suppress_token_ids)] = -math.inf
        start = len(rollout.prompt)
        expected = logits.log_softmax(-1)[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0]
        mask = torch.tensor(rollout.loss_mask).bool()
        torch.testing.assert_close(torch.tensor(rollout.logprobs)[mask], expected[mask], rtol=0, atol=2e-5)
        assert torch.tensor(rollout.logprobs)[~mask].eq(0).all()


def test_the_tokens_are_those_of_the_rendered_conversation_and_only_the_policys_are_trained() -> None:
    groups, _, _ = roll()
    tokenizer = PROCESSOR.tokenizer

    for rollout in flat(groups):
        prompt = list(rollout.prompt.messages)
        messages = [*prompt, *rollout.messages]
        images = [
            block.get("image", block)
            for message in messages
            if isinstance(message["content"], list)
            for block in message["content"]
            if block["type"] == "image"
        ]
        text = PROCESSOR.apply_chat_template(messages, tokenize=False)
        rendered = PROCESSOR(text=[text], images=images or None, return_tensors="pt")["input_ids"][0].tolist()
        ids = rollout.prompt_ids + rollout.completion_ids
        if ids[-1] != tokenizer.eos_token_id:  # cut by a limit: the template closes the turn
            ids = [*ids, tokenizer.eos_token_id]
        assert [*ids, *tokenizer.encode("\n")] == rendered
        own = [token for token, counts in zip(rollout.completion_ids, rollout.loss_mask, strict=True) if counts]
        assert tokenizer.decode(own).replace(END, "") == rollout.text
        assert "tool_response" not in rollout.text
        assert rollout.loss_mask.count(0) == 0 or rollout.tool_calls > 0


def test_tool_calls_are_the_executed_turns() -> None:
    groups, tool, built = roll(generations=8)
    rollouts = flat(groups)

    for rollout in rollouts:
        turns = [str(message["content"]) for message in rollout.messages if message["role"] == "assistant"]
        executed = sum(bool(parse_calls(turn)) for turn in turns)
        assert rollout.tool_calls == executed - (not rollout.finished and bool(parse_calls(turns[-1])))
        if rollout.finished:
            assert not parse_calls(turns[-1])
    metrics = built.take_metrics()
    assert metrics["tools/calls"] * (1 - metrics["tools/failures"]) == pytest.approx(len(tool.seen))
    assert metrics["tools/repeated_call"] > 0  # this policy says the same again and again
    assert built.take_metrics() == {"tools/calls": 0.0}


def test_a_call_on_the_last_turn_is_not_executed() -> None:
    groups, _, _ = roll(options={"limits": ConversationLimits(turns=2)}, generations=8)
    cut = [rollout for rollout in flat(groups) if not rollout.finished]

    assert any(rollout.tool_calls == 1 and len(rollout.messages) == 3 for rollout in cut)
    for rollout in cut:
        assert rollout.tool_calls <= 1
        assert rollout.completion_ids[-1] == PROCESSOR.tokenizer.convert_tokens_to_ids(rollout.text[-len(CALL_A) :])


@pytest.mark.parametrize("limit", [40, 97, 150])
def test_the_response_never_passes_its_limit_and_what_was_sampled_before_is_kept(limit: int) -> None:
    unlimited, _, _ = roll(generations=8)
    groups, _, built = roll(generations=8, max_new_tokens=limit)

    lengths = [len(rollout.completion_ids) for rollout in flat(groups)]
    assert max(lengths) <= limit
    assert max(len(rollout.completion_ids) for rollout in flat(unlimited)) > limit
    assert any(not rollout.finished for rollout in flat(groups))
    for rollout in flat(groups):
        assert len(rollout.completion_ids) == len(rollout.logprobs) == len(rollout.loss_mask)
        assert rollout.completion_ids.count(PROCESSOR.image_token_id) == (
            0 if rollout.observation_grid_thw is None else int(rollout.observation_grid_thw.prod(-1).sum()) // 4
        )
    # a turn that was executed counts, also where its observation did not fit any more
    assert sum(rollout.tool_calls for rollout in flat(groups)) == built.take_metrics()["tools/calls"] > 0


def test_later_turns_are_cut_each_at_its_own_limit() -> None:
    """The engine samples all of them up to the largest of their limits."""
    unlimited, _, _ = roll(generations=8)
    firsts = {
        rollout.loss_mask.index(0): rollout.loss_mask.count(0) for rollout in flat(unlimited) if rollout.tool_calls
    }
    shortest = min(firsts[start] + start for start in firsts)
    end = PROCESSOR.tokenizer.convert_tokens_to_ids(END)

    groups, _, _ = roll(generations=32, max_new_tokens=shortest + 3)

    second = [rollout for rollout in flat(groups) if 0 in rollout.loss_mask]
    lefts = {shortest + 3 - rollout.loss_mask.count(0) - rollout.loss_mask.index(0) for rollout in second}
    assert len(lefts) > 1
    cut = [rollout for rollout in second if len(rollout.completion_ids) == shortest + 3 and not rollout.finished]
    assert cut
    for rollout in flat(groups):
        assert len(rollout.completion_ids) == len(rollout.logprobs) <= shortest + 3
        assert rollout.finished == (rollout.completion_ids[-1] == end)


def test_a_branch_is_kept_over_all_turns() -> None:
    groups, _, _ = roll(TWO_BRANCHES, branch="sample", generations=6)
    several = [rollout for rollout in flat(groups) if rollout.tool_calls][:6]

    assert {rollout.branch for rollout in several} == {0, 1}
    for rollout in several:
        # scored with the other branch, later turns come out differently: they were not sampled from it
        assert rollout.branch_logprob < 0
        right, wrong = (_last_turn_gap(rollout, branch) for branch in (rollout.branch, 1 - rollout.branch))
        assert right < 2e-5 < wrong


def _last_turn_gap(rollout: Rollout, branch: int) -> float:
    batch = collate_rollouts([rollout], rope_index_of(TWO_BRANCHES), torch.device("cpu"))
    settings = sampling(PROCESSOR, TWO_BRANCHES)
    inputs = {**batch.inputs, "branch_ids": branch}
    with torch.no_grad():
        scores = score_tokens(
            TWO_BRANCHES, inputs, batch.mask_BT, suppress_token_ids=settings.suppress_token_ids
        ).logp_BT[0, len(rollout.prompt) :]
    last = len(rollout.loss_mask) - rollout.loss_mask[::-1].index(0)
    return float((scores - torch.tensor(rollout.logprobs)).abs()[last:].max())


def contents(groups: list[list[Rollout]]) -> list[tuple[list[int], list[float]]]:
    return [(rollout.completion_ids, rollout.logprobs) for rollout in flat(groups)]


def test_the_same_seed_gives_the_same_conversations_and_a_state_goes_on_where_it_was_taken() -> None:
    first, _, built = roll(count=2, generations=3)
    state = built.state_dict()
    asked = prompts(PROCESSOR, 2)
    second = built.generate(asked, 3, sampling(PROCESSOR, DENSE))

    again, _, other = roll(count=2, generations=3, options={"workers": 1})
    other.load_state_dict(state)

    assert isinstance(built, RolloutEngine)
    assert contents(again) == contents(first)
    assert contents(other.generate(asked, 3, sampling(PROCESSOR, DENSE))) == contents(second) != contents(first)
    built.seed(3)
    other.seed(3)
    assert contents(built.generate(asked, 2, sampling(PROCESSOR, DENSE))) == contents(
        other.generate(asked, 2, sampling(PROCESSOR, DENSE))
    )
    assert built.generate([], 6, sampling(PROCESSOR, DENSE)) == []


@dataclass
class Broken(Echo):
    """Fails in a way of its choice."""

    how: str = "raise"
    wait: threading.Event | None = None

    def run(self, arguments, context):
        if self.how == "raise":
            raise RuntimeError("secret detail")
        if self.how == "nonsense":
            return "just a text"
        if self.how == "hang":
            assert self.wait is not None
            self.wait.wait(600)
            context.files["late"] = b"x"
        images = {"thin image": (4000, 3), "empty image": (0, 0)}
        if self.how in images:
            return ToolResult(text="look", images=(Image.new("RGB", images[self.how]),))
        return ToolResult(text="late")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raise", "the tool echo is out of order"),
        ("nonsense", "the tool echo is out of order"),
        ("thin image", "images left out"),
        ("empty image", "images left out"),
        ("hang", "did not come back in time"),
    ],
)
def test_a_failing_tool_is_an_observation(how: str, words: str, caplog) -> None:
    release = threading.Event()
    limits = ConversationLimits(seconds=0.1 if how == "hang" else 60)
    started = time.monotonic()

    with caplog.at_level(logging.WARNING):
        groups, _, built = roll(
            tool=Broken(how=how, wait=release), generations=2, count=2, options={"limits": limits, "workers": 4}
        )

    release.set()
    called = [rollout for rollout in flat(groups) if rollout.tool_calls]
    assert called
    for rollout in called:
        observation = next(message for message in rollout.messages if message["role"] == "user")
        assert words in str(observation["content"])
        assert "secret" not in str(rollout.messages)
    assert {"hang": "left behind", "raise": "secret detail"}.get(how, "tool") in caplog.text  # the log has it all
    if "image" not in how:
        assert built.take_metrics()["tools/failures"] == 1
    assert time.monotonic() - started < 300


def test_a_call_that_comes_back_too_late_changes_nothing() -> None:
    release, context = threading.Event(), ToolContext(files={"kept": b"1"})
    tool = SafeTool(Broken(how="hang", wait=release), seconds=0.05)

    result = tool.run({"text": "a"}, context)
    release.set()
    for thread in [thread for thread in threading.enumerate() if thread.name == "tool echo"]:
        thread.join(10)

    assert (result.ok, result.error) == (False, "time")
    assert context.files == {"kept": b"1"}


def test_tools_run_at_the_same_time_but_no_more_than_allowed() -> None:
    running, most, changed = [0], [0], threading.Condition()

    class Slow(Echo):
        def run(self, arguments, context):
            with changed:
                running[0] += 1
                most[0] = max(most[0], running[0])
                changed.notify_all()
                changed.wait_for(lambda: most[0] >= 3, timeout=60)
            time.sleep(0.05)  # a fourth would come now
            with changed:
                running[0] -= 1
            return ToolResult(text="done")

    roll(tool=Slow(), options={"workers": 3}, generations=8)

    assert most[0] == 3


def test_tools_see_the_images_of_the_question_and_their_own_trajectory_only() -> None:
    seen = []

    class Looks(Echo):
        def run(self, arguments, context):
            seen.append(([image.size for image in context.images], dict(context.files)))
            context.files[f"f{len(context.files)}"] = b"1"
            return ToolResult(text="ok")

    groups, _, _ = roll(tool=Looks(), generations=8, options={"workers": 1})

    assert {tuple(sizes) for sizes, _ in seen} == {(), ((56, 56),)}
    assert all(sorted(files) == [f"f{n}" for n in range(len(files))] for _, files in seen)
    assert sum(not files for _, files in seen) == sum(rollout.tool_calls > 0 for rollout in flat(groups))
    assert any(files for _, files in seen)


def test_programs_of_the_policy_run_in_the_sandbox_and_their_images_come_back() -> None:
    is_usable, reason = sandbox_available()
    if not is_usable:
        pytest.skip(f"no sandbox can be made here: {reason}")
    [python] = make_tools(["python"])

    class Programs(Echo):
        def run(self, arguments, context):
            code = f"from PIL import Image\nprint({str(arguments['text'])!r} * 3)\nImage.new('RGB', (56, 56)).save('a.png')"
            return python.run({"code": code}, context)

    groups, _, built = roll(tool=Programs(), generations=2, count=2)

    called = [rollout for rollout in flat(groups) if rollout.tool_calls]
    assert called
    for rollout in called:
        assert rollout.observation_grid_thw is not None
        observation = next(message for message in rollout.messages if message["role"] == "user")
        assert any(f"{word * 3}\n" in str(block.get("text")) for word in "ab" for block in observation["content"])
    assert built.take_metrics()["tools/seconds"] > 0.01
