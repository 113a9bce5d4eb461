"""Samplers and ladders against closed forms."""

import math
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastscore
from fastscore import backend as backends
from fastscore import random, sampling, schedules


def gaussian(x, sigma):
    return -(x - 0.7) / (0.04 + sigma.reshape(-1, *[1] * (x.dim() - 1)) ** 2)


LADDER = {"sigmas": schedules.geometric(1.0, 0.1, 4)}
SAMPLERS = {
    "annealed_langevin": {**LADDER, "steps_per_level": 3, "step_size": 2e-3},
    "consistent_annealed": LADDER,
    "predictor_corrector": {**LADDER, "corrector_steps": 2},
    "probability_flow": LADDER,
    "langevin": {"steps": 5, "step_size": 0.01, "sigma": 0.5},
    "mala": {"steps": 5, "step_size": 0.05},
}
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)


def log_prob(x):
    return -0.5 * (x - 0.7).square().flatten(1).sum(1) / 0.04


def target(sampler):
    return log_prob if sampler == "mala" else gaussian


@every_sampler
def test_samples_are_the_same_for_any_split(sampler):
    options = {"sampler": sampler, "seed": 8, **SAMPLERS[sampler]}
    whole = fastscore.sample(target(sampler), shape=(12, 3, 5), **options)
    parts = [
        fastscore.sample(target(sampler), shape=(n, 3, 5), first_sample=k, **options)
        for k, n in ((0, 5), (5, 1), (6, 6))
    ]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "mala"])
def test_samples_of_a_network_agree_across_splits(sampler):
    """The noise is the same bit for bit; the network's own rounding depends on the batch."""
    torch.manual_seed(0)
    net = fastscore.models.NCSNv2(
        channels=1, ngf=4, sigmas=schedules.geometric(1.0, 0.1, 4), image_size=8
    )
    options = {"sampler": sampler, "seed": 8, **SAMPLERS[sampler]}
    whole = fastscore.sample(net, shape=(6, 1, 8, 8), **options)
    parts = [
        fastscore.sample(net, shape=(n, 1, 8, 8), first_sample=k, **options)
        for k, n in ((0, 1), (1, 5))
    ]
    assert float((whole - torch.cat(parts)).abs().max()) < 1e-5 * max(1.0, float(whole.abs().max()))


@pytest.mark.filterwarnings("ignore:predictor_corrector")
def test_batch_norms_couple_a_sample_to_its_batch_mates_and_the_others_do_not():
    options = {
        "sampler": "predictor_corrector",
        "corrector": "langevin",
        "seed": 8,
        **SAMPLERS["predictor_corrector"],
    }
    for norms, same in (("batch", False), ("sample", True), ("dimension", True)):
        whole = fastscore.sample(gaussian, shape=(6, 3, 5), norms=norms, **options)
        assert (
            torch.equal(
                whole[:3], fastscore.sample(gaussian, shape=(3, 3, 5), norms=norms, **options)
            )
            is same
        )


@every_sampler
def test_a_resumed_run_equals_the_whole_one_bit_for_bit(sampler):
    """From every state that is yielded, in the middle of a level too.

    And a start is never written to.
    """
    options = {"sampler": sampler, "seed": 8, **SAMPLERS[sampler]}
    options |= (
        {"every_step": True} if sampler in ("annealed_langevin", "predictor_corrector") else {}
    )
    whole = list(sampling.states(target(sampler), shape=(4, 3), **options))
    kept = [state.x.clone() for state in whole]
    assert [state.step for state in whole] == list(range(1, len(whole) + 1))
    for i, state in enumerate(whole):
        rest = list(sampling.states(target(sampler), x=state.x, start=state.step, **options))
        assert [s._replace(x=None) for s in rest] == [s._replace(x=None) for s in whole[i + 1 :]]
        assert all(torch.equal(a.x, b.x) for a, b in zip(rest, whole[i + 1 :]))
    assert all(torch.equal(state.x, x) for state, x in zip(whole, kept))


