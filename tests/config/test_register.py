"""``register``: words that the running program brings, and what it refuses."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from helpers.config_cases import plain, refused
from helpers.own_words import FAMILY, WORDS, EveryNth, Faded, Pages, Pin, Rounded, Strided, WeightNorm
from helpers.registered import nothing_kept
from helpers.tiny import config_for, tiny_config, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_longctx import (
    CacheError,
    Family,
    LongCtxCache,
    LongCtxConfig,
    UnsupportedModeError,
    UnsupportedModelError,
    identify,
    patch_model,
    register,
    report,
)
from hf_longctx.assets import asset
from hf_longctx.config.config import kernel_words
from hf_longctx.config.reference import reference
from hf_longctx.config.words import FOLDERS, dump, load, words
from hf_longctx.decode.base import Select, SelectSpec
from hf_longctx.evaluate.run import evaluate
from hf_longctx.eviction.after.base import After
from hf_longctx.eviction.base import Score
from hf_longctx.layout.reads import Causal
from hf_longctx.model.family import families, find_family
from hf_longctx.prefill.base import PatternSpec
from hf_longctx.stores.evicted import Budget, Evicted
from hf_longctx.stores.full import Full
from hf_longctx.stores.sink_recent import SinkRecent
from hf_longctx.tasks import task_from, tasks_from

IDS = torch.arange(3, 83)[None]
KINDS = pytest.mark.parametrize("kind", WORDS)


def own(kind: str) -> None:
    register(kind, *WORDS[kind])


def logits(model, ids=IDS, **kwargs) -> Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


def test_every_kind_is_tried():
    assert set(WORDS) == set(FOLDERS)


@KINDS
def test_a_word_is_known_from_then_on_and_no_longer_than_the_process(kind):
    word, thing = WORDS[kind]
    assert word not in words(FOLDERS[kind])
    own(kind)
    own(kind)  # the same thing again
    assert word in words(FOLDERS[kind])
    if isinstance(thing, type):
        assert load(FOLDERS[kind], word) is thing and dump(thing(), "key")["key"] == word
    assert kind != "kernel" or word in kernel_words()
    assert kind != "family" or (word in families() and find_family(word) is thing)


@KINDS
def test_a_word_that_means_something_is_not_replaced(kind):
    word, thing = WORDS[kind]
    taken = words(FOLDERS[kind])[0]
    if kind == "family":
        thing = Family(model_type=taken)
    elif kind == "kernel":
        thing = SimpleNamespace(**KERNEL | {"NAME": taken})
    refused(lambda: register(kind, taken, thing), f"register({kind!r}, {taken!r}, ...)", "the package has that word")
    own(kind)
    others = {"kernel": SimpleNamespace(**KERNEL | {"NAME": word})}
    others |= {"family": Family(model_type=word, layers="h")}
    other = others.get(kind) or dataclass(frozen=True)(type("Other", (WORDS[kind][1],), {"__module__": __name__}))
    refused(lambda: register(kind, word, other), "the word was registered before", "Choose another word")
    assert kind in ("kernel", "family") or load(FOLDERS[kind], word) is WORDS[kind][1]


def test_a_class_defined_again_takes_the_place_of_the_earlier():
    def cell(default: int) -> type:
        @dataclass(frozen=True)
        class Mine(Full):
            steps: int = default

        register("store", "mine", Mine)
        return Mine

    first, second = cell(1), cell(2)
    assert load("stores", "mine") is second and first is not second
    # What was made by the first cell goes on as what the word means now.
    made = LongCtxConfig.from_dict(plain(stores={"retrieval": first()})).stores.retrieval
    assert type(made) is second and made.steps == 1
    refused(lambda: register("store", "other", second), "'mine'; a class has one word")


@dataclass(frozen=True)
class WithTensor(Full):
    scale: Tensor | None = None


@dataclass(frozen=True)
class WithKey(Full):
    store: str = "x"


@dataclass(frozen=True)
class NoSelect(PatternSpec):
    roles = ("retrieval",)


@dataclass(frozen=True)
class NoRoles(Strided):
    roles = ()


@dataclass(frozen=True)
class NoPaper(WeightNorm):
    paper = None


@dataclass(frozen=True)
class NoScore(Score):
    paper = "none"


@dataclass(frozen=True)
class NoPaperScore(EveryNth):
    paper = None


@dataclass(frozen=True)
class NoApply(After):
    pass


@dataclass(frozen=True)
class WithScore(EveryNth):
    score: int = 1


@dataclass(frozen=True)
class Unread(Full):
    x: Nowhere = None  # noqa: F821


@dataclass
class NotFrozen:
    x: int = 1


class NoDataclass(Full):
    pass


class Abstract(WORDS["heads"][1].__mro__[1]):
    paper = "x"


KERNEL = {"NAME": "mine", "PREFERENCE": 1, "READS": frozenset({Causal}), "supports": print, "attend": print}


@pytest.mark.parametrize(
    ("kind", "word", "thing", "parts"),
    [
        ("stoer", "mine", Rounded, ("kind: got 'stoer'", ", ".join(FOLDERS), "Did you mean 'store'?")),
        ("evict", "mine", EveryNth, ("kind: got 'evict'", ", ".join(FOLDERS))),
        (None, "mine", Rounded, ("kind: got None",)),
        ("store", "My-Store", Rounded, ("word: got 'My-Store'",)),
        ("store", "os.path", Rounded, ("word: got 'os.path'",)),
        ("store", "", Rounded, ("word: got ''",)),
        ("store", 3, Rounded, ("word: got 3",)),
        ("store", "table", Rounded, ("word: got 'table'",)),
        ("kernel", "auto", WORDS["kernel"][1], ("word: got 'auto'",)),
        ("store", "mine", Strided, ("a class that extends hf_longctx.stores.base.StoreSpec",)),
        ("store", "mine", Rounded(), ("a class that extends",)),
        ("store", "mine", "os.path", ("a class that extends",)),
        ("store", "mine", NotFrozen, ("a class that extends",)),
        ("store", "mine", NoDataclass, ("no frozen dataclass",)),
        ("store", "mine", Full, ("is of the package",)),
        ("store", "mine", WithTensor, ("WithTensor.scale has type", "which YAML cannot say")),
        ("store", "mine", WithKey, ("WithKey.store: this key names the word itself",)),
        ("store", "mine", Unread, ("annotations that cannot be read",)),
        ("prefill", "mine", NoSelect, ("NoSelect lacks: select",)),
        ("prefill", "mine", NoRoles, ("NoRoles.roles is ()",)),
        ("heads", "mine", NoPaper, ("lacks: paper",)),
        ("heads", "mine", dataclass(frozen=True)(Abstract), ("Abstract lacks: scores",)),
        ("decode", "mine", Rounded, ("a class that extends hf_longctx.decode.base.SelectSpec",)),
        ("eviction", "mine", Rounded, ("a class that extends hf_longctx.eviction.base.Score",)),
        ("eviction", "mine", NoScore, ("NoScore lacks: score.",)),
        ("eviction", "mine", NoPaperScore, ("NoPaperScore lacks: paper, a text",)),
        ("eviction", "mine", WithScore, ("WithScore.score: this key names the word itself",)),
        ("after", "mine", EveryNth, ("a class that extends hf_longctx.eviction.after.base.After",)),
        ("after", "mine", NoApply, ("NoApply lacks: apply.",)),
        ("task", "mine", Rounded, ("a class that extends hf_longctx.tasks.base.Task",)),
        ("kernel", "mine", SimpleNamespace(NAME="mine"), ("lacks: PREFERENCE, READS, supports, attend",)),
        ("kernel", "mine", SimpleNamespace(**KERNEL | {"NAME": "other"}), ("NAME: got 'other'",)),
        ("kernel", "mine", SimpleNamespace(**KERNEL | {"PREFERENCE": "high"}), ("PREFERENCE: got 'high'",)),
        ("kernel", "mine", SimpleNamespace(**KERNEL, preference=7), ("preference: got 7, expected a function",)),
        ("kernel", "mine", SimpleNamespace(**KERNEL | {"attend": None}), ("lacks: attend",)),
        ("kernel", "mine", SimpleNamespace(**KERNEL | {"READS": (Causal,)}), ("READS: got",)),
        (
            "kernel",
            "mine",
            SimpleNamespace(**KERNEL | {"READS": frozenset({Causal, "All"})}),
            ("READS: got", "BlockList"),
        ),
        ("family", None, FAMILY, ("word: got None, expected the model_type",)),
        ("family", ["nanochat"], FAMILY, ("word: got [",)),
        ("family", "", FAMILY, ("word: got ''",)),
        ("family", "nanochat", Rounded, ("expected a hf_longctx.Family",)),
        ("family", "olmo", FAMILY, ("model_type: got 'nanochat', expected the word, 'olmo'",)),
    ],
)
def test_what_does_not_fit_its_kind_is_refused_with_what_it_lacks(kind, word, thing, parts):
    before = {folder: words(folder) for folder in FOLDERS.values()}
    refused(lambda: register(kind, word, thing), "register", *parts)
    assert before == {folder: words(folder) for folder in FOLDERS.values()}


def test_words_and_objects_patch_alike():
    model, dense = tiny_model(), logits(tiny_model())
    torch.manual_seed(0)
    own("store"), own("prefill")
    found = []
    for stores, prefill in (
        ({"retrieval": {"store": "rounded", "steps": 2}}, {"min_tokens": 1, "retrieval": {"pattern": "strided"}}),
        ({"retrieval": Rounded(steps=2)}, {"min_tokens": 1, "retrieval": Strided()}),
    ):
        patch_model(model, config_for(model, "retrieval"), stores=stores, prefill=prefill)
        assert model.config.longctx["stores"]["retrieval"] == {"store": "rounded", "steps": 2}
        assert model.config.longctx["prefill"]["retrieval"] == {"pattern": "strided", "every": 2}
        found.append(logits(model, torch.arange(3, 403)[None] % 90))
        assert report(model).density < 1
    assert torch.equal(*found) and not torch.allclose(found[0][:, :80], dense, atol=1e-3)
    patch_model(model, config_for(model, "retrieval", stores={"retrieval": Full()}))
    assert not torch.allclose(found[0], logits(model, torch.arange(3, 403)[None] % 90), atol=1e-3)


@dataclass(frozen=True)
class Windowed(SinkRecent):
    """A window for any head; says of itself, as a store does that says nothing, that it caches every token."""

    roles = ("retrieval", "streaming")
    rule = "all"


@pytest.mark.parametrize("kernel", ["auto", "stock"])
@pytest.mark.parametrize("role", ["retrieval", "streaming"])
def test_the_reads_of_a_store_hold_under_every_kernel(role, kernel):
    """Transformers' own call reads every token."""
    model = tiny_model(dtype=torch.float64)
    register("store", "windowed", Windowed)
    patch_model(model, config_for(model, "streaming", sink=4, recent=16))
    want = logits(model)
    patch_model(model, config_for(model, role, stores={role: Windowed(4, 16)}, kernel=kernel))
    for more in ({}, {"use_cache": False}):
        assert torch.allclose(logits(model, **more), want, atol=1e-9, rtol=0)
    patch_model(model, config_for(model, "retrieval", kernel=kernel))
    assert not torch.allclose(logits(model), want, atol=1e-3)


