"""Weights as safetensors, written whole or not at all, with a digest. No pickle."""

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

import torch


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write beside the target, flush to disk, rename: a reader sees the old file or the new one."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        # With the permissions of any new file, which tempfile would narrow.
        with open(beside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def save(path: str | Path, tensors: dict[str, torch.Tensor]) -> None:
    """Save {name: tensor} to `path`, with its SHA-256 beside it.

    Raises:
        ValueError: a value is not finite; nothing is written.
    """
    from safetensors.torch import save as serialize

    for name, t in tensors.items():
        if t.is_floating_point() and not bool(t.isfinite().all()):
            raise ValueError(f"checkpoint: {name} must be finite; it was not saved.")

    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    data = serialize(plain)
    manifest = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    write_atomic(path, data)
    write_atomic(f"{path}.json", json.dumps(manifest).encode())


def load(path: str | Path) -> dict[str, torch.Tensor]:
    """Load {name: tensor}.

    Raises:
        ValueError: the file is missing or is not what was saved.
    """
    from safetensors.torch import load as deserialize

    path = Path(path)
    if not path.exists():
        raise ValueError(f"checkpoint: {path} does not exist.")
    data = path.read_bytes()
    manifest = Path(f"{path}.json")
    if manifest.exists():
        expected = json.loads(manifest.read_text())["sha256"]
        if hashlib.sha256(data).hexdigest() != expected:
            raise ValueError(
                f"checkpoint: {path} is damaged: its SHA-256 is not the one recorded in "
                f"{manifest.name}."
            )
    return deserialize(data)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimizer's state as flat tensors."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{i}.{k}": torch.as_tensor(v)
        for i, entry in state.items()
        for k, v in entry.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    """The inverse of `optimizer_tensors`."""
    state: dict[str, Any] = {}
    for name, t in tensors.items():
        if name.startswith("optimizer."):
            _, i, k = name.split(".")
            state.setdefault(int(i), {})[k] = t
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
