"""PyTorch's own samples of its operators through fastscore.jvp and the gradient of its result; writes docs/operators.md.

    python tests/operator_sweep.py [--only NAME ...] [--out docs/operators.md]

The yardsticks are reverse mode and central differences in float64. Where the two disagree, the differences decide, if they are smooth.
"""

import argparse
import contextlib
import math
import re
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastscore.dual import jvp, numbers

# Their results are what happened to lie in memory.
UNINITIALISED = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted", "resize_", "resize_as_")


class Case(NamedTuple):
    """f of one float64 tensor: an operator at one of its samples, as a function of one or all of its tensors."""

    name: str
    f: Callable[[torch.Tensor], torch.Tensor]
    x: torch.Tensor
    plain: Callable[[torch.Tensor], torch.Tensor]   # f written as a function, for the yardsticks


class Verdict(NamedTuple):
    outcome: str   # right, wrong, refused or raw
    route: str   # rule, operation, function or reverse
    why: str = ""


def operators():
    from torch.testing._internal.common_methods_invocations import op_db

    return [op for op in op_db if op.supports_dtype(torch.float64, "cpu") and op.name not in UNINITIALISED]


def spread(items: list, most: int) -> list:
    return items if len(items) <= most else [items[i * len(items) // most] for i in range(most)]


def samples(op, most: int) -> list:
    torch.manual_seed(0)
    with quiet():
        return spread(list(op.sample_inputs("cpu", torch.float64)), most)


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def variants(op) -> dict:
    found = {"": op.op}
    if op.method_variant is not None and op.method_variant is not op.op:
        found[".method"] = op.method_variant
    if op.operator_variant is not None:
        found[".operator"] = op.operator_variant
    if op.inplace_variant is not None:
        found[".inplace"] = op.inplace_variant
    return found


def cases(op, most: int) -> Iterator[Case]:
    """Every sample as a function of its first tensor, of each other one, and of all of them together."""
    for k, sample in enumerate(samples(op, most)):
        leaves, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
        places = [i for i, leaf in enumerate(leaves) if _varies(leaf)]
        groups = [[i] for i in places] + ([places] if len(places) > 1 else [])

        for kind, function in variants(op).items():
            for group in groups if kind == "" else groups[:1]:
                which = "all" if len(group) > 1 else str(places.index(group[0]))
                f, plain = (_function_of(op, g, sample, leaves, spec, group) for g in (function, op.op))
                yield Case(f"{full_name(op)}{kind}[{k}, {which}]", f, _point(leaves, group), plain)


def full_name(op) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def _varies(leaf) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 and leaf.layout == torch.strided and leaf.numel() > 0


def _point(leaves, group):
    if len(group) == 1:
        return leaves[group[0]].detach()
    return torch.cat([leaves[i].detach().reshape(-1) for i in group])


def _function_of(op, function, sample, leaves, spec, group):
    def f(x):
        pieces = [x] if len(group) == 1 else x.split([leaves[i].numel() for i in group])
        filled = [leaf.clone() if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided else leaf for leaf in leaves]
        for i, piece in zip(group, pieces):
            filled[i] = piece.reshape(leaves[i].shape).clone()   # which the operator may write to

        input, args, kwargs = tree_unflatten(filled, spec)
        torch.manual_seed(0)
        result = op.gradcheck_wrapper(function, input, *args, **kwargs)
        return _real_parts(sample.output_process_fn_grad(result))

    return f


def _real_parts(result) -> torch.Tensor:
    """All floating-point results side by side, complex ones as pairs."""
    found = [t for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor) and (t.is_floating_point() or t.is_complex())]
    found = [t.to_dense() if t.layout != torch.strided else t for t in found]
    found = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in found]
    return torch.cat([t.reshape(-1).double() for t in found]) if found else torch.zeros(0, dtype=torch.float64)


