"""A cache's file whose checksums are right, and that no cache can have given, is refused in words.

The forgeries here are some of those that tests/slow/test_forged_caches.py makes of every number and every tensor.
"""

from __future__ import annotations

import copy
import os
import stat

import pytest
import torch
from helpers.forgeries import Forger, at, put, remove
from helpers.store_cases import CASES, patched_case
from helpers.tiny import left_padded

from hf_longctx import CacheError, LongCtxCache
from hf_longctx.config.bounds import MOST

FALSE = "says what is true of no cache"


def filled(model, lengths=(300,), max_tokens=None):
    ids, mask = left_padded(list(lengths))
    cache = LongCtxCache(model, max_tokens)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    return cache


def forger_of(case, tmp_path, lengths=(300,), change=None):
    model = patched_case(case, torch.float32, layers=2)
    cache = filled(model, lengths)
    if change is not None:
        cache = change(cache) or cache
    cache.save(tmp_path / "true")
    assert LongCtxCache.load(tmp_path / "true", model).seen == cache.seen, "a control: the true file"
    return model, Forger(tmp_path / "true")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return *forger_of("full", folder := tmp_path_factory.mktemp("full")), folder / "false"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return *forger_of(
        "quantized:bits=4:group=16:residual=0", folder := tmp_path_factory.mktemp("packed")
    ), folder / "false"


def refused(forged, edit, said=FALSE):
    model, forger, path = forged
    with pytest.raises(CacheError, match=said) as error:
        LongCtxCache.load(forger.write(path, edit), model)
    assert len(str(error.value)) < 2000, "it fits a screen"


def cut(*ends, how):
    """Change every tensor whose name ends so."""

    def edit(tensors, told):
        found = [name for name in tensors if name.endswith(ends)]
        assert found, "a control"
        tensors |= {name: how(tensors[name]).contiguous() for name in found}

    return edit


def told_of(store="retrieval", segment=0):
    """Where the numbers of a segment of the first layer are."""
    return ("kept", 0, "stores", store, "segments", segment, "numbers")


def test_what_crashed_the_native_kernel(full, packed):
    refused(packed, cut("packed.v_scale", how=lambda t: t[..., :0]), "v_scale: it is F32 .*, expected")
    for parts in (("kept.k", "kept.v"), ("retrieval.segments.kept.k", "retrieval.segments.kept.v")):
        refused(full, cut(*parts, how=lambda t: t.repeat(1, 3, 1, 1)), r"kept.k: it is F32 .*, expected F32 \[1, 2,")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("bits", [3, 8]),
        ("group", [1, 0, 32]),
        ("slots", [2**40, 2**63 - 1, 287, 0]),
        ("first", [-(10**9), 16]),
        ("whole", [-1, 1, 304]),
        ("shared", [1, True, 2]),
        ("rows", [2**63 - 1, 2, 0]),
    ],
)
def test_numbers_of_what_is_packed(packed, name, wrong):
    place = next((*told_of(segment=i), name) for i in (0, 1) if name in at(packed[1].told, told_of(segment=i)))
    if name in ("shared", "rows"):
        place = (*told_of(segment=1), name)
    for value in wrong:
        refused(packed, lambda tensors, told, value=value: put(told, place, value), rf"numbers\.{name}|keys are|slots")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("length", [-5, 0, 299, 301, "a", None, 300.0, [300], True]),
        ("capacity", [299, -1, 2**40, 2**63]),
        ("rows", [2**63 - 1, 2, 0, -1]),
        ("shared", [1, 2, -1, False]),
    ],
)
def test_numbers_of_a_segment(full, name, wrong):
    for value in wrong:
        refused(
            full, lambda tensors, told, value=value: put(told, (*told_of(), name), value), rf"{name}: got .*expected"
        )


