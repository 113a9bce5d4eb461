"""The public names of fastscore: python build_support/public_names.py lists and counts them.

A name is public if it stands in `fastscore.__all__`, or in the `__all__` of a module that stands
there. A thing that has several names (fastscore.sample, fastscore.sampling.sample) is counted once,
by the shortest. Modules are not counted, and neither is what specialists find in SPECIAL, which is
listed after the rest.

tests/public_names.txt is the list as it was last agreed on; a name that joins it stands in
CHANGELOG.md as well. --write brings the file up to date.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fastscore

LIST = Path(__file__).parent.parent / "tests" / "public_names.txt"
SPECIAL = ("ops.", "nn.ablations.")


def public_names() -> tuple[list[str], list[str]]:
    """Every public name without the leading "fastscore.".

    Those that count, and those in SPECIAL.
    """
    found: dict[object, str] = {}
    for name, thing in _walk(fastscore, ""):
        # Numbers and words have no identity of their own: 1 may be many things.
        key = name if isinstance(thing, int | float | str | tuple) else id(thing)
        if key not in found or _rank(name) < _rank(found[key]):
            found[key] = name

    names = sorted(found.values())
    special = [name for name in names if name.startswith(SPECIAL)]
    return [name for name in names if name not in special], special


def _rank(name):
    return name.count("."), name


def _walk(module: ModuleType, prefix: str) -> Iterator[tuple[str, Any]]:
    for name in module.__all__:
        thing = getattr(module, name)
        if isinstance(thing, ModuleType):
            yield from _walk(thing, f"{prefix}{name}.")
        else:
            yield prefix + name, thing


def listing() -> str:
    """What tests/public_names.txt holds."""
    names, special = public_names()
    return "\n".join([*names, "", *special, ""])


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        LIST.write_text(listing())
    names, special = public_names()
    print(listing())
    print(f"{len(names)} public names, and {len(special)} in {', '.join(SPECIAL)}")
