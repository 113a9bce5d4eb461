"""Every sampler's law on Gaussian data equals its closed form.

Seeds are fixed; 5 standard errors are a false alarm in 1.7e6 checks.
"""

import importlib
import math

import pytest
import torch

import fastscore
from fastscore import random, sampling, schedules

MU, S2 = 0.7, 0.04   # data N(μ, s²) in every dimension
SIGMAS = schedules.geometric(1.0, 0.1, 4)
CHAINS = {"reference": 2**16, "cpp": 2**20, "triton": 2**12}
SAMPLERS = (
    "annealed_langevin",
    "consistent_annealed",
    "predictor_corrector",
    "probability_flow",
    "langevin",
    "mala",
)


def score(x, sigma):
    return -(x - MU) / (S2 + sigma.reshape(-1, *[1] * (x.dim() - 1)) ** 2)


def gaussian_start(n, m, v, dtype=torch.float32):
    return m + math.sqrt(v) * random.normal((n, 1), seed=11, stream=1024, dtype=dtype)


def check_moments(x, m, v):
    """The kurtosis of what we test is at most a normal's, so 2 v²/n bounds the variance of the
    variance."""
    x = x.double()
    assert abs(float(x.mean()) - m) < 5 * math.sqrt(v / x.numel())
    assert abs(float(x.var()) - v) < 5 * v * math.sqrt(2 / x.numel())


def after(m, v, drift, noise, t):
    """Mean and variance after x + drift s(x) + noise z with the score -(x - μ)/t."""
    a = 1 - drift / t
    return MU + a * (m - MU), a * a * v + noise * noise


def pairs(sigmas):
    return list(zip(sigmas.tolist(), [*sigmas.tolist()[1:], 0.0]))


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_annealed_langevin_follows_its_recursion(backend, temperature):
    n, e = CHAINS[backend], 2e-3
    m, v = 0.5, 1 / 12
    levels = sampling.annealed_langevin(
        score,
        sampling.initial((n, 1), seed=1),
        sigmas=SIGMAS,
        steps_per_level=3,
        step_size=e,
        seed=1,
        temperature=temperature,
    )
    for state, (sigma, _) in zip(levels, [*pairs(SIGMAS), (0.1, 0)]):
        for _ in range(3 if state.sigma else 1):
            alpha = e * (sigma / 0.1) ** 2
            drift, noise = (
                (alpha / 2, math.sqrt(temperature * alpha)) if state.sigma else (sigma**2, 0.0)
            )
            m, v = after(m, v, drift, noise, S2 + sigma**2)
        check_moments(state.x, m, v)


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_langevin_reaches_its_stationary_variance(backend, temperature):
    """From T v/(1 - ε/(4v)), the law of the discrete chain, one step leads back to it.

    Three steps do, at three step sizes.
    """
    for e in (0.05, 0.5, 2.0):
        v = temperature / (1 - e / 4)
        *_, last = sampling.langevin(
            lambda x: MU - x,
            gaussian_start(CHAINS[backend], MU, v),
            steps=3,
            step_size=e,
            seed=2,
            temperature=temperature,
        )
        check_moments(last.x, MU, v)


def test_consistent_sampling_of_a_point_has_the_next_level_s_variance_exactly(backend):
    """Var = σ_{i+1}² after each level, for the smallest, the default and the largest step.

    Plain annealing is wrong by more than 10 %.
    """
    n, sigmas = CHAINS[backend], schedules.geometric(1.0, 0.2, 6)

    def point(x, sigma):
        return (MU - x) / sigma.reshape(-1, 1) ** 2

    for step_lr in (0.28 * 0.04, None, 1.7 * 0.04):   # η from 1 - γ = 0.275 to 1 + γ = 1.725
        start = gaussian_start(n, MU, 1.0)
        options = {"sigmas": sigmas, "step_lr": step_lr, "seed": 3, "denoise": False}
        for state in sampling.consistent_annealed(point, start, **options):
            if state.sigma:
                check_moments(state.x, MU, state.sigma**2)
    *_, last = sampling.consistent_annealed(point, start, sigmas=sigmas, seed=3)
    assert float((last.x - MU).abs().max()) < 1e-6  # the denoised sample is the point
    *_, last = sampling.annealed_langevin(
        point, start, sigmas=sigmas, steps_per_level=1, step_lr=0.28 * 0.04, seed=3, denoise=False
    )
    assert float(last.x.var()) > 1.1 * 0.04