@pytest.mark.parametrize(
    "how",
    [
        lambda t: t.half(),
        lambda t: t.to(torch.int8),
        lambda t: t.flatten(),
        lambda t: t[None],
        lambda t: t[:, :, :-1],
        lambda t: t[:, :, :0],
        lambda t: t[..., :-1],
        lambda t: t.repeat(2, 1, 1, 1),
        lambda t: t[:0],
    ],
)
@pytest.mark.parametrize("part", ["kept.k", "kept.v", "history.v"])
def test_tensors_of_another_shape_or_dtype(full, part, how):
    refused(full, cut(part, how=how), rf"{part}: it is .* expected F32")


def test_tensors_too_many_and_too_few(full):
    refused(full, lambda tensors, told: tensors.update(more=torch.ones(3)), 'tensor "more": no layer and no store')
    refused(full, lambda tensors, told: remove(tensors, "layers.1.retrieval.segments.kept.v"), "it is not there")


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (("kept", 0, "seen"), ["a", 0, -1, 301, 300.0, 2**40]),
        (("kept", 1, "seen"), ["a", 299, 301]),
        (("kept", 0, "batch"), [0, -1, 2, True]),
        (("kept", 1, "batch"), [2]),
        (("kept", 0, "head_dim"), [16, 0, -8]),
        (("kept", 0, "dtype"), ["float16", "float31", "Tensor", "int32", None, 5]),
        (("kept", 0, "dense_bytes_per_token"), [0, -1, 10**30]),
        (("kept", 0, "autocast"), [1, None]),
        (("kept", 0, "stores"), [{}, [], None]),
        (("kept", 0, "stores", "retrieval", "numbers", "aligned"), [300, 5, -1, None]),
        (("kept", 0, "stores", "streaming", "numbers", "oldest"), [-1, 28, 286, 10**30]),
        (("kept", 0, "stores", "streaming", "numbers"), [{}, [], {"oldest": 29, "more": 1}]),
        (("kept", 0, "stores", "streaming", "state"), [["k"], None, {}]),
        (("kept", 0, "stores", "streaming", "segments"), [[], None, "kept"]),
        (("kept", 0, "stores", "retrieval", "segments", 0, "name"), ["shared 0", "k" * 10**6, None, ["kept"]]),
        (("kept", 0, "stores", "retrieval", "segments", 0, "kind"), ["Packed", "Tensor", None]),
        (("kept", 0, "stores", "retrieval", "segments", 0, "tensors"), [["v", "k"], ["k"], ["k", "v", "bias"], 5]),
        (("cache", "starts"), [257, [257, 1], [301], [-1], ["a"], [None], "a", {}, [1.0]]),
        (("cache", "ends"), [301, [301], [-1], [True]]),
        (("cache", "staggered"), [True, 0, None]),
        (("max_tokens",), [0, 299, -1, 2**62, 10**30, "a", 300.0, True, []]),
        (("kept",), [[], None, {}, 5]),
        (("cache",), [None, [], {}]),
        (("layers",), [None, 5]),
        (("model",), [None, [], "a", 5]),
    ],
)
def test_what_the_cache_and_its_layers_say(full, place, wrong):
    for value in wrong:
        edit = lambda tensors, told, value=value: put(told, place, value)  # noqa: E731
        refused(full, edit, f"{FALSE}|another model")


@pytest.mark.parametrize(
    "text", ["nan", "", "null", "5", "[" * 100_000, '{"a": NaN}', '{"a": Infinity}', "1" * 5000, "{"]
)
def test_texts_that_are_no_plain_data(full, text):
    refused(full, lambda tensors, told: text, "is no file that cache.save wrote|says what is true of no cache")


def test_values_as_long_as_the_file_are_cut_in_messages(full):
    for place in (("model", "more"), ("model", "weights"), ("layers", 0, "roles")):
        refused(full, lambda tensors, told, place=place: put(told, place, "a" * 10**6), "another (model|config)")
    refused(full, lambda tensors, told: put(told, ("model", "x"), json_of_depth(500)), "another model|too deeply")


