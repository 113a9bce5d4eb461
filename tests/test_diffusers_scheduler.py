"""AnnealedLangevinScheduler is a scheduler of diffusers.

What its common scheduler tests assert, and pipelines that are saved and cast.
"""

import copy
import importlib.util
import inspect
import json
import logging
import pickle

import pytest
import torch

from fastscore import interop, models, random, schedules

diffusers = pytest.importorskip("diffusers")
cls = interop.AnnealedLangevinScheduler
# diffusers' own tables hand tensors to NumPy 42,000 times, and each warning travels from a worker
# of xdist to its master.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:__array{kind}__:DeprecationWarning")
    for kind in ("", "_wrap")
]

LADDER = schedules.geometric(3.0, 0.1, 4)
DDPM = diffusers.DDPMScheduler(clip_sample=False)
VP = {"prediction_type": "epsilon", "alphas_cumprod": DDPM.alphas_cumprod}
CONFIGS = {
    "ends": ({"sigma_max": 3.0, "sigma_min": 0.1}, 10),
    "ladder": ({"sigmas": LADDER}, 5),
    "vp": ({"sigma_max": 3.0, "sigma_min": 0.1, **VP}, 10),
    "vp-ladder": ({"sigmas": LADDER, **VP}, 5),
}
each_config = pytest.mark.parametrize("name", CONFIGS)
CHANGES = [
    {"steps_per_level": 2, "denoise": False},
    {"step_size": 1e-3},
    {"seed": 3},
    {"seed": 2**63 - 1, "first_sample": 5},
    {"denoise": False},
    *(
        {"prediction_type": kind}
        for kind in ("score", "noise", "epsilon", "denoiser", "sample", "v", "v_prediction")
    ),
]


def images(seed=1, shape=(4, 3, 8, 8)):
    return random.normal(shape, seed=seed, stream=1024)


def run(scheduler, calls, dtype=torch.float32, steps=2):
    """The samples of the first steps of a run."""
    scheduler.set_timesteps(calls)
    x, found, generator = images().to(dtype), [], torch.Generator().manual_seed(0)
    for t in scheduler.timesteps[:steps]:
        answer = 0.1 * scheduler.scale_model_input(x, t)
        x = scheduler.step(answer, t, x, generator=generator).prev_sample
        found.append(x)
    return torch.stack(found)


def reloaded(scheduler, folder):
    scheduler.save_config(folder)
    return cls.from_pretrained(folder)


# What diffusers' SchedulerCommonTest asserts


@each_config
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_saved_scheduler_steps_alike_over_configs(tmp_path, name, change):
    options, _ = CONFIGS[name]
    scheduler = cls(**{**options, **change})
    calls = 4 * scheduler.config.steps_per_level + scheduler.config.denoise
    assert torch.equal(run(scheduler, calls), run(reloaded(scheduler, tmp_path), calls))


@each_config
@pytest.mark.parametrize("calls", [3, 10, 100])
def test_saved_scheduler_steps_alike_over_numbers_of_calls(tmp_path, name, calls):
    options, fixed = CONFIGS[name]
    scheduler = cls(**options)
    calls = fixed if "sigmas" in options else calls
    assert torch.equal(run(scheduler, calls), run(reloaded(scheduler, tmp_path), calls))


@each_config
def test_every_compatible_takes_the_config_and_gives_it_back(name):
    scheduler = cls(**CONFIGS[name][0], steps_per_level=2)
    assert cls in scheduler.compatibles and len(scheduler.compatibles) >= 2
    for other in scheduler.compatibles:
        between = other.from_config(scheduler.config)
        assert type(between) is other
        again = cls.from_config(between.config)
        assert {k: v for k, v in again.config.items() if k in scheduler.config} == dict(
            scheduler.config
        )
        new = set(again.config) - set(scheduler.config)
        assert not new & set(inspect.signature(cls.__init__).parameters)


@each_config
def test_loaded_config_is_the_saved_one(tmp_path, name):
    scheduler = cls(**CONFIGS[name][0])
    scheduler.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    config = dict(scheduler.config)
    del config["_use_default_values"]
    assert config == loaded.config
    assert (
        json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"]
        == "AnnealedLangevinScheduler"
    )