def test_consistent_sampling_follows_its_recursion(backend):
    eta, temperature, m, v = 0.8, 0.5, 0.5, 1 / 12
    levels = sampling.consistent_annealed(
        score,
        sampling.initial((CHAINS[backend], 1), seed=1),
        sigmas=SIGMAS,
        step_lr=eta * 0.01,
        seed=4,
        temperature=temperature,
    )
    for state, (sigma, to) in zip(levels, pairs(SIGMAS)):
        drift = (eta if to else 1.0) * sigma**2
        noise = math.sqrt(temperature * (to**2 - ((1 - eta) * sigma) ** 2)) if to else 0.0
        m, v = after(m, v, drift, noise, S2 + sigma**2)
        check_moments(state.x, m, v)


@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral", "euler", "none"])
def test_predictor_and_annealed_corrector_follow_their_recursion(backend, predictor):
    m, v, r, temperature = 0.0, 1.0, 0.2, 0.7
    states = sampling.predictor_corrector(
        score,
        sampling.initial((CHAINS[backend], 1), law="gaussian", sigma=1.0, seed=5),
        sigmas=SIGMAS,
        predictor=predictor,
        corrector="annealed",
        corrector_steps=2,
        snr=r,
        temperature=temperature,
        seed=5,
    )
    for state, (sigma, to) in zip(states, pairs(SIGMAS)):
        t = S2 + sigma**2
        for _ in range(2):
            m, v = after(m, v, 2 * (r * sigma) ** 2, math.sqrt(temperature) * 2 * r * sigma, t)
        g = sigma**2 - to**2
        if not to:
            m, v = after(m, v, sigma**2, 0.0, t)
        elif predictor != "none":
            g = 2 * sigma**2 * math.log(sigma / to) if predictor == "euler" else g
            noise = math.sqrt(temperature * g) * (to / sigma if predictor == "ancestral" else 1)
            m, v = after(m, v, g, noise, t)
        check_moments(state.x, m, v)


@pytest.mark.filterwarnings("ignore:predictor_corrector")
@pytest.mark.parametrize("norms", ["sample", "batch", "dimension"])
def test_langevin_corrector_follows_its_recursion_in_high_dimension(norms):
    """ε = 4 (r ‖z‖/‖s‖)² tends to 4 r² t²/E‖s·t‖²/d.

    At d = 2^14 its spread, √(8/d), moves a sample's second moment by less than what sampling does,
    and its bias is of order 1/d = 6e-5. Standard errors come from the spread of 64 independent
    samples (t, 63 degrees of freedom: 6.5 standard errors are a false alarm in 1e8).
    """
    n, d, r = 64, 2**14, 0.4
    power = MU**2 + 1.0   # E x² per dimension around μ, of N(0, 1)
    x = sampling.initial((n, d), law="gaussian", sigma=1.0, seed=6)
    states = sampling.predictor_corrector(
        score,
        x,
        sigmas=SIGMAS,
        predictor="none",
        corrector="langevin",
        corrector_steps=2,
        snr=r,
        norms=norms,
        every_step=True,
        denoise=False,
        seed=6,
    )
    for state in states:
        t = S2 + float(SIGMAS[state.level]) ** 2
        e = 4 * r**2 * t**2 / power
        power = (1 - e / (2 * t)) ** 2 * power + e
        each = (state.x.double() - MU).square().mean(1)
        assert (
            abs(float(each.mean()) - power)
            < 6.5 * float(each.std()) / math.sqrt(n) + power * 20 / d
        )


