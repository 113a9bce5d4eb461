"""Networks of diffusers, k-diffusion and EDM as scores.

Annealed Langevin as a diffusers scheduler, in real pipelines.
"""

import math
import sys

import children
import numpy as np
import pytest
import torch

from fastscore import conversions, interop, jvp, models, random, sample, schedules

diffusers = pytest.importorskip("diffusers")

LADDER = schedules.geometric(3.0, 0.1, 4)
PLAN = {"sigmas": LADDER, "steps_per_level": 2, "step_size": 2e-3, "denoise": True}   # nine calls
SHAPE = (2, 3, 8, 8)


def unet(embedding, channels=3):
    torch.manual_seed(0)
    return (
        diffusers.UNet2DModel(
            sample_size=8,
            in_channels=channels,
            out_channels=channels,
            time_embedding_type=embedding,
            norm_num_groups=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        )
        .eval()
        .requires_grad_(False)
    )


@pytest.fixture(scope="module")
def fourier():
    return unet("fourier")


@pytest.fixture(scope="module")
def positional():
    return unet("positional")


@pytest.fixture(scope="module")
def ddpm():
    return diffusers.DDPMScheduler(
        num_train_timesteps=1000, clip_sample=False, prediction_type="epsilon"
    )


def noise(seed=1, shape=SHAPE):
    return random.normal(shape, seed=seed, stream=1024)


# Networks


def test_ve_unet_is_the_score_that_the_ve_scheduler_of_diffusers_takes(fourier):
    score, x = interop.VeUNet(fourier), noise()
    ve = diffusers.ScoreSdeVeScheduler(num_train_timesteps=10, sigma_min=0.01, sigma_max=50.0)
    ve.set_timesteps(10)
    ve.set_sigmas(10)
    for i in (0, 4, 8):
        t = ve.timesteps[i]
        output = fourier(x, ve.sigmas[i] * torch.ones(2)).sample   # as ScoreSdeVePipeline calls it
        mean = ve.step_pred(output, t, x).prev_sample_mean
        at = int(t * 9)
        sigma, below = ve.discrete_sigmas[at], ve.discrete_sigmas[at - 1]
        # Reverse diffusion of the paper: x + (σ_i² - σ_{i-1}²) s
        assert torch.allclose(
            mean, x + (sigma**2 - below**2) * score(x, ve.sigmas[i]), rtol=1e-5, atol=1e-4
        )


def test_ve_unet_takes_one_sigma_per_sample(fourier):
    score, x, sigma = interop.VeUNet(fourier), noise(), torch.tensor([0.2, 5.0])
    both = score(x, sigma)
    for i in range(2):
        assert torch.allclose(
            both[i : i + 1], score(x[i : i + 1], sigma[i : i + 1]), rtol=1e-4, atol=1e-5
        )
    assert not torch.allclose(both[1], score(x, torch.tensor([0.2, 0.2]))[1], atol=1e-2)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_vp_unet_denoises_as_the_ddpm_scheduler_does(positional, prediction):
    ddpm = diffusers.DDPMScheduler(clip_sample=False, prediction_type=prediction)
    score = interop.VpUNet(positional, ddpm.alphas_cumprod.double(), prediction=prediction)
    for t in (20, 500, 999):
        abar = ddpm.alphas_cumprod[t]
        sigma, x_vp = schedules.sigmas_of(abar), noise(t)
        expected = ddpm.step(positional(x_vp, t).sample, t, x_vp).pred_original_sample
        x = x_vp / abar.sqrt()
        found = conversions.convert(
            score(x, sigma.expand(2)), x, sigma, kind="score", to="denoiser"
        )
        # D = x + σ² s: at ᾱ = 4e-5, |x| is 160 times |D|, and so is its rounding; t is met to 1e-3
        # in float32.
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(sigma) + 1e-4)
        # and it is the x₀ of x_vp = √ᾱ x₀ + √(1-ᾱ) ẑ for the network's own prediction of the noise
        if prediction == "epsilon":
            z = positional(x_vp, t).sample
            assert torch.allclose(
                expected, (x_vp - (1 - abar).sqrt() * z) / abar.sqrt(), rtol=1e-4, atol=1e-4
            )


