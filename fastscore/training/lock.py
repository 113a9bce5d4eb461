"""One writer of a folder at a time."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fastscore.training import files

NAME = ".lock"


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Within: no other process is within for the same folder.

    The system ends the lock with its owner, so what a dead one left is no obstacle.

    Raises:
        ValueError: another process is; the message has its number.
    """
    path = folder / NAME
    file = open(path, "a+b", buffering=0)
    while not _is_ours(file, path):
        file.close()
        file = open(path, "a+b", buffering=0)

    try:
        # On a full disk without the number.
        with contextlib.suppress(OSError):
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        yield
    finally:
        # Before the lock ends: whoever opened it meanwhile sees that it is gone.
        path.unlink(missing_ok=True)
        file.close()


def _is_ours(file, path):
    """Whether we hold the file that has this name now; another's is refused."""
    if not files.hold(file):
        file.seek(0)
        owner = file.read().decode(errors="replace") or "unknown"
        file.close()
        raise ValueError(
            f"the run in {path.parent} is being written by another process ({owner}); wait for its "
            "end, or end it."
        )
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
