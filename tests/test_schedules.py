"""Noise ladders, NCSNv2's techniques 1, 2 and 4, recipes, and the conventions of others."""

import math
from functools import partial

import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.spatial.distance import pdist
from scipy.stats import norm

import fastscore
from fastscore import datasets, random, schedules
from fastscore.cli import recipe
from fastscore.schedules.ladders import check_ladder

# D, σ_max, L, T, network calls, η = step_lr of technique 4 as the official configurations print it;
# σ_min is 0.01 in all.
OFFICIAL = [
    pytest.param(3072, 50, 232, 5, 1161, 6.2e-6, id="cifar10"),
    pytest.param(12288, 90, 500, 5, 2501, 3.3e-6, id="celeba"),
    # Its step_lr, 4.9e-6, is not the minimiser.
    pytest.param(27648, 140, 788, 4, 3153, None, id="church"),
    pytest.param(49152, 190, 1086, 3, 3259, 1.8e-6, id="bedroom"),
    pytest.param(196608, 348, 2311, 3, 6934, 0.9e-6, id="ffhq"),
]


# Technique 1


SIZES = [(2, 1, None), (97, 5, 16), (300, 40, 300), (130, 3072, None), (64, 3, 64)]


@pytest.mark.parametrize(("n", "d", "chunk"), SIZES, ids="pair ragged one-tile wide even".split())
def test_max_pairwise_distance_is_that_of_fp64_brute_force(n, d, chunk):
    # The mean is 1000 times the spread: uncentred Gram matrices cancel.
    data = random.normal((n, d), seed=n, stream=1024) + 1000
    found = schedules.max_pairwise_distance(data, chunk=chunk)
    # Brute force rounds each difference's square and their sum: d 2^-53 relative; ours may miss the
    # maximum by (d + 4) 2^-51.
    assert abs(found / pdist(data.double().numpy()).max() - 1) <= (d + 4) * 2**-50


def test_max_pairwise_distance_survives_what_a_float32_gram_matrix_does_not():
    data = random.normal((50, 8), seed=1, stream=1024) * 1e-3 + 10
    exact = pdist(data.double().numpy()).max()
    assert abs(schedules.max_pairwise_distance(data) / exact - 1) < 1e-13
    gram = data.square().sum(1)
    naive = (gram[:, None] + gram - 2 * data @ data.T).clamp(min=0).max().sqrt().item()
    assert abs(naive / exact - 1) > 1e-3, "the trap that this test guards against is gone"


def test_max_pairwise_distance_is_centred_so_that_float64_far_from_0_keeps_its_digits():
    # ‖a‖² is 8e16, its rounding 8, distances² 1e-4
    data = 1e8 + 1e-3 * random.normal((50, 8), seed=1, stream=1024, dtype=torch.float64)
    assert (
        abs(schedules.max_pairwise_distance(data, chunk=16) / pdist(data.numpy()).max() - 1) < 1e-13
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_max_pairwise_distance_of_images_in_any_dtype(dtype):
    data = random.uniform((20, 3, 4, 4), seed=2, stream=1024, dtype=dtype)
    assert schedules.max_pairwise_distance(data) == pytest.approx(
        pdist(data.double().flatten(1).numpy()).max(), rel=1e-13
    )


def test_distances_of_equal_samples_are_zero():
    assert schedules.max_pairwise_distance(torch.full((5, 3), 0.1)) == 0.0
    assert schedules.distance_bounds(torch.full((5, 3), 0.1), seed=0).lower == 0.0


@pytest.mark.parametrize("samples", [2, 64, 10_000])
def test_bounds_enclose_the_exact_distance_within_a_factor_of_two(samples):
    images, _ = datasets.load("digits")
    exact = schedules.max_pairwise_distance(images)
    bounds = schedules.distance_bounds(images, samples=samples, seed=3)
    assert bounds.lower <= exact * (1 + 1e-12) and exact <= bounds.upper * (1 + 1e-12)
    assert bounds.upper <= 2 * bounds.lower * (1 + 1e-12)
    if samples > len(images):
        assert bounds.lower == exact


def test_bounds_are_those_of_two_points_and_of_a_regular_simplex():
    two = schedules.distance_bounds(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), seed=0)
    assert two.lower == pytest.approx(5, abs=1e-12) and two.upper == pytest.approx(5, abs=1e-12)
    # All distances √2, all radii √(1 - 1/50).
    simplex = schedules.distance_bounds(torch.eye(50), seed=0)
    assert simplex == pytest.approx((math.sqrt(2), 2 * math.sqrt(0.98)), abs=1e-12)


