"""Read the pages of the documentation: their code blocks, links, and names in inline code."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced code block. page: path from the root of the repository; line: of its first line."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(language: str) -> list[Block]:
    """Return the code blocks of this language on all pages, in the order of the pages."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf8")
        for match in _BLOCK.finditer(text):
            if match[1] == language:
                line = text[: match.start(2)].count("\n") + 1
                found.append(Block(str(page.relative_to(ROOT)), line, language, match[2]))
    return found


def commands(block: Block) -> list[str]:
    """Return the commands of a bash block, one string each, with continued lines joined."""
    lines = re.sub(r"\s*\\\n\s*", " ", block.text).splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def prose(page: Path) -> str:
    """Return the page without its code blocks."""
    return _BLOCK.sub("", page.read_text(encoding="utf8"))


def inline_code(page: Path) -> list[str]:
    """Return what stands between backticks in the page's prose."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def links(page: Path) -> list[str]:
    """Return the targets of all links and images in the page's prose."""
    text = prose(page)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'\bsrc(?:set)?="([^"]+)"', text)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.M):
        words = re.sub(r"[`*]|\[|\]\(.*?\)", "", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        number = sum(other == slug or other.startswith(f"{slug}-") for other in found)
        found.add(f"{slug}-{number}" if slug in found else slug)
    return found
