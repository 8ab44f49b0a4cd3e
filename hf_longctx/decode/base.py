"""The base of every decode selection: which cached tokens a decoded token reads.

A YAML word of this folder names a frozen dataclass in the file of the same name. Its fields are the YAML keys. What a
selection keeps beside a store is made by `Select.new_index`; the way from there to a list is the same for all:

    index of the keys -> score of each entry -> vote of the heads of a group -> budget -> used again for a while

Shapes: ``B`` sequences that begin at one slot, ``H`` query heads, ``n`` KV heads, ``G = H // n``, ``E`` entries, ``D``
head_dim. Positions are row positions: they count a sequence's own tokens from 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config.bounds import COUNT, TOKENS, TOKENS_OR_NONE
from ..errors import ConfigError
from ..layout.gather import shape_of
from ..layout.segments import Segment
from ..layout.streamed import Streamed
from ._chosen import Chosen as Chosen
from ._votes import best, vote

Cached = Sequence[Segment | Streamed]  # all tokens of the sequences, without pads: `HeadKV.alone`


class SelectSpec:
    """What a YAML word of ``decode/`` defines.

    Attributes:
        roles: the roles whose heads the selection serves.
        reads_all: it reads every cached token.
        dense_layers: the first layers of the model, in which it reads every cached token.
        saved: fields on which depends what a file has of its indexes; none: a file has nothing of them.
        cases: small settings, fields by name, that together show all it does; the tests run each of them.
    """

    roles: ClassVar[tuple[str, ...]] = ()
    reads_all: ClassVar[bool] = False
    dense_layers: int = 0
    saved: ClassVar[tuple[str, ...]] = ()
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    def runs(self, processed: int) -> bool:
        """Whether it may leave out tokens of a sequence that has ``processed`` tokens."""
        return not self.reads_all

    @property
    def queries(self) -> int:
        """How many of a prompt's last queries an index needs (`Index.saw`); 0: none, and `settle` is not asked."""
        return 0

    def settle(self, indexes: Sequence[Index], cached: Sequence[Cached]) -> None:  # noqa: B027
        """End the prompt of the same sequences in all layers, whose indexes wait for each other (`Index.waits`).

        It is asked before the first decoded token that selects, or earlier, where a prompt is kept for others.
        """

    def reads(self, processed: int) -> int:
        """Of ``processed`` tokens those that the last one reads, where it is decoded in a layer that selects."""
        return processed

    def nbytes(self, tokens: int, head_dim: int, itemsize: int, max_tokens: int | None = None) -> int:
        """Bytes of its index where it runs: for one KV head of one sequence whose last of ``tokens`` was decoded.

        With the spare room of buffers that grow (`_growing.room`), or what ``max_tokens`` reserves.
        """
        return 0

    def index_bytes(self, tokens: int, head_dim: int, itemsize: int, max_tokens: int | None = None) -> int:
        """As `nbytes`, and 0 where it does not run. Choices that are remembered are not counted."""
        return self.nbytes(tokens, head_dim, itemsize, max_tokens) if self.runs(tokens) else 0


