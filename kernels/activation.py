"""Activations f with f', f'' and f''' for Triton, numbered as in csrc/activation_cpu.h.

float32 uses the fits found there.
"""

import triton
import triton.language as tl

IDENTITY, ELU, SILU, RELU, GELU, SOFTPLUS, TANH, SIGMOID, GELU_TANH = (
    tl.constexpr(code) for code in range(9)
)


@triton.jit
def expm1_negative(x):
    """e^x - 1 for x <= 0, without cancellation near 0."""
    e = tl.exp(x)
    if x.dtype == tl.float64:
        p = tl.full(x.shape, 1.0, x.dtype)   # the series, to x^13 / 13!
        for k in tl.static_range(12):
            p = 1.0 + x * (1.0 / (13 - k)) * p
        return tl.where(x > -0.34657359, x * p, e - 1.0)
    else:
        p = 0.0013882521307095885 * x + 0.008366520516574383
        p = p * x + 0.04166720062494278
        p = p * x + 0.1666654348373413
        p = p * x + 0.4999999701976776
        return tl.where(x > -0.34657359, p * (x * x) + x, e - 1.0)


@triton.jit
def log1p_unit(e):
    """log(1 + e) for e in [0, 1]."""
    if e.dtype == tl.float64:
        w = 1.0 + e
        return tl.where(w == 1.0, e, tl.log(w) * e / tl.where(w == 1.0, 1.0, w - 1.0))
    else:
        f = tl.where(e > 0.333333343, e * 0.5 - 0.5, e)
        p = 0.14026358723640442 * f - 0.1538853943347931
        p = p * f + 0.13995806872844696
        p = p * f - 0.1641596108675003
        p = p * f + 0.20011168718338013
        p = p * f - 0.2500782012939453
        p = p * f + 0.33333197236061096
        p = p * f - 0.49999937415122986
        return tl.where(e > 0.333333343, 0.693147180559945, 0.0) + (p * (f * f) + f)


@triton.jit
def sigmoid(u):
    e = tl.exp(-tl.abs(u))
    return tl.where(u < 0, e, 1.0) / (1.0 + e)


@triton.jit
def hyperbolic_tangent(u):
    e = expm1_negative(tl.abs(u) * -2.0)
    t = -e / (e + 2.0)
    return tl.where(u < 0, -t, t)


@triton.jit
def gelu_tanh_parts(u):
    """(v, s, w): gelu's approximation by tanh is u s, s the sigmoid of z = A (v + B v³) and w its
    slope s (1 - s), which does not cancel.

    v is u held to ±30, beyond which s is 0 or 1.
    """
    ends = tl.full(u.shape, 30.0, u.dtype)
    v = tl.where(u > ends, ends, tl.where(u < -ends, -ends, u))   # NaN stays
    z = v * (v * v * 0.07135481627260025 + 1.5957691216057308)
    e = tl.exp(-tl.abs(z))
    r = 1.0 / (1.0 + e)
    return v, tl.where(z < 0, e * r, r), e * r * r


@triton.jit
def normal_density(u):
    return tl.exp(u * u * -0.5) * 0.39894228040143267794


@triton.jit
def normal_cdf(u):
    if u.dtype == tl.float64:
        return 0.5 + 0.5 * tl.erf(u * 0.70710678118654752440)
    else:
        t = 1.0 / (tl.abs(u) * 0.282842712474619 + 1.0)
        p = 0.024864966049790382 * t - 0.09025341272354126
        p = p * t + 0.08228977024555206
        p = p * t - 0.0005049587925896049
        p = p * t + 0.06933696568012238
        p = p * t + 0.08476314693689346
        p = p * t + 0.10382068157196045
        p = p * t + 0.11284539103507996
        p = p * t + 0.11283750087022781
        tail = tl.exp(u * u * -0.5) * p * t
        return tl.where(u < 0, tail, 1.0 - tail)


@triton.jit
def value(u, KIND: tl.constexpr):
    """f(u). What f, f' and f'' of one call share, the compiler computes once."""
    if KIND == ELU:
        return tl.where(u > 0, u, expm1_negative(tl.where(u > 0, 0.0, u)))   # NaN is not above 0
    elif KIND == SILU:
        return u * sigmoid(u)
    elif KIND == RELU:
        return tl.where(u < 0, 0.0, u)
    elif KIND == GELU:
        return u * normal_cdf(u)
    elif KIND == SOFTPLUS:
        return tl.where(u < 0, 0.0, u) + log1p_unit(tl.exp(-tl.abs(u)))
    elif KIND == TANH:
        return hyperbolic_tangent(u)
    elif KIND == SIGMOID:
        return sigmoid(u)
    elif KIND == GELU_TANH:
        v, s, w = gelu_tanh_parts(u)
        return u * s
    else:
        return u