def json_of_depth(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def test_ids(full):
    for how, said in (
        (lambda t: t.long(), "ids: it is I64"),
        (lambda t: t[:, 1:], "ids: it is I32"),
        (lambda t: t - 98, "ids are not all from 0 to 96"),
        (lambda t: t + 97, "ids are not all from 0 to 96"),
        (lambda t: t[:0], "ids: it is"),
    ):
        refused(full, cut("ids", how=how), said)


def test_ids_that_no_model_takes_are_not_saved(tmp_path):
    model = patched_case("full", torch.float32, layers=2)
    cache = LongCtxCache(model)
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=cache)
    for wrong in (ids - 44, ids + 90):
        with pytest.raises(CacheError, match="ids are not all from 0 to 96"):
            cache.save(tmp_path / "a", ids=wrong)
    cache.save(tmp_path / "a", ids=ids)


def test_pages_and_their_rows(tmp_path):
    def reordered(cache):
        cache.reorder_cache(torch.tensor([1, 0]))

    forged = *forger_of("offloaded", tmp_path, (60, 60), reordered), tmp_path / "false"
    numbers = (*told_of(), "pages")
    for value in (0, 1, 4, 2**40, -1):
        refused(forged, lambda tensors, told, value=value: put(told, numbers, value))
    refused(forged, lambda tensors, told: remove(at(told, told_of()), "pages"), "how many pages")
    for value in (1, -1, None):
        refused(forged, lambda tensors, told, value=value: put(told, (*told_of(), "0"), value))
    for wrong in ([0, 2], [-1, 0], [1]):
        refused(forged, cut("index 0", how=lambda t, wrong=wrong: torch.tensor(wrong)), "index 0")
    refused(forged, cut("0.k", "0.v", how=lambda t: t[:1]), "index 0 has rows 0 to 1 of 1")
    for ends in (("0.k",), ("0.k", "0.v")):
        for how in (lambda t: t[:, :1], lambda t: t[:, :, :0], lambda t: t[:, :, :9], lambda t: t.repeat(1, 1, 2, 1)):
            refused(forged, cut(*(f"pages.{end}" for end in ends), how=how))


def test_state_and_edges_of_the_compensated_store(tmp_path):
    forged = *forger_of("sink_recent_compensated:sink=4:recent=16", tmp_path, (300, 200)), tmp_path / "false"
    place = ("kept", 0, "stores", "streaming", "numbers")
    for name, wrong in (("low", [-1, 1000, 285, 2**40]), ("begin", [1, -1])):
        for value in wrong:
            refused(forged, lambda tensors, told, name=name, value=value: put(told, (*place, name), value))
    for how in (lambda t: t.float(), lambda t: t[:1], lambda t: t[..., 0], lambda t: t.repeat(1, 1, 2, 1)):
        refused(forged, cut("state.k", how=how), "state.k: it is")
    for value in ([], ["k"], ["k", "v", "v"], ["v", "k"]):
        refused(forged, lambda tensors, told, value=value: put(told, (*place[:-1], "state"), value))


def test_another_capacity_is_no_fault_and_costs_no_memory(full):
    model, forger, path = full
    true = LongCtxCache.load(forger.write(path, lambda tensors, told: None), model)
    for value, allowed in ((300, 1), (301, 1), (MOST, 2)):
        edit = lambda tensors, told, value=value: put(told, (*told_of(), "capacity"), value)  # noqa: E731
        loaded = LongCtxCache.load(forger.write(path, edit), model)
        assert loaded.nbytes <= allowed * true.nbytes
        token = torch.tensor([[5]])
        with torch.no_grad():
            want = model(token, past_key_values=copy.deepcopy(true)).logits
            assert torch.equal(model(token, past_key_values=loaded).logits, want)


