"""Every snippet of the README and of docs/ runs, or says in a comment why it does not.

A page's Python snippets run one after the other in one namespace and one empty folder, where its commands run as well.
``name``, ``model``, ``tokenizer``, ``inputs``, ``prompt`` and ``prompt.txt`` are given: the embedded tiny-llama and a
short prompt. The comment
``model: NAME`` above a snippet gives it a model of that checkpoint's sizes, without weights.
"""

from __future__ import annotations

import copy
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from helpers.pages import MAKE, PAGES, ROOT, Snippet, snippets
from helpers.published import model_of
from typer.testing import CliRunner

from hf_longctx import LongCtxConfig
from hf_longctx.assets import embedded
from hf_longctx.commands._app import app
from hf_longctx.config.config import load_shipped
from hf_longctx.config.files import shipped
from hf_longctx.config.ranking import published_table

MODEL = "hf-longctx/tiny-llama"
PROGRAM = ("hf-longctx", ".venv/bin/hf-longctx")
# Snippets that no test runs, by page. A new one needs a reason on the page and a number here.
NOT_RUN = Counter(
    {
        "README.md": 4,
        "CONTRIBUTING.md": 5,
        "batching.md": 1,
        "benchmarks.md": 26,
        "evaluation.md": 8,
        "heads.md": 4,
        "2026-11-30-real-checkpoint.md": 9,
        "2026-11-30-eviction.md": 2,
        "2026-11-30-selection.md": 6,
        "faq.md": 1,
        "laptop.md": 3,
        "many_processes.md": 5,
        "prompt_cache.md": 1,
        "serving.md": 4,
        "tasks.md": 1,
        "vllm.md": 9,
    }
)


def check_command(command: str) -> None:
    program, *arguments = shlex.split(command)
    assert program in PROGRAM, f"{command}: only hf-longctx runs here; say `# not run: why` behind another command"
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "100", "TERM": "dumb"})
    assert done.exit_code == 0, f"{command}\n{done.output}\n{done.exception!r}"


def check_yaml(snippet: Snippet) -> None:
    """Every key is known and every value fits; lists that are cut short with ``...`` are filled up first."""
    given = yaml.safe_load(snippet.text)
    config = load_shipped("tiny-llama").to_dict() if "model" not in given else {}
    model = {**config, **given}["model"]
    layers, heads = model["num_hidden_layers"], model["num_attention_heads"]
    kv_heads = model["num_key_value_heads"]
    if cut_short(given.get("heads", {}).get("scores")):
        given["heads"]["scores"] = [[layer * kv_heads + head for head in range(kv_heads)] for layer in range(layers)]
    for table in given.get("prefill", {}).get("tables", {}).values():
        if cut_short(table["map"]):
            table["map"] = [[0] * heads] * layers
    made = LongCtxConfig.from_dict(config).override(**given) if config else LongCtxConfig.from_dict(given)
    assert made.to_dict() != config


def cut_short(value: object) -> bool:
    return value == "..." or isinstance(value, list) and any(map(cut_short, value))


