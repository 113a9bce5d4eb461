"""Sums of partial sums, in one launch for all results of a call."""

import torch
import triton
import triton.language as tl

from fastscore.kernels.launch import cdiv, launch, power_of_two

SIZE = 1024   # partial sums that a program adds at once

# How a tile lies in the threads, and with that the order of a sum, depends on the number of splits
# alone: torch.sum's depends on how many sums there are, too.
COUNTS = ["rows0", "rows1", "rows2", "splits"]


@triton.jit
def sum_rows(out_ptr, partial_ptr, rows, splits, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([ROWS, BLOCK], partial_ptr.dtype.element_ty)
    begin = splits * 0
    while begin < splits:
        total += tl.load(
            partial_ptr + row * splits + (begin + lane),
            mask=(row < rows) & (begin + lane < splits),
            other=0.0,
        )
        begin += BLOCK
    tl.store(out_ptr + row, tl.sum(total, 1)[:, None], mask=row < rows)


@triton.jit(do_not_specialize=COUNTS)
def sum_splits_kernel(
    out0_ptr,
    out1_ptr,
    out2_ptr,
    partial0_ptr,
    partial1_ptr,
    partial2_ptr,
    rows0: tl.int64,
    rows1: tl.int64,
    rows2: tl.int64,
    splits: tl.int64,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (ROWS sums, result): partial (rows, splits) is summed over its splits."""
    which = tl.program_id(1)
    if which == 0:
        sum_rows(out0_ptr, partial0_ptr, rows0, splits, ROWS, BLOCK)
    elif which == 1:
        sum_rows(out1_ptr, partial1_ptr, rows1, splits, ROWS, BLOCK)
    else:
        sum_rows(out2_ptr, partial2_ptr, rows2, splits, ROWS, BLOCK)


def sum_splits(outputs: list[torch.Tensor], partials: list[torch.Tensor], splits: int) -> None:
    """Each output becomes the sum of its partial sums, (*output.shape, splits).

    One to three of them, all in order in memory.
    """
    block = min(SIZE, power_of_two(splits))
    rows = SIZE // block
    counts = [o.numel() for o in outputs]
    missing = 3 - len(outputs)
    args = [
        *outputs,
        *[outputs[0]] * missing,
        *partials,
        *[partials[0]] * missing,
        *counts,
        *[0] * missing,
        splits,
    ]
    launch(
        sum_splits_kernel, (cdiv(max(counts), rows), len(outputs)), *args, ROWS=rows, BLOCK=block
    )
