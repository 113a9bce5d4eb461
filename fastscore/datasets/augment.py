"""Images that are seen mirrored, shifted or in part, by the noise contract."""

import torch
from torch import Tensor

from fastscore import random
from fastscore.datasets.source import Source
from fastscore.messages import shown
from fastscore.ops import checks
from fastscore.scalars import integer, offset

AUGMENT = 11   # the stream; block n, of four words, is sample n's


def augment(
    x: Tensor,
    *,
    flip: bool = False,
    shift: int = 0,
    crop: int | None = None,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    first_sample: int = 0,
) -> Tensor:
    """Mirror, shift and crop each image of a batch at random.

    What is drawn for an image depends on the seed, the step and its global number alone, so that
    parts of a batch agree with the whole. From its words w of stream AUGMENT = 11:

        mirrored where w₀ is odd
        moved down by ((2k + 1) w₁ >> 32) - k pixels, and right by the same of w₂;
            the pixels of the edge are repeated into what is left free
        rows from (H - crop + 1) w₁ >> 32, columns from (W - crop + 1) w₂ >> 32

    Args:
        x: images, (B, C, H, W), any float dtype; not modified.
        flip: mirror half of them, left and right.
        shift: k, in pixels, 0 <= k < min(H, W).
        crop: side of the part that is kept; None for the whole image. With shift 0 only.
        seed, step, first_sample: the noise key; first_sample is the global number of x[0].

    Returns:
        (B, C, H, W), or (B, C, crop, crop).

    Raises:
        ValueError: x is no batch of images, or an option is out of range.

    >>> x = torch.arange(4.0).reshape(1, 1, 1, 4).expand(4, 1, 1, 4)
    >>> augment(x, flip=True, seed=0).reshape(4, 4).int()
    tensor([[3, 2, 1, 0],
            [3, 2, 1, 0],
            [0, 1, 2, 3],
            [3, 2, 1, 0]], dtype=torch.int32)
    """
    op = "augment"
    checks.check_float(op, "x", x)
    if x.dim() != 4:
        raise ValueError(f"{op}: x must be images (B, C, H, W); got {tuple(x.shape)}.")
    if not isinstance(flip, bool):
        raise ValueError(f"{op}: flip must be True or False; got {shown(flip)}.")
    b, _, height, width = x.shape
    shift = integer(op, "shift", shift, 0, min(height, width) - 1)
    if crop is not None:
        crop = integer(op, "crop", crop, 1, min(height, width))
        if shift:
            raise ValueError(f"{op}: give either shift or crop; got {shift} and {crop}.")

    key = {"seed": seed, "step": step, "offset": offset(op, first_sample, 4), "device": x.device}
    w = random.draw(op, random.WORDS, (4 * b,), stream=AUGMENT, **key).view(b, 4)
    if crop is not None:
        rows = _within(height - crop + 1, w[:, 1], crop)
        columns = _within(width - crop + 1, w[:, 2], crop)
    else:
        rows = _moved(height, w[:, 1], shift)
        columns = _moved(width, w[:, 2], shift)
    if flip:
        columns = torch.where((w[:, :1] & 1).bool(), columns.flip(1), columns)
    return _taken(x, rows, columns)


def _moved(n, w, k):
    """Where each pixel of a line comes from, (B, n)."""
    move = ((w * (2 * k + 1)) >> 32) - k
    return (torch.arange(n, device=w.device) - move[:, None]).clamp(0, n - 1)


def _within(places, w, n):
    return ((w * places) >> 32)[:, None] + torch.arange(n, device=w.device)


def _taken(x, rows, columns):
    b, c, _, width = x.shape
    rows = rows[:, None, :, None].expand(b, c, rows.shape[1], width)
    x = x.gather(2, rows)
    return x.gather(3, columns[:, None, None, :].expand(b, c, x.shape[2], columns.shape[1]))


class Cropped(Source):
    """The middle of each image of a source, (C, crop, crop): what is seen where nothing is drawn.

    Raises:
        ValueError: the samples are no images, or smaller.
    """

    shape: tuple[int, ...]
    labels: Tensor | None
    classes: tuple[str, ...] | None
    in_memory: bool

    def __init__(self, source: Source, crop: int) -> None:
        if len(source.shape) != 3 or crop > min(source.shape[1:]):
            raise ValueError(
                f"crop: samples must be images of at least {crop} x {crop} pixels; got "
                f"{tuple(source.shape)}."
            )
        self.source = source
        self.shape = (source.shape[0], crop, crop)
        self.labels = source.labels
        self.classes = source.classes
        self.in_memory = source.in_memory

    def __len__(self) -> int:
        return len(self.source)

    def _read(self, indices):
        x, crop = self.source.read(indices), self.shape[-1]
        top, left = ((side - crop) // 2 for side in x.shape[2:])
        return x[..., top : top + crop, left : left + crop].contiguous()

    def raw(self, indices: Tensor) -> Tensor:
        return self.source.raw(indices)

    def stamps(self) -> list[str] | None:
        return self.source.stamps()

    @property
    def whole(self) -> Source:
        return self.source