def test_step_sizes_may_differ_between_samples():
    x, sizes = sampling.initial((4, 3), seed=1), torch.tensor([0.0, 1e-3, 2e-3, 4e-3])
    for sampler in ("annealed_langevin", "langevin", "mala"):
        options = {"sampler": sampler, "seed": 8, **SAMPLERS[sampler]}
        together = fastscore.sample(target(sampler), x=x, **{**options, "step_size": sizes})
        for i, e in enumerate(sizes.tolist()):
            alone = fastscore.sample(
                target(sampler), x=x[i : i + 1], first_sample=i, **{**options, "step_size": e}
            )
            assert torch.allclose(together[i], alone[0], atol=1e-6)
    sizes = torch.tensor([0.007, 0.01, 0.012, 0.014])
    together = fastscore.sample(
        gaussian, sampler="consistent_annealed", x=x, step_lr=sizes, seed=8, **LADDER
    )
    alone = fastscore.sample(
        gaussian,
        sampler="consistent_annealed",
        x=x[3:],
        step_lr=0.014,
        first_sample=3,
        seed=8,
        **LADDER,
    )
    assert torch.allclose(together[3], alone[0], atol=1e-6)


class Counter(TorchDispatchMode):
    """Counts what computes; allocations and views do not.

    Reading a value on the host is forbidden.
    """

    FREE = (
        "empty", "view", "reshape", "expand", "detach", "alias", "slice", "select", "unsqueeze",
        "t.",
    )
    HOST = ("_local_scalar_dense", "is_nonzero", "equal.default", "nonzero", "item")

    def __init__(self, forbid=True):
        super().__init__()
        self.seen, self.forbid = [], forbid

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = str(f).split("::")[-1].removeprefix("aten.").removeprefix("fastscore.")
        assert not (self.forbid and name.startswith(self.HOST)), f"{name} waits for the device"
        if not name.startswith(self.FREE):
            self.seen.append(name)
        return f(*args, **(kwargs or {}))


@pytest.mark.parametrize("step_size", [2e-3, torch.full((64,), 2e-3)], ids=["float", "per-sample"])
def test_an_annealed_step_is_one_kernel_and_a_level_a_few(step_size):
    if backends.why_not("cpp", "cpu") is not None:
        pytest.skip(backends.why_not("cpp", "cpu"))
    x, seen = sampling.initial((64, 3, 8, 8), seed=0), []
    for n in (1, 4):
        options = {
            "sigmas": [1.0, 0.5, 0.25],
            "steps_per_level": n,
            "step_size": step_size,
            "denoise": False,
        }
        # a network that costs nothing.
        run = sampling.annealed_langevin(lambda x, sigma: x, x, seed=0, **options)
        with Counter() as counter:
            assert len(list(run)) == 3
        assert counter.seen.count("noisy_update.default") == 3 * n
        seen.append(len(counter.seen))
    assert seen[1] - seen[0] == 3 * 3 and seen[0] <= 3 * 6


@every_sampler
def test_no_sampler_waits_for_the_device_between_its_states(sampler):
    """The door may look at what it was given; from then on nothing is read on the host.

    A step of Score-SDE's corrector costs 9 calls.
    """
    x = sampling.initial((8, 3, 4, 4), seed=0)
    options = dict(SAMPLERS[sampler])
    run = getattr(sampling, sampler)(target(sampler), x, seed=0, diagnostics=True, **options)
    with Counter():
        for state in run:
            assert all(value.shape == (8,) for value in (state.diagnostics or {}).values())
    with pytest.raises(AssertionError, match="waits for the device"), Counter():
        bool(x.isfinite().all())


@every_sampler
def test_diagnostics_come_when_asked_for(sampler):
    x = sampling.initial((8, 3), seed=0)
    run = getattr(sampling, sampler)
    assert all(
        state.diagnostics is None for state in run(target(sampler), x, seed=0, **SAMPLERS[sampler])
    )
    first = next(run(target(sampler), x, seed=0, diagnostics=True, **SAMPLERS[sampler])).diagnostics
    assert {"x_norm", "score_norm"} <= first.keys()
    if sampler == "langevin":
        s = gaussian(x, torch.tensor(0.5)).norm(dim=1)
        assert torch.allclose(first["x_norm"], x.norm(dim=1)) and torch.allclose(
            first["score_norm"], s
        )
        assert torch.allclose(first["snr"], math.sqrt(0.01) * s / (2 * math.sqrt(3)))


