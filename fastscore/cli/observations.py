"""What `fastscore sample --condition` names: images of which a part, or a degraded copy, is known.

    class=K
    inpaint=IMAGE,MASK
    colourise=IMAGE
    super_resolution=IMAGE,FACTOR
    deblur=IMAGE,SIGMA

IMAGE is held-out:N or data:N, an image of the run's data set, which is degraded here; or a .png,
.jpg or .npy file, which is the observation. What a file does not say is said behind its name, as in
y.npy:channels-first (`fastscore.images`).
"""

from typing import NamedTuple

import numpy as np
import torch

from fastscore import guidance, images, random
from fastscore.cli import splits
from fastscore.cli.config import TrainConfig
from fastscore.guidance.hooks import check_noise

KINDS = {
    "class": "class=K",
    "inpaint": "inpaint=IMAGE,MASK",
    "colourise": "colourise=IMAGE",
    "super_resolution": "super_resolution=IMAGE,FACTOR",
    "deblur": "deblur=IMAGE,SIGMA",
}
_OBSERVATION = 1026   # the stream of the noise on observations that are made here


class Request(NamedTuple):
    """One condition as it was written: its kind, the image's name, and the last word.

    The latter two are None where there are none.
    """

    kind: str
    image: str | None
    value: str | None


class Observed(NamedTuple):
    """An image condition: y = operator(image) + noise, and what there is to show, (C, H, W) each.

    original: the image, if y was made of it. picture: y at the size of a sample. mask: of inpaint,
    bool, True where known.
    """

    operator: guidance.LinearOperator
    y: torch.Tensor
    original: torch.Tensor | None
    picture: torch.Tensor
    mask: torch.Tensor | None


def parse(text: str) -> Request:
    """A `Request` from KIND=VALUE.

    >>> parse("super_resolution=held-out:3,2")
    Request(kind='super_resolution', image='held-out:3', value='2')
    """
    kind, _, value = text.partition("=")
    if kind not in KINDS or not value:
        raise ValueError(f"condition must be one of {', '.join(KINDS.values())}; got {text!r}.")
    if kind == "class":
        return Request(kind, None, value)
    if kind == "colourise":
        return Request(kind, value, None)
    image, comma, last = value.rpartition(",")
    if not (comma and image and last):
        raise ValueError(f"condition {kind} must be {KINDS[kind]}; got {text!r}.")
    return Request(kind, image, last)


def observe(
    request: Request,
    shape: tuple[int, int, int],
    config: TrainConfig | None = None,
    *,
    noise: float = 0.0,
    seed: int = 0,
) -> Observed:
    """The `Observed` of an image condition, for samples of `shape` (C, H, W) of a run.

    Raises:
        ValueError: an image that cannot be had or has another shape, a mask, factor or SIGMA out of
            range, or negative noise.
    """
    check_noise("condition", noise)
    operator, mask = _operator(request, shape)
    image, clean = load_image(request.image, config, noise)

    # A clean image, and one with a hole, is as large as a sample; any other is an observation.
    whole = clean or request.kind == "inpaint"
    wanted = shape if whole else operator.forward(torch.zeros(1, *shape)).shape[1:]
    if image.shape != torch.Size(wanted):
        raise ValueError(
            f"condition {request.kind}: {request.image} must be an image of shape "
            f"{tuple(wanted)}; got {tuple(image.shape)}."
        )

    y = operator.forward(image[None]) if whole else image[None]
    if clean and noise:
        y = y + noise * random.normal(y.shape, seed=seed, stream=_OBSERVATION)
        # Nothing, and no noise, where nothing is known.
        y = operator.forward(y) if request.kind == "inpaint" else y
    picture = _picture(request.kind, operator, y, mask, shape)
    return Observed(operator, y[0], image if clean else None, picture, mask)


