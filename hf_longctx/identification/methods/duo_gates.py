"""``duo_gates``: one trained gate per KV head, between reading the whole context and streaming."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, UnsupportedModeError
from ...io.processes import Processes
from ...io.work import work_file
from ...tasks.documents import Document
from ..gates import Gates, distance, frozen, load, save
from ..saved import depends_on
from .base import HeadProbe, Method

FILE = "duo_gates.safetensors"


@dataclass(frozen=True)
class DuoGates(Method):
    """Optimised gates of DuoAttention (arXiv:2410.10819): how little of the whole context each KV head can do with.

    A head's output is ``gate * retrieval + (1 - gate) * streaming``. Gates start at 1 and fall while the answers about
    a long document stay what they were. The loss is the squared difference of the final hidden states to the plain
    model's, where the answers' tokens are predicted, plus ``reg_weight`` times the gates. Both are means (over tokens
    and hidden dimensions, and over gates), as in the authors' code; the paper writes sums. The model stays frozen.

    On several processes (``accelerate launch``) each has the whole model and documents of its own, and the gradients
    are averaged. Only the main one reads and writes the work folder, but all are given one, or none.

    Attributes:
        steps: of AdamW.
        lr: its learning rate, after a warm-up over the first fifth of the steps and before a decay over the last one.
        reg_weight: weight of the gates in the loss: higher leaves fewer heads open.
        length: tokens of the longest documents; 32768, or less where the model was made for less.
        min_length: tokens of the shortest; 1024, or half of ``length`` where that is less.
        facts: facts a document has at most; None: as many as its kind has.
        documents_per_step: per process.
        gradient_checkpointing: keep one hidden state per layer instead of all activations, for a third more time.
        checkpoint_every: steps between two states saved in the work folder, from which the next run goes on.
    """

    paper = "arXiv:2410.10819"
    cases = (
        {"steps": 40, "length": 256, "gradient_checkpointing": False},
        {"steps": 3, "length": 256},
    )
    saves = True

    steps: int = field(default=2000, metadata={"min": 1, "max": 10**6, "unit": "steps"})
    lr: float = field(default=0.02, metadata={"above": 0.0, "max": 1.0})
    reg_weight: float = field(default=0.05, metadata={"min": 0.0, "max": 1e6})
    length: int | None = field(default=None, metadata={"min": 64, "max": 2**24, "unit": "tokens"})
    min_length: int | None = field(default=None, metadata={"min": 16, "max": 2**24, "unit": "tokens"})
    facts: int | None = field(default=None, metadata={"min": 1, "max": 1024, "unit": "facts"})
    documents_per_step: int = field(default=1, metadata={"min": 1, "max": 1024, "unit": "documents"})
    gradient_checkpointing: bool = True
    checkpoint_every: int = field(default=50, metadata={"min": 1, "max": 10**6, "unit": "steps"})

    def scores(self, probe: HeadProbe) -> Tensor:
        if torch.is_inference_mode_enabled():
            raise UnsupportedModeError("duo_gates trains, which torch.inference_mode() forbids. Call it outside of it.")
        ranks = Processes(probe.device)
        lengths = self.lengths(probe)
        gates = Gates(probe.layers, probe.kv_heads, probe.device)
        file = probe.work / FILE if probe.work is not None else None
        settings = self._settings(probe, lengths, ranks) if file is not None else {}
        if file is not None and (state := self._found(file, settings, ranks)) is not None:
            gates.go_on_from(state)
        done = len(gates.losses)
        bar = probe.track("gates", self.steps, "steps", done=done, shown=ranks.main)
        with frozen(probe.model, self.gradient_checkpointing), torch.enable_grad(), bar:
            for step in range(done, self.steps):
                grad, loss = self._gradient(probe, gates.values, step, lengths, ranks)
                gates.step(grad, loss, self.lr * self.warmth(step))
                due = (step + 1) % self.checkpoint_every == 0 or step + 1 == self.steps
                due = due and file is not None
                if due and ranks.main:
                    save(file, gates.state(), settings)
                bar.advance(saved=due)
        self._measure(probe, gates, lengths, ranks)
        return gates.values.detach().double().cpu()

    def lengths(self, probe: HeadProbe) -> tuple[int, int]:
        """(shortest, longest) documents in tokens.

        Raises:
            ConfigError: they do not fit the model, or each other.
        """
        longest = probe.length(self.length, 32768)
        shortest = self.min_length
        if shortest is None:
            shortest = min(1024, longest // 2)
        if shortest > longest:
            raise ConfigError(f"min_length: got {shortest} tokens, more than the longest documents have ({longest}).")
        return shortest, longest

    def warmth(self, step: int) -> float:
        """Share of ``lr`` in ``step``: up and down along a line, never below a tenth, as in the authors' code."""
        ramp = max(1, self.steps // 5)
        return max(0.1, min(1.0, (step + 1) / ramp, (self.steps - step) / ramp))

    def document(self, probe: HeadProbe, step: int, index: int, lengths: tuple[int, int]) -> Document:
        """Document ``index`` of all those that all processes read in ``step``, which have one length."""
        shortest, longest = lengths
        length = int(probe.rng(4, step).integers(shortest, longest + 1))
        return probe.documents.draw(probe.rng(4, step, 1 + index), length, self.facts)

    def _gradient(
        self, probe: HeadProbe, gates: Tensor, step: int, lengths: tuple[int, int], ranks: Processes
    ) -> tuple[Tensor, float]:
        """The loss's gradient and the distance to the plain model, averaged over all documents of all processes."""
        (grad,) = torch.autograd.grad(self.reg_weight * gates.mean(), gates)  # |gate| of gates in [0, 1]
        total = 0.0
        count = self.documents_per_step
        for index in range(ranks.rank * count, (ranks.rank + 1) * count):
            document = self.document(probe, step, index, lengths)
            places = torch.from_numpy(document.answers.ravel() - 1)  # where each token of an answer is predicted
            loss = distance(probe.model, gates, probe.ids(document.ids), places)
            grad = grad + torch.autograd.grad(loss, gates)[0] / count
            total += loss.item() / count
        told = ranks.mean(torch.cat([grad.flatten(), grad.new_tensor([total])]))
        total = told[-1].item()
        if not (math.isfinite(total) and bool(told.isfinite().all())):
            raise ConfigError(
                f"duo_gates: the loss of step {step} is nan or inf with a model in {probe.model.dtype}. Load the "
                "model in bfloat16 or float32."
            )
        return told[:-1].view_as(gates), total

    def _settings(self, probe: HeadProbe, lengths: tuple[int, int], ranks: Processes) -> dict[str, Any]:
        """What a saved state depends on, plain data."""
        return {
            **{name: getattr(self, name) for name in ("steps", "lr", "reg_weight", "facts")},
            "lengths": list(lengths),
            "documents_per_step": ranks.count * self.documents_per_step,
            **depends_on(probe, self.document(probe, 0, 0, lengths).ids),
        }

    def _found(self, file: Path, settings: dict[str, Any], ranks: Processes) -> dict[str, Tensor] | None:
        """The state in ``file``, read by the main process, because the others may not see its disk.

        The folder is made at once, because the first state may be hours away.

        Raises:
            ConfigError: the folder cannot be made, or the file is of another run.
        """
        found = None
        if ranks.main:
            try:
                found = load(work_file(file.parent, FILE), settings)
            except ConfigError as error:
                found = error
        found = ranks.share(found)
        if isinstance(found, ConfigError):
            raise found
        return found

    def _measure(self, probe: HeadProbe, gates: Gates, lengths: tuple[int, int], ranks: Processes) -> None:
        last = gates.losses[-max(1, self.steps // 10) :]
        mean = gates.values.mean().item()
        probe.measured |= {
            "lengths": list(lengths),
            "documents": self.steps * ranks.count * self.documents_per_step,
            "distillation_loss": round(sum(last) / len(last), 6),
            "regularisation_loss": round(self.reg_weight * mean, 6),
            "mean_gate": round(mean, 4),
        }