@pytest.mark.filterwarnings("ignore:predictor_corrector")
def test_the_langevin_corrector_is_the_one_of_diffusers(monkeypatch):
    """Both loops on the same noise, with batch-mean norms.

    The scheduler's σ, its corrector, its predictor and its last mean.
    """
    from diffusers.schedulers import ScoreSdeVeScheduler, scheduling_sde_ve

    n, shape, seed = 6, (4, 3, 8, 8), 7
    noise = iter(
        random.normal(
            shape,
            seed=seed,
            step=step,
            stream=random.LANGEVIN if step % 3 == 2 else random.CORRECTOR,
            dtype=torch.float64,
        )
        for step in range(3 * n)
    )
    monkeypatch.setattr(scheduling_sde_ve, "randn_tensor", lambda *_, **__: next(noise))
    peer = ScoreSdeVeScheduler(num_train_timesteps=n, snr=0.16, sigma_min=0.1, sigma_max=5.0)
    peer.set_timesteps(n)
    peer.set_sigmas(n)
    start = x = sampling.initial(shape, law="gaussian", sigma=5.0, seed=seed, dtype=torch.float64)
    # Its predictor's; `sigmas` differ from them by the factor 50^1e-5
    sigmas = peer.discrete_sigmas.flip(0)
    for sigma, t in zip(sigmas, peer.timesteps):
        each = sigma * torch.ones(len(x), dtype=torch.float64)
        for _ in range(2):
            x = peer.step_correct(score(x, each), x).prev_sample
        x, mean = peer.step_pred(score(x, each), t, x, return_dict=False)
    ours = fastscore.sample(
        score,
        sampler="predictor_corrector",
        x=start,
        sigmas=sigmas,
        corrector="langevin",
        corrector_steps=2,
        norms="batch",
        snr=0.16,
        seed=seed,
    )
    assert float((ours - mean).abs().max()) < 1e-5   # the peer keeps σ in float32


def test_probability_flow_reaches_the_closed_form_at_its_order():
    """x ← μ + (x - μ) r. Halving the steps divides Heun's error by 4 and Euler's by 2.

    The adaptive method holds its tolerance.
    """
    x = gaussian_start(64, 0.0, 1.0, torch.float64)
    exact = MU + (x - MU) * math.sqrt((S2 + 0.1**2) / (S2 + 1.0))

    def error(method, n, **options):
        sigmas = schedules.geometric(1.0, 0.1, n + 1)
        y = fastscore.sample(
            score,
            sampler="probability_flow",
            x=x,
            sigmas=sigmas,
            method=method,
            denoise=False,
            **options,
        )
        return float((y - exact).abs().max())

    for method, order in (("euler", 1), ("heun", 2)):
        slope = math.log2(error(method, 64) / error(method, 128))
        assert abs(slope - order) < 0.1, (method, slope)
    assert error("adaptive", 2, rtol=1e-9, atol=1e-9) < 1e-7
    denoised = fastscore.sample(
        score,
        sampler="probability_flow",
        x=x,
        sigmas=[1.0, 0.1],
        method="adaptive",
        rtol=1e-9,
        atol=1e-9,
    )
    assert float((denoised - (MU + (exact - MU) * S2 / (S2 + 0.01))).abs().max()) < 1e-7


def test_the_adaptive_flow_asks_for_no_noise_outside_the_ladder():
    """The first guess of the solver's step reaches from 10 far beyond 0.01."""
    seen = []

    def watched(x, sigma):
        seen.extend((float(sigma.min()), float(sigma.max())))
        return score(x, sigma)

    fastscore.sample(
        watched,
        sampler="probability_flow",
        x=10 * torch.ones(4, 1),
        sigmas=[10.0, 0.01],
        method="adaptive",
    )
    assert 0.01 <= min(seen) * (1 + 1e-6) and max(seen) <= 10 * (1 + 1e-6)


