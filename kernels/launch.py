"""Launches of Triton kernels.

Triton's own dispatch once for each signature, then the compiled kernel straight away.

Triton binds, specialises and hashes the arguments of every launch: 25 µs, more than most of our
kernels run on small tensors. Here a launch is looked up by what Triton would specialise on, and
handed to the same launcher in C.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import torch
import triton

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_compiled: dict[tuple, tuple] = {}
_modes: dict[int, tuple] = {}
_recording: dict[int, list] = {}   # of threads


def launch(kernel, grid: tuple[int, ...], *args, **constants) -> None:
    """kernel[grid](*args, **constants): tensors, None and numbers, then constants and num_warps."""
    if INTERPRETED:
        kernel[grid](*args, **constants)
        return

    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    signature = (id(kernel), device, *constants, *constants.values(), *_kinds(kernel, args))
    found = _compiled.get(signature)
    if found is None:
        compiled = kernel[grid](*args, **constants)
        rest = tuple(constants[name] for name in kernel.arg_names[len(args) :])
        _compiled[signature] = compiled, rest
    else:
        compiled, rest = found
    args += rest
    grid += (1,) * (3 - len(grid))
    if _recording and (launches := _recording.get(threading.get_ident())) is not None:
        launches.append((device, compiled, grid, args))
    if found is None:
        return

    stream = driver.get_current_stream(device)
    metadata = compiled.launch_metadata(grid, stream, *args)
    hooks = triton.knobs.runtime
    compiled.run(
        *grid, stream, compiled.function, compiled.packed_metadata, metadata,
        hooks.launch_enter_hook, hooks.launch_exit_hook, *args,
    )


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[int, Any, tuple[int, ...], tuple]]]:
    """Within: (device, compiled kernel, grid, all arguments) of each launch of this thread."""
    launches = _recording[threading.get_ident()] = []
    try:
        yield launches
    finally:
        del _recording[threading.get_ident()]


def cdiv(n: int, d: int) -> int:
    return -(-n // d)


def power_of_two(n: int) -> int:
    """The next one; Triton's own may be used in kernels, too, and takes 5 µs for that."""
    return 1 << (n - 1).bit_length()


def _kinds(kernel, args) -> list:
    """What Triton specialises on: dtype and alignment of a pointer.

    Whether an int is 1, a multiple of 16, wide; constants whole.
    """
    modes = _modes.get(id(kernel))
    if modes is None:
        modes = _modes[id(kernel)] = tuple(_mode(p) for p in kernel.params)

    kinds = []
    note = kinds.append
    for mode, a in zip(modes, args):
        if a is None:
            note(None)
        elif mode is not None:
            note(mode or a)
        elif type(a) is int:
            # One number for the three answers.
            note((a & 15 == 0) + 2 * (a == 1) + 4 * (-(2**31) <= a < 2**31))
        elif isinstance(a, torch.Tensor):
            note(a.dtype)
            note(a.data_ptr() & 15 == 0)
        elif isinstance(a, int):
            note((a & 15 == 0, a == 1, -(2**31) <= a < 2**31))
        else:
            note(float)
    return kinds


def _mode(parameter) -> str | None:
    """"An empty word for a constant, another one for what Triton does not specialise on, None
    for the rest."""
    return "" if parameter.is_constexpr else "any" if parameter.do_not_specialize else None
