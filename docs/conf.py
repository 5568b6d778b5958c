"""Settings of Sphinx, which builds these pages: `bash scripts/docs.sh`.

The pages are plain Markdown, so that they read well on GitHub too. Some things are therefore added
here and not in the pages: the table of contents and downloads. Docstrings are made valid reST.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

project = "AlphaDecay"
author = "AlphaDecay contributors"
copyright = "AlphaDecay contributors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "index"
myst_heading_anchors = 3  # the anchors of headings are GitHub's
myst_enable_extensions = ["html_image"]

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_title = "AlphaDecay"
html_show_sphinx = False
html_show_copyright = False

autodoc_member_order = "bysource"
napoleon_use_ivar = True  # attributes have one entry, although autodoc finds them a second time
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
default_role = "code"  # `name` in a docstring is code
python_use_unqualified_type_names = True

PAGES_WITH_CONTENTS = ("index", "api")
SECTION = re.compile(
    r"(Args|Arguments|Attributes|Example|Examples|Note|Raises|Returns|Yields):\s*$"
)


def add_contents(app, docname: str, source: list[str]) -> None:
    """Add a hidden table of contents that consists of the links in the page's lists."""
    if docname in PAGES_WITH_CONTENTS:
        pages = re.findall(r"^\* \[.*?\]\(([\w/]+)\.(?:md|rst)\)", source[0], re.M)
        source[0] += "\n```{toctree}\n:hidden:\n\n" + "\n".join(pages) + "\n```\n"


def link_files(app, docname: str, source: list[str]) -> None:
    """Turn links to files outside of docs/ into downloads: they are no pages of the website."""
    source[0] = re.sub(r"\[([^\]]+)\]\((\.\./[^)#]+)\)", r"{download}`\1 <\2>`", source[0])


def make_valid(app, what, name, obj, options, lines: list[str]) -> None:
    """Turn a docstring into valid reST, before napoleon reads its sections.

    Outside of `code`, characters that reST reads as markup are escaped. An indented block that is
    not part of a section is shown as it stands.
    """
    result: list[str] = []
    in_section = literal = False
    for line in lines:
        indented, blank = line.startswith("    "), not line.strip()
        if SECTION.match(line):
            in_section, literal = True, False
        elif not blank and not indented:
            in_section = literal = False
        if indented and not in_section and not literal and not (result and result[-1].strip()):
            result += ["::", ""]
            literal = True
        result.append(line if literal else escape(line))
    lines[:] = result


def escape(line: str) -> str:
    """Escape reST markup in a line, except inside `code` and in the bullet of a list."""
    bullet = re.match(r"\s*[*-] ", line)
    start = bullet.end() if bullet else 0
    parts = re.split(r"(`[^`]*`)", line[start:])
    parts[::2] = [re.sub(r"([\\*|]|(?<=\w)_(?=\W|$))", r"\\\1", part) for part in parts[::2]]
    return line[:start] + "".join(parts)


def setup(app) -> None:
    app.connect("source-read", add_contents)
    app.connect("source-read", link_files)
    app.connect("autodoc-process-docstring", make_valid, priority=100)