def test_room_for_which_there_is_no_memory(full):
    def edit(tensors, told):
        told["max_tokens"] = MOST
        for layer in told["kept"]:
            layer["stores"]["retrieval"]["segments"][0]["numbers"]["capacity"] = MOST

    model, forger, path = full
    forger.write(path, edit)
    original = torch.Tensor.new_empty

    def none_left(self, *shape, **kwargs):
        if MOST in shape:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] not enough memory")
        return original(self, *shape, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", none_left)
        with pytest.raises(CacheError, match="there is no memory for the cache"):
            LongCtxCache.load(path, model)


@pytest.mark.parametrize("case", CASES)
def test_every_store_refuses_what_it_did_not_say(case, tmp_path):
    """A few of the forgeries of every store; the others are in tests/slow."""
    model, forger = forger_of(case, tmp_path, (300, 200))
    every, refused = [edit for _, edit in forger.every()], 0
    some = every[:: len(every) // 40]
    for edit in some:
        try:
            loaded = LongCtxCache.load(forger.write(tmp_path / "false", edit), model)
        except CacheError:
            refused += 1
        else:
            assert loaded.seen == 300
    assert refused > 0.9 * len(some) > 30


# Files that are none.


def test_a_pipe_a_folder_and_a_device_are_refused_at_once(full, tmp_path):
    model = full[0]
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero", "", "a\0b"):
        with pytest.raises(CacheError, match="is no file that cache.save wrote"):
            LongCtxCache.load(path, model)


def test_names_that_no_file_can_have(full, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = filled(full[0])
    for path in ("", ".", "/", "a\0b", "\ud800"):
        with pytest.raises(CacheError, match="path: got .*expected the name of a file to write"):
            cache.save(path)
    assert os.listdir(tmp_path) == []


def test_nothing_but_a_file_is_replaced(full, tmp_path):
    """Root could replace a device, for every process of the machine."""
    cache, pipe = filled(full[0]), tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "link", "folder"):
        with pytest.raises(CacheError, match="expected the name of a file to write .*a folder, a pipe or a device"):
            cache.save(tmp_path / name)
    assert pipe.is_fifo() and (tmp_path / "link").is_symlink()
    assert len(os.listdir(tmp_path)) == 3


def test_nobody_else_may_read_a_saved_cache(full, tmp_path):
    cache, path = filled(full[0]), tmp_path / "cache"
    path.write_text("old")
    path.chmod(0o644)
    cache.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_history_has_a_slot_for_every_token_that_it_remembers(tmp_path):
    """60 tokens over a ring of 16: 40 left it, and the slots of the history say where each of them is."""
    model, forger = forger_of("sink_recent", tmp_path, (60,))
    false = tmp_path / "false"
    layers = [("kept", layer, "stores", "streaming") for layer in range(2)]

    def slots(length, capacity):
        def edit(tensors, told):
            cut("history.k", "history.v", how=lambda t: t.repeat(1, 1, 8, 1)[:, :, :length])(tensors, told)
            for place in layers:
                numbers = at(told, (*place, "segments", 1, "numbers"))
                numbers |= {"length": length, "capacity": capacity}

        return edit

    def without(oldest):
        def edit(tensors, told):
            for place in layers:
                store = at(told, place)
                del store["segments"][1]
                store["numbers"]["oldest"] = oldest
            for name in [name for name in tensors if ".history." in name]:
                del tensors[name]

        return edit

    for length, capacity in ((40, 40), (2, 2), (1, 1), (0, 0), (257, 257), (57, 58), (57, 2**40)):
        refused((model, forger, false), slots(length, capacity), r"(length|capacity): got .*, expected")
    for length in (41, 256):
        assert LongCtxCache.load(forger.write(false, slots(length, length)), model).seen == 60, "a control"
    for oldest in (0, 4, 43):
        refused(
            (model, forger, false),
            without(oldest),
            r"expected \['kept', 'history'\]",
        )
    nothing = LongCtxCache.load(forger.write(false, without(44)), model)
    assert nothing.oldest_crop == 60, "a control: a cache that remembers nothing"