@dataclass(frozen=True)
class Weighted(Full):
    weights: dict = field(default_factory=dict)


def test_a_store_may_have_a_mapping_among_its_fields():
    model = tiny_model()
    register("store", "weighted", Weighted)
    counts = []
    for store in (Weighted({"a": 1}), Full()):
        patch_model(model, config_for(model, "mixed", stores={"retrieval": store}))
        cache = LongCtxCache(model)
        for _ in range(2):
            logits(model, IDS, past_key_values=cache)
        counts.append((report(model).saves_from, report(model).nbytes))
    assert counts[0] == counts[1] and counts[0][0]


def test_a_pattern_wants_a_store_whose_tokens_are_all_read():
    model, prefill = tiny_model(), {"min_tokens": 1, "retrieval": {"pattern": "antidiagonal"}}
    register("store", "windowed", Windowed)
    for roles in ("retrieval", "mixed"):
        config = config_for(model, roles, stores={"retrieval": {"store": "windowed"}}, prefill=prefill)
        with pytest.raises(UnsupportedModeError, match=r"'windowed'.*pattern: dense.*store: full"):
            patch_model(model, config)
        assert not hasattr(model.config, "longctx")
    patch_model(model, config_for(model, "streaming", stores={"retrieval": {"store": "windowed"}}, prefill=prefill))