@each_config
def test_steps_keep_the_shape(name):
    found = run(cls(**CONFIGS[name][0]), CONFIGS[name][1])
    assert found[0].shape == found[1].shape == images().shape


@each_config
def test_tuple_and_dict_outputs_are_equal(name):
    options, calls = CONFIGS[name]
    scheduler, outputs = cls(**options), {}
    for as_dict in (True, False):
        scheduler.set_timesteps(calls)
        t, generator = scheduler.timesteps[0], torch.Generator().manual_seed(0)
        answer = scheduler.scale_model_input(images(), t)
        outputs[as_dict] = scheduler.step(
            answer, t, images(), generator=generator, return_dict=as_dict
        )
    assert isinstance(outputs[True], diffusers.utils.BaseOutput)
    for a, b in zip(outputs[False], outputs[True].values(), strict=True):
        assert torch.equal(a, b)


@each_config
def test_public_interface(name):
    scheduler = cls(**CONFIGS[name][0])
    assert isinstance(scheduler, (diffusers.SchedulerMixin, diffusers.ConfigMixin)) and callable(
        scheduler.step
    )
    assert scheduler.init_noise_sigma == 3.0 and scheduler.order == 1
    scaled = scheduler.scale_model_input(images(), 0.0)   # before any plan
    root = DDPM.alphas_cumprod[0].sqrt() if name.startswith("vp") else 1
    torch.testing.assert_close(scaled, root * images())
    if name.startswith("vp"):
        with pytest.raises(ValueError, match=r"timestep must lie in 0\.\.999; got 1000"):
            scheduler.scale_model_input(images(), 1000)


@each_config
def test_noise_is_added_at_a_timestep_of_the_plan(name):
    options, calls = CONFIGS[name]
    scheduler = cls(**options)
    scheduler.set_timesteps(100 if calls == 10 else calls)
    x, z, t = images(), images(2), scheduler.timesteps[3][None]
    noised = scheduler.add_noise(x, z, t)
    torch.testing.assert_close(noised, x + scheduler.sigmas[3] * z)


@pytest.mark.parametrize("name", ["vp", "vp-ladder"])
def test_an_input_can_be_scaled_at_any_timestep_and_steps_take_their_own(name):
    """√ᾱ of that timestep, whatever was planned.

    A network that did not see the input of the step is not believed.
    """
    options, calls = CONFIGS[name]
    scheduler = cls(**options)
    scheduler.set_timesteps(calls)
    torch.testing.assert_close(
        scheduler.scale_model_input(images(), 0.0), DDPM.alphas_cumprod[0].sqrt() * images()
    )
    t = scheduler.timesteps
    between = scheduler.scale_model_input(images(), t[2])
    torch.testing.assert_close(between, images() / (1 + scheduler.sigmas[2] ** 2).sqrt())
    with pytest.raises(
        ValueError, match="must come from scale_model_input, which was not called for this step"
    ):
        scheduler.step(between, t[0], images())
    scheduler.scale_model_input(images(), t[0])
    with pytest.raises(ValueError, match="step: step 0 is at timestep"):
        scheduler.step(between, t[2], images())
    assert (
        scheduler.step(between, t[0], images(), generator=torch.Generator())
        .prev_sample.isfinite()
        .all()
    )


def test_a_ve_network_needs_no_scaling():
    """Its input is the state itself."""
    for name in ("ends", "ladder"):
        options, calls = CONFIGS[name]
        scheduler = cls(**options, seed=3)
        scheduler.set_timesteps(calls)
        plain = scheduler.step(0.1 * images(), scheduler.timesteps[0], images()).prev_sample
        scheduler.set_timesteps(calls)
        scaled = 0.1 * scheduler.scale_model_input(images(), scheduler.timesteps[0])
        assert torch.equal(
            scheduler.step(scaled, scheduler.timesteps[0], images()).prev_sample, plain
        )


def test_no_deprecated_arguments():
    assert "kwargs" not in inspect.signature(cls.__init__).parameters and not cls._deprecated_kwargs


def test_a_table_of_numpy_is_saved(tmp_path):
    """As `trained_betas` of the VP schedulers."""
    scheduler = cls(
        sigma_max=3.0,
        sigma_min=0.1,
        prediction_type="epsilon",
        alphas_cumprod=DDPM.alphas_cumprod.numpy(),
    )
    scheduler.save_pretrained(tmp_path)
    assert cls.from_pretrained(tmp_path).config.alphas_cumprod == DDPM.alphas_cumprod.tolist()


