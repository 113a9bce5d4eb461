"""Images from files and arrays: the one reader of data sets, observations and masks.

float32, channels first, white is 1.

What a file says is taken by rule:

| in the file | becomes |
| --- | --- |
| PNG, JPEG: grey of 1, 2, 4, 8, 16 bits (1, L, I;16, I) | one channel |
| RGB of 8 bits | three channels |
| a palette (P) | three channels: its colours |
| alpha (LA, RGBA), a transparent colour | dropped where all pixels are opaque; or asked for |
| an EXIF orientation | an upright image |
| CMYK, 16-bit colour, several frames, every other mode | refused |
| arrays: bool | 0 and 1 |
| uint8, uint16 | divided by 255, 65535; below an eighth of it asked for |
| floats | as they are; they must lie in [0, 1] |
| other integers | asked for |
| images (H, W); sets of them (N, H, W) | one channel |
| with one axis more | channels are the first or last axis of an image, |
|  | whichever has 1 to 4 entries; both or neither: asked for |

What it does not say is asked for, and said behind the file's name, FILE:READING (`faces:rgb`,
`x.npz:channels-last:max=16`):

| reading | says |
| --- | --- |
| grey, rgb | the channels wanted: RGB is weighted by luma (ITU-R BT.601), grey is repeated |
| channels-first, channels-last | of an array: (C, H, W) or (H, W, C) |
| max=N | the number that means white |
| on-white, on-black | what shows behind transparent pixels |

Colour profiles are not applied. Colours are in the order R, G, B: nothing in an array tells B, G, R
apart.
"""

import importlib.util
import math
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastscore.guidance.operators import LUMA