def test_a_kernel_computes(kernel="plain"):
    model = tiny_model(dtype=torch.float64)
    dense = logits(model)
    own("kernel")
    patch_model(model, config_for(model, "retrieval"), kernel=kernel)
    assert torch.allclose(logits(model), dense, atol=1e-9, rtol=0) and report(model).kernels == (kernel,)
    refused(lambda: patch_model(model, config_for(model), kernel=WORDS["kernel"][1]), "kernel: got <")
    with pytest.raises(ValueError, match="not what auto takes"):
        register("kernel", "first", SimpleNamespace(**KERNEL | {"NAME": "first", "PREFERENCE": 99, "supports": unsaid}))
        patch_model(model, config_for(model, "retrieval"), kernel="auto")
        logits(model)


def unsaid(case):
    raise ValueError("not what auto takes: it is asked first")


def test_an_object_replaces_the_whole_spec():
    config = LongCtxConfig.from_dict(plain(stores={"streaming": {"store": "sink_recent", "sink": 9, "recent": 5}}))
    assert config.override(stores={"streaming": {"sink": 1}}).stores.streaming == SinkRecent(1, 5)
    assert config.override(stores={"streaming": SinkRecent(sink=1)}).stores.streaming == SinkRecent(1, 256)


@pytest.mark.parametrize(
    ("section", "parts"),
    [
        ({"stores": {"retrieval": Rounded()}}, ("stores.retrieval: Rounded is no word", "hf_longctx.register(KIND")),
        ({"stores": {"streaming": Full()}}, ("stores.streaming.store: 'full' serves retrieval heads",)),
        ({"stores": {"streaming": SinkRecent(recent=-1)}}, ("stores.streaming.recent: got -1",)),
        ({"stores": {"retrieval": Full}}, ("stores.retrieval: got",)),
        ({"prefill": {"retrieval": Full()}}, ("prefill.retrieval: got Full()", "expected a spec of prefill")),
        ({"stores": {"retrieval": plain}}, ("stores.retrieval: got",)),
    ],
)
def test_an_object_is_checked_as_its_fields_are(section, parts):
    refused(lambda: LongCtxConfig.from_dict(plain(**section)), *parts)
    model = tiny_model()
    refused(lambda: patch_model(model, config_for(model), **section), *parts)
    assert not hasattr(model.config, "longctx")


