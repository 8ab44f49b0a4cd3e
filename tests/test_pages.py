"""How the pages are laid out: where each begins, what stands once, which files and packages they name, their words."""

from __future__ import annotations

import ast
import re

import pytest
from helpers.pages import DOCS, PAGES, RESULTS, ROOT, prose, snippets

from hf_longctx.config.words import load, words

PACKAGE = ROOT / "hf_longctx"
BEGIN_LINES = 3  # of the block that a page begins with
README_LINES = 150
RESULT_FACTS = ("Machine", "Versions", "Sizes", "Command")
ONCE = {"the visibility rule": r"i - j < recent", "when a pattern runs": r"adds at least 128"}
PLACEHOLDER = re.compile(r"[A-Z]{2,}")  # of a file that somebody is to write
WHERE = (ROOT, PACKAGE, ROOT / "tests" / "new_files")  # the last has files that a page tells its reader to write

# What a page must not say -> what it says. Quoted messages and code say what the library says.
WORDS = {
    r"\b(?<!in a )rows?\b": "sequences (of the batch), or lines of a table",
    r"\b(told|tell|tells) apart\b": "distinguish, or no ties",
    r"\b(go|goes|going|went|gone|take|takes|taking|taken|give|gives) (\w+ )?back\b": "roll back",
    r"\b(un)?pack(s|ed|ing)?\b(?! sequences)": "quantise, dequantise",
    r"\bkept (key|token)s?\b|\b(key|token)s? (\w+ )?kept\b": "cached tokens",
    r"\b(tokens? seen|seen tokens?)\b": "processed tokens",
    r"\bfree of meaning\b": "metadata, ignored at run time",
}


def begins(text: str) -> bool:
    """Whether a page is its title and then a block of a few lines that is run."""
    lines = text.splitlines()
    block = snippets(DOCS[0], text)[0] if "```" in text else None
    if not lines[0].startswith("# ") or block is None or block.not_run:
        return False
    between = [line for line in lines[1 : block.line - 1] if line and not line.startswith("<!-- model: ")]
    lines = [line for line in block.text.splitlines() if line]  # the formatter puts empty ones behind imports
    return not between and block.language in ("python", "sh") and len(lines) <= BEGIN_LINES


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_a_page_begins_with_what_to_do(page):
    assert begins(page.read_text("utf-8")), f"{page.name}: after its title, at most {BEGIN_LINES} lines that run"


def test_a_page_that_begins_otherwise_is_caught():
    page = "# Title\n\n{}```{}\n{}\n```\n"
    assert begins(page.format("", "sh", "hf-longctx configs"))
    assert begins(page.format("<!-- model: qwen3-8b -->\n", "python", "a\nb\nc"))
    assert not begins(page.format("Words first.\n\n", "sh", "hf-longctx configs"))
    assert not begins(page.format("", "python", "a\nb\nc\nd"))
    assert not begins(page.format("<!-- not run: slow -->\n", "python", "a"))
    assert not begins(page.format("", "text", "a"))
    assert not begins("# Title\n\nNo block.\n")


@pytest.mark.parametrize("page", RESULTS, ids=lambda page: page.name)
def test_a_result_says_where_it_is_from(page):
    dated, text = re.fullmatch(r"(\d{4}-\d\d-\d\d)-[a-z-]+", page.stem), page.read_text("utf-8")
    assert dated, "a page of results is called DATE-WHAT.md"
    assert text.splitlines()[0].endswith(f", {dated[1]}"), "its title ends with the date"
    facts = re.findall(r"^- \*\*(\w+)\*\*: \S", text, re.M)
    assert tuple(facts[: len(RESULT_FACTS)]) == RESULT_FACTS
    assert f"(results/{page.name})" in (ROOT / "docs" / "benchmarks.md").read_text("utf-8"), "benchmarks.md links it"


def test_the_benchmarks_page_has_one_table():
    text = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    assert len(re.findall(r"^\|[-|]+\|$", text, re.M)) == 1, "figures go to docs/results/"


@pytest.mark.parametrize("rule", ONCE)
def test_a_rule_stands_once(rule):
    found = [page.name for page in PAGES if re.search(ONCE[rule], " ".join(page.read_text("utf-8").split()))]
    assert len(found) == 1, f"{rule} stands in {found}: state it once, link to it elsewhere"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page):
    text = page.read_text("utf-8")
    drawn = "\n".join(snippet.text for snippet in snippets(page) if snippet.language == "text")
    named = set(re.findall(r"`([\w./]+(?:\.py|/))`", text)) | set(re.findall(r"[\w/]+\.py\b", drawn))
    named = {name for name in named if not PLACEHOLDER.search(name) and not name.startswith("/")}
    assert not [name for name in named if not any((root / name).exists() for root in WHERE)]


def test_the_table_of_packages_is_the_rule_of_imports():
    """In its order, with what each may import, as tests/test_imports.py has it."""
    names: dict = {}
    for node in ast.parse((ROOT / "tests" / "test_imports.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id in ("BELOW", "LAYERS"):
            exec(compile(ast.Module([node], []), "test_imports.py", "exec"), names)
    text = (ROOT / "docs" / "how_it_works.md").read_text("utf-8").partition("## The packages")[2]
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", text, re.M)
    table, above = {}, set()
    for package, may in rows:
        said = set(re.findall(r"`(\w+)`", may))
        table[package] = above - said if may.startswith("all above") else said
        assert said <= above, f"{package}: {said - above} stand below it"
        above = above | {package}
    assert table == names["LAYERS"]
    assert list(table) == list(names["LAYERS"])


def test_every_selection_has_a_row():
    text = (ROOT / "docs" / "decoding.md").read_text("utf-8").partition("## Selections")[2].partition("## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \|([^|]*)\|", text, re.M))
    assert set(words("decode")) <= rows.keys(), (
        "docs/decoding.md says of each word where it is from and when to take it"
    )
    for word in words("decode"):
        papers = re.findall(r"arXiv:\d{4}\.\d{5}", (PACKAGE / "decode" / f"{word}.py").read_text("utf-8"))
        assert all(paper in rows[word] for paper in papers), f"{word}: its file names {papers}"
        assert papers or word == "dense"


def test_every_score_of_an_eviction_has_a_row():
    text = (ROOT / "docs" / "eviction.md").read_text("utf-8").partition("## The scores")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)`[^|]*\|(.*)$", text, re.M))
    assert rows.keys() == set(words("eviction"))
    assert all(load("eviction", word).paper in rows[word] for word in rows)
    sentence = re.search(r"([^.]*) do not look for one", " ".join(text.split()))[1]
    assert {word for word in rows if load("eviction", word).agnostic} == set(re.findall(r"`(\w+)`", sentence))
    page = (ROOT / "docs" / "eviction.md").read_text("utf-8")
    assert all(f"{{after: {word}}}" in page for word in words("eviction.after"))


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < README_LINES


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_a_page_uses_the_words_of_the_field(page):
    said = prose(page.read_text("utf-8"))
    found = {match[0]: better for pattern, better in WORDS.items() for match in re.finditer(pattern, said)}
    assert not found, f"{page.name} says what stands left; say what stands right: {found}"


@pytest.mark.parametrize(
    "text",
    ["Shorter rows are padded.", "heads nobody told apart", "it goes back", "tokens packed to 8 bits", "the kept keys"],
)
def test_another_word_is_caught(text):
    assert any(re.search(pattern, prose(text)) for pattern in WORDS)
    assert not any(re.search(pattern, prose(f"`{text}`")) for pattern in WORDS), "quoted messages stay"
