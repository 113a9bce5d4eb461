"""PyTorch's own samples of its operators through fastscore.jvp and the gradient of its result.

Writes docs/operators.md.

    python tests/operator_sweep.py [--only PATTERN ...] [--most 4] [--out docs/operators.md]

The yardsticks are reverse mode and extrapolated differences in float64; the differences decide
where the function is smooth.
"""

import argparse
import contextlib
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastscore.dual import dispatch, jvp
from fastscore.dual import routes as ways

# Not swept. Their results are what happened to lie in memory,
UNINITIALISED = (
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted",
    "resize_", "resize_as_",
)
# or are read from outside of the sample, or are left open by PyTorch where indices repeat, as the
# samples' do.
OPEN = (
    "as_strided.partial_views",
    "nn.functional.max_unpool1d",
    "nn.functional.max_unpool2d",
    "nn.functional.max_unpool3d",
)

# Right as PyTorch's reverse mode has it, by conventions that differences do not know: rows of
# padding and what brings a row back into its norm have no derivative, counts only scale gradients,
# singular values of a least-squares driver are not differentiable, and of the slopes that a norm
# has at zero one is taken.
CONVENTIONS = (
    "nn.functional.embedding",
    "nn.functional.embedding_bag",
    "linalg.lstsq",
    "linalg.norm.subgradients_at_zero",
)


COARSE = {
    **dict.fromkeys(("float", "cfloat"), torch.float32),
    **dict.fromkeys(("half", "chalf"), torch.float16),
    "bfloat16": torch.bfloat16,
}


class Case(NamedTuple):
    """f of one float64 tensor.

    An operator at one of its samples, as a function of one or all of its tensors.
    """

    name: str
    f: Callable[[torch.Tensor], torch.Tensor]
    x: torch.Tensor
    plain: Callable[[torch.Tensor], torch.Tensor]   # f written as a function, for the yardsticks
    resolution: float = 0.0   # of results in a coarser dtype
    by_convention: bool = False


class Verdict(NamedTuple):
    outcome: str   # right, wrong, refused or raw
    route: str   # rule, operation, function or reverse
    why: str = ""


def operators():
    from torch.testing._internal.common_methods_invocations import op_db

    found = [op for op in op_db if op.supports_dtype(torch.float64, "cpu")]
    return [op for op in found if op.name not in UNINITIALISED and full_name(op) not in OPEN]


