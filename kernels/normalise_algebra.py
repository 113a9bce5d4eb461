"""The normalisations' algebra between channels, as in struct Algebra of csrc/normalise.cpp, from
sums over pixels to coefficients.

A tile is ROWS x D channels whose statistics meet: groups of channels (GROUPED), or all channels of
a sample, which then meet only in the channel term (ALPHA). Tables are (rows, B C): mean, scale,
shift, then P, Q per tangent; for the gradient c4, c5, then c3, d3.
"""

import triton
import triton.language as tl

from fastscore.kernels.philox import int64


@triton.jit
def place(rows, groups, domain, ROWS: tl.constexpr, D: tl.constexpr):
    """(sample, channel, unit, mask) of this program's channels.

    A row is one of the groups of a sample.
    """
    r = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    j = tl.arange(0, D)[None, :]
    return r // groups, r % groups * domain + j, r * domain + j, (r < rows) & (j < domain)


@triton.jit
def coefficient_row(labels_ptr, sample, B, coef_rows, ONE: tl.constexpr, HAS_LABELS: tl.constexpr):
    """(row, it exists): a kernel cannot raise for a label outside the table, and must not read
    there."""
    if HAS_LABELS:
        label = tl.load(labels_ptr + sample, mask=sample < B, other=0)
        exists = (label >= 0) & (label < coef_rows)
        return tl.where(exists, label, 0), exists
    elif ONE:
        return sample * 0, sample >= 0
    else:
        return sample, sample >= 0


@triton.jit
def reciprocal(n, dtype: tl.constexpr):
    """Once: a division in float64 is a call, around which registers go to local memory."""
    return 1.0 / int64(n).to(dtype)


@triton.jit
def mean_over(v, mask, share):
    """Over a row of the tile, of whose channels each has a share 1/n.

    With its rounding error put right.
    """
    mean = tl.sum(tl.where(mask, v, 0.0), 1)[:, None] * share
    return mean + tl.sum(tl.where(mask, v - mean, 0.0), 1)[:, None] * share


@triton.jit
def statistics(
    stats_ptr,
    unit,
    mask,
    share,
    unbiased,
    EPS: tl.constexpr,
    GROUPED: tl.constexpr,
    ALPHA: tl.constexpr,
):
    """The channels' means, and `between_channels` of them."""
    mean = tl.load(stats_ptr + 2 * unit, mask=mask, other=0.0)
    variance = tl.load(stats_ptr + 2 * unit + 1, mask=mask, other=0.0)
    r, offset, hat, q = between_channels(mean, variance, mask, share, unbiased, EPS, GROUPED, ALPHA)
    return mean, r, offset, hat, q


@triton.jit
def between_channels(
    mean,
    variance,
    mask,
    share,
    unbiased,
    EPS: tl.constexpr,
    GROUPED: tl.constexpr,
    ALPHA: tl.constexpr,
):
    """(1/std, h at a channel's mean, m_hat, its 1/std) from mean and variance of each channel."""
    offset, hat, q = tl.zeros_like(mean), tl.zeros_like(mean), tl.zeros_like(mean)
    if GROUPED:
        deviation = mean - mean_over(mean, mask, share)
        r = tl.rsqrt(
            mean_over(variance + deviation * deviation, mask, share) + EPS
        ) + tl.zeros_like(mean)
        offset = r * deviation
    else:
        r = tl.rsqrt(variance + EPS)
    if ALPHA:
        deviation = mean - mean_over(mean, mask, share)
        q = tl.rsqrt(mean_over(deviation * deviation, mask, share) * unbiased + EPS)
        hat = deviation * q
    return r, offset, hat, q