def log_prob(x):
    return -0.5 * (x - MU).square().sum(1)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_mala_keeps_the_target_where_unadjusted_steps_do_not(backend, temperature):
    """ε = 1.5 on N(μ, T).

    Unadjusted steps end at T/(1 - 3/8) of the variance, adjusted ones stay at T in every moment.
    """
    n = CHAINS[backend] // 4
    start = gaussian_start(n, MU, temperature)
    options = {"steps": 4, "step_size": 1.5, "seed": 8, "temperature": temperature}
    *_, last = sampling.mala(log_prob, start, diagnostics=True, **options)
    check_moments(last.x, MU, temperature)
    rate = float(last.diagnostics["accepted"].mean())
    assert 0.5 < rate < 0.99
    # E[accepted] = E[acceptance], and |accepted - acceptance| <= 1
    assert abs(rate - float(last.diagnostics["acceptance"].mean())) < 5 * 0.5 / math.sqrt(n)
    *_, unadjusted = sampling.langevin(lambda x: MU - x, start, **options)
    assert float(unadjusted.x.var()) > 1.3 * temperature


def test_mala_finds_a_target_that_is_not_gaussian():
    """p ∝ exp(-x⁴/4): E x² = 2 Γ(3/4)/Γ(1/4), E x⁴ = 1; 300 steps of 0.8 from [0, 1].

    (From far out in such tails no step is accepted.)
    """
    n = 2**15
    *_, last = sampling.mala(
        lambda x: -0.25 * x.pow(4).sum(1),
        sampling.initial((n, 1), seed=9),
        steps=300,
        step_size=0.8,
        seed=9,
    )
    x = last.x.double()
    for power, expected in ((2, 2 * math.gamma(0.75) / math.gamma(0.25)), (4, 1.0)):
        moment = x.pow(power)
        assert abs(float(moment.mean()) - expected) < 5 * float(moment.std()) / math.sqrt(n)


def test_a_burn_in_brings_the_steps_of_mala_to_far_and_near_chains():
    """p ∝ exp(-x⁴/4) from N(0, 9) with ε = 2, where many chains never move.

    Then every ε is fixed, and the run goes on bit for bit.
    """
    def f(x):
        return -0.25 * x.pow(4).sum(1)

    n = 2**13
    x = 3 * random.normal((n, 1), seed=9, stream=1024)
    options = {"steps": 260, "step_size": 2.0, "seed": 9, "diagnostics": True}
    with pytest.warns(UserWarning, match="never moved"):
        *_, stuck = sampling.mala(f, x, **options)
    assert float(stuck.x.double().square().mean()) > 1.5
    states = list(sampling.mala(f, x, burn_in=160, **options))
    moment = states[-1].x.double().square()
    truth = 2 * math.gamma(0.75) / math.gamma(0.25)
    assert abs(float(moment.mean()) - truth) < 5 * float(moment.std()) / math.sqrt(n)
    after = torch.stack([state.diagnostics["acceptance"] for state in states[160:]]).mean()
    assert abs(float(after) - 0.574) < 0.1
    e = states[159].diagnostics["step_size"]
    assert e.shape == (n,) and all(
        torch.equal(state.diagnostics["step_size"], e) for state in states[159:]
    )
    options["step_size"] = e
    *_, resumed = sampling.mala(f, states[159].x, start=160, **options)
    assert torch.equal(resumed.x, states[-1].x)
    with pytest.raises(
        ValueError, match="mala: burn_in is for the beginning of a run; got start=160"
    ):
        sampling.mala(f, x, start=160, burn_in=10, **options)