def test_bounds_depend_on_the_seed_alone():
    data = random.normal((500, 6), seed=4, stream=1024)
    first = schedules.distance_bounds(data, samples=5, seed=1)
    torch.manual_seed(9)
    assert schedules.distance_bounds(data, samples=5, seed=1) == first


# Technique 2


PAPER = [
    (3072, 50, 219),
    (12288, 90, 472),
    (27648, 140, 745),
    (49152, 190, 1026),
    (196608, 348, 2182),
]


@pytest.mark.parametrize(("dim", "sigma_max", "levels"), PAPER)
def test_number_of_levels_of_the_paper(dim, sigma_max, levels):
    assert schedules.number_of_levels(dim, sigma_max, 0.01) == levels


@pytest.mark.parametrize(("dim", "sigma_max", "levels", "T", "calls", "step_lr"), OFFICIAL)
def test_official_ladders_have_overlap_0_567(dim, sigma_max, levels, T, calls, step_lr):
    # To the last level: 0.567 has three digits, and a level more or less moves it by 0.0005 to
    # 0.005.
    assert abs(schedules.number_of_levels(dim, sigma_max, 0.01, overlap=0.567) - levels) <= 1
    assert round(schedules.level_overlap(dim, (sigma_max / 0.01) ** (1 / (levels - 1))), 3) in (
        0.566,
        0.567,
    )


def test_level_overlap_is_the_difference_of_two_normal_probabilities():
    for dim, gamma in ((5, 2.0), (64, 1.3), (3072, 1.03756), (3072, 1.3), (10**6, 1.001)):
        shift = math.sqrt(2 * dim) * (gamma - 1)
        expected = norm.sf(shift - 3 * gamma) - norm.sf(shift + 3 * gamma)
        assert schedules.level_overlap(dim, gamma) == pytest.approx(expected, rel=1e-12)


def test_more_overlap_takes_more_levels():
    counts = [
        schedules.number_of_levels(64, 5.0, 0.01, overlap=o)
        for o in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
    ]
    assert counts == sorted(set(counts))


# Technique 4


@pytest.mark.parametrize(("dim", "sigma_max", "levels", "T", "calls", "step_lr"), OFFICIAL)
def test_technique_4_gives_the_official_step_sizes(dim, sigma_max, levels, T, calls, step_lr):
    epsilon = schedules.technique4_step_size(schedules.geometric(sigma_max, 0.01, levels), T)
    if step_lr is not None:
        assert round(schedules.lr_from_step_size(epsilon), 7) == step_lr
    else:
        assert round(schedules.lr_from_step_size(epsilon), 8) == 2.31e-6


@pytest.mark.parametrize(
    ("levels", "sigma_max", "T", "step_lr", "ratio"),
    [
        (232, 50, 5, 6.2e-6, 1.0555),
        (500, 90, 5, 3.3e-6, 1.0314),
        (788, 140, 4, 4.9e-6, 1.0247),
        (1086, 190, 3, 1.8e-6, 1.0174),
        (2311, 348, 3, 0.9e-6, 1.0089),
        (10, 1, 100, 2e-5, 1.1111),
    ],
    ids="cifar10 celeba church bedroom ffhq ncsn".split(),
)
def test_variance_ratio_of_the_official_configurations(levels, sigma_max, T, step_lr, ratio):
    assert (
        round(
            schedules.variance_ratio(
                (sigma_max / 0.01) ** (1 / (levels - 1)), T, step_lr / 0.01**2
            ),
            4,
        )
        == ratio
    )


@pytest.mark.parametrize("gamma", [1.0001, 1.04, 1.7, 10.0])
def test_technique_4_is_closed_form_for_one_step_and_a_minimum_for_more(gamma):
    ladder = torch.tensor([gamma**3, gamma**2, gamma, 1.0], dtype=torch.float64)
    true_gamma = ladder.float().double()[0].item() ** (1 / 3)  # the ladder is float32
    assert schedules.technique4_step_size(ladder, 1) == pytest.approx(
        2 * (1 - true_gamma**-2), rel=1e-9
    )
    for T in (2, 5, 100):
        eta = schedules.technique4_step_size(ladder, T) / 2
        ratio = partial(schedules.variance_ratio, true_gamma, T)
        found = minimize_scalar(
            lambda u, ratio=ratio: ratio(math.exp(u)),
            bounds=(-25, -1e-9),
            method="bounded",
            options={"xatol": 1e-10},
        )
        assert schedules.variance_ratio(true_gamma, T, eta) <= found.fun * (1 + 1e-14)
        assert 1 < schedules.variance_ratio(true_gamma, T, eta) < true_gamma**2
        # The bounded search finds a minimum to the root of its rounding.
        assert eta == pytest.approx(math.exp(found.x), rel=1e-4)


