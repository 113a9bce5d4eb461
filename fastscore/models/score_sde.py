"""The checkpoints of yang-song/score_sde_pytorch: NCSN++, DDPM++ and DDPM.

    {optimizer, model: state_dict, ema: {decay, num_updates, shadow_params}, step}

The averages are a list in the order of the parameters; what is no parameter stands in `model`.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.models.ncsnpp import NCSNpp
from fastscore.models.state_dicts import (
    OP,
    filled,
    first,
    is_state_dict,
    outline,
    unwrapped,
)

ARCH = "ncsnpp"
_PREFIX = "all_modules"
# Published networks have attention at images of this side.
_ATTENDED = 16


def recognises(container: Any) -> bool:
    """Whether it is such a file, or the weights in one."""
    if not isinstance(container, Mapping):
        return False
    if {"model", "ema"} <= set(container):
        return True
    return is_state_dict(container) and any(
        name.startswith(f"{_PREFIX}.") for name in unwrapped(container)
    )


def network(
    container: Mapping[str, Any], ema: bool, given: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a file, and what was taken for the options that the file does not tell.

    Raises:
        ValueError, TypeError: as `load_official`.
    """
    known = list(inspect.signature(NCSNpp).parameters)
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise TypeError(
            f"{OP}: the hyper-parameters of {ARCH} are {', '.join(known)}; got "
            f"{', '.join(unknown)}."
        )

    weights, averages = _parts_of(container, ema)
    sigmas = weights.pop("sigmas", None)
    options = structure(weights)
    options |= _process(options.pop("fourier"), sigmas, given)
    untold = {"nonlinearity": "swish"} | options.pop("untold")
    options |= untold | given
    if averages is not None:
        weights = _averaged(options, weights, averages)

    net = filled(NCSNpp, options, weights)
    taken = {name: value for name, value in untold.items() if name not in given}
    taken |= {
        name: value
        for name, value in (
            ("centered", net.process.centered),
            ("scale_by_sigma", net.scale_by_sigma if net.process.sde == "ve" else None),
            ("beta_min", None if net.process.sde == "ve" else net.process.beta_min),
            ("beta_max", None if net.process.sde == "ve" else net.process.beta_max),
        )
        if value is not None and name not in given
    }
    return net, taken


def _parts_of(container, ema):
    """The tensors of the network by name, and the averages of its parameters, or None."""
    state, averages = container, None
    if not is_state_dict(container):
        state = container["model"]
        average = container["ema"]
        if ema:
            averages = average.get("shadow_params") if isinstance(average, Mapping) else None
            if not isinstance(averages, (list, tuple)) or not all(
                isinstance(t, Tensor) for t in averages
            ):
                raise ValueError(
                    f"{OP}: the checkpoint has no averaged weights, ema.shadow_params; pass "
                    "ema=False to take the others."
                )
    if not is_state_dict(state):
        raise ValueError(
            f"{OP}: the checkpoint must be a dict with a state_dict as model; got "
            f"{outline(state)}."
        )
    return unwrapped(state), averages


def _averaged(options, weights, averages):
    """The weights with the averages in the place of the parameters."""
    with torch.device("meta"):
        names = [name for name, _ in NCSNpp(**options).named_parameters()]
    if len(names) != len(averages):
        raise ValueError(
            f"{OP}: ema.shadow_params must have the {len(names)} parameters of the network; got "
            f"{len(averages)}."
        )
    return {**weights, **dict(zip(names, averages))}


def _process(fourier, sigmas, given):
    """Options of the process: of a network with Fourier features VE's, else what is given."""
    sde, continuous = given.get("sde"), given.get("continuous")
    if fourier and (sde not in (None, "ve") or continuous is False):
        raise ValueError(
            f"{OP}: the checkpoint has Fourier features of ln σ, so it is of sde ve and "
            f"continuous; got sde {sde or 've'}, continuous {continuous is not False}."
        )
    if not fourier and sde is None:
        raise ValueError(
            f"{OP}: the checkpoint does not tell its process; pass sde, one of ve, vp and subvp, "
            "as training.sde of its config without 'sde' at the end."
        )
    if not fourier and sde == "ve" and continuous:
        raise ValueError(
            f"{OP}: the checkpoint embeds the numbers of its levels, so with sde ve it is not "
            "continuous."
        )
    if not fourier and sde == "vp" and continuous is None:
        raise ValueError(
            f"{OP}: the checkpoint does not tell whether its process is continuous; pass "
            "continuous, as training.continuous of its config."
        )

    options = {"sde": "ve", "continuous": True}
    if not fourier:
        options = {"sde": sde, "continuous": sde == "subvp" or bool(continuous)}
    if sigmas is None:
        return options

    if sigmas.dim() != 1 or len(sigmas) < 2:
        raise ValueError(f"{OP}: sigmas must be a ladder (L,); got {tuple(sigmas.shape)}.")
    options["num_scales"] = len(sigmas)
    if options["sde"] == "ve":
        # Of images in [0, 1].
        options["sigmas"] = sigmas / 2 if given.get("centered") else sigmas
    return options


