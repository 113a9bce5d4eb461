"""How much memory there is, so that what declares more is refused before it is read."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")


def available() -> int:
    """Bytes that this process may still take: of the machine, its control group and its limits."""
    return max(0, min([_of_machine(), *_of_group(), *_of_limits()]))


def _of_machine() -> int:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return _table(Path("/proc/meminfo"))["MemAvailable:"] * 1024
    # Where nothing tells: what a small machine has.
    return 2**32


def _table(path):
    """Names and numbers of a file with one of each a line."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}


def _of_group() -> Iterator[int]:
    """Of version 2, or 1. What the system keeps of files counts as free: it goes when needed."""
    for folder, most, taken in (
        (_GROUPS, "memory.max", "memory.current"),
        (_GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        # "max", which is no number, where there is no bound.
        with contextlib.suppress(OSError, ValueError, KeyError):
            kept = _table(folder / "memory.stat")
            files = kept["inactive_file"] + kept["active_file"]
            most, taken = (int((folder / name).read_text()) for name in (most, taken))
            yield most - taken + files


def _of_limits() -> Iterator[int]:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

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
