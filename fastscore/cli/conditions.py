"""Draw samples under the conditions of `fastscore sample --condition`: a class, an image of which something is known, or both."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastscore import distributed, guidance, random, sampling
from fastscore.cli import drawing, pictures, runs
from fastscore.cli.observations import Request, observe, parse
from fastscore.guidance.hooks import check_noise

WAYS = ("replace", "flat", "denoiser", "moments")


class Result(NamedTuple):
    """What `draw` returns: the image that was degraded, the observation as a picture, the mask, (C, H, W) or None each; and the samples."""

    original: torch.Tensor | None
    observation: torch.Tensor | None
    mask: torch.Tensor | None
    samples: torch.Tensor


@dataclass(frozen=True)
class ConditionOptions:
    """Conditions of the command line.

    Args:
        condition: class=K, inpaint=IMAGE,MASK, colourise=IMAGE, super_resolution=IMAGE,FACTOR or deblur=IMAGE,SIGMA; a class and an image
            can be asked for at once. IMAGE is held-out:N or data:N of the run's data, degraded here, or a .png, .jpg or .npy file,
            which is the observation; MASK is what is hidden, left-half, right-half, top-half, bottom-half or centre, or a file
            whose black pixels are.
        classifier: run folder of train --task classifier, for class=K.
        scale: of the class likelihood; 1 is Bayes' rule, more gives clearer and less diverse samples.
        observation_noise: standard deviation of the noise on the observed image.
        guidance: how an observed image leads the samples, replace (inpaint only), flat, denoiser or moments.
    """

    condition: tuple[str, ...] = ()
    classifier: Path | None = None
    scale: float = 1.0
    observation_noise: float = 0.0
    guidance: str = "moments"


UNCONDITIONAL = ConditionOptions()


def prepare(run, asked):
    """The arguments of `draw` for the conditions of the command line, checked before anything is computed; {} where there are none."""
    if not asked.condition:
        if asked != UNCONDITIONAL:
            raise ValueError("sample: classifier, scale, observation-noise and guidance belong to a condition.")
        return {}
    requests = [parse(text) for text in asked.condition]
    check_noise("condition", asked.observation_noise)
    check(requests, asked.classifier, asked.guidance)
    _refuse_unused(requests, asked)
    config = runs.read_config(run)[0] if Path(run).is_dir() else None
    classifier = None if asked.classifier is None else _classifier(asked.classifier, requests)
    options = {"scale": asked.scale, "noise": asked.observation_noise, "guide": asked.guidance}
    return {"requests": requests, "config": config, "classifier": classifier, **options}


def _refuse_unused(requests, asked):
    """An option that no condition looks at."""
    default, kinds = ConditionOptions(), {"a class" if r.kind == "class" else "an image" for r in requests}
    for name, kind in (("classifier", "a class"), ("scale", "a class"), ("observation_noise", "an image"), ("guidance", "an image")):
        if kind not in kinds and getattr(asked, name) != getattr(default, name):
            raise ValueError(f"condition: {name} belongs to {kind}; got only {' and '.join(kinds)}.")


def _classifier(folder, requests):
    from fastscore.cli import classifier_training

    net = classifier_training.open_classifier(folder)[0]
    for request in requests:
        if request.kind == "class" and class_number(request) >= net.num_classes:
            raise ValueError(f"condition class must be in 0..{net.num_classes - 1}; got {request.value}.")
    return net


def described(result):
    """What the file holds beside the samples."""
    shown = [name for name in ("original", "observation", "mask") if getattr(result, name) is not None]
    return f"first the {', '.join(shown)}" if shown else "of the class"


def save(out, result):
    """Write a `Result`: as .png the original, the observation, the mask and the samples in one grid, as .npz the arrays of these names."""
    parts = {name: t for name, t in result._asdict().items() if t is not None}
    if Path(out).suffix == ".npz":
        np.savez(out, **{name if name != "samples" else "images": t.float().clamp(0, 1).numpy() for name, t in parts.items()})
    else:
        shown = [t.float()[None] for name, t in parts.items() if name != "samples"]
        pictures.save_grid(out, torch.cat([*shown, result.samples]))


def draw(
    net, sigmas, shape, requests, n, *, config=None, classifier=None, scale=1.0, noise=0.0, guide="moments", seed=0, first_sample=0,
    batch_size=500, done=None, sampler="annealed_langevin", **options,
):  # fmt: skip
    """Draw n samples under all conditions at once; returns a `Result`.

    Args:
        net, sigmas, shape, config: of a run (`runs.open_run`). requests: of `parse`; at most one class and one image.
        classifier: called classifier(x, sigma) -> logits, for class. scale: of the class likelihood.
        noise: σ_y of the observation. guide: of the image, replace (`guidance.inpainting`), or a method of `guidance.linear_inverse`.
        The rest as in `drawing.draw_from`.

    Raises:
        ValueError: as `observe` and the guidance; two conditions of one sort, a class without classifier, replace without inpaint.
    """
    check(requests, classifier, guide)
    drawing.check_batches(n, batch_size)
    seed = random.draw_seed() if seed is None else seed   # one for the observation, the hook and all batches
    score, observed, device = net, None, next(net.parameters()).device
    classifier = classifier.to(device) if isinstance(classifier, torch.nn.Module) else classifier
    for request in requests:
        if request.kind != "class":
            observed = observe(request, shape, config, noise=noise, seed=seed)
            if guide != "replace":
                score = guidance.linear_inverse(score, observed.operator, observed.y, noise, method=guide)
    for request in requests:
        if request.kind == "class":
            score = guidance.posterior(score, guidance.class_likelihood(classifier, class_number(request)), scale)
    given, parts = drawing.arguments(sampler, sigmas, options), []
    for start in range(first_sample, first_sample + n, batch_size):
        m = min(batch_size, first_sample + n - start)
        hook = _hook(observed, noise, guide, seed, start)
        for state in sampling.states(score, shape=(m, *shape), seed=seed, first_sample=start, project=hook, device=device, **given):
            x = state.x
            if done is not None:
                done(1)
        parts.append(x.cpu())
    known = (None, None, None) if observed is None else (observed.original, observed.picture, observed.mask)
    return Result(*known, torch.cat(parts))


def draw_shared(net, sigmas, shape, requests, n, *, first_sample=0, **options):
    """`draw` with the samples split over the processes of torchrun: its result on rank 0, None on the others."""
    first, count = distributed.share(n)
    result = draw(net, sigmas, shape, requests, count, first_sample=first_sample + first, **options) if count else None
    samples = distributed.gather(result.samples if count else torch.empty((0, *shape)), n)
    return None if samples is None else result._replace(samples=samples)


def classes_as_asked(folder, classifier_folder, *, per_class=50, scale=1.0, seed=0, **options):
    """Draw samples of each class, and return the fraction in which the classifier of `evaluation` sees it, for each class.

    Args:
        folder, classifier_folder: runs of one data set. per_class, scale, seed, options: as in `draw`.
    """
    from fastscore.cli import classifier_training, evaluation

    net, sigmas, shape, config = runs.open_run(folder)
    classifier = classifier_training.open_classifier(classifier_folder)[0]
    options |= {"config": config, "classifier": classifier, "scale": scale, "seed": seed}
    draws = []
    for k in range(classifier.num_classes):
        draws.append(draw(net, sigmas, shape, [Request("class", None, str(k))], per_class, first_sample=k * per_class, **options).samples)
    asked = torch.arange(classifier.num_classes).repeat_interleave(per_class)
    right = evaluation.seen(evaluation.reader(*classifier_training.training_images(config)), torch.cat(draws)) == asked
    return right.double().reshape(-1, per_class).mean(1).tolist()


def check(requests, classifier, guide):
    """What can be said before anything is loaded or computed."""
    for name, group in (("class", [r for r in requests if r.kind == "class"]), ("image", [r for r in requests if r.kind != "class"])):
        if len(group) > 1:
            raise ValueError(f"condition: at most one {name} can be asked for; got {' and '.join(r.kind for r in group)}.")
    if guide not in WAYS:
        raise ValueError(f"condition: guidance must be one of {', '.join(WAYS)}; got {guide!r}.")
    for request in requests:
        if request.kind == "class":
            class_number(request)
            if classifier is None:
                raise ValueError("condition class needs --classifier RUN, a run of train --task classifier.")
        elif guide == "replace" and request.kind != "inpaint":
            raise ValueError(f"condition {request.kind}: guidance replace belongs to inpaint; take flat, denoiser or moments.")


def class_number(request):
    if not request.value.isdecimal():
        raise ValueError(f"condition class must be class=K, K a class number; got {request.value!r}.")
    return int(request.value)


def _hook(observed, noise, guide, seed, first_sample):
    if observed is None:
        return None
    if guide == "replace":
        return guidance.inpainting(observed.y, observed.mask, noise=noise, seed=seed, first_sample=first_sample)
    return None if noise else guidance.data_consistency(observed.operator, observed.y)