def test_variance_ratio_is_the_recursion_of_the_paper():
    for gamma, T, eta in ((1.04, 5, 0.062), (1.668, 100, 0.2), (3.0, 1, 0.9)):
        variance, k = gamma**2, 2 * eta / (1 - (1 - eta) ** 2)
        for _ in range(T):
            variance = (1 - eta) ** 2 * variance + 2 * eta
        assert schedules.variance_ratio(gamma, T, eta) == pytest.approx(variance, rel=1e-13)
        assert schedules.variance_ratio(gamma, T, eta) == pytest.approx(
            (1 - eta) ** (2 * T) * (gamma**2 - k) + k, rel=1e-12
        )


def test_sampler_has_the_predicted_variance_at_every_level():
    """A point mass at 0 with its exact score, started at N(0, σ_1²).

    Seed 5, 40,000 values, false alarm 1e-6 for the 6 levels together.
    """
    n, sigmas, T, epsilon = 40_000, schedules.geometric(2.0, 0.1, 6), 3, 4e-3
    x = 2.0 * random.normal((n, 1), seed=5, stream=1024)
    levels = fastscore.sampling.annealed_langevin(
        lambda x, sigma: -x / sigma[:, None] ** 2,
        x,
        sigmas=sigmas,
        steps_per_level=T,
        step_size=epsilon,
        denoise=False,
        seed=5,
    )
    predicted = schedules.variance_ratios(sigmas, T, epsilon)
    bound = norm.isf(1e-6 / 12) * math.sqrt(2 / n)   # a mean of n squares of normals
    for level, ratio in zip(levels, predicted.tolist()):
        assert abs(level.x.square().mean().item() / level.sigma**2 / ratio - 1) < bound
    assert max(predicted[1:] / predicted[:-1]) > 1 + bound, "the levels are told apart"


def test_variance_ratios_take_any_ladder():
    ladder = [4.0, 1.0, 0.8]
    v, expected = 1.0, []
    for gamma in (1.0, 4.0, 1.25):
        v = schedules.variance_ratio(gamma, 2, 0.3, start=v)
        expected.append(v)
    found = schedules.variance_ratios(ladder, 2, 2 * 0.3 * 0.8**2)
    # The ladder is float32
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6)


# Recipes


@pytest.mark.parametrize(("dim", "sigma_max", "levels", "T", "calls", "step_lr"), OFFICIAL)
def test_recipe_finds_the_official_configurations_from_their_budgets(
    dim, sigma_max, levels, T, calls, step_lr
):
    plan = schedules.recipe(torch.zeros(2, dim), calls, sigma_max=sigma_max)
    assert (len(plan.sigmas), plan.steps_per_level, plan.calls) == (levels, T, calls)
    assert round(plan.overlap, 3) in (0.566, 0.567)


@pytest.mark.parametrize("budget", [3, 4, 20, 22, 23, 100, 1000, 1001])
@pytest.mark.parametrize("denoise", [True, False])
def test_recipe_keeps_its_budget_and_uses_all_but_less_than_one_step_per_level(budget, denoise):
    images, _ = datasets.load("digits")
    plan = schedules.recipe(images, budget, denoise=denoise)
    calls = []

    def score(x, sigma):
        calls.append(sigma[0].item())
        return -x / (1 + sigma[:, None, None, None] ** 2)

    out = fastscore.sample(score, shape=(2, 1, 8, 8), seed=0, **plan.options())
    assert len(calls) == plan.calls and budget - plan.steps_per_level < plan.calls <= budget
    assert (
        calls[0]
        == plan.sigmas[0].item()
        == pytest.approx(schedules.max_pairwise_distance(images), rel=1e-7)
    )
    assert out.isfinite().all()