class GaussianUNet(torch.nn.Module):
    """The exact noise prediction for N(0.3, 0.25) data of a VP process, at fractional timesteps,
    written without the adapter's helpers."""

    def __init__(self, table, learned_variance=False):
        super().__init__()
        table = table.double().numpy()
        self.log_sigma, self.learned, self.seen = (
            0.5 * np.log((1 - table) / table),
            learned_variance,
            [],
        )
        self.bias = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x_vp, t, scale=1.0):
        self.seen.append(t)
        sigma = torch.from_numpy(
            np.exp(np.interp(t.double().numpy(), np.arange(len(self.log_sigma)), self.log_sigma))
        )
        abar = (1 / (1 + sigma**2)).float().reshape(-1, *[1] * (x_vp.dim() - 1))
        s = -(x_vp - abar.sqrt() * 0.3) / (abar * 0.25 + 1 - abar)
        z = -(1 - abar).sqrt() * s * scale + self.bias
        return (torch.cat([z, 7 + z], 1),) if self.learned else (z,)


@pytest.mark.parametrize("learned_variance", [False, True])
def test_vp_unet_of_an_exact_network_is_the_exact_score_at_any_sigma(ddpm, learned_variance):
    score = interop.VpUNet(GaussianUNet(ddpm.alphas_cumprod, learned_variance), ddpm.alphas_cumprod)
    sigma = torch.tensor([0.02, 0.333, 1.0, 20.0, 157.0])
    x = 0.3 + (0.25 + sigma**2).sqrt()[:, None] * noise(2, (5, 4))
    expected = -(x - 0.3) / (0.25 + sigma[:, None] ** 2)
    # ẑ/σ: float32 rounding of x is divided by σ²; t has 24 bits, ln σ changes by 0.1 per timestep
    # at most.
    assert torch.allclose(score(x, sigma), expected, rtol=2e-3, atol=1e-4)


def test_vp_unet_rounds_timesteps_when_asked(ddpm):
    network = GaussianUNet(ddpm.alphas_cumprod)
    interop.VpUNet(network, ddpm.alphas_cumprod, round_timesteps=True)(
        noise(3, (2, 4)), torch.tensor([0.5, 2.0])
    )
    sigmas = schedules.sigmas_of(ddpm.alphas_cumprod)
    nearest = [(sigmas.log() - math.log(s)).abs().argmin().item() for s in (0.5, 2.0)]
    assert network.seen[0].tolist() == nearest and network.seen[0].dtype == torch.int64


def test_sampling_through_a_vp_unet_draws_the_data_law(ddpm):
    """N(0.3, 0.25), 20,000 values, seed 4.

    The mean and variance within 5.2 standard errors, false alarm 4e-7, of the chain's own law.
    """
    score, n = interop.VpUNet(GaussianUNet(ddpm.alphas_cumprod), ddpm.alphas_cumprod), 20_000
    ladder, T, epsilon = schedules.geometric(10.0, 0.1, 10), 5, 2e-3
    x = sample(
        score,
        shape=(n, 1),
        sigmas=ladder,
        steps_per_level=T,
        step_size=epsilon,
        denoise=False,
        seed=4,
    )
    mean, variance = 0.0, 100.0   # N(0, σ_1²); then m ← a m + (1 - a) μ, V ← a² V + ε_i per step
    for sigma in ladder.tolist():
        e = epsilon * (sigma / 0.1) ** 2
        a = 1 - e / 2 / (0.25 + sigma**2)
        for _ in range(T):
            mean, variance = 0.3 + a * (mean - 0.3), a * a * variance + e
    assert abs(x.mean().item() - mean) < 5.2 * math.sqrt(variance / n)
    # 2e-3: the network's own rounding of t.
    assert abs(x.var().item() / variance - 1) < 5.2 * math.sqrt(2 / n) + 2e-3


@pytest.mark.parametrize("kind", ["ve", "vp"])
def test_gradients_reach_x_and_the_parameters(fourier, positional, ddpm, kind):
    network = fourier if kind == "ve" else positional
    score = (
        interop.VeUNet(network) if kind == "ve" else interop.VpUNet(network, ddpm.alphas_cumprod)
    )
    x, sigma, v = noise().requires_grad_(), torch.tensor([0.5, 2.0]), noise(7)
    assert len(list(score.parameters())) == len(list(network.parameters()))
    network.conv_in.weight.requires_grad_()
    gx, gw = torch.autograd.grad((score(x, sigma) * v).sum(), [x, network.conv_in.weight])
    network.conv_in.weight.requires_grad_(False)
    h, tangent = 1e-2, noise(8)
    with torch.no_grad():
        slope = ((score(x + h * tangent, sigma) - score(x - h * tangent, sigma)) * v).sum() / (
            2 * h
        )
    # Central differences in float32: h² of the third derivative and 2^-24/h of rounding, both near
    # 1e-4 of terms of order 10.
    assert torch.allclose((gx * tangent).sum(), slope, rtol=2e-2, atol=2e-2)
    assert gw.abs().max() > 1e-3


