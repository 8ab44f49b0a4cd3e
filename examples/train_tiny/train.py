"""Train an embedded tiny model: ``python train.py llama --out DIR`` (also qwen3, mistral).

Seeded and counted in steps: batch ``i`` depends on the seed and ``i`` alone, so a run that was stopped goes on from its
last checkpoint. About 18M tokens; telling keys apart comes abruptly, some 1500 steps in: do not give up before.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_longctx.tasks.tiny_language import BOS, END, PAD, VOCAB, Filler, batch, exam

SCHEDULE = [(64, 400), (128, 400), (256, 600), (512, 700), (1024, 900), (2048, 900), (4096, 500)]  # (length, steps)
TOKENS_PER_STEP = 4096
PEAK, WARMUP = 2e-3, 100


def new_model(family: str) -> torch.nn.Module:
    config = AutoConfig.for_model(
        family,
        vocab_size=len(VOCAB),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=BOS,
        eos_token_id=END,
        pad_token_id=PAD,
        **({"sliding_window": None} if family == "mistral" else {}),
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def new_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCAB)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token=".",
        padding_side="left",
        model_max_length=8192,
    )


def plan(scale: float) -> list[int]:
    return [length for length, steps in SCHEDULE for _ in range(round(steps * scale))]


def learning_rate(step: int, total: int) -> float:
    decay_from = total // 2
    if step < decay_from:
        return PEAK * min(1.0, (step + 1) / WARMUP)
    return PEAK * max(0.03, 1 - (step - decay_from) / (total - decay_from))


def step_loss(model, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weight = weight[:, 1:].flatten()
    return (losses * weight).sum() / weight.sum()


@torch.no_grad()
def exact_match(model, length: int, notes: int, queries: int, seed: int = 10_000) -> float:
    """Share of questions whose four answer tokens are all the greedy choice."""
    filler, rng = Filler(), np.random.default_rng([seed, length, notes])
    hits = []
    while len(hits) * notes < queries:
        ids, where = exam(rng, filler, 1, length, notes)
        ids, where = torch.from_numpy(ids), torch.from_numpy(where)
        best = model(input_ids=ids, use_cache=False).logits.argmax(-1)
        right = best[0, where[0] - 1] == ids[0, where[0]]
        hits.append(right.all(-1).float().mean().item())
    return sum(hits) / len(hits)


def train(family: str, out: Path, seed: int, scale: float, save_every: int, stop_at: int | None) -> torch.nn.Module:
    torch.manual_seed(seed)
    master = new_model(family)
    model = new_model(family).to(torch.bfloat16)
    decay = [p for p in master.parameters() if p.ndim > 1]
    rest = [p for p in master.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.98))
    checkpoint, first = out / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        master.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    lengths, filler, started = plan(scale), Filler(), time.time()
    last = min(stop_at or len(lengths), len(lengths))
    for step in range(first, last):
        rng = np.random.default_rng([seed, step])
        length = lengths[step]
        ids, weight = batch(rng, filler, TOKENS_PER_STEP // length, length, 0.45 if length >= 256 else 0.0)
        with torch.no_grad():
            for low, high in zip(model.parameters(), master.parameters(), strict=True):
                low.copy_(high)
                low.grad = None
        loss = step_loss(model, torch.from_numpy(ids), torch.from_numpy(weight))
        loss.backward()
        for low, high in zip(model.parameters(), master.parameters(), strict=True):
            high.grad = low.grad.float()
        torch.nn.utils.clip_grad_norm_(master.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(lengths))
        optimizer.step()
        done = step + 1
        if done % save_every == 0 or done == last:
            state = {"model": master.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            torch.save(state, out / "checkpoint.tmp")
            (out / "checkpoint.tmp").rename(checkpoint)
            row = {
                "step": done,
                "length": length,
                "loss": round(loss.item(), 4),
                "seconds": round(time.time() - started),
            }
            row["exact_match"] = {str(n): exact_match(master, max(n, 256), 8, 64) for n in (256, length)}
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            sys.stderr.write(json.dumps(row) + "\n")
    return master


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=["llama", "qwen3", "mistral"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of steps")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--stop-at", type=int, help="end after so many steps; the learning rate does not know of it")
    parser.add_argument("--questions", type=int, default=256, help="per entry of the final table; 0 for no table")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = train(args.family, args.out, args.seed, args.scale, args.save_every, args.stop_at)
    model.save_pretrained(args.out / "model")
    new_tokenizer().save_pretrained(args.out / "model")
    sizes = [(n, k) for n in (512, 1024, 2048, 4096) for k in (8, 16) if args.questions]
    table = {
        f"{length} tokens, {notes} notes": exact_match(model, length, notes, args.questions) for length, notes in sizes
    }
    report = {
        "family": args.family,
        "seed": args.seed,
        "schedule": SCHEDULE,
        "scale": args.scale,
        "steps": args.stop_at or len(plan(args.scale)),
        "exact_match": table,
    }
    (args.out / "model" / "training.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