class Expected(NamedTuple):
    value: torch.Tensor
    products: torch.Tensor | None   # w · J v_m, (M,), by reverse mode
    gradient: torch.Tensor | None   # of Σ c_m w · J v_m + u · f, like x, by reverse mode
    product_quotient: tuple[float, bool]   # w · J V, V = Σ c_m v_m, and whether the function is smooth enough for it
    gradient_quotient: tuple[float, bool]   # the gradient along d


class Weights(NamedTuple):
    v: torch.Tensor
    c: torch.Tensor
    w: torch.Tensor
    u: torch.Tensor
    d: torch.Tensor


def weights_for(x, y, M) -> Weights:
    g = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    return Weights(draw(M, *x.shape), draw(M), draw(len(y)), draw(len(y)), draw(*x.shape))


def reverse_mode(f, x, k: Weights):
    x = x.clone().requires_grad_()
    y = f(x)
    zeros = torch.zeros(len(k.v), dtype=torch.float64), torch.zeros_like(x)
    if not y.requires_grad:
        return zeros
    keep = {"create_graph": True, "materialize_grads": True}
    (g,) = torch.autograd.grad(y, x, k.w, **keep)
    products = (g * k.v).flatten(1).sum(1) if k.v.dim() > 1 else g * k.v
    total = k.c @ products + k.u @ y
    (gradient,) = torch.autograd.grad(total, x, materialize_grads=True)
    return products.detach(), gradient


def extrapolated(quotient, steps) -> tuple[float, bool]:
    """Richardson's value, and whether two of them agree."""
    q = [quotient(h) for h in steps]
    fine, coarse = ((4 * b - a) / 3 for a, b in ((q[1], q[2]), (q[0], q[1])))
    return fine, abs(fine - coarse) <= 1e-6 * (1 + abs(fine))


def quotients(f, x, k: Weights):
    steep = []
    V = (k.c.reshape(-1, *(1,) * x.dim()) * k.v).sum(0)

    y = f(x)

    def along(w, x, v, h):
        plus, minus = f(x + h * v), f(x - h * v)
        steep.append(float((plus + minus - 2 * y).abs().max()) > 1e3 * h * (1 + float(y.abs().max())))   # a jump
        return float(w @ (plus - minus)) / (2 * h)

    def mixed(h):
        return (along(k.w, x + h * k.d, V, h) - along(k.w, x - h * k.d, V, h)) / (2 * h) + along(k.u, x, k.d, h)

    found = extrapolated(lambda h: along(k.w, x, V, h), (2e-4, 1e-4, 5e-5)), extrapolated(mixed, (1e-3, 5e-4, 2.5e-4))
    return tuple((value, smooth and not any(steep)) for value, smooth in found)


def close(a, b, tolerance) -> bool:
    a, b = (torch.as_tensor(t, dtype=torch.float64) for t in (a, b))
    if not a.numel():
        return True
    size = 1 + float(torch.where(b.isfinite(), b.abs(), 0).max())
    return bool((((a - b).abs() <= tolerance * size) | (a == b)).all())


def undefined(found, theirs) -> bool:
    """No number where reverse mode has none either."""
    return close(torch.where(theirs.isnan(), 0, found), theirs.nan_to_num(0.0, math.inf, -math.inf), 1e-8) and bool(theirs.isnan().any())


@contextlib.contextmanager
def routes():
    """What a call resorts to, collected by name."""
    met = set()
    ways = {"_generic": "operation", "_forward_mode": "function", "_double_backward": "reverse"}

    def noted(name, function):
        def call(*args, **kwargs):
            met.add(ways[name])
            return function(*args, **kwargs)

        return call

    original = {name: getattr(numbers, name) for name in ways}
    try:
        for name, function in original.items():
            setattr(numbers, name, noted(name, function))
        yield met
    finally:
        for name, function in original.items():
            setattr(numbers, name, function)


def plain_jvp(f, x, v):
    return jvp(f, x, v)


