"""Pages of the documentation as tests read them: blocks of code, and what is printed below them."""

import contextlib
import doctest
import io
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
QUICK = re.compile(r"<!-- quick: (.*?) -->", re.DOTALL)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Block(NamedTuple):
    """A fenced block: its language, its text, the line of the text, and what it should print."""

    language: str
    text: str
    line: int
    output: str | None


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks in one of the languages; a `text` block right below a program is its output."""
    text = page.read_text()
    fences = list(FENCE.finditer(text))
    found = []

    for fence, after in zip(fences, [*fences[1:], None]):
        below = after is not None and not text[fence.end() : after.start()].strip()
        output = after[2] if below and after[1] == "text" else None
        line = text.count("\n", 0, fence.start(2)) + 1
        found.append(Block(fence[1], fence[2], line, output))

    return [block for block in found if block.language in languages]


def shortenings(page: Path) -> list[tuple[str, str]]:
    """What `<!-- quick: steps=2000 -> steps=20; ... -->` replaces when a page is run briefly."""
    rules = "; ".join(QUICK.findall(page.read_text()))
    return [tuple(rule.split(" -> ")) for rule in rules.split("; ") if rule]


def run(page: Path, *, quick: bool) -> dict:
    """Run the programs of a page one after another in one namespace, and look at what they
    print."""
    rules = shortenings(page) if quick else []
    names = {"__name__": "__main__"}
    shortened = False

    for block in blocks(page, "python"):
        text = block.text
        for old, new in rules:
            text = text.replace(old, new)
        shortened = shortened or text != block.text

        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            # Empty lines above the program: a traceback then names the line of the page.
            exec(compile("\n" * (block.line - 1) + text, str(page), "exec"), names)

        # From a shortened program on the figures are others; `-m slow` runs the page whole.
        if block.output is not None and not shortened:
            check(page, block, printed.getvalue())

    return names


def check(page: Path, block: Block, printed: str) -> None:
    if not doctest.OutputChecker().check_output(block.output, printed, FLAGS):
        raise AssertionError(
            f"{name(page)}, line {block.line}: the page says\n{block.output}\nand the "
            f"program\n{printed}"
        )
