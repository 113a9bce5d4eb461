"""Reading a foreign checkpoint: tensors and plain values, and nothing that runs."""

from os import PathLike
from typing import Any

import torch

from fastscore.models.state_dicts import OP


class _Passed:
    """Stands for what no network is made of, such as the learning rate of an optimizer, which
    numpy's numbers are."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# Instead of numpy's own functions, which are never called.
_PASSED = [
    (_Passed, name)
    for name in ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype")
]


def read(path: str | PathLike[str]) -> Any:
    """What torch.save wrote.

    Raises:
        ValueError: it cannot be read, or is more than tensors and plain values.
    """
    try:
        with torch.serialization.safe_globals(_PASSED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{OP}: {path} cannot be read: {error.strerror or error}.") from None
    except Exception:  # foreign classes raise UnpicklingError, damaged files almost anything
        raise ValueError(
            f"{OP}: {path} is damaged, or no checkpoint of tensors alone (weights_only=True "
            "refuses it)."
        ) from None