def test_attributes_are_found_and_the_config_is_reached_with_a_warning(caplog):
    scheduler = cls(**CONFIGS["ends"][0])
    scheduler.dummy_attribute = 5
    scheduler.register_to_config(test_attribute=5)
    with caplog.at_level(logging.WARNING):
        assert (
            scheduler.dummy_attribute == 5
            and scheduler.save_pretrained == scheduler.save_pretrained
        )
    assert not caplog.records
    with pytest.warns(FutureWarning, match="test_attribute"):
        assert scheduler.test_attribute == 5
    with pytest.raises(
        AttributeError, match="'AnnealedLangevinScheduler' object has no attribute 'does_not_exist'"
    ):
        _ = scheduler.does_not_exist


def test_unexpected_entries_are_named_and_given_ones_stick(tmp_path, monkeypatch):
    scheduler = cls(**CONFIGS["ends"][0])
    scheduler.save_config(tmp_path)
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "unexpected": True}))
    said = []
    monkeypatch.setattr(diffusers.configuration_utils.logger, "warning", said.append)
    cls.from_config(cls.load_config(tmp_path))
    assert len(said) == 1 and said[0].startswith(
        "The config attributes {'unexpected': True} were passed to AnnealedLangevinScheduler"
    )
    changed = cls.from_config(scheduler.config, steps_per_level=3)
    there = diffusers.ScoreSdeVeScheduler.from_config(changed.config)
    assert cls.from_config(there.config).config.steps_per_level == 3


def test_a_ladder_takes_the_place_of_ends_and_ends_that_of_a_ladder():
    ends, ladder = (cls(**CONFIGS[name][0]) for name in ("ends", "ladder"))
    assert cls.from_config(ends.config, sigmas=[9.0, 1.0]).config.sigma_max == 9.0
    assert cls.from_config(ladder.config, sigmas=[9.0, 1.0]).config.sigmas == [9.0, 1.0]
    changed = cls.from_config(ladder.config, sigma_max=5.0)
    assert (changed.config.sigmas, changed.config.sigma_max, changed.config.sigma_min) == (
        None,
        5.0,
        LADDER[-1].item(),
    )


# Configs of other schedulers


@pytest.mark.parametrize("other", [c for c in cls._compatibles if c != "ScoreSdeVeScheduler"])
@pytest.mark.parametrize("from_file", [True, False])
def test_config_of_a_vp_scheduler_gives_its_table_prediction_and_range(tmp_path, other, from_file):
    options = {
        "beta_schedule": "scaled_linear",
        "beta_start": 1e-3,
        "beta_end": 1e-2,
        "prediction_type": "v_prediction",
    }
    theirs = getattr(diffusers, other)(num_train_timesteps=500, **options)
    if from_file:
        theirs.save_config(tmp_path)
    ours = cls.from_pretrained(tmp_path) if from_file else cls.from_config(theirs.config)
    betas = torch.linspace(1e-3**0.5, 1e-2**0.5, 500) ** 2
    table = torch.cumprod(1 - betas, 0)
    torch.testing.assert_close(torch.tensor(ours.config.alphas_cumprod), table, rtol=1e-5, atol=0)
    assert ours.config.prediction_type == "v_prediction"
    ends = [float(((1 - a) / a).sqrt()) for a in table[[-1, 0]].double()]
    assert [ours.config.sigma_max, ours.config.sigma_min] == pytest.approx(ends, rel=1e-3)
    ours.set_timesteps(20)
    assert float(ours.timesteps[0]) == pytest.approx(499) and float(
        ours.timesteps[-1]
    ) == pytest.approx(0, abs=1e-2)
    back = getattr(diffusers, other).from_config(ours.config)
    torch.testing.assert_close(back.alphas_cumprod, theirs.alphas_cumprod)
    assert back.config.prediction_type == "v_prediction"