def spread(items: list, most: int) -> list:
    """The middle one of each of `most` parts."""
    return (
        items
        if len(items) <= most
        else [items[(2 * i + 1) * len(items) // (2 * most)] for i in range(most)]
    )


def samples(op, most: int) -> list:
    torch.manual_seed(0)
    with quiet():
        found = itertools.islice(op.sample_inputs("cpu", torch.float64), 10 * most)
        return spread(
            [
                sample
                for sample in found
                if any(map(_varies, tree_flatten((sample.input, sample.args))[0]))
            ],
            most,
        )


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
    """Every sample as a function of its first tensor, of each other one, and of all of them
    together."""
    for k, sample in enumerate(samples(op, most)):
        leaves, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
        places = [i for i, leaf in enumerate(leaves) if _varies(leaf)]
        resolution = {torch.float32: 1e-5, torch.float16: 3e-2, torch.bfloat16: 3e-2}.get(
            COARSE.get(op.name), 0.0
        )
        groups = [[i] for i in places] + ([places] if len(places) > 1 else [])

        for kind, function in variants(op).items():
            for group in groups if kind == "" else groups[:1]:
                which = "all" if len(group) > 1 else str(places.index(group[0]))
                f, plain = (
                    _function_of(op, g, sample, leaves, spec, group) for g in (function, op.op)
                )
                name = f"{full_name(op)}{kind}[{k}, {which}]"
                yield Case(
                    name, f, _point(leaves, group), plain, resolution, full_name(op) in CONVENTIONS
                )


def full_name(op) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def _varies(leaf) -> bool:
    return (
        isinstance(leaf, torch.Tensor)
        and leaf.dtype == torch.float64
        and leaf.layout == torch.strided
        and leaf.numel() > 0
    )


def _point(leaves, group):
    if len(group) == 1:
        return leaves[group[0]].detach()
    return torch.cat([leaves[i].detach().reshape(-1) for i in group])


def _function_of(op, function, sample, leaves, spec, group):
    def f(x):
        pieces = [x] if len(group) == 1 else x.split([leaves[i].numel() for i in group])
        filled = [
            leaf.clone()
            if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided
            else leaf
            for leaf in leaves
        ]
        for i, piece in zip(group, pieces):
            filled[i] = piece.reshape(leaves[i].shape).clone()   # which the operator may write to

        input, args, kwargs = tree_unflatten(filled, spec)
        # torch.manual_seed asks for every kind of device, at ten times the price.
        torch.default_generator.manual_seed(0)
        result = op.gradcheck_wrapper(function, input, *args, **kwargs)
        return _real_parts(sample.output_process_fn_grad(result))

    return f


def _real_parts(result) -> torch.Tensor:
    """All floating-point results side by side, complex ones as pairs."""
    found = [
        t
        for t in tree_flatten(result)[0]
        if isinstance(t, torch.Tensor) and (t.is_floating_point() or t.is_complex())
    ]
    found = [t.to_dense() if t.layout != torch.strided else t for t in found]
    found = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in found]
    return (
        torch.cat([t.reshape(-1).double() for t in found])
        if found
        else torch.zeros(0, dtype=torch.float64)
    )


class Expected(NamedTuple):
    value: torch.Tensor
    products: torch.Tensor | None   # w · J v_m, (M,), by reverse mode
    gradient: torch.Tensor | None   # of Σ c_m w · J v_m + u · f, like x, by reverse mode
    # w · J V, V = Σ c_m v_m, and whether the function is smooth enough for it.
    product_quotient: tuple[float, bool]
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
        # a jump.
        steep.append(
            float((plus + minus - 2 * y).abs().max()) > 1e3 * h * (1 + float(y.abs().max()))
        )
        return float(w @ (plus - minus)) / (2 * h)

    def mixed(h):
        return (along(k.w, x + h * k.d, V, h) - along(k.w, x - h * k.d, V, h)) / (2 * h) + along(
            k.u, x, k.d, h
        )

    found = (
        extrapolated(lambda h: along(k.w, x, V, h), (2e-4, 1e-4, 5e-5)),
        extrapolated(mixed, (1e-3, 5e-4, 2.5e-4)),
    )
    if not found[1][1]:   # too near to where f is steep: shorter steps, for one digit less
        found = found[0], extrapolated(mixed, (1e-4, 5e-5, 2.5e-5))
    return tuple((value, smooth and not any(steep)) for value, smooth in found)


def close(a, b, tolerance) -> bool:
    a, b = (torch.as_tensor(t, dtype=torch.float64) for t in (a, b))
    if not a.numel():
        return True
    size = 1 + float(torch.where(b.isfinite(), b.abs(), 0).max())
    return bool((((a - b).abs() <= tolerance * size) | (a == b)).all())


def undefined(found, theirs) -> bool:
    """No number where reverse mode has none either."""
    return close(
        torch.where(theirs.isnan(), 0, found), theirs.nan_to_num(0.0, math.inf, -math.inf), 1e-8
    ) and bool(theirs.isnan().any())


@contextlib.contextmanager
def routes():
    """What a call resorts to, collected by name."""
    met = set()
    slower = [
        (dispatch, "generic", "operation"),
        (ways, "_forward_mode", "function"),
        (ways, "_double_backward", "reverse"),
    ]

    def noted(called, function):
        def call(*args, **kwargs):
            met.add(called)
            return function(*args, **kwargs)

        return call

    original = [getattr(module, name) for module, name, _ in slower]
    try:
        for (module, name, called), function in zip(slower, original):
            setattr(module, name, noted(called, function))
        yield met
    finally:
        for (module, name, _), function in zip(slower, original):
            setattr(module, name, function)


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
            (gradient,) = (
                torch.autograd.grad(total, leaf, materialize_grads=True)
                if total.requires_grad
                else (torch.zeros_like(x),)
            )
        except Exception as error:
            return refusal(error, plain, x, k, route_of(met))

    if value.shape != y.shape or value.dtype != y.dtype or not close(value.detach(), y, 1e-10):
        return Verdict("wrong", route_of(met), "the value")

    return judged(
        case, plain, x, k, products.detach(), gradient.detach(), route_of(met), everywhere
    )


def refusal(error, plain, x, k, route) -> Verdict:
    """Ours, in one sentence; or PyTorch's own, of f or of its gradients."""
    first, *more = str(error).splitlines() or [""]
    if first.startswith("fastscore") and not more:
        return Verdict("refused", route, first)
    try:
        reverse_mode(plain, x, k)
    except Exception:
        return Verdict("refused", route, f"PyTorch's: {first}")
    if first.startswith("derivative for"):   # named when the gradient of J v is taken
        return Verdict("refused", route, f"PyTorch's: {first}")
    return Verdict("raw", route, f"{type(error).__name__}: {first}")


def route_of(met) -> str:
    return next((route for route in ("reverse", "function", "operation") if route in met), "rule")


def judged(case, f, x, k, products, gradient, route, everywhere) -> Verdict | None:
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
        agrees = theirs is not None and close(found, theirs, max(1e-8, case.resolution))
        near = close(along, quotient, 1e-5)
        if near and (smooth or agrees or theirs is None):
            continue
        if theirs is None and not smooth:   # nothing to judge it by
            return None
        if agrees and (not smooth or case.resolution or case.by_convention):
            continue
        if theirs is not None and (not smooth or not everywhere) and undefined(found, theirs):
            continue
        size = f"{along:.6g}; quotient {quotient:.6g}{'' if smooth else ' (not smooth)'}"
        reverse = (
            "none"
            if theirs is None
            else f"{float((k.c @ theirs) if what == 'J v' else (theirs * k.d).sum()):.6g}"
        )
        return Verdict("wrong", route, f"{what}: {size}; reverse mode {reverse}")
    return Verdict("right", route)


class Row(NamedTuple):
    """An operator's cases by outcome, and why the first was refused."""

    counts: dict
    why: str


def sweep(ops, most: int, directions=(1, 3), report: Callable = lambda *found: None) -> dict:
    """{operator: Row}; `report` is called for every case that is wrong or ends in a raw error."""
    rows = {}
    for op in ops:
        counts, why = {}, ""
        for case in cases(op, most):
            for M in directions:
                verdict = examine(case, M)
                if verdict is None:
                    continue
                column = (
                    verdict.outcome
                    if verdict.outcome != "right"
                    else "rule"
                    if verdict.route == "rule"
                    else "fallback"
                )
                counts[column] = counts.get(column, 0) + 1
                why = why or (verdict.why if verdict.outcome == "refused" else "")
                if verdict.outcome in ("wrong", "raw"):
                    report(case.name, M, verdict)
        if counts:
            rows[full_name(op)] = Row(counts, why)
    return rows


def table(rows: dict) -> str:
    total = {
        column: sum(row.counts.get(column, 0) for row in rows.values())
        for column in ("rule", "fallback", "refused", "wrong", "raw")
    }
    version = torch.__version__.split("+")[0]
    lines = [
        "# Operators",
        "",
        "`fastscore.jvp` and the gradient of its result, through the samples that PyTorch "
        f"{version} has of {len(rows)} of its operators",
        "(`op_db` of `torch.testing`): as functions, methods and in place, of each tensor and of "
        "all of them, along one and three",
        "directions, against reverse mode and extrapolated differences in float64. `python "
        "tests/operator_sweep.py --out",
        "docs/operators.md` writes this page; `make test-slow` takes more samples, and fails on a "
        "wrong value.",
        "",
        f"Right by a rule: {total['rule']:,} cases. Right by a fallback (stock forward mode of the "
        "operation or of the whole",
        f"function, or two backward passes): {total['fallback']:,}. Refused: "
        f"{total['refused']:,}. Wrong: {total['wrong']}.",
        "",
        "| operator | right by rule | right by fallback | refused | why |",
        "|---|---|---|---|---|",
    ]
    for name, row in sorted(rows.items()):
        cells = [str(row.counts.get(column, "")) for column in ("rule", "fallback", "refused")]
        why = row.why.removeprefix("fastscore.jvp: ").replace("|", "\\|")[:140]
        lines.append(f"| {name} | {' | '.join(cells)} | {why} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(
        description="PyTorch's samples of its operators through fastscore.jvp"
    )
    parser.add_argument("--only", nargs="*", help="patterns of operators' names")
    parser.add_argument("--most", type=int, default=4, help="samples of an operator")
    parser.add_argument("--out", help="write the table here")
    arguments = parser.parse_args()

    def report(name, M, verdict):
        print(verdict.outcome.upper(), name, f"M={M}", verdict.route, verdict.why[:200], flush=True)

    chosen = [
        op
        for op in operators()
        if not arguments.only or any(re.fullmatch(p, full_name(op)) for p in arguments.only)
    ]
    page = table(sweep(chosen, arguments.most, report=report))
    if arguments.out:
        with open(arguments.out, "w") as file:
            file.write(page)
    else:
        print(page)


if __name__ == "__main__":
    main()
