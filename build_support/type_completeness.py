"""How much of the public interface has types: python build_support/type_completeness.py.

pyright looks at a wheel in an environment of its own, for it finds no py.typed where fastscore is
installed in place; torch and the rest are those of the Python that runs this. It prints the share
of exported symbols whose type is known, and where the others are, and fails below LEAST. Then it
checks tests/typed_client.py, strictly, as the user of an editor would see it.
"""

import collections
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
HOME = ROOT / "build" / "types"
CLIENT = ROOT / "tests" / "typed_client.py"
LEAST = 0.95


def main() -> int:
    python = environment()
    report = pyright(python, "--verifytypes", "fastscore", "--ignoreexternal")["typeCompleteness"]
    score = report["completenessScore"]
    print(
        f"types: {100 * score:.1f} % of the exported symbols are known (at least {100 * LEAST:g})"
    )
    for room, count in unknown(report["symbols"]).most_common():
        print(f"  {count:4d} unknown in {room}")

    found = pyright(python, str(CLIENT))["generalDiagnostics"]
    for each in found:
        line = each["range"]["start"]["line"] + 1
        print(f"{CLIENT.relative_to(ROOT)}:{line}: {each['message']}")
    return int(score < LEAST or bool(found))


def environment() -> Path:
    """Its Python: pyright and a wheel of this tree, and behind them the packages of ours."""
    python = HOME / "bin" / "python"
    if not python.exists():
        venv.create(HOME, with_pip=True)
        pip(python, "install", "-c", ROOT / "constraints.txt", "pyright[nodejs]")

    # No compiler: the types are those of the Python files.
    wheels = HOME / "wheels"
    for old in wheels.glob("*.whl"):
        old.unlink()
    # setuptools puts what an earlier build has left into the wheel as well.
    for old in (ROOT / "build").glob("lib*"):
        shutil.rmtree(old)
    options = ("--no-deps", "--no-build-isolation", "-w", wheels)
    pip(Path(sys.executable), "wheel", *options, ROOT, FASTSCORE_BUILD="none")
    pip(python, "install", "--no-deps", "--force-reinstall", *wheels.glob("*.whl"))

    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    ours = HOME / "lib" / version / "site-packages" / "packages_of_fastscore.pth"
    ours.write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def pip(python: Path, *words: object, **variables: str) -> None:
    command = [python, "-m", "pip", "--disable-pip-version-check", "-q", *map(str, words)]
    subprocess.run(command, check=True, env=os.environ | variables)


def pyright(python: Path, *words: str) -> dict:
    """What pyright finds, looking at the environment that it is in; it exits with 1 if anything."""
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-m", "pyright", "--outputjson", *words]
    done = subprocess.run(
        command, cwd=HOME, env=environ | {"PATH": path}, capture_output=True, text=True
    )
    if done.returncode > 1:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(done.stdout)


def unknown(symbols: list[dict]) -> collections.Counter:
    """How many exported symbols of a room, or module, have no known type."""
    rooms = collections.Counter()
    for symbol in symbols:
        if symbol["isExported"] and not symbol["isTypeKnown"]:
            rooms[".".join(symbol["name"].split(".")[:2])] += 1
    return rooms


if __name__ == "__main__":
    sys.exit(main())
