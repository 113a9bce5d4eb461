"""What makes PyTorch's own derivatives right, or makes them say what they lack."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastscore.dual.formulas import RightForward
from fastscore.dual.norms import Refuse


@contextlib.contextmanager
def in_one_sentence() -> Iterator[Any]:
    """PyTorch's message where it has no derivative, as one of ours."""
    try:
        yield
    except RuntimeError as error:
        first, *_ = str(error).splitlines() or [""]
        if not first.startswith("fastscore") and re.search(
            "erivative for|implemented|not differentiable|must implement", first
        ):
            raise NotImplementedError(
                f"fastscore.jvp: PyTorch has no second derivative of f: {first.rstrip('.')}."
            ) from error
        raise


def without_constants() -> Any:
    return _Constants() if torch.is_grad_enabled() else contextlib.nullcontext()


class _Constants(torch.overrides.TorchFunctionMode):
    """Inside, what happens without gradients has no tangents either."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        with (
            contextlib.nullcontext()
            if torch.is_grad_enabled()
            else torch.autograd.forward_ad._set_fwd_grad_enabled(False)
        ):
            return func(*args, **(kwargs or {}))


def rows(values: Any) -> Any:
    """Their stack. A gradient that begins at an odd place of the stack's is none that
    torch.view_as_real takes: memory of its own."""
    return torch.stack([t * 1 for t in values] if values[0].numel() % 2 else values)


@contextlib.contextmanager
def right_derivatives(refused: Any) -> Iterator[Any]:
    """PyTorch's own derivatives of second and third order, without those that it lacks or gets
    wrong."""
    guard = Refuse(refused if torch.is_grad_enabled() else set())
    try:
        with sdpa_kernel(SDPBackend.MATH), RightForward(), guard:
            yield
    except Exception as error:   # TorchScript wraps what is raised inside
        if guard.met is None:
            raise
        where = "reached from TorchScript, torch.ops or beside what dual numbers cannot carry"
        raise NotImplementedError(
            f"fastscore.jvp: {guard.met} is {where}; PyTorch's gradients of its tangent are wrong."
        ) from error


def differentiable_forms(name: str) -> Any:
    """Attention and recurrent layers in the forms that have a forward mode."""
    if name in ("multi_head_attention_forward", "scaled_dot_product_attention"):
        return sdpa_kernel(SDPBackend.MATH)
    if name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        return torch.backends.mkldnn.flags(enabled=False)
    return contextlib.nullcontext()
