"""Every model finds its config, or an error that says what to do."""

from __future__ import annotations

import logging

import pytest
import yaml
from helpers.config_cases import FINGERPRINT, config, hf, plain, refused, ship, write

from hf_longctx.config import files as config_files
from hf_longctx.config import find
from hf_longctx.config.config import load_shipped
from hf_longctx.config.find import find_name, resolve, shipped_name


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
    ship(folder, "tiny-1b", fingerprint={key: FINGERPRINT[key] for key in FINGERPRINT if key != "vocab_size"})
    refused(lambda: resolve("auto", hf(), "me/finetune"), "tiny-1b: fingerprint.vocab_size is missing")
    ship(folder, "tiny-1b")
    refused(
        lambda: resolve("auto", hf(vocab_size=1001), "me/finetune"),
        "tiny-1b: fingerprint.vocab_size 1000 (model: 1001)",
    )


def test_auto_that_finds_nothing_says_first_how_to_make_one(folder):
    asked = "no shipped config fits the model {!r}. Measure its heads: hf-longctx identify {} --out my.yaml, then patch"
    for name, said in (("a/b", "a/b"), ("/my models/a", "'/my models/a'"), ("", "MODEL")):
        message = refused(lambda name=name: resolve("auto", hf(), name))
        assert message.startswith("config='auto': " + asked.format(name, said)) and "\n" not in message


def test_auto_lists_a_few_configs_of_nearly_this_model(folder):
    for i in range(5):
        ship(folder, f"m{i}", fingerprint={**FINGERPRINT, "vocab_size": 1})
    ship(folder, "n0", fingerprint={**FINGERPRINT, "vocab_size": 1, "rope_theta": 1.0})
    ship(folder, "far", fingerprint={**FINGERPRINT, "vocab_size": 1, "rope_theta": 1.0, "hidden_size": 1})
    ship(folder, "deeper", num_hidden_layers=4)
    first, *lines = refused(lambda: resolve("auto", hf(), "a/b")).splitlines()
    assert first.endswith('--out my.yaml, then patch_model(model, "my.yaml").')
    assert lines[1:] == [f"  m{i}: fingerprint.vocab_size 1 (model: 1000)" for i in range(3)] + ["  and 3 more"]


SCALED = ("linear", "dynamic", "yarn")


@pytest.mark.parametrize("kind", SCALED)
def test_auto_finds_the_config_of_a_model_whose_rope_was_scaled(folder, kind):
    ship(folder, "tiny-1b", fingerprint={**FINGERPRINT, "rope_type": "default"})
    model = hf(rope_parameters={"rope_type": kind, "rope_theta": 5e5, "factor": 4.0})
    for name in ("org/Tiny-1B", "me/finetune"):
        assert resolve("auto", model, name) == load_shipped("tiny-1b")
    wider = hf(rope_parameters=model.rope_parameters, vocab_size=7)
    for name in ("org/Tiny-1B", "me/finetune"):
        message = refused(lambda name=name: resolve("auto", wider, name), "fingerprint.vocab_size 1000 (model: 7)")
        assert "rope_type" not in message
    ship(folder, "measured", fingerprint={**FINGERPRINT, "rope_type": kind}, ids=["org/Scaled"])
    assert resolve("auto", model, "me/finetune") == load_shipped("measured"), "the one that was measured so"


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [("default", "llama3"), ("default", "longrope"), ("yarn", "default"), ("yarn", "linear"), ("llama3", "yarn")],
)
def test_other_rope_types_are_other_models(folder, mine, theirs):
    ship(folder, "tiny-1b", fingerprint={**FINGERPRINT, "rope_type": mine})
    model = hf(rope_parameters={"rope_type": theirs, "rope_theta": 5e5})
    refused(lambda: resolve("tiny-1b", model), f"fingerprint.rope_type {mine!r} (model: {theirs!r})")
    theta = hf(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4})
    ship(folder, "tiny-1b", fingerprint={**FINGERPRINT, "rope_type": "default"})
    refused(lambda: resolve("tiny-1b", theta), "fingerprint.rope_theta 500000.0 (model: 10000.0)")


