"""Read the checkpoints of ermongroup/ncsn, ermongroup/ncsnv2 and
AdversarialConsistentScoreMatching (CAS)."""

import inspect
import warnings
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import nn

from fastscore.models.ncsn import NCSN
from fastscore.models.ncsnv2 import NCSNv2, NCSNv2Deeper, NCSNv2Deepest
from fastscore.models.refinenet import ladder

ARCHITECTURES: dict[str, type[Any]] = {
    "ncsn": NCSN,
    "ncsnv2": NCSNv2,
    "ncsnv2deeper": NCSNv2Deeper,
    "ncsnv2deepest": NCSNv2Deepest,
}
_OP = "load_official"
# Options of all repositories that leave no trace in the file.
_UNSEEN = ("nonlinearity", "rescaled", "logit_transform")
_UNSEEN_CAS = ("std", "target")   # and of CAS


def load_official(
    source: str | PathLike[str] | list[Any] | tuple[Any, ...] | Mapping[str, Any],
    *,
    ema: bool = True,
    arch: str | None = None,
    **hyper_parameters: Any,
) -> nn.Module:
    """Build an official network around the weights of a checkpoint.

    | layout of the file                                    | weights                  |
    |-------------------------------------------------------|--------------------------|
    | NCSN: [state_dict, optimizer]                         | it has only one kind     |
    | NCSNv2, CAS: [state_dict, optimizer, epoch, step, ema] | ema, or state_dict if not |
    | a state_dict, or ema, by itself                       | as they are              |

    What DataParallel (`module.`) and torch.compile (`_orig_mod.`) add to names is dropped. Width,
    channels, levels and depth follow from the shapes, σ from the buffer of NCSNv2. NCSN and CAS
    store no ladder: give theirs. CAS's weights come as a score too, divided by σ (see NCSNv2); with
    scale_by_sigma=False as f. CAS's option `--target dae` trains another function under the same
    names; nothing in the file tells, and it is not supported.

    Args:
        source: a path, read with torch.load(weights_only=True), or what torch.load returned.
        ema: take the averaged weights, as the official samplers do.
        arch: ncsn, ncsnv2, ncsnv2deeper or ncsnv2deepest; None follows the names in the file.
        hyper_parameters: sigmas (wins over the file's), image_size (of `sample_shape`),
            scale_by_sigma, channels, ngf, nonlinearity, rescaled, logit_transform, std, target: of
            the network.

    Returns:
        The network, on the CPU and in evaluation mode; `net.sigmas` is its ladder. Of a rescaled or
        logit-transformed checkpoint x, σ and the score are those of the transformed data:
        net.to_images(x) makes images of samples.

    Raises:
        ValueError: the file is missing, not readable without unpickling code, or of another layout;
            it has no averaged weights; sigmas are missing or of another number; names or shapes do
            not fit; an option that is not supported, such as spec_norm, other normalisations,
            NCSNdeeper, CAS's UNet, or networks of score_sde.
        TypeError: an unknown hyper-parameter.

    >>> given = {"nonlinearity": "elu", "rescaled": False, "logit_transform": False}
    >>> saved = [{f"module.{name}": t for name, t in NCSN(ngf=4).state_dict().items()}, {}]
    >>> load_official(saved, sigmas=torch.linspace(1, 0.01, 10), **given).begin_conv.weight.shape
    torch.Size([4, 3, 3, 3])
    """
    if arch is not None and arch not in ARCHITECTURES:
        raise ValueError(f"{_OP}: arch must be one of {', '.join(ARCHITECTURES)}; got {arch!r}.")

    weights, sigmas = _weights(
        _read(source) if isinstance(source, (str, PathLike)) else source, ema
    )
    unsupported = _unsupported(weights)
    if unsupported:
        raise ValueError(f"{_OP}: unsupported option {unsupported}.")

    arch = arch or _architecture(weights)
    known = list(inspect.signature(ARCHITECTURES[arch]).parameters)
    given = {name: value for name, value in hyper_parameters.items() if value is not None}
    if set(given) - set(known):
        unknown = ", ".join(sorted(set(given) - set(known)))
        raise TypeError(
            f"{_OP}: the hyper-parameters of {arch} are {', '.join(known)}; got {unknown}."
        )

    stores_ladder = sigmas is not None
    if stores_ladder and (given.get("std") or given.get("target", "gaussian") != "gaussian"):
        raise ValueError(
            f"{_OP}: std and target are options of CAS; the checkpoint stores a ladder, so it is "
            "NCSNv2's."
        )

    options = {**_inferred(weights), **given}
    if arch != "ncsn":
        options["dilated"] = not _pooled(weights)

    options["sigmas"] = _ladder(options, sigmas, weights, arch)
    # The initial values are thrown away, and so are their random numbers.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        net = ARCHITECTURES[arch](**options)

    _check_fit(net, weights)
    net.load_state_dict(
        {**weights, **({"sigmas": net.sigmas} if "sigmas" in net.state_dict() else {})}
    )
    _warn_of_unseen([*_UNSEEN, *_UNSEEN_CAS * (arch != "ncsn" and not stores_ladder)], given, net)
    return net.eval()


