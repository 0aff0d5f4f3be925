"""The FFN of a decoder layer: two stock Qwen2 FFNs and nothing else."""

from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2MLP

from . import ops
from .branch_plan import BranchIds, BranchPlan


class MetisHomeMLP(nn.Module):
    """Two expert branches of plain `nn.Linear`: `experts[0]` non-thinking, `experts[1]` thinking.

    Plain modules, not fused 3-D tensors: adapters, quantisers and tensor-parallel plans act on `nn.Linear`, and a batch
    of one branch costs what the dense layer costs.
    """

    def __init__(self, config) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Qwen2MLP(config) for _ in range(config.num_experts)])
        self.backend = config.ffn_implementation

    def forward(self, x_BTD: Tensor, branch_ids: BranchIds | BranchPlan) -> Tensor:
        """Send each row of `x_BTD` (B, T, D) through the FFN of its branch; see `ops.branch_ffn`."""
        return ops.branch_ffn(x_BTD, self.experts, branch_ids, backend=self.backend)