def test_low_precision_and_double_states_keep_their_dtype():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for sampler in SAMPLERS:
            score = (
                (lambda x: log_prob(x))
                if sampler == "mala"
                else (lambda x, sigma: gaussian(x, sigma).to(x.dtype))
            )
            x = fastscore.sample(
                score, sampler=sampler, shape=(4, 3), dtype=dtype, seed=0, **SAMPLERS[sampler]
            )
            single = fastscore.sample(
                target(sampler), sampler=sampler, shape=(4, 3), seed=0, **SAMPLERS[sampler]
            )
            if sampler != "mala":  # a rounded ratio may decide otherwise
                assert torch.allclose(
                    x.float(), single, atol=40 * max(torch.finfo(dtype).eps, 1e-6)
                )
            assert x.dtype == dtype


def test_a_compiled_score_gives_the_samples_of_the_eager_one():
    torch.manual_seed(0)
    net = fastscore.models.ScoreMLP(6, width=16, depth=1, sigmas=LADDER["sigmas"])
    for parameter in net.parameters():   # the last layer starts at zero
        torch.nn.init.normal_(parameter, std=0.3)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for sampler in (
        "annealed_langevin",
        "consistent_annealed",
        "predictor_corrector",
        "probability_flow",
    ):
        options = {"sampler": sampler, "shape": (4, 6), "seed": 8, **SAMPLERS[sampler]}
        assert torch.allclose(
            fastscore.sample(net, **options), fastscore.sample(compiled, **options), atol=1e-5
        )


def test_presets_run_and_cost_what_was_published():
    calls = [
        sampling.PRESETS[f"ncsnv2-{name}"].calls
        for name in ("cifar10", "celeba", "church", "bedroom", "ffhq")
    ]
    assert calls == [1161, 2501, 3153, 3259, 6934] and sampling.PRESETS["ncsn"].calls == 1000
    for preset in sampling.PRESETS.values():
        calls, d = 0, 4

        def exact(x, sigma):   # of data at 1/2
            nonlocal calls
            calls += 1
            return (0.5 - x) / sigma[:, None] ** 2

        x = fastscore.sample(exact, shape=(2, d), seed=0, **preset.options)
        assert calls == preset.calls and float((x - 0.5).abs().max()) < (
            1e-5 if preset.denoise else 5 * 0.0106
        )


def test_geometric_ladder_and_step_conventions():
    ladder = schedules.geometric(50.0, 0.01, 7)
    assert float(ladder[0]) == 50 and torch.allclose(
        ladder[1:] / ladder[:-1], torch.full((6,), (0.01 / 50) ** (1 / 6))
    )
    assert (
        schedules.lr_from_step_size(schedules.step_size_from_lr(2e-5)) == 2e-5
        and schedules.step_size_from_lr(1.0) == 2.0
    )


def test_noise_conditional_loss_reaches_its_floor():
    """The exact score of N(μ, s²) leaves ½ s²/(s² + σ²) per dimension under the weight σ²."""
    n, sigma = 2**20, 0.5
    x = 0.7 + 0.2 * random.normal((n, 1), seed=3, stream=1024)
    losses = fastscore.losses.noise_conditional(gaussian, x, [sigma], seed=4).double()
    assert abs(float(losses.mean()) - 0.5 * 0.04 / (0.04 + sigma**2)) < 5 * float(
        losses.std()
    ) / math.sqrt(n)


X, ONE = torch.zeros(2, 2), {"steps_per_level": 1, "step_size": 0.1, "seed": 0}


def gaussian_density(x):
    return -x.square()


