"""The pages of the project: README, CONTRIBUTING, CHANGELOG and docs/, and the blocks in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
RESULTS = sorted((ROOT / "docs" / "results").glob("*.md"))
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS, *RESULTS])
MAKE = "a target of the Makefile, which sets up and calls what the other tests call"


@dataclass(frozen=True)
class Snippet:
    """A fenced block. ``line`` is that of the fence, ``comment`` what an HTML comment right above it says."""

    page: Path
    line: int
    language: str
    text: str
    comment: str

    @property
    def reason(self) -> str | None:
        """Why the whole block is not run."""
        return self.comment.partition("not run:")[2].strip() or None

    @property
    def commands(self) -> list[tuple[str, str | None]]:
        """(command, why it is not run) of every line of a shell block. ``make`` is what CI and its users call."""
        lines = re.sub(r"\s*\\\n\s*", " ", self.text).splitlines()
        parts = [re.split(r"\s+# ", line.strip(), maxsplit=1) for line in lines if line.strip()]
        reasons = [part[1].partition("not run:")[2].strip() if len(part) > 1 else "" for part in parts]
        given = [(part[0], self.reason or reason or None) for part, reason in zip(parts, reasons, strict=True)]
        return [(line, reason or (MAKE if line.startswith("make ") else None)) for line, reason in given]

    @property
    def not_run(self) -> list[str]:
        """The reason of every command, or of the whole block, that is not run."""
        if self.language == "sh":
            return [reason for _, reason in self.commands if reason]
        return [self.reason] if self.reason else []


def snippets(page: Path, text: str | None = None) -> list[Snippet]:
    """The fenced blocks of a page, in order."""
    lines = (page.read_text("utf-8") if text is None else text).splitlines()
    found, start = [], None
    for number, line in enumerate(lines):
        if line.startswith("```") and start is None:
            start = number
        elif line.startswith("```"):
            above = lines[start - 1] if start else ""
            comment = re.fullmatch(r"<!-- (.*) -->", above.strip())
            body = "\n".join(lines[start + 1 : number])
            found.append(Snippet(page, start + 1, lines[start][3:].strip(), body, comment[1] if comment else ""))
            start = None
    assert start is None, f"{page.name}: the block of line {start} does not end"
    return found


def prose(text: str) -> str:
    """What a page says in words: on one line, without fenced blocks, code, comments and targets of links."""
    for pattern in (r"^```.*?^```$", r"<!--.*?-->", r"`[^`]+`"):
        text = re.sub(pattern, " ", text, flags=re.M | re.S)
    return " ".join(re.sub(r"\]\([^)]*\)", "]", text).split())
