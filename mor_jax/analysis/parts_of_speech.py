"""Parts of speech of English words and of their tokens.

The tagger is TextBlob's own, a lexicon with rules inside the package: nothing is downloaded.
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

# Prefix of a Penn Treebank tag -> class; the longest prefix decides.
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
    """Words of `text` in order with their Penn Treebank tags. Raises like `check_tagger`."""
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
    """Index in `CLASSES` of each token's word, -1 for a token without one: int [n].

    pieces: text of each token; joined, they are the tagged text. A token belongs to the word that
    contains its first visible character. Words that the tagger rewrote are omitted.
    """
    text = "".join(pieces)
    class_of_char = np.full(len(text) + 1, -1)
    end, unmatched = 0, 0
    for word, tag in words:
        begin = text.find(word, end)
        # A rewritten word must not match a later occurrence of the same letters.
        if begin < 0 or len(text[end:begin].split()) > unmatched:
            unmatched += 1
            continue
        end, unmatched = begin + len(word), 0
        class_of_char[begin:end] = CLASSES.index(word_class(word, tag))
    label, start = np.full(len(pieces), -1), 0
    for index, piece in enumerate(pieces):
        visible = len(piece) - len(piece.lstrip())
        if visible < len(piece):
            label[index] = class_of_char[start + visible]
        start += len(piece)
    return label
