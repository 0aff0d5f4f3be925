"""Stage-RL of the study: GRPO on the dense model with verifiable rewards, its control, and what is measured of it."""

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from scipy import stats

from metis_home import MetisHomeProcessor
from metis_home.training.data.encode import Encoder
from metis_home.training.data.records import Record
from metis_home.training.evaluation.metrics import Difference, paired_difference, proportion
from metis_home.training.loading import load_model
from metis_home.training.rewards import accuracy_reward, format_reward
from metis_home.training.rl import MetisRLConfig, MetisRLTrainer
from metis_home.training.rollouts.hf import HFEngine
from metis_home.training.rollouts.types import Sampling, make_prompt
from metis_home.training.rollouts.vocabulary import end_token_ids, unsampled_token_ids
from metis_home.training.verifier import verify_answer

from .families import FAMILY_OF
from .sft import answers
from .summary import FAMILIES, Criterion

if TYPE_CHECKING:
    from metis_home.training.evaluation.completions import Completion

RISE = 0.08  # of the reasoning family's accuracy
HELD = 0.02  # how far the direct family's may fall
CURVES = (
    *("reward", "rewards/accuracy_reward/mean", "rewards/format_reward/mean", "entropy", "length/mean"),
    *("length/truncated_fraction", "groups/drawn", "groups/zero_std_fraction", "pass_rate/some", "clip/low"),
    *("clip/high", "grad_norm", "seconds/rollout", "seconds/reward", "seconds/update"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RLSettings:
    """GRPO as Metis-RISE describes it: no KL, clip-higher, token-mean, dynamic sampling. All numbers are ours."""

    prompts: int = 4000
    """Fresh training rows per family."""
    direct_share: float = 0.25
    """Share of the direct family among the prompts: most of it is solved, and prompts that are solved teach nothing."""
    steps: int = 40
    prompts_per_step: int = 32
    generations: int = 16
    learning_rate: float = 2e-5
    max_new_tokens: int = 80
    samples: int = 8
    """Sampled answers per held-out prompt, for pass rates."""
    sampled_prompts: int = 200
    """Held-out reasoning prompts that get them."""


def coin_reward(seed: int, number: int = 0) -> Callable[..., list[float]]:
    """A reward that knows nothing about the answer: a coin for every rollout, the control of the study."""
    coin = random.Random(f"coin/{seed}/{number}")

    def random_reward(completions: Sequence[object], **columns: object) -> list[float]:
        return [float(coin.random() < 0.5) for _ in completions]

    return random_reward


def train_grpo(
    dense: Path, folder: Path, records: list[Record], settings: RLSettings, *, seed: int, coin: int | None = None
) -> dict[str, object]:
    """Train the dense model in `dense` by rewards and write it to `folder`; the training curves come back.

    With a `coin`, its number, it is a control: the coin is the reward; accuracy and format are counted and weigh nothing.
    """
    model = load_model(str(dense))
    processor = MetisHomeProcessor.from_pretrained(dense)
    arguments = MetisRLConfig(
        output_dir=str(folder),
        max_steps=settings.steps,
        prompts_per_step=settings.prompts_per_step,
        num_generations=settings.generations,
        max_completion_tokens=settings.max_new_tokens,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.prompts_per_step * settings.generations,
        micro_batch_tokens=16384,
        reward_weights=None if coin is None else [0.0, 0.0, 1.0],
        correct_reward="accuracy_reward",
        system_prompt=None,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        plots=False,
        log_completions=False,
        use_cpu=True,
        seed=seed,
    )
    rewards = [accuracy_reward, format_reward, *([] if coin is None else [coin_reward(seed, coin)])]
    trainer = MetisRLTrainer(model, arguments, rewards, mixed(records, settings.direct_share), processor)
    trainer.train()
    trainer.save_model(str(folder))
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    return {name: [entry.get(name) for entry in history] for name in ("step", *CURVES)}


def mixed(records: list[Record], direct_share: float) -> list[Record]:
    """All reasoning rows, and as many direct ones as make up `direct_share` of the whole."""
    reasoning = [record for record in records if FAMILY_OF[record.source] == "reasoning"]
    direct = [record for record in records if FAMILY_OF[record.source] == "direct"]
    return reasoning + direct[: round(len(reasoning) * direct_share / (1 - direct_share))]


def sampled(model: Path, records: list[Record], settings: RLSettings, *, seed: int) -> dict[str, float]:
    """Sample answers at temperature 1: pass@1, pass@k (k = `settings.samples`), tokens per answer, share cut."""
    loaded = load_model(str(model)).eval()
    processor = MetisHomeProcessor.from_pretrained(model)
    encoder = Encoder(processor, system_prompt=None)
    engine = HFEngine(loaded, processor.tokenizer, seed=seed)
    sampling = Sampling(
        max_new_tokens=settings.max_new_tokens,
        eos_token_ids=end_token_ids(processor.tokenizer, loaded.generation_config),
        suppress_token_ids=unsampled_token_ids(loaded.config, processor.tokenizer),
    )
    prompts = [make_prompt(record, encoder, index=record.index) for record in records]
    groups = engine.generate(prompts, settings.samples, sampling)
    right_PG = torch.tensor(
        [
            [
                rollout.finished and bool(verify_answer(rollout.text, str(record.answer), record.kind).correct)
                for rollout in group
            ]
            for record, group in zip(records, groups, strict=True)
        ]
    )
    rollouts = [rollout for group in groups for rollout in group]
    return {
        "prompts": len(records),
        "samples": settings.samples,
        "pass_at_1": right_PG.double().mean().item(),
        "pass_at_k": right_PG.any(1).double().mean().item(),
        "mean_tokens": sum(rollout.policy_tokens for rollout in rollouts) / len(rollouts),
        "truncated": sum(not rollout.finished for rollout in rollouts) / len(rollouts),
    }


def measure(model: Path, folder: Path, held_out: list[Record], settings: RLSettings, *, seed: int) -> dict[str, Any]:
    """Greedy answers of a dense model to held-out rows, and sampled ones to some of the reasoning family.

    Returns:
        `families`, `sources` {name: accuracy with its interval}, `tokens` {family: per greedy answer}, `sampled`, and
        `right` {family: {id: 0 or 1}} to compare two models query by query.
    """
    found = answers(model, folder, held_out, ["auto"], settings.max_new_tokens)
    right = {
        family: {row.id: int(bool(row.correct)) for row in found if FAMILY_OF[row.source] == family}
        for family in FAMILIES
    }
    reasoning = [record for record in held_out if FAMILY_OF[record.source] == "reasoning"]
    return {
        "families": {family: asdict(proportion(sum(rows.values()), len(rows))) for family, rows in right.items()},
        "sources": {
            source: asdict(proportion(*_hits([row for row in found if row.source == source])))
            for source in sorted({row.source for row in found})
        },
        "tokens": {
            family: sum(row.tokens for row in found if row.id in rows) / len(rows) for family, rows in right.items()
        },
        "sampled": sampled(model, reasoning[: settings.sampled_prompts], settings, seed=seed),
        "right": right,
    }


def judge_rl(before: dict[str, Any], after: dict[str, Any]) -> list[Criterion]:
    """The goals of Stage-RL for one seed, on greedy answers to the same held-out queries."""
    rise, fall = gain(before, after, "reasoning"), gain(before, after, "direct")
    assert rise.value is not None
    assert fall.value is not None
    return [
        Criterion(name="reasoning: after minus before", found=rise.value, wanted=f">= {RISE}", met=rise.value >= RISE),
        Criterion(name="direct: after minus before", found=fall.value, wanted=f">= -{HELD}", met=fall.value >= -HELD),
    ]


def judge_control(before: dict[str, Any], after: dict[str, Any]) -> list[Criterion]:
    """One control must not rise as GRPO is asked to."""
    rise = gain(before, after, "reasoning").value
    assert rise is not None
    return [Criterion(name="reasoning: after minus before", found=rise, wanted=f"< {RISE}", met=rise < RISE)]


def judge_controls(rises: Sequence[float]) -> Criterion:
    """All controls together must not rise.

    A coin moves a policy too, at random: the queries' own interval, which knows one model only, is too narrow to judge
    that by. So the interval is Student's, over the training runs, two or more.
    """
    mean = statistics.fmean(rises)
    half = float(stats.t.ppf(0.975, len(rises) - 1)) * statistics.stdev(rises) / len(rises) ** 0.5
    return Criterion(
        name=f"reasoning: mean of {len(rises)} controls, 95 % +- {half:.3f}",
        found=mean,
        wanted="interval reaches 0",
        met=mean - half <= 0,
    )


def gain(before: dict[str, Any], after: dict[str, Any], family: str) -> Difference:
    """Paired difference of accuracy over a family's held-out queries, with its 95 % interval."""
    first, second = before["right"][family], after["right"][family]
    ids = sorted(first)
    return paired_difference([second[name] for name in ids], [first[name] for name in ids])


def _hits(rows: list["Completion"]) -> tuple[int, int]:
    return sum(bool(row.correct) for row in rows), len(rows)