@pytest.fixture(scope="module")
def given():
    """The names that snippets may use without defining them."""
    folder = embedded(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = {"input_ids": torch.arange(4, 104)[None]}
    prompt = tokenizer.decode(inputs["input_ids"][0])
    return {"name": str(folder), "model": model, "tokenizer": tokenizer, "inputs": inputs, "prompt": prompt}


@pytest.mark.parametrize(
    "page",
    # The page of evaluation runs every task.
    [pytest.param(one, marks=[pytest.mark.slow] * (one.name == "evaluation.md"), id=one.name) for one in PAGES],
)
def test_every_snippet_of_a_page_runs(page, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompt.txt").write_text(given["prompt"], "utf-8")
    names = {**given, "model": copy.deepcopy(given["model"])}
    for snippet in snippets(page):
        where = f"{page.name}:{snippet.line}"
        if snippet.language == "sh":
            for command, reason in snippet.commands:
                if reason is None:
                    check_command(command)
        elif snippet.reason:
            continue
        elif snippet.language == "yaml":
            check_yaml(snippet)
        elif snippet.language == "python":
            _, marked, checkpoint = snippet.comment.partition("model: ")
            own = {**names, "model": copy.deepcopy(model_of(checkpoint))} if marked else names
            exec(compile(snippet.text, where, "exec"), own)  # the snippets are this repository's own
            names |= own if not marked else {**own, "model": names["model"]}
        else:
            assert snippet.language == "text", f"{where}: a block is python, sh, yaml or text"


def test_every_page_was_found_and_what_is_not_run_is_counted():
    assert {page.name for page in PAGES} >= {"README.md", "configuration.md", "heads.md", "benchmarks.md"}
    blocks = [snippet for page in PAGES for snippet in snippets(page)]
    assert len(blocks) >= 14
    found = Counter()
    for snippet in blocks:
        found[snippet.page.name] += len(snippet.not_run)
    assert +found == NOT_RUN


def test_the_published_configs_of_each_confidence_are_counted():
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \|", (ROOT / "docs" / "choosing.md").read_text("utf-8"), re.M)
    names = [name for name in shipped() if not name.startswith("tiny-")]
    assert {word: int(n) for word, n in rows} == Counter(load_shipped(name).heads.confidence for name in names)


def test_the_docs_have_the_published_checkpoints_best_first():
    text, page = (ROOT / "README.md").read_text("utf-8"), (ROOT / "docs" / "heads.md").read_text("utf-8")
    table, best = published_table(), published_table(10)
    assert best in text, "hf-longctx configs table --best 10 prints it"
    assert table in page, "hf-longctx configs table prints it"
    assert table.startswith(best) and len(best.splitlines()) == 12
    rows = [re.split(r" *\| *", line)[1:4] for line in table.splitlines()[2:]]
    found, order = {}, []
    for ids, confidence, share in rows:
        word, percent = confidence.partition(":")[0], float(share.removesuffix(" %"))
        order.append((("measured", "low", "none").index(word), percent))
        found |= dict.fromkeys(ids.split(", "), (word, percent))
    assert order == sorted(order)
    names = [name for name in shipped() if not name.startswith("tiny-")]
    words = [word for word, _ in found.values()]
    said = (
        f"Those of {len(names)} published checkpoints ship, {words.count('measured')} of them with a measured head map "
        f"and {words.count('low')} with one of low confidence"
    )
    assert len(found) == len(names) and said in " ".join(text.split())
    for config in map(load_shipped, names):
        dense, patched = config.kv_bytes(131072)
        first, confidence = config.model.ids[0], config.heads.confidence
        shown = first.rpartition("/")[2] if confidence == "none" else first
        assert found[shown] == (confidence, round(100 * patched / dense))


def test_the_table_of_what_it_works_with_names_its_tests():
    text = (ROOT / "docs" / "faq.md").read_text("utf-8")
    rows = [
        re.split(r" *\| *", line)[1:5]
        for line in text.splitlines()
        if re.match(r"\| [^|]+\| (yes|no|untested) \|", line)
    ]
    table = text.partition("|---|---|---|---|\n")[2].partition("\n\n")[0]
    assert len(rows) == len(table.splitlines()) >= 30, "every line says yes, no or untested"
    for thing, answer, _, test in rows:
        assert not test or (ROOT / test.strip("`")).is_file(), f"{thing}: there is no {test}"
        assert bool(test) == (answer == "yes") or answer == "no", f"{thing}: {answer}, shown by {test or 'nothing'}"


def test_every_make_target_is_there():
    makefile, named = (ROOT / "Makefile").read_text("utf-8"), set()
    for page in PAGES:
        commands = [line for snippet in snippets(page) if snippet.language == "sh" for line, _ in snippet.commands]
        named |= {word for line in commands if line.startswith("make ") for word in line.split()[1:] if "=" not in word}
    assert named >= {"demo", "test", "lint", "test-slow"}
    assert not [target for target in named if not re.search(rf"^{target}:", makefile, re.M)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_stand_in_fenced_blocks(page):
    hidden = re.findall(
        rf"^ {{4,}}(?:{'|'.join(map(re.escape, PROGRAM))}|pip|make|python) .*", page.read_text("utf-8"), re.M
    )
    assert not hidden, f"{page.name}: put these into ```sh blocks, so that they are run: {hidden}"


def anchors(page: Path) -> set[str]:
    """What the links into a page may name: its headings, as GitHub turns them into anchors."""
    heads = re.findall(r"^#+ (.*)", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head).lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S)
    links = [link for link in re.findall(r"\[[^]]*\]\(([^)]+)\)", prose) if not link.startswith("http")]
    for link in links:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"
    assert page.name != "README.md" or len(links) >= 20


def test_a_wrong_snippet_is_caught(tmp_path):
    def one(language, text, comment=""):
        return snippets(tmp_path, f"{comment}\n```{language}\n{text}\n```")[0]

    with pytest.raises(AssertionError, match="only hf-longctx runs here"):
        check_command("rm -r everything")
    with pytest.raises(AssertionError, match="No such command"):
        check_command("hf-longctx patch")
    with pytest.raises(Exception, match="recnt"):
        check_yaml(one("yaml", "stores: {streaming: {store: sink_recent, recnt: 3}}"))
    block = one("sh", "./other  # not run: slow\nhf-longctx \\\n  configs  # lists\nmake test")
    assert block.commands == [("./other", "slow"), ("hf-longctx configs", None), ("make test", MAKE)]
    assert one("python", "1", "<!-- not run: needs a GPU -->").reason == "needs a GPU"
    with pytest.raises(AssertionError, match="does not end"):
        snippets(tmp_path, "```sh\nhf-longctx configs")