def test_a_table_of_ones_own_reaches_other_schedulers():
    table = torch.linspace(0.995, 0.05, 20)
    ours = cls(sigma_max=4.0, sigma_min=0.1, prediction_type="epsilon", alphas_cumprod=table)
    torch.testing.assert_close(
        diffusers.DDIMScheduler.from_config(ours.config).alphas_cumprod, table
    )


@pytest.mark.parametrize(
    "options", [{}, {"sigma_min": 0.02, "sigma_max": 20.0}], ids=["defaults", "given"]
)
def test_config_of_the_ve_scheduler_gives_its_range(options):
    theirs = diffusers.ScoreSdeVeScheduler(**options)
    ours = cls.from_config(theirs.config)
    assert (ours.config.sigma_max, ours.config.sigma_min) == (
        options.get("sigma_max", 1348.0),
        options.get("sigma_min", 0.01),
    )
    assert ours.config.prediction_type == "score" and ours.config.alphas_cumprod is None
    ladder = cls.from_config(theirs.config, sigmas=LADDER)
    assert ladder.config.sigmas == LADDER.tolist()
    there = diffusers.ScoreSdeVeScheduler.from_config(ladder.config)
    assert (there.config.sigma_max, there.config.sigma_min) == (LADDER[0].item(), LADDER[-1].item())


def test_a_score_is_not_taken_for_noise_by_another_scheduler():
    """Their default is epsilon: what our config calls a default would be that."""
    with pytest.raises(ValueError, match="prediction_type given as score must be one of"):
        euler = diffusers.EulerDiscreteScheduler.from_config(cls(**CONFIGS["ends"][0]).config)
        euler.set_timesteps(5)
        euler.step(images(), euler.timesteps[0], images())


@pytest.mark.parametrize(
    "other",
    ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "CMStochasticIterativeScheduler"],
)
def test_other_processes_are_refused(tmp_path, other):
    theirs = getattr(diffusers, other)()
    with pytest.raises(
        ValueError, match=r"must be of ScoreSdeVeScheduler or of a VP scheduler .*; got one with "
    ):
        cls.from_config(theirs.config)
    theirs.save_config(tmp_path)
    with pytest.raises(
        ValueError, match=f"must be of ScoreSdeVeScheduler or of a VP scheduler .*; got '{other}'"
    ):
        cls.from_pretrained(tmp_path)


def test_flow_sigmas_and_flow_predictions_are_refused():
    flow = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    with pytest.raises(ValueError, match="must be of ScoreSdeVeScheduler or of a VP scheduler"):
        cls.from_config(flow.config)


def test_arguments_given_by_position_or_changed_in_a_config_are_not_dropped():
    assert cls.from_config(cls(LADDER).config).config.sigmas == LADDER.tolist()
    scheduler = cls(sigma_max=3.0, sigma_min=0.1)
    changed = cls.from_config({**scheduler.config, "seed": 4, "denoise": False})
    assert changed.config.seed == 4 and changed.config.denoise is False


def test_ends_of_another_ladder_are_refused():
    with pytest.raises(
        ValueError,
        match=r"sigmas and sigma_max, sigma_min must agree if both are given; "
              r"got 3 to 0\.1, and 4\.0 and 0\.1",
    ):
        cls(LADDER, sigma_max=4.0, sigma_min=0.1)


@pytest.mark.parametrize(
    "name, value",
    [("seed", "a"), ("seed", 0.5), ("seed", True), ("step_size", -1.0), ("step_size", "b")],
)
def test_wrong_numbers_are_refused_at_once(name, value):
    with pytest.raises(
        ValueError, match=f"AnnealedLangevinScheduler: {name} must be .*; got {value!r}"
    ):
        cls(LADDER, **{name: value})


def test_numbers_may_be_tensors():
    config = cls(LADDER, seed=torch.tensor(2**40), step_size=torch.tensor(0.5)).config
    assert config.seed == 2**40 and config.step_size == 0.5 and json.dumps(dict(config))


def test_without_diffusers_the_way_out_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match="a scheduler of diffusers, which is not installed: pip install diffusers"
    ):
        _ = interop.AnnealedLangevinScheduler


# Pipelines


