"""Tokenizes texts by the rules of lm-eval's own Hugging Face model, with the same tokenizer.

The tokenizer is the one that `mor convert export` would write: special tokens spelled out in
a text are special tokens (chat templates need that), and a beginning-of-text token is prepended if
the tokenizer does so.
"""

from tokenizers import Tokenizer as Encoder

from mor_jax.convert.tokenizers.export import special_ids, tokenizer_files
from mor_jax.data.tokenizers.base import Tokenizer


class Encoding:
    """Encodes and decodes texts.

    eos_id: end-of-text token. prefix_id: stands for an empty context; the beginning-of-text token
    if the tokenizer has one, else eos_id.
    """

    def __init__(
        self, tokenizer: Tokenizer, add_bos: bool | None = None, prefix: int | None = None
    ) -> None:
        """add_bos: whether to prepend the beginning-of-text token; None: as the tokenizer does.

        Raises `ValueError` for a tokenizer that cannot be written as tokenizer.json.
        """
        files = tokenizer_files(tokenizer)
        self._encoder = Encoder.from_str(files["tokenizer.json"].decode("utf-8"))
        self._encoder.no_truncation()
        self._encoder.no_padding()
        ids = special_ids(tokenizer, files)
        self.eos_id = tokenizer.eos_id
        self.prefix_id = ids.get("bos_token_id", self.eos_id) if prefix is None else prefix
        self._add_bos = add_bos
        self._prefix_text = self.decode([self.prefix_id])

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """add_special_tokens: None: as configured, but never a second beginning-of-text token."""
        add = add_special_tokens
        if add is None:
            add = self._add_bos is not False
            add = add and not (self._prefix_text and text.startswith(self._prefix_text))
        return self._encoder.encode(text, add_special_tokens=add).ids

    def decode(self, ids: list[int]) -> str:
        """Text of the tokens, special ones by name."""
        return self._encoder.decode(ids, skip_special_tokens=False)
