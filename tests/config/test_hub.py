"""A config of a Hub repository in every way in, and pushing one: the hub's own client against a Hub on this machine."""

from __future__ import annotations

import socket

import huggingface_hub
import pytest
import yaml
from helpers.config_cases import config, hf, plain, refused
from helpers.local_hub import LocalHub
from helpers.tiny import config_for, tiny_config, tiny_model
from typer.testing import CliRunner

import hf_longctx
from hf_longctx import AutoModelForCausalLM, LongCtxConfig, patch_model
from hf_longctx.bench.crossover import case_of
from hf_longctx.bench.settings import Settings
from hf_longctx.commands._app import app
from hf_longctx.config import strict_yaml
from hf_longctx.config.config import load_shipped
from hf_longctx.config.find import load_named, resolve
from hf_longctx.config.hub import repository
from hf_longctx.model.modules import state_of
from hf_longctx.planning.find import find
from hf_longctx.planning.memory import MemorySettings

REPO = "me/heads"


@pytest.fixture(scope="module")
def server():
    found = LocalHub()
    yield found
    found.close()


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    """An empty Hub, and an empty cache of its client."""
    for kept in (server.repos, server.refused, server.asked, server.created, server.commits):
        kept.clear()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    return server


def text(**changes) -> str:
    return yaml.safe_dump(plain(**changes))


def without_pin(found: LongCtxConfig) -> dict:
    data = found.to_dict()
    del data["heads"]["source"]["hub"]
    return data


# Reading.


def test_a_repository_is_a_config_pinned_to_its_commit(hub):
    commit = hub.put(
        REPO, text(heads={"scores": plain()["heads"]["scores"], "source": {"method": "a", "hub": "forged"}})
    )
    found = resolve(REPO, hf())
    assert found.heads.source == {"method": "a", "hub": f"{REPO}@{commit}"}
    assert found.roles() == config().roles()
    newer = hub.put(REPO, text(kernel="stock"))
    assert load_named(REPO).kernel == "stock" and load_named(REPO).heads.source == {"hub": f"{REPO}@{newer}"}
    asked = len(hub.asked)
    assert load_named(found.heads.source["hub"]) == found and len(hub.asked) == asked, (
        "a commit in the cache asks nobody"
    )


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub):
    hub.put(REPO, text())
    first = hub.put(REPO, text(kernel="stock"), "refs/pr/1")
    for revision in ("refs/pr/1", first):
        found = load_named(f"{REPO}@{revision}")
        assert found.kernel == "stock" and found.heads.source["hub"] == f"{REPO}@{first}"
    assert load_named(REPO).kernel == "auto"


def test_extends_names_shipped_configs_alone(hub, tmp_path):
    hub.put(REPO, "extends: tiny-llama\nheads: {retrieval_fraction: 0.25}")
    shipped = load_shipped("tiny-llama").override(heads={"retrieval_fraction": 0.25})
    found = load_named(REPO)
    assert found.roles() == shipped.roles() and found.heads.source == {
        **shipped.heads.source,
        "hub": found.heads.source["hub"],
    }
    config().to_yaml(tmp_path / "mine.yaml")
    for named in ("me/other", str(tmp_path / "mine.yaml"), "../tiny-llama"):
        hub.put(REPO, f"extends: {named}")
        refused(lambda: load_named(REPO), f"{REPO}@", "longctx.yaml: extends: got", "expected one of")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("model: {a: 1, a: 2}", "given twice"),
        ("a: &x 1\nb: *x", "YAML aliases"),
        ("!!python/object/apply:os.system [ls]", "not YAML that this library reads"),
        ("[1]", "expected a mapping"),
        (text(kernl="auto"), "kernl: unknown key"),
        (text(stores={"retrieval": {"store": "os"}}), "stores.retrieval.store: got 'os'"),
    ],
)
def test_a_file_of_a_repository_is_data_and_validated(hub, content, said):
    commit = hub.put(REPO, content)
    refused(lambda: load_named(REPO), f"{REPO}@{commit}: longctx.yaml: ", said)


def test_a_config_of_a_repository_names_no_path(hub, tmp_path):
    hub.put(REPO, text(stores={"retrieval": {"store": "offloaded_disk", "folder": str(tmp_path)}}))
    refused(lambda: load_named(REPO), "stores.retrieval.folder is", "comes from the Hub may name no path")
    hub.put(REPO, text(stores={"retrieval": {"store": "offloaded_disk"}}))
    found = resolve(REPO, hf(), None, {"stores": {"retrieval": {"folder": str(tmp_path)}}})
    assert found.stores.retrieval.folder == str(tmp_path)


def test_a_large_file_is_not_fetched(hub):
    hub.put(REPO, "# " + "x" * strict_yaml.LARGEST_TEXT)
    refused(lambda: load_named(REPO), f"{REPO}: longctx.yaml: larger than 1 MB")
    assert {method for method, _ in hub.asked} == {"HEAD"}


