"""What ranks of tensor parallelism do together, within CUDA graphs too: by the communicator that
vLLM's own layers use there. vLLM's other ways to reduce know sums alone."""

import torch
import torch.distributed as dist

from vllm.distributed.parallel_state import GroupCoordinator


def all_reduce(group: GroupCoordinator, x: torch.Tensor, op: dist.ReduceOp) -> None:
    """In place."""
    if nccl := _nccl(group, x):
        nccl.all_reduce(x, x, op=op)
    else:
        dist.all_reduce(x, op, group=group.device_group)


def all_gather(group: GroupCoordinator, out: torch.Tensor, part: torch.Tensor) -> None:
    """``out``: ``[ranks * rows, ...]``, filled with each rank's ``part`` (``[rows, ...]``)."""
    if nccl := _nccl(group, part):
        nccl.all_gather(out, part)
    else:
        dist.all_gather_into_tensor(out, part, group=group.device_group)


def _nccl(group: GroupCoordinator, x: torch.Tensor):
    communicator = getattr(group.device_communicator, "pynccl_comm", None)
    usable = x.is_cuda and communicator is not None and not communicator.disabled
    return communicator if usable else None
