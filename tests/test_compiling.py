"""Importing fastscore leaves Dynamo alone.

What Dynamo must know of us it learns when it comes, before us, after us or inside f.
"""

import subprocess
import sys

import pytest

BEFORE = "import torch._dynamo\nimport fastscore\n"
AFTER = """import sys
import fastscore
assert 'torch._dynamo' not in sys.modules
import torch._dynamo
"""
PROGRAMS = {
    "an op in the graph": """
import torch
key = dict(seed=0, step=1, stream=2)
step = lambda x: fastscore.langevin_step(x, -x, 0.1, **key)
x = torch.randn(64)
assert torch.equal(torch.compile(step, fullgraph=True, backend="eager")(x), step(x))
""",
    "a loss breaks the graph": """
import torch
net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
x = torch.randn(5, 3).double()
loss = lambda: fastscore.losses.sliced(net, x, seed=0).mean()
assert torch.allclose(torch.compile(loss, backend="eager")(), loss(), rtol=0, atol=1e-12)
assert torch._dynamo.explain(loss)().graph_break_count
""",
    "a compiled network": """
import torch
c = torch.compile(lambda x: x * x + x, backend="eager")
y, t = fastscore.jvp(c, torch.full((2, 3), 2.0), torch.ones(2, 3))
assert (y == 6).all() and (t == 5).all()
""",
}
INSIDE = """
import sys
import torch, fastscore
assert "torch._dynamo" not in sys.modules

def f(x):
    return torch.compile(lambda x: x * x + x, backend="eager")(x)

y, t = fastscore.jvp(f, torch.full((2, 3), 2.0), torch.ones(2, 3))
assert (y == 6).all() and (t == 5).all()
import torch._dynamo.eval_frame
assert torch._dynamo.eval_frame._stance.stance == "default"
"""


@pytest.mark.parametrize("first", [BEFORE, AFTER], ids=["dynamo-first", "fastscore-first"])
@pytest.mark.processes
def test_dynamo_knows(first):
    """Three programs in one process, for Dynamo takes seconds to come."""
    program = first + "torch._dynamo.reset()\n".join(PROGRAMS.values())
    subprocess.run([sys.executable, "-c", program], check=True, timeout=240)


@pytest.mark.processes
def test_dynamo_comes_inside_f():
    subprocess.run([sys.executable, "-c", INSIDE], check=True, timeout=240)


FAILING = """
import builtins, sys
import torch, fastscore
real = builtins.__import__

def broken(name, *args, **named):
    if name == "torch._dynamo" or not name.startswith("torch._dynamo"):
        return real(name, *args, **named)
    builtins.__import__ = real
    raise ImportError("once")

builtins.__import__ = broken
try:
    import torch._dynamo
    raise SystemExit("the import did not fail")
except ImportError as error:
    assert str(error) == "once"
"""


@pytest.mark.processes
def test_dynamo_comes_after_an_import_that_failed():
    program = FAILING + PROGRAMS["an op in the graph"]
    subprocess.run([sys.executable, "-c", program], check=True, timeout=240)
