"""Process groups: one small object that says who we are and sums things; a single process needs no special case."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lavis.core.errors import ConfigError


@dataclass(frozen=True)
class World:
    """This process among all ranks (torchrun's environment; one rank without it)."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    """The ranks that are counted in `rank` and `size`; None is all of them."""
    leads: bool | None = None
    """Whether this rank writes logs and files; None says it of rank 0."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs and files."""
        return self.rank == 0 if self.leads is None else self.leads

    @property
    def exact(self) -> torch.dtype:
        """The type in which sums over ranks are made."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, which is this rank's own, summed over ranks in place. No one waits for it: nothing is read."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def sum(self, *values: float) -> list[float]:
        """Element-wise sum over ranks, in fp64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, *values: float) -> list[float]:
        """Element-wise largest over ranks, in fp64."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Sequence[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=self.exact, device=self.device)
        dist.all_reduce(tensor, op, group=self.group)
        return tensor.tolist()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.group)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` on every rank (any picklable object; it stays among the ranks of one run)."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def local_main_first(self) -> Iterator[None]:
        """Run the body on the first rank of each host, then on the others: for work that leaves its result on disk."""
        if self.local_rank != 0:
            self.barrier()
        yield
        if self.local_rank == 0:
            self.barrier()


@contextmanager
def world(device: str = "auto", timeout: timedelta = timedelta(hours=2), *, always: bool = False) -> Iterator[World]:
    """Join the process group that torchrun's environment describes (nccl on CUDA, gloo on CPU), and leave it at the
    end.

    `device`: auto, cpu or cuda. `always`: make a group also for a single rank. Raises ConfigError when CUDA is asked
    for and absent, or the environment is half there.
    """
    rank, local_rank, size = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    if size > 1 and "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            f"WORLD_SIZE is {size} but MASTER_ADDR is not set: start with torchrun, or unset WORLD_SIZE to train in one"
            " process."
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device is cuda but no CUDA device is visible: set run.device=cpu or auto.")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    where = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(where)
    joined = (size > 1 or always) and not dist.is_initialized()
    if joined:
        alone: dict[str, Any] = {} if size > 1 else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(
            "nccl" if use_cuda else "gloo", timeout=timeout, device_id=where if use_cuda else None, **alone
        )
    try:
        yield World(rank, local_rank, size, where)
    finally:
        if joined:
            dist.destroy_process_group()
