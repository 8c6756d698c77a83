"""How `make docs` reads docstrings: the comment behind a field (`far: float  # false accept rate`) is its docstring."""

import re
from typing import Any

import griffe


class HouseStyle(griffe.Extension):
    """Docstrings of this project, in the words that griffe knows."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """A field's comment is its docstring."""
        if attr.docstring is None and attr.lines:
            _, _, comment = attr.lines[-1].partition("  # ")
            if comment and not comment.startswith("type:"):
                attr.docstring = griffe.Docstring(comment, parent=attr, parser="google")

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """An "Example" is the section "Examples" if it is a session, and else a block of code."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:\n(?=\s+(\w.*\s+)?>>>)", "Examples:\n", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"^Example:\n", "For example:\n\n", text, flags=re.MULTILINE)
