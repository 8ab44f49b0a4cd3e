"""What keys, values and filler sentences are made of: words that every tokenizer can say and read back.

Keys and values are letters and digits without a space (names have one), drawn without repeats, so that no value is part
of another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..errors import ConfigError

Words = Callable[[np.random.Generator, int], list[str]]

FIRST_WORDS = (
    "amber brave clever dusty eager fancy gentle hasty ivory jolly keen lively mellow noble odd proud quick rusty "
    "silent tidy urban vivid witty young zesty bitter calm dapper early frosty golden humble"
)
LAST_WORDS = (
    "falcon anchor badger candle dragon engine feather guitar hammer island jacket kettle ladder magnet napkin orchid "
    "pillow quartz rocket saddle temple umbrella violin walnut yogurt zipper basket copper dagger emerald flute goblet"
)
ADJECTIVES = "old,small,green,wide,warm,cold,tall,dark,bright,slow,heavy,plain,quiet,long,narrow,round"
NOUNS = "farmer,road,river,garden,house,bridge,market,teacher,boat,forest,village,window,table,child,hill,train"
VERBS = "watched,crossed,followed,reached,passed,painted,found,left,liked,described,visited,remembered"
PLACES = "near,behind,beside,above,below,before,after,across,along,around,beyond,past"
TIMES = "in spring,at noon,every evening,last week,for an hour,in the rain,all summer,after lunch"
FORM = "The {} {} {} the {} {} {} the {} {}."
PARTS = [part.split(",") for part in (ADJECTIVES, NOUNS, VERBS, ADJECTIVES, NOUNS, PLACES, NOUNS, TIMES)]
FIRST = FIRST_WORDS.split()
LAST = LAST_WORDS.split()
PEOPLE = (
    "Alice Bernard Clara Dennis Edith Frank Grace Harold Irene Jacob Laura Martin Nora Oscar Philip Ruth Simon Thomas "
    "Ursula Victor Walter Agnes Beatrice Cecil"
)
FAMILIES = (
    "Aldridge Barlow Calder Denham Elwood Farrow Garland Hobson Ingram Jessop Kendall Lambert Marlow Norwood Orchard "
    "Pickering Ransome Selby Thornton Underhill Vickers Whitlock Yardley Ashby"
)
CONSONANTS = "bdfghjklmnprstvwxyz"
VOWELS = "aeiou"


def names(rng: np.random.Generator, count: int) -> list[str]:
    """Names of two words, at most 1024."""
    return [" ".join(pair) for pair in _pairs(rng, count, FIRST, LAST)]


def people(rng: np.random.Generator, count: int) -> list[str]:
    """Names of people, at most 24, who share neither first nor last names."""
    first, last = PEOPLE.split(), FAMILIES.split()
    given = _distinct(rng, count, len(first))
    return [f"{first[i]} {last[j]}" for i, j in zip(given, _distinct(rng, count, len(last)), strict=True)]


def years(rng: np.random.Generator, count: int) -> list[str]:
    """Years from 1600 to 1897."""
    return [str(1600 + i) for i in _distinct(rng, count, 298)]


def prices(rng: np.random.Generator, count: int) -> list[str]:
    """Numbers of pounds, of four digits."""
    return [str(2000 + i) for i in _distinct(rng, count, 8000)]


def passkeys(rng: np.random.Generator, count: int) -> list[str]:
    """Numbers of five digits."""
    return [str(10**4 + i) for i in _distinct(rng, count, 9 * 10**4)]


def numbers(rng: np.random.Generator, count: int) -> list[str]:
    """Numbers of seven digits."""
    return [str(10**6 + i) for i in _distinct(rng, count, 9 * 10**6)]


def ids(rng: np.random.Generator, count: int) -> list[str]:
    """Random strings of twelve hexadecimal digits."""
    return [f"{i:012x}" for i in _distinct(rng, count, 16**12)]


def coded(rng: np.random.Generator, count: int) -> list[str]:
    """Words of three syllables that mean nothing, all of six letters."""
    syllables = [a + b for a in CONSONANTS for b in VOWELS]
    n = len(syllables)
    return [syllables[i // n**2] + syllables[i // n % n] + syllables[i % n] for i in _distinct(rng, count, n**3)]


def sentences(rng: np.random.Generator, count: int) -> list[str]:
    """Sentences of one form, about nothing."""
    drawn = np.stack([rng.integers(0, len(part), size=count) for part in PARTS], axis=1)
    return [FORM.format(*(part[i] for part, i in zip(PARTS, row, strict=True))) for row in drawn]


def _pairs(rng: np.random.Generator, count: int, first: Sequence[str], last: Sequence[str]) -> list[tuple[str, str]]:
    return [(first[i % len(first)], last[i // len(first)]) for i in _distinct(rng, count, len(first) * len(last))]


def _distinct(rng: np.random.Generator, count: int, of: int) -> list[int]:
    if count > of:
        raise ConfigError(f"length: it has room for more than the {of} different words there are; use a shorter one.")
    return rng.choice(of, size=count, replace=False).tolist()
