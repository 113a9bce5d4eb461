"""Processes that meet as torchrun's do, without its start: they begin as forks of a server that
has imported what they need."""

import faulthandler
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from typing import Any

SECONDS = 100


def run(number: int, action: Callable[..., Any], *arguments: Any, **options: Any) -> list[int]:
    """Call action(*arguments, **options) in so many processes, whose exit codes are returned."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastscore.cli.train", "torch.distributed.fsdp", "pytest"])
    processes = [
        context.Process(target=_rank, args=(rank, number, port, action, arguments, options))
        for rank in range(number)
    ]
    for process in processes:
        process.start()
    until = time.monotonic() + SECONDS
    for process in processes:
        process.join(max(0.0, until - time.monotonic()) + 10)
    assert not any(process.is_alive() for process in processes), "not done in time"
    return [process.exitcode for process in processes]


def _rank(rank, number, port, action, arguments, options):
    # No child hangs the suite.
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(number),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        # As many as there are wanted, and the same bits everywhere.
        CUDA_VISIBLE_DEVICES="",
    )
    import torch

    torch.set_num_threads(1)
    action(*arguments, **options)
