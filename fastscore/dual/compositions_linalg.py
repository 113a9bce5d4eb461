"""Linear algebra that is right at every order.

PyTorch makes these tangents from a factorisation that it saved as a constant.
"""

from typing import Any

import torch

from fastscore.dual.formulas import formula, refused


@formula("solve", holders=(torch.linalg,))
def solve(A: Any, B: Any, *, left: bool = True) -> Any:
    # As torch tells them apart.
    vector = B.dim() == 1 or (A.dim() - 1 == B.dim() and B.shape == A.shape[:-1])
    if vector:
        return (torch.linalg.inv(A) @ B.unsqueeze(-1)).squeeze(-1)
    return torch.linalg.inv(A) @ B if left else B @ torch.linalg.inv(A)


@formula("solve_ex", holders=(torch.linalg,))
def solve_ex(A: Any, B: Any, *, left: bool = True, check_errors: bool = False) -> Any:
    info = torch.linalg.inv_ex(A.detach(), check_errors=check_errors).info
    return torch.return_types.linalg_solve_ex((solve(A, B, left=left), info))


@formula("tensorsolve", holders=(torch.linalg,))
def tensorsolve(A: Any, B: Any, dims: Any = None) -> Any:
    if dims is not None:
        A = A.movedim(tuple(dims), tuple(range(A.dim() - len(dims), A.dim())))
    return solve(A.reshape(B.numel(), -1), B.reshape(-1)).reshape(A.shape[B.dim() :])


@formula("cholesky_inverse", holders=(torch.Tensor, torch))
def cholesky_inverse(L: Any, upper: bool = False) -> Any:
    inverse = torch.linalg.inv(L.triu() if upper else L.tril())
    return inverse @ inverse.mH if upper else inverse.mH @ inverse


@formula("householder_product", "orgqr")
def householder_product(A: Any, tau: Any) -> Any:
    m, n = A.shape[-2:]
    eye = torch.eye(m, n, dtype=A.dtype, device=A.device)
    reflectors = A.tril(-1) + eye
    Q = eye.expand(A.shape)
    for i in reversed(range(tau.shape[-1])):
        v = reflectors[..., i : i + 1]
        Q = Q - tau[..., i : i + 1, None] * v @ (v.mH @ Q)
    return Q


def _pivots(A):
    """|det A| = ∏|pivots| · |det rest|: elimination down to 3 × 3.

    Pivots (n - 3, N), the rest (N, 3, 3), a sign (N,).
    """
    sign = torch.ones(len(A), dtype=A.dtype, device=A.device)
    pivots = []
    while (n := A.shape[-1]) > 3:
        largest = A.detach().abs().flatten(1).argmax(1)
        for dim, chosen in ((1, largest // n), (2, largest % n)):
            at = torch.arange(n, device=A.device).expand(len(A), n)
            swapped = torch.where(
                at == 0, chosen[:, None], torch.where(at == chosen[:, None], 0, at)
            )
            A = A.gather(dim, swapped.unsqueeze(3 - dim).expand(A.shape))
            sign = torch.where(chosen == 0, sign, -sign)

        pivot = A[:, 0, 0]
        pivots.append(pivot)
        # A pivot of zero: all that is left is zero, and a 4 × 4 block has its first derivative that
        # is not of order 4.
        A = (
            A[:, 1:, 1:]
            - A[:, 1:, :1] * A[:, :1, 1:] / torch.where(pivot == 0, 1.0, pivot)[:, None, None]
        )

    return pivots, A, sign


def _small_det(A):
    """Of (N, n, n), n <= 3, by cofactors."""
    n = A.shape[-1]
    if n == 0:
        return torch.ones(len(A), dtype=A.dtype, device=A.device)
    if n == 1:
        return A[:, 0, 0]
    if n == 2:
        return A[:, 0, 0] * A[:, 1, 1] - A[:, 0, 1] * A[:, 1, 0]

    return sum(
        A[:, 0, i] * (A[:, 1, j] * A[:, 2, k] - A[:, 1, k] * A[:, 2, j])
        for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1))
    )


@formula("det", holders=(torch.Tensor, torch, torch.linalg))
def det(A: Any) -> Any:
    """Right where A is singular, too."""
    pivots, rest, sign = _pivots(A.reshape(-1, *A.shape[-2:]))
    product = _small_det(rest) * sign
    for pivot in pivots:
        product = product * pivot
    return product.reshape(A.shape[:-2])


def _log_abs_det(A):
    pivots, rest, sign = _pivots(A.reshape(-1, *A.shape[-2:]))
    last = _small_det(rest)
    total = last.abs().log()
    for pivot in pivots:
        total = total + pivot.abs().log()
        sign = sign * pivot.detach().sign()
    return (sign * last.detach().sign()).reshape(A.shape[:-2]), total.reshape(A.shape[:-2])


@formula("slogdet", holders=(torch.Tensor, torch, torch.linalg))
def slogdet(A: Any) -> Any:
    if A.is_complex():
        refused("slogdet of complex matrices has no right forward mode; take det")()
    return torch.return_types.slogdet(_log_abs_det(A))


@formula("logdet", holders=(torch.Tensor, torch))
def logdet(A: Any) -> Any:
    if A.is_complex():
        return det(A).log()
    sign, value = _log_abs_det(A)
    return torch.where(sign < 0, torch.nan, value)