PICTURES = (".png", ".jpg", ".jpeg")
# Images that a folder must not hold unread.
UNREAD = (".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
_DAMAGE = (OSError, EOFError, ValueError, SyntaxError, zlib.error, zipfile.BadZipFile)
_WORDS = {
    "grey": ("channels", 1),
    "rgb": ("channels", 3),
    "channels-first": ("first", True),
    "channels-last": ("first", False),
    "on-white": ("background", 1.0),
    "on-black": ("background", 0.0),
}


class Reading(NamedTuple):
    """What the words behind a file's name say; None where nothing is said."""

    channels: int | None = None
    first: bool | None = None
    white: float | None = None
    background: float | None = None


def parse(source: str | Path) -> tuple[Path, Reading]:
    """The file, and how to read it.

    >>> parse("x.npz:channels-last:max=16")[1]
    Reading(channels=None, first=False, white=16.0, background=None)
    """
    path, said = str(source), {}
    while True:
        rest, _, word = path.rpartition(":")
        if not rest or not (word in _WORDS or word.startswith("max=")):
            return Path(path), Reading(**said)
        name, value = _WORDS[word] if word in _WORDS else ("white", _white(source, word))
        if name in said:
            raise ValueError(f"{source} says two things about one, {word} among them.")
        path, said[name] = rest, value


def _white(source, word):
    try:
        white = float(word.removeprefix("max="))
    except ValueError:
        white = math.nan
    if not (white > 0 and math.isfinite(white)):
        raise ValueError(f"{source}: max=N must be a positive number; got {word!r}.")
    return white


def need(module: str, package: str, what: str) -> None:
    """Refuse unless the module can be imported."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{what} {package}, which is not installed: pip install {package}.")


def read(source: str | Path, *, slack: float = 0.0) -> np.ndarray:
    """One image, float32 (C, H, W), of a .png, .jpg or .npy file.

    Its values may leave [0, 1] by `slack`.

    Raises:
        ValueError: no such file, damaged, of a kind that is refused, or ambiguous; each says the
            way out.
    """
    path, reading = parse(source)
    raw = _decode(path, reading)
    _check_white(raw.array.max(), raw.array.dtype, reading, path)
    return _to_channels(_unit(raw, reading, path, slack), reading, path)


def read_mask(source: str | Path) -> np.ndarray:
    """One mask, bool (C, H, W): true where a pixel is at least half of white.

    In integers of 0 and 1, white is 1.
    """
    path, reading = parse(source)
    raw = _decode(path, reading)
    low, high = raw.array.min(), raw.array.max()
    if raw.array.dtype.kind in "iu" and low >= 0 and high <= 1 and reading.white is None:
        reading = reading._replace(white=1.0)
    _check_white(high, raw.array.dtype, reading, path)
    return _to_channels(_unit(raw, reading, path), reading, path) >= 0.5


def read_folder(source: str | Path) -> np.ndarray:
    """All pictures of a folder and its folders, in the order of their names, float32 (N, C, H,
    W)."""
    folder, reading = parse(source)
    files = _pictures_of(folder)
    raws = [_picture(file, reading) for file in files]
    _check_alike(files, raws, reading, folder)
    # One look at all pictures of a depth: a single one may be dark.
    dtypes = {raw.array.dtype for raw in raws}
    if len(dtypes) == 1 and reading.channels is None and all(raw.alpha is None for raw in raws):
        array = np.stack([raw.array for raw in raws])
        _check_white(array.max(), array.dtype, reading, folder)
        return _unit(_Raw(array), reading, folder)

    for dtype in dtypes:
        _check_white(
            max(raw.array.max() for raw in raws if raw.array.dtype == dtype), dtype, reading, folder
        )

    return np.stack(
        [_to_channels(_unit(raw, reading, file), reading, file) for file, raw in zip(files, raws)]
    )


def _check_alike(files, raws, reading, folder):
    first = raws[0].array.shape
    for file, (array, _) in zip(files, raws):
        if len(array) != first[0] and reading.channels is None:
            raise ValueError(
                f"{folder} holds grey images and images in colour ({files[0].name} has {first[0]} "
                "channels, "
                f"{file.name} {len(array)}): say {folder}:grey or {folder}:rgb."
            )
        if array.shape[1:] != first[1:]:
            sizes = f"{files[0].name} is {first[1:]}, {file.name} {array.shape[1:]}"
            raise ValueError(f"all images must have one size; {sizes}.")


def _pictures_of(folder):
    every = {p: p.suffix.lower() for p in folder.rglob("*")}
    files = sorted(p for p, suffix in every.items() if suffix in PICTURES)
    others = sorted(p for p, suffix in every.items() if suffix in UNREAD)
    if not files:
        raise ValueError(f"{folder} holds no images ({', '.join(PICTURES)}).")
    if others:
        raise ValueError(
            f"{folder} holds images that are not read, such as {others[0].name}; make them .png "
            "files or take them out."
        )

    return files


def from_array(array: np.ndarray, source: str | Path) -> np.ndarray:
    """A set of images, float32 (N, C, H, W), from the array that the file `source` holds."""
    path, reading = parse(source)
    if not isinstance(array, np.ndarray) or array.ndim not in (3, 4) or not array.size:
        raise ValueError(
            f"{path} must hold images (N, H, W), (N, H, W, C) or (N, C, H, W); got "
            f"{_outline(array)}."
        )
    if array.ndim == 3 and array.shape[2] <= 4 < array.shape[1]:
        n, h, w = array.shape
        way = (
            f"one image is (1, {n}, {h}, {w}), "
            f"grey ones are (N, 1, H, W) with {path}:channels-first"
        )
        raise ValueError(
            f"{path} may hold {n} grey images of {h} x {w} pixels, or one image: {way}."
        )

    array = _channels_first(array, 3, reading, path)
    _check_white(array.max(), array.dtype, reading, path)
    return _to_channels(_unit(_Raw(array), reading, path), reading, path)


def load_array(path: Path) -> np.ndarray:
    """The array of a .npy file."""
    try:
        array = np.load(path, allow_pickle=False)
    except _DAMAGE as error:
        raise ValueError(f"{path} is not a readable .npy file ({type(error).__name__}).") from None
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} is not a readable .npy file (an archive).")
    return array


class _Raw(NamedTuple):
    """(..., C, H, W) in the file's own dtype.

    Alpha (H, W) from 0 to 1, or None for an opaque image.
    """

    array: np.ndarray
    alpha: np.ndarray | None = None


def _decode(path, reading):
    """One image as it is stored."""
    suffix = path.suffix.lower()
    if suffix not in (*PICTURES, ".npy"):
        raise ValueError(f"{path} must be a {', '.join(PICTURES)} or .npy file.")
    if not path.is_file():
        raise ValueError(f"{path} does not exist.")
    if suffix == ".npy":
        return _Raw(_channels_first(load_array(path), 2, reading, path))
    return _picture(path, reading)


def _picture(path, reading):
    need("PIL", "pillow", "reading pictures takes")
    from PIL import Image, ImageOps

    if reading.first is not None:
        raise ValueError(f"{path} is a picture; channels-first and channels-last are for arrays.")

    try:
        with open(path, "rb") as file:
            head = file.read(25)
            file.seek(0)
            image = Image.open(file, formats=("PNG", "JPEG"))
            # Of a JPEG with several pictures, the first is the photograph.
            if image.format == "PNG" and image.n_frames > 1:
                raise _Refused(
                    f"{path} holds {image.n_frames} frames; store one picture in a file."
                )
            image = ImageOps.exif_transpose(image) if image.getexif() else image
            depth = head[24] if image.format == "PNG" else 8   # bits of a sample
            array, alpha = _pixels(image, depth, path)
    except _Refused as refused:
        raise ValueError(str(refused)) from None
    except (*_DAMAGE, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path} is not a readable PNG or JPEG image ({type(error).__name__})."
        ) from None

    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    if alpha is None or (alpha == 255).all():
        return _Raw(array)
    if reading.background is None:
        raise ValueError(
            f"{path} has transparent pixels: say what shows behind them, {path}:on-white or "
            f"{path}:on-black."
        )

    return _Raw(array, alpha.astype(np.float32) / 255)


class _Refused(Exception):
    """A picture that can be read, but is not taken."""


def _pixels(image, depth, path):
    """(H, W) or (H, W, 3), bool, uint8 or uint16, and alpha (H, W) in 0..255 or None."""
    if depth == 16 and image.mode not in ("I;16", "I;16B", "I"):
        raise _Refused(
            f"{path} has 16 bits for each colour, of which Pillow reads 8; store 8 bits, or an "
            "array (.npy, .npz)."
        )

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


def _channels_first(array, axes, reading, path):
    """An array of `axes` axes and grey, or of one more, with channels before height and width."""
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{path} must hold bools, integers or floats; got {_outline(array)}.")
    if array.ndim == axes and array.size:
        return np.expand_dims(array, -3) if axes == 3 else array[None]
    if array.ndim != axes + 1 or not array.size:
        raise ValueError(f"{path} must hold (H, W), (H, W, C) or (C, H, W); got {_outline(array)}.")

    first = reading.first
    if first is None:
        first, last = (1 <= n <= 4 for n in (array.shape[-3], array.shape[-1]))
        if first == last:
            ask = f"say {path}:channels-first or {path}:channels-last"
            raise ValueError(
                f"{path} holds an array {array.shape}, whose channels may be the first or the last "
                f"axis of an image: {ask}."
            )

    return array if first else np.moveaxis(array, -1, -3)


def _unit(raw, reading, path, slack=0.0):
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


def _check_white(top, dtype, reading, path):
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


def _to_channels(array, reading, path):
    """(..., C, H, W) with the channels that are wanted."""
    wanted, found = reading.channels, array.shape[-3]
    if wanted in (None, found):
        return array
    if {wanted, found} != {1, 3}:
        name = "grey" if wanted == 1 else "rgb"
        raise ValueError(f"{path}:{name} must have 1 or 3 channels to go by; it has {found}.")
    if wanted == 3:
        return np.repeat(array, 3, axis=-3)

    weights = np.array(LUMA, np.float32)[:, None, None]
    return (array * weights).sum(-3, keepdims=True, dtype=np.float32)


def _outline(array):
    return f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
