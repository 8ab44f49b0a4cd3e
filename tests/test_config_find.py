"""Every model finds its config, or an error that says what to do."""

from __future__ import annotations

import logging

import pytest
import yaml
from config_cases import FINGERPRINT, config, hf, plain, refused, ship, write

from hf_longctx import config_files
from hf_longctx.config import load_shipped
from hf_longctx.config_find import resolve


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of shipped configs."""
    monkeypatch.setattr(config_files, "shipped_folder", lambda: tmp_path / "shipped")
    (tmp_path / "shipped").mkdir()
    return tmp_path / "shipped"


def test_resolve_takes_every_form(folder, tmp_path):
    ship(folder, "tiny-1b")
    made = load_shipped("tiny-1b")
    made.to_yaml(tmp_path / "c.yaml")
    for form in ("tiny-1b", made, made.to_dict(), str(tmp_path / "c.yaml"), tmp_path / "c.yaml", "auto"):
        assert resolve(form, hf()) == made


@pytest.mark.parametrize("form", [None, 3, True, ["auto"]])
def test_resolve_refuses_other_forms(form):
    refused(lambda: resolve(form, hf()), "config: got", "'auto', a shipped name")


def test_resolve_unknown_name_and_other_model(folder):
    ship(folder, "tiny-1b")
    refused(lambda: resolve("tiny1b", hf()), "config: got 'tiny1b'", "Did you mean 'tiny-1b'?")
    refused(lambda: resolve("../tiny-1b", hf()), "config: got '../tiny-1b'")
    refused(lambda: resolve("tiny-1b", hf(head_dim=8)), "made for another model")
    refused(lambda: resolve(plain(), hf(head_dim=8)), "made for another model")


def test_auto_takes_the_models_own_config_first(folder):
    ship(folder, "tiny-1b")
    own = config(retrieval_fraction=1 / 6)
    assert resolve("auto", hf(longctx=own.to_dict()), "org/Tiny-1B") == own
    for nothing in (None, False):
        assert resolve("auto", hf(longctx=nothing), "org/Tiny-1B") == load_shipped("tiny-1b")


@pytest.mark.parametrize(
    "own", ["auto", True, [], {"model": {}}, {"extends": "tiny-1b"}, {"stores": {"retrieval": {"store": "os"}}}]
)
def test_auto_trusts_nothing_in_the_models_own_config(folder, own):
    ship(folder, "tiny-1b")
    refused(lambda: resolve("auto", hf(longctx=own), "org/Tiny-1B"), "config.longctx of the model: ")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("org/Tiny-1B", True),
        ("ORG/tiny-1b", True),
        ("/data/models/tiny-1b/", True),
        ("./tiny-1B", True),
        ("Tiny-1B", True),
        ("C:\\models\\Tiny-1B", True),
        ("/cache/models--org--Tiny-1B/snapshots/0123abcd", True),
        ("/cache/models--other--Tiny-1B/snapshots/0123abcd", False),
        ("other/Tiny-1B", False),
        ("/data/Tiny-1B-chat", False),
        ("", False),
    ],
)
def test_auto_by_name(folder, name, found):
    # A twin with the same fingerprint, so that nothing but the name can tell them apart.
    ship(folder, "tiny-1b")
    ship(folder, "twin", ids=["org/Twin"])
    if found:
        assert resolve("auto", hf(), name) == load_shipped("tiny-1b")
        assert resolve("auto", hf(_name_or_path=name)) == load_shipped("tiny-1b")
    else:
        refused(lambda: resolve("auto", hf(), name), "2 shipped configs fit", "tiny-1b, twin")


def test_auto_by_name_still_checks_the_model(folder):
    ship(folder, "tiny-1b")
    refused(lambda: resolve("auto", hf(vocab_size=7), "org/Tiny-1B"), "made for another model", "vocab_size")


def test_auto_by_fingerprint_is_logged(folder, caplog):
    ship(folder, "tiny-1b")
    ship(folder, "bigger", num_hidden_layers=4, ids=["org/Bigger"])
    with caplog.at_level(logging.INFO, "hf_longctx"):
        assert resolve("auto", hf(), "me/finetune") == load_shipped("tiny-1b")
    assert "config tiny-1b" in caplog.text and "fingerprint" in caplog.text


def test_auto_needs_the_whole_fingerprint(folder):
    ship(folder, "tiny-1b", fingerprint={"hidden_size": 64})
    refused(lambda: resolve("auto", hf(), "me/finetune"), "tiny-1b: fingerprint.intermediate_size is missing")
    ship(folder, "tiny-1b")
    refused(
        lambda: resolve("auto", hf(vocab_size=1001), "me/finetune"),
        "tiny-1b: fingerprint.vocab_size 1000 (model: 1001)",
    )


def test_auto_that_finds_nothing_says_how_to_make_one(folder):
    refused(lambda: resolve("auto", hf(), "a/b"), "'a/b'", "none", "hf-longctx identify", "LongCtxConfig.describe")
    for i in range(10):
        ship(folder, f"m{i}", fingerprint={**FINGERPRINT, "vocab_size": 1}, num_hidden_layers=3 + (i > 4))
    message = refused(lambda: resolve("auto", hf(), "a/b"), "m0: fingerprint.vocab_size 1 (model: 1000)", "and 2 more")
    assert message.index("m4:") < message.index("m5: num_hidden_layers")


def test_auto_reads_the_model_section_of_any_layout(folder):
    text = yaml.safe_dump(plain(), default_flow_style=True)
    write(folder / "flow.yaml", text)
    assert resolve("auto", hf(), "org/Tiny-1B").model.ids == ("org/Tiny-1B",)
    block = yaml.safe_dump(plain(), sort_keys=False).replace("model:\n", "# a comment\nmodel: # what it fits\n\n")
    write(folder / "flow.yaml", block.replace("  head_dim", "# inside\n\n  head_dim") + "model_x: 1\n")
    assert config_files.shipped_model("flow") == plain()["model"]


def test_a_config_that_came_with_a_model_names_no_path(folder, tmp_path):
    own = {**plain(), "stores": {"retrieval": {"store": "offloaded_disk", "folder": str(tmp_path)}}}
    refused(lambda: resolve("auto", hf(longctx=own), "a/b"), "stores.retrieval.folder", str(tmp_path), "name no path")
    assert resolve(own, hf(), "a/b").stores.retrieval.folder == str(tmp_path)
    del own["stores"]["retrieval"]["folder"]
    assert resolve("auto", hf(longctx=own), "a/b").stores.retrieval.folder is None
