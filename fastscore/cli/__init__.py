"""fastscore train | sample | evaluate | recipe | demo | doctor."""

import importlib.util
import sys

# The modules that the command line needs beside the library, and the packages that they come in.
NEEDED = {
    "tyro": "tyro",
    "tqdm": "tqdm",
    "PIL": "pillow",
    "matplotlib": "matplotlib",
    "safetensors": "safetensors",
    "tomli_w": "tomli-w",
}


def main() -> None:
    """The command `fastscore`; every wrong value is one sentence and exit status 2."""
    # Without the packages of the command line, too.
    if sys.argv[1:] == ["doctor"]:
        _doctor()
    missing = [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        names = ", ".join(missing)
        sys.exit(f"error: the command line needs {names}: pip install 'fastscore[cli]'.")
    try:
        _app().cli(prog="fastscore")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, TypeError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _app():
    import tyro

    from fastscore.cli import demo, evaluate, recipe, sample, train

    app = tyro.extras.SubcommandApp()
    for command in (train.train, sample.sample, evaluate.evaluate, recipe.recipe, demo.demo):
        app.command(command)
    app.command(_doctor, name="doctor")
    return app


def _doctor() -> None:
    """Print versions, devices, which back end serves which op, and a self-test of each."""
    from fastscore.cli import doctor

    sys.exit(doctor.main())
