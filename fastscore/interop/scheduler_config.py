"""The configs of diffusers' schedulers: ours from theirs, and theirs from ours."""

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from torch import Tensor

from fastscore import schedules
from fastscore.messages import shown
from fastscore.ops import checks
from fastscore.schedules.ladders import check_ends, check_ladder

MARK = "_annealed_langevin"   # stays in the config of a scheduler that was made from ours
VP = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
]
VE = ["ScoreSdeVeScheduler"]


def positive(op: str, name: str, value: Any) -> float:
    """A number above 0 that float32 holds."""
    return checks.number(op, name, value, above=0, most=torch.finfo(torch.float32).max)


def whole_number(op: str, name: str, value: Any) -> int:
    """An int, or a 0-d tensor that holds one."""
    number = value.item() if isinstance(value, torch.Tensor) and value.dim() == 0 else value
    if not checks.whole(number):
        raise ValueError(f"{op}: {name} must be an int; got {shown(value)}.")
    return checks.plain_int(number)


def given_ladder(
    op: str, sigmas: Any, sigma_max: float | None, sigma_min: float | None
) -> Tensor:
    """The ladder, or its two ends; both may be given if they agree, as in a saved config."""
    ends = (sigma_max, sigma_min)
    if (sigmas is None and None in ends) or (None in ends and ends != (None, None)):
        raise ValueError(f"{op}: give either sigmas, or sigma_max and sigma_min.")
    if sigmas is None:
        sigma_max, sigma_min, _ = check_ends(op, sigma_max, sigma_min, 2)
        return schedules.geometric(sigma_max, sigma_min, 2)

    ladder = check_ladder(op, sigmas)
    if ends not in ((None, None), (ladder[0].item(), ladder[-1].item())):
        found = (
            f"{ladder[0].item():.6g} to {ladder[-1].item():.6g}, and {sigma_max} and {sigma_min}"
        )
        raise ValueError(
            f"{op}: sigmas and sigma_max, sigma_min must agree if both are given; got {found}."
        )

    return ladder


def betas_of(table: Tensor) -> dict[str, Any]:
    """What VP schedulers call the same table, so that one that is made from our config has it."""
    table = table.double()
    ratios = torch.cat([table[:1], table[1:] / table[:-1]])
    return {"trained_betas": (1 - ratios).tolist(), "num_train_timesteps": len(table)}


def defaults_of(cls: type) -> dict[str, Any]:
    """The arguments of a class that have a default, by name."""
    parameters = inspect.signature(cls.__init__).parameters
    return {name: p.default for name, p in parameters.items() if name != "self"}


def arguments_of(cls: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """Our arguments from the config of another class of diffusers."""
    kind, name = class_of(cls, config)
    if kind is cls:
        return {}

    other = (
        None if kind is None or config.get("use_flow_sigmas") else kind.from_config(dict(config))
    )
    table = getattr(other, "alphas_cumprod", None)
    if isinstance(other, diffusers.ScoreSdeVeScheduler):
        ends = {"sigma_max": other.config.sigma_max, "sigma_min": other.config.sigma_min}
        found = {"prediction_type": "score"}
    elif isinstance(table, torch.Tensor):
        sigmas = schedules.sigmas_of(table.double()).float()
        ends = {"sigma_max": sigmas[-1].item(), "sigma_min": sigmas[0].item()}
        found = {
            "prediction_type": other.config.get("prediction_type", "epsilon"),
            "alphas_cumprod": table,
        }
    else:
        raise ValueError(
            "from_config: the config must be of ScoreSdeVeScheduler or of a VP scheduler (with "
            f"alphas_cumprod); got {name}."
        )

    return found | ends


def class_of(cls: type, config: Mapping[str, Any]) -> tuple[Any, str]:
    """The class whose config it is, or None, and what to call it.

    A config that was never saved holds no name.
    """
    name = config.get("_class_name")
    if name == cls.__name__ or config.get(MARK):
        return cls, cls.__name__
    if name is not None:
        return getattr(diffusers, name, None) if isinstance(name, str) else None, repr(name)

    keys = {key for key in config if not key.startswith("_")}
    if keys <= set(defaults_of(cls)):
        return cls, cls.__name__

    matches = (getattr(diffusers, each) for each in (*VE, *VP))
    # Schedulers that were made from one another's configs hold the arguments of both, and the same
    # betas.
    return next(
        (kind for kind in matches if set(defaults_of(kind)) <= keys), None
    ), f"one with {', '.join(sorted(keys)[:6])}, ..."


def own_defaults(cls: type, config: Mapping[str, Any]) -> list[str]:
    """What the config calls a default, and is one of cls and of every other class."""
    own = {name for name, value in defaults_of(cls).items() if config.get(name, _NONE) == value}
    elsewhere_others = {"sigma_max", "sigma_min", "prediction_type"}
    return sorted((own & set(config["_use_default_values"])) - elsewhere_others)


_NONE = object()


def completed(cls: type, config: Mapping[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The arguments for `from_config`: those of another class's config, and what is given.

    A ladder that is given takes the place of the ends in the config, and ends that of its ladder.
    """
    replaced = {}
    if given.get("sigmas") is not None:
        replaced |= {"sigma_max": None, "sigma_min": None}
    if {"sigma_max", "sigma_min"} & set(given):
        replaced |= {"sigmas": None}

    return {**arguments_of(cls, config), **replaced, **given}


def with_true_defaults(cls: type, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config of cls that calls nothing a default which has another value."""
    if class_of(cls, config)[0] is not cls or "_use_default_values" not in config:
        return config

    defaults = defaults_of(cls)
    changed = {name for name, value in defaults.items() if config.get(name, value) != value}
    true = [name for name in config["_use_default_values"] if name not in changed]
    return {**config, "_use_default_values": true}
