"""The notebooks of examples/ run, and what is committed in them is what they say.

The slowest are marked slow; their committed outputs are looked at in every run.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

import nbformat
import pytest
from helpers.scripts import script

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
SLOW = {"04_your_model", "07_a_real_checkpoint"}
MOST_BYTES, MOST_CELLS = 300_000, 16
PATHS = re.compile(r"/(tmp|root|home|Users|var|opt|usr)\b")

every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path):
    return nbformat.read(path, as_version=4)


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(notebook) -> list[list[tuple[str, str]]]:
    """Per code cell what it says and shows, in order: (kind, text); of a picture its size in words."""
    return [[said(output) for output in cell.outputs] for cell in code(notebook)]


def said(output) -> tuple[str, str]:
    if output.output_type == "stream":
        return output.name, output.text
    if output.output_type == "error":
        return "error", output.evalue
    return "+".join(sorted(output.data)), output.data.get("text/plain", "")


def one_cell(folder: Path, source: str) -> Path:
    path = folder / "one.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), path)
    return path


def test_they_are_numbered():
    assert len(NOTEBOOKS) > 4
    assert [path.name[:3] for path in NOTEBOOKS] == [f"{number:02}_" for number in range(1, len(NOTEBOOKS) + 1)]
    assert script("run_notebooks").notebooks() == NOTEBOOKS
    assert {path.stem for path in NOTEBOOKS} > SLOW


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in SLOW else []) for p in NOTEBOOKS]
)
def test_it_runs_and_says_what_is_committed(path):
    assert shown(script("run_notebooks").run(path)) == shown(read(path)), (
        "python examples/run_notebooks.py saves new outputs"
    )


def test_a_cell_that_fails_and_an_output_that_is_not_committed_are_noticed(tmp_path):
    with pytest.raises(Exception, match="ZeroDivisionError"):
        script("run_notebooks").run(one_cell(tmp_path, "1 / 0"))
    path = one_cell(tmp_path, "import hf_longctx\nprint(hf_longctx.__name__)\n6 * 7")
    fresh = script("run_notebooks").run(path)
    assert shown(fresh) == [[("stdout", "hf_longctx\n"), ("text/plain", "42")]]
    assert shown(read(path)) == [[]]


@every
def test_the_committed_file_is_small_and_clean(path):
    notebook = read(path)
    assert path.stat().st_size < MOST_BYTES
    assert len(notebook.cells) <= MOST_CELLS
    assert script("run_notebooks").cleaned(copy.deepcopy(notebook)) == notebook, (
        "python examples/run_notebooks.py cleans it"
    )
    outputs = [one for cell in shown(notebook) for one in cell]
    assert not {"stderr", "error"} & {kind for kind, _ in outputs}
    assert not [text for _, text in outputs if PATHS.search(text)]


@every
def test_every_picture_and_every_text_is_there(path):
    cells = code(read(path))
    for cell, outputs in zip(cells, shown(read(path)), strict=True):
        kinds = [kind for kind, _ in outputs]
        if re.search(r"^\s*print\(", cell.source, re.M):
            assert "stdout" in kinds
        if "plt.show()" in cell.source or "head_map(" in cell.source:
            assert "image/png+text/plain" in kinds
    assert sum("image/png" in kind for cell in shown(read(path)) for kind, _ in cell) >= 1


@every
def test_links_lead_somewhere(path):
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    links = re.findall(r"\[[^]]+\]\(([^)]+)\)", text)
    assert len(links) >= 3
    for link in links:
        name, _, anchor = link.partition("#")
        page = path.parent / name
        assert page.exists(), link
        heads = re.findall(r"^#+ (.*)", page.read_text("utf-8"), re.M) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w\- ]", "", head).lower().replace(" ", "-") for head in heads}, link


def test_paths_are_noticed():
    assert PATHS.search("loaded from /home/me/model") and not PATHS.search("1/2 of the tokens, layer/head")
