"""A process that is killed between two file operations, as `kill -9` would."""

import builtins
import os
import shutil
import signal
import time
from collections.abc import Callable

# What changes a disk, or promises that something is on it.
NAMES = ("mkdir", "rename", "replace", "truncate", "unlink", "rmdir", "fsync")
KILLED = 77


def killed_before(number: int, action: Callable[[Callable], None]) -> tuple[list[int], bool]:
    """What a process that does `action` has acknowledged when it is killed before its number-th
    file operation, and whether it got as far as that.

    action: called with a function that takes what is acknowledged, an int below 256.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _count_down(number)
            action(lambda value: os.write(write, bytes([value])))
            status = 0
        finally:
            # Neither pytest's own ends nor its output twice.
            os._exit(status)

    os.close(write)
    acknowledged = _all(read)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, KILLED), status
    return acknowledged, status == KILLED


def killed_after(seconds: float, action: Callable[[Callable], None]) -> list[int]:
    """The same for a process that is killed wherever it is after a time."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            action(lambda value: os.write(write, bytes([value])))
        finally:
            os._exit(1)
    os.close(write)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return _all(read)


def _all(descriptor):
    found = []
    while data := os.read(descriptor, 4096):
        found.extend(data)
    os.close(descriptor)
    return found


def _count_down(number):
    left = [number]

    def counted(function):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] <= 0:
                os._exit(KILLED)
            return function(*arguments, **options)

        return call

    for name in NAMES:
        setattr(os, name, counted(getattr(os, name)))

    whole = builtins.open

    def open_counted(path, mode="r", *arguments, **options):
        file = whole(path, mode, *arguments, **options)
        return file if mode in ("r", "rb") else Halved(file, counted)

    builtins.open = counted_where_written(open_counted, counted)
    # The fast way of rmtree, whose operations are these, too.
    assert shutil.rmtree.avoids_symlink_attacks


def counted_where_written(function, counted):
    """Opening a file for writing is an operation, for reading it is none."""
    writing = counted(function)
    return lambda path, mode="r", *a, **k: (
        (function if mode in ("r", "rb") else writing)(path, mode, *a, **k)
    )


class Around:
    """A file in all but its writes."""

    def __init__(self, file):
        self.file = file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *what):
        self.file.close()


class Halved(Around):
    """A file whose writes are two operations: the kill between them leaves half."""

    def __init__(self, file, counted):
        super().__init__(file)
        self.second = counted(self._write)

    def _write(self, data):
        self.file.write(data)
        self.file.flush()

    def write(self, data):
        half = len(data) // 2
        self._write(data[:half])
        self.second(data[half:])
        return len(data)
