"""PNG and JPEG files: one picture as it is stored."""

import os
import stat
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from fastscore import memory
from fastscore.images import deep
from fastscore.images.readings import Reading, need
from fastscore.images.rules import Raw

PICTURES = (".png", ".jpg", ".jpeg")
DAMAGE = (OSError, EOFError, ValueError, SyntaxError, zlib.error, zipfile.BadZipFile)

# Pixels of a picture: Pillow's own limit, which a program may have lifted.
LARGEST = 178_956_970
# Below these pixels nobody asks for the memory that is free.
_SMALL = 1 << 22
_BESIDES = 1 << 26   # bytes of a file beside its pixels: profiles and the like
_ORIENTATION = 0x0112   # of EXIF


class Damaged(ValueError):
    """A file that is none of its kind, or hostile: `skip_corrupt` counts it."""


class _Refused(Exception):
    """A picture that can be read, but is not taken."""


def check_regular(path: Path) -> os.stat_result:
    """Refuse what is no regular file, before it is opened: a FIFO would wait for a writer."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}.") from None
    if not stat.S_ISREG(found.st_mode):
        raise Damaged(f"{path} is not a regular file.")
    return found


def picture(path: Path, reading: Reading) -> Raw:
    """One picture as it is stored.

    Raises:
        Damaged: it is no PNG or JPEG file, or larger than any that is taken.
        ValueError: of a kind that is refused, or with transparent pixels that nothing shows behind.
    """
    need("PIL", "pillow", "reading pictures takes")
    from PIL import Image

    if reading.first is not None:
        raise ValueError(f"{path} is a picture; channels-first and channels-last are for arrays.")

    check_regular(path)

    def decoded():
        with open(path, "rb") as file:
            head = file.read(26)
            file.seek(0)
            try:
                image = Image.open(file, formats=("PNG", "JPEG"))
            except Image.DecompressionBombError:
                raise Damaged(_too_large(path)) from None
            # Bits of a sample, and what its channels are.
            depth, colour = head[24:26] if image.format == "PNG" else (8, None)
            if depth == 16 and colour in deep.CHANNELS:
                return _deep(image, file, path)
            return _decoded(image, depth, path)

    return _checked(decoded, path, reading)


def opened(image: Any, name: str) -> Raw:
    """A picture of Pillow's, as `picture` would have it."""
    depth = 16 if image.mode.startswith("I") else 8
    return _checked(lambda: _decoded(image, depth, name), name, Reading())


def _checked(decoded, path, reading):
    try:
        array, alpha = decoded()
    except (_Refused, Damaged) as refused:
        kind = Damaged if isinstance(refused, Damaged) else ValueError
        raise kind(str(refused)) from None
    # Whatever the decoder raises on bytes that somebody else chose: no list of kinds is complete.
    except Exception as error:
        raise Damaged(
            f"{path} is not a readable PNG or JPEG image ({type(error).__name__})."
        ) from None

    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    if alpha is None or (alpha == 255).all():
        return Raw(array)
    if reading.background is None:
        raise ValueError(
            f"{path} has transparent pixels: say what shows behind them, {path}:on-white or "
            f"{path}:on-black."
        )

    return Raw(array, alpha.astype(np.float32) / 255)


def _decoded(image, depth, path):
    from PIL import ImageOps

    # As it is decoded, and as float32.
    _check_size(image, 5, path)
    image = ImageOps.exif_transpose(image) if image.getexif() else image
    return _pixels(image, depth, path)


def _deep(image, file, path):
    """Pixels and alpha of a PNG of 16 bits for each of several channels, as `_pixels` has them."""
    width, height = image.size
    # As it is stored, unpacked and put together, and as float32.
    _check_size(image, 12, path)
    if os.fstat(file.fileno()).st_size > 8 * width * height + _BESIDES:
        raise Damaged(f"{path} is much larger than the pixels that it declares.")
    if image.info.get("interlace"):
        raise _Refused(f"{path} is interlaced and has 16 bits for each colour; store it plain.")

    file.seek(0)
    samples = deep.read(file.read(), image.getexif().get(_ORIENTATION, 1))
    if samples.shape[2] == 3:
        transparent = image.info.get("transparency")
        hidden = (samples == transparent).all(-1) if transparent is not None else None
        return samples, None if hidden is None else np.where(hidden, 0, 255)
    colours = samples[..., 0] if samples.shape[2] == 2 else samples[..., :3]
    return colours, samples[..., -1] / 257


def _check_size(image, each, path):
    """Refuse pictures of too many pixels, or of more than the memory holds: `each` byte a value."""
    width, height = image.size
    if width * height > LARGEST:
        raise Damaged(_too_large(path))
    needed = width * height * len(image.getbands()) * each
    if width * height > _SMALL and needed > memory.available():
        raise Damaged(
            f"{path} declares {width} x {height} pixels, more than the memory that is free."
        )
    # Of a JPEG with several pictures, the first is the photograph.
    if image.format == "PNG" and getattr(image, "n_frames", 1) > 1:
        raise _Refused(f"{path} holds {image.n_frames} frames; store one picture in a file.")


def _too_large(path):
    return f"{path} declares more than {LARGEST} pixels, which are not decoded."


def _pixels(image, depth, path):
    """(H, W) or (H, W, 3), bool, uint8 or uint16, and alpha (H, W) in 0..255 or None."""
    transparent = image.info.get("transparency")
    if image.mode == "P":
        image = image.convert("RGB" if transparent is None else "RGBA")
        transparent = None   # it is in the alpha channel now
    if image.mode in ("LA", "RGBA"):
        return np.asarray(image.convert(image.mode[:-1])), np.asarray(image.getchannel("A"))
    if image.mode not in ("1", "L", "RGB", "I;16", "I;16B", "I"):
        raise _Refused(
            f"{path} is a picture of mode {image.mode}, whose colours depend on a profile; store "
            "it as RGB or grey."
        )

    array = np.asarray(image)
    array = array.astype(np.uint16) if depth == 16 else array
    if transparent is None:
        return array, None

    white = 1 if array.dtype == bool else np.iinfo(array.dtype).max
    value = np.minimum(transparent, 2**depth - 1) * white // (2**depth - 1)   # 255 for a 1-bit 1
    hidden = (array == value).all(-1) if array.ndim == 3 else array == value
    return array, np.where(hidden, 0, 255)
