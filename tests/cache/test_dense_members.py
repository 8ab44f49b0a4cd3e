"""The interface of Transformers' caches and layers: every member is ours, or was found right as inherited."""

from __future__ import annotations

import copy
import pickle
from contextlib import contextmanager

import pytest
import torch
from helpers.tiny import config_for, left_padded, tiny_model
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_longctx import CacheError, LongCtxCache, UnsupportedModeError, patch_model
from hf_longctx.cache.layer import LongCtxLayer
from hf_longctx.cache.seam import CACHE
from hf_longctx.model.patch import unpatched

# Inherited and right: what asks for layers of another kind says so itself, and the rest follows from the layers.
RIGHT = {
    "Cache": {
        *("__len__", "get_max_length", "get_max_cache_shape", "get_query_offset"),
        *("is_compileable", "is_croppable", "is_dummy", "is_linear", "is_sliding"),
        *("get_conv_state", "get_recurrent_state", "has_previous_state"),
        *("update_conv_state", "update_indexer", "update_recurrent_state"),
        "max_batch_size",  # only static layers have one; asking a DynamicCache is an AttributeError too
    },
    "layer": {"_layer_type"},  # names no type of layer
}
PYTHON = {"__annotations__", "__slots__", "__dict__", "__module__", "__weakref__", "__doc__", "__firstlineno__"}
PYTHON |= {"__static_attributes__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__slotnames__"}


def unchecked(ours: type, stocks: tuple[type, ...], right: set[str]) -> set[str]:
    """Members of the stock classes that neither our classes define nor ``right`` lists."""
    own = {name for cls in ours.__mro__ if cls.__module__.startswith("hf_longctx") for name in vars(cls)}
    own |= {"is_initialized"}  # of an instance
    names = {name for stock in stocks for name in dir(stock) if not hasattr(object, name)}
    names = {name for name in names if name.startswith("__") or not name.startswith("_abc")}
    return names - own - right - PYTHON - {name for name in names if name.startswith("__abstract")}


@pytest.mark.parametrize(
    ("ours", "stocks", "kind"),
    [(LongCtxCache, (Cache, DynamicCache), "Cache"), (LongCtxLayer, (CacheLayerMixin, DynamicLayer), "layer")],
)
def test_every_member_was_looked_at(ours, stocks, kind):
    """A member that is new in Transformers fails here: define it, or find it right and list it."""
    assert unchecked(ours, stocks, RIGHT[kind]) == set()
    assert "is_sliding" in unchecked(LongCtxCache, stocks, set()) | vars(LongCtxLayer).keys(), "a control"


@pytest.fixture
def model():
    return (lambda model: patch_model(model, config_for(model)))(tiny_model())


@pytest.fixture
def cache(model):
    cache = LongCtxCache(model)
    with torch.no_grad():
        model(torch.randint(3, 97, (2, 30)), past_key_values=cache)
    return cache


def unchanged(model, cache, call, error=UnsupportedModeError, match: str = "") -> None:
    """``call`` is refused, and the cache goes on as its twin does."""
    twin, step = copy.deepcopy(cache), torch.tensor([[5], [6]])
    with pytest.raises(error, match=match):
        call()
    with torch.no_grad():
        got, want = (model(step, past_key_values=one).logits for one in (cache, twin))
    assert torch.equal(got, want)


REFUSED = {
    "layers[1].keys of a LongCtxCache.*unpatch_model.*observe": lambda cache: cache.layers[1].keys,
    "layers[1].values of a LongCtxCache": lambda cache: cache.layers[1].values,
    "layers[0].keys of a": lambda cache: setattr(cache.layers[0], "keys", torch.zeros(2, 4, 9, 8)),
    "layers[0].values of a": lambda cache: setattr(cache.layers[0], "values", None),
    "layers[2].crop.*Call cache.crop": lambda cache: cache.layers[2].crop(-1),
    "layers[0].reorder_cache.*Call cache.reorder_cache": lambda cache: cache.layers[0].reorder_cache(
        torch.tensor([1, 0])
    ),
    "layers[0].batch_repeat_interleave.*Call cache": lambda cache: cache.layers[0].batch_repeat_interleave(2),
    "layers[0].batch_select_indices.*Call cache": lambda cache: cache.layers[0].batch_select_indices([0]),
    "offload.. of a LongCtxCache.*'store': 'offloaded'": lambda cache: cache.offload(0),
    "prefetch.. of a LongCtxCache": lambda cache: cache.prefetch(0),
    "offload.. of a": lambda cache: cache.layers[0].offload(),
    "prefetch.. of a": lambda cache: cache.layers[0].prefetch(),
    "not a sequence of keys and values": lambda cache: list(cache),
    "not a sequence of keys": lambda cache: cache[0],
    "is not a sequence": lambda cache: dict(cache),
    "early_initialization.*max_tokens=": lambda cache: cache.early_initialization(2, 4, 8, torch.float32, "cpu"),
}


