"""An extension of griffe.

Docstrings as this project writes them, in the words that griffe knows.
"""

import re

import griffe

EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
RAISES = re.compile(r"^Raises:[ \n](.*?)(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)
NOTE = re.compile(r"^(Source|Sources|Shapes|Methods|Cost|Noise): (.*(?:\n[ \t]+.+)*)", re.MULTILINE)
FIELDS = re.compile(r"(?<=\n\n)(?:[a-z_][\w, ()]*: .*\n(?:[ \t]+.+\n)*){2,}(?=\n|\Z)")
NEXT_ERROR = re.compile(r"(?<=[.;]) (?=\w+(?:Error|Warning)\b[^:.]*: )")


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = rewritten(obj.docstring.value)


def rewritten(text: str) -> str:
    text = FIELDS.sub(_list, text + "\n")
    text = RAISES.sub(_one_error_a_line, text)
    text = NOTE.sub(lambda found: f"**{found[1]}:** {_on_one_line(found[2])}", text)
    return EXAMPLE.sub(lambda found: f"```pycon\n{found[0]}\n```", text)


def _one_error_a_line(found: re.Match) -> str:
    errors = NEXT_ERROR.split(_on_one_line(found[1]))
    return "Raises:\n" + "\n".join(f"    {error}" for error in errors)


def _list(found: re.Match) -> str:
    fields = re.split(r"\n(?=\S)", found[0].rstrip("\n"))
    return "".join(f"- {_on_one_line(field)}\n" for field in fields)


def _on_one_line(text: str) -> str:
    return " ".join(text.split())