def test_a_config_for_another_model_is_refused(hub):
    hub.put(REPO, text())
    refused(lambda: patch_model(tiny_model(), REPO), "made for another model")


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("a/none", None, "no repository of the Hub, or a private one: log in (hf auth login)"),
        ("a/private", "RepoNotFound", "no repository of the Hub, or a private one"),
        ("a/gated", "GatedRepo", "is gated on the Hub: accept its conditions"),
        ("a/down", "down", "was not fetched before, and the Hub gives no answer: Server error '503"),
        (
            "me/empty",
            None,
            "without a longctx.yaml. Where it is a model, measure its heads: hf-longctx identify me/empty",
        ),
        (f"{REPO}@v9", None, "has no branch, tag or commit 'v9'"),
    ],
)
def test_what_the_hub_refuses_is_one_error_after_one_question(hub, name, code, said):
    hub.put(REPO, text())
    hub.put("me/empty", "x", file="README.md")
    if code is not None:
        hub.refused[name] = code
    message = refused(lambda: load_named(name), f"config: {name!r} ", said)
    assert len(message.splitlines()) == 1 and [method for method, _ in hub.asked] == ["HEAD"]


def test_a_name_that_the_hub_refuses_and_a_cache_that_cannot_be_written(hub, monkeypatch, tmp_path):
    refused(lambda: load_named("me/a--b"), "config: 'me/a--b' is no name that a repository of the Hub can have: ")
    assert hub.asked == []
    hub.put(REPO, text())
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    refused(
        lambda: load_named(REPO), "has a longctx.yaml that the cache of the Hub's client has no place for: ", "file"
    )


def test_without_network_there_is_one_error_at_once(hub, monkeypatch):
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.2:9")
    template = "http://127.0.0.2:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    refused(lambda: load_named(REPO), "was not fetched before, and the Hub gives no answer: no network in this test")
    assert len(tried) == 1


def test_what_was_fetched_serves_offline_and_while_the_hub_is_down(hub, monkeypatch):
    hub.put(REPO, text())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(lambda: load_named(REPO), "was not fetched before, and HF_HUB_OFFLINE forbids to ask the Hub")
    assert hub.asked == []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    found = load_named(REPO)
    hub.refused[REPO] = "down"
    assert load_named(REPO) == found
    del hub.refused[REPO]
    del hub.repos[REPO]["main"]
    refused(lambda: load_named(REPO), "has no branch, tag or commit")
    asked = len(hub.asked)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load_named(REPO) == found and len(hub.asked) == asked


def test_what_asks_no_hub(hub, tmp_path, monkeypatch):
    listed = load_shipped("llama-3.1-8b-instruct")
    hub.put("meta-llama/Llama-3.1-8B", text())
    assert load_named("meta-llama/Llama-3.1-8B") == listed
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "folder").mkdir(parents=True)
    (tmp_path / "me" / "file").write_text("x")
    names = ["me/folder", "me/file", "hf-longctx/tiny-lama", "../heads", "a/b/c", "me/x y", "me/", "@/x", "heads"]
    for name in [*names, "me/x@../../y", "me/x@/etc", "me/x@a\\b", "me/x@", "me/x@a@b"]:
        refused(lambda name=name: load_named(name, "NAME"), "NAME: ")
    model = tiny_config("llama")
    model._name_or_path = REPO
    hub.put(REPO, text())
    refused(lambda: resolve("auto", model), "config='auto': no shipped config fits the model 'me/heads'")
    model.longctx = REPO
    refused(lambda: resolve("auto", model), "config.longctx of the model: config: got 'me/heads', expected a mapping")
    assert hub.asked == []
    assert repository("meta-llama/Llama-3.1-8B@main").revision == "main", "so the file of a listed id can be asked for"


# In every way in.


@pytest.fixture
def mine(hub, tmp_path):
    """(config for the tiny model, folder of the model, name pinned to its commit)"""
    own = config_for(tiny_model()).override(heads={"source": {"method": "by hand"}})
    commit = hub.put(REPO, own.to_text())
    tiny_model().save_pretrained(tmp_path / "model")
    return own, tmp_path / "model", f"{REPO}@{commit}"


def test_patch_model_and_from_pretrained(mine, hub, tmp_path, monkeypatch):
    own, folder, pinned = mine
    model = patch_model(tiny_model(), REPO)
    assert without_pin(state_of(model).config) == own.to_dict()
    loaded = AutoModelForCausalLM.from_pretrained(folder, longctx=REPO)
    hf_longctx.install()
    try:
        second = type(model).from_pretrained(folder, longctx=pinned)
    finally:
        hf_longctx.uninstall()
    for one in (model, loaded, second):
        assert one.config.longctx["heads"]["source"] == {"method": "by hand", "hub": pinned}
    loaded.save_pretrained(tmp_path / "saved")
    asked = len(hub.asked)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "another"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert state_of(again).config == state_of(loaded).config and len(hub.asked) == asked
    state_of(again).config.to_yaml(tmp_path / "c.yaml")
    assert LongCtxConfig.from_yaml(tmp_path / "c.yaml").heads.source["hub"] == pinned


