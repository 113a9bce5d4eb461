"""PyTorch's operators through jvp and the gradient of its result.

None wrong, on PyTorch's own samples and where its formulas fail.
"""

import pytest
import torch
import torch.nn.functional as F
from operator_sweep import Case, examine, full_name, operators, sweep, table

from fastscore.dual import routes
from fastscore.dual.call import NoRule

F64 = {"dtype": torch.float64}
torch.manual_seed(0)
A, B = torch.randn(2, 4, 4, **F64) + 3 * torch.eye(4, **F64), torch.randn(2, 4, 4, **F64)
SPARSE = torch.eye(4, **F64).roll(1, 0).to_sparse()
PLACES = torch.tensor([[0, 1, 0, 0], [2, 2, 2, 1]])


def of_rank(rank):
    rows = torch.tensor(
        [[2.0, 1, 0, -1, 3], [1, -2, 1, 0, 2], [0, 1, 4, 1, -1], [3, 0, 1, 2, 1]], **F64
    )[:rank]
    return torch.cat([rows, rows[:1].expand(5 - rank, 5)])


NORMS = (
    *(
        lambda x: torch.norm(x, dim=1),
        lambda x: x.norm(2, -1),
        lambda x: torch.linalg.norm(x, dim=1),
        lambda x: F.normalize(x)[:, 0],
    ),
    *(
        lambda x: torch.linalg.vector_norm(x, dim=(1,)),
        lambda x: x.norm()[None],
        lambda x: torch.linalg.norm(x, 3.5, 1),
    ),
)
# name: f and x
STOCK = {
    "solve-from-the-right": (lambda x: torch.linalg.solve(x, B, left=False), A),
    "solve-from-the-right-both": (lambda x: torch.linalg.solve(x, x.mT.sin(), left=False), A),
    "solve-ex": (lambda x: torch.linalg.solve_ex(x, B.sin() * x)[0], A),
    "tensorsolve": (
        lambda x: torch.linalg.tensorsolve(x.reshape(2, 2, 4), x[0, 0].reshape(2, 2)),
        A[:1],
    ),
    "cholesky-inverse": (lambda x: torch.cholesky_inverse(x) + x.cholesky_inverse(upper=True), A),
    "householder": (lambda x: torch.linalg.householder_product(x, x[:, 0].sin()), A),
    "orgqr": (lambda x: x.orgqr(x[:, 0].sin()), A),
    "eigh": (
        lambda x: (
            torch.linalg.eigh(x + x.mT, UPLO="U")[1].square()
            * torch.linalg.eigh(x + x.mT)[0][:, None]
        ),
        A,
    ),
    "eig": (lambda x: torch.linalg.eig(x)[1].abs() + torch.linalg.eig(x)[0].abs()[:, None], A),
    "eig-of-odd-size": (
        lambda x: torch.cat([torch.view_as_real(torch.linalg.eig(x[0])[0]).flatten(), x[0, 0, :1]]),
        A,
    ),
    "eigh-of-complex": (lambda x: torch.linalg.eigh(torch.complex(x + x.mT, x - x.mT))[1].abs(), A),
    "complex-algebra": (
        lambda x: (
            torch.linalg.solve(torch.complex(x, x.sin()), x + 0j).abs()
            * torch.complex(x, x).det().abs()[0]
        ),
        A,
    ),
    "complex-householder": (
        lambda x: torch.linalg.householder_product(
            torch.complex(x, x.sin()), torch.complex(x, x)[:, 0]
        ).abs(),
        A,
    ),
    "complex-cumprod": (lambda x: torch.complex(x.relu(), x.relu()).cumprod(1).real, B[0]),
    **{
        f"det-of-rank-{rank}": (
            lambda x: torch.linalg.det(x) + torch.det(x + 0) * x.det(),
            of_rank(rank),
        )
        for rank in (1, 2, 3, 4)
    },
    "det-in-a-batch": (
        lambda x: torch.linalg.det(x),
        torch.stack([of_rank(4), of_rank(4) + torch.eye(5, **F64)]),
    ),
    "product-scattered": (lambda x: x.scatter_reduce(0, PLACES, x[:2].sin(), "prod"), B[0]),
    "product-scattered-zeros": (
        lambda x: x.scatter_reduce(1, PLACES, x.relu(), "prod", include_self=False),
        B[0],
    ),
    "product-scattered-in-place": (
        lambda x: (x * 1).scatter_reduce_(0, PLACES, x[:2].sin(), "prod"),
        B[0],
    ),
    "product-by-index": (
        lambda x: x.index_reduce(0, torch.tensor([1, 1, 3, 1]), x.relu(), "prod"),
        B[0],
    ),
    "product-scattered-0-d": (
        lambda x: x.scatter_reduce(0, torch.tensor(0), x.sin(), "prod"),
        B[0, 0, 0],
    ),
    "product-by-index-0-d": (
        lambda x: x.index_reduce(0, torch.tensor(0), x.sin(), "prod", include_self=False),
        B[0, 0, 0],
    ),
    "logcumsumexp-spread": (lambda x: torch.logcumsumexp(x * 400, 1), B[0]),
    "logcumsumexp-ties": (lambda x: torch.logcumsumexp(x.relu(), axis=0), B[0]),
    "logcumsumexp-nothing": (
        lambda x: torch.logcumsumexp(torch.cat([torch.full_like(x[:2], -torch.inf), x]), 0)[2:],
        B[0],
    ),
    "logaddexp": (lambda x: torch.logaddexp(x.relu() * 900, x.T), B[0]),
    "sgn-in-place": (lambda x: (x * x + 1).sgn_() * x, B[0]),
    "fill-by-name": (lambda x: (x * 1).fill_(value=x.sum()) * x, B[0]),
    "copy-by-name": (
        lambda x: torch.zeros(4, 4, **F64).copy_(other=x).fill_(value=x.sin().sum()) * x,
        B[0],
    ),
    "cumprod-of-relu": (lambda x: x.relu().cumprod(1) + torch.cumprod(input=x.relu(), dim=0), B[0]),
    "cumprod-in-place": (lambda x: (x.relu() + 0).cumprod_(1), B[0]),
    "roll-by-nothing": (lambda x: torch.roll(x, 1, ()).sin(), B[0]),
    "sum-over-no-list": (lambda x: x.sum([]) * x.mean(()) + x.sin().sum([], keepdim=True), B[0]),
    "tensor-split-by-a-tensor": (
        lambda x: torch.cat(x.tensor_split(torch.tensor([1, 3]), 1)[::-1], 1).sin(),
        B[0],
    ),
    "tensor-split-by-a-0-d-tensor": (
        lambda x: torch.tensor_split(x, torch.tensor(2))[1] * x[:2],
        B[0],
    ),
    "sparse-times": (lambda x: SPARSE @ x.sin() + torch.mm(SPARSE, x), B[0]),
    "sparse-times-vector": (lambda x: SPARSE @ x[0].sin() + torch.mv(SPARSE, x[1]), B[0]),
    "times-sparse": (lambda x: x.sin() @ SPARSE, B[0]),
    "sparse-csr": (lambda x: SPARSE.to_sparse_csr() @ x.sin(), B[0]),
    "sparse-mm": (lambda x: torch.sparse.mm(SPARSE, x.sin()), B[0]),
    "sparse-addmm": (
        lambda x: torch.sparse.addmm(x, SPARSE, x.sin()) + torch.addmm(x, SPARSE, x),
        B[0],
    ),
    "norms-at-zero": (lambda x: sum(n(x[:1] * 0) + n(x)[:1] for n in NORMS), B[0]),
    "nothing-beside-something": (
        lambda x: torch.cat([torch.zeros(0, **F64), x, x[0, :0]], 1).sin(),
        B[0],
    ),
    "distances": (lambda x: torch.cdist(x, x.sin()) + F.pdist(x)[:4], B[0]),
    "distances-of-one-set": (lambda x: torch.cdist(x, x).square(), B[0]),
    "distances-p": (lambda x: torch.cdist(x, x.cos(), p=3.0) + F.pdist(x, 1.5)[:4], B[0]),
    "number-to-a-power": (
        lambda x: 0.0 ** x.exp() + 2**x + torch.tensor([0.0, 1, 2, 3], **F64) ** x.exp(),
        B[0],
    ),
    "step-function": (
        lambda x: torch.heaviside(torch.tensor([0.0, 1, -1, 0], **F64), x.sin()) * x,
        B[0],
    ),
    "targets": (lambda x: F.binary_cross_entropy(x.sigmoid(), x.cos() * 0.5 + 0.5), B[0]),
    "views-beside-constants": (
        lambda x: sum(t * x for t in torch.broadcast_tensors(x, torch.ones(4, **F64), x[0])),
        B[0],
    ),
    "meshgrid": (
        lambda x: sum(
            t.sin() for t in torch.meshgrid(x[0], torch.arange(4.0, **F64), indexing="ij")
        ),
        B[0],
    ),
    "atleast": (lambda x: sum(t * 2 for t in torch.atleast_2d(x, torch.ones(4, 4, **F64))), B[0]),
    "normal": (lambda x: torch.normal(x, x.exp()) * x, B[0]),
    "draws-once": (lambda x: (torch.manual_seed(0), torch.svd_lowrank(x, 2)[1])[1], B[0]),
}


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("name", STOCK)
def test_where_stock_formulas_fail(name, M):
    f, x = STOCK[name]

    def seeded(x):
        torch.manual_seed(0)
        return f(x).reshape(-1)

    verdict = examine(Case(name, seeded, x, seeded), M)
    assert verdict.outcome == "right", verdict


