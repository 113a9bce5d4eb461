"""Hooks of mkdocs: equations are drawn while the site is built; API pages list what is public."""

import html
import importlib
import inspect
import re
from pathlib import Path

import ziamath
from mkdocs.exceptions import PluginError

EQUATION = re.compile(
    r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL
)
MEMBERS = re.compile(r"^<!-- members: ([\w.]+) *([\w ]*)-->$", re.MULTILINE)
ELSEWHERE = re.compile(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="((?:https?:)?//[^"]*)"')


def on_page_markdown(markdown: str, **_: object) -> str:
    """`<!-- members: MODULE [NAMES] -->` stands for the entries of a module's public names."""
    return MEMBERS.sub(_entries, markdown)


def on_page_content(content: str, **_: object) -> str:
    return EQUATION.sub(_drawn, content)


def on_post_build(config: dict, **_: object) -> None:
    """The site is read without a network."""
    for page in sorted(Path(config["site_dir"]).rglob("*.html")):
        if found := ELSEWHERE.search(page.read_text()):
            raise PluginError(f"{page} loads {found[1]}")


def _entries(found: re.Match) -> str:
    module = importlib.import_module(found[1])
    names = found[2].split() or module.__all__
    return "\n\n".join(_entry(module, name) for name in names if _has_entry(module, name))


def _has_entry(module: object, name: str) -> bool:
    return not inspect.ismodule(getattr(module, name))


def _entry(module: object, name: str) -> str:
    thing = getattr(module, name)

    # Several functions have the name of their module, which a path from the package would lead to.
    home = getattr(thing, "__module__", None)
    if not callable(thing) or not home.startswith("fastscore"):
        home = module.__name__

    return f"::: {home}.{name}\n    options:\n      heading: {name}\n      toc_label: {name}"


def _drawn(found: re.Match) -> str:
    """An equation as paths.

    No script and no font of the reader's is needed, and none can lack √.
    """
    source = " ".join(html.unescape(found[1]).split())
    drawn = ziamath.Latex(source, size=18, color="currentColor").svg()

    named = f'<svg role="img" aria-label="{html.escape(source)}"'
    return f'<div class="equation">{drawn.replace("<svg", named, 1)}</div>'
