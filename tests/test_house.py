"""The tree, read from its sources.

The command line stands on the library and nothing stands on the command line.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastscore
from fastscore import backend

ROOT = Path(fastscore.__file__).parent
MODULES = {
    ".".join(("fastscore", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    # a link where fastscore is built in place.
    for path in {*ROOT.rglob("*.py"), *(ROOT / "kernels").glob("*.py")}
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
    module: {
        other for other, imported in IMPORTED.items() if module in imported and other != module
    }
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
    program = (
        "import sys, fastscore; late = ('fastscore.cli', 'torch._dynamo', 'tyro', 'PIL'); "
        "print([m for m in sys.modules if m.startswith(late)])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=240
    ).stdout
    assert printed.strip() == "[]"


# From the roof to the cellar; what stands on one floor may stand on another room of it.
FLOORS = (
    "cli __main__",
    "datasets training sampling guidance likelihood interop images",
    "losses models",
    "conversions distributed dual nn schedules",
    "ops",
    "random backend raw_ops direct averages modes precision",
    "kernels compiling deferred memory messages regular scalars tensors",
)


def floor(module):
    room = (module.split(".") + ["__init__"])[1]
    return next((k for k, rooms in enumerate(FLOORS) if room in rooms.split()), None)


def imported_by(path):
    """What a file names: the modules that it imports, and those that it imports from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module


GRAPH = {
    module: {i for i in imported_by(path) if i in MODULES and i not in (module, "fastscore")}
    for module, path in MODULES.items()
}


def test_every_module_has_a_floor():
    assert [m for m in MODULES if m != "fastscore" and floor(m) is None] == []


def test_no_floor_stands_on_a_higher_one():
    upward = [
        (module, imported)
        for module, found in GRAPH.items()
        if module != "fastscore"
        for imported in found
        if floor(imported) < floor(module)
    ]
    assert upward == []


def test_no_module_stands_on_itself():
    left = {module: set(found) for module, found in GRAPH.items()}
    while free := [module for module, found in left.items() if not found & set(left)]:
        for module in free:
            del left[module]
    assert left == {}


TREE = Path(__file__).parent.parent
STEMS = dict.fromkeys((op.stem for op in backend.OPS.values()), False)
STEMS |= {op.stem: True for op in backend.OPS.values() if op.cuda or op.clusters}


@pytest.mark.parametrize("stem", STEMS)
def test_a_newcomer_finds_the_files_of_an_op_by_one_name(stem):
    expected = [
        f"csrc/{stem}.h",
        f"csrc/{stem}.cpp",
        f"kernels/{stem}.py",
        f"tests/test_{stem}.py",
        f"benchmarks/bench_{stem}.py",
    ]
    missing = [name for name in expected if not (TREE / name).exists()]
    assert not missing
    public = [f"fastscore/{stem}.py", f"fastscore/ops/{stem}.py"]
    assert sum((TREE / name).exists() for name in public) == 1, public
    assert (TREE / f"csrc/{stem}.cu").exists() == STEMS[stem]


def test_every_file_that_registers_an_op_carries_its_name():
    """Else a kernel is found by nobody who reads the table."""
    registering = {
        path.stem
        for path in (TREE / "csrc").glob("*.c*")
        if "STABLE_TORCH_LIBRARY_FRAGMENT" in path.read_text()
    }
    assert registering == set(STEMS)
    assert {path.stem for path in (TREE / "csrc").glob("*.cu")} == {
        s for s, cuda in STEMS.items() if cuda
    }


def test_no_file_of_csrc_is_long():
    lengths = {path.name: len(path.read_text().splitlines()) for path in (TREE / "csrc").iterdir()}
    assert not {name: n for name, n in lengths.items() if n > 450}


def test_no_file_of_the_library_is_long():
    lengths = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert not {module: n for module, n in lengths.items() if n > 400}
