"""What the pages and the docstrings say runs: programs, commands, examples, links."""

import ast
import doctest
import functools
import importlib
import inspect
import re
import shlex
import sys

import pages
import pytest
import torch

import fastscore
from fastscore import cli
from fastscore.cli import demo, evaluate, recipe, sample, train

ROOT = pages.ROOT
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "benchmarks")]
import forward_mode  # noqa: E402
import harness  # noqa: E402
import tables  # noqa: E402

LINKED = [*pages.PAGES, ROOT / "CHANGELOG.md", ROOT / "benchmarks/README.md"]
PROGRAMS = [page for page in pages.PAGES if pages.blocks(page, "python")]
LONG = [page for page in PROGRAMS if pages.shortenings(page)]
MODULES = [
    path for path in sorted((ROOT / "fastscore").rglob("*.py")) if ">>> " in path.read_text()
]


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """An empty folder, no window, and PyTorch's generator as a fresh process has it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    dtype = torch.get_default_dtype()
    state = torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)
    torch.set_default_dtype(dtype)


@pytest.mark.parametrize("page", PROGRAMS, ids=pages.name)
def test_the_programs_of_a_page_run_one_after_another(page, reader):
    pages.run(page, quick=True)


@pytest.mark.slow
@pytest.mark.parametrize("page", LONG, ids=pages.name)
def test_the_programs_of_a_page_run_as_they_stand(page, reader):
    pages.run(page, quick=False)


def test_every_shortening_shortens_something():
    for page in LONG:
        programs = "".join(block.text for block in pages.blocks(page, "python"))
        missing = [old for old, _ in pages.shortenings(page) if old not in programs]
        assert not missing, pages.name(page)


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_programs_are_no_wider_than_the_page(page):
    """What a reader sees of a block on the site without scrolling."""
    for block in pages.blocks(page, "python", "sh"):
        wide = [line for line in block.text.splitlines() if len(line) > 88]
        assert not wide


def commands():
    """(page, line of a shell block), with continued lines joined."""
    for page in pages.PAGES:
        for block in pages.blocks(page, "sh", "bash"):
            for line in block.text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    yield pages.name(page), words


COMMANDS = list(commands())


def of(program):
    return [(page, words) for page, words in COMMANDS if program in words[:1]]


OURS = [*of("fastscore"), *(entry for entry in of("torchrun") if "fastscore" in entry[1])]


@pytest.mark.parametrize(("page", "words"), OURS, ids=[" ".join(words) for _, words in OURS])
def test_the_functionsof_the_pages_are_understood(page, words, monkeypatch, tmp_path):
    words = words[words.index("fastscore") :]
    # A file of options that they speak of.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text("steps = 100\n")
    called = []
    functions = (
        (train, "train"),
        (sample, "sample"),
        (evaluate, "evaluate"),
        (demo, "demo"),
        (recipe, "recipe"),
    )
    for module, name in functions:
        recorded = functools.wraps(getattr(module, name))(
            lambda *args, name=name, **options: called.append(name)
        )
        monkeypatch.setattr(module, name, recorded)
    monkeypatch.setattr(cli, "_doctor", lambda: called.append("doctor") or sys.exit(0))
    monkeypatch.setattr(sys, "argv", words)
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code
    assert called == [words[1]]


def test_the_targets_of_make_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page, words in of("make"):
        asked = [word for word in words[1:] if "=" not in word]
        assert all(word in targets or word.startswith("gpu-") for word in asked), page


def test_the_scripts_that_are_called_exist():
    for page, words in of("python"):
        files = [word for word in words[1:] if re.fullmatch(r"[\w/]+\.py", word)]
        assert all((ROOT / file).is_file() for file in files), page


def test_the_tables_of_speed_are_those_of_the_results():
    for page in tables.PAGES:
        assert tables.updated(page.read_text()) == page.read_text(), "python docs/tables.py"


def test_the_gains_in_the_text_are_those_of_the_results():
    def times(file, op, elements, peer):
        rows = tables.results(file)["rows"]
        (row,) = [
            r for r in rows if (r["op"], r["elements"], r["dtype"]) == (op, elements, "float32")
        ]
        return row["seconds"][peer] / min(
            row["seconds"][name] for name in harness.OURS if name in row["seconds"]
        )

    eager, compiled = (
        times("cpu.json", "langevin_step", 2**24, peer) for peer in ("eager", "torch.compile")
    )
    h100 = times("nvidia-h100-80gb-hbm3.json", "langevin_step", 2**24, "eager")
    mlp = times(
        "cpu.json",
        "sliced loss + gradient, MLP 2×128×128×2, M=1, 1 thread",
        2048,
        "compiled func.vjp",
    )

    readme, why, performance = (
        " ".join((ROOT / name).read_text().split())
        for name in ("README.md", "docs/why.md", "docs/performance.md")
    )
    assert f"{eager:.0f} times as fast on two CPU cores, {h100:.1f} times on an H100" in readme
    assert (
        f"{eager:.0f} times as fast as eager PyTorch and {compiled:.0f} times as fast as "
        "`torch.compile`"
        in why
    )
    assert f"takes {mlp:.2f} of our time" in performance


def test_the_streams_of_the_contract_have_their_numbers():
    page = (ROOT / "docs/noise.md").read_text()
    listed = {
        name: int(number)
        for name, number in re.findall(r"^\| `([A-Z]+)` \| (\d+) \|", page, re.MULTILINE)
    }
    assert listed and all(
        getattr(fastscore.random, name) == number for name, number in listed.items()
    )


@pytest.mark.slow
def test_the_table_of_derivatives_says_what_is_measured():
    page = (ROOT / "docs/derivatives.md").read_text()
    for network, errors in forward_mode.rows():
        (line,) = re.findall(rf"^\| {re.escape(network)} \| (.*) \|$", page, re.MULTILINE)
        for error, cell in zip(errors, line.split(" | "), strict=True):
            exact = 0 <= error < 1e-13
            assert (float(cell) < 1e-13) if exact else (cell == forward_mode.written(error)), (
                network
            )


def test_every_public_module_has_its_page():
    listed = "".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    modules = [name for name in fastscore.__all__ if inspect.ismodule(getattr(fastscore, name))]
    missing = [name for name in modules if f"<!-- members: fastscore.{name}" not in listed]
    assert modules and not missing


FOLDERS = "fastscore|kernels|csrc|tests|benchmarks|build_support|docs|examples"
NAMED = re.compile(rf"`((?:{FOLDERS})/[\w./]*)`")


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_every_file_that_is_named_exists(page):
    missing = [file for file in NAMED.findall(page.read_text()) if not (ROOT / file).exists()]
    assert not missing


@pytest.mark.parametrize("page", LINKED, ids=pages.name)
def test_every_link_leads_to_a_file(page):
    text = pages.FENCE.sub("", page.read_text())
    links = [
        link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link
    ]
    missing = [link for link in links if link and not (page.parent / link).exists()]
    assert not missing


def documented(path):
    """The docstrings with examples, by name.

    Not found by inspection, for torch.compile puts its own objects into a module.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text and ">>> " in text:
                yield getattr(node, "name", path.stem), text


@pytest.mark.parametrize(
    "path",
    MODULES,
    ids=lambda path: path.relative_to(ROOT / "fastscore").with_suffix("").as_posix(),
)
def test_examples_in_docstrings(path):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for name, text in documented(path):
        example = doctest.DocTestParser().get_doctest(
            text, {"torch": torch, **vars(module)}, name, str(path), 0
        )
        found = doctest.DocTestRunner().run(example)
        assert found.attempted and not found.failed, name