class Index(ABC):
    """What is known of the keys of sequences of one length, beside the store that has them.

    It is a function of the keys: `extend` reads them, a file does not have it. One that needs queries (`saw`) is saved.

    Attributes:
        numbers: names of the attributes (plain ints, not negative) that a file has of it.
        tokens: those it covers, from the first on.
        kernel: the config's word, for what a kernel computes of it.
        waits: it has seen what it needs and is not settled yet (`SelectSpec.settle`).
        max_tokens: most that it will cover, for which it makes room at once; None: it grows.
    """

    numbers: ClassVar[tuple[str, ...]] = ()
    tokens: int = 0
    kernel: str = "auto"
    waits: bool = False
    max_tokens: int | None = None

    def saw(self, q: Tensor, position: int, scale: float) -> None:  # noqa: B027
        """Queries ``[B, H, T, D]`` of a prompt, from this position on."""

    def reopen(self, tokens: int) -> None:  # noqa: B027
        """A prompt goes on after its first ``tokens`` tokens: let it be settled anew."""

    @abstractmethod
    def extend(self, cached: Cached, tokens: int) -> None:
        """Cover the first ``tokens`` tokens."""

    @abstractmethod
    def crop(self, tokens: int) -> None:
        """Cover at most the first ``tokens`` tokens."""

    @abstractmethod
    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Reorder, repeat or select the sequences: ``change`` does it to a tensor ``[B, ...]``."""

    @abstractmethod
    def fork(self) -> Index:
        """One that goes on by itself and shares the memory of what both have."""

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """Every tensor it keeps alive."""

    def saved(self) -> dict[str, Tensor]:
        """The tensors that a file has of it, beside `numbers`."""
        return {}

    def expected(
        self, numbers: Mapping[str, int], tokens: int, shape: tuple[int, int, int, int], dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of what `saved` gives where its numbers are these, of sequences of ``tokens`` tokens.

        Args:
            shape: B, n, H, D.

        Raises:
            ValueError: no index has such numbers.
        """
        return {}

    def restore(self, numbers: Mapping[str, int], tensors: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Make an empty index the one of which `saved` gave these, whose dtypes and shapes are right.

        Raises:
            ValueError: no index has such tensors; asked of an index that nobody uses before, with views of a file.
        """


class NoIndex(Index):
    """Of a selection that asks the keys themselves."""

    def extend(self, cached: Cached, tokens: int) -> None:
        self.tokens = tokens

    def crop(self, tokens: int) -> None:
        self.tokens = min(self.tokens, tokens)

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        pass

    def fork(self) -> NoIndex:
        return NoIndex()

    def tensors(self) -> Iterator[Tensor]:
        yield from ()


@dataclass(frozen=True)
class Select(SelectSpec):
    """What every selection that leaves out tokens has in common.

    Attributes:
        budget: tokens that are chosen, beside the first and the newest ones.
        share: choose this share of a sequence's tokens instead.
        mass: choose no more entries than have this share of the softmax, as far as the scores tell; the budget bounds
            them.
        sink: first tokens, which are always read.
        recent: newest tokens, which are always read.
        min_tokens: a sequence of fewer tokens is read densely.
        refresh: how long a choice is used: until a sequence's position is the next multiple of it, in tokens.
        similar: choose again only when the cosine of the query and of the one that chose falls below this.
        dense_layers: first layers of the model, which read every token.
    """

    roles = ("retrieval",)

    budget: int = field(default=2048, metadata=TOKENS)
    share: float | None = field(default=None, metadata={"above": 0.0, "max": 1.0})
    mass: float | None = field(default=None, metadata={"above": 0.0, "max": 1.0})
    sink: int = field(default=64, metadata=TOKENS)
    recent: int = field(default=256, metadata=TOKENS)
    min_tokens: int = field(default=8192, metadata=TOKENS_OR_NONE)
    refresh: int = field(default=1, metadata=TOKENS)
    similar: float | None = field(default=None, metadata={"min": -1.0, "max": 1.0})
    dense_layers: int = field(default=2, metadata={**COUNT, "min": 0, "unit": "layers"})

    def __post_init__(self) -> None:
        if self.similar is not None and self.refresh == 1:
            raise ConfigError(
                f"similar: got {self.similar} with refresh 1, which chooses for every token. Set refresh to the most "
                "tokens for which a choice may be used, or similar to null."
            )

    estimates: ClassVar[bool] = False  # a choice may have an `Chosen.estimate`
    votes: ClassVar[str] = "max"  # how the query heads of a KV head vote, a word of `_votes.vote`

    @property
    def size(self) -> int:
        """Tokens of an entry."""
        return 1

    @property
    def by_sequence(self) -> bool:
        """Whether sequences of one length may choose at different positions, so that each is asked alone."""
        return self.similar is not None

    def compares(self, position: int) -> bool:
        """Whether the query at ``position`` is compared with the one that chose."""
        return self.similar is not None

    def new_index(self) -> Index:
        """An empty index, of one layer's heads."""
        return NoIndex()

    def runs(self, processed: int) -> bool:
        low, high = self.between(processed - 1)
        return processed >= self.min_tokens and high - low > self.width(processed)

    def between(self, position: int) -> tuple[int, int]:
        """The entries from which the query at ``position`` chooses: whole ones between sinks and newest tokens."""
        low = -(-self.sink // self.size)
        return low, max(low, (position + 1 - self.recent) // self.size)

    def reads(self, processed: int) -> int:
        low, high = self.between(processed - 1)
        left_out = (high - low - self.width(processed)) * self.size
        return processed - left_out if self.runs(processed) else processed

    def width(self, processed: int) -> int:
        """Entries that are chosen at most, of ``processed`` tokens."""
        tokens = self.budget if self.share is None else int(self.share * processed)
        return max(1, tokens // self.size)

    def choose(self, q: Tensor, index: Index, cached: Cached, position: int, scale: float) -> Chosen:
        """What the query q ``[B, H, 1, D]`` at ``position`` reads; `runs` says that it leaves something out."""
        low, high = self.between(position)
        index.extend(cached, high * self.size)
        entries, counts = self.pick(q, index, cached, low, high, self.width(position + 1), scale)
        return Chosen(self.size, low, high, entries + low, counts)

    def pick(
        self, q: Tensor, index: Index, cached: Cached, low: int, high: int, width: int, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        """At most ``width`` of the entries ``low .. high``, counted from ``low``, as `_votes.best` gives them."""
        scores = self.scores(q, index, cached, low, high, scale)
        return best(vote(scores, shape_of(cached)[1], self.votes), width, self.mass)

    def again(self, chosen: Chosen, index: Index, cached: Cached) -> Chosen:
        """A remembered choice as it was when it was made: with its estimate."""
        return chosen

    def scores(self, q: Tensor, index: Index, cached: Cached, low: int, high: int, scale: float) -> Tensor:
        """Scores of the entries ``low .. high`` for q ``[B, H, 1, D]``, scaled: float32 or wider, ``[B, H, E]``."""
        raise NotImplementedError
