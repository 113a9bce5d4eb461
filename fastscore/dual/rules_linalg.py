"""Products of matrices, solutions, determinants, eigenvalues."""

from typing import Any

import torch

from fastscore import backend as backends
from fastscore.dual import compositions_linalg
from fastscore.dual.functions import matmul_stack
from fastscore.dual.number import dual, joined, like, stack
from fastscore.dual.rules_math import add, leibniz, mul, power
from fastscore.dual.rules_shape import constant, t, transpose
from fastscore.dual.stacks import both, is_dual
from fastscore.dual.table import RULES, rule


def _sample_by_sample(a, b):
    ranks = [c.stack.dim() - 1 if is_dual(c) else c.dim() for c in (a, b)]
    if is_dual(a) and is_dual(b):
        return ranks[0] == ranks[1] > 2
    if is_dual(a):
        return 1 < ranks[0] >= ranks[1]
    return 2 < ranks[1] >= ranks[0] > 1


@rule("matmul", "__matmul__", "bmm", "mm", "mv", "dot", apart=_sample_by_sample)
def matmul(a: Any, b: Any) -> Any:
    if is_dual(a) and is_dual(b):
        if a.dim() < 2 or b.dim() < 2:
            return NotImplemented
        if a.order == 2:
            return leibniz(torch.matmul, a, b)
        return dual(matmul_stack(*both(stack(a), stack(b))))
    if is_dual(a):
        if b.layout != torch.strided:
            return transpose(_sparse_times(b.t(), t(a)), 0, 1) if a.dim() == 2 else NotImplemented
        return like(a, stack(a) @ b) if a.dim() >= 2 and b.dim() <= a.dim() else NotImplemented
    if a.layout != torch.strided:
        return _sparse_times(a, b)
    if b.dim() < 2 or a.dim() > b.dim() or a.dim() < 2:
        return NotImplemented

    return like(b, a @ stack(b))


def _sparse_times(a, b):
    """A sparse matrix (n, m) times vectors (m,) or matrices (m, k): all of the stack as columns."""
    s = stack(b).reshape(len(stack(b)), b.shape[0], -1)   # (1 + M, m, k)
    y = a @ s.movedim(0, 1).flatten(1)
    y = y.unflatten(1, (len(s), -1)).movedim(1, 0)
    return like(b, y.reshape(len(s), -1, *b.shape[1:]))


@rule(torch.Tensor.__rmatmul__, apart=lambda a, b: _sample_by_sample(b, a))
def rmatmul(a: Any, b: Any) -> Any:
    return matmul(b, a)


@rule("baddbmm")
def baddbmm(input: Any, batch1: Any, batch2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    product = matmul(batch1, batch2) if is_dual(batch1) or is_dual(batch2) else batch1 @ batch2
    scaled = mul(product, alpha) if is_dual(product) else product * alpha
    return scaled if beta == 0 else add(scaled, input * beta)


def _solve(A, B, *, left=True):
    if backends.levels():
        return compositions_linalg.solve(A, B, left=left)

    n = len(stack(A if is_dual(A) else B))
    A, B = (stack(a) if is_dual(a) else constant(a, n) for a in (A, B))
    # As torch tells them apart.
    vector = B.dim() == 2 or (A.dim() - 1 == B.dim() and B.shape[1:] == A.shape[1:-1])
    A, B = both(A, B[..., None] if vector else B)
    if not left and not vector:   # X A = B
        A, B = A.mT, B.mT

    y = torch.linalg.solve(A[0], B[0])
    s = torch.cat([y[None], torch.linalg.solve(A[0], B[1:] - A[1:] @ y)])
    if vector:
        return dual(s[..., 0])
    return dual(s if left else s.mT)


def _log_slope(s):
    """tr(A⁻¹ Ȧ), the tangents of log |det A|."""
    return (torch.linalg.inv(s[0]).mT * s[1:]).sum((-2, -1))


def _det(A):
    s = stack(A)
    # a singular matrix has no inverse, but its determinant has slopes.
    if backends.levels() or not _invertible(s[0].detach()):
        return compositions_linalg.det(A)
    y = torch.linalg.det(s[0])
    return joined(y, y * _log_slope(s))


def _invertible(A):
    """Far enough from singular for det A · A⁻¹ to have half its digits."""
    inverse, info = torch.linalg.inv_ex(A)
    condition = (
        torch.linalg.matrix_norm(A, 1) * torch.linalg.matrix_norm(inverse, 1)
        if A.shape[-1]
        else A.new_ones(A.shape[:-2])
    )
    return bool(((info == 0) & (condition < torch.finfo(A.dtype).eps ** -0.5)).all())


def _logdet(A):
    s = stack(A)
    return joined(torch.logdet(s[0]), _log_slope(s))


def _slogdet(A):
    s = stack(A)
    sign, y = torch.linalg.slogdet(s[0])
    return torch.return_types.slogdet((sign, joined(y, _log_slope(s))))


def _inverse(A):
    s = stack(A)
    y = torch.linalg.inv(s[0])
    return joined(y, -(y @ s[1:] @ y))


RULES[torch.linalg.solve] = _solve
for _function in (torch.linalg.inv, torch.inverse, torch.Tensor.inverse):
    RULES[_function] = _inverse
for _name, _function in (("det", _det), ("logdet", _logdet), ("slogdet", _slogdet)):
    for _holder in (torch, torch.Tensor, torch.linalg):
        if hasattr(_holder, _name):
            RULES[getattr(_holder, _name)] = _function


def _eigh(A, UPLO="L"):
    """V̇ = V (F ∘ VᵀȦV), F_ij = 1/(λ_j - λ_i): PyTorch's tangent has a gradient of NaN."""
    s = stack(A)
    lower = s.tril(-1) if UPLO.upper() == "L" else s.triu(1).mT
    s = lower + lower.mT + torch.diag_embed(s.diagonal(dim1=-2, dim2=-1))
    values, vectors = torch.linalg.eigh(s[0])
    inner = vectors.mT @ s[1:] @ vectors
    same = torch.eye(values.shape[-1], dtype=torch.bool, device=values.device)
    gaps = torch.where(same, 1.0, values.unsqueeze(-2) - values.unsqueeze(-1))
    turned = vectors @ torch.where(same, 0.0, inner / gaps)
    parts = joined(values, inner.diagonal(dim1=-2, dim2=-1)), joined(vectors, turned)
    return torch.return_types.linalg_eigh(parts)


RULES[torch.linalg.eigh] = _eigh
RULES[torch.Tensor.__rpow__] = lambda exponent, x: power(x, exponent)