def test_functions_that_take_a_config(mine):
    own, folder, pinned = mine
    settings = MemorySettings(24 * 10**9)
    assert find(str(folder), settings, REPO).config.heads.source["hub"] == pinned
    plan = LongCtxConfig.plan(str(folder), context=100, memory="1GB", config=REPO)
    assert plan.config.heads.source["hub"] == pinned
    measured = case_of(Settings(tokens=(128,)), REPO, pattern="block_topk:top_k=1")
    assert measured.settings.head_dim == own.model.head_dim and measured.config == REPO


@pytest.mark.parametrize(
    "command",
    [
        ["configs", "show", REPO],
        ["plan", "MODEL", "--context", "64", "--memory", "1GB", "--config", REPO],
        ["bench", "memory", "MODEL", "--memory", "1GB", "--config", REPO],
    ],
    ids=lambda command: command[0],
)
def test_commands(mine, hub, command):
    own, folder, pinned = mine
    args = [str(folder) if one == "MODEL" else one for one in command]
    done = CliRunner().invoke(app, args, env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    assert "6 of 12 KV heads" in done.output and max(map(len, done.output.splitlines())) <= 80
    assert command[0] != "configs" or pinned in "".join(done.output.split())
    hub.refused[REPO] = "GatedRepo"
    huggingface_hub.constants.HF_HUB_CACHE += "2"  # restored by the fixture's monkeypatch
    done = CliRunner().invoke(app, args, env={"COLUMNS": "80"})
    assert done.exit_code == 2 and "is gated on the Hub" in done.output and "Traceback" not in done.output


def test_configs_show_says_the_commit_beside_an_alternative(hub):
    heads = {"scores": plain()["heads"]["scores"], "alternatives": {"b": {"roles": ["RR", "SS", "SS"]}}}
    commit = hub.put(REPO, text(heads=heads))
    done = CliRunner().invoke(app, ["configs", "show", REPO, "--use", "b"], env={"COLUMNS": "200"})
    assert done.exit_code == 0 and f"{REPO}@{commit}" in done.output, done.output


# Pushing.


def test_push_and_read_back(hub):
    own = config(source={"method": "two_needle", "from": "hf_longctx 1"}, confidence="measured")
    done = own.push_to_hub(REPO, token="hf_secret", private=True)
    assert isinstance(done, huggingface_hub.CommitInfo) and done.oid == hub.commit_of(REPO, "main")
    assert hub.created[0]["organization"] == "me" and hub.created[0]["visibility"] == "private"
    (_, revision, headers, summary, pull_request) = hub.commits[0]
    assert (revision, summary, pull_request) == ("main", "Upload longctx.yaml", False)
    assert {key.lower(): one for key, one in headers.items()}["authorization"] == "Bearer hf_secret"
    found = load_named(REPO)
    assert without_pin(found) == own.to_dict() and found.heads.source["hub"] == f"{REPO}@{done.oid}"
    card = hub.repos[REPO]["main"]["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert head == {"library_name": "hf_longctx", "tags": head["tags"], "base_model": ["org/Tiny-1B"]}
    for said in (
        'patch_model(model, "me/heads")',
        "llama (org/Tiny-1B), 3 layers, 4 query heads and 2 KV heads each, head_dim 16",
        "Retrieval heads: 3 of 6 KV heads",
        "Heads from: two_needle, hf_longctx 1; confidence: measured",
    ):
        assert said in card


def test_push_leaves_a_card_alone_and_takes_a_bare_name(hub):
    hub.put(REPO, "mine", file="README.md")
    config().push_to_hub("heads", commit_message="Better heads", token="t")
    assert hub.repos[REPO]["main"]["README.md"] == b"mine" and "longctx.yaml" in hub.repos[REPO]["main"]
    assert hub.commits[0][3] == "Better heads"
    assert "visibility" not in hub.created[0]


def test_push_to_a_branch_and_as_a_pull_request(hub):
    config().push_to_hub(REPO, token="t")
    config(retrieval_fraction=1 / 6).push_to_hub(REPO, token="t", revision="small")
    assert load_named(f"{REPO}@small").retrieval_heads == 1 and load_named(REPO).retrieval_heads == 3
    done = config(retrieval_fraction=1.0).push_to_hub(REPO, token="t", create_pr=True)
    assert done.pr_url == f"{hub.url}/{REPO}/discussions/1" and hub.commits[-1][-1]
    assert load_named(f"{REPO}@refs/pr/1").retrieval_heads == 6 and load_named(REPO).retrieval_heads == 3


def test_push_refuses_before_anything_is_made(hub, tmp_path, monkeypatch):
    own = config()
    path = own.override(stores={"retrieval": {"store": "offloaded_disk", "folder": str(tmp_path)}})
    refused(lambda: path.push_to_hub(REPO, token="t"), "push_to_hub: stores.retrieval.folder is", "is on the Hub")
    refused(lambda: own.push_to_hub(REPO, token="t", revision="a", create_pr=True), "revision: got 'a'", "create_pr")
    monkeypatch.setattr(strict_yaml, "LARGEST_TEXT", 100)
    refused(lambda: own.push_to_hub(REPO, token="t"), "push_to_hub: larger than")
    assert hub.asked == []
