"""Find which KV heads of an embedded model need the context, by ablation: ``python ablate.py MODEL --out NAME.yaml``.

First one KV head streams at a time. Then greedy elimination: of the heads that still keep every token, the one whose
loss changes the negative log-likelihood of the answers least becomes a streaming head; its score is its place in that
order. Heads are ranked on one set of texts and the exact-match curve is measured on another.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from transformers import AutoModelForCausalLM

from hf_longctx import LongCtxConfig, patched
from hf_longctx.tasks.tiny_language import Filler, exam

SINK, RECENT = 4, 64


def texts(seed: int, rows: int, length: int, notes: int):
    ids, where = exam(np.random.default_rng([seed, length, notes]), Filler(), rows, length, notes)
    return torch.from_numpy(ids), torch.from_numpy(where)


@torch.no_grad()
def measure(model, ids: torch.Tensor, where: torch.Tensor) -> tuple[float, float]:
    """(negative log-likelihood per answer token, exact match of whole answers)."""
    losses, hits = [], []
    for row, places in zip(ids, where, strict=True):
        logits = model(input_ids=row[None], use_cache=False).logits[0, places - 1].float()  # [notes, 4, vocab]
        answers = row[places]
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten()).item())
        hits.append((logits.argmax(-1) == answers).all(-1).float().mean().item())
    return sum(losses) / len(losses), sum(hits) / len(hits)


def config_of(model, roles: list[list[str]]) -> dict:
    return {
        "model": LongCtxConfig.describe(model.config),
        "heads": {"roles": ["".join(layer) for layer in roles]},
        "stores": {"streaming": {"store": "sink_recent", "sink": SINK, "recent": RECENT}},
    }


def with_roles(model, roles, ids, where) -> tuple[float, float]:
    with patched(model, config_of(model, roles)):
        return measure(model, ids, where)


def one_by_one(model, length: int, rows: int, notes: int) -> list[list[float]]:
    """Exact match ``[layers][KV heads]`` when one KV head streams and all others keep every token."""
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    judge = texts(2, 2 * rows, length, notes)
    alone = [[0.0] * heads for _ in range(layers)]
    for layer in range(layers):
        for head in range(heads):
            roles = [["R"] * heads for _ in range(layers)]
            roles[layer][head] = "S"
            alone[layer][head] = round(with_roles(model, roles, *judge)[1], 4)
    return alone


def eliminate(model, length: int, rows: int, notes: int) -> tuple[list[list[float]], list[dict]]:
    """Scores ``[layers][KV heads]`` in 0..1, and the curve measured on texts that the ranking did not see."""
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    rank, judge = texts(1, rows, length, notes), texts(2, 2 * rows, length, notes)
    roles = [["R"] * heads for _ in range(layers)]
    scores = [[0.0] * heads for _ in range(layers)]
    curve = []
    for step in range(layers * heads):
        harm = {}
        for layer, head in np.argwhere(np.array(roles) == "R").tolist():
            roles[layer][head] = "S"
            harm[layer, head] = with_roles(model, roles, *rank)[0]
            roles[layer][head] = "R"
        layer, head = min(harm, key=harm.get)
        roles[layer][head] = "S"
        scores[layer][head] = round((step + 1) / (layers * heads), 4)
        loss, exact = with_roles(model, roles, *judge)
        left = sum(role == "R" for one in roles for role in one)
        curve.append({"retrieval_heads": left, "nll": round(loss, 4), "exact_match": round(exact, 4)})
        sys.stderr.write(f"layer {layer} head {head} streams: {curve[-1]}\n")
    return scores, curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--id", required=True, help="name of the checkpoint in the config's ids")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--notes", type=int, default=16)
    parser.add_argument("--fraction", type=float, default=0.25)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    dense = measure(model, *texts(2, 2 * args.rows, args.length, args.notes))
    alone = one_by_one(model, args.length, args.rows, args.notes)
    scores, curve = eliminate(model, args.length, args.rows, args.notes)
    config = config_of(model, [["R"]])
    config["model"]["ids"] = [args.id]
    config["heads"] = {
        "source": {"method": "ablation", "from": "examples/train_tiny/ablate.py", "licence": "Apache-2.0"},
        "scores": scores,
        "retrieval_fraction": args.fraction,
        "confidence": "measured",
        "measured": {
            "method": f"greedy elimination by answer likelihood, {args.notes} notes in {args.length} tokens",
            "seed": 1,
            "dense": {"nll": round(dense[0], 4), "exact_match": round(dense[1], 4)},
            "exact_match_of_one_streaming": alone,
            "curve": curve,
        },
    }
    LongCtxConfig.from_dict(config)
    args.out.write_text(yaml.safe_dump(config, sort_keys=False, default_flow_style=None, width=120))


if __name__ == "__main__":
    main()
