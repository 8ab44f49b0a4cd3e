"""One new file adds a word of any kind: in a copy of the package, with one file more per kind and none changed.

The files are in ``new_files/``, each where it belongs. The tests of the copy are run over them, unchanged.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hf_longctx.config.words import FOLDERS

ROOT = Path(__file__).parents[1]
NEW = Path(__file__).parent / "new_files"
FILES = sorted(path.relative_to(NEW) for path in NEW.rglob("*.py"))
NOT_COPIED = shutil.ignore_patterns("*.so")  # what Python compiled is copied, which saves seconds
# Tests of the copy that must take the new words up by themselves: file -> an expression of pytest's -k.
CHECKS = {
    "test_imports.py": " or ".join(["every_package_has_its_row", "circle", *(f"/{file.name}" for file in FILES)]),
    "config/test_words.py": "every_file_of_every_folder",
    "config/test_bounds.py": "Rounded or LocalBlocks or FewPages or LargeValues or Louder or WeightNorm or Pin",
    "stores/test_every_store.py": "rounded and (reset or copies or user_give or bad_input)",
    "prefill/test_every_pattern.py": "local_blocks",
    "decode/test_every_selection.py": "few_pages and (dense or padded or assisted or forks or report)",
    "eviction/test_every_score.py": "large_values",
    "eviction/test_every_after.py": "louder",
    "kernels/test_every_kernel.py": "textbook",
    "tasks/test_every_task.py": "pin and (bytes or tiny)",
}


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file, by its path in the folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A folder with the package (laid out as in a wheel) and its tests, after the new files were added."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "hf_longctx", folder / "hf_longctx", ignore=NOT_COPIED)
    shutil.copytree(ROOT / "patches", folder / "hf_longctx" / "patches", ignore=NOT_COPIED)
    shutil.copytree(ROOT / "configs", folder / "hf_longctx" / "configs", ignore=shutil.ignore_patterns("*.py*"))
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=NOT_COPIED)
    shutil.copy(ROOT / "pyproject.toml", folder)
    before = contents(folder)
    for file in FILES:
        shutil.copy(NEW / file, folder / "hf_longctx" / file)
    after = contents(folder)
    assert {path for path in after if path not in before} == {f"hf_longctx/{file}" for file in FILES}
    assert before == {path: digest for path, digest in after.items() if path in before}
    return folder


def run(folder: Path, *args: str) -> str:
    """What this Python prints, with the package of the copy."""
    env = {**os.environ, "PYTHONPATH": str(folder), "HF_LONGCTX_NATIVE": "0", "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, cwd=folder, env=env, check=False, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_there_is_one_file_of_every_kind():
    folders = {*FOLDERS.values(), "commands"}
    assert sorted(".".join(file.parent.parts) for file in FILES) == sorted(folders)


RUN = """
    import json, torch, hf_longctx
    from hf_longctx import LongCtxConfig, identify, patch_model, report
    from hf_longctx.config.reference import reference
    from hf_longctx.model.family import families
    from hf_longctx.tasks import task_from
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from hf_longctx.assets import asset

    def model_of(family):
        small = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=0, eos_token_id=None)
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, initializer_range=0.3, **small)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()

    ids = torch.arange(400)[None] % 90 + 3
    ask = dict(max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)

    def logits(model, **sections):
        if sections:
            heads = {"roles": ["RR", "RR"]}
            data = {"model": LongCtxConfig.describe(model.config), "heads": heads, **sections}
            patch_model(model, data)
        return torch.stack(model.generate(ids, **ask).logits)

    def apart(one, other):
        return float((one - other).abs().max())

    model = model_of("llama")
    dense, whole = logits(model), {"stores": {"retrieval": {"store": "full"}}}
    fine, coarse = ({"stores": {"retrieval": {"store": "rounded", "steps": n}}} for n in (4096, 2))
    some, all_ = ({"prefill": {"min_tokens": 1, "retrieval": {"pattern": "local_blocks", "near": n}}} for n in (1, 99))
    told = {"file": hf_longctx.__file__, "dense": apart(logits(model, **whole), dense)}
    told |= {"store": [apart(logits(model, **one), dense) for one in (fine, coarse)]}
    told |= {"pattern": [apart(logits(model, **one), dense) for one in (all_, some)]}
    told["kernel"] = [apart(logits(model, **whole, kernel="textbook"), dense), *report(model).kernels]
    told["persisted"] = LongCtxConfig.from_dict(json.loads(json.dumps(model.config.longctx))).kernel
    select = {"select": "few_pages", "min_tokens": 1, "dense_layers": 0, "sink": 4, "recent": 16}
    few, all_ = ({"decode": {"retrieval": {**select, "budget": n}}} for n in (32, 400))
    told["select"] = [apart(logits(model, **whole, **one), dense) for one in (all_, few)] + [report(model).read]
    evicted = {"store": "evicted", "rule": {"score": "large_values"}, "recent": 16}
    few, all_ = ({"stores": {"retrieval": {**evicted, "budget": {"share": one}}}} for one in (0.1, 1.0))
    told["score"] = [apart(logits(model, **one), dense) for one in (all_, few)]
    few["stores"]["retrieval"]["rule"]["order"] = 1.0
    told["order"] = apart(logits(model, **few), dense) - told["score"][1]
    dropped = logits(model, **few)
    afters = [{"after": "louder", "weight": one} for one in (0.0, 1.0)]
    left = [{"stores": {"retrieval": {**few["stores"]["retrieval"], "after": one}}} for one in afters]
    told["after"] = [apart(logits(model, **one), dropped) for one in left]
    found = identify(model_of("llama"), None, "weight_norm", power=2.0, sink=2, recent=8)
    told["method"] = [found.heads.source["method"], len({score for row in found.heads.scores for score in row})]
    from hf_longctx.tasks.language import language_for
    language = language_for(AutoTokenizer.from_pretrained(asset("tiny-llama")))
    told["task"] = [task_from("pin").name, task_from("pin").make(language, 200).length]
    nanochat = model_of("nanochat")
    dense = logits(nanochat)
    told["family"] = ["nanochat" in families(), apart(logits(nanochat, **whole), dense)]
    told["reference"] = reference()
    print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(copy) -> dict:
    return json.loads(run(copy, "-c", textwrap.dedent(RUN)).splitlines()[-1])


