"""Does the mean of the dropped tokens help? ``python compare_stores.py --out results.json``.

Every embedded model reads texts dense and with streaming heads, by the stores ``sink_recent`` and
``sink_recent_compensated``, at several windows: the KL of the next token from the dense model's over all positions, and
the exact match of the answers. The streaming heads are those of the shipped config, or all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers
from ablate import SINK, texts
from transformers import AutoModelForCausalLM

from hf_longctx import patched
from hf_longctx.assets import asset, assets
from hf_longctx.config.config import load_shipped
from hf_longctx.evaluate.measures import next_token

WINDOWS = (16, 32, 64, 128)
STORES = ("sink_recent", "sink_recent_compensated")


@torch.no_grad()
def logits_of(model, ids: torch.Tensor) -> list[torch.Tensor]:
    """Of every text, ``[T, vocab]``."""
    return [model(input_ids=row[None], use_cache=False).logits[0] for row in ids]


def exact(logits: list[torch.Tensor], ids: torch.Tensor, where: torch.Tensor) -> float:
    """Share of the answers whose every token is the most likely one."""
    right = [one[at - 1].argmax(-1) == row[at] for one, row, at in zip(logits, ids, where, strict=True)]
    return torch.stack(right).all(-1).float().mean().item()


def compare(name: str, length: int, rows: int, notes: int) -> dict:
    """``{heads: {store: {window: {kl, agreement, exact_match}}}}`` of one model, and the dense model's exact match."""
    model = AutoModelForCausalLM.from_pretrained(asset(name)).eval()
    ids, where = texts(4, rows, length, notes)
    dense, shipped = logits_of(model, ids), load_shipped(name)
    found: dict = {"dense": {"exact_match": round(exact(dense, ids, where), 4)}}
    letters = len(shipped.roles()[0])
    for heads, roles in (("shipped", list(shipped.roles())), ("all stream", ["S" * letters] * len(shipped.roles()))):
        for store in STORES:
            for recent in WINDOWS:
                given = {"streaming": {"store": store, "sink": SINK, "recent": recent}}
                with patched(model, shipped, heads={"roles": roles}, stores=given):
                    logits = logits_of(model, ids)
                far = next_token(torch.cat(dense), torch.cat(logits))
                row = {"kl": far.kl, "agreement": far.agreement, "exact_match": round(exact(logits, ids, where), 4)}
                found.setdefault(heads, {}).setdefault(store, {})[recent] = row
                sys.stderr.write(f"{name}, {heads}, {store} {recent}: KL {far.kl:.4f}\n")
    return found


def main(argv: list[str] | None = None) -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--models", nargs="+", default=list(assets()), choices=assets())
    ask.add_argument("--length", type=int, default=2048, help="tokens of a text")
    ask.add_argument("--rows", type=int, default=4, help="texts")
    ask.add_argument("--notes", type=int, default=16, help="questions about each")
    ask.add_argument("--threads", type=int, default=1)
    ask.add_argument("--out", type=Path, required=True)
    args = ask.parse_args(argv)
    torch.set_num_threads(args.threads)
    results = {name: compare(name, args.length, args.rows, args.notes) for name in args.models}
    settings = {"length": args.length, "rows": args.rows, "notes": args.notes, "sink": SINK}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    args.out.write_text(json.dumps({**settings, **versions, "models": results}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
