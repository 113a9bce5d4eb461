"""Images from files and arrays: the one reader of data sets, observations and masks.

float32, channels first, white is 1.

What a file says is taken by rule:

| in the file | becomes |
| --- | --- |
| PNG, JPEG: grey of 1, 2, 4, 8, 16 bits (1, L, I;16, I) | one channel |
| RGB of 8 or 16 bits | three channels |
| a palette (P) | three channels: its colours |
| alpha (LA, RGBA), a transparent colour | dropped where all pixels are opaque; or asked for |
| an EXIF orientation | an upright image |
| CMYK, interlaced 16-bit colour, several frames, every other mode | refused |
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
| size=N, size=HxW | sides that images are brought to: their middle of this shape, as large as it |
|  | goes, scaled by Pillow's bicubic filter and clamped to [0, 1] |
| by-folder | of a data set: the folder that holds a picture is its class |

Colour profiles are not applied. Colours are in the order R, G, B: nothing in an array tells B, G, R
apart.
"""

from pathlib import Path

import numpy as np

from fastscore import memory
from fastscore.images import headers
from fastscore.images.folders import check_alike as check_alike
from fastscore.images.folders import pictures_of as pictures_of
from fastscore.images.pictures import DAMAGE as DAMAGE
from fastscore.images.pictures import PICTURES as PICTURES
from fastscore.images.pictures import Damaged as Damaged
from fastscore.images.pictures import check_regular as check_regular
from fastscore.images.pictures import opened as opened
from fastscore.images.pictures import picture as picture
from fastscore.images.readings import Reading as Reading
from fastscore.images.readings import need as need
from fastscore.images.readings import parse as parse
from fastscore.images.rules import (
    Raw,
    channels_first,
    check_set,
    check_white,
    finished,
    outline,
    unit,
)

_STREAMED = "; datasets.open reads them as they are wanted"


def read(source: str | Path, *, slack: float = 0.0) -> np.ndarray:
    """One image, float32 (C, H, W), of a .png, .jpg or .npy file.

    Its values may leave [0, 1] by `slack`.

    Raises:
        ValueError: no such file, damaged, of a kind that is refused, or ambiguous; each says the
            way out.
    """
    path, reading = parse(source)
    raw = _decode(path, reading)
    check_white(raw.array.max(), raw.array.dtype, reading, path)
    return finished(raw, reading, path, slack)


def read_mask(source: str | Path) -> np.ndarray:
    """One mask, bool (C, H, W): true where a pixel is at least half of white.

    In integers of 0 and 1, white is 1.
    """
    path, reading = parse(source)
    raw = _decode(path, reading)
    low, high = raw.array.min(), raw.array.max()
    if raw.array.dtype.kind in "iu" and low >= 0 and high <= 1 and reading.white is None:
        reading = reading._replace(white=1.0)
    check_white(high, raw.array.dtype, reading, path)
    return finished(raw, reading, path) >= 0.5


def read_folder(source: str | Path) -> np.ndarray:
    """All pictures of a folder and its folders, in the order of their names, float32 (N, C, H,
    W)."""
    folder, reading = parse(source)
    files = pictures_of(folder)
    first = picture(files[0], reading).array
    needed = len(files) * first.size * (4 + first.itemsize)
    memory.check(needed, f"{folder}, with its {len(files)} pictures,", _STREAMED)
    raws = [picture(file, reading) for file in files]
    for file, raw in zip(files, raws):
        check_alike((files[0], raws[0].array.shape), (file, raw.array.shape), reading, folder)
    # One look at all pictures of a depth: a single one may be dark.
    dtypes = {raw.array.dtype for raw in raws}
    alike = len(dtypes) == 1 and reading.size is None and reading.channels is None
    if alike and all(raw.alpha is None for raw in raws):
        array = np.stack([raw.array for raw in raws])
        check_white(array.max(), array.dtype, reading, folder)
        return unit(Raw(array), reading, folder)

    for dtype in dtypes:
        check_white(
            max(raw.array.max() for raw in raws if raw.array.dtype == dtype), dtype, reading, folder
        )

    return np.stack([finished(raw, reading, file) for file, raw in zip(files, raws)])


def from_array(array: np.ndarray, source: str | Path) -> np.ndarray:
    """A set of images, float32 (N, C, H, W), from the array that the file `source` holds."""
    path, reading = parse(source)
    check_single(path, reading)
    check_set(getattr(array, "shape", ()), outline(array), path)
    array = channels_first(array, 3, reading, path)
    check_white(array.max(), array.dtype, reading, path)
    return finished(Raw(array), reading, path)


def load_array(path: Path) -> np.ndarray:
    """The array of a .npy file, which its header must not declare larger than file and memory."""
    memory.check(headers.of_npy(path).nbytes, f"{path}")
    try:
        return np.load(path, allow_pickle=False)
    except DAMAGE as error:
        raise ValueError(f"{path} is not a readable .npy file ({type(error).__name__}).") from None


def _decode(path, reading):
    """One image as it is stored."""
    check_single(path, reading)
    suffix = path.suffix.lower()
    if suffix not in (*PICTURES, ".npy"):
        raise ValueError(f"{path} must be a {', '.join(PICTURES)} or .npy file.")
    if not path.exists():
        raise ValueError(f"{path} does not exist.")
    if suffix == ".npy":
        return Raw(channels_first(load_array(path), 2, reading, path))
    return picture(path, reading)


def check_single(path: Path, reading: Reading) -> None:
    """Refuse by-folder for what is no folder."""
    if reading.by_folder:
        raise ValueError(f"{path} is no folder, whose folders are classes (by-folder).")
