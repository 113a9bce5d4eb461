"""Read the checkpoints of ermongroup/ncsn, ermongroup/ncsnv2,
AdversarialConsistentScoreMatching (CAS) and yang-song/score_sde_pytorch."""

import inspect
import warnings
from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import nn

from fastscore.models import score_sde
from fastscore.models.checkpoint_files import read
from fastscore.models.ncsn import NCSN
from fastscore.models.ncsnv2 import NCSNv2, NCSNv2Deeper, NCSNv2Deepest
from fastscore.models.refinenet import ladder
from fastscore.models.state_dicts import OP, filled, first, is_state_dict, outline, unwrapped

ARCHITECTURES: dict[str, type[Any]] = {
    "ncsn": NCSN,
    "ncsnv2": NCSNv2,
    "ncsnv2deeper": NCSNv2Deeper,
    "ncsnv2deepest": NCSNv2Deepest,
}
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
    | score_sde: {optimizer, model, ema, step}               | ema, or model if not     |
    | a state_dict, or ema, by itself                       | as they are              |

    What DataParallel (`module.`) and torch.compile (`_orig_mod.`) add to names is dropped. Width,
    channels, levels and depth follow from the shapes, σ from the buffer of NCSNv2. NCSN and CAS
    store no ladder: give theirs. CAS's weights come as a score too, divided by σ (see NCSNv2); with
    scale_by_sigma=False as f. CAS's option `--target dae` trains another function under the same
    names; nothing in the file tells, and it is not supported.

    Of score_sde's networks (NCSN++, DDPM++, DDPM: see NCSNpp) the structure follows from names and
    shapes, and with Fourier features also the process, VE. Without them give sde (ve, vp or subvp)
    and, of vp, continuous; of VP and sub-VP, too, x, σ and the score are those of images in [0, 1].

    Args:
        source: a path, read with torch.load(weights_only=True), or what torch.load returned.
        ema: take the averaged weights, as the official samplers do.
        arch: ncsn, ncsnv2, ncsnv2deeper, ncsnv2deepest or ncsnpp; None follows the names in the
            file.
        hyper_parameters: sigmas (wins over the file's), image_size (of `sample_shape`),
            scale_by_sigma, channels, ngf, nonlinearity, rescaled, logit_transform, std, target: of
            the network; of score_sde's those of NCSNpp.

    Returns:
        The network, on the CPU and in evaluation mode; `net.sigmas` is its ladder. Of a rescaled or
        logit-transformed checkpoint x, σ and the score are those of the transformed data:
        net.to_images(x) makes images of samples.

    Raises:
        ValueError: the file is missing, not readable without unpickling code, or of another layout;
            it has no averaged weights; sigmas are missing or of another number; names or shapes do
            not fit; an option that is not supported, such as spec_norm, other normalisations,
            NCSNdeeper, CAS's UNet, or a progressive output of score_sde that is residual; of
            score_sde, the process is not told.
        TypeError: an unknown hyper-parameter.

    >>> given = {"nonlinearity": "elu", "rescaled": False, "logit_transform": False}
    >>> saved = [{f"module.{name}": t for name, t in NCSN(ngf=4).state_dict().items()}, {}]
    >>> load_official(saved, sigmas=torch.linspace(1, 0.01, 10), **given).begin_conv.weight.shape
    torch.Size([4, 3, 3, 3])
    """
    if arch is not None and arch not in (*ARCHITECTURES, score_sde.ARCH):
        names = ", ".join((*ARCHITECTURES, score_sde.ARCH))
        raise ValueError(f"{OP}: arch must be one of {names}; got {arch!r}.")

    container = read(source) if isinstance(source, (str, PathLike)) else source
    given = {name: value for name, value in hyper_parameters.items() if value is not None}
    of_score_sde = score_sde.recognises(container)
    if arch is not None and of_score_sde != (arch == score_sde.ARCH):
        found = "one" if of_score_sde else "none"
        raise ValueError(
            f"{OP}: arch {score_sde.ARCH} is that of score_sde's checkpoints alone; got {arch} "
            f"and {found} of them."
        )
    if of_score_sde:
        net, taken = score_sde.network(container, ema, given)
        _warn_of_untold(taken)
        return net

    weights, sigmas = _weights(container, ema)
    unsupported = _unsupported(weights)
    if unsupported:
        raise ValueError(f"{OP}: unsupported option {unsupported}.")

    arch = arch or _architecture(weights)
    known = list(inspect.signature(ARCHITECTURES[arch]).parameters)
    if set(given) - set(known):
        unknown = ", ".join(sorted(set(given) - set(known)))
        raise TypeError(
            f"{OP}: the hyper-parameters of {arch} are {', '.join(known)}; got {unknown}."
        )

    stores_ladder = sigmas is not None
    if stores_ladder and (given.get("std") or given.get("target", "gaussian") != "gaussian"):
        raise ValueError(
            f"{OP}: std and target are options of CAS; the checkpoint stores a ladder, so it is "
            "NCSNv2's."
        )

    options = {**_inferred(weights), **given}
    if arch != "ncsn":
        options["dilated"] = not _pooled(weights)

    options["sigmas"] = _ladder(options, sigmas, weights, arch)
    net = filled(ARCHITECTURES[arch], options, weights)
    names = [*_UNSEEN, *_UNSEEN_CAS * (arch != "ncsn" and not stores_ladder)]
    _warn_of_untold({name: getattr(net, name) for name in names if name not in given})
    return net


def _warn_of_untold(taken):
    if taken:
        values = ", ".join(f"{name} ({value})" for name, value in taken.items())
        warnings.warn(
            f"{OP}: the checkpoint does not tell {values}: these values are taken, and "
            "if one of them was another in "
            "its config, the scores are wrong. Give them as arguments.",
            stacklevel=3,
        )


def _weights(container, ema):
    """The chosen {name: tensor} without the names of wrappers and without sigmas, and sigmas or
    None."""
    if isinstance(container, (list, tuple)) and len(container) >= 2:
        state = container[0]
        average = container[4] if len(container) > 4 else None
        if ema and average is None and len(container) > 2:
            raise ValueError(
                f"{OP}: the checkpoint has no averaged weights; pass ema=False to take the others."
            )
        chosen = average if ema and average is not None else state
    else:
        state = chosen = container
    if not (is_state_dict(state) and is_state_dict(chosen)):
        raise ValueError(
            f"{OP}: the checkpoint must be a list [state_dict, optimizer] or [state_dict, "
            f"optimizer, epoch, step, ema], or a dict of tensors; got {outline(container)}."
        )

    state, chosen = (unwrapped(each) for each in (state, chosen))
    sigmas = chosen.pop("sigmas", state.get("sigmas"))
    return chosen, sigmas


def _unsupported(weights):
    """What the names say of an option that no network here has, or None."""
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
        found = first(list(weights))
        raise ValueError(
            f"{OP}: the checkpoint must have begin_conv.weight (ngf, channels, 3, 3); its "
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
            f"{OP}: the checkpoint stores no ladder; pass sigmas, such as the published geometric "
            f"one, {published}."
        )
    if sigmas is None:
        return None

    sigmas = ladder(OP, sigmas)
    if levels and len(sigmas) != levels:
        raise ValueError(
            f"{OP}: sigmas must have the {levels} levels of the checkpoint; got {len(sigmas)}."
        )

    return sigmas
