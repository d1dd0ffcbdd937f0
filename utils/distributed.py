"""How several processes train one network: who am I, who writes, and what is put together.

    torchrun --nproc_per_node N Label-smoothing.py ...

starts N processes that each run the whole script; one process without torchrun is the case N = 1 of
everything here. Each takes its share of every batch (`Shard`), DistributedDataParallel averages the
gradients, and what is counted or collected is put together exactly. Only the first process writes
and speaks.
"""

import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.errors import InputError


class Shard(NamedTuple):
    """Which part of every batch is this process's: of `count` processes it is number `rank`."""

    rank: int = 0
    count: int = 1


WHOLE = Shard()


def shard() -> Shard:
    if not dist.is_initialized():
        return WHOLE
    return Shard(dist.get_rank(), dist.get_world_size())


def is_first() -> bool:
    return shard().rank == 0


def refuse_torchrun(why: str) -> None:
    """For scripts of which several processes would do the same. Raises InputError."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(f"started by torchrun, but {why}")


def start(device: torch.device) -> torch.device:
    """Joins the processes that torchrun started, if it did. Returns this process's device.

    NCCL connects GPUs, of which each process of a machine takes its own; Gloo connects CPUs.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return device
    if device.type == "cuda":
        number, available = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= available:
            raise InputError(
                f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes on this machine, but "
                f"it has {available} GPUs; --nproc_per_node {available} would do"
            )
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    if not is_first():
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115, open to the end
    return device


def end() -> None:
    """Leaves the other processes, when all is done."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def total(values: Tensor, device: torch.device) -> Tensor:
    """The sum over all processes of a float64 tensor, on the CPU."""
    if dist.is_initialized():
        values = values.to(device)
        dist.all_reduce(values)
    return values.cpu()


def gather_rows(rows: Tensor, count: int) -> Tensor:
    """Puts together what the processes have computed for their shares of `count` rows.

    rows: (n, ...), of the rows rank, rank + N, rank + 2N ... of the whole. Returns (count, ...).
    """
    part = shard()
    if part.count == 1:
        return rows
    padded = rows.new_zeros(-(-count // part.count), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(part.count)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, 1).flatten(0, 1)[:count]


SYNCHRONISED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def not_synchronised(model: nn.Module) -> set[str]:
    """Classes of batch norm in the network whose statistics `over_processes` cannot share.

    Those that calculate something of their own, such as timm's BatchNormAct2d, which torch's
    SyncBatchNorm would replace without its activation.
    """
    return {
        type(module).__name__
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module) not in SYNCHRONISED
    }


def over_processes(model: nn.Module) -> nn.Module:
    """The network as it is to be called in training: gradients, and the statistics of batch norm,
    are those of the whole batch. The model itself keeps its parameters and their names."""
    if not dist.is_initialized():
        return model
    if next(model.parameters()).device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:
        for module in model.modules():
            if type(module) in SYNCHRONISED:
                module.__class__ = _SynchronisedBatchNorm  # parameters, buffers and names stay
    return nn.parallel.DistributedDataParallel(model)


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce. Every process's loss depends on every summand, so gradients are summed too."""

    @staticmethod
    def forward(context, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        return _SumOverProcesses.forward(context, gradient)


class _SynchronisedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the images of all processes. torch.nn.SyncBatchNorm has no CPU version."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # checked by the class that this one stands in for

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        dims = [0, *range(2, input.dim())]
        shape = (1, -1, *[1] * (input.dim() - 2))
        with torch.autocast(input.device.type, enabled=False):
            x = input.float()
            sums = torch.cat([x.sum(dims), x.new_full((1,), x.numel() / x.shape[1])])
            sums = _SumOverProcesses.apply(sums)
            count = sums[-1]
            mean = sums[:-1] / count
            # Centred first: E[x²] - E[x]² would lose what is small beside the mean.
            squares = (x - mean.view(shape)).square().sum(dims)
            variance = _SumOverProcesses.apply(squares) / count
            normalised = (x - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
            if self.affine:
                normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return normalised.to(input.dtype)
