"""The plugin in vLLM itself, on a CPU. Skipped where vLLM is not installed: ``docs/vllm.md`` says how to run it."""

from __future__ import annotations

import gc
import importlib
import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from hf_longctx import LongCtxConfig, patched
from hf_longctx.assets import asset
from hf_longctx.errors import UnsupportedModelError
from hf_longctx.serving.vllm import plugin

# Not of "vllm" itself: a folder of that name, such as examples/vllm, would do.
pytest.importorskip("vllm.config", reason="vLLM is not installed: docs/vllm.md says how to run these")
import vllm  # noqa: E402

ROLES = ("RSSS", "SRSR", "SSSS", "RSRS")
NEW = 12
LENGTHS = (20, 90, 333, 700)


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """Makes an engine on a folder with the streaming rule (sink, recent), or with "auto"; None: without the plugin."""

    def make(folder, rule, roles=ROLES, **given) -> vllm.LLM:
        clear()
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process, where it can be looked into
        monkeypatch.setenv(plugin.SWITCH, "0")
        if rule == "auto":
            monkeypatch.setenv(plugin.SWITCH, rule)
        elif rule is not None:
            path = tmp_path / "longctx.yaml"
            LongCtxConfig.from_dict(config(folder, rule, roles)).to_yaml(path)
            monkeypatch.setenv(plugin.SWITCH, str(path))
        plugin.register()
        plain = {"dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False, "block_size": 32}
        plain |= {"max_model_len": 1024, "max_num_batched_tokens": 128, "max_num_seqs": 8, "generation_config": "vllm"}
        return vllm.LLM(str(folder), skip_tokenizer_init=True, kv_cache_memory_bytes=1 << 28, **{**plain, **given})

    yield make
    clear()


def clear() -> None:
    """An engine is one per process, and keeps the class of a model by its name."""
    gc.collect()
    importlib.import_module("vllm.distributed").cleanup_dist_env_and_memory()
    importlib.import_module("vllm.model_executor.model_loader.utils")._MODEL_ARCH_BY_HASH.clear()


def config(folder, rule, roles) -> dict:
    described = LongCtxConfig.describe(AutoModelForCausalLM.from_pretrained(folder).config)
    streaming = {"store": "sink_recent", "sink": rule[0], "recent": rule[1]}
    return {"model": described, "heads": {"roles": list(roles)}, "stores": {"streaming": streaming}}


def texts(lengths=LENGTHS) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(10, 190) for _ in range(length)] for length in lengths]


def asked(tokens=NEW) -> vllm.SamplingParams:
    return vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)


def answers(llm: vllm.LLM, prompts: list[list[int]], tokens=NEW) -> list[list[int]]:
    found = llm.generate([{"prompt_token_ids": ids} for ids in prompts], asked(tokens), use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in found]


def generated(folder, rule, prompts, roles=ROLES) -> list[list[int]]:
    """What ``generate()`` of the patched model says."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    with patched(model, config(folder, rule, roles)):
        outs = [model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False) for ids in prompts]
    return [out[0, -NEW:].tolist() for out in outs]


def scheduler(llm: vllm.LLM):
    return llm.llm_engine.engine_core.engine_core.scheduler


def pool(llm: vllm.LLM):
    return scheduler(llm).kv_cache_manager.block_pool


def held(llm: vllm.LLM) -> int:
    """Blocks that requests hold; one block is nobody's."""
    return pool(llm).num_gpu_blocks - 1 - pool(llm).get_num_free_blocks()


@pytest.fixture
def calls(monkeypatch):
    """(query, key, value, output) of every call of a layer with sinks, in float64, by the layer's name."""
    from hf_longctx.serving.vllm.backend import SinkWindowImpl

    found: dict[str, list[tuple[torch.Tensor, ...]]] = {}
    forward = SinkWindowImpl.forward

    def recorded(self, layer, query, key, value, kv_cache, metadata, output, *rest, **more):
        forward(self, layer, query, key, value, kv_cache, metadata, output, *rest, **more)
        if metadata is not None:
            found.setdefault(layer.layer_name, []).append(tuple(x.double() for x in (query, key, value, output)))

    monkeypatch.setattr(SinkWindowImpl, "forward", recorded)
    return found


def check_calls(calls, rule) -> None:
    """Every output is that of the mask over all keys so far, and a rule that is off by one is seen."""
    sink, recent = rule
    right = max(error(parts, sink, recent) for parts in calls.values())
    assert right < 1e-5
    off = [(sink, recent + 1), (sink + 1, recent), (sink, recent - 1), (sink - 1, recent)]
    assert min(max(error(parts, *other) for parts in calls.values()) for other in off if other[1]) > 1e-3