def _warn_of_unseen(names, given, net):
    taken = [f"{name} ({getattr(net, name)})" for name in names if name not in given]
    if taken:
        warnings.warn(
            f"{_OP}: the checkpoint does not tell {', '.join(taken)}: these values are taken, and "
            "if one of them was another in "
            "its config, the scores are wrong. Give them as arguments.",
            stacklevel=3,
        )


def _read(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{_OP}: {path} cannot be read: {error.strerror or error}.") from None
    except Exception:  # foreign classes raise UnpicklingError, damaged files almost anything
        raise ValueError(
            f"{_OP}: {path} is damaged, or no checkpoint of tensors alone (weights_only=True "
            "refuses it)."
        ) from None


def _weights(container, ema):
    """The chosen {name: tensor} without the names of wrappers and without sigmas, and sigmas or
    None."""
    if isinstance(container, (list, tuple)) and len(container) >= 2:
        state = container[0]
        average = container[4] if len(container) > 4 else None
        if ema and average is None and len(container) > 2:
            raise ValueError(
                f"{_OP}: the checkpoint has no averaged weights; pass ema=False to take the others."
            )
        chosen = average if ema and average is not None else state
    else:
        state = chosen = container
    if isinstance(container, Mapping) and {"model", "ema"} <= set(container):
        raise ValueError(
            f"{_OP}: score_sde's checkpoints are not supported; diffusers has its NCSN++ networks "
            "(google/ncsnpp-*), "
            "which interop.VeUNet makes a score."
        )
    if not (_is_state_dict(state) and _is_state_dict(chosen)):
        raise ValueError(
            f"{_OP}: the checkpoint must be a list [state_dict, optimizer] or [state_dict, "
            f"optimizer, epoch, step, ema], or a dict of tensors; got {_outline(container)}."
        )

    state, chosen = (_unwrapped(each) for each in (state, chosen))
    sigmas = chosen.pop("sigmas", state.get("sigmas"))
    return chosen, sigmas


def _unwrapped(state):
    """{name: tensor} without what the wrappers around a network, or around its parts, add to the
    names."""
    found = {}
    for name, t in state.items():
        plain = ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))
        if plain in found:
            raise ValueError(
                f"{_OP}: the checkpoint must hold one network; it has {plain} twice, under "
                "different prefixes."
            )
        found[plain] = t
    return found


def _is_state_dict(t):
    return (
        isinstance(t, Mapping)
        and bool(t)
        and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in t.items())
    )


def _outline(container):
    if isinstance(container, (list, tuple)):
        kinds = ", ".join(type(entry).__name__ for entry in container[:6]) or "nothing"
        return f"a {type(container).__name__} of {kinds}"
    if isinstance(container, Mapping):
        return f"a dict with {', '.join(map(repr, list(container)[:3])) or 'nothing'}"
    return f"a {type(container).__name__}"


