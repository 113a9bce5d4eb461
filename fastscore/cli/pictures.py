"""Grids of images and loss curves, as PNG files."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastscore.training import files

_DPI = 110


def grid(images: Tensor, columns: int | None = None, scale: int | None = None) -> np.ndarray:
    """(N, C, H, W) in [0, 1] -> one uint8 array (rows, columns, C), a pixel between images.

    C is 1 or 3; the channels of other images stand side by side, in grey.
    """
    images = (images.clamp(0, 1) * 255).round().byte().cpu().numpy()
    if images.shape[1] not in (1, 3):
        images = np.concatenate(np.split(images, images.shape[1], 1), -1)
    n, c, h, w = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    canvas = np.full((rows * (h + 1) + 1, columns * (w + 1) + 1, c), 64, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (h + 1) + 1, i % columns * (w + 1) + 1
        canvas[y : y + h, x : x + w] = image.transpose(1, 2, 0)
    scale = scale or max(1, 32 // h)
    return canvas.repeat(scale, 0).repeat(scale, 1)


def save_grid(path: str | Path, images: Tensor, columns: int | None = None) -> None:
    """Write a grid of images as PNG."""
    from PIL import Image

    array = grid(images, columns)
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(buffer, "PNG")
    files.write_atomic(path, buffer.getvalue())


def save_row(path: str | Path, panels: dict[str, Tensor], rows: int = 1) -> None:
    """Write titled grids of images side by side; panels maps a title to images (N, C, H, W)."""
    from matplotlib.figure import Figure

    columns = -(-len(panels) // rows)
    figure = Figure(figsize=(3 * columns, 3.4 * rows), layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in every:
        axes.set_axis_off()
    for axes, (title, images) in zip(every, panels.items()):
        array = grid(images)
        shown = array[..., 0] if array.shape[-1] == 1 else array
        axes.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(title, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, bbox_inches="tight")
    files.write_atomic(path, buffer.getvalue())


def save_labelled(
    path: str | Path,
    images: Tensor,
    title: str,
    rows: Sequence[str],
    columns: Sequence[str] | None = None,
) -> None:
    """Write a grid of images with a title, a label at each row and, where given, above each column.

    The grid is at least 600 pixels wide, and each pixel of an image as large as any other.

    Args:
        images: (N, C, H, W), row by row; N is a multiple of the number of rows.
    """
    from matplotlib.figure import Figure

    count = len(images) // len(rows)
    h, w = images.shape[2:]
    array = grid(images, count, scale=1)
    scale = max(1, math.ceil(600 / array.shape[1]))
    array = array.repeat(scale, 0).repeat(scale, 1)
    height, width = array.shape[:2]

    # In pixels: left, right, below, above.
    margins = 60, 20, 20, 50 if columns is None else 75
    whole = width + margins[0] + margins[1], height + margins[2] + margins[3]
    figure = Figure(figsize=[side / _DPI for side in whole], dpi=_DPI)
    place = margins[0] / whole[0], margins[2] / whole[1], width / whole[0], height / whole[1]
    axes = figure.add_axes(place)
    # As colours, which no map of greys rounds.
    shown = np.broadcast_to(array, (height, width, 3))
    axes.imshow(shown, interpolation="none", aspect="auto")

    axes.set_yticks([(k + 0.5) * (h + 1) * scale for k in range(len(rows))], rows, fontsize=12)
    axes.set_xticks([])
    if columns is not None:
        middles = [(k + 0.5) * (w + 1) * scale for k in range(count)]
        axes.set_xticks(middles, columns, fontsize=9)
        axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=13, pad=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    files.write_atomic(path, buffer.getvalue())


def save_strip(path: str | Path, strip: Tensor, columns: int = 20) -> None:
    """Write the path of some samples, (states, N, C, H, W), as PNG.

    A row for each sample, of at most `columns` states, the last among them.
    """
    places = np.linspace(0, len(strip) - 1, min(columns, len(strip)))
    shown = np.unique(places.round().astype(int))
    save_grid(path, strip[shown].transpose(0, 1).flatten(0, 1), columns=len(shown))


def save_loss_curve(
    path: str | Path,
    records: list[dict[str, Any]],
    sigmas: list[float],
    loss: str = "denoising",
    weighting: str = "even",
) -> None:
    """Write the loss per noise level over the steps, from the records of metrics.jsonl."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    label = f"σ² × {loss} loss per dimension"
    if loss.startswith("denoising"):
        label = "½‖σs + z‖² per dimension"
    if weighting == "edm":
        label = label.replace(" per", " (1 + σ²/d²) per")
    axes = figure.add_subplot(xlabel="step", ylabel=label, title="loss per noise level")

    n = len(sigmas)
    for level in sorted({0, n // 4, n // 2, 3 * n // 4, n - 1}):
        recorded = [(record["step"], record["levels"][level]) for record in records]
        points = [(step, value) for step, value in recorded if value is not None]
        if points:
            # A line through one point is none, as after a run of fewer than 100 steps.
            marker = "o" if len(points) == 1 else None
            axes.plot(*zip(*points), marker=marker, label=f"σ = {sigmas[level]:.3g}")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, bbox_inches="tight")
    files.write_atomic(path, buffer.getvalue())
