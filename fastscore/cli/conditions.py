"""Conditions as a score and a hook: a class, an image of which something is known, or both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastscore import guidance
from fastscore.cli import contexts, run_folder
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
            deblur=IMAGE,SIGMA; a class and an image can be asked for at once. K is a class, several
            with commas between, to which the samples are given evenly and in order, all, or none (a
            run that knows classes draws them all unless told otherwise). IMAGE is held-out:N
            or data:N of the run's data, degraded here, or a .png, .jpg or .npy file, which is the
            observation; MASK is what is hidden, left-half, right-half, top-half, bottom-half or
            centre, or a file whose black pixels are.
        classifier: run folder of train --task classifier, for class=K of a run that knows no
            classes.
        scale: of the class likelihood of a classifier; 1 is Bayes' rule, more gives clearer and
            less diverse samples.
        context: of a run that knows contexts, v1,v2,... or an .npy file, (C,) or one for each
            sample, (n, C).
        weight: of the guidance by a run that knows classes or contexts, to p(x) p(class | x)^(1 +
            weight): 0 is the class itself, more gives clearer and less diverse samples; 1 unless
            given, and 0 for contexts.
        observation_noise: standard deviation of the noise on the observed image.
        guidance: how an observed image leads the samples, replace (inpaint only), flat, denoiser or
            moments.
    """

    condition: tuple[str, ...] = ()
    classifier: Path | None = None
    scale: float = 1.0
    context: str | None = None
    weight: float | None = None
    observation_noise: float = 0.0
    guidance: str = "moments"

    def __post_init__(self) -> None:
        requests = self.requests()
        if not requests:
            # A weight alone is of all classes.
            named = [item for item in _DEFAULTS.items() if item[0] != "weight"]
            if any(getattr(self, name) != default for name, default in named):
                raise ValueError(
                    "sample: classifier, scale, observation-noise and guidance belong to a "
                    "condition."
                )
            return
        check_noise("condition", self.observation_noise)
        check(requests, self.guidance)

        kinds = {"a class" if request.kind == "class" else "an image" for request in requests}
        for name, kind in _BELONGS_TO.items():
            if name == "weight" and self.context is not None:
                continue
            if kind not in kinds and getattr(self, name) != _DEFAULTS[name]:
                got = " and ".join(kinds)
                raise ValueError(f"condition: {name} belongs to {kind}; got only {got}.")
        if self.classifier is not None and self.weight != _DEFAULTS["weight"]:
            raise ValueError(
                "condition: weight is of a run that knows classes; a classifier has scale."
            )

    def requests(self) -> list[Request]:
        """The conditions, parsed."""
        return [parse(text) for text in self.condition]


_BELONGS_TO = {
    "classifier": "a class",
    "scale": "a class",
    "weight": "a class",
    "observation_noise": "an image",
    "guidance": "an image",
}
_DEFAULTS = {name: ConditionOptions.__dataclass_fields__[name].default for name in _BELONGS_TO}


class Condition(NamedTuple):
    """A score under conditions.

    score: called score(start, end), returns the score of these samples, counted within the job, as
    samplers call it. hook: called hook(first_sample), returns a sampler's `project` for
    the batch that begins there, or None. shown: what is written beside the samples, (C, H, W) each:
    the original that was degraded, the observation as a picture, the mask; those that there are.
    depends_on: what the score and the hook depend on, by name, for the record of a job.
    """

    score: Callable
    hook: Callable
    shown: dict[str, Tensor]
    depends_on: dict[str, Any]


def of_all_classes(options: ConditionOptions, net: torch.nn.Module) -> ConditionOptions:
    """The same, and all classes in order where nothing is asked of a network that knows classes.

    Raises:
        ValueError: a weight without classes.
    """
    if getattr(net, "num_classes", None):
        return options if options.condition else replace(options, condition=("class=all",))
    if options.weight is not None and not options.condition and options.context is None:
        raise ValueError(
            "sample: weight is of a run that knows classes (train --network unet on images with "
            "labels) or is told a context; this one knows none."
        )
    return options


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
            if request.kind == "class":
                class_numbers(request, classifier.num_classes)
    return {
        "requests": requests,
        "config": run_folder.read_config(run)[0] if Path(run).is_dir() else None,
        "classifier": classifier,
        "scale": options.scale,
        "weight": options.weight,
        "context": None if options.context is None else contexts.parse(options.context),
        "noise": options.observation_noise,
        "guide": options.guidance,
    }


