"""PNG files with 16 bits for each of several channels, of which Pillow keeps 8."""

import struct
import zlib

import numpy as np

# Of IHDR: grey and alpha, colours, colours and alpha.
CHANNELS = {2: 3, 4: 2, 6: 4}
# By EXIF orientation, from what is stored to what is upright.
_UPRIGHT = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[:, ::-1],
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x.swapaxes(0, 1)[::-1],
}


def read(data: bytes, orientation: int = 1) -> np.ndarray:
    """The samples of a file that is not interlaced, upright: uint16 (H, W, C).

    Raises:
        ValueError: the file is damaged, or interlaced.

    Source: Portable Network Graphics (third edition, W3C 2025), sections 5, 9 and 10.
    """
    header, packed = _chunks(data)
    width, height, _, colour, *_, interlaced = struct.unpack(">IIBBBBB", header)
    if interlaced:
        raise ValueError("interlaced")
    size = 2 * CHANNELS[colour]   # bytes of a pixel

    expected = height * (1 + width * size)
    # Not a byte more is unpacked.
    lines = zlib.decompressobj().decompress(packed, expected)
    if len(lines) != expected:
        raise ValueError("cut")
    lines = np.frombuffer(lines, np.uint8).reshape(height, -1)
    stored = _unfiltered(lines[:, 0], lines[:, 1:].reshape(height, width, size))
    samples = stored.view(">u2").astype(np.uint16)
    return _UPRIGHT.get(orientation, lambda x: x)(samples)


def _chunks(data):
    """IHDR, and all IDAT together."""
    header, packed, place = None, [], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        name = data[place + 4 : place + 8]
        body = data[place + 8 : place + 8 + length]
        end = data[place + 8 + length : place + 12 + length]
        if name in (b"IHDR", b"IDAT"):
            if len(end) < 4 or struct.unpack(">I", end)[0] != zlib.crc32(name + body):
                raise ValueError("sum")
            header = body if name == b"IHDR" and header is None else header
            packed += [body] if name == b"IDAT" else []
        if name == b"IEND":
            break
        place += 12 + length
    if header is None or not packed:
        raise ValueError("no image")
    return header, b"".join(packed)


def _unfiltered(filters, lines):
    """Bytes (H, W, size) from what the filter of each line has left of them.

        byte = stored + {0, a, b, (a + b) >> 1, Paeth(a, b, c)}    mod 256

    with a to the left, b above, c above to the left. Pixels of the same x + y need only those of
    less, so that each such diagonal is computed at once.
    """
    height, width, size = lines.shape
    if filters.max() > 4:
        raise ValueError("filter")

    # With a line above and a column to the left, of zeros.
    out = np.zeros((height + 1, width + 1, size), np.uint8)
    for t in range(height + width - 1):
        y = np.arange(max(0, t - width + 1), min(height, t + 1))
        x = t - y
        a, b, c = (v.astype(np.int16) for v in (out[y + 1, x], out[y, x + 1], out[y, x]))
        f = filters[y][:, None]
        guess = np.select([f == 1, f == 2, f == 3, f == 4], [a, b, (a + b) >> 1, _paeth(a, b, c)])
        out[y + 1, x + 1] = lines[y, x] + guess.astype(np.uint8)
    return np.ascontiguousarray(out[1:, 1:])


def _paeth(a, b, c):
    """Of a, b and c, in this order, the one that is nearest to a + b - c."""
    by_a, by_b, by_c = abs(b - c), abs(a - c), abs(a + b - 2 * c)
    return np.where((by_a <= by_b) & (by_a <= by_c), a, np.where(by_b <= by_c, b, c))
