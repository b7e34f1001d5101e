"""The documentation as a site, by Sphinx: ``make docs`` writes it to build/site. Nothing is fetched.

The source folder is the repository's root, so that links between pages lead to the same places here and there. Files
that are no pages, such as tables and examples, become downloads.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from pygments.lexers.special import TextLexer
from sphinx.highlighting import lexers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project = "Tilewright"
author = copyright = "The Tilewright authors"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc = "docs/README"
include_patterns = ["*.md", "docs/**.md", "bench/results/*.md"]
CONTENTS = {
    "docs/README": {
        "Use it": [
            "/README",
            "calibration",
            "torch_compile",
            "derivatives",
            "sparse24",
            "autotune",
            "measured",
            "api/index",
        ],
        "Understand it": ["graphs", "cpu", "ahead-of-time", "emulator", "/bench/results/README"],
        "Extend it": ["/CONTRIBUTING", "/CHANGELOG"],
    },
    "docs/api/index": {"Reference": ["convert", "recipes", "nn", "deploy", "autotune", "kernels", "aot"]},
    "bench/results/README": {"Tables": ["linear_cpu", "linear_nvidia_h200", "peers"]},
}

html_theme = "furo"
html_title = project
html_extra_path = ["site"]  # index.html, which leads to the root page
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
lexers["mermaid"] = TextLexer()  # the picture is drawn where the page is read in the repository

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", rewrite)
    app.connect("source-read", add_contents)


def add_contents(app: Any, page: str, source: list[str]) -> None:
    """Give the two index pages the tables of contents that a site needs, and a reader of the repository does not."""
    for caption, pages in CONTENTS.get(page, {}).items():
        source[0] += "\n```{toctree}\n:hidden:\n:caption: " + caption + "\n\n" + "\n".join(pages) + "\n```\n"


def rewrite(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Make a docstring of this project, which reads as text in an editor, into what Sphinx reads."""
    lines[:] = [*as_rst("\n".join(lines)).splitlines(), ""]


def as_rst(text: str) -> str:
    """``text`` in reStructuredText: "rows: how many. scale: of each." becomes a list, what is indented a literal block,
    lines that begin with ``>>>`` stay an example; nothing else is markup but names in two backquotes.
    """
    return "\n\n".join(map(_paragraph, re.split(r"\n\s*\n", text.strip("\n"))))


_MEANING = re.compile(r"(?:^|(?<=[.;)] ))((?:\w+(?:, | and ))*[a-z_]\w*): (?=\S)")
_RAISES = re.compile(r"(?<=\. )(?=Raises )")


def _paragraph(text: str) -> str:
    if text.startswith(">>>"):
        return text
    first, *rest = text.split("\n")
    if _MEANING.match(first) is None:
        indented = next((i for i, line in enumerate([first, *rest]) if line.startswith("    ")), None)
        if indented is not None:  # an equation or a snippet, perhaps after a line that introduces it
            said = _paragraph("\n".join([first, *rest][:indented])) + "\n\n" if indented else ""
            return f"{said}::\n\n" + "\n".join([first, *rest][indented:])
    parts = _RAISES.split(" ".join(line.strip() for line in text.splitlines()))
    return "\n\n".join(_with_list(part.strip()) for part in parts)


def _with_list(text: str) -> str:
    head, *pieces = _MEANING.split(text)
    items = [f"* **{_escaped(n)}**: {_escaped(meaning)}" for n, meaning in zip(pieces[::2], pieces[1::2], strict=True)]
    return "\n\n".join(part for part in (_escaped(head), "\n".join(items)) if part)


def _escaped(text: str) -> str:
    """Nothing but ``code`` is markup, and a plural "s" may follow it."""
    parts = re.split(r"(``[^`]+``)", text.strip())
    escaped = (part if part.startswith("``") else re.sub(r"([\\*`|_])", r"\\\1", part) for part in parts)
    return re.sub(r"``(?=\w)(?<=\w``)", r"``\\ ", "".join(escaped))
