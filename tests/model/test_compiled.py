"""A decoded token under torch.compile: one graph for every length and cache, and the answers of the model itself."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.cases import one_each
from helpers.store_cases import patched_case
from helpers.tiny import config_for, left_padded, tiny_model
from transformers import CompileConfig

from hf_longctx import CacheError, LongCtxCache, UnsupportedModeError, observe, patch_model, report, unpatch_model
from hf_longctx.cache.handles import cache_of
from hf_longctx.cache.seam import CACHE, NAMES
from hf_longctx.model.compiled import GiveCacheBack

PROMPT = 20


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs():
    """A backend that runs what was traced as it is, and one entry per graph it was given."""
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    return made, backend


def patched_model(family="llama", **top):
    model = tiny_model(family, head_dim=16)
    patch_model(model, config_for(model, "mixed", 4, 9, **top))
    return model


def decoded(call, cache, ids):
    """Logits of the tokens, read one at a time."""
    with torch.no_grad():
        return torch.cat([call(ids[:, i : i + 1], **{CACHE: cache}).logits for i in range(ids.shape[1])], 1)


def filled(model, ids, **more):
    cache = LongCtxCache(model, **more)
    with torch.no_grad():
        model(ids[:, :PROMPT], **{CACHE: cache})
    return cache


def check_decoding(model, graphs):
    """The model's own answers, by one graph, with buffers that grow and that were reserved."""
    ids = torch.randint(3, 97, (2, PROMPT + 30))
    want = decoded(model, filled(model, ids), ids[:, PROMPT:])
    made, backend = graphs
    compiled = torch.compile(model.forward, fullgraph=True, backend=backend)
    for more in ({}, {"max_tokens": 60}):
        cache = filled(model, ids, **more)
        assert (decoded(compiled, cache, ids[:, PROMPT:]) - want).abs().max() < 1e-5
        assert cache.seen == ids.shape[1]
    assert len(made) == 1
    calls = [str(node.target) for node in made[0].graph.nodes if "hf_longctx" in str(node.target)]
    assert calls == ["hf_longctx.begin", *["hf_longctx.decode_layer"] * model.config.num_hidden_layers]


@pytest.mark.parametrize("case", one_each("stores"))
def test_every_store(case, graphs):
    check_decoding(patched_case(case, torch.float32), graphs)


@pytest.mark.parametrize("kernel", ["auto", "cpu", "reference", "stock"])
def test_other_kernels(kernel, graphs):
    check_decoding(patched_model(kernel=kernel), graphs)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_families(family, graphs):
    model = patched_model(family)
    ids = torch.randint(3, 97, (1, PROMPT + 20))
    want = decoded(model, filled(model, ids), ids[:, PROMPT:])
    compiled = torch.compile(model.forward, fullgraph=True, backend=graphs[1])
    assert (decoded(compiled, filled(model, ids), ids[:, PROMPT:]) - want).abs().max() < 1e-5
    other = decoded(compiled, filled(model, ids), ids[:, PROMPT + 1 :])
    assert (other - want[:, 1:]).abs().max() > 1e-3, "a control"
    assert len(graphs[0]) == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_other_backends_keep_the_operators_in_their_order(backend):
    model = patched_model()
    ids = torch.randint(3, 97, (1, PROMPT + 20))
    want = decoded(model, filled(model, ids), ids[:, PROMPT:])
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert (decoded(compiled, filled(model, ids), ids[:, PROMPT:]) - want).abs().max() < 1e-5
    assert report(model).kernels == ("native",)