def run(sampler, score=gaussian, **options):
    return list(getattr(sampling, sampler)(score, X, **options))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: schedules.geometric(0.1, 1.0, 5), "sigma_max > sigma_min > 0 must hold"),
        (lambda: schedules.geometric(1.0, 0.1, 1), "n must be an int of at least 2"),
        (
            lambda: sampling.annealed_langevin(gaussian, X, sigmas=[0.1, 1.0], **ONE),
            "strictly descending",
        ),
        (
            lambda: sampling.annealed_langevin(gaussian, X, sigmas=[1.0, math.nan], **ONE),
            "positive, finite",
        ),
        (
            lambda: sampling.annealed_langevin(
                gaussian, X, sigmas=[1.0], **{**ONE, "step_size": -1.0}
            ),
            "step_size must be",
        ),
        (
            lambda: sampling.langevin(gaussian, X, steps=-1, step_size=0.1),
            "steps must be an int of at least 0",
        ),
        (lambda: fastscore.sample(gaussian, sampler="magic", x=X), "sampler must be one of"),
        (lambda: fastscore.sample(gaussian, sigmas=[1.0], **ONE), "give either x or shape"),
        (
            lambda: fastscore.losses.noise_conditional(gaussian, X, [1.0], method="magic", seed=0),
            "method must be",
        ),
        (
            lambda: run("consistent_annealed", sigmas=[1.0, 0.1], step_lr=0.005),
            "step_lr must lie between 0.009 and 0.011 on this ladder",
        ),
        (
            lambda: run("consistent_annealed", sigmas=[1.0, 0.9], step_lr=0.01),
            "step_lr must lie between .*; got 0.01",
        ),
        (
            lambda: run("annealed_langevin", sigmas=[1.0], steps_per_level=1),
            r"give either step_size \(ε\) or step_lr",
        ),
        (
            lambda: run("annealed_langevin", sigmas=[1.0], step_lr=1.0, **ONE),
            r"give either step_size \(ε\) or step_lr",
        ),
        (
            lambda: run("annealed_langevin", sigmas=[1.0], start=3, **ONE),
            "start must be at most 2, the updates of the whole run; got 3",
        ),
        (
            lambda: run("annealed_langevin", sigmas=[1.0], temperature=-1.0, **ONE),
            "temperature must be a finite number >= 0; got -1.0",
        ),
        (
            lambda: run("annealed_langevin", sigmas=[1.0], first_sample=-1, **ONE),
            "first_sample must be an int of at least 0; got -1",
        ),
        (
            lambda: run("predictor_corrector", sigmas=[1.0], predictor="magic"),
            "predictor must be one of reverse_diffusion, ancestral",
        ),
        (
            lambda: run("predictor_corrector", sigmas=[1.0], corrector="magic"),
            "corrector must be one of langevin, annealed, none",
        ),
        (
            lambda: run("predictor_corrector", sigmas=[1.0], norms="magic"),
            "norms must be one of sample, batch, dimension",
        ),
        (
            lambda: run("predictor_corrector", sigmas=[1.0], snr=-0.1),
            "snr must be a finite number >= 0; got -0.1",
        ),
        (
            lambda: run("probability_flow", sigmas=[1.0, 0.5], method="rk4"),
            "method must be one of heun, euler, adaptive; got 'rk4'",
        ),
        (
            lambda: run("probability_flow", sigmas=[1.0, 0.5], rtol=-1.0, method="adaptive"),
            "rtol must be a finite number >= 0",
        ),
        (
            lambda: run("langevin", steps=1, step_size=torch.ones(3)),
            r"step_size must be a number, 0-d or \(2,\)",
        ),
        (
            lambda: run("mala", log_prob, steps=1, step_size=0.1, temperature=0.0),
            "temperature must be positive",
        ),
        (
            lambda: run("mala", gaussian_density, steps=1, step_size=0.1),
            r"log_prob\(x\) must be one value per sample, \(2,\)",
        ),
        (
            lambda: run("annealed_langevin", lambda x, s: x[:1], sigmas=[1.0], **ONE),
            r"score must have the shape of x, \(2, 2\); got \(1, ",
        ),
        (
            lambda: run(
                "langevin", lambda x: x, steps=1, step_size=0.1, project=lambda x, *_: x[:1]
            ),
            "the result of project must have",
        ),
        (
            lambda: fastscore.sample(gaussian, shape=(2, 2), sigmas=[], **ONE),
            "sigmas must be a non-empty 1-d ladder",
        ),
        (
            lambda: fastscore.sample(gaussian, shape=(2, 2), sigmas=torch.ones(2, 2), **ONE),
            r"a non-empty 1-d ladder; got shape \(2, 2\)",
        ),
        (
            lambda: fastscore.sample(gaussian, shape=(2, 2), first_sample=-1, sigmas=[1.0], **ONE),
            "must be an int of at least 0",
        ),
        (
            lambda: sampling.initial((2, 2), law="normal", seed=0),
            "law must be one of uniform, gaussian",
        ),
        (
            lambda: fastscore.losses.noise_conditional(lambda x, s: x[:1], X, [1.0], seed=0),
            "must have the shape of x",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert str(caught.value).count("\n") == 0


@every_sampler
def test_what_is_not_finite_is_named_by_level_and_step(sampler):
    def broken(x, sigma=None):
        return (log_prob if sampler == "mala" else lambda x: gaussian(x, torch.tensor(0.5)))(
            x
        ) * torch.tensor(math.nan)

    options = {"sampler": sampler, "x": torch.zeros(2, 2), "seed": 0, **SAMPLERS[sampler]}
    if sampler == "mala":   # it refuses what is not finite
        assert torch.equal(fastscore.sample(broken, **options), options["x"])
        return
    with pytest.raises(
        FloatingPointError,
        match=r"the state is not finite after level 0 \(σ = .*, step [13]\); choose a smaller",
    ):
        fastscore.sample(broken, **options)
    assert bool(fastscore.sample(broken, check_finite=False, **options).isnan().all())


def test_sample_looks_at_the_state_once_per_level_however_many_steps_that_has():
    def looks(**options):
        with Counter(forbid=False) as counter:
            fastscore.sample(gaussian, shape=(4, 3), seed=0, **options)
        return sum(name.startswith(Counter.HOST) for name in counter.seen)

    options = {**LADDER, "step_size": 2e-3}
    blind, one, nine = (
        looks(check_finite=c, steps_per_level=n, **options)
        for c, n in ((False, 1), (True, 1), (True, 9))
    )
    assert one == nine == blind + 4 + 1 + 1   # each level, the denoised samples, and the end


def test_a_step_size_that_diverges_is_an_error():
    """|1 - ε/(2σ²)| > 1 on data narrower than the noise.

    10^30 after some steps, infinite at last.
    """
    options = {**SAMPLERS["annealed_langevin"], "step_size": 1.0, "steps_per_level": 40}
    with pytest.raises(
        FloatingPointError, match=r"not finite after level 0 .*choose a smaller step_size"
    ):
        fastscore.sample(gaussian, shape=(4, 3), seed=0, **options)


@pytest.mark.parametrize(
    "sampler, options, updates",
    [
        ("annealed_langevin", {}, 13),
        ("annealed_langevin", {"denoise": False}, 12),
        ("consistent_annealed", {}, 4),
        ("predictor_corrector", {}, 12),
        ("predictor_corrector", {"denoise": False}, 11),
        ("predictor_corrector", {"predictor": "none"}, 9),
        ("probability_flow", {}, 4),
        ("probability_flow", {"method": "euler", "denoise": False}, 3),
        ("langevin", {}, 5),
    ],
)
def test_the_hook_comes_before_every_network_call_and_once_at_the_end(sampler, options, updates):
    """With the σ of that call, and the step of its noise.

    What it returns is what the network sees and what the caller gets.
    """
    hooks, calls = [], []

    def project(x, sigma, step):
        hooks.append((sigma, step))
        return x.clamp(0.25, 0.75)

    def score(x, sigma):
        assert 0.25 <= float(x.min()) and float(x.max()) <= 0.75
        calls.append(float(sigma[0]))
        return gaussian(x, sigma)

    options = {
        "sampler": sampler,
        "shape": (8, 2),
        "seed": 0,
        "project": project,
        **SAMPLERS[sampler],
        **options,
    }
    x = fastscore.sample(score, **options)
    assert 0.25 <= float(x.min()) and float(x.max()) <= 0.75
    assert [sigma for sigma, _ in hooks[:-1]] == calls and hooks[-1] == (0.0, updates)
    assert sorted({step for _, step in hooks}) == list(range(updates + 1))


def test_the_hook_of_mala_sees_every_proposal():
    seen = []

    def project(x, sigma, step):
        seen.append((sigma, step))
        return x

    options = {"sampler": "mala", "x": X, "seed": 0, **SAMPLERS["mala"]}
    assert torch.equal(
        fastscore.sample(log_prob, project=project, **options),
        fastscore.sample(log_prob, **options),
    )
    assert seen == [(0.0, step) for step in (0, 0, 1, 2, 3, 4, 5)]


@pytest.mark.filterwarnings("ignore:predictor_corrector")
@pytest.mark.parametrize("sampler", [*SAMPLERS, "predictor_corrector, batch norms"])
def test_every_back_end_draws_the_samples_of_the_reference(sampler, backend):
    options = {"corrector": "langevin", "norms": "batch"} if sampler.endswith("norms") else {}
    sampler = sampler.split(",")[0]
    options = {"sampler": sampler, "shape": (4, 3, 5), "seed": 8, **SAMPLERS[sampler], **options}
    drawn = fastscore.sample(target(sampler), **options)
    with fastscore.use_backend("reference"):
        assert float((drawn - fastscore.sample(target(sampler), **options)).abs().max()) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "langevin", "steps": 0, "step_size": 0.1},
        {"sigmas": [1.0], "steps_per_level": 0, "step_size": 0.1, "denoise": False},
        {"sampler": "probability_flow", "sigmas": [2.0], "denoise": False},
    ],
)
def test_a_run_without_updates_returns_its_start(options):
    sigma, law = (
        (2.0, "gaussian") if options.get("sampler") == "probability_flow" else (None, "uniform")
    )
    start = sampling.initial((3, 2), law=law, sigma=sigma, seed=4)
    assert torch.equal(fastscore.sample(gaussian, shape=(3, 2), seed=4, **options), start)


