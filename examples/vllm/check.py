"""Does vLLM with the plugin give the tokens of hf_longctx's own ``generate()``, and in how many bytes?

In an environment with hf_longctx and its Transformers: ``python check.py expected.json --expect``. Then in vLLM's
environment, with hf_longctx installed: ``python check.py expected.json``. Ten requests, some KV heads retrieval heads,
40 tokens each, prompts read in chunks of 512; every run is a process of its own. Controls: vLLM without the plugin, and
a window of 20 tokens in place of 50, must not give the same tokens. The exit status is 1 where something is otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

LENGTHS = (72, 130, 300, 513, 700, 1024, 1500, 2048, 2500, 2995)  # tokens of the prompts
NEW = 40
CHUNK = 512
SINK = 5
RECENT = 50
NARROW = 20  # of the control


@dataclass(frozen=True)
class Run:
    """One run of vLLM.

    Attributes:
        name: what the table calls it.
        expected: whose tokens it is compared with: ``dense`` or a number of sinks.
        window: (sink, recent) of its streaming heads; None: without the plugin.
        equal: whether every request must be equal; where not, it is a control, and some request must differ.
    """

    name: str
    expected: str
    window: tuple[int, int] | None
    equal: bool


RUNS = (
    Run("vLLM, against generate() unpatched", "dense", None, True),
    Run("vLLM, against the patched model (control)", str(SINK), None, False),
    Run(f"plugin, {SINK} sinks", str(SINK), (SINK, RECENT), True),
    Run(f"plugin, {SINK} sinks, window {NARROW} (control)", str(SINK), (SINK, NARROW), False),
    Run("plugin, no sinks", "0", (0, RECENT), True),
    Run("plugin, no sinks, against sinks (control)", str(SINK), (0, RECENT), False),
)


def config(described: dict[str, Any], sink: int, recent: int) -> dict[str, Any]:
    """A config with roles mixed in most layers, about a third of the heads retrieval."""
    width = described["num_key_value_heads"]
    layers = range(described["num_hidden_layers"])
    roles = ["".join("RSS"[(layer + head * (1 + layer % 2)) % 3] for head in range(width)) for layer in layers]
    streaming = {"store": "sink_recent", "sink": sink, "recent": recent}
    return {"model": described, "heads": {"roles": roles}, "stores": {"streaming": streaming}}


def expect(name: str, most: int) -> dict[str, Any]:
    """Prompts of at most so many tokens, and the tokens of ``generate()``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_longctx import LongCtxConfig, patched
    from hf_longctx.assets import embedded
    from hf_longctx.tasks import task_from
    from hf_longctx.tasks.language import language_for

    folder = embedded(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    language = language_for(AutoTokenizer.from_pretrained(folder))
    samples = [task_from("needle").make(language, length, seed=length) for length in LENGTHS if length <= most]
    prompts = [[*map(int, one.context), *map(int, one.questions[0].prompt)] for one in samples]

    def tokens() -> list[list[int]]:
        answers = (model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False) for ids in prompts)
        return [answer[0, -NEW:].tolist() for answer in answers]

    described = LongCtxConfig.describe(model.config)
    found = {"folder": str(folder), "model": described, "prompts": prompts, "tokens": {"dense": tokens()}}
    for sink in (SINK, 0):
        with patched(model, config(described, sink, RECENT)):
            found["tokens"][str(sink)] = tokens()
    return found


def generated(asked: dict[str, Any]) -> dict[str, Any]:
    """Tokens of vLLM in this process, seconds for all, and the most bytes of blocks that were in use at once."""
    from vllm import LLM, SamplingParams

    limits = {"max_num_batched_tokens": CHUNK, "max_num_seqs": len(LENGTHS), "max_model_len": max(LENGTHS) + NEW}
    how = {"dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False, "generation_config": "vllm"}
    llm = LLM(asked["folder"], **limits, **how, skip_tokenizer_init=True, kv_cache_memory_bytes=1 << 30)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    pool, cache = scheduler.kv_cache_manager.block_pool, scheduler.kv_cache_config
    free, take, most = pool.get_num_free_blocks(), pool.get_new_blocks, 0

    def counted(*given: Any) -> Any:
        nonlocal most
        blocks = take(*given)
        most = max(most, free - pool.get_num_free_blocks())
        return blocks

    pool.get_new_blocks = counted
    begun = time.perf_counter()
    sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    answers = llm.generate([{"prompt_token_ids": ids} for ids in asked["prompts"]], sampling, use_tqdm=False)
    block = cache.kv_cache_tensors[0].size // cache.num_blocks  # one allocation, in which groups overlay each other
    seconds, left = time.perf_counter() - begun, free - pool.get_num_free_blocks()
    tokens = [list(one.outputs[0].token_ids) for one in answers]
    return {"tokens": tokens, "bytes": most * block, "left": left, "seconds": seconds}


def run(asked: dict[str, Any], one: Run, folder: Path) -> dict[str, Any]:
    """What `generated` gives in a new process."""
    given, out, yaml = folder / "asked.json", folder / "out.json", folder / "longctx.yaml"
    given.write_text(json.dumps(asked))
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_LONGCTX_VLLM": ""}
    if one.window is not None:
        yaml.write_text(json.dumps(config(asked["model"], *one.window)))  # which is YAML
        own["HF_LONGCTX_VLLM"] = str(yaml)
    command = [sys.executable, __file__, str(given), "--out", str(out)]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{one.name}: vLLM failed.\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return json.loads(out.read_text())


def check(asked: dict[str, Any]) -> bool:
    """Run everything and print the table; whether all is as it must be."""
    table = Table("run", "requests equal", "first different token", "peak blocks, MB", "s")
    right = True
    with tempfile.TemporaryDirectory() as folder:
        for one in RUNS:
            found = run(asked, one, Path(folder))
            pairs = list(zip(found["tokens"], asked["tokens"][one.expected], strict=True))
            equal = sum(mine == theirs for mine, theirs in pairs)
            right &= (equal == len(pairs)) == one.equal and found["left"] == 0
            first = [next(i for i in range(NEW) if mine[i] != theirs[i]) for mine, theirs in pairs if mine != theirs]
            figures = f"{found['bytes'] / 1e6:.2f}", f"{found['seconds']:.1f}"
            table.add_row(one.name, f"{equal} of {len(pairs)}", str(min(first, default="-")), *figures)
    Console(width=110).print(table)
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the expected tokens, JSON")
    parser.add_argument("--expect", action="store_true", help="write the file, in the environment of hf_longctx")
    parser.add_argument("--model", default="hf-longctx/tiny-llama", help="with --expect: folder, hub id or embedded")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--most", type=int, default=max(LENGTHS), help="with --expect: leave out longer prompts")
    given = parser.parse_args()
    if given.expect:
        given.file.write_text(json.dumps(expect(given.model, given.most)))
        return
    asked = json.loads(given.file.read_text())
    if given.out:
        given.out.write_text(json.dumps(generated(asked)))
    elif not check(asked):
        raise SystemExit("Not all is as it must be.")


if __name__ == "__main__":
    main()
