"""Start of `mor serve`: API keys, logging, and the startup summary."""

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
    """API keys: the lines of a file, else of the environment variable, else none.

    Raises `ValueError` if the file cannot be read or has no key: a server that is meant to need
    keys must not start without them.
    """
    if path is None:
        value = os.environ.get(KEY_VARIABLE)
        return () if value is None else tuple(_keys(KEY_VARIABLE, value))
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail("api_key_file", path, f"cannot be read ({error})", "Use a file with one key per line")
    return tuple(_keys("api_key_file", text))


def _keys(setting: str, text: str) -> Sequence[bytes]:
    keys = [line.strip() for line in text.splitlines()]
    keys = [key for key in keys if key and not key.startswith("#")]
    # Keys are secrets: no message repeats them.
    check(bool(keys), setting, "...", "has no key", "Write one per line, or leave it out")
    ok = all(key.isascii() and key.isprintable() and " " not in key for key in keys)
    check(ok, setting, "...", "a key has characters not allowed in a header", "Use ASCII")
    return [key.encode() for key in keys]


def log_to_stderr() -> None:
    """Logs one line per request to standard error, with time, and level unless on a terminal."""
    handler = logging.StreamHandler()
    if sys.stderr.isatty():
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%X"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("mor_jax.serve").setLevel(logging.INFO)


def announce(engine: Engine, url: str, supports_chat: bool, keys: int) -> None:
    """Prints the model, the limits and the paths to standard output; the address comes last."""
    model, now = engine.model, engine.statistics()
    cfg = model.cfg
    description = f"{model.name}, {cfg.num_layers} layers of width {cfg.hidden_size}"
    if cfg.num_recursions > 1:
        depth = sum(model.shares)
        description += f", {cfg.num_recursions} recursions, expected depth {depth:.2f}"
    paths = ["/v1/completions", *(["/v1/chat/completions"] if supports_chat else [])]
    rows = {
        "model": description,
        "context": _context(engine),
        "slots": f"{now.slots}",
        "cache": f"{_size(now.cache_bytes)} in {now.pages:,} pages",
        "paths": "  ".join([*paths, "/v1/models", "/health", "/metrics"]),
        "keys": f"{keys}" if keys else "none: requests need no API key",
    }
    console = Console(soft_wrap=True)
    if console.is_terminal:
        table = Table.grid(padding=(0, 2))
        for name, value in rows.items():
            table.add_row(Text(name, "dim"), Text(value))
        console.print(table)
        console.print(Text.assemble("serving on ", (url, "bold"), "  (Ctrl-C stops)"))
    else:
        for name, value in rows.items():
            print(f"{name}: {value}")
        print(f"serving on {url}", flush=True)


def _context(engine: Engine) -> str:
    text, model_cfg = f"{engine.max_length} tokens, prompt and output together", engine.model.cfg
    if engine.max_length == model_cfg.max_seq_len or engine.cfg.max_length is not None:
        return text
    return f"{text}; the model's context of {model_cfg.max_seq_len} needs a larger cache"


def _size(count: int) -> str:
    return f"{count / 1e6:,.0f} MB" if count >= 10**6 else f"{count / 1e3:.0f} kB"
