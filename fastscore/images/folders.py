"""The pictures of a folder: which files they are, and whether they fit each other."""

import os
from pathlib import Path

from fastscore.images.pictures import PICTURES
from fastscore.images.readings import Reading

# Images that a folder must not hold unread.
UNREAD = (".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")


def pictures_of(folder: Path) -> list[Path]:
    """The pictures of a folder and its folders, in the order of their names.

    What begins with a dot is not looked at (macOS puts `._a.png` beside `a.png`), and links to
    folders are not followed: they may lead back.

    Raises:
        ValueError: there are none, or images of other formats.
    """
    files, others = [], []
    waiting = [str(folder)]
    while waiting:
        for entry in _entries(waiting.pop()):
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
            elif suffix in PICTURES:
                files.append(entry.path)
            elif suffix in UNREAD:
                others.append(entry.path)

    if not files:
        raise ValueError(f"{folder} holds no images ({', '.join(PICTURES)}).")
    if others:
        raise ValueError(
            f"{folder} holds images that are not read, such as {Path(min(others)).name}; make them "
            ".png files or take them out."
        )

    # Folder by folder, as paths compare: a/b.png comes before a-b.png.
    return [Path(file) for file in sorted(files, key=lambda file: file.split(os.sep))]


def _entries(folder):
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise ValueError(f"{folder} cannot be listed: {error.strerror}.") from None


def check_alike(
    first: tuple[Path, tuple[int, ...]],
    other: tuple[Path, tuple[int, ...]],
    reading: Reading,
    folder: Path,
) -> None:
    """Refuse two pictures (file, stored shape) that do not belong in one set."""
    (file, shape), (another, found) = first, other
    if found[0] != shape[0] and reading.channels is None:
        raise ValueError(
            f"{folder} holds grey images and images in colour ({file.name} has {shape[0]} "
            f"channels, {another.name} {found[0]}): say {folder}:grey or {folder}:rgb."
        )
    if found[1:] != shape[1:] and reading.size is None:
        sizes = f"{file.name} is {shape[1:]}, {another.name} {found[1:]}"
        raise ValueError(
            f"all images must have one size; {sizes} ({folder}:size=32 or the like brings them to "
            "one)."
        )
