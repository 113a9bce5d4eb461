"""Saves of a run: each a folder that appears whole, with a manifest that names every file.

    run/step-000000500/manifest.json, weights.safetensors, state.safetensors

A save is committed by one rename. The one before it is there until then, and after it, for the day
when the newest is damaged; older ones are removed, but for as many as are wanted and the best one.
Files that only grow, such as a log, stay where they are: a save knows the part of them that belongs
to it.
"""

import hashlib
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

from fastscore import regular
from fastscore.training import files

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{9,})")


class Save:
    """What a run was after `step` updates."""

    folder: Path
    step: int

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.step = int(_NAME.fullmatch(folder.name)[1])

    def manifest(self) -> dict[str, Any]:
        """What the save consists of, and what was said about it.

        Raises:
            ValueError: it is missing or damaged.
        """
        path = self.folder / MANIFEST
        data = _read(path)
        if files.is_sealed(data) is not True:
            raise ValueError(f"{path} is damaged: its SHA-256 is not the one that it states.")
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            found = None
        if not _is_manifest(found):
            raise ValueError(f"{path} is damaged: it is sealed, but no manifest.")
        if found["step"] != self.step:
            raise ValueError(f"{path} is that of step {found['step']}, not of this folder.")
        return found

    def read(self, name: str) -> bytes:
        """The bytes of one of its files.

        Raises:
            ValueError: they are not those that were saved.
        """
        path = self.folder / name
        data = _read(path)
        _compare(path, data, self.manifest()["files"][name])
        return data

    def has_log(self, name: str) -> bool:
        """Whether a part of that log belongs to it."""
        return name in self.manifest()["logs"]

    def log(self, name: str) -> bytes:
        """The part of a log that belongs to the save; empty where there was none.

        Raises:
            ValueError: it is not what was saved.
        """
        expected = self.manifest()["logs"].get(name)
        if expected is None:
            return b""
        path = self.folder.parent / name
        data = _read(path)[: expected["bytes"]]
        _compare(path, data, expected)
        return data

    def contents(self) -> dict[str, bytes]:
        """The bytes of all of its files.

        Raises:
            ValueError: they are not those that were saved.
        """
        return {name: self.read(name) for name in self.manifest()["files"]}

    def damage(self) -> str | None:
        """What is wrong with it, logs apart; None where nothing is."""
        try:
            for name in self.manifest()["files"]:
                self.read(name)
        except ValueError as error:
            return str(error)
        return None


def at(folder: str | Path) -> Save | None:
    """The save whose folder it is; None where it is none."""
    folder = Path(folder)
    found = _NAME.fullmatch(folder.name) and (folder / MANIFEST).exists()
    return Save(folder) if found else None


def of_run(folder: str | Path) -> list[Save]:
    """The saves of a run, the newest first."""
    folder = Path(folder)
    names = os.listdir(folder) if folder.is_dir() else []
    found = [Save(folder / name) for name in names if _NAME.fullmatch(name)]
    return sorted(found, key=lambda save: save.step, reverse=True)


def read_newest(folder: str | Path, name: str) -> bytes | None:
    """A file of the newest save of a run; None where there is no save.

    Raises:
        ValueError: it is damaged; the message tells the way out.
    """
    saves = of_run(folder)
    if not saves:
        return None
    try:
        return saves[0].read(name)
    except ValueError as error:
        intact = [save.step for save in saves[1:] if save.damage() is None]
        way_out = "no other save of the run is intact"
        if intact:
            way_out = f"train --resume goes on from step {intact[0]}, which is intact"
        raise ValueError(f"{str(error).rstrip('.')}; {way_out}.") from None


def newest_intact(folder: str | Path) -> tuple[Save, dict[str, bytes]] | None:
    """The newest save of a run that is as it was written, and its contents; None without any save.

    A warning tells of those that are not, older ones too.

    Raises:
        ValueError: none of them is.
    """
    intact, damages = None, {}
    for save in of_run(folder):
        try:
            # Of each file, the bytes that were checked are those that are used.
            if intact is None:
                intact = save, save.contents()
            elif (damage := save.damage()) is not None:
                damages[save.step] = damage
        except ValueError as error:
            damages[save.step] = str(error)

    found = " ".join(damages.values())
    if found and intact is None:
        raise ValueError(f"no save of the run in {folder} is intact: {found}")
    if found:
        skipped = ", ".join(map(str, damages))
        warnings.warn(
            f"the run in {folder} goes on from its save of step {intact[0].step}; that of step "
            f"{skipped} is not used: {found}",
            stacklevel=2,
        )
    return intact


def commit(
    folder: str | Path,
    step: int,
    contents: dict[str, bytes],
    *,
    last: Save | None = None,
    keep: int = 2,
    best: int | None = None,
    about: dict[str, Any] | None = None,
    logs: tuple[str, ...] = (),
) -> Save:
    """Save a run: afterwards, this save, `last` and those before it are there, `keep` in all.

    Args:
        contents: the bytes of each file.
        last: the intact save before it, which is kept; itself where it is of the same step.
        keep: at least 2.
        best: the step of a save that is kept beside them.
        about: whatever else the manifest is to say.
        logs: names of files beside the save that only grow; what is in them belongs to the save.
    """
    folder = Path(folder)
    if last is not None and last.step == step:
        return last
    if last is not None:
        before = of_run(folder)
        older = [save.step for save in before if save.step <= last.step]
        kept = {best, *older[: keep - 1]}
        for other in before:
            if other.step not in kept:
                files.remove_folder(other.folder)

    manifest = {
        "sha256": files.BLANK,
        "step": step,
        **(about or {}),
        "files": {name: _entry(data) for name, data in contents.items()},
        "logs": {name: _flushed(folder / name) for name in logs if (folder / name).exists()},
    }
    sealed = files.sealed(json.dumps(manifest, indent=1).encode())
    target = folder / f"step-{step:09d}"
    files.write_folder(target, {**contents, MANIFEST: sealed})
    return Save(target)


def forget_after(save: Save, name: str) -> None:
    """Cut off what a log has got after a save: those steps are done again."""
    path = save.folder.parent / name
    kept = len(save.log(name))
    if path.exists() and path.stat().st_size > kept:
        os.truncate(path, kept)
        _flushed(path)


def _is_manifest(found):
    """Whether it has what `commit` writes, and names no file outside its folder."""
    if not isinstance(found, dict) or not isinstance(found.get("step"), int):
        return False
    parts = [found.get("files"), found.get("logs")]
    if not all(isinstance(part, dict) for part in parts):
        return False
    return all(
        os.path.basename(name) == name != ""
        and isinstance(entry, dict)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("sha256"), str)
        for part in parts
        for name, entry in part.items()
    )


def _entry(data):
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _flushed(path):
    """The entry of a log, which is on the disk before the save that names it."""
    with files.named_where_full(path, None), open(path, "rb") as file:
        os.fsync(file.fileno())
        return _entry(file.read())


def _read(path):
    try:
        return regular.read(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is damaged: it is missing.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None


def _compare(path, data, expected):
    if len(data) != expected["bytes"]:
        raise ValueError(
            f"{path} is damaged: {len(data)} bytes are there, {expected['bytes']} were saved."
        )
    if hashlib.sha256(data).hexdigest() != expected["sha256"]:
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one recorded in {MANIFEST}.")