@pytest.mark.parametrize("match", REFUSED)
def test_what_needs_two_tensors_says_what_to_use_instead(model, cache, match):
    match_text = match.replace("[", r"\[").replace("]", r"\]")
    unchanged(model, cache, lambda: REFUSED[match](cache), match=match_text)


@pytest.mark.parametrize("max_tokens", [None, 64])
def test_what_is_inherited_is_right(model, max_tokens):
    cache = LongCtxCache(model, max_tokens)
    stock = DynamicCache(config=model.config)
    assert not cache.is_initialized
    assert "tokens=0, bytes=0" in repr(cache)
    with torch.no_grad():
        for one in (cache, stock):
            model(torch.randint(3, 97, (2, 30)), past_key_values=one)
    assert cache.is_initialized
    for name in ("is_compileable", "is_sliding", "is_linear", "is_dummy", "is_croppable"):
        if hasattr(stock, name):
            assert getattr(cache, name) == getattr(stock, name), name
    assert len(cache) == len(stock) == 3
    assert bool(cache)
    for name in ("get_seq_length", "get_query_offset", "get_mask_sizes"):
        if hasattr(stock, name):
            given = (4, 1) if name == "get_mask_sizes" else ()
            if name != "get_mask_sizes" or hasattr(stock, "get_query_offset"):
                assert getattr(cache, name)(*given) == getattr(stock, name)(*given), name
    if hasattr(stock, "is_recording_past"):
        assert cache.is_recording_past(0), "streaming heads remember what a rollback needs"
        assert not LongCtxCache(model, rollback=False).is_recording_past(0)
    longest = cache.get_max_length if hasattr(stock, "get_max_length") else cache.get_max_cache_shape
    assert longest() == (max_tokens or -1) == cache.max_cache_len
    for name, given in {
        "update_conv_state": (None, 0),
        "has_previous_state": (0,),
        "update_indexer": (None, 0),
    }.items():
        if hasattr(stock, name):
            with pytest.raises(ValueError, match="[Ll]inear|indexer|does not support"):
                getattr(cache, name)(*given)
    for name in ("key_cache", "value_cache", "_seen_tokens", "to_legacy_cache", "get_usable_length"):
        assert hasattr(cache, name) == hasattr(stock, name), f"{name} went with Transformers 4"
    assert repr(cache) == f"LongCtxCache(layers=3, rows=2, tokens=30, bytes={cache.nbytes})"
    assert repr(pickle.loads(pickle.dumps(cache))) == repr(cache)
    assert repr(cache.layers[0]) == "LongCtxLayer"


ROWS = {
    "a list": [2, 0],
    "a tuple": (2, 0),
    "a tensor": torch.tensor([2, 0]),
    "negative": [-1, 0],
    "booleans": [True, False, True],
    "a mask": torch.tensor([False, True, True]),
    "a slice": slice(1, None),
    "one": [1],
}


@pytest.mark.parametrize("rows", ROWS)
@torch.no_grad()
def test_rows_are_selected_as_a_dense_cache_selects_them(model, rows):
    ids, mask = left_padded([30, 12, 7])
    cache = LongCtxCache(model)
    model(ids, attention_mask=mask, past_key_values=cache)
    given = ROWS[rows]
    kept = torch.arange(3)[given if isinstance(given, slice) else torch.as_tensor(given)]
    step, longer = torch.tensor([[5], [6], [7]]), torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
    want = model(step, attention_mask=longer, past_key_values=copy.deepcopy(cache)).logits
    cache.batch_select_indices(given)
    got = model(step[kept], attention_mask=longer[kept], past_key_values=cache).logits
    torch.testing.assert_close(got, want[kept])
    assert cache.batch_size == len(kept)


