"""Training on several processes, started by ``torchrun``, with DistributedDataParallel.

Every process has the same network, takes its part of each batch, and gets the mean of all gradients; the
first one writes all files. With a single process every function here does nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from erde.common import progress
from erde.common.errors import UserError

# The others wait while the first one loads data or fills a teacher cache; torchrun ends them if it dies.
PATIENCE = timedelta(days=1)
# This process's rank, kept after it has left the others.
_rank_before = 0


def processes() -> int:
    """The number of processes that share this training."""
    return dist.get_world_size() if _started() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _started() else _rank_before


def is_first() -> bool:
    """Whether this process writes files and messages."""
    return rank() == 0


def start(device: str) -> None:
    """Join the others, if ``torchrun`` started this process as one of several: NCCL on GPUs, Gloo on CPUs."""
    if _started() or os.environ.get("WORLD_SIZE", "1") == "1":
        return
    missing = [
        name for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR") if name not in os.environ
    ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and {missing[0]} is not set: start several processes with torchrun, "
            "or unset WORLD_SIZE"
        )
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > gpus:
            raise UserError(
                f"torchrun started {here} processes on this machine, which has {gpus} GPUs: lower --nproc-per-node, or "
                "set device=cpu"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    atexit.register(finish)
    progress.quiet = not is_first()


def finish() -> None:
    """Leave the others; only the first process has work left."""
    global _rank_before
    if _started():
        _rank_before = dist.get_rank()
        dist.destroy_process_group()


def wait() -> None:
    """Wait until all processes are here."""
    if processes() > 1:
        dist.barrier()


def first_only(work: Callable[[], Any]) -> None:
    """Do ``work`` in the first process, while the others wait; where it fails, they end silently."""
    if processes() == 1:
        work()
        return
    failed = [True]
    try:
        if is_first():
            work()
            failed = [False]
    finally:
        dist.broadcast_object_list(failed, src=0)
    if failed[0]:
        raise SystemExit(2)


def check_batch(batch_size: int) -> None:
    """Raise unless the processes can share a batch equally."""
    if batch_size % processes():
        raise UserError(
            f"train.batch_size is {batch_size}, which {processes()} processes cannot share equally: it is the size of "
            "the whole batch; make it a multiple of their number"
        )


def wrap(module: nn.Module, device: torch.device, unused: bool) -> nn.Module:
    """``module`` with gradients averaged over the processes; ``unused``: some parameters have no part in the loss."""
    if processes() == 1 or not any(parameter.requires_grad for parameter in module.parameters()):
        return module
    return nn.parallel.DistributedDataParallel(
        module,
        device_ids=[device.index] if device.type == "cuda" else None,
        find_unused_parameters=unused,
    )


def without_averaging(module: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """A context without averaging of gradients, for all parts of a batch but the last."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()


def synchronise_batch_norm(network: nn.Module, device: torch.device) -> None:
    """Let batch norm see the whole batch on GPUs; torch has no such layer for CPUs, where it sees a process's part."""
    if processes() > 1 and device.type == "cuda":
        convert_batch_norm(network)


def convert_batch_norm(network: nn.Module) -> None:
    """Batch norm over all processes, in place; heads keep their fixed scales, which torch does not know."""
    fixed = {
        name: vars(module)["fixed_scale"]
        for name, module in network.named_modules()
        if "fixed_scale" in vars(module)
    }
    nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    for name, scale in fixed.items():
        network.get_submodule(name).fixed_scale = scale


def _started() -> bool:
    return dist.is_available() and dist.is_initialized()