def examine(case: Case, M: int, product: Callable = plain_jvp) -> Verdict | None:
    """None where the operator itself does not take the sample, or has no real results."""
    f, x = case.f, case.x
    try:
        with quiet(), torch.no_grad():
            y = f(x)
    except Exception:
        return None
    if not y.numel() or not y.isfinite().any():
        return None

    finite = y.isfinite().nonzero()[:, 0]
    everywhere = len(finite) == len(y)
    g, plain = f, case.plain
    if not everywhere:
        g, plain = (lambda x: f(x)[finite]), (lambda x: case.plain(x)[finite])
    y = y[finite]
    k = weights_for(x, y, M)

    with quiet(), routes() as met:
        try:
            leaf = x.clone().requires_grad_()
            value, jv = product(g, leaf, k.v[0] if M == 1 else k.v)
            products = (jv[None] if M == 1 else jv) @ k.w
            total = k.c @ products + k.u @ value
            (gradient,) = torch.autograd.grad(total, leaf, materialize_grads=True) if total.requires_grad else (torch.zeros_like(x),)
        except Exception as error:
            first, *more = str(error).splitlines() or [""]
            ours = first.startswith("fastscore") and not more
            return Verdict("refused" if ours else "raw", route_of(met), f"{type(error).__name__}: {first}")

    if value.shape != y.shape or value.dtype != y.dtype or not close(value.detach(), y, 1e-10):
        return Verdict("wrong", route_of(met), "the value")

    return judged(plain, x, k, products.detach(), gradient.detach(), route_of(met), everywhere)


def route_of(met) -> str:
    return next((route for route in ("reverse", "function", "operation") if route in met), "rule")


def judged(f, x, k, products, gradient, route, everywhere) -> Verdict:
    with quiet():
        try:
            expected = reverse_mode(f, x, k)
        except Exception:
            expected = None, None
        with torch.no_grad():
            try:
                slopes = quotients(f, x, k)
            except Exception:
                slopes = (math.nan, False), (math.nan, False)

    for what, found, theirs, along, (quotient, smooth) in (
        ("J v", products, expected[0], float(k.c @ products), slopes[0]),
        ("the gradient", gradient, expected[1], float((gradient * k.d).sum()), slopes[1]),
    ):
        agrees = theirs is not None and close(found, theirs, 1e-8)
        near = close(along, quotient, 1e-5)
        if near and (smooth or agrees):
            continue
        if (not smooth or not everywhere) and (agrees or (theirs is not None and undefined(found, theirs))):
            continue
        if near and theirs is None:
            continue
        size = f"{along:.6g}; quotient {quotient:.6g}{'' if smooth else ' (not smooth)'}"
        reverse = "none" if theirs is None else f"{float((k.c @ theirs) if what == 'J v' else (theirs * k.d).sum()):.6g}"
        return Verdict("wrong", route, f"{what}: {size}; reverse mode {reverse}")
    return Verdict("right", route)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--most", type=int, default=12)
    parser.add_argument("--directions", type=int, nargs="*", default=[1, 3])
    arguments = parser.parse_args()
    counts, shown = {}, set()
    for op in operators():
        if arguments.only and not any(re.fullmatch(p, full_name(op)) for p in arguments.only):
            continue
        for case in cases(op, arguments.most):
            for M in arguments.directions:
                verdict = examine(case, M)
                if verdict is None:
                    continue
                counts[verdict.outcome, verdict.route] = counts.get((verdict.outcome, verdict.route), 0) + 1
                key = verdict.outcome, case.name.split("[")[0], verdict.route, re.sub(r"-?[0-9.]+(e-?[0-9]+)?", "", verdict.why)
                if verdict.outcome != "right" and key not in shown:
                    shown.add(key)
                    print(verdict.outcome.upper(), case.name, f"M={M}", verdict.route, verdict.why[:300], flush=True)
    print(counts)


if __name__ == "__main__":
    main()
