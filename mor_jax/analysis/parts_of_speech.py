"""Parts of speech of English words, and of the tokens that they are made of.

The tagger is TextBlob's own (a lexicon with rules, in the package itself): nothing is downloaded.
"""

from collections.abc import Sequence

import numpy as np

from mor_jax.config.optional_import import require_package

CLASSES = (
    "noun",
    "proper noun",
    "pronoun",
    "verb",
    "adjective",
    "adverb",
    "determiner",
    "preposition",
    "conjunction",
    "number",
    "other word",
    "punctuation",
)

# By the beginning of a Penn Treebank tag, the longest first.
_PREFIXES = {
    "NNP": "proper noun",
    "NN": "noun",
    "PRP": "pronoun",
    "WP": "pronoun",
    "VB": "verb",
    "MD": "verb",
    "JJ": "adjective",
    "RB": "adverb",
    "WRB": "adverb",
    "DT": "determiner",
    "PDT": "determiner",
    "WDT": "determiner",
    "IN": "preposition",
    "TO": "preposition",
    "CC": "conjunction",
    "CD": "number",
}


def check_tagger() -> None:
    """Raises `ValueError`, naming the package to install, if the tagger is missing."""
    require_package("textblob", "pos", "True")


def tagged(text: str) -> list[tuple[str, str]]:
    """Words of `text` in order with their Penn Treebank tags. Raises as `check_tagger`."""
    return [(word, tag) for word, tag in require_package("textblob.en", "pos", "True").tag(text)]


def word_class(word: str, tag: str) -> str:
    """One of `CLASSES`."""
    if not any(char.isalnum() for char in word):
        return "punctuation"
    for prefix in sorted(_PREFIXES, key=len, reverse=True):
        if tag.startswith(prefix):
            return _PREFIXES[prefix]
    return "other word"


def token_classes(pieces: Sequence[str], words: Sequence[tuple[str, str]]) -> np.ndarray:
    """Place in `CLASSES` of each token's word; -1 where there is none: int [n].

    pieces: text of each token, which join to the text that was tagged. A token belongs to the word
    that its first visible letter stands in. Words that the tagger spelled anew are left out.
    """
    text = "".join(pieces)
    of_letter = np.full(len(text) + 1, -1)
    at, missed = 0, 0
    for word, tag in words:
        found = text.find(word, at)
        # A word that is not there must not carry the search to a later one like it.
        if found < 0 or len(text[at:found].split()) > missed:
            missed += 1
            continue
        at, missed = found + len(word), 0
        of_letter[found:at] = CLASSES.index(word_class(word, tag))
    label, start = np.full(len(pieces), -1), 0
    for place, piece in enumerate(pieces):
        visible = len(piece) - len(piece.lstrip())
        if visible < len(piece):
            label[place] = of_letter[start + visible]
        start += len(piece)
    return label