def test_mala_is_reversible_to_the_last_digit():
    """log α(x → y) = -log α(y → x), and equals the ratio of p(y) q(x given y) to p(x) q(y given
    x) written out in float64."""
    module = importlib.import_module("fastscore.sampling.mala")

    def f(x):
        return -0.25 * x.pow(4).sum(1) + x.sin().sum(1)

    x, y = (random.normal((32, 3), seed=s, stream=1024, dtype=torch.float64) for s in (1, 2))
    e, temperature = 0.3, 0.7
    run = module.begin(
        "mala",
        f,
        x,
        temperature=temperature,
        project=None,
        diagnostics=False,
        seed=0,
        first_sample=0,
    )
    (fx, sx), (fy, sy) = (module._value_and_score(run, t) for t in (x, y))
    forth, back = (
        module._log_ratio(run, x, fx, sx, y, fy, sy, e / 2),
        module._log_ratio(run, y, fy, sy, x, fx, sx, e / 2),
    )

    def q(to, at, s):
        return -(to - at - e / 2 * s).square().sum(1) / (2 * temperature * e)

    expected = (fy - fx) / temperature + q(x, y, sy) - q(y, x, sx)
    assert torch.allclose(forth, expected, rtol=1e-11, atol=1e-11) and torch.allclose(
        forth, -back, rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("d", [1, 4, 64])
def test_the_default_corrector_has_its_law_in_every_dimension(d):
    """20 corrections of N(0, 1.25 I) at σ = 0.5 and of the data N(0, I) there.

    V ← (1 - ε/(2t))² V + ε, t = 1.25, ε = 4 (0.16 σ)².
    """
    n, t, e = 2**16 // d, 1.25, 4 * (0.16 * 0.5) ** 2
    x = math.sqrt(t) * random.normal((n, d), seed=12, stream=1024)
    options = {
        "sampler": "predictor_corrector",
        "sigmas": [0.5],
        "predictor": "none",
        "denoise": False,
        "corrector_steps": 20,
        "seed": 13,
    }

    def normal(x, sigma):
        return -x / (1 + sigma[:, None] ** 2)

    y = fastscore.sample(normal, x=x, **options)
    v = t
    for _ in range(20):
        v = (1 - e / (2 * t)) ** 2 * v + e
    assert abs(float(y.double().square().mean()) - v) < 5 * v * math.sqrt(2 / y.numel())
    # Batch mates have no say.
    assert torch.equal(y[:3], fastscore.sample(normal, x=x[:3], **options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        *({"corrector": "langevin", "norms": norms} for norms in ("sample", "batch", "dimension")),
    ],
)
@pytest.mark.filterwarnings("ignore:predictor_corrector")
def test_a_zero_score_is_no_error(options):
    """Where there is no norm to divide by, the step is the annealed corrector's.

    Noise of variance ε = 4 (r σ)².
    """
    x = torch.zeros(2**12, 4)
    y = fastscore.sample(
        lambda x, sigma: 0 * x,
        sampler="predictor_corrector",
        x=x,
        sigmas=[2.0],
        predictor="none",
        denoise=False,
        seed=14,
        **options,
    )
    check_moments(y, 0.0, 4 * (0.16 * 2.0) ** 2)


def test_the_rules_of_norms_are_named_and_warned_about():
    def run(**options):
        return sampling.predictor_corrector(
            score, torch.zeros(2, 3), sigmas=SIGMAS, seed=0, **options
        )

    for norms, told in (
        ("sample", "few dimensions"),
        ("dimension", "few dimensions"),
        ("batch", "others of its batch"),
        (None, "few"),
    ):
        with pytest.warns(UserWarning, match=f"predictor_corrector: .*{told}"):
            run(corrector="langevin", norms=norms)
    for corrector in ("annealed", "none"):
        with pytest.raises(
            ValueError,
            match="predictor_corrector: norms are for corrector='langevin'; "
                  f"got corrector='{corrector}'",
        ):
            run(corrector=corrector, norms="batch")