@pytest.mark.spanning
@pytest.mark.parametrize("mode", [{}, {"do_sample": True}, {"num_beams": 3}], ids=["greedy", "sample", "beams"])
@pytest.mark.parametrize("padded", [False, True])
def test_generate_compiles_where_it_is_asked_to(mode, padded):
    model = patched_model()
    ids, mask = left_padded([20, 9, 14] if padded else [20])
    more = {"attention_mask": mask, "max_new_tokens": 25, "return_dict_in_generate": True, **mode}
    torch.manual_seed(1)
    want = model.generate(ids, **more)
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(1)
    asked = CompileConfig(fullgraph=True, mode=None, backend="eager")
    got = model.generate(ids, **more, compile_config=asked)
    assert torch.equal(got.sequences, want.sequences)
    assert got.sequences.shape[1] > 40
    assert type(getattr(got, CACHE)) is LongCtxCache
    beams = "num_beams" in mode  # which Transformers never compiles
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (0 if beams else 1)


@pytest.mark.parametrize("more", [{"prefill_chunk_size": 7}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_forwards_of_more_tokens_run_as_without_a_compiler(more):
    model = patched_model()
    ids = torch.randint(3, 97, (1, 10)).repeat(1, 2)
    asked = {"max_new_tokens": 20, "attention_mask": torch.ones_like(ids), "eos_token_id": -1, **more}
    want = model.generate(ids, **asked)
    compile_config = CompileConfig(fullgraph=True, mode=None, backend="eager")
    assert torch.equal(model.generate(ids, **asked, compile_config=compile_config), want)


def test_generate_compiles_nothing_by_itself_nor_where_it_is_turned_off():
    model = patched_model()
    ids = torch.randint(3, 97, (1, 20))
    torch._dynamo.utils.counters.clear()
    off = {"compile_config": CompileConfig(mode=None, backend="eager"), "disable_compile": True}
    for more in ({}, off):
        model.generate(ids, max_new_tokens=4, **more)
    assert not torch._dynamo.utils.counters["stats"]


def test_the_cache_of_a_forward_is_in_what_it_returns(graphs):
    model = patched_model()
    ids = torch.randint(3, 97, (1, PROMPT + 2))
    cache = filled(model, ids)
    compiled = torch.compile(model.forward, fullgraph=True, backend=graphs[1])
    with torch.no_grad():
        assert getattr(compiled(ids[:, :1], **{CACHE: cache}), CACHE) is cache
        assert compiled(ids[:, :1], return_dict=False, **{CACHE: cache})[1] is cache


@pytest.mark.parametrize("change", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache)), LongCtxCache.fork])
def test_a_copied_cache_goes_on(change, graphs):
    model = patched_model()
    ids = torch.randint(3, 97, (1, PROMPT + 20))
    want = decoded(model, filled(model, ids), ids[:, PROMPT:])
    compiled = torch.compile(model.forward, fullgraph=True, backend=graphs[1])
    assert (decoded(compiled, change(filled(model, ids)), ids[:, PROMPT:]) - want).abs().max() < 1e-4


def test_a_cache_of_another_model_is_taken_or_refused_as_without_a_compiler(graphs):
    model, same = (patched_model() for _ in range(2))
    same.load_state_dict(model.state_dict())
    other = patch_model(copy.deepcopy(model), config_for(model, "retrieval"))
    ids = torch.randint(3, 97, (1, PROMPT + 20))
    want = decoded(model, filled(model, ids), ids[:, PROMPT:])
    compiled = torch.compile(model.forward, fullgraph=True, backend=graphs[1])
    cache = filled(same, ids)
    del same
    assert (decoded(compiled, cache, ids[:, PROMPT:]) - want).abs().max() < 1e-5
    assert cache.model() is model.model
    with pytest.raises(CacheError, match="made for another model or another config"):
        decoded(compiled, filled(other, ids), ids[:, PROMPT:])
    pages = patched_model()
    again = pickle.loads(pickle.dumps(pages))
    compiled = torch.compile(again.forward, fullgraph=True, backend=graphs[1])
    decoded(compiled, filled(again, ids), ids[:, PROMPT:])
    assert report(again).forwards == 21, "the prompt and the tokens"
    assert not report(pages).forwards