BESIDE = {
    **STOCK,
    "glu": (lambda x: F.glu(x), B[0]),
    "hardsigmoid": (lambda x: F.hardsigmoid(x) + F.hardswish(x), B[0]),
}


@pytest.mark.parametrize("name", BESIDE)
def test_where_stock_formulas_fail_in_forward_mode_as_a_whole(name, monkeypatch):
    """Beside an operation that dual numbers cannot be carried through."""
    f, x = BESIDE[name]

    def no_stack(*args):
        raise NoRule("fastscore.jvp: not here.")

    def seeded(x):
        torch.manual_seed(0)
        return f(x).reshape(-1)

    monkeypatch.setattr(routes, "_stacked", no_stack)
    verdict = examine(Case(name, seeded, x, seeded), 3)
    assert verdict.outcome == "right", verdict


# One of every kind of operator: arithmetic, a scan, views, indices, algebra, layers, a constant, a
# refusal.
FEW = """
    add cumprod meshgrid.list_of_tensors tensor_split index_put scatter_reduce.prod linalg.solve
    linalg.eigh nn.functional.hardsigmoid nn.functional.layer_norm nn.functional.dropout
    special.bessel_j0 floor_divide as_strided_scatter
""".split()


def faults(ops, most):
    found = []
    rows = sweep(ops, most, report=lambda name, M, verdict: found.append((name, M, verdict)))
    return rows, found