def test_models_run_with_the_words(copy, told):
    assert told["file"] == str(copy / "hf_longctx" / "__init__.py")
    assert told["dense"] < 1e-9 and told["family"][0] and told["family"][1] < 1e-9
    for same, other in (told["store"], told["pattern"], told["select"][:2], told["score"], told["after"]):
        assert same < 0.1 * other, "what the limit changes is small, what the word does is not"
    assert told["order"], "a field of the score is read"
    assert told["kernel"][0] < 1e-9 and told["kernel"][1:] == ["textbook"] and told["persisted"] == "textbook"
    assert 0.1 < told["select"][2] < 0.2, "32 of 400 tokens, sinks and the newest"
    assert told["method"] == ["weight_norm", 4] and told["task"] == ["pin", 200]


def test_the_reference_has_a_row_of_every_field(told):
    for row in (
        "`store: rounded` in stores (retrieval heads)",
        "| `steps` | whole number, >= 1, <= 4096 (steps) | `64` | grid steps per unit. |",
        "`pattern: local_blocks` in prefill (retrieval heads)",
        "| `near` | whole number, >= 1, <= 1048576 (blocks) | `2` | latest blocks, the query's own among them. |",
        "`select: few_pages` in decode (retrieval heads)",
        "| `page` | whole number, >= 1, <= 128 (tokens) | `16` | tokens of a page. |",
        "`score: large_values` in eviction (retrieval heads)",
        "| `order` | number, >= 1.0, <= 8.0 | `2.0` | of the norm. |",
        "`after: louder` in eviction/after (retrieval heads)",
        "| `textbook` | `kernel: textbook`: the definition of attention. |",
    ):
        assert row in told["reference"], row


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("--help", "say-hello"),
        ("say-hello --name world", "Hello, world."),
        ("identify --help", "weight_norm"),
        ("eval --help", "pin"),
    ],
)
def test_commands_and_their_help_have_the_words(copy, command, said):
    assert said in run(copy, "-m", "hf_longctx", *command.split())


@pytest.mark.slow
def test_the_tests_of_the_copy_hold_for_the_new_files(copy):
    chosen = " or ".join(f"({file.rpartition('/')[2]} and ({some}))" for file, some in CHECKS.items())
    files = [f"tests/{file}" for file in CHECKS]
    told = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", chosen, "-rA")
    assert not [
        some
        for some in (
            *("rounded", "local_blocks", "few_pages", "large_values", "louder", "Louder"),
            *("Pin", "-pin", "nanochat", "textbook"),
        )
        if some not in told
    ]
