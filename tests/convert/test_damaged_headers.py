"""Heads of files, damaged at random: an import succeeds, or says in the project's words why not.

Any other exception, a search without end and memory for what is not there would show here.
"""

import copy
import json
import random
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.seeded import random_params
from support.tiny import TINY
from test_import_gguf import WORDS, tensors_of
from test_import_gguf import write as write_gguf
from test_import_hf import LLAMA3, PLAIN

from mor_jax.checkpoint.lazy_arrays import flatten, from_arrays
from mor_jax.convert.export_config import llama_config, mor_config
from mor_jax.convert.import_gguf import import_gguf
from mor_jax.convert.import_hf import import_hf
from mor_jax.convert.names import llama_entries, mor_entries
from mor_jax.convert.views import as_tensors

CASES = 40
MEMORY = 100 * 2**20
"""Bytes that Python and NumPy may hold at once; the models have 0.2 million."""

# What damage, careless editing and other programs leave in place of a value.
NUMBERS = [0, -1, 1, 2, 3, 7, 10**5, 2**31, 2**63, 10**30, 10**400, 0.0, -0.5, 1e-300, 1e308]
WORDS_ODD = ["", "false", "32", "llama", "silu", "x" * 5000, "\x00", "\ud800"]
LISTS = [[], [[]], [1], ["LlamaForCausalLM"], [None] * 3]
GROUPS = [
    {},
    {"": {}},
    {"rope_type": "linear", "factor": 2},
    {"full_attention": {"rope_type": "linear"}},
    {"kind": "token"},
    {"kind": "expert", "capacities": [1]},
]
OTHERS = [None, True, False, float("nan"), float("inf")]
ODD = [*NUMBERS, *WORDS_ODD, *LISTS, *GROUPS, *OTHERS]
MORE = ["rope_scaling", "rope_parameters", "quantization_config", "per_layer_config", "auto_map"]


def outcome(call):
    """`done`, or what was said; anything but a ValueError of one line (or a list) comes out."""
    try:
        call()
    except ValueError as error:
        told = str(error)
        assert type(error) is ValueError, repr(error)
        listed = "these tensors do not make a model" in told
        assert told and (listed or "\n" not in told) and len(told) < 30000, told[:2000]
        return told
    return "done"


def damaged(raw, head, rng):
    """`raw` with some bytes of its first `head` changed, or with another length."""
    made = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        at, way = rng.randrange(min(head, len(made))), rng.randrange(5)
        if way == 0:
            made[at] = rng.randrange(256)
        elif way == 1:
            made[at] ^= 1 << rng.randrange(8)
        elif way == 2:
            number = rng.choice([0, 1, 255, 2**16, 2**20, 2**31, 2**40, 2**63, 2**64 - 1])
            made[at : at + 8] = number.to_bytes(8, "little")
        elif way == 3:
            del made[at : at + rng.randint(1, 16)]
        else:
            made[at:at] = rng.randbytes(rng.randint(1, 16))
    return bytes(made if rng.randrange(10) else made[: rng.randrange(len(made))])


def test_heads_of_gguf_files(tmp_path):
    path, words = tmp_path / "x.gguf", WORDS | {"ggml.bos_token_id": 1}
    more = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    write_gguf(path, words=words, tensors=tensors_of(PLAIN), **more)
    raw = path.read_bytes()
    weights = sum(array.nbytes for array in tensors_of(PLAIN).values())
    rng, found = random.Random(0), set()
    tracemalloc.start()
    for _ in range(CASES):
        path.write_bytes(damaged(raw, len(raw) - weights, rng))
        found.add(outcome(lambda: import_gguf(str(path))).removeprefix(str(path))[:40])
    assert tracemalloc.get_traced_memory()[1] < MEMORY
    tracemalloc.stop()
    assert len(found) > 10


@pytest.mark.parametrize("kind", ["llama", "mor"])
def test_configurations(kind, tmp_path):
    cfg = PLAIN if kind == "llama" else TINY["expert"]
    table, config = (llama_entries, llama_config) if kind == "llama" else (mor_entries, mor_config)
    view = as_tensors(cfg, table(cfg), from_arrays(dict(flatten(random_params(cfg)))))
    tensors = {name: np.array(view.read(name)) for name in view.specs}
    save_file(tensors, tmp_path / "model.safetensors")
    told = config(cfg) | {"rope_scaling": LLAMA3}
    rng, found = random.Random(kind), set()
    tracemalloc.start()
    for _ in range(CASES):
        text = json.dumps(altered(told, rng))
        if rng.randrange(4) == 0:
            text = damaged(text.encode(), len(text), rng).decode("utf-8", errors="replace")
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        found.add(outcome(lambda: import_hf(str(tmp_path))).removeprefix(str(tmp_path))[:40])
    assert tracemalloc.get_traced_memory()[1] < MEMORY
    tracemalloc.stop()
    assert len(found) > 10


def altered(told, rng):
    """A copy of a configuration in which one to three values are odd, some of them deep inside."""
    made = json.loads(json.dumps(told))
    for _ in range(rng.randint(1, 3)):
        group = made
        inner = [value for value in made.values() if isinstance(value, dict) and value]
        if inner and rng.randrange(3) == 0:
            group = rng.choice(inner)
        name = rng.choice([*group, *MORE])
        if rng.randrange(6) == 0:
            group.pop(name, None)
        else:
            group[name] = copy.deepcopy(rng.choice(ODD))
    return made