@torch.no_grad()
def test_beams_may_come_as_a_list(model, cache):
    twin = copy.deepcopy(cache)
    cache.reorder_cache([1, 0])
    twin.reorder_cache(torch.tensor([1, 0]))
    step = torch.tensor([[5], [6]])
    assert torch.equal(model(step, past_key_values=cache).logits, model(step, past_key_values=twin).logits)


ODD = {
    "batch_select_indices.*holds 2 rows": lambda cache: cache.batch_select_indices([2]),
    "batch_select_indices..*give a list": lambda cache: cache.batch_select_indices(1),
    "batch_select_indices.*of those to keep": lambda cache: cache.batch_select_indices([]),
    "batch_select_indices.*rows; give": lambda cache: cache.batch_select_indices([[0, 1]]),
    "batch_repeat_interleave.0.: every row": lambda cache: cache.batch_repeat_interleave(0),
    "batch_repeat_interleave.-1.": lambda cache: cache.batch_repeat_interleave(-1),
    "batch_repeat_interleave.1.5.: expected": lambda cache: cache.batch_repeat_interleave(1.5),
    "crop.2.5.: expected a whole number": lambda cache: cache.crop(2.5),
    "crop.True.": lambda cache: cache.crop(True),
    "crop.'3'.": lambda cache: cache.crop("3"),
    "crop.None.": lambda cache: cache.crop(None),
    r"crop.tensor": lambda cache: cache.crop(torch.tensor([1, 2])),
}


@pytest.mark.parametrize("match", ODD)
def test_odd_arguments_change_nothing(model, cache, match):
    unchanged(model, cache, lambda: ODD[match](cache), CacheError, match)


def test_what_takes_nothing_away(model, cache):
    twin = copy.deepcopy(cache)
    cache.crop(torch.tensor(0))
    cache.crop(0)
    cache.crop(99)
    cache.batch_repeat_interleave(1)
    LongCtxCache(model).batch_select_indices([0])
    step = torch.tensor([[5], [6]])
    with torch.no_grad():
        assert torch.equal(model(step, past_key_values=cache).logits, model(step, past_key_values=twin).logits)


@contextmanager
def press(model):
    """As a press of kvpress: a hook after each attention module, which shortens the keys of its layer."""

    def shorten(module, args, kwargs, output):
        layer = kwargs[CACHE].layers[module.layer_idx]
        layer.keys, layer.values = (tensor[:, :, ::2] for tensor in (layer.keys, layer.values))

    hooks = [layer.self_attn.register_forward_hook(shorten, with_kwargs=True) for layer in model.model.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def test_a_press_around_a_patched_model_is_told_the_cause(model):
    ids = torch.randint(3, 97, (1, 30))
    want = model.generate(ids, max_new_tokens=3)
    for call in (lambda: model.generate(ids, max_new_tokens=3), lambda: model(ids)):
        with press(model), pytest.raises(UnsupportedModeError, match="layers.0..keys.*kvpress.*unpatch_model"):
            call()
    assert torch.equal(model.generate(ids, max_new_tokens=3), want)
    with unpatched(model), press(model):
        model(ids)


def test_a_wrapper_around_the_attention_function_is_named(model):
    """As kvpress does with every function that is registered when it is imported."""
    ids, ours = torch.randint(3, 97, (1, 30)), ALL_ATTENTION_FUNCTIONS["longctx"]

    def wrapper(module, query, key, value, attention_mask, dropout, **kwargs):
        assert query.shape[2] == key.shape[2]
        return ours(module, query, key, value, attention_mask, dropout=dropout, **kwargs)

    ALL_ATTENTION_FUNCTIONS["longctx"] = wrapper
    try:
        with pytest.raises(UnsupportedModeError, match="was wrapped by .*test_dense_members.*before patch_model"):
            model(ids)
    finally:
        del ALL_ATTENTION_FUNCTIONS["longctx"]
    assert isinstance(model(ids).past_key_values, LongCtxCache)
