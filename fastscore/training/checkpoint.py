"""Tensors of a run as safetensors, with a digest in the file. No pickle."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from fastscore import regular
from fastscore.training import files


def save(path: str | Path, tensors: dict[str, torch.Tensor]) -> None:
    """Save {name: tensor} to `path`, with its SHA-256 in the file's metadata.

    Raises:
        ValueError: a value is not finite; nothing is written.
    """
    files.write_atomic(path, dumps(tensors))


def load(path: str | Path) -> dict[str, torch.Tensor]:
    """Load {name: tensor}.

    Raises:
        ValueError: the file is missing or is not what was saved.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"checkpoint: {path} does not exist.")
    data = _bytes(path)
    manifest = Path(f"{path}.json")
    # Of earlier versions.
    if manifest.exists() and files.is_sealed(data) is None:
        _compare(path, data, manifest)
        return loads(data, path, sealed=False)
    return loads(data, path)


def dumps(tensors: dict[str, torch.Tensor], *, sealed: bool = True) -> bytes:
    """The bytes of a file that holds {name: tensor}.

    sealed: with their digest; False where a manifest has it.

    Raises:
        ValueError: a value is not finite.
    """
    from safetensors.torch import save as serialize

    for name, t in tensors.items():
        if t.is_floating_point() and not bool(t.isfinite().all()):
            raise ValueError(f"checkpoint: {name} must be finite; it was not saved.")

    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    if not sealed:
        return serialize(plain)
    data = serialize(plain, {"sha256": files.BLANK})
    # Before the next copy is made.
    del plain
    return files.sealed(data)


def loads(data: bytes, path: str | Path, *, sealed: bool = True) -> dict[str, torch.Tensor]:
    """The inverse of `dumps`.

    Args:
        path: where the bytes come from, for messages.
        sealed: compare them with the digest in them; False where they were compared with another.

    Raises:
        ValueError: they are not what `dumps` returned.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as deserialize

    if sealed and files.is_sealed(data) is not True:
        stated = "is not the one that it states"
        if files.is_sealed(data) is None:
            stated = "is stated neither in it nor beside it"
        raise ValueError(f"checkpoint: {path} is damaged: its SHA-256 {stated}.")
    try:
        regular.check_header(data)
        return deserialize(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint: {path} is damaged: {error}.") from None


def _bytes(path):
    try:
        return regular.read(path)
    except ValueError as error:
        raise ValueError(f"checkpoint: {error}") from None
    except OSError as error:
        raise ValueError(f"checkpoint: {path} cannot be read: {error.strerror}.") from None


def _compare(path, data, manifest):
    """With the digest that earlier versions wrote beside the file."""
    try:
        expected = json.loads(_bytes(manifest))["sha256"]
    # Of lists in lists without end, too.
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"checkpoint: {manifest} is damaged: it states no SHA-256.") from None
    if hashlib.sha256(data).hexdigest() != expected:
        raise ValueError(
            f"checkpoint: {path} is damaged: its SHA-256 is not the one recorded in "
            f"{manifest.name}."
        )


def state_of(
    net: torch.nn.Module, ema: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a training run by the file that they belong to; `restore` takes them.

    weights: the averages, as a state_dict of the network. state: everything else.

    What is sharded over processes (fully_shard) is brought together, so that all of them must call.
    """
    weights = ema.module.state_dict()
    state = {f"net.{k}": v for k, v in net.state_dict().items()}
    state |= {f"ema.{k}": v for k, v in ema.state_dict().items() if not k.startswith("module.")}
    state |= optimizer_tensors(optimizer) | {"step": torch.tensor(step)}
    return {"weights": _whole(weights), "state": _whole(state)}


def restore(
    net: torch.nn.Module,
    ema: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, dict[str, torch.Tensor]],
) -> int:
    """The inverse of `state_of`; returns the number of steps that are done.

    A save of any number of processes is spread over those that call.
    """
    state = tensors["state"]
    net.load_state_dict(_spread(_under("net.", state), net.state_dict()))
    averages = {f"module.{k}": v for k, v in tensors["weights"].items()}
    # Earlier versions kept the averages in both.
    ema.load_state_dict(_spread(averages | _under("ema.", state), ema.state_dict()))
    restore_optimizer(optimizer, state)
    return int(state["step"])


def _whole(tensors):
    # In one order on all processes, which what was loaded from a file has not.
    whole = {k: t.full_tensor() for k, t in sorted(tensors.items()) if hasattr(t, "full_tensor")}
    return {k: whole.get(k, t) for k, t in tensors.items()}


def _spread(tensors, like):
    """Each tensor over the processes as the one of its name in `like` is."""
    return {k: _placed(t, like.get(k)) for k, t in tensors.items()}


def _placed(t, like):
    if not hasattr(like, "full_tensor") or t.shape != like.shape:
        return t
    from torch.distributed.tensor import distribute_tensor

    t = t.to(like.device, like.dtype)
    return distribute_tensor(t, like.device_mesh, like.placements, src_data_rank=None)


def _under(prefix, tensors):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


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
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[str, Any] = {}
    for name, t in tensors.items():
        if name.startswith("optimizer."):
            _, i, k = name.split(".")
            state.setdefault(int(i), {})[k] = _placed(t, parameters[int(i)])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
