"""Which implementation of an op runs, and why the others do not.

Order of preference: cuda, triton, cpp, reference. A request (`backend=`, `use_backend`,
FASTSCORE_BACKEND) that cannot be served raises; only the automatic choice falls back.
"""

import contextlib
import functools
import importlib.util
import json
import os
import warnings
from contextvars import ContextVar
from pathlib import Path

import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from fastscore import direct
from fastscore.compiling import constant_result
from fastscore.messages import shown
from fastscore.raw_ops import OPS as OPS
from fastscore.raw_ops import RawOp as RawOp

BACKENDS = ("cuda", "triton", "cpp", "reference")
_requested: ContextVar[str | None] = ContextVar("fastscore_backend", default=None)


def _check_name(name: str, source: str) -> str:
    if not isinstance(name, str) or name not in ("auto", *BACKENDS):
        raise ValueError(f"{source} must be one of auto, {', '.join(BACKENDS)}; got {shown(name)}.")
    return name


@contextlib.contextmanager
def use_backend(name: str):
    """Run every op inside the `with` block on one back end.

    'auto', 'reference', 'cpp', 'triton' or 'cuda'.

    An op's gradient runs where the op ran, whatever thread autograd runs it in and whether the
    block has ended by then. A compiled function is compiled again for another request (different
    requests of several threads are not told apart there).

    Raises:
        ValueError: the name is unknown, or (when an op is called) the back end cannot serve it
            here.
    """
    global _guarded
    token = _requested.set(_check_name(name, "use_backend"))
    outer = _of_backward_call()
    torch._C._stash_obj_in_tls(_TLS, name)
    _guarded = name
    try:
        with direct.requested():
            yield
    finally:
        _requested.reset(token)
        torch._C._stash_obj_in_tls(_TLS, outer)
        _guarded = _requested.get()


# The last request of any thread. torch.compile keeps the back end as a constant of its graph and
# cannot guard a context variable; a global it can, so that another request compiles again.
_guarded: str | None = None


# Autograd runs the nodes of a GPU in threads of its own, where context variables are unset; this
# storage goes there with the call.
_TLS = "fastscore_backend"


def _of_backward_call() -> str | None:
    return torch._C._get_obj_in_tls(_TLS) if torch._C._is_key_in_tls(_TLS) else None


def _request() -> str | None:
    """What use_backend() asks for here; in a thread of autograd's, where backward() was called."""
    requested = _requested.get()
    if requested is None and torch._C._current_graph_task_id() != -1:
        return _of_backward_call()
    return requested


def build_info() -> dict:
    """What the installation recorded.

    For cpp and cuda, None where they were built, else the reason why not.
    """
    path = Path(__file__).with_name("_build_info.json")
    missing = "fastscore was not installed with pip (no build record)"
    return json.loads(path.read_text()) if path.exists() else {"cpp": missing, "cuda": missing}


@functools.cache
def load_extension() -> str | None:
    """Register the C++ and CUDA ops; the reason where that is impossible."""
    files = list(Path(__file__).parent.glob("_C*.so"))
    if not files:
        reason = build_info().get("cpp") or "its file is gone"
        return f"the extension is not built: {reason}. Reinstall with FASTSCORE_BUILD=cpu"
    try:
        torch.ops.load_library(str(files[0]))
    except OSError as error:
        return f"the extension does not load ({str(error).splitlines()[0]}). Reinstall fastscore"
    for name in OPS:
        _finish(f"fastscore::{name}")
    direct.opened(_environment() in ("auto", "cpp"))
    return None


