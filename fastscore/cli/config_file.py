"""Options in a TOML file: `fastscore train run.toml --lr 1e-4`."""

from pathlib import Path
from typing import Any

from fastscore import regular

_MOST = 1 << 20   # bytes
# What the config.toml of a run says beside its options.
_OF_A_RUN = ("shape", "format")


class Floats(tuple):
    """The type of an option that is a list of numbers which need not be whole."""


_LISTS = {tuple: (int,), Floats: (int, float)}


def read(path: Path, types: dict[str, type]) -> dict[str, Any]:
    """The options that a file gives; the config.toml of a run is such a file, too.

    Args:
        types: of each option that there is.

    Raises:
        ValueError: it is missing or no TOML, names an option that there is not, or has a value of
            another type.
    """
    try:
        values = parsed(regular.read(path, _MOST))
    except OSError as error:
        raise ValueError(f"train: {path} cannot be read: {error.strerror.lower()}.") from None
    except ValueError as error:
        raise ValueError(f"train: {path} must be a TOML file: {str(error).rstrip('.')}.") from None

    unknown = [name for name in values if name not in types and name not in _OF_A_RUN]
    if unknown:
        raise ValueError(
            f"train: {path} must name options of train, as --help lists them, with _ for -; got "
            f"{', '.join(unknown)}."
        )
    try:
        return of_types({k: v for k, v in values.items() if k in types}, types)
    except ValueError as error:
        raise ValueError(f"train: {path}: {error}.") from None


def parsed(data: bytes) -> dict[str, Any]:
    """What TOML says.

    Raises:
        ValueError: it is none.
    """
    try:
        import tomllib
    except ImportError:
        import tomli as tomllib

    return tomllib.loads(data.decode())


def of_types(values: dict[str, Any], types: dict[str, type]) -> dict[str, Any]:
    """The values as the options hold them.

    Raises:
        ValueError: one has another type.
    """
    options = dict(values)
    for name, value in options.items():
        kind = types[name]
        if kind in _LISTS and type(value) is list and all(type(n) in _LISTS[kind] for n in value):
            options[name] = tuple(value)
        elif issubclass(kind, Path) and type(value) is str:
            options[name] = Path(value)
        elif type(value) not in (kind, {float: int}.get(kind)):
            names = {"Path": "str", "tuple": "list of int", "Floats": "list of float"}
            wanted = names.get(kind.__name__, kind.__name__)
            raise ValueError(f"{name} must be of type {wanted}")
    return options
