"""What each process does where ranks share servers: Stage-RL on sharded weights, which are gathered to be sent."""

import sys
from pathlib import Path

import torch

from metis_home.training.rl import MetisRLConfig, MetisRLTrainer
from tests.training.distributed import engines
from tests.training.distributed.rl_worker import many_letters, records
from tests.training.distributed.worker import full_weights
from tests.training.sft.small import processor


def train(engine: str, model_dir: str, out: Path, thinking: str, non_thinking: str) -> dict:
    from metis_home import MetisHomeForConditionalGeneration

    engines.prepare_state(engine)
    args = MetisRLConfig(
        output_dir=str(out),
        engine="server",
        server_urls=[thinking],
        server_urls_non_thinking=[non_thinking],
        thinking="sample",
        freeze=["norms"],
        num_generations=2,
        prompts_per_step=4,
        max_completion_tokens=6,
        max_steps=2,
        dynamic_sampling=False,
        learning_rate=1e-2,
        self_check_tolerance=1e-3,
        system_prompt=None,
        report_to="none",
        save_strategy="no",
        plots=False,
        log_completions=False,
        disable_tqdm=True,
        seed=7,
        watchdog_seconds=120,
        **{"use_cpu": True, **engines.settings(engine)},
    )
    model = MetisHomeForConditionalGeneration.from_pretrained(model_dir)
    trainer = MetisRLTrainer(model, args, [many_letters], records(), processor())
    trainer.train()
    trainer.engine.update_weights(trainer.base)
    logs = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    return {"logs": logs, "weights": full_weights(trainer), "identity": engines.identity(trainer)}


if __name__ == "__main__":
    engine, model_dir, out, *urls = sys.argv[1:]
    result = train(engine, model_dir, Path(out), *urls)
    torch.save(result, Path(out) / f"rank{torch.distributed.get_rank()}.pt")
