"""From what is stored to float32 (..., C, H, W) in [0, 1]: depth, range, background, channels."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastscore.guidance.operators import LUMA
from fastscore.images.readings import Reading, need


class Raw(NamedTuple):
    """(..., C, H, W) in the file's own dtype.

    Alpha (H, W) from 0 to 1, or None for an opaque image.
    """

    array: np.ndarray
    alpha: np.ndarray | None = None


def channels_first(array: np.ndarray, axes: int, reading: Reading, path: Path) -> np.ndarray:
    """An array of `axes` axes and grey, or of one more, with channels before height and width."""
    return array if is_first(array.shape, array.dtype, axes, reading, path) else _moved(array, axes)


def _moved(array, axes):
    if array.ndim == axes:
        return np.expand_dims(array, -3) if axes == 3 else array[None]
    return np.moveaxis(array, -1, -3)


def is_first(
    shape: tuple[int, ...], dtype: np.dtype, axes: int, reading: Reading, path: Path
) -> bool:
    """Whether channels are there already, and come before height and width.

    Raises:
        ValueError: it is no array of images, or its layout is ambiguous.
    """
    found = f"{dtype} {shape}"
    if dtype.kind not in "biuf":
        raise ValueError(f"{path} must hold bools, integers or floats; got {found}.")
    if len(shape) == axes and 0 not in shape:
        return False
    if len(shape) != axes + 1 or 0 in shape:
        raise ValueError(f"{path} must hold (H, W), (H, W, C) or (C, H, W); got {found}.")

    first = reading.first
    if first is None:
        first, last = (1 <= n <= 4 for n in (shape[-3], shape[-1]))
        if first == last:
            ask = f"say {path}:channels-first or {path}:channels-last"
            raise ValueError(
                f"{path} holds an array {shape}, whose channels may be the first or the last "
                f"axis of an image: {ask}."
            )

    return first


def check_set(shape: tuple[int, ...], found: str, path: Path) -> None:
    """Refuse what is no set of images (N, H, W), (N, H, W, C) or (N, C, H, W)."""
    if len(shape) not in (3, 4) or 0 in shape:
        raise ValueError(
            f"{path} must hold images (N, H, W), (N, H, W, C) or (N, C, H, W); got {found}."
        )
    if len(shape) == 3 and shape[2] <= 4 < shape[1]:
        n, h, w = shape
        way = (
            f"one image is (1, {n}, {h}, {w}), "
            f"grey ones are (N, 1, H, W) with {path}:channels-first"
        )
        raise ValueError(
            f"{path} may hold {n} grey images of {h} x {w} pixels, or one image: {way}."
        )


def unit(raw: Raw, reading: Reading, path: Path, slack: float = 0.0) -> np.ndarray:
    """float32 in [0, 1] by the rules for depth, range and background."""
    array, kind = raw.array, raw.array.dtype.kind
    if kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{path} must hold finite numbers; it holds NaN or infinity.")

    white = 1 if kind == "b" else reading.white
    if white is None:
        white = np.iinfo(array.dtype).max if kind in "iu" else 1
    if white != 1 or array.dtype != np.float32:
        array = np.ascontiguousarray(np.divide(array, np.float32(white), dtype=np.float32))
    if kind in "bu" and reading.white is None:
        low, high = 0.0, 1.0   # within by the division
    else:
        low, high = float(array.min()), float(array.max())
    if low < -slack or high > 1 + slack:
        within = "[0, 1]" if not slack else f"[{-slack:.3g}, {1 + slack:.3g}]"
        raise ValueError(
            f"{path} must have values in {within}, or say {path}:max=N; got {low:.6g} to "
            f"{high:.6g}."
        )

    if raw.alpha is not None:
        array = array * raw.alpha + np.float32(reading.background) * (1 - raw.alpha)

    return array


def finished(raw: Raw, reading: Reading, path: Path, slack: float = 0.0) -> np.ndarray:
    """float32 (..., C, H, W) in [0, 1], of the channels and the size that are wanted."""
    return resized(to_channels(unit(raw, reading, path, slack), reading, path), reading, path)


def shape_of(shape: tuple[int, ...], reading: Reading, path: Path) -> tuple[int, int, int]:
    """The shape that an image of `shape` (C, H, W) is finished with."""
    sides = tuple(shape[1:]) if reading.size is None else reading.size
    return (channels_of(shape[0], reading, path), *sides)


def resized(array: np.ndarray, reading: Reading, path: Path) -> np.ndarray:
    """The middle of each image, as large as it goes, at the size that is wanted."""
    if reading.size in (None, array.shape[-2:]):
        return array
    need("PIL", "pillow", f"{path}: scaling images takes")
    from PIL import Image

    height, width = reading.size
    rows, columns = array.shape[-2:]
    scale = min(rows / height, columns / width)
    top, left = (rows - height * scale) / 2, (columns - width * scale) / 2
    box = (left, top, left + width * scale, top + height * scale)
    planes = [
        Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC, box)
        for plane in np.ascontiguousarray(array).reshape(-1, rows, columns)
    ]
    return np.stack(planes).reshape(*array.shape[:-2], height, width).clip(0, 1)


def tells_white(top: int, dtype: np.dtype, reading: Reading) -> bool:
    """Whether values up to `top` tell what white is, or it is said: no others can change that."""
    if dtype.kind not in "iu" or reading.white is not None:
        return True
    return dtype.kind == "u" and dtype.itemsize <= 2 and top >= np.iinfo(dtype).max / 8


def check_white(top: int, dtype: np.dtype, reading: Reading, path: Path) -> None:
    """Ask where integers do not tell what white is."""
    if dtype.kind not in "iu" or reading.white is not None:
        return
    if dtype.kind == "i" or dtype.itemsize > 2:
        raise ValueError(
            f"{path} holds {dtype} up to {top}, which does not tell white: say {path}:max=255 or "
            "what it is, or store uint8."
        )

    full = np.iinfo(dtype).max
    if 0 < top < full / 8:
        way = f"say {path}:max={top} or what it is; {path}:max={full} if the images are so dark"
        raise ValueError(
            f"{path} holds {dtype} up to {top}, which hardly means {top}/{full} of white: {way}."
        )


def channels_of(found: int, reading: Reading, path: Path) -> int:
    """The channels that are wanted of images that have `found`."""
    wanted = reading.channels
    if wanted in (None, found):
        return found
    if {wanted, found} != {1, 3}:
        name = "grey" if wanted == 1 else "rgb"
        raise ValueError(f"{path}:{name} must have 1 or 3 channels to go by; it has {found}.")
    return wanted


def to_channels(array: np.ndarray, reading: Reading, path: Path) -> np.ndarray:
    """(..., C, H, W) with the channels that are wanted."""
    found = array.shape[-3]
    wanted = channels_of(found, reading, path)
    if wanted == found:
        return array
    if wanted == 3:
        return np.repeat(array, 3, axis=-3)

    weights = np.array(LUMA, np.float32)[:, None, None]
    return (array * weights).sum(-3, keepdims=True, dtype=np.float32)


def outline(array: object) -> str:
    """What an array is, for messages."""
    return f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
