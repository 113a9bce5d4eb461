"""How much memory there is, so that what declares more is refused before it is read."""

import contextlib
import resource
from pathlib import Path


def available() -> int:
    """Bytes that this process may still take: of the machine, its control group and its limits."""
    bounds = [_of_machine(), *_of_group(), *_of_limits()]
    return max(0, min(bounds))


def _of_machine():
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    # Where nothing tells: what a small machine has.
    return 2**32


def _of_group():
    folder = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        # "max", which is no number, where there is no bound.
        yield int((folder / "memory.max").read_text()) - int(
            (folder / "memory.current").read_text()
        )


def _of_limits():
    with contextlib.suppress(OSError, ValueError):
        pages = Path("/proc/self/statm").read_text().split()
        page = resource.getpagesize()
        for limit, used in ((resource.RLIMIT_AS, pages[0]), (resource.RLIMIT_DATA, pages[5])):
            soft = resource.getrlimit(limit)[0]
            if soft != resource.RLIM_INFINITY:
                yield soft - int(used) * page


def check(needed: int, what: str, remedy: str = "") -> None:
    """Refuse what does not fit.

    >>> check(2**60, "x.npz: its array")
    Traceback (most recent call last):
        ...
    ValueError: x.npz: its array takes 1073741824.0 GiB, more than the memory that is free.
    """
    if needed > available():
        raise ValueError(
            f"{what} takes {needed / 2**30:.1f} GiB, more than the memory that is free{remedy}."
        )
