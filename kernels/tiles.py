"""How Triton kernels are cut.

Elements or Philox blocks of a program, and its warps, for each class of devices.

`make gpu-tune` times the entries that have candidates beside them and prints what would be quicker.
Noise never depends on this table. The order of a sum does: of one class of devices it is the same
for every batch.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch

TABLE: dict[str, dict[str, dict[str, int]]] = {
    "default": {
        # Philox blocks of four elements: 16 elements per thread. Twice as many of a 16-bit type:
        # four 128-bit accesses per tensor.
        "noisy_update": {"BLOCK": 512, "num_warps": 4},
        # The same.
        "fill": {"BLOCK": 512, "num_warps": 4},
        # Philox blocks of 128 signs: a block for each thread, for another warp would compute the
        # same ones again; of a tensor that would not fill the GPU so, fewer and more.
        "signs": {"BLOCKS": 64, "num_warps": 2},
        "signs small": {"BLOCKS": 16, "num_warps": 4},
        # Philox blocks of a sum, whose tree over a program's threads costs each of them some thirty
        # instructions; tiles of a program.
        "noise_reduce": {"BLOCK": 1024, "num_warps": 4, "STEPS": 4},
        # Elements of each part of a stack: one 128-bit access per thread of a 16-bit type, two of
        # float32.
        "activate_dual": {"BLOCK": 1024, "num_warps": 4},
        "activate_jet": {"BLOCK": 1024, "num_warps": 4},
        # Elements of a tile and of each thread, for float32: fewer where more tensors are open, or
        # where more would leave the GPU idle.
        "normalise": {"tile": 4096, "each": 16},
        "normalise with tangents": {"tile": 2048, "each": 8},
        "normalise small": {"tile": 1024, "each": 4},
    },
    "sm_90": {   # what differs there
        # Timed on an H100, langevin_step of 2^26 elements: 264.2 µs of 265.6 (float32), 133.6 of
        # 133.4 (bfloat16), per sample 273.8 of 276.6 and 161.3 of 187.0. A thread takes one 128-bit
        # access of each tensor; registers leave every warp of an SM resident. What a thread does
        # once is more for each of its elements: docs/gpu.md.
        "noisy_update": {"BLOCK": 256, "num_warps": 8},
    },
}
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "fill": [{"BLOCK": b, "num_warps": w} for b in (256, 512, 1024) for w in (4, 8)],
    "signs": [{"BLOCKS": b, "num_warps": w} for b in (32, 64, 128) for w in (1, 2, 4)],
    "noise_reduce": [
        {"BLOCK": b, "num_warps": w, "STEPS": s}
        for b, w in ((512, 4), (1024, 4), (1024, 8))
        for s in (2, 4, 8)
    ],
    "noisy_update": [{"BLOCK": b, "num_warps": w} for b in (256, 512, 1024) for w in (2, 4, 8)],
    "activate_dual": [
        {"BLOCK": b, "num_warps": w} for b in (512, 1024, 2048, 4096) for w in (4, 8)
    ],
    "activate_jet": [{"BLOCK": b, "num_warps": w} for b in (512, 1024, 2048) for w in (4, 8)],
    "normalise": [{"tile": t, "each": e} for t in (2048, 4096, 8192) for e in (8, 16, 32)],
    "normalise with tangents": [
        {"tile": t, "each": e} for t in (1024, 2048, 4096) for e in (4, 8, 16)
    ],
}


@functools.cache
def device_class(device: torch.device) -> str:
    """"sm_90" for an H100 or H200; "default" for the interpreter."""
    return (
        "sm_{}{}".format(*torch.cuda.get_device_capability(device))
        if device.type == "cuda"
        else "default"
    )


@functools.cache
def tile(kernel: str, device: torch.device) -> dict[str, int]:
    """The entry of a kernel for a device; not to be changed."""
    return TABLE["default"][kernel] | TABLE.get(device_class(device), {}).get(kernel, {})


@functools.cache
def cache_bytes(device: torch.device) -> int:
    """Of the L2; of the interpreter's, an H100's."""
    return (
        torch.cuda.get_device_properties(device).L2_cache_size
        if device.type == "cuda"
        else 50 * 2**20
    )


@contextlib.contextmanager
def trying(kernel: str, entry: dict[str, int]) -> Iterator[None]:
    """Within: another entry, for every device."""
    before = (
        TABLE["default"][kernel],
        {name: entries.pop(kernel, None) for name, entries in TABLE.items() if name != "default"},
    )
    TABLE["default"][kernel] = entry
    tile.cache_clear()
    try:
        yield
    finally:
        TABLE["default"][kernel] = before[0]
        for name, old in before[1].items():
            TABLE[name] |= {} if old is None else {kernel: old}
        tile.cache_clear()