def test_recipe_agrees_with_its_techniques():
    images, _ = datasets.load("digits")
    plan = schedules.recipe(images, 1000)
    assert len(plan.sigmas) >= schedules.number_of_levels(64, plan.sigmas[0].item(), 0.01)
    assert plan.step_size == schedules.technique4_step_size(plan.sigmas, plan.steps_per_level)
    assert plan.overlap == pytest.approx(schedules.level_overlap(64, plan.gamma))
    first = schedules.variance_ratio(1.0, plan.steps_per_level, plan.step_size / 2 / 0.01**2)
    assert plan.ratios[0] == pytest.approx(first, rel=1e-6)
    small = schedules.recipe(images, 10)
    assert small.steps_per_level == 1 and small.overlap < 0.5 and len(small.sigmas) == 9


@pytest.mark.parametrize("dim", [1, 2, 5, 20])
def test_recipe_of_a_few_dimensions_is_no_sparser_than_ncsn(dim):
    plan = schedules.recipe(random.normal((50, dim), seed=6, stream=1024), 400)
    assert dim < 5 or schedules.number_of_levels(dim, plan.sigmas[0].item(), 0.01) < len(
        plan.sigmas
    )
    ncsn = (1 / 0.01) ** (1 / 9)
    levels = round(1 + math.log(plan.sigmas[0].item() / 0.01) / math.log(ncsn))
    assert plan.steps_per_level == 399 // levels and len(plan.sigmas) == 399 // plan.steps_per_level


def test_recipe_prints_what_sample_takes(capsys):
    recipe.recipe("digits", 1000)
    text = capsys.readouterr().out
    plan = schedules.recipe(datasets.load("digits")[0], 1000)
    assert (
        f"--levels {len(plan.sigmas)}\n" in text
        and f"--steps-per-level {plan.steps_per_level} " in text
    )
    assert f"{plan.overlap:.3f}" in text and f"{plan.ratio:.4f}" in text
    printed = float(text.split("--step-size")[1].split()[0])
    assert printed == pytest.approx(plan.step_size, rel=1e-5)


# Conventions and ladders of others


def test_snr_of_score_sde_reproduces_both_published_step_sizes():
    # score_sde's annealed corrector with r = 0.316 is NCSN, with r = 0.176 NCSNv2: η/σ_L² = 0.2 and
    # 0.062.
    assert schedules.lr_from_step_size(schedules.step_size_from_snr(0.316, 0.01)) == pytest.approx(
        2e-5, rel=2e-3
    )
    assert schedules.lr_from_step_size(schedules.step_size_from_snr(0.176, 0.01)) == pytest.approx(
        6.2e-6, rel=2e-3
    )
    assert schedules.snr_from_step_size(
        schedules.step_size_from_snr(0.16, 3.0), 3.0
    ) == pytest.approx(0.16, rel=1e-15)