def test_a_selection_runs_as_word_and_as_object():
    own("decode")
    few = {"page": 4, "budget": 8, "sink": 4, "recent": 8, "min_tokens": 1, "dense_layers": 0}
    found = []
    for given in ({"select": "pages", **few}, Pages(**few), Pages(**few | {"budget": 99}), {"select": "dense"}):
        model = tiny_model(dtype=torch.float64)
        patch_model(model, config_for(model, "retrieval"), decode={"retrieval": given})
        cache = LongCtxCache(model)
        logits(model, past_key_values=cache)
        found.append(logits(model, IDS[:, :1], past_key_values=cache))
        torch.manual_seed(0)
    assert model.config.longctx["decode"]["retrieval"] == {"select": "dense"}
    assert torch.equal(*found[:2]) and not torch.allclose(found[0], found[3], atol=1e-3)
    assert torch.allclose(found[2], found[3], atol=1e-9, rtol=0)


def evicted(**fields) -> Tensor:
    """Logits of the first decoded token of a model that evicts 40 of 80 tokens."""
    torch.manual_seed(0)
    model = tiny_model(dtype=torch.float64)
    store = {"store": "evicted", "budget": {"tokens": 40}, "recent": 8, "by": "uniform", **fields}
    patch_model(model, config_for(model, "retrieval"), stores={"retrieval": store})
    cache = LongCtxCache(model)
    logits(model, past_key_values=cache)
    return logits(model, IDS[:, :1], past_key_values=cache)