class NormedNet(torch.nn.Module):
    """A network through whose norm stock forward mode gives wrong parameter gradients."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, 9), torch.nn.LayerNorm(9), torch.nn.SiLU(), torch.nn.Linear(9, 4)
        ).double()

    def forward(self, x, condition):
        return self.layers(x) * (1 + condition.double().log1p()[:, None])


VP_TABLE = schedules.alphas_cumprod(schedules.geometric(20.0, 0.02, 100).flip(0).double())
WRAPPERS = {
    **{
        kind: (lambda net, kind=kind: conversions.Converted(net, kind=kind))
        for kind in conversions.KINDS
    },
    "rescaled": lambda net: conversions.Rescaled(net, 2.0, -1.0),
    "ve_unet": interop.VeUNet,
    "vp_unet": lambda net: interop.VpUNet(net, VP_TABLE),
    "k_diffusion": interop.k_diffusion,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_forward_mode_through_every_wrapper_equals_double_backprop_in_float64(name):
    net = NormedNet()
    score, sigma = WRAPPERS[name](net), torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)
    x, v = (random.normal((3, 4), seed=s, stream=1024, dtype=torch.float64) for s in (1, 2))
    # (d, d, B).
    jacobian = torch.autograd.functional.jacobian(lambda y: score(y, sigma), x).diagonal(
        dim1=0, dim2=2
    )
    value, tangent = jvp(lambda y: score(y, sigma), x, v)
    assert torch.allclose(value, score(x, sigma), rtol=1e-12)
    assert torch.allclose(tangent, torch.einsum("ijb,bj->bi", jacobian, v), rtol=1e-9, atol=1e-11)
    # The last bias has no tangent.
    weights = [p for n, p in net.named_parameters() if n != "layers.3.bias"]
    found = torch.autograd.grad((v * tangent).sum(), weights)
    y = x.clone().requires_grad_()
    (gy,) = torch.autograd.grad((v * score(y, sigma)).sum(), y, create_graph=True)
    for a, b in zip(found, torch.autograd.grad((v * gy).sum(), weights)):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_compile_without_a_graph_break(name):
    net = NormedNet().requires_grad_(False)
    score, x, sigma = (
        WRAPPERS[name](net),
        random.normal((3, 4), seed=1, stream=1024, dtype=torch.float64),
        torch.ones(3).double(),
    )
    compiled = torch.compile(score, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, sigma), score(x, sigma))


def test_score_of_pipeline_knows_both_kinds(fourier, positional, ddpm):
    x, sigma = noise(), torch.tensor([0.5, 2.0])
    ve = diffusers.DDPMPipeline(fourier, ddpm)
    assert torch.equal(interop.score_of_pipeline(ve)(x, sigma), fourier(x, sigma).sample)
    vp = diffusers.DDPMPipeline(positional, ddpm)
    expected = interop.VpUNet(positional, ddpm.alphas_cumprod, prediction="epsilon")(x, sigma)
    assert torch.equal(interop.score_of_pipeline(vp)(x, sigma), expected)


def test_half_precision_network_answers_in_the_dtype_of_x(fourier):
    import copy

    half = copy.deepcopy(fourier).to(torch.bfloat16)
    x, sigma = noise(), torch.tensor([0.5, 2.0])
    found = interop.VeUNet(half)(x, sigma)
    assert found.dtype == torch.float32
    assert torch.allclose(found, interop.VeUNet(fourier)(x, sigma), rtol=0.1, atol=0.1)


class EdmLike(torch.nn.Module):
    """A network with EDM's signature and preconditioning around a raw F.

    Answers in float32 whatever x is.
    """

    def __init__(self, sigma_data=0.5):
        super().__init__()
        self.sigma_data, self.raw = sigma_data, torch.nn.Linear(4, 4)

    def forward(self, x, sigma, class_labels=None, force_fp32=False):
        x, s = x.float(), sigma.float().reshape(-1, 1)
        total = s**2 + self.sigma_data**2
        f = self.raw(x / total.sqrt()) + (
            0 if class_labels is None else class_labels @ torch.ones(3, 4)
        )
        return self.sigma_data**2 / total * x + s * self.sigma_data / total.sqrt() * f


def test_edm_network_is_its_score():
    net, x, sigma = EdmLike(), noise(5, (3, 4)), torch.tensor([0.1, 1.0, 40.0])
    labels = torch.eye(3)
    for classes in (None, labels):
        denoised = net(x, sigma, classes)
        found = interop.edm(net, class_labels=classes)(x, sigma)
        assert torch.allclose(found, (denoised - x) / sigma[:, None] ** 2, rtol=1e-5)
    assert interop.edm(net)(x.double(), sigma.double()).dtype == torch.float64
    assert not torch.allclose(
        interop.edm(net, class_labels=labels)(x, sigma), interop.edm(net)(x, sigma)
    )


def test_k_diffusion_denoiser_is_its_score_and_samples_alike():
    def denoiser(x, sigma, scale):   # k-diffusion's call, with extra_args
        assert sigma.shape == (len(x),)
        return 0.3 * scale + (x - 0.3 * scale) * (0.25 / (0.25 + sigma**2))[:, None]

    law = models.Gaussian(torch.tensor([0.3, 0.3]), torch.eye(2) / 4)
    score, x = interop.k_diffusion(denoiser, scale=1.0), noise(6, (3, 2))
    sigma = torch.tensor([0.2, 1.0, 9.0])
    assert torch.allclose(score(x, sigma), law.score(x, sigma), rtol=1e-4, atol=1e-5)
    options = {"shape": (5, 2), "seed": 1, **PLAN}
    assert torch.allclose(sample(score, **options), sample(law.score, **options), atol=1e-4)


# The scheduler


def loop(scheduler, network, x, calls, generator=None):
    """The loop of diffusers' pipelines."""
    scheduler.set_timesteps(calls)
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t)
        output = output.sample if hasattr(output, "sample") else output[0]
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    return x


