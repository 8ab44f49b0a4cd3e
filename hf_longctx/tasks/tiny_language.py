"""The small language of the embedded models: filler words with notes hidden in them, and questions about the notes.

A note reads ``note amber falcon is lemon river cobalt tiger .`` and the question about it
``ask amber falcon is`` -> ``lemon river cobalt tiger .``. The closing full stop is there from the first training step:
without it the position that holds the last value is overwritten by filler that no head learns to mark.
"""

from __future__ import annotations

import numpy as np

PAD, UNK, BOS, NOTE, ASK, IS, END = range(7)
MARKS = ["<pad>", "<unk>", "<bos>", "note", "ask", "is", "."]
CODE_WORDS = (
    "amber falcon lemon river cobalt tiger maple anchor velvet comet ginger harbor ivory jaguar kettle lantern "
    "marble nectar olive pepper quartz raven saffron thistle umber violet walnut yellow zebra acorn basil cedar "
    "dahlia ember fennel garnet hazel indigo jasmine karma lotus mango nutmeg onyx pearl quince ruby sable topaz "
    "urchin vanilla willow yarrow zircon apricot badger canary dolphin eagle ferret gopher heron ibis koala"
)
FILLER_WORDS = (
    "the of and to in that it was for on with as they at be this from have or by one had not but what all were when "
    "we there can an your which their said if do will each about how up out them then she many some so these would "
    "other into has more her two like him see time could no make than first been its who now people my made over did "
    "down only way find use may water long little very after words called just where most know get through back much "
    "before go good new write our used me man too any day same right look think also around another came come work "
    "three word must because does part even place well"
)
CODES = CODE_WORDS.split()
FILLER = FILLER_WORDS.split()
VOCAB = MARKS + CODES + FILLER
FIRST_CODE = len(MARKS)
FIRST_FILLER = len(MARKS) + len(CODES)
BLOCK = 9  # tokens of a note, and of a question with its answer


class Filler:
    """An order-2 Markov chain over the filler words: 4 successors each, so that local heads have something to learn."""

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng([seed, 7])
        self.successors = rng.integers(0, len(FILLER), size=(len(FILLER), len(FILLER), 4))
        self.cumulative = np.cumsum([0.6, 0.2, 0.15, 0.05])

    def sample(self, rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
        """Filler token ids ``[rows, length]``."""
        choice = np.minimum(np.searchsorted(self.cumulative, rng.random((rows, length))), 3)
        out = np.empty((rows, length), dtype=np.int64)
        a, b = rng.integers(0, len(FILLER), size=(2, rows))
        for t in range(length):
            a, b = b, self.successors[a, b, choice[:, t]]
            out[:, t] = b
        return out + FIRST_FILLER


def note(key, value) -> list[int]:
    return [NOTE, *key, IS, *value, END]


def question(key, value) -> list[int]:
    return [ASK, *key, IS, *value, END]


def draw_notes(rng: np.random.Generator, count: int):
    """``count`` notes with distinct key pairs: keys ``[count, 2]`` and values ``[count, 4]`` of code tokens."""
    n = len(CODES)
    pairs = rng.choice(n * n, size=count, replace=False)
    keys = np.stack([pairs // n, pairs % n], axis=1) + FIRST_CODE
    return keys, rng.integers(0, n, size=(count, 4)) + FIRST_CODE


def _order(rng: np.random.Generator, length: int, sparse: bool) -> tuple[int, list[int], int]:
    """(number of notes, block list, blocks at the end): block i >= 0 is note i, block -1-i asks for note i."""
    room = (length - 1) // BLOCK
    if sparse:
        notes = int(rng.integers(1, min(16, room // 2) + 1))
        asked = rng.permutation(notes)[:8]
        return notes, [*range(notes), *(-1 - asked)], len(asked)
    blocks = max(2, int(room * rng.uniform(0.25, 1.0)))
    blocks = min(blocks, 160)
    if rng.random() < 0.4:
        notes = blocks // 2
        return notes, [*range(notes), *(-1 - rng.integers(0, notes, size=blocks - notes))], blocks - notes
    order = [0]
    notes = 1
    for _ in range(blocks - 1):
        if rng.random() < 0.5:
            order.append(notes)
            notes += 1
        else:
            order.append(-1 - int(rng.integers(0, notes)))
    return notes, order, 0


def _place(rng: np.random.Generator, length: int, blocks: int, at_end: int) -> np.ndarray:
    """First position of every block: filler of random lengths between the blocks, none between those at the end."""
    free = length - 1 - blocks * BLOCK
    body = blocks - at_end
    cuts = np.sort(rng.integers(0, free + 1, size=body))
    tail = np.full(at_end, free)
    return 1 + np.concatenate([cuts, tail]) + BLOCK * np.arange(blocks)


def batch(rng: np.random.Generator, filler: Filler, rows: int, length: int, sparse_share: float):
    """Training batch: ids ``[rows, length]`` and the loss weight of predicting each token (answers 1, filler 0.25)."""
    words = filler.sample(rng, rows, length)
    ids = np.empty((rows, length), dtype=np.int64)
    weight = np.zeros((rows, length), dtype=np.float32)
    for r in range(rows):
        notes, order, at_end = _order(rng, length, rng.random() < sparse_share)
        keys, values = draw_notes(rng, notes)
        is_filler = np.ones(length, dtype=bool)
        is_filler[0], ids[r, 0] = False, BOS
        for start, block in zip(_place(rng, length, len(order), at_end), order, strict=True):
            which = block if block >= 0 else -1 - block
            ids[r, start : start + BLOCK] = (note if block >= 0 else question)(keys[which], values[which])
            is_filler[start : start + BLOCK] = False
            if block < 0:
                weight[r, start + 4 : start + BLOCK] = 1.0
        ids[r, is_filler] = words[r, : is_filler.sum()]
        weight[r, is_filler] = 0.25
    return ids, weight


def exam(rng: np.random.Generator, filler: Filler, rows: int, length: int, notes: int):
    """Rows of ``notes`` notes that are all asked for at the end: ids, and answer positions ``[rows, notes, 4]``."""
    words = filler.sample(rng, rows, length)
    ids = np.empty((rows, length), dtype=np.int64)
    where = np.empty((rows, notes, 4), dtype=np.int64)
    for r in range(rows):
        keys, values = draw_notes(rng, notes)
        is_filler = np.ones(length, dtype=bool)
        is_filler[0], ids[r, 0] = False, BOS
        asked = rng.permutation(notes)
        starts = _place(rng, length, 2 * notes, notes)
        for i, start in enumerate(starts):
            block = (
                note(keys[i], values[i]) if i < notes else question(keys[asked[i - notes]], values[asked[i - notes]])
            )
            ids[r, start : start + BLOCK] = block
            is_filler[start : start + BLOCK] = False
            if i >= notes:
                where[r, i - notes] = np.arange(start + 4, start + 8)
        ids[r, is_filler] = words[r, : is_filler.sum()]
    return ids, where
