"""Conditions as a score and a hook: a class, an image of which something is known, or both."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastscore import guidance
from fastscore.cli import run_folder
from fastscore.cli.config import TrainConfig
from fastscore.cli.observations import Observed, Request, observe, parse
from fastscore.cli.parts import digest_of, digest_of_network
from fastscore.guidance.hooks import check_noise

GUIDANCE = ("replace", "flat", "denoiser", "moments")


@dataclass(frozen=True)
class ConditionOptions:
    """Conditions of the command line.

    Args:
        condition: class=K, inpaint=IMAGE,MASK, colourise=IMAGE, super_resolution=IMAGE,FACTOR or
            deblur=IMAGE,SIGMA; a class and an image can be asked for at once. IMAGE is held-out:N
            or data:N of the run's data, degraded here, or a .png, .jpg or .npy file, which is the
            observation; MASK is what is hidden, left-half, right-half, top-half, bottom-half or
            centre, or a file whose black pixels are.
        classifier: run folder of train --task classifier, for class=K.
        scale: of the class likelihood; 1 is Bayes' rule, more gives clearer and less diverse
            samples.
        observation_noise: standard deviation of the noise on the observed image.
        guidance: how an observed image leads the samples, replace (inpaint only), flat, denoiser or
            moments.
    """

    condition: tuple[str, ...] = ()
    classifier: Path | None = None
    scale: float = 1.0
    observation_noise: float = 0.0
    guidance: str = "moments"

    def __post_init__(self) -> None:
        requests = self.requests()
        if not requests:
            if any(getattr(self, name) != default for name, default in _DEFAULTS.items()):
                raise ValueError(
                    "sample: classifier, scale, observation-noise and guidance belong to a "
                    "condition."
                )
            return
        check_noise("condition", self.observation_noise)
        check(requests, self.classifier, self.guidance)

        kinds = {"a class" if request.kind == "class" else "an image" for request in requests}
        for name, kind in _BELONGS_TO.items():
            if kind not in kinds and getattr(self, name) != _DEFAULTS[name]:
                got = " and ".join(kinds)
                raise ValueError(f"condition: {name} belongs to {kind}; got only {got}.")

    def requests(self) -> list[Request]:
        """The conditions, parsed."""
        return [parse(text) for text in self.condition]


_BELONGS_TO = {
    "classifier": "a class",
    "scale": "a class",
    "observation_noise": "an image",
    "guidance": "an image",
}
_DEFAULTS = {name: ConditionOptions.__dataclass_fields__[name].default for name in _BELONGS_TO}


class Condition(NamedTuple):
    """A score under conditions.

    score: as samplers call it. hook: called hook(first_sample), returns a sampler's `project` for
    the batch that begins there, or None. shown: what is written beside the samples, (C, H, W) each:
    the original that was degraded, the observation as a picture, the mask; those that there are.
    depends_on: what the score and the hook depend on, by name, for the record of a job.
    """

    score: Callable
    hook: Callable
    shown: dict[str, Tensor]
    depends_on: dict[str, Any]


def open_conditions(options: ConditionOptions, run: Path) -> dict[str, Any]:
    """The arguments of `conditioned` that the options of the command line stand for.

    Raises:
        ValueError: the classifier's folder holds none, or it knows no such class.
    """
    requests = options.requests()
    classifier = None
    if options.classifier is not None:
        classifier = run_folder.open_run(options.classifier, "classifier").net
        for request in requests:
            if request.kind == "class" and class_number(request) >= classifier.num_classes:
                last = classifier.num_classes - 1
                raise ValueError(f"condition class must be in 0..{last}; got {request.value}.")
    return {
        "requests": requests,
        "config": run_folder.read_config(run)[0] if Path(run).is_dir() else None,
        "classifier": classifier,
        "scale": options.scale,
        "noise": options.observation_noise,
        "guide": options.guidance,
    }


def conditioned(
    net: torch.nn.Module,
    shape: tuple[int, int, int],
    requests: list[Request],
    *,
    config: TrainConfig | None = None,
    classifier: Callable | None = None,
    scale: float = 1.0,
    noise: float = 0.0,
    guide: str = "moments",
    seed: int = 0,
) -> Condition:
    """The score of a network under all conditions at once.

    Args:
        net, shape, config: of a run (`run_folder.open_run`).
        requests: of `observations.parse`; at most one class and one image.
        classifier: called classifier(x, sigma) -> logits, for class.
        scale: of the class likelihood.
        noise: σ_y of the observation.
        guide: of the image, replace (`guidance.inpainting`), or a method of
            `guidance.linear_inverse`.
        seed: of the noise on the observation and of the hook.

    Raises:
        ValueError: as `observe` and the guidance; two conditions of one sort, a class without
            classifier, replace without inpaint.
    """
    check(requests, classifier, guide)
    score = net
    observed = None
    shown = {}
    depends_on = {"condition": [list(request) for request in requests], "scale": scale}
    depends_on |= {"observation_noise": noise, "guidance": guide}

    # The image first: a class is a likelihood on top of what the image leaves open.
    for request in requests:
        if request.kind != "class":
            observed = observe(request, shape, config, noise=noise, seed=seed)
            pictures = (observed.original, observed.picture, observed.mask)
            named = zip(("original", "observation", "mask"), pictures)
            shown = {name: t for name, t in named if t is not None}
            depends_on["observation"] = digest_of(observed.y, *shown.values())
            if guide != "replace":
                operator, y = observed.operator, observed.y
                score = guidance.linear_inverse(score, operator, y, noise, method=guide)
    for request in requests:
        if request.kind == "class":
            if isinstance(classifier, torch.nn.Module):
                classifier = classifier.to(next(net.parameters()).device)
                depends_on["classifier"] = digest_of_network(classifier)
            likelihood = guidance.class_likelihood(classifier, class_number(request))
            score = guidance.posterior(score, likelihood, scale)

    def hook(first_sample):
        return _hook(observed, noise, guide, seed, first_sample)

    return Condition(score, hook, shown, depends_on)


def check(requests: list[Request], classifier: object, guide: str) -> None:
    """What can be said before anything is loaded or computed."""
    classes = [request for request in requests if request.kind == "class"]
    images = [request for request in requests if request.kind != "class"]
    for name, group in (("class", classes), ("image", images)):
        if len(group) > 1:
            kinds = " and ".join(request.kind for request in group)
            raise ValueError(f"condition: at most one {name} can be asked for; got {kinds}.")

    if guide not in GUIDANCE:
        listed = ", ".join(GUIDANCE)
        raise ValueError(f"condition: guidance must be one of {listed}; got {guide!r}.")
    for request in classes:
        class_number(request)
        if classifier is None:
            raise ValueError(
                "condition class needs --classifier RUN, a run of train --task classifier."
            )
    for request in images:
        if guide == "replace" and request.kind != "inpaint":
            raise ValueError(
                f"condition {request.kind}: guidance replace belongs to inpaint; "
                "take flat, denoiser or moments."
            )


def class_number(request: Request) -> int:
    """K of class=K."""
    if not request.value.isdecimal():
        raise ValueError(
            f"condition class must be class=K, K a class number; got {request.value!r}."
        )
    return int(request.value)


def _hook(observed: Observed | None, noise, guide, seed, first_sample):
    if observed is None:
        return None
    if guide == "replace":
        options = {"noise": noise, "seed": seed, "first_sample": first_sample}
        return guidance.inpainting(observed.y, observed.mask, **options)
    return None if noise else guidance.data_consistency(observed.operator, observed.y)
