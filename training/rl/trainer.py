"""`MetisRLTrainer`: Stage-RL and HDPO on transformers' Trainer.

One training step of the Trainer is one optimizer step here. It takes the next step of the buffer; an empty buffer is
filled first: rollouts, rewards, advantages, normalisers of all its steps. The Trainer's data loader only counts.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerControl

from metis_home.errors import RecipeError, TrainingError

from .. import collectives
from ..checkpoints import newest_checkpoint
from ..data.encode import Encoder
from ..data.records import Record, load_records
from ..distributed.leaf_inputs import require_leaf_gradients
from ..distributed.watched import WatchedTrainer
from ..distributed.whole import whole_parameters
from ..nan_guard import NanGuard
from ..resuming import HubLayoutResume
from ..rollouts.engine import RolloutEngine
from ..rollouts.tool_rollouts import ToolRollouts
from ..rollouts.types import Sampling
from ..rollouts.vocabulary import end_token_ids, unsampled_token_ids
from ..tools.protocol import Tool
from ..weight_precision import warn_of_coarse_weights
from .completions import CompletionsTable
from .config import MetisRLConfig
from .engines import make_engine
from .metrics import Stopwatch, UpdateMetrics, filling_columns, filling_metrics
from .parts import base_of, choose_parts, reference_of, wanted_branch
from .planning import plan_steps
from .plots import draw_plots, require_matplotlib
from .prompts import PromptSource, check_prompts
from .rl_buffer import BufferFiller
from .samples import Buffer
from .scoring import RewardFunction, Scorer
from .self_check import check_log_probabilities
from .state import load_state, save_state
from .tools import describe_tools, tools_of, with_tools
from .update import Updater, sum_names
from .validation import validate

logger = logging.getLogger(__name__)


class MetisRLTrainer(HubLayoutResume, WatchedTrainer):
    """Trains a policy by rewards.

    Args:
        model: a dense Qwen2.5-VL or Qwen3-VL, or the two-branch model.
        args: see `MetisRLConfig`.
        reward_funcs: functions with TRL's signature, or names from `metis_home.training.rewards`.
        train_dataset: records, or what `load_records` reads.
        processing_class: a `MetisHomeProcessor`.
        eval_dataset: held-out prompts, the same, or {name: the same}; answered as often as `eval_strategy` says, see
            `validate`.
        engine: what generates; default: what `args.engine` says, the model itself or servers.
        tools: what rollouts may call, as objects; default: those that `args.tools` names.
        ref_model: for the KL term, or only for its metric where `kl_coef` is 0; default: a copy of the model as it
            starts (with adapters: the model without them) if `kl_coef` or `log_kl` asks for it.
        peft_config: wrap the model with an adapter first.
        callbacks, optimizers: as in transformers.
    Raises:
        RecipeError: settings that do not fit the model, the number of ranks or the reward functions.
        DataError: no usable prompts.
    """

    args: MetisRLConfig

    def __init__(
        self,
        model: nn.Module,
        args: MetisRLConfig,
        reward_funcs: Sequence[RewardFunction | str],
        train_dataset: Sequence[Record] | Any,
        processing_class: Any,
        *,
        eval_dataset: Any = None,
        engine: RolloutEngine | None = None,
        tools: Sequence[Tool] | None = None,
        ref_model: nn.Module | None = None,
        peft_config: Any = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if peft_config is not None:
            from peft import get_peft_model

            model = cast(nn.Module, get_peft_model(cast(Any, model), peft_config))
        self.base = base_of(model)
        self.trains_router = choose_parts(model, args)
        records, held_out = _records(train_dataset), _held_out(eval_dataset)
        if args.check_data:
            for rows in (records, *(held_out.values() if isinstance(held_out, Mapping) else [held_out or []])):
                check_prompts(rows, reward_funcs, processing_class, args.system_prompt)
        if args.eval_strategy != "no" and held_out is None:
            raise RecipeError(f"eval_strategy is {str(args.eval_strategy)!r} and there is no eval_dataset to answer")
        # An epoch shows every prompt once, each in as many steps as there are passes.
        self._step_counter = _StepNumbers(max(1, len(records) // args.prompts_per_step) * args.passes_per_rollout)
        super().__init__(
            model=cast(Any, model),
            args=args,
            train_dataset=cast(Any, self._step_counter),
            eval_dataset=cast(Any, held_out),
            data_collator=_first,
            processing_class=processing_class,
            callbacks=list(callbacks or ()),
            optimizers=optimizers,
        )
        if self.is_deepspeed_enabled:
            require_leaf_gradients(model)
        elif not self.is_fsdp_enabled:
            warn_of_coarse_weights(model)
        used_tools = tools_of(args, tools)
        records, system_prompt = describe_tools(records, args.system_prompt, used_tools, args)
        self._tools = used_tools
        encoder = Encoder(processing_class, system_prompt=system_prompt, max_length=args.max_prompt_tokens)
        ranks, rank = collectives.world_size(), collectives.rank()
        self.source = PromptSource(records, encoder, seed=args.seed, rank=rank, world_size=ranks)
        self.scorer = Scorer(
            reward_funcs,
            args.reward_weights,
            separate=[args.efficiency_reward] if args.advantage == "hdpo" else [],
            overlong_buffer=args.overlong_buffer_tokens,
            overlong_weight=args.overlong_weight,
            max_tokens=args.max_completion_tokens,
        )
        tokenizer = processing_class.tokenizer
        self.sampling = Sampling(
            max_new_tokens=args.max_completion_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            eos_token_ids=end_token_ids(tokenizer, self.base.generation_config),
            suppress_token_ids=unsampled_token_ids(self.base.config, tokenizer),
            branch=wanted_branch(args),
        )
        generator = engine or make_engine(args, self.base, processing_class, rank=rank, autocast=self._generating)
        self.engine = with_tools(generator, processing_class, used_tools, args)
        if args.plots:
            require_matplotlib()
        if args.n_gpu > 1:
            raise RecipeError(
                f"{args.n_gpu} GPUs are visible to one process, which would be torch.nn.DataParallel. Start one process "
                "per GPU (torchrun --nproc-per-node), or set CUDA_VISIBLE_DEVICES."
            )
        if args.prompts_per_step % ranks:
            raise RecipeError(f"prompts_per_step is {args.prompts_per_step} and does not divide among {ranks} ranks")
        groups = args.prompts_per_step // ranks * args.updates_per_rollout
        self.filler = BufferFiller(args, self.source, self.engine, self.scorer, self.sampling, groups)
        self.buffer = Buffer()
        self.updater = Updater.of(
            self.base, args, self.sampling.suppress_token_ids, trains_router=self.trains_router, device=args.device
        )
        self.ref_model = reference_of(model, ref_model, args)
        self.updater.corrects_sampler = not self.engine.shares_weights and args.importance_cap is not None
        self.updater.compares_reference = self.ref_model is not None
        self.update_metrics = UpdateMetrics(sum_names(self.updater))
        self.clock = Stopwatch()
        self.completions = CompletionsTable(args.output_dir, rank) if args.log_completions else None
        self._pending_metrics: list[dict[str, float]] = []
        self._resume_from: str | None = None
        self._has_checked = self._is_validating = False
        self.nan_guard = NanGuard(self.accelerator, lambda index: self.source.records[index].id, self._deepspeed_engine)
        self.add_callback(self.nan_guard)
        self.watch(args.watchdog_seconds, lambda index: self.source.records[index].id)

    # ---- Trainer's doors -------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As in transformers; a checkpoint also brings back prompts, buffer and the sampler's random state."""
        folder = str(self.args.output_dir)
        checkpoint = newest_checkpoint(folder) if resume_from_checkpoint is True else resume_from_checkpoint or None
        if resume_from_checkpoint is True and checkpoint is None:
            raise TrainingError(f"there is no checkpoint in {folder} to resume from")
        self._resume_from = checkpoint
        result = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        if self.args.plots and self.is_world_process_zero():
            draw_plots(self.state.log_history, self.args.output_dir)
        return result

    def get_train_dataloader(self) -> DataLoader:
        """Counts optimizer steps: the same numbers on every rank."""
        return DataLoader(self._step_counter, batch_size=1, collate_fn=_first)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One optimizer step's forwards and backwards; returns this rank's share of its loss, times the ranks.

        Trainer logs the mean over ranks, which is then the loss of the step.
        """
        if self._resume_from is not None:
            self._load(self._resume_from)
            self._resume_from = None
        if self.buffer.is_empty:
            self._fill(model)
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()
        step = self.buffer.pop()
        total = torch.zeros((), device=self.args.device)
        with self.clock.stage("update"):
            for number, micro_batch in enumerate(step.micro_batches):
                self._enter(f"micro-batch {number + 1} of {len(step.micro_batches)}")
                is_last = number + 1 == len(step.micro_batches)
                self.accelerator.gradient_state._set_sync_gradients(is_last)
                is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
                with nullcontext() if is_last or is_deepspeed else self.accelerator.no_sync(model):
                    with self.compute_loss_context_manager():
                        result = self.updater.loss(model, self.buffer.samples, micro_batch)
                    self.nan_guard.watch(result.loss, self._rows_of(micro_batch))
                    # The ranks' gradients are averaged, and the normalisers already count all ranks.
                    loss = result.loss * self.args.world_size
                    self.accelerator.backward(loss, **({"scale_wrt_gas": False} if is_deepspeed else {}))
                self.update_metrics.add(result.sums)
                total += loss.detach()
        self.accelerator.gradient_state._set_sync_gradients(True)
        return total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in transformers, with the metrics of the fillings and updates since the last time."""
        if self._is_validating:
            super().log(logs, *args, **kwargs)
            return
        fillings, self._pending_metrics = self._pending_metrics, []
        for name in dict.fromkeys(name for metrics in fillings for name in metrics):
            values = [metrics[name] for metrics in fillings if name in metrics]
            logs[name] = sum(values) / len(values)
        logs |= self.update_metrics.flush()
        for stage in ("weights", "prepare", "update"):
            if self.clock.seconds.get(stage):
                logs[f"seconds/{stage}"] = self.clock.seconds.pop(stage)
        super().log(logs, *args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Answer and score held-out prompts; returns and logs the metrics.

        Args:
            eval_dataset: as in the constructor; default: the one given there.
            ignore_keys: of no use here, there are no model outputs.
        Raises:
            TrainingError: there is nothing to answer, or sharded weights are not set up yet (before `train()`).
        """
        chosen = _held_out(eval_dataset if eval_dataset is not None else self.eval_dataset)
        if chosen is None:
            raise TrainingError("there are no held-out prompts: pass eval_dataset to the trainer or to evaluate()")
        if isinstance(chosen, Mapping):
            found = [self.evaluate(part, None, f"{metric_key_prefix}_{name}") for name, part in chosen.items()]
            return {name: value for metrics in found for name, value in metrics.items()}
        if (self.is_fsdp_enabled or self.is_deepspeed_enabled) and self.state.max_steps <= 0:
            raise TrainingError("sharded weights are set up by train(): evaluate() before it is not possible")
        if not self.engine.shares_weights:
            self.engine.update_weights(self.base)
        described, _ = describe_tools(chosen, self.args.system_prompt, self._tools, self.args)
        metrics = validate(
            described,
            self.source.encoder,
            self.filler,
            self.engine,
            self.args,
            prefix=metric_key_prefix,
            enter=self._enter,
        )
        if isinstance(self.engine, ToolRollouts):
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in self.engine.take_metrics().items()}
        self._is_validating = True
        try:
            self.log(dict(metrics))
        finally:
            self._is_validating = False
        control: TrainerControl = self.control  # type: ignore[has-type]
        self.control = self.callback_handler.on_evaluate(self.args, self.state, control, metrics)
        return metrics

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the inputs of a step are only its number."""
        return 0

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # First, because the Trainer's own state, which super() writes last, says that a checkpoint is complete.
        save_state(
            f"{self.args.output_dir}/checkpoint-{self.state.global_step}",
            source=self.source,
            buffer=self.buffer,
            engine=self.engine,
            pending=self._pending_metrics,
            update_sums=self.update_metrics.state_dict(),
            step=self.state.global_step,
        )
        super()._save_checkpoint(model, trial)

    @contextmanager
    def _generating(self) -> Iterator[None]:
        """What the engine runs in: ranks generate on their own, so each needs the whole model."""
        with whole_parameters(self.model_wrapped), self.compute_loss_context_manager():
            yield

    def _enter(self, stage: str) -> None:
        if self.watchdog is not None:
            self.watchdog.enter(stage, step=self.state.global_step + 1)

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def _fill(self, model: nn.Module) -> None:
        """Generate, score and plan; afterwards the buffer has steps."""
        if not self.engine.shares_weights:
            self._enter("weights to the servers")
            with self.clock.stage("weights"):
                self.engine.update_weights(self.base)
        if self.args.self_check and not self._has_checked:
            check_log_probabilities(self.engine, self.source, self.sampling, self.updater, model, self.args)
        self._has_checked = True
        self._enter("rollouts and rewards")
        filling = self.filler.fill(self.state)
        self._enter("after rollouts: advantages, old log-probabilities")
        metrics = filling_metrics(
            filling, self.scorer.names, self.filler.correct_name, drawn=self.sampling.branch == "sample"
        ) | filling_columns(filling)
        if isinstance(self.engine, ToolRollouts):
            metrics |= self.engine.take_metrics()
        else:
            del metrics["tool_calls"]  # there are none to call
        self._pending_metrics.append(metrics)
        if self.completions is not None:
            self.completions.write(filling.groups, self.state.global_step + 1)
        with self.clock.stage("prepare"):
            steps = plan_steps(
                filling.samples, self.args, trains_router=self.trains_router, trains_tokens=self._trains_tokens()
            )
            self.buffer = Buffer(filling.samples, steps)
            self._score_old(model)
            self._score_reference()
        if metrics["groups/zero_std_fraction"] == 1 and self.is_world_process_zero():
            logger.warning(
                "step %d: all %d prompts had rollouts of equal reward; there is nothing to learn from (reward %.3f)",
                self.state.global_step + 1,
                metrics["groups/drawn"],
                metrics.get("reward", float("nan")),
            )

    def _score_old(self, model: nn.Module) -> None:
        """Where ratios start from.

        The first step of a filling needs nothing: its policy is the one that sampled, unless it comes again.
        """
        updates = self.args.updates_per_rollout
        later = self.buffer.steps[1 if self.args.passes_per_rollout == 1 else 0 : updates]
        if not later:
            return
        how = self.args.old_logprobs
        if how == "auto":
            exact = self.engine.shares_weights and self.updater.is_float32()
            how = "sampler" if exact else "recompute"
        samples = self.buffer.samples
        rows = [row for step in later for batch in step.micro_batches for row in batch]
        # Padding may be a rollout of the first step, which has no numbers, like all others of that step.
        used = {row.sample for row in rows if not row.is_padding}
        if how == "sampler":
            found = {number: samples[number].rollout.logprobs for number in used}
        else:
            with self.compute_loss_context_manager():
                found = self.updater.score_samples(model, samples, later)
        for number in used:
            samples[number].old_logprobs = found[number]

    def _score_reference(self) -> None:
        if self.ref_model is None:
            return
        unique = self.buffer.steps[: self.args.updates_per_rollout]
        with self.ref_model.active() as reference, self.compute_loss_context_manager():
            scores = self.updater.score_samples(reference, self.buffer.samples, unique)
        for number, logprobs in scores.items():
            self.buffer.samples[number].ref_logprobs = logprobs

    def _trains_tokens(self) -> bool:
        """Does anything train that the tokens depend on?"""
        return any(
            parameter.requires_grad for name, parameter in self.base.named_parameters() if ".router." not in f".{name}"
        )

    def _rows_of(self, micro_batch: Any) -> Tensor:
        return torch.tensor([self.buffer.samples[row.sample].rollout.prompt.index for row in micro_batch])

    def _deepspeed_engine(self) -> object | None:
        return self.model_wrapped if self.accelerator.distributed_type == DistributedType.DEEPSPEED else None

    def _load(self, checkpoint: str) -> None:
        state = load_state(checkpoint, self.source)
        self.source.load_state_dict(state["source"])
        self.engine.load_state_dict(state["engine"])
        self.buffer = Buffer.from_state(state["buffer"], self.source.prompt)
        self._pending_metrics = state["pending"]
        self.update_metrics.load_state_dict(state["update_sums"])
        self._has_checked = True
        if self.completions is not None:
            self.completions.forget_after(state["step"])


class _StepNumbers(Dataset):
    """0, 1, 2, ...: what the Trainer iterates over."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, int]:
        return {"step": number}


def _first(items: list[dict[str, int]]) -> dict[str, int]:
    return items[0]


def _held_out(dataset: Any) -> list[Record] | dict[str, list[Record]] | None:
    if isinstance(dataset, Mapping):
        return {name: _records(part) for name, part in dataset.items()}
    return None if dataset is None else _records(dataset)


def _records(dataset: Any) -> list[Record]:
    if isinstance(dataset, Sequence) and not isinstance(dataset, str) and all(isinstance(r, Record) for r in dataset):
        return list(dataset)
    return load_records(dataset)