@every_sampler
def test_a_wrong_seed_is_refused_before_the_score_is_called(sampler):
    def never(*_):
        raise AssertionError("the score was called")

    if sampler != "probability_flow":   # which draws nothing
        with pytest.raises(TypeError, match="seed must be an int or an int64 tensor; got float"):
            SAMPLING[sampler](never, X, seed=1.5, **SAMPLERS[sampler])


SAMPLING = {name: getattr(sampling, name) for name in SAMPLERS}


@pytest.mark.filterwarnings("ignore:predictor_corrector")
@pytest.mark.parametrize(
    "options",
    [{}, *({"corrector": "langevin", "norms": n} for n in ("sample", "batch", "dimension"))],
)
def test_samples_may_be_single_values(options):
    """A state (B,) is what (B, 1) is."""
    x = torch.linspace(-1, 1, 5)
    runs = [
        next(
            sampling.predictor_corrector(gaussian, x, **LADDER, seed=0, diagnostics=True, **options)
        )
        for x in (x, x[:, None])
    ]
    assert torch.equal(runs[0].x, runs[1].x[:, 0])
    assert all(
        torch.equal(runs[0].diagnostics[k], runs[1].diagnostics[k]) for k in runs[0].diagnostics
    )


UNBATCHED = {
    "fails": lambda x, sigma=None: -x.reshape(len(x), 3),
    "fails in a layer": lambda x, *_: torch.nn.functional.linear(x, torch.ones(2, 2)),
    "has no such dimension": lambda x, sigma=None: -x / x.norm(dim=1),
    "is one number": lambda x, sigma=None: -x.square().sum(),
    "broadcasts": lambda x, sigma=None: -x[None] / torch.ones(3, 1),
}