@triton.jit
def slope(u, KIND: tl.constexpr):
    """f'(u)."""
    if KIND == ELU:
        return tl.exp(tl.where(u > 0, 0.0, u))
    elif KIND == SILU:
        s = sigmoid(u)
        return s * (u * (1.0 - s) + 1.0)
    elif KIND == RELU:
        return tl.where(u <= 0, 0.0, 1.0).to(u.dtype)   # PyTorch's mask: 1 for NaN
    elif KIND == GELU:
        return normal_cdf(u) + u * normal_density(u)
    elif KIND == SOFTPLUS:
        return sigmoid(u)
    elif KIND == TANH:
        t = hyperbolic_tangent(u)
        return 1.0 - t * t
    elif KIND == SIGMOID:
        s = sigmoid(u)
        return s * (1.0 - s)
    elif KIND == GELU_TANH:
        v, s, w = gelu_tanh_parts(u)
        return s + v * w * (v * v * 0.21406444881780073 + 1.5957691216057308)
    else:
        return tl.full(u.shape, 1.0, u.dtype)


@triton.jit
def times_slope(slope, g, KIND: tl.constexpr):
    """f' g. A mask, as of ReLU, takes nothing from what it hides, even if that is not finite."""
    if KIND == RELU:
        return tl.where(slope <= 0, 0.0, g)
    else:
        return slope * g


@triton.jit
def curvature(u, KIND: tl.constexpr):
    """f''(u) of those that bend."""
    if KIND == ELU:
        return tl.where(u >= 0, 0.0, tl.exp(tl.where(u > 0, 0.0, u)))   # PyTorch's at the jump
    elif KIND == SILU:
        s = sigmoid(u)
        return s * (1.0 - s) * (u * (1.0 - s - s) + 2.0)
    elif KIND == GELU:
        return normal_density(u) * (2.0 - u * u)
    elif KIND == TANH:
        t = hyperbolic_tangent(u)
        return -2.0 * t * (1.0 - t * t)
    elif KIND == SIGMOID:
        s = sigmoid(u)
        return s * (1.0 - s) * (1.0 - s - s)
    elif KIND == GELU_TANH:
        v, s, w = gelu_tanh_parts(u)
        z1 = v * v * 0.21406444881780073 + 1.5957691216057308
        return w * (2.0 * z1 + v * (v * 0.42812889763560147 + (1.0 - s - s) * z1 * z1))
    else:
        tl.static_assert(KIND == SOFTPLUS)
        s = sigmoid(u)
        return s * (1.0 - s)


@triton.jit
def third(u, KIND: tl.constexpr):
    """f'''(u) of those that bend."""
    if KIND == ELU:
        return curvature(u, KIND)
    elif KIND == SILU:
        s = sigmoid(u)
        return s * (1.0 - s) * (3.0 * (1.0 - s - s) + u * (1.0 - 6.0 * s * (1.0 - s)))
    elif KIND == GELU:
        return normal_density(u) * u * (u * u - 4.0)
    elif KIND == TANH:
        t = hyperbolic_tangent(u)
        return (1.0 - t * t) * (6.0 * t * t - 2.0)
    elif KIND == SIGMOID:
        s = sigmoid(u)
        return s * (1.0 - s) * (1.0 - 6.0 * s * (1.0 - s))
    elif KIND == GELU_TANH:
        v, s, w = gelu_tanh_parts(u)
        z1, z2 = v * v * 0.21406444881780073 + 1.5957691216057308, v * 0.42812889763560147
        odd = 1.0 - s - s
        inner = 0.42812889763560147 + 3.0 * odd * z1 * z2 + (1.0 - 6.0 * w) * z1 * z1 * z1
        return w * (3.0 * (z2 + odd * z1 * z1) + v * inner)
    else:
        tl.static_assert(KIND == SOFTPLUS)
        s = sigmoid(u)
        return s * (1.0 - s) * (1.0 - s - s)