def conditioned(
    net: torch.nn.Module,
    shape: tuple[int, int, int],
    requests: Sequence[Request] = (),
    *,
    n: int,
    config: TrainConfig | None = None,
    classifier: Callable | None = None,
    scale: float = 1.0,
    labels: int | Sequence[int] | Tensor | None = None,
    context: Tensor | None = None,
    weight: float | None = None,
    noise: float = 0.0,
    guide: str = "moments",
    seed: int = 0,
) -> Condition:
    """The score of a network under all conditions at once.

    Args:
        net, shape, config: of a run (`run_folder.open_run`).
        requests: of `observations.parse`; at most one class and one image.
        n: number of samples of the job.
        classifier: called classifier(x, sigma) -> logits, for classes that the network does not
            know.
        scale: of the class likelihood.
        labels: in place of a request for classes: one for all samples or one for each, (n,).
        context: for a network that knows contexts, (C,) for all samples or (n, C).
        weight: of classifier-free guidance, for what the network knows; unless given 1 for classes
            and 0 for contexts.
        noise: σ_y of the observation.
        guide: of the image, replace (`guidance.inpainting`), or a method of
            `guidance.linear_inverse`.
        seed: of the noise on the observation and of the hook.

    Raises:
        ValueError: as `observe` and the guidance; two conditions of one sort, a class that nobody
            knows, replace without inpaint.
    """
    check(requests, guide)
    observed = None
    shown = {}
    depends_on = {"condition": [list(request) for request in requests], "scale": scale}
    depends_on |= {"observation_noise": noise, "guidance": guide}
    device = next(net.parameters()).device

    for request in requests:
        if request.kind != "class":
            observed = observe(request, shape, config, noise=noise, seed=seed)
            pictures = (observed.original, observed.picture, observed.mask)
            named = zip(("original", "observation", "mask"), pictures)
            shown = {name: t for name, t in named if t is not None}
            depends_on["observation"] = digest_of(observed.y, *shown.values())

    asked = [request for request in requests if request.kind == "class"]
    known = getattr(net if classifier is None else classifier, "num_classes", None)
    if classifier is None and known is None and (asked or labels is not None):
        raise ValueError(
            "condition class needs --classifier RUN, a run of train --task classifier, or a run "
            "that knows classes (train --network unet on images with labels)."
        )
    if asked and labels is None and asked[0].value != "none":
        labels = spread(class_numbers(asked[0], known), n)
    labels = None if labels is None else _labels(labels, n, known).to(device)
    if isinstance(classifier, torch.nn.Module) and labels is not None:
        classifier = classifier.to(device)
        depends_on["classifier"] = digest_of_network(classifier)
    context = None if context is None else _context(context, n, net).to(device)
    if weight is None:
        weight = 0.0 if labels is None else 1.0
    guided = {"labels": None if classifier is not None else labels, "context": context}
    guided = {name: t for name, t in guided.items() if t is not None}
    if guided:
        depends_on |= {name: digest_of(t) for name, t in guided.items()} | {"weight": weight}

    def score(start, end):
        score = net
        own = {name.removesuffix("s"): t[start:end] for name, t in guided.items()}
        if own:
            score = guidance.classifier_free(net, **own, weight=weight)
        # The image first: a class is a likelihood on top of what the image leaves open.
        if observed is not None and guide != "replace":
            operator, y = observed.operator, observed.y
            score = guidance.linear_inverse(score, operator, y, noise, method=guide)
        if labels is not None and classifier is not None:
            likelihood = guidance.class_likelihood(classifier, labels[start:end])
            score = guidance.posterior(score, likelihood, scale)
        return score

    def hook(first_sample):
        return _hook(observed, noise, guide, seed, first_sample)

    return Condition(score, hook, shown, depends_on)


def check(requests: Sequence[Request], guide: str) -> None:
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
        class_numbers(request)
    for request in images:
        if guide == "replace" and request.kind != "inpaint":
            raise ValueError(
                f"condition {request.kind}: guidance replace belongs to inpaint; "
                "take flat, denoiser or moments."
            )


def class_numbers(request: Request, known: int | None = None) -> list[int]:
    """The classes of class=K; none of class=none.

    known: how many there are, where that is known.
    """
    if request.value == "none":
        return []
    if request.value == "all":
        return list(range(known or 0))
    words = request.value.split(",")
    if not all(word.isdecimal() for word in words):
        raise ValueError(
            "condition class must be class=K, several with commas between, all or none, K a class "
            f"number; got {request.value!r}."
        )
    numbers = [int(word) for word in words]
    if known is not None and max(numbers) >= known:
        raise ValueError(f"condition class must be in 0..{known - 1}; got {max(numbers)}.")
    return numbers


def spread(classes: Sequence[int], n: int) -> Tensor:
    """n labels, of each class as many, in the order of the classes; int64 (n,).

    >>> spread([3, 5], 5)
    tensor([3, 3, 3, 5, 5])
    """
    if not classes:
        raise ValueError("condition class=all needs a classifier that says its num_classes.")
    return torch.tensor(classes)[torch.arange(n) * len(classes) // n]


def _labels(labels, n, known):
    labels = torch.as_tensor(labels)
    if labels.dim() == 0:
        labels = labels.expand(n)
    if labels.dtype not in (torch.int64, torch.int32) or labels.shape != (n,):
        raise ValueError(
            f"condition: labels must be a class number, or int64 ({n},); got {labels.dtype} "
            f"{tuple(labels.shape)}."
        )
    if known is not None and not bool(((labels >= -1) & (labels < known)).all()):
        worst = int(labels.min() if labels.min() < -1 else labels.max())
        raise ValueError(f"condition: labels must be in -1..{known - 1}; got {worst}.")
    return labels.to(torch.int64)


def _context(context, n, net):
    """(n, C)."""
    length = getattr(net, "context_size", None)
    if length is None:
        raise ValueError(
            "condition: context needs a run that knows contexts (train on an .npz with an array "
            "named context)."
        )
    if context.dim() not in (1, 2) or context.shape[-1] != length or (
        context.dim() == 2 and len(context) != n
    ):
        raise ValueError(
            f"condition: context must be ({length},) or ({n}, {length}); "
            f"got {tuple(context.shape)}."
        )
    return context.expand(n, length)


def _hook(observed: Observed | None, noise, guide, seed, first_sample):
    if observed is None:
        return None
    if guide == "replace":
        options = {"noise": noise, "seed": seed, "first_sample": first_sample}
        return guidance.inpainting(observed.y, observed.mask, **options)
    return None if noise else guidance.data_consistency(observed.operator, observed.y)