def test_karras_ladder_is_edms():
    t = torch.arange(18, dtype=torch.float64) / 17
    expected = (80 ** (1 / 7) + t * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert torch.allclose(schedules.karras(80.0, 0.002, 18).double(), expected, rtol=1e-6)
    assert torch.allclose(
        schedules.karras(80.0, 0.002, 18, rho=1), schedules.linear(80.0, 0.002, 18), rtol=1e-6
    )
    assert torch.allclose(
        schedules.karras(80.0, 0.002, 18, rho=1e9), schedules.geometric(80.0, 0.002, 18), rtol=1e-6
    )


@pytest.mark.parametrize("ladder", [schedules.geometric, schedules.karras, schedules.linear])
def test_ladders_descend_and_have_exact_ends(ladder):
    found = ladder(50.0, 0.01, 300)
    assert (
        found[0].item() == 50.0
        and found[-1].item() == torch.tensor(0.01).item()
        and bool((found.diff() < 0).all())
    )


def test_vp_ladder_has_the_variance_of_the_vp_process():
    ladder = schedules.vp(50)
    t = torch.linspace(1, 1e-3, 50, dtype=torch.float64)
    log_mean = -0.25 * t**2 * (20 - 0.1) - 0.5 * t * 0.1  # score_sde's mean and standard deviation
    assert torch.allclose(
        ladder.double(), (-torch.expm1(2 * log_mean)).sqrt() / log_mean.exp(), rtol=1e-6
    )


def test_vp_tables_and_noise_levels_are_inverse():
    table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    assert torch.allclose(schedules.alphas_cumprod(schedules.sigmas_of(table)), table, rtol=1e-12)
    sigmas = schedules.sigmas_of(table)
    t = torch.tensor([0, 1, 17, 998, 999])
    assert torch.allclose(schedules.timesteps_of(sigmas[t], table), t.float(), atol=1e-6)
    assert torch.allclose(
        schedules.timesteps_of(sigmas[t].float(), table.float()), t.float(), atol=2e-3
    )
    between = schedules.timesteps_of((sigmas[17] * sigmas[18]).sqrt(), table)
    assert between.item() == pytest.approx(17.5, abs=1e-6)
    assert len(check_ladder("test", schedules.sigmas_of(table).flip(0))) == 1000


POINTS = torch.rand(5, 3)
TABLE = torch.linspace(0.99, 0.01, 10)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: schedules.max_pairwise_distance([1.0]),
            TypeError,
            "data must be a tensor; got list",
        ),
        (
            lambda: schedules.max_pairwise_distance(torch.ones(3, 2, dtype=torch.uint8)),
            TypeError,
            "got torch.uint8",
        ),
        (lambda: schedules.max_pairwise_distance(POINTS[:1]), ValueError, "at least 2 samples"),
        (lambda: schedules.max_pairwise_distance(POINTS[:, :0]), ValueError, r"got shape \(5, 0\)"),
        (
            lambda: schedules.max_pairwise_distance(POINTS * math.nan),
            ValueError,
            "data must be finite",
        ),
        (
            lambda: schedules.max_pairwise_distance(POINTS, chunk=0),
            ValueError,
            "chunk must be an int of at least 1; got 0",
        ),
        (
            lambda: schedules.distance_bounds(POINTS, samples=1),
            ValueError,
            "samples must be an int of at least 2; got 1",
        ),
        (
            lambda: schedules.number_of_levels(0, 1.0, 0.1),
            ValueError,
            "dim must be an int of at least 1; got 0",
        ),
        (lambda: schedules.number_of_levels(10, 0.1, 1.0), ValueError, "sigma_max > sigma_min > 0"),
        (
            lambda: schedules.number_of_levels(10, 1.0, 0.1, overlap=0.999),
            ValueError,
            "strictly between 0 and 0.9973; got 0.999",
        ),
        (lambda: schedules.number_of_levels(2, 1.0, 0.1), ValueError, "in 2 dimensions"),
        (lambda: schedules.technique4_step_size([1.0], 3), ValueError, "at least 2 levels"),
        (
            lambda: schedules.technique4_step_size([4.0, 1.0, 0.5], 3),
            ValueError,
            "ratios run from 2 to 4",
        ),
        (
            lambda: schedules.technique4_step_size([1.0, 0.5], 0),
            ValueError,
            "steps_per_level must be an int of at least 1; got 0",
        ),
        (
            lambda: schedules.variance_ratios([1.0, 0.5], 1, 1.0),
            ValueError,
            r"must lie in \[0, 4 σ_L²\)",
        ),
        (
            lambda: schedules.recipe(POINTS, 2),
            ValueError,
            "budget must be an int of at least 3 network calls; got 2",
        ),
        (
            lambda: schedules.recipe(POINTS, 100, sigma_min=5.0),
            ValueError,
            "must exceed sigma_min; got 5.0",
        ),
        (lambda: schedules.recipe(POINTS, 100, overlap=1.5), ValueError, "overlap must lie"),
        (
            lambda: schedules.recipe(POINTS, 100, sigma_max=0.001),
            ValueError,
            "recipe: sigma_max > .* got 0.001 and 0.01",
        ),
        (
            lambda: schedules.recipe(POINTS, 100, sigma_max=math.inf),
            ValueError,
            "sigma_max must be a finite number; got inf",
        ),
        (
            lambda: schedules.karras(1.0, 0.1, 5, rho=0),
            ValueError,
            "rho must be a finite number > 0",
        ),
        (
            lambda: schedules.linear(1.0, 0.1, 1),
            ValueError,
            "linear: n must be an int of at least 2; got 1",
        ),
        (lambda: schedules.vp(5, t_min=0), ValueError, "vp: 0 < t_min < 1"),
        (
            lambda: schedules.timesteps_of(torch.tensor([50.0]), TABLE),
            ValueError,
            "must lie in the model's range, 0.1005 to 9.95",
        ),
        (
            lambda: schedules.timesteps_of(torch.tensor([1.0]), TABLE.flip(0)),
            ValueError,
            "strictly descending",
        ),
    ],
)
def test_bad_input_gets_one_sentence(call, error, message):
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