def test_a_score_and_what_comes_after_run_as_words_and_as_objects():
    own("eviction"), own("after")
    by_word = evicted(rule={"score": "every_nth", "nth": 3})
    assert torch.equal(by_word, evicted(rule=EveryNth(nth=3)))
    assert not torch.allclose(by_word, evicted(rule=EveryNth(nth=2)), atol=1e-3)
    by = {"rule": {"score": "key_norm"}, "by": "head"}
    faded = evicted(after={"after": "faded"}, **by)
    assert torch.equal(faded, evicted(after=Faded(), **by))
    assert not torch.allclose(faded, evicted(after={"after": "drop"}, **by), atol=1e-3)
    assert torch.equal(evicted(after=Faded(factor=1.0), **by), evicted(**by))
    even = {**by, "by": "uniform"}
    assert not torch.allclose(evicted(after=Faded(), **even), evicted(**even), atol=1e-3), "in every head, too"


def test_a_whole_spec_of_an_eviction_is_given_as_an_object():
    own("eviction")
    made = Evicted(rule=EveryNth(nth=3), budget=Budget(tokens=40), by="uniform", recent=8)
    config = LongCtxConfig.from_dict(plain(stores={"retrieval": made}))
    assert config.to_dict()["stores"]["retrieval"]["rule"] == {"score": "every_nth", "nth": 3}
    assert LongCtxConfig.from_dict(config.to_dict()).stores.retrieval == made
    refused(lambda: Evicted(rule=EveryNth(), by="head"), "by: got 'head'", "the same scores")


@dataclass(frozen=True)
class NoChoice(SelectSpec):
    roles = ("retrieval",)


@dataclass(frozen=True)
class NoScores(Select):
    pass


@pytest.mark.parametrize(("thing", "lacks"), [(NoChoice, "choose"), (NoScores, "scores")])
def test_a_selection_that_does_not_say_what_to_read_is_refused(thing, lacks):
    refused(lambda: register("decode", "mine", thing), f"{thing.__name__} lacks: {lacks}")


def test_a_patched_model_is_copied_pickled_and_saved(tmp_path):
    own("store")
    model = tiny_model()
    patch_model(model, config_for(model, "mixed"), stores={"retrieval": Rounded(2)})
    want = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), want)
    cache = LongCtxCache(model)
    logits(model, past_key_values=cache)
    cache.save(tmp_path / "x.cache")
    following = torch.tensor([[5]])
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.config.longctx["stores"]["retrieval"] == {"store": "rounded", "steps": 2}
    patch_model(loaded)
    assert torch.equal(logits(loaded), want)
    again = LongCtxCache.load(tmp_path / "x.cache", loaded)
    read = LongCtxCache(loaded)  # of this model too: where its weights lie in memory can round one token otherwise
    logits(loaded, past_key_values=read)
    want = logits(loaded, following, past_key_values=read)
    assert torch.equal(logits(loaded, following, past_key_values=again), want)
    with nothing_kept():
        from hf_longctx.config.words import registered

        registered["stores"].clear()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        refused(lambda: patch_model(loaded), "config.longctx", "hf_longctx.register('store', 'rounded', ...) first")
        patch_model(loaded, config_for(loaded, "mixed"))
        with pytest.raises(CacheError, match="rounded"):
            LongCtxCache.load(tmp_path / "x.cache", loaded)


@KINDS
def test_an_unknown_word_says_register_first(kind):
    word, thing = WORDS[kind]
    said = f"hf_longctx.register({kind!r}, {word!r}, "
    if kind == "family":
        with pytest.raises(UnsupportedModelError) as caught:
            find_family(word)
        assert said in str(caught.value)
        own(kind)
        assert find_family(word) is thing
        return
    keys = {"store": ("stores", "store"), "prefill": ("prefill", "pattern"), "decode": ("decode", "select")}
    inside = {"eviction": ("rule", "score"), "after": ("after", "after")}
    if kind in inside:
        name, key = inside[kind]
        store = {"store": "evicted", name: {key: word}}
        where = f"stores.retrieval.{name}.{key}: got {word!r}"
        refused(lambda: LongCtxConfig.from_dict(plain(stores={"retrieval": store})), where, said)
    elif kind in keys:
        section, key = keys[kind]
        refused(lambda: LongCtxConfig.from_dict(plain(**{section: {"retrieval": {key: word}}})), said)
    elif kind == "kernel":
        refused(lambda: LongCtxConfig.from_dict(plain(kernel=word)), said)
    elif kind == "task":
        refused(lambda: task_from(word), said)
    else:
        refused(lambda: identify(tiny_model(), None, word), said)


