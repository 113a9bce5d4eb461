"""One reader for data sets, observations and masks.

The value of every mode, depth and layout, and what is asked for or refused.
"""

import io
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastscore import cli, datasets, images
from fastscore.cli import observations, pictures

GREY = np.array([[0, 51, 102], [153, 204, 255]], np.uint8)
COLOURS = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], -1)   # (2, 3, 3), (H, W, C)
UNIT = torch.from_numpy(GREY / 255).float()[None]
UNIT_RGB = torch.from_numpy(COLOURS.transpose(2, 0, 1) / 255).float()


def save(path, array, mode=None, **options):
    Image.fromarray(array, mode).save(path, **options) if mode else Image.fromarray(array).save(
        path, **options
    )
    return path


def opaque(array):
    full = np.full((*array.shape[:2], 1), 255, np.uint8)
    return np.concatenate([array if array.ndim == 3 else array[..., None], full], -1)


def palette(array):
    """The image as indices into its own colours."""
    colours, index = np.unique(array.reshape(-1, 3), axis=0, return_inverse=True)
    image = Image.fromarray(index.reshape(array.shape[:2]).astype(np.uint8), "P")
    image.putpalette(colours.astype(np.uint8).tobytes())
    return image


def filtered(row, above, kind, size):
    """A line of a PNG by its filter: section 9.2 of its specification, byte by byte."""
    out = bytearray([kind])
    for i, byte in enumerate(row):
        a = row[i - size] if i >= size else 0
        b = above[i]
        c = above[i - size] if i >= size else 0
        nearest = min((abs(b - c), 0, a), (abs(a - c), 1, b), (abs(a + b - 2 * c), 2, c))[2]
        out.append((byte - (0, a, b, (a + b) // 2, nearest)[kind]) % 256)
    return bytes(out)


def png(
    array, depth, colour, transparent=None, *, filters=(0,), interlaced=0, lines=None, exif=b""
):
    """A PNG of any depth, by hand: Pillow writes few of them."""
    import struct
    import zlib

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    h, w = array.shape[:2]
    if depth < 8:
        bits = (
            ((array[..., None] >> np.arange(depth - 1, -1, -1)) & 1).astype(np.uint8).reshape(h, -1)
        )
        rows = [np.packbits(row).tobytes() for row in bits]
    else:
        rows = [row.astype(f">u{depth // 8}").tobytes() for row in array]
    size = max(1, len(rows[0]) // w)
    above = [bytes(len(rows[0])), *rows]
    kinds = [filters[i % len(filters)] for i in range(h)]
    found = [filtered(*line, size) for line in zip(rows, above, kinds)]
    data = zlib.compress(b"".join(found[:lines]))
    header = struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, interlaced)
    middle = (
        b""
        if transparent is None
        else chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    )
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + middle
        + (chunk(b"eXIf", exif) if exif else b"")
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )


def written(path, content):
    path.write_bytes(content)
    return path


# 16 bits for each of three, and of four: values that 8 bits do not hold.
DEEP4 = np.random.default_rng(0).integers(0, 65536, (7, 9, 4))
DEEP = DEEP4[..., :3]
ODD = np.arange(6).reshape(2, 3) * 13107   # 0 to 65535, no multiple of 256
BITS = np.array([[0, 1, 1], [1, 0, 1]])
PICTURES = {
    "1": (lambda p: save(p, BITS.astype(bool)), torch.tensor(BITS).float()[None]),
    "L": (lambda p: save(p, GREY), UNIT),
    "L-2-bit": (
        lambda p: written(p, png(np.arange(6).reshape(2, 3) % 4, 2, 0)),
        torch.tensor([[0, 1, 2], [3, 0, 1]])[None] / 3,
    ),
    "L-4-bit": (
        lambda p: written(p, png(np.arange(6).reshape(2, 3) * 3, 4, 0)),
        torch.arange(6).reshape(1, 2, 3) / 5,
    ),
    "I;16": (lambda p: save(p, ODD.astype(np.uint16)), torch.from_numpy(ODD / 65535).float()[None]),
    "LA": (lambda p: save(p, opaque(GREY), "LA"), UNIT),
    "P": (lambda p: palette(COLOURS).save(p), UNIT_RGB),
    "RGB": (lambda p: save(p, COLOURS), UNIT_RGB),
    "RGBA": (lambda p: save(p, opaque(COLOURS), "RGBA"), UNIT_RGB),
    "transparent-colour-unused": (lambda p: save(p, COLOURS, transparency=(1, 2, 3)), UNIT_RGB),
}


@pytest.mark.parametrize("use", ["folder", "observation"])
@pytest.mark.parametrize("mode", PICTURES)
def test_every_mode_and_depth_has_one_value_everywhere(tmp_path, mode, use):
    write, expected = PICTURES[mode]
    path = write(tmp_path / "x.png") or tmp_path / "x.png"
    found = (
        datasets.load(tmp_path)[0][0]
        if use == "folder"
        else observations.load_image(str(path), None)[0]
    )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "PNG"])
