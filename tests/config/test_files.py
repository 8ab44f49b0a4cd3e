"""Overrides follow the rules, and files are read strictly."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml
from helpers.config_cases import SCORES, config, plain, refused, ship, whole, write

from hf_longctx.assets import assets
from hf_longctx.config import checks
from hf_longctx.config import files as config_files
from hf_longctx.config.config import LongCtxConfig, load_shipped
from hf_longctx.config.files import merge, shipped


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of shipped configs."""
    monkeypatch.setattr(config_files, "shipped_folder", lambda: tmp_path / "shipped")
    (tmp_path / "shipped").mkdir()
    return tmp_path / "shipped"


def test_override_merges_and_leaves_the_original():
    made = LongCtxConfig.from_dict(whole())
    before = made.to_dict()
    changed = made.override(stores={"streaming": {"recent": 9}}, prefill={"min_tokens": 1}, kernel="auto")
    assert made.to_dict() == before
    assert (changed.stores.streaming.sink, changed.stores.streaming.recent) == (3, 9)
    assert changed.prefill.min_tokens == 1 and changed.prefill.share_groups is True and changed.kernel == "auto"


def test_override_replaces_lists():
    assert config(dense_layers=[0, 1]).override(heads={"dense_layers": [2]}).heads.dense_layers == (2,)


def test_override_of_fraction_and_budget_removes_the_rival():
    made = config(kv_budget=0.5).override(heads={"retrieval_fraction": 0.25})
    assert (made.heads.retrieval_fraction, made.heads.kv_budget) == (0.25, None)
    made = made.override(heads={"kv_budget": 0.7})
    assert (made.heads.retrieval_fraction, made.heads.kv_budget) == (None, 0.7)
    assert made.override(heads={"retrieval_fraction": None}).heads.kv_budget == 0.7


def test_override_of_scores_and_roles_removes_the_rival_and_what_was_said_about_it():
    made = config(source={"m": 1}, measured={"n": 1}, confidence="measured", dense_layers=[0], kv_budget=0.5)
    roles = made.override(heads={"roles": ["SS", "RR", "SS"]})
    assert roles.roles() == ("SS", "RR", "SS")
    heads = roles.heads
    assert (heads.scores, heads.source, heads.measured, heads.confidence, heads.kv_budget) == (
        None,
        {},
        {},
        "none",
        None,
    )
    scores = roles.override(heads={"scores": SCORES, "source": {"m": 2}})
    assert scores.heads.roles is None and scores.heads.source == {"m": 2} and scores.heads.retrieval_fraction == 0.5


@pytest.mark.parametrize("share", ["retrieval_fraction", "kv_budget"])
def test_share_over_roles_is_refused(share):
    made = LongCtxConfig.from_dict(plain(heads={"roles": ["RS", "SS", "SR"]}))
    refused(lambda: made.override(heads={share: 0.25}), f"heads.{share}: got 0.25", "over roles")
    both = {"roles": ["RS", "SS", "SR"], share: 0.25}
    refused(lambda: LongCtxConfig.from_dict(plain(heads=both)), f"heads.{share}: got 0.25", "over roles")
    assert made.override(heads={"scores": SCORES, share: 0.25})


def test_override_with_both_rivals_is_refused():
    refused(lambda: config().override(heads={"retrieval_fraction": 0.2, "kv_budget": 0.2}), "not both")
    refused(lambda: config().override(heads={"scores": SCORES, "roles": ["RS"] * 3}), "both of scores and roles")


def test_override_to_an_alternative_with_roles_and_back():
    made = config(alternatives={"b": {"roles": ["RR", "SS", "SS"]}}, kv_budget=0.6, dense_layers=[2])
    used = made.override(heads={"use": "b"})
    assert used.roles() == ("RR", "SS", "SS")
    assert used.override(heads={"use": None}).heads.retrieval_fraction == 0.5
    assert used.override(heads={"scores": SCORES}).heads.use is None
    refused(lambda: made.override(heads={"use": "b", "kv_budget": 0.6}), "over roles")
    changed = made.override(heads={"alternatives": {"b": {"scores": SCORES}}})
    assert changed.heads.alternatives["b"].roles is None


def test_a_new_word_starts_from_its_own_defaults():
    base = {"stores": {"streaming": {"store": "a", "sink": 3}}, "prefill": {"retrieval": {"pattern": "p", "n": 1}}}
    base |= {"decode": {"retrieval": {"select": "s", "n": 1}}}
    assert merge(base, {"stores": {"streaming": {"store": "b"}}})["stores"]["streaming"] == {"store": "b"}
    assert merge(base, {"stores": {"streaming": {"store": "a", "x": 1}}})["stores"]["streaming"]["sink"] == 3
    assert merge(base, {"decode": {"retrieval": {"select": "t"}}})["decode"]["retrieval"] == {"select": "t"}
    table = merge(base, {"prefill": {"retrieval": {"table": "m"}}})
    assert table["prefill"]["retrieval"] == {"table": "m"}
    assert merge(table, {"prefill": {"retrieval": {"pattern": "p"}}})["prefill"]["retrieval"] == {"pattern": "p"}
    named = {"prefill": {"tables": {"store": {"x": 1}}}}
    assert merge(named, {"prefill": {"tables": {"table": {"y": 1}}}})["prefill"]["tables"].keys() == {"store", "table"}