def structure(weights: dict[str, Tensor]) -> dict[str, Any]:
    """The options of NCSNpp that names and shapes tell; `fourier`, whether there are Fourier
    features; and `untold`, those that they do not tell, with their published values.

    Raises:
        ValueError: the names are of no such network.
    """
    parts = _numbered(weights)
    kinds = [_kind(part) for part in parts]
    if None in kinds or "conv" not in kinds or "block" not in kinds:
        i = kinds.index(None) if None in kinds else 0
        raise ValueError(
            f"{OP}: the names must be those of score_sde's NCSN++, DDPM++ or DDPM; those of part "
            f"{i} are {first(parts[i]) or 'missing (resamp_with_conv=False is not supported)'}."
        )

    nf, channels = parts[kinds.index("conv")]["weight"].shape[:2]
    blocks = [i for i, kind in enumerate(kinds) if kind == "block"]
    biggan = not any("NIN_0.W" in parts[i] for i in blocks)
    resampling = [i for i in blocks if _is_square(parts[i]) and "Conv_2.weight" in parts[i]]
    ordinary = [i for i in blocks if i not in resampling]
    levels = 1 + (len(resampling) if biggan else kinds.count("resample")) // 2
    per_level = (len(ordinary) - 2 - levels) // (2 * levels)
    firsts = [ordinary[level * per_level] for level in range(levels)] if per_level > 0 else []
    widths = [len(parts[i]["Conv_0.weight"]) for i in firsts]

    progressive_input = "none"
    if "combine" in kinds:
        progressive_input = "input_skip"
    elif "fir" in kinds or (biggan and "resample" in kinds):
        progressive_input = "residual"
    options = {
        "channels": channels,
        "nf": nf,
        "ch_mult": [width // max(nf, 1) for width in widths],
        "num_res_blocks": per_level,
        "attention": [level for level, i in enumerate(firsts) if kinds[i + 1] == "attention"],
        "conditional": "linear" in kinds,
        "resblock_type": "biggan" if biggan else "ddpm",
        "progressive_input": progressive_input,
        "progressive": "output_skip" if 1 < levels == kinds.count("norm") else "none",
        "fourier": kinds[0] == "fourier",
    }
    if not widths or not nf or any(width % nf or not width for width in widths):
        raise ValueError(
            f"{OP}: the checkpoint's {len(blocks)} residual blocks and {levels} levels, {nf} "
            f"channels wide at first, fit no network of score_sde."
        )
    if progressive_input == "input_skip":
        options["progressive_combine"] = _combination(parts, kinds)
    if options["attention"]:
        options["image_size"] = _ATTENDED << options["attention"][0]
    if not biggan:
        options["groups"] = 32

    options["untold"] = {"skip_rescale": biggan}
    if "fir" in kinds or "resample" in kinds:
        options["fir"] = "fir" in kinds
    else:
        options["untold"]["fir"] = progressive_input != "none"
    return options


def _numbered(weights):
    """The tensors of each part, by its number; {} where it has none."""
    parts: dict[int, dict[str, Tensor]] = {}
    for name, t in weights.items():
        prefix, _, rest = name.partition(".")
        number, _, rest = rest.partition(".")
        if prefix != _PREFIX or not (number.isascii() and number.isdigit()) or len(number) > 6:
            raise ValueError(
                f"{OP}: the names must be those of score_sde's networks, {_PREFIX}.0.* and so on; "
                f"got {name[:80]}."
            )
        parts.setdefault(int(number), {})[rest] = t
    # A file does not say how many there are: no more than it has names, twice for those without.
    last = min(max(parts, default=0), 2 * len(weights))
    return [parts.get(i, {}) for i in range(last + 1)]


def _kind(part):
    """What a part is, by the names of its tensors; None: nothing known."""
    shapes = {name: t.dim() for name, t in part.items()}
    if shapes == {"W": 1}:
        return "fourier"
    if shapes.get("Conv_0.weight") == 4 and "GroupNorm_1.weight" in shapes:
        return "block"
    if "NIN_3.W" in shapes:
        return "attention"
    if "Conv2d_0.weight" in shapes:
        return "fir"
    if shapes.get("Conv_0.weight") == 4:
        return "combine" if part["Conv_0.weight"].shape[-1] == 1 else "resample"
    return {1: "norm", 2: "linear", 4: "conv"}.get(shapes.get("weight"))


def _is_square(part):
    out, channels = part["Conv_0.weight"].shape[:2]
    return out == channels


def _combination(parts, kinds):
    """sum or cat: whether the block after the first combination has twice the channels."""
    i = kinds.index("combine")
    after = next((part for part, kind in zip(parts[i:], kinds[i:]) if kind == "block"), None)
    width = len(parts[i]["Conv_0.weight"])
    doubled = after is not None and after["Conv_0.weight"].shape[1] == 2 * width
    return "cat" if doubled else "sum"