def _unsupported(weights):
    """What the names say of an option that no network here has, or None."""
    if any(name.startswith("all_modules.") for name in weights):
        return (
            "model of score_sde: diffusers has its NCSN++ networks (google/ncsnpp-*), "
            "which interop.VeUNet makes a score"
        )
    if any(name.startswith("downblocks.") for name in weights):
        return "unet of CAS: its UNet is not supported, only its NCSNv2 networks are"
    if any(name.endswith(".weight_orig") for name in weights):
        return "spec_norm: the weights are those of spectral normalisation"
    if "begin_conv.weight" not in weights:
        return None

    table = weights.get("normalizer.embed.weight")
    ngf = len(weights["begin_conv.weight"])
    # One missing name is a damaged file; a norm whose last layer has no γ is another norm.
    if table is None and not {"normalizer.gamma", "res1.0.normalize1.gamma"} & set(weights):
        return "normalization: the norms are not InstanceNorm++"
    if table is not None and (table.dim() != 2 or table.shape[1] != 3 * ngf):
        return "normalization: the norms are not InstanceNorm++"
    if table is not None and any(name.startswith("res5.") for name in weights):
        return "model NCSNdeeper: it is a conditional network of five stages"
    if table is None and any(
        name.startswith("refine1.adapt_convs.0.1_1_norm.") for name in weights
    ):
        return "model RefineNetDilated: it is the baseline of one noise level"
    if any(name.endswith(".conv2.conv.1.weight") for name in weights):
        return "--no_dilation with images of 28 pixels, which it pads"

    return None


def _pooled(weights):
    """Whether the last stage halves the sides, as with --no_dilation, where it is dilated
    otherwise."""
    last = "res5" if any(name.startswith("res5.") for name in weights) else "res4"
    return f"{last}.0.conv2.conv.weight" in weights


def _architecture(weights):
    if "normalizer.embed.weight" in weights:
        return "ncsn"
    if any(name.startswith("res31.") for name in weights):
        return "ncsnv2deepest"
    return "ncsnv2deeper" if any(name.startswith("res5.") for name in weights) else "ncsnv2"


def _inferred(weights):
    begin = weights.get("begin_conv.weight")
    if begin is None or begin.dim() != 4:
        found = _first(list(weights))
        raise ValueError(
            f"{_OP}: the checkpoint must have begin_conv.weight (ngf, channels, 3, 3); its "
            f"{len(weights)} names are {found}."
        )
    return {"ngf": begin.shape[0], "channels": begin.shape[1]}


def _ladder(options, sigmas, weights, arch):
    sigmas = options.get("sigmas", sigmas)
    table = weights.get("normalizer.embed.weight") if arch == "ncsn" else None
    levels = None if table is None else len(table)
    if sigmas is None and options.get("scale_by_sigma", True):
        published = "sigma_max={:g}, sigma_min={:g}, levels={}".format(
            *ARCHITECTURES[arch].published
        )
        raise ValueError(
            f"{_OP}: the checkpoint stores no ladder; pass sigmas, such as the published geometric "
            f"one, {published}."
        )
    if sigmas is None:
        return None

    sigmas = ladder(_OP, sigmas)
    if levels and len(sigmas) != levels:
        raise ValueError(
            f"{_OP}: sigmas must have the {levels} levels of the checkpoint; got {len(sigmas)}."
        )

    return sigmas


def _check_fit(net, weights):
    wanted, got = (
        {name: tuple(t.shape) for name, t in each.items() if name != "sigmas"}
        for each in (net.state_dict(), weights)
    )
    problems = {
        "missing": [name for name in wanted if name not in got],
        "unexpected": [name for name in got if name not in wanted],
        "misshapen": [
            f"{name} {got[name]} for {shape}"
            for name, shape in wanted.items()
            if got.get(name, shape) != shape
        ],
    }
    found = [f"{len(names)} {kind} ({_first(names)})" for kind, names in problems.items() if names]
    if found:
        raise ValueError(
            f"{_OP}: the checkpoint does not fit {type(net).__name__}: {'; '.join(found)}."
        )


def _first(names, n=3):
    return ", ".join(names[:n]) + (", ..." if len(names) > n else "")
