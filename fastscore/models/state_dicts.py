"""The tensors of a foreign checkpoint, by name, and whether they are those of a network."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

OP = "load_official"
_SHOWN = 80   # characters of a name in a message


def is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{name: tensor} without what the wrappers around a network, or around its parts, add to the
    names."""
    found: dict[str, Tensor] = {}
    for name, t in state.items():
        plain = ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))
        if plain in found:
            raise ValueError(
                f"{OP}: the checkpoint must hold one network; it has {plain} twice, under "
                "different prefixes."
            )
        found[plain] = t
    return found


def outline(container: Any) -> str:
    if isinstance(container, (list, tuple)):
        kinds = ", ".join(type(entry).__name__ for entry in container[:6]) or "nothing"
        return f"a {type(container).__name__} of {kinds}"
    if isinstance(container, Mapping):
        keys = [repr(key)[:_SHOWN] for key in list(container)[:3]]
        return f"a dict with {', '.join(keys) or 'nothing'}"
    return f"a {type(container).__name__}"


def first(names: Iterable[str], n: int = 3) -> str:
    names = [name[:_SHOWN] for name in names]
    return ", ".join(names[:n]) + (", ..." if len(names) > n else "")


def filled(cls: type[nn.Module], options: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    """cls(**options) with these weights, on the CPU and in evaluation mode; `sigmas` are its own.

    Nothing is allocated before names and shapes are those of the network.

    Raises:
        ValueError: they are not.
    """
    with torch.device("meta"):
        net = cls(**options)
    _check_fit(net, weights)
    for name, t in weights.items():
        if not t.is_floating_point() or not bool(t.isfinite().all()):
            kind = "numbers that are not finite" if t.is_floating_point() else str(t.dtype)
            raise ValueError(f"{OP}: weights must be finite and floats; {name} has {kind}.")
    net.to_empty(device="cpu")
    own = {"sigmas": net.sigmas} if "sigmas" in net.state_dict() else {}
    net.load_state_dict({**weights, **own})
    return net.eval()


def _check_fit(net, weights):
    wanted, got = (
        {name: tuple(t.shape) for name, t in each.items() if name != "sigmas"}
        for each in (net.state_dict(), weights)
    )
    problems = {
        "missing": [name for name in wanted if name not in got],
        "unexpected": [name for name in got if name not in wanted],
        "misshapen": [
            f"{name} {got[name]} for {shape}"
            for name, shape in wanted.items()
            if got.get(name, shape) != shape
        ],
    }
    found = [f"{len(names)} {kind} ({first(names)})" for kind, names in problems.items() if names]
    if found:
        raise ValueError(
            f"{OP}: the checkpoint does not fit {type(net).__name__}: {'; '.join(found)}."
        )