@pytest.mark.parametrize("denoise", [True, False])
def test_loop_over_a_ve_unet_is_fastscore_sample_to_the_bit(fourier, denoise):
    options = {**PLAN, "denoise": denoise}
    found = loop(
        interop.AnnealedLangevinScheduler(seed=3, **options), fourier, noise(), 8 + denoise
    )
    assert torch.equal(found, sample(interop.VeUNet(fourier), x=noise(), seed=3, **options))


def test_ddpm_pipeline_runs_annealed_langevin(fourier):
    scheduler = interop.AnnealedLangevinScheduler(**PLAN)
    pipeline = diffusers.DDPMPipeline(fourier, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=2,
        generator=torch.Generator().manual_seed(5),
        num_inference_steps=9,
        output_type="pt",
    ).images
    generator = torch.Generator().manual_seed(5)
    # The pipeline's first draw; the next draw of the generator is the seed.
    x = torch.randn(SHAPE, generator=generator)
    seed = int(torch.randint(0, 2**63 - 1, (), generator=generator))
    expected = (sample(interop.VeUNet(fourier), x=x, seed=seed, **PLAN) / 2 + 0.5).clamp(0, 1)
    inside = (expected > 0) & (expected < 1)
    assert inside.float().mean() > 0.2
    assert torch.equal(images, expected)


class PassThrough(torch.nn.Module):
    """Stands for LDMPipeline's decoder."""

    config, dtype, device = (
        diffusers.configuration_utils.FrozenDict(scaling_factor=1.0),
        torch.float32,
        torch.device("cpu"),
    )

    def decode(self, latents):
        return diffusers.configuration_utils.FrozenDict(sample=latents)


