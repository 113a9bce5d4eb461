"""Hooks of mkdocs: equations become MathML, which needs no script; API pages list what is public."""

import html
import importlib
import inspect
import re

from latex2mathml.converter import convert

EQUATION = re.compile(
    r'<(span|div) class="arithmatex">\\(?:\(|\[)(.*?)\\(?:\)|\])</(?:span|div)>', re.DOTALL
)
MEMBERS = re.compile(r"^<!-- members: ([\w.]+) *([\w ]*)-->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: object) -> str:
    """`<!-- members: MODULE [NAMES] -->` stands for the entries of a module's public names."""
    return MEMBERS.sub(_entries, markdown)


def on_page_content(content: str, **_: object) -> str:
    return EQUATION.sub(_drawn, content)


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
    block = found[1] == "div"
    drawn = convert(html.unescape(found[2]).strip(), display="block" if block else "inline")

    # A wide equation scrolls by itself; the page does not.
    return f'<div class="equation">{drawn}</div>' if block else drawn