def test_suffixes_of_any_case_are_read_everywhere(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(np.full((8, 8), 128, np.uint8)).save(path, "PNG" if suffix == "PNG" else "JPEG")
    for found in (datasets.load(tmp_path)[0][0], observations.load_image(str(path), None)[0]):
        torch.testing.assert_close(found, torch.full((1, 8, 8), 128 / 255))
    assert observations.load_mask(str(path), (1, 8, 8)).all()


def test_photographs_are_upright(tmp_path):
    """EXIF orientation 6: the camera was turned; the stored rows are columns, read upwards."""
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "x.png", GREY, exif=exif)
    upright = torch.from_numpy(np.rot90(GREY, -1) / 255).float()[None]
    torch.testing.assert_close(datasets.load(tmp_path)[0][0], upright)


def half_transparent():
    array = opaque(COLOURS)
    array[0, 0, 3], array[1, 1, 3] = 0, 51
    return array


TRANSPARENT = {
    "RGBA": lambda p: save(p, half_transparent(), "RGBA"),
    "LA": lambda p: save(p, half_transparent()[..., [0, 3]], "LA"),
    "palette": lambda p: palette(COLOURS).save(p, transparency=0),
    "grey": lambda p: save(p, GREY, transparency=51),
    "grey-1-bit": lambda p: written(p, png(BITS, 1, 0, [1])),
    "grey-1-bit-black": lambda p: written(p, png(BITS, 1, 0, [0])),
    "grey-2-bit": lambda p: written(p, png(np.arange(6).reshape(2, 3) % 4, 2, 0, [2])),
    "colour": lambda p: save(p, COLOURS, transparency=tuple(map(int, COLOURS[0, 1]))),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparent_pixels_are_asked_for(tmp_path, kind):
    TRANSPARENT[kind](tmp_path / "x.png")
    for read in (datasets.load, lambda p: observations.load_image(f"{p}/x.png", None)):
        with pytest.raises(
            ValueError,
            match=r"x.png has transparent pixels: say what shows behind them, .*:on-white or "
                  r".*:on-black",
        ):
            read(tmp_path)
    white, black = (datasets.load(f"{tmp_path}:on-{name}")[0] for name in ("white", "black"))
    shown = white - black  # 1 - alpha, in each colour
    hidden = {"RGBA": 1.8, "LA": 1.8, "palette": None, "grey-1-bit": 4, "grey-1-bit-black": 2}
    hidden = hidden.get(kind, 1)
    assert float(shown.max()) == 1 and (
        hidden is None or float(shown[0, 0].sum()) == pytest.approx(hidden)
    )


def test_background_shows_through_by_alpha(tmp_path):
    save(tmp_path / "x.png", half_transparent(), "RGBA")
    found = datasets.load(f"{tmp_path}:on-white")[0][0]
    expected = UNIT_RGB.clone()
    expected[:, 0, 0] = 1
    expected[:, 1, 1] = 0.2 * UNIT_RGB[:, 1, 1] + 0.8
    torch.testing.assert_close(found, expected)


def test_grey_beside_colours_is_asked_for(tmp_path):
    save(tmp_path / "a.png", GREY), save(tmp_path / "b.png", COLOURS)
    with pytest.raises(
        ValueError,
        match=r"grey images and images in colour \(a.png has 1 channels, b.png 3\): "
              r"say .*:grey or .*:rgb",
    ):
        datasets.load(tmp_path)
    rgb, grey = (datasets.load(f"{tmp_path}:{word}")[0] for word in ("rgb", "grey"))
    torch.testing.assert_close(rgb, torch.stack([UNIT.expand(3, 2, 3), UNIT_RGB]))
    luma = (torch.tensor([0.299, 0.587, 0.114])[:, None, None] * UNIT_RGB).sum(0, keepdim=True)
    torch.testing.assert_close(grey, torch.stack([UNIT, luma]))


REFUSED = {
    "interlaced-sixteen-bit-colour": (
        lambda p: written(p, png(DEEP, 16, 2, interlaced=1)),
        "is interlaced and has 16 bits for each colour; store it plain",
    ),
    "damaged-sixteen-bit-colour": (
        lambda p: written(p, png(DEEP, 16, 2).replace(b"IDAT", b"IDAT\1", 1)),
        r"is not a readable PNG or JPEG image \(",
    ),
    "short-sixteen-bit-colour": (
        lambda p: written(p, png(DEEP, 16, 2, lines=-1)),
        r"is not a readable PNG or JPEG image \(",
    ),
    "frames": (
        lambda p: Image.fromarray(GREY).save(
            p, save_all=True, append_images=[Image.fromarray(GREY[::-1])]
        ),
        "holds 2 frames",
    ),
    "zeros-and-ones": (
        lambda p: save(p, BITS.astype(np.uint8)),
        r"uint8 up to 1, which hardly means 1/255 of white: say .*:max=1 ",
    ),
    "twelve-bits": (
        lambda p: save(p, (ODD >> 4).astype(np.uint16)),
        r"uint16 up to 4095, .*: say .*:max=4095",
    ),
    "damaged": (
        lambda p: written(p, png(GREY, 8, 0)[:-30]),
        r"is not a readable PNG or JPEG image \(",
    ),
    "text": (lambda p: written(p, b"hello"), r"is not a readable PNG or JPEG image \("),
}


@pytest.mark.parametrize("use", ["folder", "observation"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_picture_does_not_tell_is_refused_or_asked_for(tmp_path, kind, use):
    write, message = REFUSED[kind]
    write(tmp_path / "x.png")
    with pytest.raises(ValueError, match=message) as error:
        datasets.load(tmp_path) if use == "folder" else observations.load_image(
            f"{tmp_path}/x.png", None
        )
    assert "\n" not in str(error.value)


def test_cmyk_is_refused(tmp_path):
    Image.new("CMYK", (4, 4), (0, 0, 0, 255)).save(tmp_path / "x.jpg")
    with pytest.raises(
        ValueError, match=r"x\.jpg is a picture of mode CMYK, whose colours depend on a profile"
    ):
        datasets.load(tmp_path)


def test_white_can_be_said(tmp_path):
    save(tmp_path / "x.png", BITS.astype(np.uint8))
    torch.testing.assert_close(
        datasets.load(f"{tmp_path}:max=1")[0][0, 0], torch.tensor(BITS).float()
    )
    np.savez(tmp_path / "x.npz", images=np.arange(17).repeat(2).reshape(2, 17, 1, 1))   # int64
    with pytest.raises(ValueError, match="int64 up to 16, which does not tell white"):
        datasets.load(f"{tmp_path}/x.npz:channels-last")
    found, _ = datasets.load(f"{tmp_path}/x.npz:channels-last:max=16")
    assert (
        found.shape == (2, 1, 17, 1)
        and float(found.max()) == 1
        and float(found[0, 0, 2, 0]) == 1 / 16
    )


def test_pictures_in_a_folder_that_are_not_read_are_named(tmp_path):
    save(tmp_path / "a.png", GREY), save(tmp_path / "b.webp", GREY)
    with pytest.raises(ValueError, match=r"holds images that are not read, such as b\.webp"):
        datasets.load(tmp_path)


@pytest.mark.parametrize("filters", [(0,), (1,), (2,), (3,), (4,), (4, 3, 2, 1, 0), (0, 4, 4, 3)])
def test_sixteen_bits_of_every_channel_are_read(tmp_path, filters):
    """By every filter of the format, and each beside the others."""
    deep = torch.from_numpy(DEEP / 65535).float().permute(2, 0, 1)
    written(tmp_path / "x.png", png(DEEP, 16, 2, filters=filters))
    torch.testing.assert_close(datasets.load(tmp_path)[0][0], deep, rtol=0, atol=1e-7)

    # With alpha: opaque, and not.
    full = DEEP4.copy()
    full[..., 3] = 65535
    for array, colour in ((full, 6), (full[..., [0, 3]], 4)):
        written(tmp_path / "x.png", png(array, 16, colour, filters=filters))
        expected = deep if colour == 6 else deep[:1]
        torch.testing.assert_close(datasets.load(tmp_path)[0][0], expected, rtol=0, atol=1e-7)
    written(tmp_path / "x.png", png(DEEP4, 16, 6, filters=filters))
    with pytest.raises(ValueError, match=r"x\.png has transparent pixels"):
        datasets.load(tmp_path)
    alpha = torch.from_numpy(DEEP4[..., 3] / 65535).float()
    found = datasets.load(f"{tmp_path}:on-white")[0][0]
    torch.testing.assert_close(found, deep * alpha + 1 - alpha, rtol=0, atol=3e-7)


def test_a_transparent_colour_of_sixteen_bits_is_asked_for(tmp_path):
    colour = [int(v) for v in DEEP[3, 4]]
    written(tmp_path / "x.png", png(DEEP, 16, 2, colour))
    white, black = (datasets.load(f"{tmp_path}:on-{name}")[0][0] for name in ("white", "black"))
    shown = torch.zeros(3, 7, 9)
    shown[:, 3, 4] = 1
    torch.testing.assert_close(white - black, shown)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_of_sixteen_bits_are_as_upright_as_those_of_eight(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    block = exif.tobytes()[6:]
    (tmp_path / "8").mkdir(), (tmp_path / "16").mkdir()
    grey = random_images(5, 8, 3)
    written(tmp_path / "8" / "x.png", png(grey, 8, 2, exif=block))
    written(tmp_path / "16" / "x.png", png(grey.astype(int) * 257, 16, 2, exif=block))
    eight, sixteen = (datasets.load(tmp_path / depth)[0] for depth in ("8", "16"))
    assert eight.shape[2:] == ((8, 5) if orientation > 4 else (5, 8))
    torch.testing.assert_close(sixteen, eight, rtol=0, atol=1e-7)


# Arrays


def archive(path, array, **others):
    np.savez(path / "x.npz", images=array, **others)
    return path / "x.npz"


def random_images(*shape):
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["|u1", "<u2", ">u2", "<f2", ">f4", "<f8", "|b1"])
def test_arrays_are_read_by_dtype_and_by_the_axis_that_can_be_channels(tmp_path, channels, dtype):
    last = random_images(5, 8, 6, channels)
    unit = torch.from_numpy(last.transpose(0, 3, 1, 2) / 255).float()
    if dtype == "|b1":
        unit, last = (unit > 0.5).float(), last > 127
    stored = {"u": last.astype(int), "f": last / 255, "b": last}[np.dtype(dtype).kind]
    stored = (stored * 257 if dtype.endswith("u2") else stored).astype(dtype)
    for array in (stored, stored.transpose(0, 3, 1, 2)):
        found, labels = datasets.load(archive(tmp_path, array))
        assert labels is None and found.dtype == torch.float32
        torch.testing.assert_close(found, unit, rtol=0, atol=1e-3 if dtype == "<f2" else 1e-6)
        np.save(tmp_path / "one.npy", array[0])
        torch.testing.assert_close(
            observations.load_image(f"{tmp_path}/one.npy", None)[0], found[0]
        )
    np.save(tmp_path / "all.npy", stored)
    torch.testing.assert_close(datasets.load(f"{tmp_path}/all.npy")[0], found)


@pytest.mark.parametrize(
    "shape",
    [(5, 1, 16, 3), (5, 3, 16, 1), (5, 3, 3, 3), (5, 8, 8, 8), (5, 13, 32, 32), (5, 2, 4, 4)],
)
def test_ambiguous_layouts_are_asked_for(tmp_path, shape):
    array = random_images(*shape)
    np.save(tmp_path / "one.npy", array[0])
    file = archive(tmp_path, array)
    for read in (lambda word: datasets.load(f"{file}{word}")[0],
                 lambda word: observations.load_image(f"{tmp_path}/one.npy{word}", None)[0][None]):
        with pytest.raises(
            ValueError,
            match=r"may be the first or the last axis of an image: "
                  r"say .*:channels-first or .*:channels-last",
        ):
            read("")
        first, last = read(":channels-first"), read(":channels-last")
        assert torch.equal(first, torch.from_numpy(array[: len(first)]) / 255)
        assert torch.equal(last, torch.from_numpy(array[: len(last)].transpose(0, 3, 1, 2)) / 255)


@pytest.mark.parametrize(
    "array, message",
    [
        (
            np.zeros((28, 28, 3), np.uint8),
            r"may hold 28 grey images of 28 x 3 pixels, or one image",
        ),
        (np.zeros((4, 4), np.uint8), r"must hold images \(N, H, W\), .*; got uint8 \(4, 4\)"),
        (np.zeros((0, 4, 4), np.uint8), r"got uint8 \(0, 4, 4\)"),
        (
            np.full((2, 8, 8), 255.0),
            r"must have values in \[0, 1\], or say .*:max=N; got 255 to 255",
        ),
        (np.full((2, 8, 8), -1.0), r"must have values in \[0, 1\]"),
        (np.full((2, 8, 8), np.nan), "must hold finite numbers"),
        (np.full((2, 8, 8), 1j), r"must hold bools, integers or floats; got complex128"),
        (np.full((2, 8, 8), "a"), r"must hold bools, integers or floats; got <U1"),
        (np.full((2, 8, 8), 200), r"int64 up to 200, which does not tell white: say .*:max=255"),
        (
            np.full((2, 8, 8), 1, np.uint8),
            r"uint8 up to 1, .*: say .*:max=1 or what it is; .*:max=255 if the images are so dark",
        ),
        (np.full((2, 8, 8), 16, np.uint8), r"uint8 up to 16, .*: say .*:max=16"),
        (np.full((2, 8, 8), None), "is not a readable .npz file of plain arrays"),
    ],
)
def test_wrong_arrays_are_one_sentence(tmp_path, array, message):
    with pytest.raises(ValueError, match=message) as error:
        datasets.load(archive(tmp_path, array))
    assert "\n" not in str(error.value) and "x.npz" in str(error.value)


@pytest.mark.parametrize(
    "labels",
    [
        np.zeros((3, 2), int),
        np.zeros(4, int),
        np.array([0.5, 1, 2]),
        np.array([-1, 0, 1]),
        np.array(["a", "b", "c"]),
    ],
    ids=["one-hot", "too-many", "fractions", "negative", "text"],
)
def test_labels_are_whole_numbers_one_for_each_image(tmp_path, labels):
    file = archive(tmp_path, random_images(3, 8, 8), labels=labels)
    with pytest.raises(
        ValueError, match="labels must be 3 whole numbers from 0, one for each image"
    ):
        datasets.load(file)


def test_labels_may_be_stored_as_floats(tmp_path):
    _, labels = datasets.load(
        archive(tmp_path, random_images(3, 8, 8), labels=np.array([2.0, 0, 1]))
    )
    assert labels.tolist() == [2, 0, 1] and labels.dtype == torch.int64


def test_damaged_files_are_one_sentence(tmp_path):
    whole = archive(tmp_path, random_images(3, 8, 8)).read_bytes()
    np.save(tmp_path / "a.npy", random_images(3, 8, 8))
    texts = {
        "npz": [
            b"",
            b"PK",
            whole[:100],
            whole[: len(whole) // 2],
            whole[:-10],
            (tmp_path / "a.npy").read_bytes(),
        ],
        "npy": [b"", b"hello", (tmp_path / "a.npy").read_bytes()[:-10], whole],
    }
    for suffix, contents in texts.items():
        for content in contents:
            file = written(tmp_path / f"x.{suffix}", content)
            with pytest.raises(ValueError, match=rf"x\.{suffix} is not a readable \.{suffix} file"):
                datasets.load(file)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as empty:
        empty.writestr("other.txt", "x")
    with pytest.raises(ValueError, match="must hold an array named images"):
        datasets.load(written(tmp_path / "x.npz", buffer.getvalue()))


@pytest.mark.parametrize(
    "word, message",
    [
        ("grey:rgb", "says two things "
                     "about one"), ("max=0", "max=N must be a positive number; got 'max=0'"),
        ("max=white", "max=N must be a positive number"),
        ("channels-first", "is a picture; channels-first and channels-last are for arrays"),
    ],
)  # fmt: skip
def test_wrong_readings_are_one_sentence(tmp_path, word, message):
    save(tmp_path / "x.png", GREY)
    with pytest.raises(ValueError, match=message):
        datasets.load(f"{tmp_path}:{word}")
    with pytest.raises(
        ValueError, match=r"folder of images or an \.npz or \.npy file; got 'digits:rgb'"
    ):
        datasets.load("digits:rgb")


def test_channels_that_no_weights_fit_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"x.npz:grey must have 1 or 3 channels to go by; it has 4"
    ):
        datasets.load(f"{archive(tmp_path, random_images(2, 8, 8, 4))}:grey")


# Masks


KNOWN = np.eye(8, dtype=np.uint8)
MASKS = {
    "bool.npy": KNOWN.astype(bool),
    "0-1.npy": KNOWN,
    "int64.npy": KNOWN.astype(int),
    "0-255.npy": KNOWN * 255,
    "float.npy": KNOWN / 1.0,
    "0-1.png": KNOWN,
    "0-255.png": KNOWN * 255,
    "1-bit.png": KNOWN.astype(bool),
    "16-bit.png": KNOWN.astype(np.uint16) * 65535,
    "rgb.png": np.stack([KNOWN * 255] * 3, -1),
    "rgba.png": opaque(np.stack([KNOWN * 255] * 3, -1)),
    "soft.png": KNOWN * 155 + 50,
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_masks_of_every_kind_know_the_same_pixels(tmp_path, name, channels):
    path = tmp_path / name
    np.save(path, MASKS[name]) if name.endswith("npy") else save(path, MASKS[name])
    mask = observations.load_mask(str(path), (channels, 8, 8))
    assert torch.equal(mask, torch.eye(8, dtype=torch.bool).expand(channels, 8, 8))


@pytest.mark.parametrize(
    "array, message",
    [
        (np.eye(8) * 255, r"must have values in "
                          r"\[0, 1\]"), (np.eye(8).astype(np.uint16) * 255, "uint16 up to 255"),
        (np.eye(8).astype(int) * 255, "int64 up "
                                      "to 255"), (np.eye(8) * np.nan, "must hold finite numbers"),
        (np.eye(7, dtype=bool), r"must be a mask of \(8, 8\) pixels; got \(7, 7\)"),
        (np.stack([KNOWN, 1 - KNOWN, KNOWN], -1), "hides other pixels in each colour; "
                                                  "the run's images have 1 channels"),
    ],
)  # fmt: skip
def test_ambiguous_masks_are_refused(tmp_path, array, message):
    np.save(tmp_path / "m.npy", array)
    with pytest.raises(ValueError, match=message):
        observations.load_mask(f"{tmp_path}/m.npy", (1, 8, 8))


def test_observations_lie_where_noise_explains_them(tmp_path):
    np.save(tmp_path / "y.npy", np.linspace(-0.5, 1.5, 64).reshape(8, 8))
    request = observations.parse(f"inpaint={tmp_path}/y.npy,left-half")
    seen = observations.observe(request, (1, 8, 8), noise=0.06)
    assert float(seen.y.max()) == 1.5
    with pytest.raises(
        ValueError,
        match=r"condition: .*y.npy must have values in \[-0.201, 1.2\].*; got -0.5 to 1.5",
    ):
        observations.observe(request, (1, 8, 8), noise=0.02)


# Whatever can be read can be trained on and shown


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_grids_show_every_number_of_channels(tmp_path, channels):
    x = torch.rand(3, channels, 4, 6)
    pictures.save_grid(tmp_path / "grid.png", x, columns=3)
    found = np.asarray(Image.open(tmp_path / "grid.png"))[::8, ::8]
    bytes_ = (x * 255).round().byte().numpy()
    if channels == 3:
        assert (found[1:5, 1:7] == bytes_[0].transpose(1, 2, 0)).all()
    else:   # the channels of a sample stand side by side
        wide = np.concatenate(list(bytes_[1]), -1)
        assert (
            found.shape == (6, 3 * (6 * channels + 1) + 1)
            and (found[1:5, 6 * channels + 2 : 12 * channels + 2] == wide).all()
        )


def test_a_run_of_two_channels_trains_to_its_end(tmp_path, monkeypatch):
    file = archive(tmp_path, random_images(40, 8, 8, 2))
    arguments = [
        "fastscore", "train", "--data", str(file), "--out", str(tmp_path / "run"), "--steps", "3",
        "--width", "8", "--levels", "3",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code
    assert (tmp_path / "run" / "samples.png").exists()
    assert images.read(tmp_path / "run" / "samples.png").shape[0] == 1


# Sizes


def test_images_are_brought_to_one_size_by_their_middle(tmp_path):
    middle, square = random_images(8, 8), random_images(8, 8)[::-1]
    save(tmp_path / "a.png", np.pad(middle, ((0, 0), (6, 6))))
    save(tmp_path / "b.png", np.ascontiguousarray(square))
    save(tmp_path / "c.png", random_images(30, 9))
    name = f"{tmp_path}:size=8"
    for in_memory in (True, False):
        source = datasets.open(name, in_memory=in_memory)
        found = source.read(torch.arange(3))
        assert source.shape == (1, 8, 8) and torch.equal(found, datasets.load(name)[0])
    # What has the size, or a middle of it, is not changed.
    torch.testing.assert_close(found[0, 0], torch.from_numpy(middle / np.float32(255)))
    assert torch.equal(found[1, 0], torch.from_numpy(square / np.float32(255)))
    assert float(found.min()) >= 0 and float(found.max()) <= 1
    with pytest.raises(ValueError, match=r"must have one size; .*:size=32 or the like brings them"):
        datasets.load(tmp_path)


def test_scaling_is_a_mean_of_areas_where_images_are_smooth(tmp_path):
    """A ramp of four times the size: each pixel is the mean of 16; at the edge Pillow's filter
    leans inward."""
    ramp = np.add.outer(np.arange(32), 2 * np.arange(48)) / 128
    np.save(tmp_path / "x.npy", ramp[None].astype(np.float32))
    expected = ramp.reshape(8, 4, 12, 4).mean((1, 3))
    for source in (f"{tmp_path}/x.npy:size=8x12", f"{tmp_path}/x.npy:size=8x12:rgb"):
        found = datasets.load(source)[0]
        assert found.shape[2:] == (8, 12)
        np.testing.assert_allclose(found[0, 0, 2:-2, 2:-2], expected[2:-2, 2:-2], atol=1e-5)
        again = datasets.open(source, in_memory=False)
        assert again.shape == tuple(found.shape[1:])
        assert torch.equal(again.read(torch.tensor([0])), found)


@pytest.mark.parametrize("size", ["0", "x", "3x", "-4", "8x0", "1e3", "10000"])
def test_sizes_that_are_none_are_one_sentence(tmp_path, size):
    with pytest.raises(ValueError, match="size=N or size=HxW must be sides in pixels"):
        datasets.load(f"{tmp_path}:size={size}")