def test_no_config_names_an_import_path():
    for word in ("os.path", "helpers.own_words.Rounded", "helpers.own_words:Rounded", "../own_words"):
        message = refused(lambda word=word: LongCtxConfig.from_dict(plain(stores={"retrieval": {"store": word}})))
        assert "register" not in message


def test_a_head_score_runs_as_word_and_as_object():
    own("heads")
    model = tiny_model()
    by_word = identify(model, None, "weight_norm", power=2.0, sink=2, recent=8)
    by_object = identify(model, None, WeightNorm(power=2.0), sink=2, recent=8)
    assert by_word == by_object and by_word.heads.source["method"] == "weight_norm"
    refused(lambda: identify(model, None, WeightNorm(), power=2.0), "power given beside a method object")
    refused(lambda: identify(model, None, Rounded()), "identify: Rounded is no word")


def test_a_task_runs_as_word_and_as_object(tmp_path):
    refused(lambda: tasks_from([Pin()]), "tasks: Pin is no word")
    own("task")
    assert task_from("pin") == Pin() and tasks_from("pin") == tasks_from(["pin"]) == tasks_from((Pin(),))
    refused(lambda: tasks_from([Pin(), "pin"]), "pin is named twice")
    for wrong in ([], [3], None, [Rounded]):
        refused(lambda wrong=wrong: tasks_from(wrong), "tasks: got")
    folder = asset("tiny-llama")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    given = {"lengths": [256], "depths": [0.5], "samples": 1}
    summary = evaluate(model, AutoTokenizer.from_pretrained(folder), tmp_path, tasks=[Pin()], config="auto", **given)
    assert list(summary.tasks) == ["pin"]


def test_a_family_is_patched():
    model = AutoModelForCausalLM.from_config(tiny_config("nanochat"), dtype=torch.float64).eval()
    dense = logits(model)
    with pytest.raises(UnsupportedModelError, match="nanochat"):
        patch_model(model, config_for(model, "retrieval"))
    own("family")
    patch_model(model, config_for(model, "retrieval"))
    assert torch.allclose(logits(model), dense, atol=1e-9, rtol=0)
    patch_model(model, config_for(model, "streaming"))
    assert not torch.allclose(logits(model), dense, atol=1e-3)


def test_the_reference_of_this_process_has_the_words():
    for kind in WORDS:
        own(kind)
    register("store", "every", Every)
    text = reference()
    assert "| `b` | number | none |  |" in text and "`d.NAME` of `store: every`" in text, "no meaning was given"
    assert "| `steps` | whole number, >= 1, <= 4096 (steps) | `4` | grid steps per unit. |" in text
    assert "`pattern: strided` in prefill" in text and "| `every` |" in text
    assert "`score: every_nth` in eviction" in text and "distance of two tokens that are kept." in text
    assert "`after: faded` in eviction/after" in text and "| `factor` |" in text
    assert "| `plain` | The definition of attention, as a kernel of one's own. |" in text


def test_registering_imports_neither_torch_nor_transformers():
    code = "import sys, hf_longctx; hf_longctx.register; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@dataclass(frozen=True)
class Inner:
    low: int = 1


@dataclass(frozen=True)
class Every(Full):
    a: int = 1
    b: float | None = None
    c: tuple[int, ...] = ()
    d: dict[str, Inner] = field(default_factory=dict)
    e: int | Inner = 3
    f: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Pair(Full):
    a: tuple[int, int] = (1, 2)


def test_fields_of_every_type_that_yaml_says_are_taken():
    register("store", "every", Every)
    given = {"store": "every", "b": 2.0, "c": [1], "d": {"x": {"low": 2}}, "e": {"low": 4}, "f": [["y"]]}
    made = LongCtxConfig.from_dict(plain(stores={"retrieval": given})).stores.retrieval
    assert made == Every(1, 2.0, (1,), {"x": Inner(2)}, Inner(4), (("y",),))
    assert LongCtxConfig.from_dict(plain(stores={"retrieval": made})).stores.retrieval == made
    refused(lambda: register("store", "pair", Pair), "Pair.a has type tuple[int, int], which YAML cannot say")