def _operator(request, shape):
    """The operator of a condition, and the mask of inpaint."""
    if request.kind == "inpaint":
        mask = load_mask(request.value, shape)
        return guidance.Mask(mask), mask
    if request.kind == "colourise":
        if shape[0] != 3:
            raise ValueError(
                "condition colourise: the run must be of RGB images; its samples are "
                f"{tuple(shape)}."
            )
        return guidance.Grey("luma"), None
    if request.kind == "super_resolution":
        if not request.value.isdecimal() or int(request.value) < 1:
            raise ValueError(
                "condition super_resolution: FACTOR must be an int of at least 1; "
                f"got {request.value!r}."
            )
        return guidance.Downsample(int(request.value)), None
    try:
        sigma = float(request.value)
    except ValueError:
        raise ValueError(
            f"condition deblur: SIGMA must be a number; got {request.value!r}."
        ) from None
    # The kernel must fit into the image.
    largest = (min(shape[1:]) - 1) // 2
    radius = len(guidance.gaussian_kernel(sigma)) // 2
    return guidance.Blur(guidance.gaussian_kernel(sigma, min(radius, largest))), None


def _picture(kind, operator, y, mask, shape):
    """The observation at the size of a sample: hidden pixels grey, large pixels, grey images."""
    if kind == "inpaint":
        return torch.where(mask, y[0], 0.5)
    if kind == "super_resolution":
        return operator.adjoint(y)[0] / operator.gram
    return y[0].expand(shape)


def load_mask(source: str, shape: tuple[int, int, int]) -> torch.Tensor:
    """bool (C, H, W), True where known.

    Args:
        source: what is hidden, left-half, right-half, top-half, bottom-half or centre; or a .png,
            .jpg or .npy file, whose black pixels (below half of white) are hidden: of one channel,
            of C, or of three alike.
    """
    channels, h, w = shape
    known = torch.ones(shape, dtype=torch.bool)
    parts = {
        "left-half": np.s_[:, :, : w // 2],
        "right-half": np.s_[:, :, w // 2 :],
        "top-half": np.s_[:, : h // 2],
        "bottom-half": np.s_[:, h // 2 :],
        "centre": np.s_[:, h // 4 : h - h // 4, w // 4 : w - w // 4],
    }
    if source in parts:
        known[parts[source]] = False
        return known
    if not _is_file_name(source):
        raise ValueError(
            f"condition inpaint: MASK must be {', '.join(parts)}, or a .png, .jpg or .npy file; "
            f"got {source!r}."
        )

    mask = _from_file(images.read_mask, source)
    if mask.shape[1:] != (h, w):
        raise ValueError(
            f"condition inpaint: {source} must be a mask of {(h, w)} pixels; "
            f"got {tuple(mask.shape[1:])}."
        )
    if len(mask) not in (1, 3, channels):
        raise ValueError(
            f"condition inpaint: {source} must be a mask of 1 or {channels} channels; "
            f"got {len(mask)}."
        )
    if len(mask) != channels and not bool((mask == mask[:1]).all()):
        raise ValueError(
            f"condition inpaint: {source} hides other pixels in each colour; the run's images have "
            f"{channels} channels."
        )
    return (mask if len(mask) == channels else mask[:1]).expand(shape).clone()


def load_image(
    source: str, config: TrainConfig | None, noise: float = 0.0
) -> tuple[torch.Tensor, bool]:
    """(image (C, H, W), whether it is a clean image of the data set).

    A file's values lie in [0, 1], or as far outside as noise of this standard deviation explains:
    ten of them.
    """
    name, colon, number = source.partition(":")
    if colon and name in ("held-out", "data"):
        if config is None:
            raise ValueError(
                f"condition: {source} needs a run folder; a checkpoint names no data set."
            )
        if not number.isdecimal():
            raise ValueError(
                f"condition: {name}:N must name an image by its number; got {source!r}."
            )
        every = splits.source(config)
        if name == "held-out":
            every = every.subset(splits.split(config, every)[1])
        if int(number) >= len(every):
            remedy = " (train --held-out 300)" if name == "held-out" and not len(every) else ""
            raise ValueError(
                f"condition: {source} is not there; the run has {len(every)} {name} images{remedy}."
            )
        return every.read(torch.tensor([int(number)]))[0], True
    if not _is_file_name(source):
        raise ValueError(
            "condition: IMAGE must be held-out:N, data:N or a .png, .jpg or .npy file; "
            f"got {source!r}."
        )
    return _from_file(images.read, source, slack=10 * noise + 1e-3), False


def _is_file_name(source):
    return images.parse(source)[0].suffix.lower() in (*images.PICTURES, ".npy")


def _from_file(read, source, **options):
    try:
        return torch.from_numpy(read(source, **options))
    except ValueError as error:
        raise ValueError(f"condition: {error}") from None
