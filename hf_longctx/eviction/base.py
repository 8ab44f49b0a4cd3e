"""The base of every eviction score: how much each cached token will be needed.

A YAML word of this folder names a frozen dataclass in the file of the same name. Its fields are the YAML keys. The way
from there to memory that is freed is the same for all (`hf_longctx.stores.evicted`):

    queries of the prompt -> score of each cached token -> budget by head, layer or model -> what is kept -> after

A score looks at the keys, at the last queries of the prompt (`window`), or at all of them, once (`gather`). Sinks and
the newest tokens are kept whatever it says.

Shapes: ``B`` sequences of one length, ``H`` query heads, ``n`` KV heads, ``G = H // n``, ``T`` queries, ``S`` cached
tokens, ``D`` head_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from ..layout.rotation import Rotation
from ..layout.scores import Scores

JUDGED = "judged"  # in the state of any score: what an `Asked` one said of each token, ``[B, n, S]``


@dataclass(frozen=True)
class Seen:
    """What a score is told of sequences of one length.

    Attributes:
        k, v: the cached tokens, ``[B, n, S, D]``; the last of them is as new as the last query.
        positions: their row positions, int64 ``[S]``, ascending; they are not all tokens where some were evicted.
        q: queries ``[B, H, T, D]`` of the newest tokens, all of them cached, rotated as the keys are; None where the
            score asks for none.
        processed: tokens of each sequence that were read so far, evicted ones included. The last query is of the last.
        scores: how attention makes scores of q and k.
        rotation: the rotation of this layer's keys and queries; None where the score did not ask for it (`rotates`).
        layer: index of the layer in the model.
        state: what `gather` keeps, by name: tensors whose first two dimensions are ``[B, n]`` or ``[B, H]``. They are
            replaced, never written to: copies of a cache share them.
        surprisal: ``-log p`` of the newest of the cached tokens by those before them, float32 ``[B, T]``: of all that
            came since the last eviction. -1: not known. None where the score did not ask (`surprises`).
    """

    k: Tensor
    v: Tensor
    positions: Tensor
    q: Tensor | None
    processed: int
    scores: Scores
    rotation: Rotation | None = None
    layer: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)
    surprisal: Tensor | None = None

    @property
    def first(self) -> int:
        """Row position of the first query."""
        return self.processed - self.q.shape[2]


class Score(ABC):
    """What a YAML word of ``eviction/`` defines.

    Attributes:
        roles: the roles whose heads it scores.
        paper: where the method comes from.
        gathers: every query of a prompt is shown to `gather`, once.
        by_token: names of the state that has a number per cached token, ``[B, n, S]``: an eviction cuts it.
        rotates: it needs `Seen.rotation`; models whose angles depend on the length of the text are refused.
        surprises: it needs `Seen.surprisal`, which takes a run of the model's output head over every token.
        alike: all heads of a layer get the same scores, so that budgets by head say nothing.
        moment: ``prompt`` where it scores by itself where a prompt ends; ``call`` where it must be asked
            (`LongCtxCache.compress`), because it takes forwards of its own.
        agnostic: it does not look for what the end of the prompt asks: a document may be evicted before its question.
        cases: small settings, fields by name, that together show all it does; the tests run each of them.
    """

    roles: ClassVar[tuple[str, ...]] = ("retrieval",)
    paper: ClassVar[str]
    gathers: ClassVar[bool] = False
    by_token: ClassVar[tuple[str, ...]] = ()
    rotates: ClassVar[bool] = False
    surprises: ClassVar[bool] = False
    alike: ClassVar[bool] = False
    moment: ClassVar[Literal["prompt", "call"]] = "prompt"
    agnostic: ClassVar[bool] = False
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    @property
    def queries(self) -> int:
        """How many of a prompt's last queries `score` gets; there may be fewer. 0: none."""
        return 0

    def gather(self, seen: Seen) -> None:  # noqa: B027
        """Take in the queries ``seen.q``, which follow those of the last call; the answer is in ``seen.state``.

        A prompt may come in pieces of any length, and the score must not depend on them but for rounding.
        """

    @abstractmethod
    def score(self, seen: Seen) -> Tensor:
        """Scores of the cached tokens, float32 or wider, ``[B, n, S]``: the highest are kept, the first of equals."""


@dataclass(frozen=True)
class Context:
    """What an `Asked` score is told of the text that it is to judge.

    Attributes:
        ids: its token ids, int64 ``[S]`` on the CPU, without pads.
        first: row position of the first token that was not judged yet; those before it are no question any more.
        sink: first tokens, which stay whatever is said of them.
        gone: some tokens before ``first`` left before they were judged, and nobody knows which.
        tokenizer: the caller's, or None.
        follows: ids ``[T]`` of what comes next, where the caller says it, or None.
    """

    ids: Tensor
    first: int = 0
    sink: int = 0
    gone: bool = False
    tokenizer: Any = None
    follows: Tensor | None = None


@dataclass(frozen=True)
class Reading:
    """What the model reads after a text, on a copy of its cache, and which cached tokens are judged by that.

    Attributes:
        ids: token ids, int64 ``[T]``.
        first, end: row positions of the tokens that are judged.
        sink: first tokens of the text.
    """

    ids: Tensor
    first: int
    end: int
    sink: int = 0


class Asked(Score):
    """A score that has the model read something after the text: `LongCtxCache.compress` asks it, nobody else does.

    What it says of a token is kept with the token, so that a text that goes on is judged from there.
    """

    moment = "call"
    by_token = (JUDGED,)

    @property
    def needs_tokenizer(self) -> bool:
        """Whether `readings` needs the tokenizer."""
        return False

    @abstractmethod
    def readings(self, context: Context) -> Iterator[Reading]:
        """What is to be read, each after the text alone; together they judge the tokens from ``context.first`` on.

        Raises:
            CacheError: tokens that it needs are gone.
            ConfigError: something that it needs was not given.
        """

    @abstractmethod
    def judge(self, seen: Seen, reading: Reading) -> Tensor:
        """Scores ``[B, n, end - first]`` by the queries of a reading, or ``[B, n, S]`` of all cached ones of the text.

        Of the cached tokens in ``seen`` the last are the reading's own; ``seen.q`` ends in its queries, and before
        them has the last `queries` of the text. Float32 or wider.
        """

    def score(self, seen: Seen) -> Tensor:
        return seen.state[JUDGED]
