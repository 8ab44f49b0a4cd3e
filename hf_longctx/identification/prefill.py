"""Which prefill pattern, with which budget, every query head gets: MInference's offline search (arXiv:2407.02490)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..cache.fingerprint import weights_digest
from ..config.config import LongCtxConfig
from ..config.find import resolve
from ..config.words import build, convert, dump, wrong
from ..errors import ConfigError
from ..io.atomic import written_whole
from ..io.work import check_settings, work_file
from ..kernels import base as kernels
from ..layout.blocks import BlockList
from ..layout.scores import Scores
from ..model.attention_mass import weights
from ..model.family import find_family
from ..model.modules import language_model, unwrap
from ..model.observe import observe
from ..model.patch import patched
from ..prefill.base import BLOCK, PatternSpec, select
from ..prefill.block_topk import BlockTopk
from ..prefill.vertical_slash import VerticalSlash
from ..tasks.documents import documents_for
from ..tasks.haystack import TextHaystack
from .heads import SEED, all_retrieval, probe_of
from .methods.base import HeadProbe, modes_kept

TABLE = "searched"
FILE = "identify_prefill.json"
# tokens: read by default, and the fewest that a pattern runs on
LENGTH = 32768
SHORTEST = 128
QUERY_BLOCKS = 32  # of the prompt, drawn: the queries whose attention is measured
# Budgets of the default candidates, as shares of the tokens that a cost stands for. Distances can be dear, each leads
# into two blocks of every query block: a head that looks for single keys needs as few of them as possible.
VERTICAL = (1 / 16, 1 / 4, 1 / 2, 3 / 4)
SLASH = (1 / 1024, 1 / 256, 1 / 64, 1 / 16, 1 / 4)
TOP_K = (1 / 8, 1 / 4, 3 / 8, 1 / 2)

logger = logging.getLogger(__name__)


def identify_prefill(
    model: nn.Module,
    tokenizer: Any,
    *,
    config: str | os.PathLike | Mapping[str, Any] | LongCtxConfig = "auto",
    text: str | os.PathLike | None = None,
    length: int | None = None,
    cost: float = 0.2,
    candidates: Sequence[PatternSpec | Mapping[str, Any]] | None = None,
    seed: int = 0,
    work: str | os.PathLike | None = None,
    progress: bool = False,
) -> LongCtxConfig:
    """Find the prefill pattern of every query head that keeps the most attention mass at a given cost.

    One dense forward pass shows every layer's queries and keys. Each candidate chooses its keys for every head; what it
    keeps is the causal softmax weight on them, a mean over the queries of 32 query blocks drawn from the prompt (of all
    where there are fewer). A head gets the candidate that keeps the most among those within the cost, of equal ones the
    cheaper; where none is within it, the cheapest. The model is patched while it is measured, so no other thread may
    use it meanwhile, and left as it was. Paper: MInference, arXiv:2407.02490.

    Args:
        model: a loaded causal language model of a family in ``patches/``, on any device, patched or not.
        tokenizer: its tokenizer.
        config: what the patterns are added to, as for ``patch_model``; its heads stay as they are.
        text: a file or folder to read the prompt from, instead of a document with facts and questions.
        length: tokens of the prompt; default 32768, or less where the model or the text has less.
        cost: the largest density of a head: key blocks read over causal key blocks.
        candidates: patterns, as mappings with their fields or as objects; default: 20 splits of ``vertical_slash`` and
            4 sizes of ``block_topk``, in proportion to ``cost`` and ``length``.
        seed: random seed.
        work: a folder where every finished layer is saved, and which an interrupted search goes on from.
        progress: show how far it is on stderr: a bar, or where that is no terminal a line now and then.

    Returns:
        ``config`` with the table "searched" in use; its source says what was measured. Write it with ``to_yaml``.

    Raises:
        ConfigError: no config fits, an argument out of bounds, a candidate that is no sparse pattern, an unreadable or
            too short text, another model's tokenizer, or a work folder of another search.
        UnsupportedModelError: the family is not in ``patches/``, or the model has no LM head.
        UnsupportedModeError: the model is spread over processes by tensor parallelism, or the config's kernel computes
            no pattern.
    """
    convert(cost, float, "cost", {"above": 0.0, "max": 1.0})
    convert(length, int | None, "length", {"min": SHORTEST, "max": 2**24, "unit": "tokens"})
    convert(seed, int, "seed", SEED)
    specs = None if candidates is None else _given(candidates)
    hf_config = language_model(model).config
    find_family(hf_config.model_type)
    wanted = resolve(config, hf_config)
    kernels.require(wanted.kernel, BlockList, "a prefill pattern")
    with torch.no_grad(), modes_kept(model), patched(model, all_retrieval(model)):
        model.eval()
        documents = documents_for(tokenizer, text)
        probe = probe_of(model, tokenizer, documents, seed, None if work is None else Path(work), progress)
        ids = _prompt(probe, tokenizer, length)
        specs = default_candidates(len(ids), cost) if specs is None else specs
        search = Search(probe, ids, specs, cost)
        search.run()
    return _config(wanted, search)


def default_candidates(length: int, cost: float) -> tuple[PatternSpec, ...]:
    """The patterns tried for a prompt of ``length`` tokens: budgets are shares of ``cost * length`` tokens."""
    tokens = cost * length
    lines = [VerticalSlash(max(1, round(v * tokens)), max(1, round(s * tokens))) for v in VERTICAL for s in SLASH]
    blocks = [BlockTopk(max(1, round(share * tokens / BLOCK))) for share in TOP_K]
    return tuple(dict.fromkeys([*lines, *blocks]))


def measure(
    candidates: Sequence[PatternSpec], q: Tensor, k: Tensor, scores: Scores, blocks: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """(share of its attention that a query head keeps, its density): float64 ``[candidates, H]``, on the CPU.

    Args:
        q: rotated queries ``[1, H, T, D]``.
        k: rotated keys ``[1, H_kv, T, D]`` of the same tokens.
        blocks: the query blocks over whose queries the first is a mean; the density is that of all of them.
    """
    total = q.shape[2]
    mass = []
    queries = 0
    for block in blocks:
        positions = torch.arange(block * BLOCK, min((block + 1) * BLOCK, total), device=q.device)
        mass.append(sum(piece.sum(1) for _, piece in weights(q, k, scores, positions)))  # [H, T] per key
        queries += len(positions)
    kept = []
    density = []
    for spec in candidates:
        lists = select((spec,) * q.shape[1], q, k, scores.scale)
        share = torch.zeros(q.shape[1], dtype=torch.float64)
        for block, of_keys in zip(blocks, mass, strict=True):
            # What the last query of a block reads is all that the block reads; the others have no weight on later keys.
            last = min((block + 1) * BLOCK, total) - 1
            share += (of_keys * lists.visible(last, last + 1)[0, :, 0]).sum(-1).double().cpu()
        kept.append(share / queries)
        density.append(lists.reads_by_head.double().cpu() * q.shape[1] / lists.causal)
    return torch.stack(kept), torch.stack(density)


def choose(kept: Tensor, density: Tensor, cost: float) -> list[int]:
    """The best candidate of every head, of ``[candidates, H]`` both: within ``cost``, else the cheapest."""
    chosen = []
    for mass, price in zip(kept.T.tolist(), density.T.tolist(), strict=True):
        fits = [i for i, one in enumerate(price) if one <= cost]
        best = [(-mass[i], price[i], i) for i in fits]
        chosen.append(min(best or [(one, -mass[i], i) for i, one in enumerate(price)])[2])
    return chosen


@dataclass
class Search:
    """One search, layer by layer.

    Attributes:
        probe: the model, patched with all heads retrieval.
        ids: the prompt, ``[T]``.
        candidates: what is tried.
        cost: the largest density of a head.
        blocks: query blocks whose attention is measured, ascending.
        layers: by layer index, for every query head the "choice" (a candidate's index), its "mass" and its "density".
    """

    probe: HeadProbe
    ids: np.ndarray
    candidates: Sequence[PatternSpec]
    cost: float
    blocks: list[int] = field(init=False)
    layers: dict[int, dict[str, list]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        every = -(-len(self.ids) // BLOCK)
        drawn = self.probe.rng(10).choice(every, size=min(every, QUERY_BLOCKS), replace=False)
        self.blocks = np.sort(drawn).tolist()

    def run(self) -> None:
        """Measure the layers that no earlier run has left in the work folder, and leave each of them there."""
        probe = self.probe
        file = work_file(self.probe.work, FILE)
        settings = {} if file is None else self.settings()
        if file is not None and file.exists():
            self._go_on_from(file, settings)
        left = set(range(probe.layers)) - set(probe.windowed) - set(self.layers)
        if not left:
            return
        bar = probe.track("patterns", len(self.layers) + len(left), "layers", done=len(self.layers))

        def look(layer_idx: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, rows, compute) -> None:
            if layer_idx not in left:
                return
            self.layers[layer_idx] = self._layer(layer_idx, q, k, compute.scores)
            if file is not None:
                with written_whole(file) as unfinished:
                    unfinished.write_text(json.dumps({"settings": settings, "layers": self.layers}), "utf-8")
            bar.advance(saved=file is not None)

        with bar, observe(probe.model, look):
            language_model(probe.model)(probe.ids(self.ids), use_cache=False)

    def settings(self) -> dict[str, Any]:
        """What the saved layers depend on, plain data."""
        return {
            "candidates": [dump(spec, "pattern") for spec in self.candidates],
            "cost": self.cost,
            "length": len(self.ids),
            "seed": self.probe.seed,
            "query_blocks": self.blocks,
            "prompt": hashlib.sha256(self.ids.tobytes()).hexdigest()[:16],
            "model": weights_digest(unwrap(self.probe.model), complete=False),
            "dtype": str(self.probe.model.dtype),
        }

    def _layer(self, layer_idx: int, q: Tensor, k: Tensor, scores: Scores) -> dict[str, list]:
        kept, density = measure(self.candidates, q, k, scores, self.blocks)
        if not torch.isfinite(kept).all():
            raise ConfigError(
                f"identify_prefill: the attention weights of layer {layer_idx} are nan or inf with a model in "
                f"{self.probe.model.dtype}. Load the model in bfloat16 or float32."
            )
        choice = choose(kept, density, self.cost)
        at = (choice, range(len(choice)))
        return {"choice": choice, "mass": kept[at].tolist(), "density": density[at].tolist()}

    def _go_on_from(self, file: Path, settings: Mapping[str, Any]) -> None:
        try:
            saved = json.loads(file.read_text("utf-8"))
            check_settings(file, dict(saved["settings"]), settings)
            layers = {int(i): dict(one) for i, one in saved["layers"].items()}
            for one in layers.values():
                whole = all(len(one[name]) == self.probe.heads for name in ("choice", "mass", "density"))
                if not whole or not set(one["choice"]) <= set(range(len(self.candidates))):
                    raise ValueError("a layer is not whole")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"work: {file} is no state of identify_prefill ({error}). Remove it, or give another folder."
            ) from None
        self.layers = layers


def _given(candidates: Sequence[PatternSpec | Mapping[str, Any]]) -> tuple[PatternSpec, ...]:
    if isinstance(candidates, (str, Mapping)) or not isinstance(candidates, Sequence) or not candidates:
        raise wrong("candidates", candidates, "a list of patterns, e.g. [{'pattern': 'block_topk', 'top_k': 32}]")
    specs = []
    for i, one in enumerate(candidates):
        specs.append(build("prefill", one, "pattern", f"candidates[{i}]", "retrieval"))
        if specs[-1].reads_all:
            raise wrong(f"candidates[{i}]", one, "a sparse pattern: what reads everything keeps everything")
    return tuple(dict.fromkeys(specs))


def _prompt(probe: HeadProbe, tokenizer: Any, length: int | None) -> np.ndarray:
    """Token ids ``[T]``: a piece of the user's text, or a document that asks for its facts."""
    haystack = probe.documents.haystack
    bos = tokenizer.bos_token_id
    if not isinstance(haystack, TextHaystack):
        return probe.documents.draw(probe.rng(10, 0), probe.length(length, LENGTH)).ids
    first = np.asarray([] if bos is None else [bos], dtype=np.int64)
    has = len(first) + len(haystack.ids)
    tokens = probe.length(length, min(LENGTH, has))
    if not SHORTEST <= tokens <= has:
        raise ConfigError(f"text: it has {has} tokens, fewer than the prompt (length={max(tokens, SHORTEST)}).")
    return np.concatenate([first, haystack.sample(probe.rng(10, 0), tokens - len(first))])


def _config(wanted: LongCtxConfig, search: Search) -> LongCtxConfig:
    """``wanted`` with the table in use, and in its source what was measured."""
    probe = search.probe
    layers = search.layers
    used = sorted({choice for one in layers.values() for choice in one["choice"]})
    nothing = [0] * probe.heads  # of a layer with a window of its own, whose heads read no pattern
    rows = [[used.index(c) for c in layers[i]["choice"]] if i in layers else nothing for i in range(probe.layers)]
    mass, density = (np.array([one[name] for one in layers.values()]) for name in ("mass", "density"))
    over = int((density > search.cost).sum())
    source = {
        "method": "identify_prefill",
        "from": f"hf_longctx {version('hf-longctx')}",
        "paper": "arXiv:2407.02490",
        "text": "given" if isinstance(probe.documents.haystack, TextHaystack) else "facts and questions",
        "length": len(search.ids),
        "seed": probe.seed,
        "cost": search.cost,
        "candidates": len(search.candidates),
        "query_blocks": len(search.blocks),
        "mean_kept_mass": round(float(mass.mean()), 4),
        "mean_density": round(float(density.mean()), 4),
    }
    if over:
        source["over_cost"] = over
        source["note"] = (
            f"{over} of {density.size} query heads: no candidate was within the cost, they got the cheapest"
        )
        logger.warning("%s (cost %g, largest density %.3f)", source["note"], search.cost, density.max())
    data = wanted.to_dict()
    budgets = [dump(search.candidates[index], "pattern") for index in used]
    data["prefill"]["tables"][TABLE] = {"source": source, "budgets": budgets, "map": rows}
    data["prefill"]["retrieval"] = {"table": TABLE}
    return LongCtxConfig.from_dict(data)