def test_the_base_model_alone_takes_a_cache_under_both_names(graphs):
    model = patched_model()
    ids = torch.randint(3, 97, (1, PROMPT + 1))
    compiled = torch.compile(model.model, fullgraph=True, backend=graphs[1])
    with torch.no_grad():
        for name in NAMES:
            cache = filled(model, ids)
            assert getattr(compiled(input_ids=ids[:, PROMPT:], **{name: cache}), CACHE) is cache


def test_every_copy_has_a_handle_of_its_own():
    model = patched_model()
    ids = torch.randint(3, 97, (1, PROMPT))
    cache = filled(model, ids)
    copies = [cache, copy.deepcopy(cache), copy.copy(cache), pickle.loads(pickle.dumps(cache)), cache.fork()]
    assert [cache_of(one.handle) for one in copies] == copies
    assert len({int(one.handle) for one in copies}) == len(copies)
    handle = copies.pop().handle
    with pytest.raises(CacheError, match="given a cache that is gone"):
        cache_of(handle)


def test_what_is_refused_is_refused_before_a_layer_writes(graphs):
    model = patched_model()
    ids = torch.randint(3, 97, (2, PROMPT + 4))
    cache = filled(model, ids, max_tokens=PROMPT + 1)
    compiled = torch.compile(model.forward, fullgraph=True, backend=graphs[1])
    decoded(compiled, cache, ids[:, PROMPT : PROMPT + 1])
    with pytest.raises(CacheError, match="room for max_tokens=21 tokens"):
        decoded(compiled, cache, ids[:, :1])
    with pytest.raises(CacheError, match="holds 2 rows"):
        decoded(compiled, cache, ids[:1, :1])
    assert cache.seen == PROMPT + 1
    with observe(model, lambda *seen: None), pytest.raises(UnsupportedModeError, match="observe.* compiled model"):
        decoded(compiled, filled(model, ids), ids[:, :1])


def test_prompts_and_gradients_are_left_to_the_model_itself(graphs):
    model = patched_model()
    ids = torch.randint(3, 97, (1, PROMPT + 2))
    whole = torch.compile(model.forward, fullgraph=True, backend=graphs[1])
    with torch.no_grad(), pytest.raises(Exception, match="never one fixed graph"):
        whole(ids, **{CACHE: LongCtxCache(model)})
    cache = filled(model, ids)
    out = whole(ids[:, :1], **{CACHE: cache}).logits
    with pytest.raises(RuntimeError, match="autograd"):
        out.sum().backward()


@pytest.mark.slow
def test_layers_with_scores_of_their_own_are_not_one_graph(graphs):
    from helpers.every_family import CASES
    from helpers.every_family import tiny_model as family_model

    case = next(case for case in CASES if case.model_type == "gemma2")
    model = family_model(case).float()
    patch_model(model, config_for(model, "retrieval"))
    ids = torch.randint(3, 97, (1, PROMPT + 2))
    cache = filled(model, ids)
    with pytest.raises(Exception, match="never one fixed graph"):
        decoded(torch.compile(model.forward, fullgraph=True, backend=graphs[1]), cache, ids[:, :1])
    want = decoded(model, filled(model, ids), ids[:, :2])
    got = decoded(torch.compile(model.forward, backend=graphs[1]), filled(model, ids), ids[:, :2])
    assert (got - want).abs().max() < 1e-4


@pytest.mark.slow
def test_a_prompt_breaks_the_graph(graphs):
    model = patched_model()
    ids = torch.randint(3, 97, (1, PROMPT))
    with torch.no_grad():
        want = model(ids, **{CACHE: LongCtxCache(model)}).logits
        got = torch.compile(model.forward, backend=graphs[1])(ids, **{CACHE: LongCtxCache(model)}).logits
    assert (got - want).abs().max() < 1e-5
    assert graphs[0]


def test_unpatching_takes_the_hooks_away():
    model = patched_model()
    assert any(isinstance(hook, GiveCacheBack) for hook in model.model._forward_hooks.values())
    unpatch_model(model)
    assert not model.model._forward_hooks
    assert "get_compiled_call" not in vars(model)
