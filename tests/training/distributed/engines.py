"""How the trainer's engines run on a CPU: what of it is only for tests is in this file.

DDP         no trick: `use_cpu=True` under torchrun is accelerate's MULTI_CPU.
ZeRO-2, -3  accelerate knows no backend for DeepSpeed on a CPU and would start worlds of one process. Configuring its
            state with the backend beforehand (its public `use_configured_state`) is enough; nothing is patched.
FSDP2       accelerate turns FSDP on for GPUs and the like only, and says nothing: it would train with DDP. So the test
            overwrites one word of its state, the kind of the distributed run (MULTI_CPU becomes MULTI_GPU). All that
            follows is the real thing: accelerate's plugin, its `fully_shard` calls, DTensors, on a mesh of CPUs.
"""

import os
from importlib.resources import files

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
# The layers of the shipped recipe home_sft_7b_fsdp2.yaml.
FSDP_LAYERS = ["MetisHomeDecoderLayer", "Qwen2_5_VLVisionBlock"]


def prepare_state(engine: str) -> None:
    """Configure accelerate for this engine, before the trainer's config is made; once per trainer."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    AcceleratorState._reset_state(reset_partial_state=True)
    if engine in ("zero2", "zero3"):
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
        del os.environ["ACCELERATE_USE_DEEPSPEED"]
    elif engine == "fsdp2":
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def settings(engine: str) -> dict[str, object]:
    """Fields of the trainer's config."""
    configured = {"accelerator_config": {"use_configured_state": True}}
    if engine == "fsdp2":
        layers = {"transformer_layer_cls_to_wrap": FSDP_LAYERS}
        wrapping = {
            "fsdp_version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "state_dict_type": "FULL_STATE_DICT",
        }
        return {**configured, "fsdp": "full_shard", "fsdp_config": {**layers, **wrapping}}
    if engine in ("zero2", "zero3"):
        shipped = files("metis_home.training") / "deepspeed" / f"{engine}.json"
        return {**configured, "use_cpu": False, "deepspeed": str(shipped)}
    return {}


def identity(trainer) -> dict[str, object]:
    """What shows that a trainer really ran on its engine."""
    import torch.distributed as dist

    wrapped = trainer.model_wrapped
    parameters = list(trainer.model.named_parameters())
    return {
        "world": trainer.accelerator.num_processes,
        "group": dist.get_world_size() if dist.is_initialized() else 1,
        "backend": dist.get_backend() if dist.is_initialized() else None,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "classes": [kind.__name__ for kind in type(wrapped).__mro__],
        "dtensors": sum(hasattr(parameter, "placements") for _, parameter in parameters),
        "partitioned": sum(getattr(p, "ds_tensor", None) is not None for _, p in parameters),
        "parameters": len(parameters),
        "stage": wrapped.zero_optimization_stage() if hasattr(wrapped, "zero_optimization_stage") else None,
        "leaf_modules": sum(getattr(m, "_z3_leaf", False) for m in trainer.model.modules()),
    }
