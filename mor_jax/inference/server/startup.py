"""What launch/serve.py does around a server: keys, the log, what it says when it is ready."""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mor_jax.config.parsing import check, fail
from mor_jax.inference.engine.engine import Engine

KEY_VARIABLE = "MOR_API_KEY"


def read_keys(path: str | None) -> tuple[bytes, ...]:
    """Keys that open the server: the lines of a file, else the environment's, else none.

    Raises `ValueError` if the file cannot be read or holds no key: a server that was meant to be
    closed must not stand open.
    """
    if path is None:
        given = os.environ.get(KEY_VARIABLE)
        return () if given is None else tuple(_keys(KEY_VARIABLE, given))
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail("api_key_file", path, f"cannot be read ({error})", "Give a file with a key a line")
    return tuple(_keys("api_key_file", text))


def _keys(setting: str, text: str) -> Sequence[bytes]:
    keys = [line.strip() for line in text.splitlines()]
    keys = [key for key in keys if key and not key.startswith("#")]
    # Keys are secrets: no message repeats them.
    check(bool(keys), setting, "...", "holds no key", "Write one a line, or leave it out")
    ok = all(key.isascii() and key.isprintable() and " " not in key for key in keys)
    check(ok, setting, "...", "a key has characters that no header can carry", "Use ASCII")
    return [key.encode() for key in keys]


def log_to_stderr() -> None:
    """One line a request on standard error; on a terminal with the time alone before it."""
    handler = logging.StreamHandler()
    if sys.stderr.isatty():
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%X"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("mor_jax.serve").setLevel(logging.INFO)


def announce(engine: Engine, url: str, chats: bool, keys: int) -> None:
    """Says on standard output what is served, how, and where; the address comes last."""
    served, now = engine.served, engine.statistics()
    cfg = served.cfg
    model = f"{served.name}, {cfg.num_layers} layers of width {cfg.hidden_size}"
    if cfg.num_recursions > 1:
        depth = sum(served.shares)
        model += f", {cfg.num_recursions} recursions, {depth:.2f} expected a token"
    paths = ["/v1/completions", *(["/v1/chat/completions"] if chats else [])]
    rows = {
        "model": model,
        "context": _context(engine),
        "slots": f"{now.slots}",
        "cache": f"{_size(now.cache_bytes)} in {now.pages:,} pages",
        "paths": "  ".join([*paths, "/v1/models", "/health", "/metrics"]),
        "keys": f"{keys}" if keys else "none: whoever reaches this address may ask",
    }
    console = Console(soft_wrap=True)
    if console.is_terminal:
        table = Table.grid(padding=(0, 2))
        for name, value in rows.items():
            table.add_row(Text(name, "dim"), Text(value))
        console.print(table)
        console.print(Text.assemble("serving on ", (url, "bold"), "  (Ctrl-C ends)"))
    else:
        for name, value in rows.items():
            print(f"{name}: {value}")
        print(f"serving on {url}", flush=True)


def _context(engine: Engine) -> str:
    told, whole = f"{engine.max_length} tokens, prompt and answer together", engine.served.cfg
    if engine.max_length == whole.max_seq_len or engine.cfg.max_length is not None:
        return told
    return f"{told}; the model's {whole.max_seq_len} need a larger cache"


def _size(count: int) -> str:
    return f"{count / 1e6:,.0f} MB" if count >= 10**6 else f"{count / 1e3:.0f} kB"
