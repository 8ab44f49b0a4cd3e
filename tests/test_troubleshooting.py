"""Every message that docs/troubleshooting.md quotes is one that the library can say."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import hf_longctx

PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
ROOT = Path(hf_longctx.__file__).parent
FILLED_IN = "\0"  # stands for what an f-string fills in
GENERAL = "got ..., expected ..."  # all that is fixed in the message about a wrong value


def quoted(text: str) -> list[tuple[str, str]]:
    """(section, message) of every row of the page's tables of messages."""
    found, section, table = [], "", False
    for line in text.splitlines():
        if line.startswith("## "):
            section = line[3:]
        if not line.startswith("|"):
            table = False
        elif line.startswith("| message |"):
            table = True
        elif table and not line.startswith("|---"):
            cell = re.fullmatch(r"\| `([^`]+)` \|[^|]*\|[^|]+\|", line)
            assert cell, f"a row is | `message` | why | what to do |, not {line}"
            found.append((section, cell[1]))
    return found


@cache
def sayings() -> tuple[str, ...]:
    """Every string of the library that is no docstring, f-strings with what they fill in left open."""
    found = []
    for file in sorted(ROOT.rglob("*.py")):
        tree = ast.parse(file.read_text("utf-8"))
        skip = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                skip |= {id(part) for part in node.values}
                parts = (part.value if isinstance(part, ast.Constant) else FILLED_IN for part in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skip:
                found.append(node.value)
    return tuple(found)


def said(message: str) -> bool:
    """Whether one string has the parts of ``message`` between its ``...``, in their order."""
    parts = [part.strip() for part in message.split("...") if part.strip()]
    return any(re.search(".*".join(map(re.escape, parts)), text, re.S) for text in sayings())


MESSAGES = quoted(PAGE.read_text("utf-8"))


@pytest.mark.parametrize("message", [message for _, message in MESSAGES])
def test_a_quoted_message_exists(message):
    fixed = re.sub(r"[^a-z]", "", message)
    assert message == GENERAL or len(fixed) >= 10, "too little of the message is quoted to find it by"
    assert said(message), f"nothing in hf_longctx says {message!r}; quote what it says now"


def test_all_sections_and_rows_were_read():
    sections = list(dict.fromkeys(section for section, _ in MESSAGES))
    assert sections == [
        "Patching",
        "generate() and forward",
        "Caches",
        "Saved caches",
        "Configs",
        "identify",
        "Kernels and compiling",
        "eval, compare and lm-eval",
    ]
    rows = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| `")]
    assert len(MESSAGES) == len(set(MESSAGES)) == len(rows) > 90
    assert len(sayings()) > 1000


def test_a_message_that_nobody_says_is_caught():
    assert said("this cache holds ... rows, the forward brings")
    assert not said("the forward brings ... rows, this cache holds")
    assert not said("this cache holds ... rows, the forward takes")
    assert not said("A config has a wrong key, type, bound or shape")  # a docstring
    with pytest.raises(AssertionError, match="a row is"):
        quoted("| message | why | what to do |\n|---|---|---|\n| no code | why | what |")
    assert quoted("| other | table |\n|---|---|\n| `a` | b |") == []