@functools.cache
def load_triton() -> str | None:
    """Register the Triton launchers as torch ops; the reason where that is impossible."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed. pip install triton"
    from fastscore import kernels

    if not hasattr(kernels, "register"):
        return "its kernels are not part of this version"
    kernels.register(OPS)
    for name in OPS:
        _finish(f"fastscore_triton::{name}")
    return None


_guards = []


def _finish(name: str) -> None:
    """Give a raw op its fake and a guard.

    It has no derivative, and must say so instead of returning zero.
    """
    torch.library.register_fake(name, lambda *args: None)
    namespace, op = name.split("::")
    library = torch.library.Library(namespace, "IMPL")
    overload = getattr(getattr(torch.ops, namespace), op).default

    def guard(*args):
        for a in (a for a in args if isinstance(a, torch.Tensor)):
            if _dual_level() and forward_ad.unpack_dual(a).tangent is not None:
                raise NotImplementedError(
                    f"{name} has no forward-mode rule; call the public function of fastscore "
                    "instead."
                )
            if a.requires_grad and torch.is_grad_enabled():
                raise NotImplementedError(
                    f"{name} has no derivative rule; call the public function of fastscore "
                    "instead. A graph of torch.export or make_fx "
                    'holds it as it is: run it under torch.no_grad(), or trace it under '
                    'fastscore.use_backend("reference").'
                )
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    library.impl(op, guard, "Autograd")
    _guards.append(library)


def _dual_level() -> bool:
    return forward_ad._current_level >= 0


def linearized() -> bool:
    """Inside torch.func.linearize, whose folding of constants loses what is written in place: by a
    function, by a kernel, or by PyTorch's backward formulas."""
    return _dual_level() and get_proxy_mode() is not None


def levels() -> bool:
    """Whether forward mode or a transform of torch.func stands around this call.

    It needs plain operations, which nest.
    """
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not(name: str, device: str) -> str | None:
    """None where back end `name` can serve tensors on `device`, else the reason with its remedy."""
    if name == "reference":
        return None
    if name == "cpp":
        return load_extension() if device == "cpu" else f"it runs on the CPU, not on {device}"
    if name == "triton":
        if device == "cpu" and not interpreting():
            return "it needs a GPU (or TRITON_INTERPRET=1 for its interpreter)"
        if device not in ("cpu", "cuda"):
            return f"it runs on CUDA devices, not on {device}"
        return load_triton()
    if device != "cuda":
        return f"it runs on CUDA devices, not on {device}"
    reason = build_info().get("cuda")
    if reason:
        return f"it is not built: {reason}. Reinstall with FASTSCORE_BUILD=cuda"
    return load_extension()


def there(name: str, device: str) -> bool:
    """why_not, asked once: a norm asks at every call."""
    return _answered(why_not, name, device) is None


_answered = functools.cache(lambda question, *about: question(*about))


@functools.cache
def _choose(name: str, device: str, cuda: bool = True) -> str:
    if name != "auto":
        reason = why_not(name, device)
        if name == "cuda" and not cuda:
            reason = reason or "this op has no CUDA C++ kernel. Use 'triton'"
        if reason:
            raise ValueError(
                f"backend {name!r} was requested for a tensor on {device} but {reason}."
            )
        return name
    order = ("cuda", "triton", "reference")[not cuda :] if device != "cpu" else ("cpp", "reference")
    chosen = next(b for b in order if why_not(b, device) is None)
    if device == "cuda":
        _open_for_gpu()
    if device == "cuda" and chosen == "reference":
        warnings.warn(
            "fastscore runs on the slow reference for CUDA tensors: triton: "
            f"{why_not('triton', device)}",
            stacklevel=2,
        )
    return chosen


@functools.cache
def _open_for_gpu() -> None:
    """Plain calls go directly from now on, where the automatic choice sends them."""
    if _environment() != "auto" or load_extension() is not None:
        return
    launchers = None
    if why_not("triton", "cuda") is None and not interpreting():
        from fastscore.kernels.direct import LAUNCHERS as launchers
    direct.serve_gpu(launchers, why_not("cuda", "cuda") is None)


@constant_result
def _resolve(device: str, backend: str | None, cuda: bool, guarded: str | None) -> str:
    if backend is not None:
        _check_name(backend, "backend")
    return _choose(backend or _request() or _environment(), device, cuda)


@functools.cache
def _environment() -> str:
    return _check_name(os.environ.get("FASTSCORE_BACKEND", "auto"), "FASTSCORE_BACKEND")


