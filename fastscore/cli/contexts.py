"""Context vectors: of a training, the array `context` of an .npz; of samples, numbers or a file."""

import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastscore import images
from fastscore.cli.config import TrainConfig
from fastscore.datasets import Source
from fastscore.datasets.arrays import Archive


def attached(data: Source, config: TrainConfig) -> Source:
    """The same samples, whose labels are their contexts, float32 (N, C), where the file has any.

    Raises:
        ValueError: they are no (N, C) of finite numbers, or as many as were asked for.
    """
    found = None if _unwanted(config) else _of_file(images.parse(str(config.data))[0], len(data))
    if found is None:
        if config.context:
            raise ValueError(
                f"train: context needs an .npz with an array named context; {config.data} has none."
            )
        return data
    if config.context not in (0, None, found.shape[1]):
        raise ValueError(
            f"train: context must be {found.shape[1]}, the length of those of {config.data}; "
            f"got {config.context}."
        )
    data = copy.copy(data)
    data.labels = found
    return data


def _unwanted(config):
    told_off = config.context == 0 and "context" in config.given
    return told_off or config.task != "score" or config.network == "ncsn"


def _of_file(path, n):
    if path.suffix != ".npz" or not path.is_file():
        return None
    archive = Archive(path)
    if "context" not in archive.members:
        return None
    return _checked(archive.read("context"), f"{path}: context", n)


def parse(text: str) -> Tensor:
    """What --context says: v1,v2,... or an .npy file; float32 (C,) or (n, C).

    Raises:
        ValueError: it is neither.
    """
    if text.endswith(".npy"):
        try:
            images.check_regular(Path(text))
            array = np.load(text, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"sample: context {text} cannot be read: {error}") from None
        return _checked(array, f"sample: context {text}")
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(
            f"sample: context must be numbers with commas between, or an .npy file; got {text!r}."
        ) from None
    return _checked(np.array(numbers), "sample: context")


def _checked(array, name, n=None):
    """float32."""
    dims = (2,) if n is not None else (1, 2)
    if array.dtype.kind not in "fiub" or array.ndim not in dims or 0 in array.shape or (
        n not in (None, len(array))
    ):
        wanted = "(C,) or (n, C)" if n is None else f"({n}, C)"
        raise ValueError(
            f"{name} must be numbers, {wanted}; got {array.dtype} {tuple(array.shape)}."
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite.")
    return torch.from_numpy(np.ascontiguousarray(array, np.float32))