@pytest.mark.parametrize("rule", [(5, 50), (40, 33), (1, 1)], ids=str)
def test_attention_is_the_mask(rule, engine, calls):
    """In chunks and decoded tokens."""
    answers(engine(asset("tiny-llama"), rule), texts((700,)))
    assert len(calls) == "".join(ROLES).count("S")
    assert {len(parts) for parts in calls.values()} == {-(-700 // 128) + NEW - 1}, "chunks, and decoded tokens"
    check_calls(calls, rule)


@pytest.mark.parametrize("rule", [(5, 50), (40, 33), (70, 40), (3, 2)], ids=str)
def test_attention_over_a_shared_prefix_is_the_mask(rule, engine, calls):
    """What another request has read, and is over: its sinks and its window are read where they are."""
    (first,) = texts((700,))
    llm = engine(asset("tiny-llama"), rule, enable_prefix_caching=True, prefix_cache_retention_interval=None)
    answers(llm, [first], 1)
    shared = {name: tuple(x[:512] for x in map(torch.cat, zip(*parts, strict=True))) for name, parts in calls.items()}
    calls.clear()
    second = [*first[:520], *texts((90,))[0]]
    out = llm.generate([{"prompt_token_ids": second}], asked(), use_tqdm=False)[0]
    assert out.num_cached_tokens == 512
    assert sum(len(q) for q, *_ in next(iter(calls.values()))) == 610 - 512 + NEW - 1
    check_calls({name: [shared[name], *parts] for name, parts in calls.items()}, rule)


def error(parts, sink: int, recent: int) -> float:
    """The largest difference from a mask, of one layer's calls in their order."""
    q, k, v, out = (torch.cat(one) for one in zip(*parts, strict=True))
    i, j = torch.arange(len(q))[:, None], torch.arange(len(q))
    seen = (j <= i) & ((j < sink) | (i - j < recent))
    scores = torch.einsum("qhd,kd->hqk", q, k[:, 0]) * q.shape[-1] ** -0.5
    return float(
        (torch.einsum("hqk,kd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v[:, 0]) - out).abs().max()
    )


@pytest.mark.parametrize("rule", [(5, 50), (0, 50)], ids=str)
@pytest.mark.parametrize("model", ["tiny-llama", "tiny-mistral", "tiny-qwen3"])
def test_tokens_are_those_of_generate(model, rule, engine):
    prompts = texts()
    llm = engine(asset(model), rule)
    assert answers(llm, prompts) == generated(asset(model), rule, prompts)
    assert held(llm) == 0


def test_qwen2(engine, tmp_path_factory):
    """Which has biases, and comes with no embedded model."""
    folder = tmp_path_factory.mktemp("qwen2")
    sizes = {"hidden_size": 256, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8}
    own = Qwen2Config(vocab_size=199, num_key_value_heads=4, initializer_range=0.3, **sizes)
    model = AutoModelForCausalLM.from_config(own)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.k_proj.bias)
    model.save_pretrained(folder)
    prompts = texts()
    mine = answers(engine(folder, (5, 50)), prompts)
    assert mine == generated(folder, (5, 50), prompts) != generated(folder, (5, 20), prompts)


def test_under_pressure_requests_are_evicted_and_read_again(engine):
    """Fewer blocks than the requests need at once; they arrive at random, and one is cancelled."""
    prompts = texts((700, 650, 600, 300, 500, 640))
    want = answers(engine(asset("tiny-llama"), (5, 50)), prompts, 60)
    llm = engine(asset("tiny-llama"), (5, 50), num_gpu_blocks_override=100, scheduler_reserve_full_isl=False)
    preempted = counted_preemptions(scheduler(llm))
    core, draw, found = llm.llm_engine, random.Random(1), {}
    waiting = list(range(len(prompts)))
    draw.shuffle(waiting)
    cancelled = waiting[2]
    for step in range(2000):
        if waiting and draw.random() < 0.3:
            request = waiting.pop()
            core.add_request(str(request), {"prompt_token_ids": prompts[request]}, asked(60))
        if step == 40:
            core.abort_request([str(cancelled)])
        for out in core.step():
            if out.finished:
                found[int(out.request_id)] = list(out.outputs[0].token_ids)
        if not waiting and not core.has_unfinished_requests():
            break
    assert preempted, "a control: nothing was evicted"
    assert found == {i: tokens for i, tokens in enumerate(want) if i in found} and len(found) >= len(prompts) - 1
    assert held(llm) == 0


def counted_preemptions(plan) -> list:
    found = []
    preempt = plan._preempt_request

    def counted(request, *rest, **more):
        found.append(request.request_id)
        return preempt(request, *rest, **more)

    plan._preempt_request = counted
    return found


def test_streaming_heads_hold_their_sinks_and_window(engine):
    """While a prompt of 1000 tokens is decoded: 32 blocks for a retrieval head's group, few for a streaming one's."""
    llm = engine(asset("tiny-llama"), (40, 50))
    core = llm.llm_engine
    core.add_request("a", {"prompt_token_ids": texts((1000,))[0]}, asked(20))
    for _ in range(12):
        core.step()
    groups = scheduler(llm).kv_cache_manager.coordinator.single_type_managers
    counts = {}
    for group in groups:
        (blocks,) = group.req_to_blocks.values()
        counts.setdefault(type(group).__name__, set()).add(sum(not block.is_null for block in blocks))
    assert counts == {"FullAttentionManager": {32}, "SinkWindowManager": {2 + 3}}
    while core.has_unfinished_requests():
        core.step()
    assert held(llm) == 0


@pytest.mark.parametrize(("sink", "recent"), [(5, 50), (40, 33), (64, 2), (65, 97)])
def test_a_hit_has_its_sinks_and_its_window(sink, recent):
    """Every set of cached blocks among eight of 32 tokens: the longest prefix of which nothing is missing."""
    from hf_longctx.serving.vllm.kv_cache import SinkWindowManager, SinkWindowSpec

    sizes = {"block_size": 32, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    spec = SinkWindowSpec(**sizes, sliding_window=recent, sink=sink)
    window = -(-(recent - 1) // 32)
    for cached in (frozenset(i for i in range(8) if bits >> i & 1) for bits in range(256)):
        whole = [n for n in range(9) if {*range(min(spec.sink_blocks, n)), *range(max(0, n - window), n)} <= cached]
        pool = SimpleNamespace(hash_block_size=32, null_block="null")
        pool.get_cached_block = lambda i, groups, cached=cached: [(i, group) for group in groups] * (i in cached)
        hit, tokens = SinkWindowManager.find_longest_cache_hit(range(8), 8 * 32, [1, 2], pool, spec, False, 32)
        assert tokens == whole[-1] * 32 and {len(blocks) for blocks in hit} == {whole[-1]}
        needed = {*range(min(spec.sink_blocks, whole[-1])), *range(max(0, whole[-1] - window), whole[-1])}
        assert all(hit[group][i] == (i, group + 1) for group in (0, 1) for i in needed)


@pytest.mark.parametrize("rule", [(5, 50), (70, 50), (0, 50)], ids=str)
def test_prefixes_are_shared(rule, engine):
    llm = engine(asset("tiny-llama"), rule, enable_prefix_caching=True)
    prompts = texts()
    want = generated(asset("tiny-llama"), rule, prompts)
    assert [answers(llm, prompts) for _ in range(2)] == [want, want]
    assert llm.generate([{"prompt_token_ids": prompts[3]}], asked(), use_tqdm=False)[0].num_cached_tokens == 672
    assert held(llm) == 0


@pytest.mark.parametrize("retained", [0, None, 64])  # vLLM's default, every block, some
@pytest.mark.parametrize("rule", [(5, 50), (70, 20)], ids=str)
def test_shared_prefixes_under_pressure(rule, retained, engine):
    """Many requests begin as others do, in a pool that holds a few: what is shared is evicted and read again."""
    draw = random.Random(2)
    documents = texts((600, 500, 610))
    prompts = [
        draw.choice(documents)[: draw.randrange(40, 600)] + texts((draw.randrange(1, 60),))[0] for _ in range(40)
    ]
    want = answers(engine(asset("tiny-llama"), rule), prompts, 30)
    sizes = {"num_gpu_blocks_override": 90, "scheduler_reserve_full_isl": False}
    sizes |= {"prefix_cache_retention_interval": retained}
    llm = engine(asset("tiny-llama"), rule, enable_prefix_caching=True, **sizes)
    preempted = counted_preemptions(scheduler(llm))
    outs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], asked(30), use_tqdm=False)
    assert [list(one.outputs[0].token_ids) for one in outs] == want
    cached = sum(one.num_cached_tokens for one in outs)
    assert preempted and cached > 1000, "a control"
    assert held(llm) == 0


def test_refusals_reach_the_user(engine):
    with pytest.raises(UnsupportedModelError, match="model.layers.0.self_attn.attn has a KV cache of bfloat16"):
        engine(asset("tiny-llama"), (5, 50), kv_cache_dtype="bfloat16")
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM, MistralForCausalLM"):
        engine(asset("tiny-llama"), (5, 50), hf_overrides={"architectures": ["GraniteForCausalLM"]})


def test_auto_is_what_the_folder_says(engine, tmp_path, monkeypatch):
    """Its config.json here, as ``save_pretrained`` of a patched model writes it; there is a shipped config as well."""
    folder = tmp_path / "model"
    shutil.copytree(asset("tiny-llama"), folder)
    own = json.loads((folder / "config.json").read_text())
    own["longctx"] = LongCtxConfig.from_dict(config(folder, (7, 40), ROLES)).to_dict()
    (folder / "config.json").write_text(json.dumps(own))
    llm = engine(folder, "auto")
    groups = scheduler(llm).kv_cache_config.kv_cache_groups
    assert {(one.kv_cache_spec.sink, one.kv_cache_spec.sliding_window) for one in groups[1:]} == {(7, 40)}
    prompts = texts()
    assert answers(llm, prompts) == generated(folder, (7, 40), prompts)


def test_without_the_variable_vllm_is_its_own(engine):
    llm = engine(asset("tiny-llama"), None)
    assert type(scheduler(llm).kv_cache_config.kv_cache_groups[0].kv_cache_spec).__name__ == "FullAttentionSpec"
    assert len(scheduler(llm).kv_cache_config.kv_cache_groups) == 1