def test_latent_pipeline_runs_annealed_langevin_on_a_vp_unet(positional, ddpm):
    table = ddpm.alphas_cumprod
    scheduler = interop.AnnealedLangevinScheduler(
        prediction_type="epsilon", alphas_cumprod=table, seed=11, **PLAN
    )
    assert scheduler.init_noise_sigma == 3.0
    pipeline = diffusers.LDMPipeline(PassThrough(), positional, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=2,
        generator=torch.Generator().manual_seed(5),
        num_inference_steps=9,
        output_type="np",
    ).images
    x = 3.0 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    expected = sample(interop.VpUNet(positional, table), x=x, seed=11, **PLAN)
    expected = (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert ((expected > 0) & (expected < 1)).float().mean() > 0.1
    # √ᾱ is float32 in the network adapter and float64 in the scheduler: some roundings of states of
    # order 10.
    assert torch.allclose(torch.from_numpy(images), expected, atol=2e-5)


@pytest.mark.parametrize("prediction", ["noise", "denoiser", "v"])
def test_scheduler_takes_every_prediction(prediction):
    law = models.Gaussian(torch.zeros(2), torch.eye(2))
    network = conversions.Converted(law.score, kind="score", to=prediction)
    scheduler = interop.AnnealedLangevinScheduler(prediction_type=prediction, seed=3, **PLAN)
    found = loop(scheduler, lambda x, t: (network(x, t.expand(len(x))),), noise(2, (4, 2)), 9)
    assert torch.allclose(found, sample(law.score, x=noise(2, (4, 2)), seed=3, **PLAN), atol=1e-4)


def test_scheduler_makes_the_ladder_for_the_number_of_calls():
    scheduler = interop.AnnealedLangevinScheduler(sigma_max=50.0, sigma_min=0.01, steps_per_level=5)
    scheduler.set_timesteps(1161)
    assert (
        torch.equal(scheduler.sigmas, schedules.geometric(50.0, 0.01, 232))
        and len(scheduler.timesteps) == 1161
    )
    assert (
        scheduler.timesteps[0] == 50.0
        and scheduler.timesteps[-1] == scheduler.timesteps[-6] == scheduler.sigmas[-1]
    )
    score = models.Gaussian(torch.zeros(2), torch.eye(2)).score
    scheduler = interop.AnnealedLangevinScheduler.from_config({**scheduler.config, "seed": 4})
    found = loop(scheduler, lambda x, t: (score(x, t.expand(len(x))),), noise(2, (4, 2)), 1161)
    step_size = schedules.technique4_step_size(scheduler.sigmas, 5)
    options = {"sigmas": scheduler.sigmas, "steps_per_level": 5, "step_size": step_size}
    assert torch.equal(found, sample(score, x=noise(2, (4, 2)), seed=4, **options))


def test_splits_of_a_batch_and_second_runs_agree(fourier):
    whole = loop(interop.AnnealedLangevinScheduler(seed=3, **PLAN), fourier, noise(), 9)
    scheduler = interop.AnnealedLangevinScheduler(seed=3, first_sample=1, **PLAN)
    for _ in range(2):
        assert torch.allclose(
            loop(scheduler, fourier, noise()[1:], 9), whole[1:], rtol=1e-3, atol=1e-4
        )


def test_seed_comes_from_the_generator_or_the_default_one(fourier):
    def run(generator=None):
        return loop(interop.AnnealedLangevinScheduler(**PLAN), fourier, noise(), 9, generator)

    first, second = (run(torch.Generator().manual_seed(s)) for s in (1, 2))
    assert torch.equal(first, run(torch.Generator().manual_seed(1))) and not torch.allclose(
        first, second
    )
    torch.manual_seed(8)
    default = run()
    torch.manual_seed(8)
    assert torch.equal(default, run())


def test_add_noise_has_the_sigma_of_the_timestep(ddpm):
    x, z = noise(1, (2, 4)), noise(2, (2, 4))
    for table in (None, ddpm.alphas_cumprod):
        scheduler = interop.AnnealedLangevinScheduler(alphas_cumprod=table, **PLAN)
        scheduler.set_timesteps(9)
        found = scheduler.add_noise(x, z, scheduler.timesteps[[0, 4]])
        assert torch.allclose(found, x + LADDER[[0, 2], None] * z)
    with pytest.raises(ValueError, match="timesteps must be of this run"):
        scheduler.add_noise(x, z, torch.tensor([0.5, 0.5]))


def test_return_dict_false_gives_a_tuple():
    scheduler = interop.AnnealedLangevinScheduler(seed=1, **PLAN)
    scheduler.set_timesteps()
    (x,) = scheduler.step(noise(), scheduler.timesteps[0], noise(), return_dict=False)
    assert x.shape == SHAPE and scheduler.order == 1 and scheduler.config.steps_per_level == 2


@pytest.mark.processes
def test_importing_fastscore_imports_nothing_foreign():
    code = (
        "import sys, fastscore, fastscore.interop; "
        "foreign = ('diffusers', 'k_diffusion', 'torchdiffeq'); "
        "print([m for m in foreign if m in sys.modules])"
    )
    assert children.run([sys.executable, "-c", code], check=True).stdout.strip() == "[]"


def started(**options):
    scheduler = interop.AnnealedLangevinScheduler(**{**PLAN, **options})
    scheduler.set_timesteps(9)
    return scheduler


def finished():
    scheduler = started(seed=0)
    for t in scheduler.timesteps:
        scheduler.step(noise(), t, noise())
    return scheduler


TABLE = torch.linspace(0.995, 0.05, 20)   # σ from 0.071 to 4.4
ENDS = {"sigma_max": 3.0, "sigma_min": 0.1, "steps_per_level": 2}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: interop.VeUNet(unet("positional")),
            "time_embedding_type 'fourier'; got 'positional', which VpUNet takes",
        ),
        (lambda: interop.VpUNet(unet("fourier"), TABLE), "'fourier', which VeUNet takes"),
        (
            lambda: interop.VpUNet(len, TABLE, prediction="flow"),
            "VpUNet: a prediction must be one of .*; got 'flow'",
        ),
        (lambda: interop.VpUNet(len, TABLE.flip(0)), "strictly descending"),
        (
            lambda: interop.VpUNet(GaussianUNet(TABLE), TABLE)(noise(), torch.tensor([1.0, 50.0])),
            "in the model's range, 0.07089 to 4.359",
        ),
        (
            lambda: interop.VpUNet(GaussianUNet(TABLE), TABLE)(noise(), torch.tensor([1.0])),
            r"sigma must be a number, 0-d or \(2,\)",
        ),
        (
            lambda: interop.k_diffusion(lambda x, sigma: x[:1])(noise(), torch.ones(2)),
            r"the shape of x, .*; got \(1, 3, 8, 8\)",
        ),
        (
            lambda: interop.VeUNet(lambda x, t: (x[:, :1],))(noise(), torch.ones(2)),
            r"network's answer must have the shape of x",
        ),
        (lambda: interop.score_of_pipeline(object()), "must have a unet; object has none"),
        (
            lambda: interop.AnnealedLangevinScheduler(),
            "give either sigmas, or sigma_max and sigma_min",
        ),
        (
            lambda: interop.AnnealedLangevinScheduler(sigma_max=1.0),
            "give either sigmas, or sigma_max and sigma_min",
        ),
        (
            lambda: interop.AnnealedLangevinScheduler(LADDER, steps_per_level=0),
            "steps_per_level must be an int of at least 1; got 0",
        ),
        (
            lambda: interop.AnnealedLangevinScheduler(LADDER, first_sample=-1),
            "first_sample must be an int of at least 0; got -1",
        ),
        (lambda: interop.AnnealedLangevinScheduler(LADDER.flip(0)), "strictly descending"),
        (
            lambda: interop.AnnealedLangevinScheduler([9.0, 1.0], alphas_cumprod=TABLE),
            "in the model's range",
        ),
        (
            lambda: interop.AnnealedLangevinScheduler(**PLAN).set_timesteps(10),
            "num_inference_steps must be 9 for this ladder; got 10",
        ),
        (
            lambda: interop.AnnealedLangevinScheduler(**ENDS).set_timesteps(10),
            r"must be 2 L \+ 1 with at least 2 levels L, at most .*10",
        ),
        (lambda: interop.AnnealedLangevinScheduler(**ENDS).set_timesteps(), "got None"),
        (
            lambda: interop.AnnealedLangevinScheduler(**PLAN).step(noise(), 3.0, noise()),
            "call set_timesteps first",
        ),
        (
            lambda: interop.AnnealedLangevinScheduler(**PLAN).add_noise(
                noise(), noise(), torch.ones(2)
            ),
            "call set_timesteps first",
        ),
        (lambda: started().step(noise(), 0.1, noise()), "step 0 is at timestep 3; got 0.1"),
        (
            lambda: started().step(noise()[:1], 3.0, noise()),
            r"model_output must have the shape of "
            r"sample, \(2, 3, 8, 8\)",
        ),
        (
            lambda: started().step(noise(), 3.0, noise(), generator=[torch.Generator()]),
            "one torch.Generator, not a list",
        ),
        (
            lambda: started(alphas_cumprod=TABLE).step(noise(), None, noise()),
            "must come from scale_model_input",
        ),
        (lambda: finished().step(noise(), 0.1, noise()), "all 9 steps are taken"),
    ],
)
def test_bad_input_gets_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
