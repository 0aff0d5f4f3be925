"""Resuming from checkpoints in the hub layout.

Trainer saves with `save_pretrained`, which writes hub names (`visual.*`, `model.layers.*`), and resumes with
`load_state_dict`, which wants the names in memory (`model.visual.*`, `model.language_model.layers.*`), not strictly: of
every Qwen2.5-VL model, dense or two-branch, it would load next to nothing and go on from whatever the weights were, with
no more than a warning.
"""

from pathlib import Path

import torch
from torch import nn

from ..errors import CheckpointError
from ..names import to_hub_name


class HubLayoutResume:
    """For subclasses of Trainer, first among their bases: weights come back from the names they were saved under."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._loads_by_itself(resume_from_checkpoint):
            load_weights(self.model, resume_from_checkpoint)  # type: ignore[attr-defined]
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint  # type: ignore[attr-defined]
        if self._loads_by_itself(best):
            load_weights(self.model, best)  # type: ignore[attr-defined]
        else:
            super()._load_best_model()  # type: ignore[misc]

    def get_batch_samples(self, *args, **kwargs):
        """As in Trainer; nothing where all steps are done."""
        return ([], None) if self._has_nothing_to_do() else super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]

    def _has_nothing_to_do(self) -> bool:
        """Are all steps done? Then training ends. Trainer looks at `max_steps` only after a step, so a run that is
        resumed from its last checkpoint would make one more."""
        is_done = self.state.global_step >= self.state.max_steps  # type: ignore[attr-defined]
        if is_done:
            self.control.should_training_stop = True  # type: ignore[attr-defined]
        return is_done

    def _loads_by_itself(self, directory: str) -> bool:
        # FSDP and DeepSpeed keep files of their own, adapters are loaded by peft.
        is_wrapped = self.is_fsdp_enabled or self.is_deepspeed_enabled or hasattr(self.model, "peft_config")  # type: ignore[attr-defined]
        return not is_wrapped and any(Path(directory).glob("model*.safetensors"))


@torch.no_grad()
def load_weights(model: nn.Module, directory: str | Path) -> None:
    """Copy the weights of a saved model, dense or two-branch, into `model`, whichever layout the files have.

    Raises:
        CheckpointError: a weight of the model is not there, or has another shape; one that the model does not have.
    """
    from safetensors import safe_open

    state = model.state_dict()
    in_memory = {to_hub_name(name): name for name in state}
    loaded = set()
    for file in sorted(Path(directory).glob("model*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  # no mapping
                name = in_memory.get(to_hub_name(key))
                if name is None:
                    raise CheckpointError(f"{file} holds {key!r}, which this model does not have.")
                tensor = opened.get_tensor(key)
                if tensor.shape != state[name].shape:
                    raise CheckpointError(
                        f"{file}: {key} has the shape {tuple(tensor.shape)}, this model's is {tuple(state[name].shape)}."
                    )
                state[name].copy_(tensor)
                loaded.add(state[name].data_ptr())
    missing = sorted(name for name, tensor in state.items() if tensor.data_ptr() not in loaded)
    if missing:  # tied weights are stored once
        raise CheckpointError(
            f"{directory} lacks {len(missing)} weights of this model; the first is {missing[0]!r}. "
            "Resume with the model that the run was started with."
        )
