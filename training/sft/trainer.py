"""`MetisSFTTrainer`: Stage-SFT on two-branch models, a subclass of transformers' Trainer.

Each row goes through the branch that its label names (teacher forcing), and both losses are normalised over the whole
optimizer step (see `losses.py`). What is only about data, freezing, logs, adapters or routers stands in files of its own.

Shapes: B batch, T tokens, S supervised tokens, Q queries (B, or the segments of packed rows).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from ...branch import Branch
from ...errors import TrainingError
from ...modeling import MetisHomeForConditionalGeneration
from ..data.batching import TokenBudgetSampler
from ..data.check import check_records
from ..data.collate import PackingCollator, PaddingCollator
from ..data.encode import Encoder
from ..data.formats import build_response
from ..data.records import Record
from ..distributed.leaf_inputs import require_leaf_gradients
from ..distributed.watched import WatchedTrainer
from ..freezing import freeze_parameters, set_of, trainable_sets
from ..nan_guard import NanGuard
from ..packed_attention import use_packed_attention
from ..resuming import HubLayoutResume
from ..vision_presence import VisionPresence
from ..weight_precision import warn_of_coarse_weights
from .arguments import check_arguments, check_router_only, with_adapter
from .config import MetisSFTConfig
from .dataset import RecordDataset, Source, as_records
from .journal import Journal
from .losses import count_targets, losses_per_token, query_losses, step_loss
from .plots import draw_curves
from .replacing import replaced
from .router_features import FeatureDataset, collate_features, router_forward

if TYPE_CHECKING:
    from peft import PeftConfig

    from ...modeling import MetisHomeCausalLMOutputWithPast, MetisHomeModelOutputWithPast
    from ...processing import MetisHomeProcessor

_NOT_FOR_THE_MODEL = ("record_index",)
Rows = RecordDataset | FeatureDataset
Collator = Callable[[list], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Forward:
    """What one micro-batch gave."""

    outputs: "MetisHomeCausalLMOutputWithPast | MetisHomeModelOutputWithPast"
    lm_losses_S: Tensor
    """Empty where only the router ran."""
    router_losses_Q: Tensor | None


class MetisSFTTrainer(HubLayoutResume, WatchedTrainer):
    """Trains a two-branch model on records: `MetisSFTTrainer(model, args, train_dataset=records, ...).train()`.

    Args:
        model: a `MetisHomeForConditionalGeneration`.
        args: a `MetisSFTConfig`.
        train_dataset: records, rows (mappings), or the path of a file of rows.
        eval_dataset: the same, or {name: the same}.
        processing_class: the model's `MetisHomeProcessor`; saved with every checkpoint.
        peft_config: train adapters instead of the weights, see `branch_lora_config`; then `freeze` stays empty.
        **trainer_kwargs: `callbacks`, `optimizers`, `compute_metrics`, ... as for `Trainer`.
    Raises:
        DataError: rows that cannot be used, all of them listed. RecipeError: impossible freeze sets.
        TrainingError: nothing to train, or a router that should train and no row says what it should answer.
    Source: Metis-HOME (arXiv 2510.20519), Stage-SFT.
    """

    # For transformers that ask (> 5.16); for all others, `model_accepts_loss_kwargs` below says the same.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: MetisHomeForConditionalGeneration,
        args: MetisSFTConfig,
        *,
        train_dataset: Source | None = None,
        eval_dataset: Source | Mapping[str, Source] | None = None,
        processing_class: "MetisHomeProcessor | None" = None,
        peft_config: "PeftConfig | None" = None,
        callbacks: list[TrainerCallback] | None = None,
        **trainer_kwargs,
    ) -> None:
        check_arguments(model, args, processing_class)
        assert processing_class is not None  # checked above
        self._two_branch = base = model
        trained: nn.Module = model
        if peft_config is not None:
            trained = with_adapter(model, peft_config, args)
        else:
            freeze_parameters(model, trainable_sets(args.freeze, args.train_only))
        trained_sets = {set_of(name) for name, parameter in base.named_parameters() if parameter.requires_grad}
        if not trained_sets:
            raise TrainingError("no parameter trains: check `freeze` or the adapter's target_modules.")
        self.trains_router = "router" in trained_sets
        self.trains_only_router = trained_sets == {"router"}
        if self.trains_only_router:
            check_router_only(args)
        weight = args.router_loss_weight
        self.router_loss_weight = float(base.config.router_loss_weight if weight is None else weight)

        self._encoder = Encoder(processing_class, system_prompt=args.system_prompt, max_length=args.max_length)
        self._check_data = args.check_data
        self._cache_gib = args.cache_gib
        train = None if train_dataset is None else self._dataset(train_dataset)
        if train is not None and self.trains_router and all(record.mode is None for record in train.records):
            raise TrainingError(
                "the router should train, and no row has a mode (thinking or non_thinking): nothing tells it what is "
                "right. Label the rows, or freeze the router: freeze=['router']."
            )
        evaluated: Rows | dict[str, Rows] | None
        if isinstance(eval_dataset, Mapping):
            evaluated = {name: self._dataset(source) for name, source in eval_dataset.items()}
        else:
            evaluated = None if eval_dataset is None else self._dataset(eval_dataset)
        pad = processing_class.tokenizer.pad_token_id
        self._eval_collator: Collator = collate_features if self.trains_only_router else PaddingCollator(pad)
        collator = PackingCollator(base.config, pad, flash_attention=True) if args.packing else self._eval_collator

        super().__init__(
            model=trained,
            args=args,
            data_collator=collator,
            train_dataset=train,
            eval_dataset=evaluated,
            processing_class=processing_class,
            callbacks=callbacks,
            **trainer_kwargs,
        )
        if self.args.n_gpu > 1:
            raise TrainingError(
                f"{self.args.n_gpu} GPUs and one process: start one process per GPU, for example "
                "`torchrun --nproc-per-node 8 -m metis_home.cli train ...` or `accelerate launch ...`."
            )
        if self.is_deepspeed_enabled:
            require_leaf_gradients(base)
        elif not self.is_fsdp_enabled:
            warn_of_coarse_weights(trained)
        # `compute_loss` normalises over the whole step: Trainer must not divide by the accumulation once more.
        self.model_accepts_loss_kwargs = True
        self._sampler: TokenBudgetSampler | None = None
        self._presence = VisionPresence(base)
        self._train_journal = Journal(self.accelerator)
        self._eval_journal = Journal(self.accelerator)
        self.add_callback(_StepCallback(self))
        self._guard: NanGuard | None = None
        if args.stop_on_nan:
            self._guard = NanGuard(self.accelerator, self._record_name, lambda: self.deepspeed)
            self.add_callback(self._guard)
        self.watch(args.watchdog_seconds, self._record_name)

    # Losses

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | None]:
        """Take the micro-batches of one optimizer step, and count what its losses are divided by, over all ranks."""
        if self._has_nothing_to_do():
            return [], None
        batches: list[dict[str, Tensor]] = []
        for batch in epoch_iterator:
            batches.append(batch)
            if len(batches) == num_batches:
                break
        if self.watchdog is not None:
            self.watchdog.rows_of_step([batch["record_index"].tolist() for batch in batches])
            self.watchdog.enter("counting targets over all ranks", step=self.state.global_step + 1)
        counts = count_targets(batches, device)
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        return batches, counts

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss, times the number of ranks (which average their gradients).

        Args:
            num_items_in_batch: (2,), supervised tokens and labelled queries of the step; None: of this batch.
        """
        is_training = model.training
        counts = num_items_in_batch
        if counts is None or counts.shape != (2,):
            counts = count_targets([inputs], inputs["labels"].device)
        forward = self._forward(model, inputs)
        loss = step_loss(forward.lm_losses_S, forward.router_losses_Q, counts, self._effective_router_weight)
        journal = self._train_journal if is_training else self._eval_journal
        journal.add(inputs, forward)
        if is_training:
            loss = loss * self.accelerator.num_processes
            if self._guard is not None:
                self._guard.watch(loss, inputs["record_index"])
        return (loss, forward.outputs) if return_outputs else loss

    @property
    def _effective_router_weight(self) -> float:
        # A frozen router learns nothing, and its loss should not push the embeddings that it reads.
        return self.router_loss_weight if self.trains_router else 0.0

    def _forward(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Forward:
        if self.trains_only_router:
            backend = self._two_branch.config.text_config.ffn_implementation
            with router_forward(self._two_branch, self._two_branch.model.router, backend):
                routed = model(features=inputs["features"], feature_mask=inputs["feature_mask"])
            nothing = torch.zeros(0, device=routed.router_logits.device)
            return Forward(routed, nothing, query_losses(routed.router_logits, inputs["router_labels"]))
        arguments = {name: value for name, value in inputs.items() if name not in _NOT_FOR_THE_MODEL}
        use_packed_attention(self._two_branch, arguments)
        with losses_per_token(self._two_branch), self._presence.ensured(arguments):
            outputs = model(**arguments, use_cache=False)
        labels = inputs.get("router_labels")
        losses = None if labels is None else query_losses(outputs.router_logits, labels)
        return Forward(outputs, outputs.lm_loss, losses)

    # Evaluation

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss (both parts), logits and labels of one evaluation batch; the router's where only the router trains."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        if self.trains_only_router:
            return loss.detach(), outputs.router_logits.detach(), inputs["router_labels"]
        return loss.detach(), outputs.logits.detach(), inputs["labels"]

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in Trainer; the metrics are those of the whole data set, however it was batched and spread over ranks."""
        self._eval_journal.clear()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        report = self._eval_journal.report(
            self._source_of(dataloader.dataset), self._effective_router_weight, each_record_once=True
        )
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in report.items()})
        return output

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """As in Trainer, also for records, rows and paths; evaluation pads and never packs."""
        if eval_dataset is not None and not isinstance(eval_dataset, str | Rows):
            eval_dataset = self._dataset(eval_dataset)
        with replaced(self, "data_collator", self._eval_collator):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset) -> DataLoader:
        """As in Trainer, also for records, rows and paths."""
        with replaced(self, "data_collator", self._eval_collator):
            return super().get_test_dataloader(
                test_dataset if isinstance(test_dataset, Rows) else self._dataset(test_dataset)
            )

    # Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in Trainer; the training logs also say what `metrics.summarize` and `Journal` report."""
        if "loss" in logs and "learning_rate" in logs and not self._train_journal.is_empty:
            assert isinstance(self.train_dataset, Rows)
            report = self._train_journal.report(self._source_of(self.train_dataset), self._effective_router_weight)
            report.pop("loss", None)  # Trainer's own is the same: the mean over the steps since the last log
            logs.update(report)
            self._train_journal.clear()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Tensor | Any]) -> int:
        """As in Trainer; 0 where only the router runs, whose batches hold no tokens to count."""
        return 0 if self.trains_only_router else super().floating_point_ops(inputs)

    # Optimizer

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """As in Trainer; the router's parameters get `router_learning_rate` where one is set."""
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = self.args.router_learning_rate
        if rate is None or not self.trains_router:
            return optimizer
        router = {id(p) for name, p in self._two_branch.named_parameters() if set_of(name) == "router"}
        for group in list(optimizer.param_groups):
            theirs = [p for p in group["params"] if id(p) in router]
            if theirs:
                group["params"] = [p for p in group["params"] if id(p) not in router]
                settings = {key: value for key, value in group.items() if key not in {"params", "lr", "initial_lr"}}
                optimizer.add_param_group({**settings, "params": theirs, "lr": rate})
        return optimizer

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """As in Trainer; with `max_tokens_per_batch`, batches are filled by tokens."""
        if self.args.max_tokens_per_batch is None or self.train_dataset is None:
            return super().get_train_dataloader()
        if self._sampler is None:
            self._sampler = TokenBudgetSampler(
                self._encoder.lengths(self.train_dataset.records),
                self.args.max_tokens_per_batch,
                self.args.seed if self.args.data_seed is None else self.args.data_seed,
                packed=self.args.packing,
                rank=self.accelerator.process_index,
                world_size=self.accelerator.num_processes,
            )
        # Not `accelerator.prepare`: the sampler already gives each rank its own batches.
        return DataLoader(
            self.train_dataset,
            batch_sampler=self._sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.accelerator.device.type != "cpu",
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def _dataset(self, source: Source) -> Rows:
        records = as_records(source)
        if self._check_data:
            # The router reads prompts: there, whatever stands in the place of a response is right.
            rows = [_with_any_response(record) for record in records] if self.trains_only_router else records
            check_records(rows, purpose="sft", encoder=self._encoder).raise_if_bad()
        if self.trains_only_router:
            return FeatureDataset(records, self._encoder, self._two_branch.model, cache_gib=self._cache_gib)
        return RecordDataset(records, self._encoder, cache_gib=self._cache_gib)

    def _record_name(self, index: int) -> str:
        assert isinstance(self.train_dataset, Rows)
        return self.train_dataset.name(index)

    @staticmethod
    def _source_of(dataset: object) -> Callable[[int], str]:
        assert isinstance(dataset, Rows)
        return lambda index: dataset.records[index].source


def _with_any_response(record: Record) -> Record:
    mode = Branch.NON_THINKING if record.mode is None else record.mode
    return replace(record, response=build_response("-", "-", mode))


class _StepCallback(TrainerCallback):
    """What has to happen around the steps, and after the last one."""

    def __init__(self, trainer: MetisSFTTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._trainer._train_journal.clear()

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        if self._trainer._sampler is not None:
            self._trainer._sampler.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self._trainer
        if trainer.trains_router:
            trainer._two_branch.config.router_trained = True
        # A checkpoint forgets what was not logged yet, so a resumed run would log other numbers than this one.
        if control.should_save:
            control.should_log = True
        return control

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if args.plots and state.is_world_process_zero:
            draw_curves(state.log_history, Path(args.output_dir) / "plots")