def test_a_word_inside_a_store_and_the_rival_of_a_budget():
    rule, after = {"score": "snapkv", "window": 8}, {"after": "merge", "similarity": 0.5}
    store = {"store": "evicted", "rule": rule, "budget": {"share": 0.3}, "after": after, "sink": 2}
    base = {"stores": {"retrieval": store}}

    def merged(**over):
        return merge(base, {"stores": {"retrieval": over}})["stores"]["retrieval"]

    assert merged(rule={"score": "tova"}) == store | {"rule": {"score": "tova"}}
    assert merged(rule={"window": 9}) == store | {"rule": rule | {"window": 9}}
    assert merged(rule={"score": "snapkv", "pool": 1})["rule"] == rule | {"pool": 1}
    assert merged(after={"after": "drop"}) == store | {"after": {"after": "drop"}}
    assert merged(budget={"tokens": 9}) == store | {"budget": {"tokens": 9}}
    assert merged(budget={"share": 0.1})["budget"] == {"share": 0.1} and merged(budget={}) == store
    assert merged(store="full") == {"store": "full"}


def test_merge_shares_nothing_with_what_it_was_given():
    over = {"heads": {"use": "b", "alternatives": {"b": {"roles": ["RS"]}}}}
    before = copy.deepcopy(over)
    merge({}, over)["heads"]["alternatives"].clear()
    assert over == before


@pytest.mark.parametrize(
    ("sections", "fragments"),
    [
        ({"head": {}}, ["head: unknown key", "Did you mean 'heads'?"]),
        ({"heads": {"balanse": 2}}, ["heads.balanse: unknown key", "Did you mean 'balance'?"]),
        ({"stores": 3}, ["stores: got 3", "a mapping"]),
        ({"stores": {"streaming": 3}}, ["stores.streaming: got 3", "a mapping"]),
        ({"heads": None}, ["heads: got None", "a mapping"]),
        ({"heads": {"use": "b"}}, ["heads.use: got 'b'"]),
    ],
)
def test_wrong_overrides(sections, fragments):
    refused(lambda: config().override(**sections), *fragments)


def test_wrong_files_name_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    read = lambda text: LongCtxConfig.from_yaml(write(path, text))  # noqa: E731
    refused(lambda: read("kernel: auto\nkernel: cpu\n"), str(path), "key 'kernel' is given twice", "line 2")
    refused(lambda: read("heads: {balance: 1, 'balance': 2}\n"), "key 'balance' is given twice")
    refused(lambda: read("kernel: !!python/object/apply:os.getcwd []\n"), str(path), "python/object")
    refused(lambda: read("a: [\n"), str(path), "not YAML that")
    refused(lambda: read("? [a]\n: 1\n"), str(path))
    refused(lambda: read(""), str(path), "got None", "a mapping")
    refused(lambda: read("3: 4\n"), str(path), "text")
    refused(lambda: read("model: 3\n"), f"{path}: model: got 3, expected a mapping")
    refused(lambda: LongCtxConfig.from_yaml(tmp_path / "no.yaml"), "no.yaml: cannot be read")
    path.write_bytes(b"\xff\xfe\x00")
    refused(lambda: LongCtxConfig.from_yaml(path), "cannot be read")


def test_extends_takes_defaults_from_a_shipped_config(folder, tmp_path):
    ship(folder, "tiny-1b")
    path = write(
        tmp_path / "mine.yaml",
        "extends: tiny-1b\nheads: {kv_budget: 0.6}\nstores: {streaming: {store: sink_recent, sink: 1}}\n",
    )
    made = LongCtxConfig.from_yaml(path)
    assert made == load_shipped("tiny-1b").override(
        heads={"kv_budget": 0.6}, stores={"streaming": {"store": "sink_recent", "sink": 1}}
    )
    assert "extends" not in made.to_dict()


@pytest.mark.parametrize(
    "name", ["tiny-2b", "../mine", "shipped/tiny-1b", "tiny-1b.yaml", "/etc/passwd", "''", "3", "[a]"]
)
def test_extends_names_shipped_configs_only(folder, tmp_path, name):
    ship(folder, "tiny-1b")
    ship(folder.parent, "mine")
    path = write(tmp_path / "c.yaml", f"extends: {name}\n")
    refused(lambda: LongCtxConfig.from_yaml(path), f"{path}: extends: got", "one of: tiny-1b")


def test_shipped_configs_stand_alone(folder, tmp_path):
    write(folder / "a.yaml", "extends: a\n")
    path = write(tmp_path / "c.yaml", "extends: a\n")
    refused(lambda: LongCtxConfig.from_yaml(path), "extends: works in config files only")
    refused(lambda: load_shipped("a"), "a: extends: works in config files only")


def test_shipped_names(folder):
    ship(folder, "b")
    ship(folder, "a")
    write(folder / "notes.txt", "")
    assert shipped() == ("a", "b")
    refused(lambda: load_shipped("../a"), "config: got '../a', expected one of: a, b.")


def test_many_shipped_names_are_not_listed_but_the_nearest_is_named(folder):
    for number in range(checks.MANY):
        ship(folder, f"tiny-{number}")
    assert "tiny-7, " in refused(lambda: load_shipped("smol"), "expected one of: tiny-0, ")
    ship(folder, "one-more")
    said = refused(
        lambda: load_shipped("one-mor"), f"expected one of {checks.MANY + 1} names, which `hf-longctx configs`"
    )
    assert "tiny-7" not in said and said.endswith("Did you mean 'one-more'?")


def test_what_the_package_ships_loads():
    table = Path(__file__).parents[2] / "examples" / "published_heads" / "checkpoints.yaml"
    names = [entry["name"] for entry in yaml.safe_load(table.read_text("utf-8"))]
    assert shipped() == tuple(sorted([*names, *assets()]))
    for name in shipped():
        made = load_shipped(name)
        assert None not in vars(made.model.fingerprint).values(), name
        assert made.model.ids, name
