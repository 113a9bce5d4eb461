"""The raw ops: what is registered in C++ and in Triton under one name and schema."""

from typing import NamedTuple


class RawOp(NamedTuple):
    """A kernel behind public functions, under one name and schema in C++ and in Triton."""

    # Of its files: csrc/X.cpp, kernels/X.py, tests/test_X.py and so on.
    stem: str
    # Arguments; it writes where they say and returns nothing.
    schema: str
    # Public functions whose values it computes; none if it serves a backward pass alone.
    serves: tuple[str, ...] = ()
    # Whether it is also written in CUDA C++.
    cuda: bool = False
    # Whether CUDA C++ has it for those samples that fit in a cluster of blocks, and no others.
    clusters: bool = False


_KEY = "Tensor? key, int seed, int step, int stream, int offset"
_NORM = "int groups, bool alpha, bool beta, float eps, int activation"

OPS = {
    "fill": RawOp(
        "random",
        f"Tensor(a!) out, int kind, {_KEY}",
        serves=("words", "uniform", "normal", "rademacher"),
        cuda=True,
    ),
    "noisy_update": RawOp(
        "noisy_update",
        "Tensor(a!) out, Tensor? x, Tensor? direction, Tensor? drift_each, float drift, "
        f"Tensor? diffusion_each, float diffusion, {_KEY}",
        serves=("noisy_update", "langevin_step", "perturb"),
        cuda=True,
    ),
    "noise_reduce": RawOp(
        "denoising_loss",
        f"Tensor(a!) out, Tensor score, Tensor? sigma_each, float sigma, {_KEY}, int reduction",
        serves=("denoising_loss",),
        cuda=True,
    ),
    "normalise": RawOp(
        "normalise",
        "Tensor(a!)? y, Tensor(b!)? ty, Tensor(c!) stats, Tensor x, Tensor? t, Tensor coef, "
        f"Tensor? tcoef, Tensor? labels, {_NORM}",
        serves=("instance_norm_plus", "conditional_instance_norm_plus", "group_norm_modulate"),
        clusters=True,
    ),
    "normalise_backward": RawOp(
        "normalise",
        "Tensor(a!) gx, Tensor(b!)? gt, Tensor(c!) gcoef, Tensor(d!)? gtcoef, Tensor x, Tensor? t, "
        "Tensor stats, Tensor coef, Tensor? tcoef, Tensor? labels, Tensor? gy, Tensor? gty, "
        f"{_NORM}",
    ),
    "rademacher_project": RawOp(
        "rademacher_project",
        "Tensor(a!)? vjv, Tensor(b!)? vs, Tensor(c!)? ss, Tensor? js, Tensor? s, int projections, "
        f"{_KEY}",
        serves=("rademacher_jvp",),
    ),
    "rademacher_spread": RawOp(
        "rademacher_project",
        "Tensor(a!)? gjs, Tensor(b!)? gs, Tensor? g_vjv, Tensor? g_vs, Tensor? g_ss, Tensor? s, "
        f"int projections, {_KEY}",
    ),
    "activate_dual": RawOp(
        "activate",
        "Tensor(a!) out, Tensor s, Tensor? g, int activation",
        serves=("activate_dual",),
    ),
    "activate_jet": RawOp(
        "activate",
        "Tensor(a!) out, Tensor s, Tensor? g, int directions, int activation",
        serves=("activate_jet",),
    ),
}
