"""What each process of a distributed test does: short training runs, their numbers written for the test to compare."""

import os
import sys
from pathlib import Path

import torch
import transformers
from packaging import version
from torch import Tensor

from metis_home.router import IGNORE
from tests.training.distributed import engines, measure
from tests.training.distributed.cases import CASES, Case, records, rows


def train_case(case: Case, engine: str, model_dir: str, out: Path, world: int, **overrides) -> dict:
    """Train as `case` says and return {losses, gradients, weights, identity}."""
    from metis_home import MetisHomeForConditionalGeneration
    from metis_home.training.sft import MetisSFTTrainer
    from tests.training.sft.small import config, processor

    data = records(case)
    per_step = len(data) // case.steps
    if world > 1:
        engines.prepare_state(engine)
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": per_step // 2 // world,
        "max_steps": case.steps,
        "max_grad_norm": 0,
        "train_sampling_strategy": "sequential",
        "check_data": False,
        "optim": "adamw_torch",
        **(engines.settings(engine) if world > 1 else {}),
        **case.settings,
        **overrides,
    }
    args = config(out, **settings)  # before the model: ZeRO-3 partitions it while it is loaded
    model = MetisHomeForConditionalGeneration.from_pretrained(model_dir)
    trainer = MetisSFTTrainer(model, args, train_dataset=data, processing_class=processor())
    if case.hidden:
        hide_targets(trainer, case.hidden)
    gradients: dict[str, Tensor] = {}
    held: dict[str, int] = {}
    keep_gradients(trainer, engine if world > 1 else "none", gradients, held)
    trainer.train()
    held |= {"weights": measure.weight_bytes(trainer), "optimizer": measure.optimizer_bytes(trainer)}
    logs = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    return {
        "losses": [entry["loss"] for entry in logs],
        "grad_norms": [float(entry.get("grad_norm", 0)) for entry in logs],
        "gradients": gradients,
        "weights": full_weights(trainer),
        "identity": engines.identity(trainer),
        "bytes": held,
    }


def hide_targets(trainer, hidden: tuple[int, ...]) -> None:
    collate = trainer.data_collator

    def hiding(examples):
        batch = collate(examples)
        for row, index in enumerate(batch["record_index"].tolist()):
            if index in hidden:
                batch["labels"][row] = IGNORE
        return batch

    trainer.data_collator = hiding


def keep_gradients(trainer, engine: str, into: dict[str, Tensor], held: dict[str, int] | None = None) -> None:
    """Copy the whole gradients of each step, before the optimizer uses them, and note this rank's bytes of them."""
    held = {} if held is None else held
    from transformers import TrainerCallback

    if engine in ("zero2", "zero3"):
        # DeepSpeed's backward also steps: read in between.
        prepare = trainer.accelerator.prepare

        def prepared(*args, **kwargs):
            result = prepare(*args, **kwargs)
            found = result[0] if isinstance(result, tuple) else result
            if hasattr(found, "zero_optimization_stage"):
                step = found.step

                def reading_step(*args, **kwargs):
                    from deepspeed.utils import safe_get_full_grad

                    for name, parameter in found.module.named_parameters():
                        if parameter.requires_grad:
                            gradient = safe_get_full_grad(parameter)
                            if gradient is not None:
                                into[name] = gradient.detach().clone()
                    held["gradients"] = measure.gradient_bytes(trainer)
                    return step(*args, **kwargs)

                found.step = reading_step
            return result

        trainer.accelerator.prepare = prepared
        return

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            held["gradients"] = measure.gradient_bytes(trainer)
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    gradient = parameter.grad
                    gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
                    into[name.removeprefix("module.")] = gradient.detach().clone()

    trainer.add_callback(Keep())


def full_weights(trainer) -> dict[str, Tensor]:
    """Every weight, whole, on every rank."""
    weights = {}
    for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters(parameter):
                weights[name] = parameter.detach().clone()
        elif hasattr(parameter, "full_tensor"):
            weights[name] = parameter.detach().full_tensor().clone()
        else:
            weights[name] = parameter.detach().clone()
    return weights


def train_cycle(engine: str, model_dir: str, out: Path, world: int) -> dict:
    """Train four steps with a checkpoint after two, evaluate, save; then resume from the checkpoint and do it again."""
    from metis_home import MetisHomeForConditionalGeneration
    from metis_home.training.data.records import load_records
    from metis_home.training.sft import MetisSFTTrainer
    from tests.training.sft.small import config, processor

    def trainer(**overrides):
        if world > 1:
            engines.prepare_state(engine)
        args = config(
            out,
            **{
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 4 // world,
                "per_device_eval_batch_size": 3,
                "max_steps": 4,
                "max_grad_norm": 0.5,
                "save_strategy": "steps",
                "save_steps": 2,
                "optim": "adamw_torch",
                "watchdog_seconds": 60,
                **(engines.settings(engine) if world > 1 else {}),
                **overrides,
            },
        )
        if engine == "ddp" and version.parse(transformers.__version__) < version.parse("5.23"):
            # Older ones load the optimizer onto "cpu:0", which torch does not know; GPUs are not concerned.
            args.__dict__["_setup_devices"] = torch.device("cpu")
        model = MetisHomeForConditionalGeneration.from_pretrained(model_dir)
        data = load_records(rows("IITNNJNTTNNI"))
        return MetisSFTTrainer(
            model, args, train_dataset=data, eval_dataset=load_records(rows("NITJNIT")), processing_class=processor()
        )

    whole = trainer()
    whole.train()
    metrics = whole.evaluate()
    whole.save_model(str(out / "final"))
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    return {
        "weights": full_weights(whole),
        "resumed": full_weights(resumed),
        "losses": [entry["loss"] for entry in whole.state.log_history if "learning_rate" in entry],
        "resumed_losses": [entry["loss"] for entry in resumed.state.log_history if "learning_rate" in entry],
        "metrics": {name: value for name, value in metrics.items() if "second" not in name and "runtime" not in name},
    }


def main() -> None:
    from tests.training.distributed import rl_worker

    torch.set_num_threads(1)
    engine, model_dir, out, *cases = sys.argv[1:]
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    results = {}
    for name in cases:
        print(f"rank {rank}: {name}", flush=True)
        if name == "cycle":
            results[name] = train_cycle(engine, model_dir, Path(out) / name, world)
        elif name.startswith(("scripted", "sampled")):
            results[name] = rl_worker.train(name, engine, model_dir, Path(out) / name, world)
        else:
            results[name] = train_case(CASES[name], engine, model_dir, Path(out) / name, world, watchdog_seconds=60)
    torch.save(results, Path(out) / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
