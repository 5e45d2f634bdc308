"""Several processes that learn as one; the only file that knows torch.distributed.

    torchrun --nproc-per-node 4 -m minidino.cli train --preset imagenette-gpu run.parallel=fsdp

Each process takes its rows of every batch. What a batch decides as a whole, Sinkhorn's columns, KoLeo's neighbours, gradients
and losses, is reduced over all of them, so that their number changes nothing but the time. In a process that was not started
by torchrun every function here is the identity.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from minidino.runs import command

# ---------------------------------------------------------------- who is there


@contextmanager
def together() -> Iterator[None]:
    """Meet the other processes that torchrun has started; only the first of them prints. Alone it does nothing.

    torchrun keeps one store of addresses for all its restarts, where a process may find that of a dead one. On one machine
    the number of the restart tells them apart; several machines count each for itself, and want
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, number, size = next(dist.rendezvous("env://"))
    one_machine = os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]
    store = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store) if one_machine else store
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", store=store, rank=number, world_size=size)
    try:
        with open(os.devnull, "w") as nowhere, nullcontext() if is_first() else redirect_stdout(nowhere):
            yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Of this process; 0 where there is one alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def n_processes() -> int:
    """How many learn together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Is this the process that writes?"""
    return rank() == 0


def restarted() -> bool:
    """Has torchrun replaced the processes, because one was lost? All have to ask: its own machine alone counts that."""
    count = torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
    return all_reduce(count.cuda() if torch.cuda.is_available() else count, op="max").item() > 0


def interrupted(folder: Path) -> bool:
    """Has torchrun replaced processes that had begun this run, or these runs, by this same command?"""
    begun = restarted() and any(
        json.loads(path.read_text()).get("command") == command()
        for path in folder.rglob("environment.json") if path.with_name("config.json").exists()
    )  # fmt: skip
    wait()  # none begins while another still looks
    return begun


@contextmanager
def first_goes_first() -> Iterator[None]:
    """A block that the first process leaves before the others enter: it writes what they read."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()


def wait() -> None:
    """Until all are here."""
    if dist.is_initialized():
        dist.barrier()


# ---------------------------------------------------------------- what they tell each other


def all_reduce(tensor: Tensor, op: str = "sum") -> Tensor:
    """The sum or maximum of this tensor over all processes, of the same shape in each.

    Raises:
        ValueError: another operation.
    """
    if op not in ("sum", "max"):
        raise ValueError(f"expected op 'sum' or 'max', got {op!r}")
    if not dist.is_initialized():
        return tensor
    reduced = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(reduced, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
    return reduced


def mean(tensor: Tensor) -> Tensor:
    """The mean of this tensor over all processes."""
    return all_reduce(tensor) / n_processes() if dist.is_initialized() else tensor


def gather(x: Tensor) -> Tensor:
    """The rows of all processes, (B, ...) -> (R * B, ...), in the order of ranks; gradients find their way back."""
    return _Gather.apply(x) if dist.is_initialized() else x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(n_processes())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce(grad).chunk(n_processes())[rank()]  # each process has its own loss of these rows


def my_rows(n: int, n_parts: int = 1) -> Tensor:
    """Which of the n images of a batch are this process's: its share of each part in which the batch is computed.

    Returns:
        Row numbers (n / R,); part i of the batch is made of part i of every process.
    Raises:
        ValueError: n is no multiple of parts times processes.
    """
    if n % (n_parts * n_processes()):
        raise ValueError(
            f"optim.batch_size: expected a multiple of {n_parts * n_processes()} (optim.accumulate {n_parts} times "
            f"{n_processes()} processes), got {n}"
        )
    return torch.arange(n).view(n_parts, n_processes(), -1)[:, rank()].flatten()


# ---------------------------------------------------------------- networks that learn together


class Door(nn.Module):
    """Lets a call in to a network through `forward`, where DDP and FSDP stand and watch."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return work(self.network, *args, **kwargs)


def replicate(door: Door) -> nn.Module:
    """Each process has the whole network; gradients are averaged after each backward pass (DDP)."""
    devices = [torch.cuda.current_device()] if next(door.parameters()).is_cuda else None
    # without iBOT, or with the backbone held still, some parameters see no gradient; where all do, DDP would say so
    warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
    return DistributedDataParallel(door, devices, find_unused_parameters=True, gradient_as_bucket_view=True)


def shard(door: Door, bf16: bool = False) -> nn.Module:
    """Each process has its part of every parameter, and sees the rest of a block while it computes it (FSDP2).

    Args:
        door: to a network whose `backbone.blocks` are fetched one after the other; the rest is fetched at once.
        bf16: parameters travel in bfloat16; gradients always in float32, of backbone and heads.
    Source: official dinov2/fsdp (b8931f7), where only the gradients of heads travel in float32.
    """
    policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32, cast_forward_inputs=False)
    mesh = dist.init_device_mesh("cuda" if next(door.parameters()).is_cuda else "cpu", (n_processes(),))
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # returns views; nothing here writes into them
    for block in door.network.backbone.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(door, mesh=mesh, mp_policy=policy, reshard_after_forward=True)  # a teacher has no backward pass


def gradients_wait(door: nn.Module, more: bool) -> AbstractContextManager:
    """A block whose backward passes keep their gradients here, where `more` come; the last takes them along (DDP)."""
    return door.no_sync() if more and isinstance(door, DistributedDataParallel) else nullcontext()


def shard_moments(optimizer: torch.optim.Optimizer) -> None:
    """Cut what an optimizer has loaded for whole parameters as the parameters are cut."""
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            if isinstance(parameter, DTensor) and value.shape == parameter.shape and not isinstance(value, DTensor):
                kept[name] = distribute_tensor(value, parameter.device_mesh, parameter.placements)


def here(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The part of each tensor that this process holds."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def whole(tree: Any) -> Any:
    """The same dictionaries, lists and tensors with all parts put together; every process has to ask."""
    if isinstance(tree, DTensor):
        return tree.full_tensor()
    if isinstance(tree, dict):
        return type(tree)((key, whole(value)) for key, value in tree.items())
    return [whole(value) for value in tree] if isinstance(tree, list) else tree