@triton.jit
def affine(
    coef_ptr, labels_ptr, sample, c, mask, B, C, coef_rows, offset, hat,
    ALPHA: tl.constexpr, BETA: tl.constexpr, HAS_LABELS: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """(where the coefficients lie, gamma, alpha, shift, a zero) with u = gamma h + shift of a
    centred pixel.

    The zero is NaN where a coefficient is not finite: such a channel is NaN, whatever order things
    are multiplied in.
    """
    K: tl.constexpr = 1 + ALPHA + BETA
    table_row, exists = coefficient_row(labels_ptr, sample, B, coef_rows, ONE, HAS_LABELS)
    at = table_row * K * C + c
    gamma = tl.where(exists, tl.load(coef_ptr + at, mask=mask, other=0.0), float("nan"))
    alpha, shift, nothing = tl.zeros_like(gamma), offset, gamma * 0.0
    if ALPHA:
        alpha = tl.load(coef_ptr + at + C, mask=mask, other=0.0)
        shift += alpha * hat
        nothing += alpha * 0.0
    shift *= gamma
    if BETA:
        beta = tl.load(coef_ptr + at + (K - 1) * C, mask=mask, other=0.0)
        shift += beta
        nothing += beta * 0.0
    return at, gamma, alpha, shift, nothing


@triton.jit
def bessel(n, dtype: tl.constexpr):
    """n / (n - 1), of an unbiased variance; 1 for one channel."""
    return int64(n).to(dtype) * reciprocal(tl.maximum(int64(n) - 1, 1), dtype)


@triton.jit
def through_channels(a, hat, q, mask, share, unbiased):
    """Transpose of the channels' normalisation: q (a - mean a) - q m_hat sum(a m_hat) / (C - 1)."""
    inner = mean_over(a * hat, mask, share) * unbiased
    return q * (a - mean_over(a, mask, share)) - q * hat * inner


@triton.jit
def tangent_terms(
    stats_ptr,
    m,
    units,
    unit,
    mask,
    r,
    offset,
    hat,
    q,
    share,
    unbiased,
    GROUPED: tl.constexpr,
    ALPHA: tl.constexpr,
):
    """(tau = mean of t over pixels, over the domain: mean t and mean t h, tangent of m_hat).

    A direction that is not finite makes all that it reaches NaN, as coefficients do.
    """
    at = ((1 + m) * int64(units) + unit) * 2
    tau = tl.load(stats_ptr + at, mask=mask, other=0.0)
    pool, inner, hat_dot = (
        tau,
        r * tl.load(stats_ptr + at + 1, mask=mask, other=0.0) + offset * tau,
        tl.zeros_like(tau),
    )
    if GROUPED:
        pool, inner = (
            mean_over(pool, mask, share) + hat_dot,
            mean_over(inner, mask, share) + hat_dot,
        )
    nothing = pool * 0.0 + inner * 0.0
    if ALPHA:
        hat_dot = (
            through_channels(tau, hat, q, mask, share, unbiased) + mean_over(tau, mask, share) * 0.0
        )
    return tau, pool + nothing, inner + nothing, hat_dot


@triton.jit
def coefficients_kernel(
    table_ptr,
    stats_ptr,
    coef_ptr,
    tcoef_ptr,
    labels_ptr,
    B,
    C,
    groups,
    domain,
    coef_rows,
    M: tl.constexpr,
    EPS: tl.constexpr,
    GROUPED: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    ONE: tl.constexpr,
    HAS_TCOEF: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
):
    """Moments to u = scale (x - mean) + shift and du = scale t + P (x - mean) + Q."""
    sample, c, unit, mask = place(int64(B) * groups, groups, domain, ROWS, D)
    units, K = int64(B) * C, 1 + ALPHA + BETA
    share, unbiased = (
        reciprocal(domain, stats_ptr.dtype.element_ty),
        bessel(domain, stats_ptr.dtype.element_ty),
    )
    mean, r, offset, hat, q = statistics(
        stats_ptr, unit, mask, share, unbiased, EPS, GROUPED, ALPHA
    )
    at, gamma, alpha, shift, nothing = affine(
        coef_ptr, labels_ptr, sample, c, mask, B, C, coef_rows, offset, hat, ALPHA, BETA,
        HAS_LABELS, ONE,
    )
    tl.store(table_ptr + unit, mean, mask=mask)
    tl.store(table_ptr + units + unit, gamma * r + nothing, mask=mask)
    tl.store(table_ptr + 2 * units + unit, shift + nothing, mask=mask)
    if M > 0:
        for m in range(M):
            _, pool, inner, hat_dot = tangent_terms(
                stats_ptr, m, units, unit, mask, r, offset, hat, q, share, unbiased, GROUPED, ALPHA
            )
            w = -gamma * r * inner
            Q = -gamma * r * pool
            if ALPHA:
                Q += gamma * alpha * hat_dot
            if HAS_TCOEF:
                there = m * int64(coef_rows) * K * C + at
                dgamma = tl.load(tcoef_ptr + there, mask=mask, other=0.0)
                w += dgamma
                if ALPHA:
                    Q += (
                        dgamma * alpha
                        + gamma * tl.load(tcoef_ptr + there + C, mask=mask, other=0.0)
                    ) * hat
                if BETA:
                    Q += tl.load(tcoef_ptr + there + (K - 1) * C, mask=mask, other=0.0)
            tl.store(table_ptr + (3 + 2 * m) * units + unit, r * w, mask=mask)
            tl.store(table_ptr + (4 + 2 * m) * units + unit, Q + offset * w, mask=mask)


@triton.jit
def cotangents_kernel(
    gtable_ptr,
    gcoef_ptr,
    gtcoef_ptr,
    sums_ptr,
    stats_ptr,
    coef_ptr,
    tcoef_ptr,
    labels_ptr,
    B,
    C,
    S,
    groups,
    domain,
    coef_rows,
    M: tl.constexpr,
    EPS: tl.constexpr,
    GROUPED: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    ONE: tl.constexpr,
    HAS_TCOEF: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
):
    """Sums of the cotangents to gradients of the coefficients (per sample) and to the
    coefficients of gx and gt."""
    sample, c, unit, mask = place(int64(B) * groups, groups, domain, ROWS, D)
    units, K = int64(B) * C, 1 + ALPHA + BETA
    share, unbiased = (
        reciprocal(domain, stats_ptr.dtype.element_ty),
        bessel(domain, stats_ptr.dtype.element_ty),
    )
    mean, r, offset, hat, q = statistics(
        stats_ptr, unit, mask, share, unbiased, EPS, GROUPED, ALPHA
    )
    table_row, exists = coefficient_row(labels_ptr, sample, B, coef_rows, ONE, HAS_LABELS)
    at, to = table_row * K * C + c, sample * K * C + c
    gamma = tl.where(exists, tl.load(coef_ptr + at, mask=mask, other=0.0), float("nan"))
    per_pixel = reciprocal(S, gamma.dtype)
    G = tl.load(sums_ptr + unit, mask=mask, other=0.0)
    Gh = r * tl.load(sums_ptr + units + unit, mask=mask, other=0.0) + offset * G
    ggamma = Gh
    first, second = (
        pooled(gamma * G, mask, share, GROUPED) * per_pixel,
        pooled(gamma * Gh, mask, share, GROUPED) * per_pixel,
    )
    if ALPHA:
        alpha = tl.load(coef_ptr + at + C, mask=mask, other=0.0)
        ggamma += alpha * hat * G
        # between: sum of a m_dot.
        galpha, ghat, between = gamma * hat * G, alpha * gamma * G, tl.zeros_like(gamma)
    if BETA:
        tl.store(gcoef_ptr + to + (K - 1) * C, G, mask=mask)
    if M > 0:
        for m in range(M):
            tau, pool, inner, hat_dot = tangent_terms(
                stats_ptr, m, units, unit, mask, r, offset, hat, q, share, unbiased, GROUPED, ALPHA
            )
            sums = sums_ptr + (2 + 3 * m) * units + unit
            G = tl.load(sums, mask=mask, other=0.0)
            Gh = r * tl.load(sums + units, mask=mask, other=0.0) + offset * G
            # Sum g h_dot.
            Ghdot = r * (tl.load(sums + 2 * units, mask=mask, other=0.0) - pool * G - inner * Gh)
            there, out = m * int64(coef_rows) * K * C + at, m * units * K + to
            w = -gamma * r * inner
            if HAS_TCOEF:
                dgamma = tl.load(tcoef_ptr + there, mask=mask, other=0.0)
                w += dgamma
            A, Bh = (
                pooled(gamma * G, mask, share, GROUPED) * per_pixel,
                pooled(gamma * Gh, mask, share, GROUPED) * per_pixel,
            )
            first += pooled(w * G, mask, share, GROUPED) * per_pixel - r * Bh * pool
            second += (
                pooled(w * Gh + gamma * Ghdot, mask, share, GROUPED) * per_pixel - r * Bh * inner
            )
            ggamma += Ghdot
            gtgamma, d3 = Gh, -r * (offset * Bh + A)
            if ALPHA:
                ggamma += alpha * hat_dot * G
                gtgamma += alpha * hat * G
                galpha += gamma * hat_dot * G
                tl.store(gtcoef_ptr + out + C, gamma * hat * G, mask=mask)
                a = gamma * alpha * G   # cotangent of m_dot
                s = mean_over(hat * tau, mask, share) * unbiased
                along = mean_over(hat * a, mask, share) * unbiased
                between += mean_over(a * hat_dot, mask, share) * unbiased
                ghat -= q * (s * a + along * tau)
                if HAS_TCOEF:
                    dalpha = tl.load(tcoef_ptr + there + C, mask=mask, other=0.0)
                    ggamma += dalpha * hat * G
                    galpha += dgamma * hat * G
                    ghat += (dgamma * alpha + gamma * dalpha) * G
                d3 += through_channels(a, hat, q, mask, share, unbiased) * per_pixel
            if BETA:
                tl.store(gtcoef_ptr + out + (K - 1) * C, G, mask=mask)
            tl.store(gtcoef_ptr + out, gtgamma, mask=mask)
            tl.store(gtable_ptr + (2 + 2 * m) * units + unit, -r * r * Bh, mask=mask)
            tl.store(gtable_ptr + (3 + 2 * m) * units + unit, d3, mask=mask)
    c5 = -r * (offset * second + first)
    if ALPHA:
        c5 += (
            through_channels(ghat, hat, q, mask, share, unbiased) - q * hat * between
        ) * per_pixel
        tl.store(gcoef_ptr + to + C, galpha, mask=mask)
    tl.store(gcoef_ptr + to, ggamma, mask=mask)
    tl.store(gtable_ptr + unit, -r * r * second, mask=mask)
    tl.store(gtable_ptr + units + unit, c5, mask=mask)


@triton.jit
def pooled(v, mask, share, GROUPED: tl.constexpr):
    """Mean over the channels that share statistics."""
    if GROUPED:
        return mean_over(v, mask, share) + tl.zeros_like(v)
    else:
        return v
