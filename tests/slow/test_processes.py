"""Weights that are elsewhere: offloaded to disk by accelerate, or spread over two processes by tensor parallelism.

Both give the tokens of one ordinary process. torchrun runs this file as a script, once per rank (see ``worker``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny import FAMILIES, config_for, left_padded, tiny_config
from transformers import AutoModelForCausalLM

from hf_longctx import LongCtxCache, LongCtxConfig, patch_model, report

pytestmark = pytest.mark.slow

NEW = 10
MORE = {"qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}}
# Rules of a program's own plan, by which a Llama computes attention whole on every rank.
OWN = {f"model.layers.*.self_attn.{name}_proj": "colwise_gather_output" for name in "qkv"}
OWN |= {"model.layers.*.self_attn.o_proj": "rowwise_split_input"}
RANKS = 2
KV_HEADS, LAYERS = 4, 3
ROLES = {
    "all retrieval": ["RRRR"] * LAYERS,
    "all streaming": ["SSSS"] * LAYERS,
    "mixed, alike on both ranks": ["RSRS", "SRRS", "SSSS"],
    "mixed, unlike": ["RRSS", "SSSR", "RSSS"],
}
SCORES = [[0.9, 0.8, 0.1, 0.2], [0.7, 0.6, 0.5, 0.4], [0.1, 0.2, 0.9, 0.8]]
SHARES = {"unbalanced": 1, "balance 2": 2}


def checkpoint(family: str, folder: Path) -> Path:
    """A tiny random model whose vocabulary can be cut in two."""
    torch.manual_seed(0)
    config = tiny_config(family, kv_heads=KV_HEADS, layers=LAYERS, **MORE.get(family, {}))
    config.vocab_size, config.eos_token_id = 96, None
    AutoModelForCausalLM.from_config(config, dtype=torch.float64).save_pretrained(folder)
    return folder


def load(folder: Path, **kwargs):
    """In float64, so that sums in another order give the same tokens."""
    kwargs |= {"attn_implementation": "sdpa", "experts_implementation": "eager"}  # grouped products know no float64
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **kwargs).eval()


def configs(model) -> dict[str, LongCtxConfig]:
    """Configs of every kind of roles; those by scores differ by ``balance`` alone."""
    found = {name: config_for(model, roles) for name, roles in ROLES.items()}
    for name, balance in SHARES.items():
        by_scores = {"scores": SCORES, "retrieval_fraction": 0.5, "balance": balance, "confidence": "measured"}
        found[name] = config_for(model).override(heads=by_scores)
    return found


def answers(model) -> list[list[int]]:
    """Tokens of a left-padded batch, of beams, and of a prompt read in chunks."""
    torch.manual_seed(1)
    ids, mask = left_padded([50, 9, 31], vocab=96)
    asked = [{}, {"num_beams": 3}, {"prefill_chunk_size": 16, "cache_implementation": "dynamic"}]
    outs = [model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, **more) for more in asked]
    return [row.tolist() for out in outs for row in out[:, -NEW:]]


@torch.no_grad()
def held(model) -> dict:
    """What the cache of one forward holds: its type, its bytes, its roles, and the KV heads it has tensors for."""
    cache = model(torch.arange(3, 73)[None]).past_key_values
    heads = [
        {store.heads.role: one.k.shape[1] for store in layer.stores for one in store.segments.values()}
        for layer in cache.layers
    ]
    told = report(model)
    return {
        "cache": type(cache).__name__,
        "nbytes": cache.nbytes,
        "nbytes_dense": cache.nbytes_dense,
        "roles": [layer.plan.letters for layer in cache.layers],
        "heads": heads,
        "report": [told.kv_heads, told.retrieval_heads],
    }


def everything(model) -> dict:
    """Tokens of the plain model, and tokens and cache of the patched one for every config."""
    seen = {"plain": {"tokens": answers(model)}}
    for name, config in configs(model).items():
        patch_model(model, config)
        seen[name] = {"tokens": answers(model), **held(model)}
    return seen


# Offload to disk.


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_on_disk_give_the_same_tokens(family, tmp_path):
    folder = checkpoint(family, tmp_path / "model")
    want = everything(load(folder))
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i else "cpu" for i in range(LAYERS)}
    model = load(folder, device_map=places, offload_folder=tmp_path / "offload")
    assert model.model.layers[1].self_attn.k_proj.weight.device.type == "meta", "nothing was offloaded"
    got = everything(model)
    assert got == want
    assert got["all retrieval"]["tokens"] == got["plain"]["tokens"]
    assert got["mixed, unlike"]["tokens"] != got["plain"]["tokens"], "the roles must matter, or this shows nothing"
    assert isinstance(model(torch.arange(3, 9)[None]).past_key_values, LongCtxCache)


# Tensor parallelism.


def parallel(folder: Path) -> dict:
    """The arguments by which this version of Transformers spreads a model over the ranks."""
    from transformers.distributed import DistributedConfig

    own = folder / "plan.json"
    plan = json.loads(own.read_text()) if own.exists() else "auto"
    if "tp_plan" in getattr(DistributedConfig, "__dataclass_fields__", {}):
        return {"distributed_config": DistributedConfig(tp_plan=plan)}
    return {"tp_plan": plan}


def worker(folder: Path) -> None:
    """One rank: load, run, and write what it saw."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    seen = everything(load(folder / "model", **parallel(folder)))
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run_ranks(folder: Path) -> list[dict]:
    """What every rank saw."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command += [__file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
def test_two_ranks_give_the_tokens_of_one_process(family, tmp_path):
    model = load(checkpoint(family, tmp_path / "model"))
    want, ranks = everything(model), run_ranks(tmp_path)
    half = KV_HEADS // RANKS
    assert {name: seen["tokens"] for name, seen in want.items()} == {n: seen["tokens"] for n, seen in ranks[0].items()}
    for name, one in want.items():
        parts = [rank[name] for rank in ranks]
        assert all(part["tokens"] == one["tokens"] for part in parts), name
        if name == "plain":
            continue
        assert {part["cache"] for part in parts} == {"LongCtxCache"}
        for what in ("nbytes", "nbytes_dense"):
            assert sum(part[what] for part in parts) == one[what], f"{name}: each rank keeps its own heads only"
        assert [sum(numbers) for numbers in zip(*(part["report"] for part in parts), strict=True)] == one["report"]
        for rank, part in enumerate(parts):
            assert part["roles"] == [roles[rank * half : (rank + 1) * half] for roles in one["roles"]]
            letters = {"retrieval": "R", "streaming": "S"}
            counts = [{role: roles.count(x) for role, x in letters.items() if x in roles} for roles in part["roles"]]
            assert part["heads"] == counts
    assert want["all retrieval"]["tokens"] == want["plain"]["tokens"]
    assert want["mixed, unlike"]["tokens"] != want["plain"]["tokens"]

    def retrieval_heads(name: str) -> list[list[int]]:
        return [[roles.count("R") for roles in rank[name]["roles"]] for rank in ranks]

    assert retrieval_heads("balance 2")[0] == retrieval_heads("balance 2")[1]
    for unlike in ("unbalanced", "mixed, unlike"):
        assert retrieval_heads(unlike)[0] != retrieval_heads(unlike)[1]


@pytest.mark.parametrize(("family", "plan"), [("olmo2", None), ("phi3", None), ("llama", OWN)])
def test_a_rank_whose_keys_are_gathered_keeps_all_heads(family, plan, tmp_path):
    """Norms over all heads, one projection for q, k and v, or a plan of one's own: every rank has attention whole."""
    if plan is not None:
        (tmp_path / "plan.json").write_text(json.dumps(plan))
    model = load(checkpoint(family, tmp_path / "model"))
    want, ranks = everything(model), run_ranks(tmp_path)
    assert ranks == [want] * RANKS
    assert want["all retrieval"]["tokens"] == want["plain"]["tokens"]
    assert want["mixed, unlike"]["tokens"] != want["plain"]["tokens"]


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