def unet(embedding="fourier"):
    torch.manual_seed(0)
    return (
        diffusers.UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
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


def drawn(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        batch_size=2,
        generator=torch.Generator().manual_seed(5),
        num_inference_steps=5,
        output_type="pt",
    ).images


def test_pipeline_is_saved_and_loaded_with_the_scheduler(tmp_path):
    pipeline = diffusers.DDPMPipeline(unet(), cls(LADDER, step_size=2e-3))
    expected = drawn(pipeline)
    pipeline.save_pretrained(tmp_path)
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is cls and torch.equal(drawn(loaded), expected)
    swapped = diffusers.DDPMPipeline.from_pretrained(
        tmp_path, scheduler=cls.from_config(loaded.scheduler.config, seed=3)
    )
    assert swapped.scheduler.config.seed == 3 and swapped.scheduler.config.sigmas == LADDER.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_pipeline_draws(dtype):
    """Its state is rounded where the network sees it, 9 bits of 3.

    The network's own rounding is as large.
    """
    scheduler = cls(LADDER, step_size=2e-3, seed=1)
    net = unet()
    expected = drawn(diffusers.DDPMPipeline(net, scheduler))
    x = drawn(diffusers.DDPMPipeline(copy.deepcopy(net), scheduler).to(dtype))
    assert x.dtype == dtype and float((x.float() - expected).abs().mean()) < 0.03


@pytest.mark.parametrize("name", ["ends", "vp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_of_a_half_precision_run_is_float32(name, dtype):
    """To the bit: what the network sees is rounded, what is added up is not."""
    options, calls = CONFIGS[name]
    law = models.Gaussian(torch.ones(2), 0.01 * torch.eye(2))

    def network(x, sigma):
        score = law.score(x.float(), torch.full((len(x),), sigma))
        return score if name == "ends" else -score * sigma

    half, full = (cls(**options, seed=3) for _ in range(2))
    half.set_timesteps(calls), full.set_timesteps(calls)
    x = images(shape=(100, 2)).to(dtype)
    y = x.float()
    for t, level in zip(half.timesteps, half._levels):
        sigma = half._ladder[level]
        half.scale_model_input(x, t), full.scale_model_input(y, t)
        answer = network(x, sigma).to(dtype)
        y = full.step(answer.float(), t, y).prev_sample
        x = half.step(answer, t, x).prev_sample
        assert x.dtype == dtype and torch.equal(x, y.to(dtype))


def test_an_edited_sample_is_taken_as_it_is():
    scheduler, plain = (cls(**CONFIGS["ends"][0], seed=3) for _ in range(2))
    scheduler.set_timesteps(10), plain.set_timesteps(10)
    x = images().bfloat16()
    x = scheduler.step(0 * x, scheduler.timesteps[0], x).prev_sample
    exact = scheduler._state.clone()
    x[:, :, :4] = 7.0   # a known half, in place
    exact[:, :, :4] = 7.0
    plain.step(images(), plain.timesteps[0], images())
    found = scheduler.step(0 * x, scheduler.timesteps[1], x).prev_sample
    assert torch.equal(
        found, plain.step(0 * exact, plain.timesteps[1], exact).prev_sample.bfloat16()
    )


@each_config
def test_scheduler_is_copied_and_pickled_in_the_middle_of_a_run(name):
    options, calls = CONFIGS[name]
    scheduler = cls(**options)
    scheduler.set_timesteps(calls)
    x, t = images(), scheduler.timesteps
    x = scheduler.step(scheduler.scale_model_input(x, t[0]), t[0], x).prev_sample
    copies = [scheduler, copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))]
    first, *others = [s.step(s.scale_model_input(x, t[1]), t[1], x).prev_sample for s in copies]
    assert all(torch.equal(first, other) for other in others)


def test_noise_is_added_with_one_timestep_or_one_for_each():
    scheduler = cls(**CONFIGS["ends"][0])
    scheduler.set_timesteps(10)
    x, t = images(), scheduler.timesteps
    assert torch.equal(scheduler.add_noise(x, x, t[[3, 3, 3, 3]]), scheduler.add_noise(x, x, t[3]))
    with pytest.raises(
        ValueError, match="add_noise: timesteps must be one or one for each of the 4 samples; got 2"
    ):
        scheduler.add_noise(x, x, t[:2])
    with pytest.raises(
        ValueError, match="add_noise: noise must have the shape of original_samples"
    ):
        scheduler.add_noise(x, x[:1], t[:1])