def test_a_few_operators():
    ops = [op for op in operators() if full_name(op) in FEW]
    rows, found = faults(ops, 1)
    assert not found, found
    assert len(rows) == len(ops) == len(FEW)
    assert (
        rows["special.bessel_j0"].counts.keys() == {"refused"}
        and "as a constant" in rows["special.bessel_j0"].why
    )
    assert rows["add"].counts.keys() == {"rule"}
    assert f"| cumprod | {rows['cumprod'].counts['rule']} |" in table(rows)


PARTS = 128


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_operator(part):
    """None wrong, none that ends in an error which PyTorch's reverse mode does not have."""
    ops = operators()[part::PARTS]
    rows, found = faults(ops, 6)
    assert not found, found
    assert len(rows) > len(ops) / 2   # PyTorch has samples that reverse mode takes


def test_a_wrong_rule_is_found(monkeypatch):
    """The sweep itself: a rule whose tangent is one percent off, one without the gradient of its
    tangent."""
    from fastscore.dual.number import Dual
    from fastscore.dual.rules import RULES

    right = RULES[torch.sin]
    for wrong in (
        lambda s: torch.cat([s[:1], 1.01 * s[1:]]),
        lambda s: torch.cat([s[:1], s[1:].detach()]),
    ):
        monkeypatch.setitem(RULES, torch.sin, lambda x, wrong=wrong: Dual(wrong(right(x).stack)))
        verdict = examine(Case("sin", torch.sin, B[0][0], torch.sin), 3)
        assert verdict.outcome == "wrong", verdict
