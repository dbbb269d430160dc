"""Data parallelism: a copy of the model on each device (DDP), or shards (FSDP2)."""

import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from converters.pretraining.processes import Processes
from converters.pretraining.recipe import PretrainRecipe
from converters.reference import ReferenceOpenELM, summed_loss


class SummedLoss(nn.Module):
    """Module from tokens to summed losses, to be compiled and wrapped for DDP."""

    def __init__(
        self, model: ReferenceOpenELM, *, autocast: bool, z_loss: float
    ) -> None:
        super().__init__()
        self.model, self.autocast, self.z_loss = model, autocast, z_loss

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.autocast):
            logits = self.model(inputs)
        return summed_loss(logits, targets, z_loss=self.z_loss)


def parallelize(
    model: ReferenceOpenELM, recipe: PretrainRecipe, processes: Processes
) -> nn.Module:
    """Move a model to its device, sharded or copied, and return its loss module."""
    model.checkpointing = recipe.activation_checkpointing
    sharded = recipe.parallel == "fsdp" and processes.count > 1
    loss: nn.Module = SummedLoss(
        model,
        autocast=recipe.bf16 and not sharded,
        z_loss=recipe.optimizer.z_loss,
    )
    if sharded:
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if recipe.bf16 else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # the rotary angles stay float32
        )
        # Harmless, as nothing writes to the views.
        warnings.filterwarnings("ignore", ".* returned a view tensor.*")
        mesh = dist.init_device_mesh(processes.device.type, (processes.count,))
        for block in model.layers:
            if recipe.compile:
                block.compile()
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        return loss
    model.to(processes.device)
    if recipe.compile:
        loss.compile()
    if processes.count > 1:
        loss = DistributedDataParallel(loss, gradient_as_bucket_view=True)
    return loss