@pytest.mark.parametrize("name", ["tiny-1b", "TINY-1b", "org/Tiny-1B", "ORG/tiny-1b"])
def test_a_config_by_its_name_or_one_of_its_ids_in_any_case(folder, name):
    ship(folder, "tiny-1b")
    ship(folder, "other", ids=["org/Other"])
    assert find_name(name) == shipped_name(name) == "tiny-1b"
    assert resolve(name, hf()) == load_shipped("tiny-1b")


def test_names_that_say_too_little_or_too_much(folder, tmp_path):
    ship(folder, "tiny-1b")
    ship(folder, "twin")
    refused(lambda: resolve("org/tiny-1b", hf()), "2 shipped configs go by 'org/tiny-1b': tiny-1b, twin. Name one")
    ship(folder, "twin", ids=["org/Twin-1B"])
    assert resolve("org/tiny-1b", hf()).model.ids == ("org/Tiny-1B",)
    assert find_name("Tiny-1B-chat") is None and find_name("x/Tiny-1B") is None and find_name("") is None
    refused(lambda: shipped_name("org/Tiny-1"), "got 'org/Tiny-1', but no shipped", "Did you mean 'org/Tiny-1B'?")
    refused(lambda: shipped_name("tiny-1", "MODEL"), "MODEL: got 'tiny-1', expected one of: tiny-1b, twin.")
    refused(lambda: shipped_name(str(tmp_path)), "is a folder, expected a shipped name")
    assert len(refused(lambda: shipped_name("org/" + "x" * 10**6))) < 400


def test_every_shipped_id_leads_to_one_config(monkeypatch):
    sections = find._models()
    monkeypatch.setattr(find, "_models", lambda: sections)  # which each name would read anew
    assert list(sections) == list(config_files.shipped())
    for name, section in sections.items():
        for known in section.ids:
            assert find_name(known.upper()) == name


def test_overrides_are_laid_over_before_the_model_is_checked(folder):
    ship(folder, "tiny-1b")
    over = {"model": {"fingerprint": {"vocab_size": None}}, "kernel": "stock"}
    found = resolve("tiny-1b", hf(vocab_size=7), None, over)
    assert found.kernel == "stock" and found.model.fingerprint.vocab_size is None
    refused(lambda: resolve("tiny-1b", hf(), None, {"model": {"head_dim": 8}}), "head_dim 8 (model: 16)")


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


def test_a_model_of_which_every_head_is_a_retrieval_head_needs_no_config(folder):
    whole = {"heads": {"retrieval_fraction": 1.0}}
    found = resolve("auto", hf(), "a/b", {**whole, "stores": {"retrieval": {"store": "quantized"}}})
    assert found.roles() == ("RR",) * 3 and found.stores.retrieval.bits == 8 and not found.heads.source
    assert found.model.fingerprint.vocab_size == 1000
    for part in (0.5, 0.99, None):
        refused(lambda part=part: resolve("auto", hf(), "a/b", {"heads": {"retrieval_fraction": part}}), "no shipped")
    ship(folder, "tiny-1b")
    assert resolve("auto", hf(), "org/Tiny-1B", whole).scores is not None, "its own config is taken where there is one"
    ship(folder, "twin", ids=["org/Twin"])
    assert resolve("auto", hf(), "", whole).roles() == ("RR",) * 3, "several fit, and the head maps do not matter"
    refused(lambda: resolve("auto", hf(), ""), "2 shipped configs fit")


def test_over_roles_every_head_or_no_share():
    given = plain(heads={"roles": ["RS", "SS", "SR"]})
    assert resolve(given, hf(), None, {"heads": {"retrieval_fraction": 1.0}}).roles() == ("RR",) * 3
    assert resolve(given, hf()).roles() == ("RS", "SS", "SR")
    refused(lambda: resolve(given, hf(), None, {"heads": {"retrieval_fraction": 0.5}}), "got 0.5", "over roles, or 1.0")
