"""What a patched model remembers about its patch and its last forward: plain numbers and a weak reference."""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..cache.break_even import Form
from ..cache.bytes import storage_bytes
from ..cache.cache import LongCtxCache
from ..cache.handles import new_handle
from ..cache.plan import LayerPlan
from ..cache.stock_layers import tensors_of
from ..config.config import LongCtxConfig
from ..errors import UnsupportedModeError
from ..layout.forward import ForwardLog
from ..layout.rows import Rows
from .losses import losses_of
from .private_config import PrivateConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """What a ``LongCtxCache`` held at one moment, as in ``Report``.

    Attributes:
        form: what it would hold at other lengths.
    """

    form: Form
    seen: int
    nbytes: int
    nbytes_dense: int
    layers: tuple[int, ...]
    offloaded: dict[str, int]

    @classmethod
    def by(cls, cache: LongCtxCache) -> Kept:
        layers = tuple(storage_bytes(tensors_of(layer)) for layer in cache.layers)
        return cls(Form.of(cache), cache.seen, cache.nbytes, cache.nbytes_dense, layers, cache.nbytes_offloaded)


@dataclass
class PatchState:
    """Lives on the base model as ``longctx_state``.

    Attributes:
        config: the config in force.
        configs: the model's own config objects, each with its private copy: the text's, then those around it.
        plans: the plan of every layer.
        whole: the module that was patched, of which the base model may be a part.
        forwards: forwards since patching.
        log: what ran, and how, in all forwards.
        kept: what the cache of the last forward held when it was last looked at.
        base: the base model, as far as it is known: of a copied or unpickled one since its first forward.
        head: makes logits of the base model's hidden states, where a score asks for them.
        handle: by which compiled code finds this state; every copy has its own.
        compiles: a decoded token can be compiled as a whole: every layer caches keys, none has scores of its own.
    """

    config: LongCtxConfig
    configs: tuple[PrivateConfig, ...]
    plans: tuple[LayerPlan, ...]
    whole: weakref.ref | None = None
    forwards: int = 0
    log: ForwardLog = field(default_factory=ForwardLog)
    kept: Kept | None = None
    compiles: bool = False
    base: weakref.ref[nn.Module] | None = None
    head: weakref.ref[nn.Module] | None = None
    handle: Tensor = field(init=False, repr=False, compare=False)
    _cache: weakref.ref | None = None

    def __post_init__(self) -> None:
        self.handle = new_handle(self)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_cache": None, "whole": None, "base": None, "head": None, "handle": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.handle = new_handle(self)

    def go_on_from(self, before: PatchState) -> None:
        """Count on from where an earlier patch by the same config stopped."""
        for name in ("forwards", "log", "kept", "_cache"):
            setattr(self, name, getattr(before, name))

    @property
    def original(self) -> object:
        """The model's own text config, put back by ``unpatch_model``."""
        return self.configs[0].original

    @property
    def patched(self):
        """The module that was patched, while somebody still holds it and it was not copied or unpickled."""
        return None if self.whole is None else self.whole()

    @property
    def last_cache(self):
        """The cache of the last forward, while somebody still holds it."""
        return self._cache() if self._cache is not None else None

    def saw(self, rows: Rows, cache: object | None) -> None:
        """Note one forward; what it logs itself comes to ``log``."""
        self.forwards += 1
        self._look_at(cache)
        self._cache = weakref.ref(cache) if cache is not None else None
        if torch.compiler.is_compiling():
            self.note("torch.compile: ran with graph breaks")
        if self.config.kernel == "stock" and rows.padded:
            self.note("kernel stock: padded rows ran on the default kernel")

    def losses_of(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """``-log p [B, T]`` of ``ids [B, T]``, which the base model's last hidden states ``[B, T, D]`` predict.

        Raises:
            UnsupportedModeError: the patched model was copied or unpickled, or its head was replaced.
        """
        if (head := None if self.head is None else self.head()) is None:
            raise UnsupportedModeError(
                "score 'surprisal': this model was copied or unpickled since it was patched, or its output head was "
                "replaced. Call patch_model once more."
            )
        vocab = self.configs[0].original.vocab_size
        return losses_of(head, hidden.flatten(0, 1), ids.flatten(), vocab).view(ids.shape)

    def go_back_to(self, cache: object) -> None:
        """The last forwards were over copies of ``cache``: the report is of the cache itself."""
        self._look_at(cache)
        self._cache = weakref.ref(cache)

    def _look_at(self, cache: object | None) -> None:
        """Keep the numbers of a cache that ``generate`` drops with its answer.

        Adding them up reads every layer, so it is done for the first token after a prompt, and then whenever the cache
        has grown by an eighth, as its buffers do.
        """
        if cache is None or cache is not self.last_cache:
            self.kept = None
        if isinstance(cache, LongCtxCache) and not torch.compiler.is_compiling():
            seen = cache.seen
            if seen and (self.kept is None or 8 * seen >= 9 * self.kept.seen):
                self.kept = Kept.by(cache)

    def runs_dense(self, implementation: str) -> None:
        note = f"dense: the model was switched to attention '{implementation}'"
        if note not in self.log.notes:
            logger.warning("%s; longctx is off until set_attn_implementation('longctx')", note)
        self.note(note)

    def note(self, text: str) -> None:
        self.log.notes.add(text)
