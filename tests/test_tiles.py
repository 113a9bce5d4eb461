"""The table of tiles: every entry computes what the others do."""

import pytest
import torch

import fastscore
from fastscore import backend

if (reason := backend.why_not("triton", "cpu")) is not None:
    pytest.skip(reason, allow_module_level=True)

from fastscore.kernels import tiles
from fastscore.ops.activate import activate_dual

OTHERS = [
    (name, kernel, entry)
    for name, entries in tiles.TABLE.items()
    if name != "default"
    for kernel, entry in entries.items()
]


def update(dtype):
    generator = torch.Generator().manual_seed(0)
    x, s = (torch.randn(3, 1501, generator=generator).to(dtype) for _ in range(2))
    each = torch.tensor([0.1, 0.2, 0.3])
    calls = [
        fastscore.langevin_step(x, s, e, seed=5, offset=o, backend="triton")
        for e in (0.1, each)
        for o in (0, 3, 2**34 - 4096)
    ]
    return torch.stack(calls)


def activation(dtype):
    return activate_dual(torch.linspace(-4, 4, 2 * 3001).reshape(2, -1).to(dtype), "silu", "triton")


CALLS = {"noisy_update": update, "activate_dual": activation}


@pytest.mark.parametrize("name, kernel, entry", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_entry_of_another_class_of_devices_changes_no_bit(name, kernel, entry, dtype):
    expected = CALLS[kernel](dtype)
    with tiles.trying(kernel, tiles.TABLE["default"][kernel] | entry):
        assert torch.equal(CALLS[kernel](dtype), expected)


def test_a_class_of_devices_names_kernels_and_numbers_of_the_default():
    for name, kernel, entry in OTHERS:
        assert set(entry) <= set(tiles.TABLE["default"][kernel]), (name, kernel)
        assert entry in tiles.CANDIDATES[kernel]