@every_sampler
@pytest.mark.parametrize("score", UNBATCHED.values(), ids=UNBATCHED)
def test_one_sample_without_its_batch_is_told_to_be_a_batch_of_one(score, sampler):
    """(3,) are three samples of one value each; whoever means one of three finds the way out."""
    with pytest.raises(
        ValueError,
        match=r"x of shape \(3,\), a batch of 3 single values; "
              r"one sample of 3 values has shape \(1, 3\)\.$",
    ):
        fastscore.sample(score, sampler=sampler, x=torch.zeros(3), seed=0, **SAMPLERS[sampler])


@pytest.mark.parametrize("shape", [3, (3,)])
def test_a_shape_without_its_batch_is_told_the_shape_of_one_sample(shape):
    """Nobody gave an x: the way out is one of shapes."""
    with pytest.raises(ValueError, match=r"one sample of 3 values has shape \(1, 3\)\.$"):
        options = SAMPLERS["annealed_langevin"]
        fastscore.sample(UNBATCHED["is one number"], shape=shape, seed=0, **options)


@pytest.mark.parametrize("method", ["heun", "euler", "adaptive"])
def test_the_flow_of_no_samples_is_none(method):
    assert fastscore.sample(
        gaussian, sampler="probability_flow", shape=(0, 3), method=method, **LADDER
    ).shape == (0, 3)


def test_a_ladder_beyond_that_of_the_network_is_warned_about():
    net = torch.optim.swa_utils.AveragedModel(
        fastscore.models.ScoreMLP(4, width=8, depth=1, sigmas=[1.0, 0.1])
    )
    options = {"shape": (2, 4), "steps_per_level": 1, "step_size": 1e-3, "seed": 0}
    with pytest.warns(
        UserWarning, match=r"sigmas reach from 4 to 0.1, but the network was made for 1 to 0.1"
    ):
        fastscore.sample(net, sigmas=[4.0, 0.1], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastscore.sample(net, sigmas=[1.0, 0.3, 0.1], **options)
        fastscore.sample(
            lambda x, sigma: -x / (1 + sigma[:, None] ** 2), sigmas=[4.0, 0.1], **options
        )
