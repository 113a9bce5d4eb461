"""The tree, read from its sources: the command line stands on the library and nothing stands on the command line."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastscore

ROOT = Path(fastscore.__file__).parent
MODULES = {
    ".".join(("fastscore", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in {*ROOT.rglob("*.py"), *(ROOT / "kernels").glob("*.py")}   # a link where fastscore is built in place
}


def imports(path):
    """Modules of fastscore that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            named = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        else:
            continue
        yield from (name for name in named if name in MODULES)


# Each file is parsed once: for every pair it would take the better part of a minute.
IMPORTED = {module: set(imports(path)) for module, path in MODULES.items()}
IMPORTERS = {
    module: {other for other, imported in IMPORTED.items() if module in imported and other != module}
    for module in MODULES
}


def of_the_command_line(module):
    return module.startswith(("fastscore.cli", "fastscore.__main__"))


def test_nothing_stands_on_the_command_line():
    for module, importers in IMPORTERS.items():
        if of_the_command_line(module):
            assert all(map(of_the_command_line, importers)), (module, importers)


def test_what_only_the_command_line_uses_is_its_own():
    for module, importers in IMPORTERS.items():
        public = module.split(".")[1:2] and module.split(".")[1] in fastscore.__all__
        if not of_the_command_line(module) and not public and importers:
            assert not all(map(of_the_command_line, importers)), module


@pytest.mark.processes
def test_the_library_loads_neither_the_command_line_nor_dynamo():
    program = "import sys, fastscore; print([m for m in sys.modules if m.startswith(('fastscore.cli', 'torch._dynamo', 'tyro', 'PIL'))])"
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=240).stdout
    assert printed.strip() == "[]"


FLOORS = ("cli", "dual", "ops", "kernels")


def test_no_floor_stands_on_a_higher_one():
    for module, importers in IMPORTERS.items():
        room = module.split(".")[1:2]
        if room and room[0] in FLOORS:
            below = {f"fastscore.{floor}" for floor in FLOORS[FLOORS.index(room[0]) + 1 :]}
            assert not [i for i in importers if ".".join(i.split(".")[:2]) in below], (module, importers)