def choose(device: torch.device, backend: str | None = None, cuda: bool = True) -> str:
    """The back end for tensors on `device`.

    The argument, else use_backend(), else FASTSCORE_BACKEND, else the best.

    cuda: whether the op has a kernel in CUDA C++.
    """
    if not torch.compiler.is_compiling() and linearized():
        return _in_plain_torch(backend or _request() or _environment())
    return _resolve(device.type, backend, cuda, _guarded)


def _in_plain_torch(name: str) -> str:
    """For torch.func.linearize, which folds constants and loses what kernels write into them."""
    if _check_name(name, "backend") not in ("auto", "reference"):
        raise ValueError(
            f"backend {name!r} was requested, but torch.func.linearize loses what kernels write; "
            "take torch.func.jvp, or 'reference'."
        )

    return "reference"


@functools.cache
def raw(backend: str, op: str):
    """The torch op behind a back end (not the reference, which is plain PyTorch)."""
    return getattr(
        torch.ops.fastscore_triton if backend == "triton" else torch.ops.fastscore, op
    ).default


def call(backend: str, op: str, *args) -> None:
    """Run a raw op where no derivative can be asked of it."""
    try:
        if backend == "triton" and _nothing_between(args):
            _launcher(op)(*args)
            return
        symbolic = torch._C._len_torch_dispatch_stack() and any(
            isinstance(a, torch.SymInt) for a in args
        )
        with torch._C._AutoDispatchBelowAutograd():
            (_symbolic if symbolic else raw)(backend, op)(*args)
    except Exception as error:
        refuse_batched(error)
        if not _clones_what_is_written(error):
            raise
        with (
            torch.utils._python_dispatch._disable_current_modes(),
            torch._C._AutoDispatchBelowAutograd(),
        ):
            raw(backend, op)(*args)


_NAMESPACE = "fastscore_symbolic"


@functools.cache
def _symbolic(backend: str, op: str):
    """A raw op whose offset a compiled graph may leave open.

    An `int` would be a constant of the graph.
    """
    name = f"{backend}_{op}"
    schema = str(raw(backend, op)._schema).replace("int offset", "SymInt offset")

    library = torch.library.Library(_NAMESPACE, "FRAGMENT")
    library.define(name + schema[schema.index("(") :])
    library.impl(name, lambda *args: raw(backend, op)(*args), "CompositeExplicitAutograd")
    _guards.append(library)

    _finish(f"{_NAMESPACE}::{name}")
    return getattr(getattr(torch.ops, _NAMESPACE), name).default


def _clones_what_is_written(error: Exception) -> bool:
    """Whether allow_mutation_on_saved_tensors stumbled over an output that is None.

    The others are fresh: nobody has saved them.
    """
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return isinstance(error, AttributeError) and any(
        type(mode).__name__ == "_CloneArgBeforeMutateMode" for mode in modes
    )


def refuse_batched(error: Exception) -> None:
    """Say what PyTorch's old vmap, which is_grads_batched and vectorize=True go through, means."""
    if "Batching rule not implemented" in str(error) or "BatchedTensorImpl" in str(error):
        raise NotImplementedError(
            "fastscore: its derivatives cannot be taken with is_grads_batched=True or "
            "vectorize=True; "
            "take torch.func.vjp, torch.func.jacrev or torch.func.hessian, or vectorize=False."
        ) from error


@functools.cache
def _launcher(op: str):
    """The Python function behind a Triton op."""
    load_triton()
    from fastscore.kernels import LAUNCHERS

    return LAUNCHERS[op]


def _nothing_between(args) -> bool:
    """Whether torch's dispatcher would do nothing with these arguments but call the launcher (in
    some 25 µs)."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
    ):
        return False
    for a in args:
        kind = type(a)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            if a.is_neg():
                return False
        elif kind not in _PLAIN and isinstance(a, torch.Tensor):
            return False
    return True


_PLAIN = frozenset((int, float, bool, type(None)))   # most of what is no tensor


def derivative_possible(*tensors) -> bool:
    """Whether anything differentiates or transforms this call.

    If not, the raw op may run without a Function around it.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
    ):
        return True
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False
