"""What the pages and the docstrings say runs: programs, commands, examples, links."""

import ast
import doctest
import functools
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from fastscore import cli, models, schedules
from fastscore.cli import recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = [path for path in sorted((ROOT / "fastscore").rglob("*.py")) if ">>> " in path.read_text()]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def test_the_programs_of_the_readme_run_one_after_the_other(monkeypatch, capsys):
    """With fewer updates and steps, and a small network where the reader has a checkpoint and a network of his own."""
    official = models.NCSNv2(3, 4, schedules.geometric(1.0, 0.1, 2))
    monkeypatch.setattr(models, "load_official", lambda path, **options: official)
    names = {"my_network": torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.InstanceNorm2d(4))}

    for program in blocks("python"):
        quick = program.replace("steps=2000", "steps=20").replace("steps_per_level=20", "steps_per_level=2")
        quick = quick.replace("width=256", "width=32")
        exec(compile(quick.replace("budget=300", "budget=40"), "README.md", "exec"), names)
    assert names["x"].shape == (64, 3, 32, 32) and bool(names["x"].isfinite().all())
    assert "InstanceNorm2d" in capsys.readouterr().out


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if re.match(r"fastscore |torchrun .* -m fastscore ", line)]


@pytest.mark.parametrize("line", COMMANDS, ids=range(len(COMMANDS)))
def test_the_commands_of_the_readme_are_understood(line, monkeypatch):
    words = shlex.split(line, comments=True)
    words = words[words.index("fastscore") :]
    called = []
    for module, name in ((cli, "train"), (cli, "sample"), (cli, "evaluate"), (recipe, "recipe")):
        recorded = functools.wraps(getattr(module, name))(lambda *args, name=name, **options: called.append(name))
        monkeypatch.setattr(module, name, recorded)
    monkeypatch.setattr(sys, "argv", words)
    cli.main()
    assert called == [words[1]]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if link and not (page.parent / link).exists()]
    assert not missing


def documented(path):
    """The docstrings with examples, by name; not found by inspection, for torch.compile puts its own objects into a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text and ">>> " in text:
                yield getattr(node, "name", path.stem), text


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT / "fastscore").with_suffix("").as_posix())
def test_examples_in_docstrings(path):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for name, text in documented(path):
        example = doctest.DocTestParser().get_doctest(text, {"torch": torch, **vars(module)}, name, str(path), 0)
        found = doctest.DocTestRunner().run(example)
        assert found.attempted and not found.failed, name
