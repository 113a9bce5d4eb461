"""Grids of images and loss curves, as PNG files."""

import io
import math

import numpy as np

from fastscore.cli import checkpoint


def grid(images, columns=None, scale=None):
    """(N, C, H, W) in [0, 1] -> one uint8 array (rows, columns, C), a pixel of margin between images.

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


def save_grid(path, images, columns=None):
    """Write a grid of images as PNG."""
    from PIL import Image

    array = grid(images, columns)
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(buffer, "PNG")
    checkpoint.write_atomic(path, buffer.getvalue())


def save_row(path, panels, rows=1):
    """Write titled grids of images side by side; panels maps a title to images (N, C, H, W)."""
    from matplotlib.figure import Figure

    columns = -(-len(panels) // rows)
    figure = Figure(figsize=(3 * columns, 3.4 * rows), layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in every:
        axes.set_axis_off()
    for axes, (title, images) in zip(every, panels.items()):
        array = grid(images)
        axes.imshow(array[..., 0] if array.shape[-1] == 1 else array, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(title, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    checkpoint.write_atomic(path, buffer.getvalue())


def save_strip(path, strip, columns=20):
    """Write the path of some samples, (states, N, C, H, W), as PNG: a row for each sample, at most `columns` states with the last."""
    kept = np.unique(np.linspace(0, len(strip) - 1, min(columns, len(strip))).round().astype(int))
    save_grid(path, strip[kept].transpose(0, 1).flatten(0, 1), columns=len(kept))


def save_loss_curve(path, records, sigmas, loss="denoising"):
    """Write the loss per noise level over the steps, from the records of metrics.jsonl."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    label = "½‖σs + z‖² per dimension" if loss == "denoising" else f"σ² × {loss} loss per dimension"
    axes = figure.add_subplot(xlabel="step", ylabel=label, title="loss per noise level")
    for level in sorted({0, len(sigmas) // 4, len(sigmas) // 2, 3 * len(sigmas) // 4, len(sigmas) - 1}):
        points = [(r["step"], r["levels"][level]) for r in records if r["levels"][level] is not None]
        axes.plot(*zip(*points), label=f"σ = {sigmas[level]:.3g}") if points else None
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    checkpoint.write_atomic(path, buffer.getvalue())
