"""``make test-quick``: every package has some quick tests, and no slow one is among them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "hf_longctx"
PACKAGES = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
FOLDERS = [name for name in PACKAGES if (TESTS / name).is_dir()]


def marks(source: str) -> Iterator[set[str]]:
    """The names of the marks of each test, and of the whole file where it has a ``pytestmark``."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            yield {name for one in node.decorator_list for name in names(one)}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            yield set(names(node.value))


def names(node: ast.expr) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and ast.unparse(inner).startswith("pytest.mark."):
            yield inner.attr


def of_folder(folder: str) -> list[set[str]]:
    return [found for path in (TESTS / folder).glob("test_*.py") for found in marks(path.read_text("utf-8"))]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_package_has_quick_tests(folder):
    found = of_folder(folder)
    assert any("quick" in one for one in found), f"mark a test of tests/{folder} with @pytest.mark.quick"
    assert not [one for one in found if {"quick", "slow"} <= one]


def test_the_marks_of_a_file_are_found():
    source = (
        "pytestmark = pytest.mark.slow\n@pytest.mark.quick\n@pytest.mark.parametrize('a', [1])\ndef test_a(a): pass\n"
    )
    assert list(marks(source)) == [{"slow"}, {"quick", "parametrize"}]
    assert len(FOLDERS) > 10
