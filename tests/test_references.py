"""The reference below each op's docstring is the op.

Values in float64, on every form of its arguments.
"""

import sys

import pytest
import torch

from fastscore import ops, random
from fastscore.ops.denoising_loss import denoising_loss_ref
from fastscore.ops.group_norm_modulate import group_norm_modulate_ref
from fastscore.ops.instance_norm_plus import (
    conditional_instance_norm_plus_ref,
    instance_norm_plus_ref,
)
from fastscore.ops.noisy_update import langevin_step_ref, noisy_update_ref, perturb_ref
from fastscore.ops.rademacher_project import project, project_ref

KEY = {"seed": 11, "step": 3}
CLOSE = {"rtol": 1e-12, "atol": 1e-12}   # of float64: a few hundred roundings


def draws(*shape):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shape]


def noise(x, stream):
    return random.normal(x.shape, **KEY, stream=stream, dtype=torch.float64)


COEFFICIENTS = [
    0.3,
    torch.tensor(0.3, dtype=torch.float64),
    torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64),
]


@pytest.mark.parametrize("c", COEFFICIENTS, ids=["float", "0-d", "(B,)"])
def test_noise_ops_are_their_references(c):
    x, d = draws((3, 2, 5), (3, 2, 5))
    z = noise(x, random.LANGEVIN)
    torch.testing.assert_close(
        ops.noisy_update(x, d, -2 * c, c, **KEY), noisy_update_ref(x, d, -2 * c, c, z), **CLOSE
    )
    torch.testing.assert_close(
        ops.langevin_step(x, d, c, **KEY), langevin_step_ref(x, d, c, z), **CLOSE
    )

    z = noise(x, random.PERTURB)
    torch.testing.assert_close(ops.perturb(x, c, **KEY), perturb_ref(x, c, z), **CLOSE)
    torch.testing.assert_close(
        ops.denoising_loss(x, c, **KEY), denoising_loss_ref(x, c, z), **CLOSE
    )


@pytest.mark.parametrize("activation", [None, "elu", "silu", "relu", "gelu", "softplus"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 1, 3, 4), (2, 4, 1, 1)], ids=str)
def test_instance_norms_are_their_references(shape, activation):
    B, C = shape[:2]
    x, gamma, alpha, beta, table = draws(shape, (C,), (B, C), (C,), (5, 3 * C))
    for columns in ((gamma,), (gamma, alpha), (gamma, alpha, beta), (gamma, None, beta)):
        got = ops.instance_norm_plus(x, *columns, activation=activation)
        torch.testing.assert_close(
            got, instance_norm_plus_ref(x, *columns, activation=activation), **CLOSE
        )

    labels = torch.arange(B) % 5
    for weight, bias in ((table, True), (table[:, : 2 * C].contiguous(), False)):
        given = {"activation": activation, "bias": bias, "eps": 1e-3}
        got = ops.conditional_instance_norm_plus(x, labels, weight, **given)
        torch.testing.assert_close(
            got, conditional_instance_norm_plus_ref(x, labels, weight, **given), **CLOSE
        )


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_group_norms_are_their_references(groups):
    x, w, b, scale, shift = draws((3, 4, 5, 2), (4,), (4,), (3, 4), (3, 4))
    affine, modulation = {"weight": w, "bias": b}, {"scale": scale, "shift": shift}
    for given in ({}, {"weight": w}, affine, modulation, affine | modulation):
        got = ops.group_norm_modulate(x, groups, **given, activation="silu")
        torch.testing.assert_close(
            got, group_norm_modulate_ref(x, groups, **given, activation="silu"), **CLOSE
        )


def test_projections_onto_signs_are_their_reference():
    s, js = draws((3, 5), (2, 3, 5))
    key, *numbers = random.noise_key("test", 7, 1, random.PROJECTION, 0, 0, s.device)
    v = torch.stack(
        [
            random.rademacher(
                (3, 5), seed=7, step=1, stream=random.PROJECTION, substream=m, dtype=s.dtype
            )
            for m in range(2)
        ]
    )
    for got, wanted in zip(project(s, js, key, tuple(numbers), "cpp"), project_ref(s, js, v)):
        torch.testing.assert_close(got, wanted, **CLOSE)


def test_every_public_op_has_a_reference_in_its_module():
    for name in ops.__all__:
        if not name.endswith("_dual"):   # values and tangents of an op that has one
            module = sys.modules[getattr(ops, name).__module__]
            assert callable(getattr(module, f"{name}_ref")), name
