"""The processes of one training: what is whose, what they decide together, and their restarts."""

import contextlib
import gc
import os
import re
import socket
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn

from fastscore import distributed
from fastscore.training import files

# In a folder: who writes it.
JOB = ".torchrun"

# Longer than any save, and than the first compilation of a network.
_LONGEST_WAIT = timedelta(days=7)


class Ranks:
    """This process among those that train one network; alone unless it is told otherwise.

    Every process calls the same methods in the same order.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self.device = _device()
        # What a process decides lies on the CPU, and waits for no GPU.
        self._group = None
        if size > 1:
            self._group = torch.distributed.new_group(backend="gloo", timeout=_LONGEST_WAIT)
        self.ending = False

    @property
    def leads(self) -> bool:
        """Whether it is the one that writes and prints."""
        return self.rank == 0

    def parts(self, n: int, pieces: int = 1) -> list[tuple[int, int]]:
        """(first, count) of this process's pieces of n samples, all of one size."""
        count = n // (self.size * pieces)
        return [((self.rank * pieces + k) * count, count) for k in range(pieces)]

    def wrapped(self, net: nn.Module) -> nn.Module:
        """The network as it is called in training: its gradient is that of all processes."""
        if self.size == 1:
            return net
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(net, device_ids=devices)

    def highest(self, value: int) -> int:
        """The highest of the values that the processes give."""
        return int(self.rows(torch.tensor(value)).max())

    def ends(self, signal: int | None) -> int | None:
        """The signal that ends all processes now; None where none has got any."""
        if self.size == 1:
            return signal
        found = self.highest(signal or 0)
        self.ending = found > 0
        return found or None

    def rows(self, t: Tensor) -> Tensor:
        """The tensors that the processes give, (size, *), on the CPU."""
        t = t.cpu()
        if self.size == 1:
            return t[None]
        found = [torch.empty_like(t) for _ in range(self.size)]
        torch.distributed.all_gather(found, t, group=self._group)
        return torch.stack(found)

    def meet(self) -> None:
        """Wait until all processes are here."""
        self.highest(0)

    def check_same(self, name: str, value: int) -> None:
        """Raise ValueError unless all processes have the value."""
        found = self.rows(torch.tensor(value)).tolist()
        if len(set(found)) > 1:
            other = next(k for k, v in enumerate(found) if v != found[0])
            raise ValueError(
                f"train: {name} must be the same for all processes; it is {found[0]} for rank 0 "
                f"and {found[other]} for rank {other} (the run and the data must be on a file "
                "system that they share)."
            )


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Within: the processes that torchrun has started train together; alone without it.

    Raises:
        ValueError: there is nowhere to meet, or a process has no GPU of its own.
        ConnectionError: another process has ended.
    """
    rank, size = distributed.environment()
    if size == 1:
        yield Ranks()
        return

    import torch.distributed as dist

    if "MASTER_ADDR" not in os.environ:
        raise ValueError(
            "train: the processes meet at MASTER_ADDR and MASTER_PORT, which are not set; start "
            "them with torchrun."
        )
    cuda = _device().type == "cuda"
    if cuda:
        torch.cuda.set_device(_device())
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    options = {"rank": rank, "world_size": size, "timeout": _LONGEST_WAIT}
    dist.init_process_group(backend, store=_meeting_place(rank, size), **options)
    try:
        with _told_where_others_end(rank):
            yield Ranks(rank, size)
    except BaseException as error:
        # What it holds on to must go before the group: the last to hold a group waits for its
        # threads, which may wait for the interpreter.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        gc.collect()
        dist.destroy_process_group()


def _meeting_place(rank, size):
    """torchrun's store; but in a corner of its own after each restart.

    Where torchrun keeps one store for all of them (torch 2.13, --standalone), gloo else finds the
    addresses of the processes that have ended, and waits for them in vain.
    """
    import torch.distributed as dist

    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=_LONGEST_WAIT))
    return dist.PrefixStore(f"fastscore {_restarts()}", store)


def _restarts():
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


@contextlib.contextmanager
def _told_where_others_end(rank):
    try:
        yield
    except RuntimeError as error:
        if not re.search("gloo|NCCL|process group|closed by peer", str(error)):
            raise
        raise ConnectionError(
            f"train: rank {rank} has lost another process, which has ended before it; its message "
            "says why."
        ) from None


def _job():
    """A name of the torchrun that has started this process, the same after its restarts."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name is None:
        return None
    # Names are given twice: on one machine, its process says which it is.
    alone = os.environ.get("GROUP_WORLD_SIZE") == "1"
    return f"{name} {socket.gethostname()} {os.getppid()}" if alone else name


def claim(folder: Path) -> None:
    """Write into a folder that this torchrun, which may restart its processes, writes it."""
    name = _job()
    if name is not None:
        files.write_atomic(folder / JOB, name.encode())


def release(folder: Path) -> None:
    """Take back what `claim` has written: a restart is to refuse the folder."""
    (folder / JOB).unlink(missing_ok=True)


def goes_on(folder: Path) -> bool:
    """Whether torchrun has started this process again in the place of one that wrote the folder."""
    if _restarts() == 0:
        return False
    path = folder / JOB
    return path.exists() and path.read_bytes() == str(_job()).encode()


def _device():
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", 0))
    if number >= torch.cuda.device_count():
        raise ValueError(
            f"train: each process must have a GPU of its own; LOCAL_RANK is {number}, and there "
            f"are {torch.cuda.device_count()} (torchrun --nproc-per-node)."
        )
    return torch.device("cuda", number)
