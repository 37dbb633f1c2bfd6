"""Serves a model over HTTP with OpenAI's API.

    mor serve --workdir=runs/mor
    mor serve --workdir=runs/mor --host=0.0.0.0 --port=8000 --slots=64 --cache=8GB \\
        --api_key_file=keys.txt
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"prompt": "Once upon a time", "max_tokens": 32}'

SIGTERM or Ctrl-C finishes running answers (--drain) and exits with code 0. docs/serving.md.
"""

import argparse
import functools
import importlib.util
import sys
from typing import TYPE_CHECKING

from mor_jax.cli import option_names
from mor_jax.cli.parser import CommandParser
from mor_jax.runtime import exit_codes, platform
from mor_jax.runtime.preemption import Signals

if TYPE_CHECKING:
    from mor_jax.inference.server.limits import Limits

_PATHS = {
    **{f"engine.{name}": name for name in ("slots", "max_length", "max_waiting", "dtype")},
    "engine.cache_bytes": "cache",
    "limits.timeout": "timeout",
    "limits.drain": "drain",
    "limits.max_requests": "max_requests",
    "limits.max_body": "max_body",
    "limits.max_choices": "max_choices",
    "limits.write_timeout": "write_timeout",
    "limits.keep_alive": "keep_alive",
}
"""Options whose names differ from their settings."""

NEEDED = ("httptools", "jinja2", "prometheus_client", "starlette", "uvicorn")


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        fix = "pip install -c requirements.lock -r requirements-serve.txt"
        print(f"error: {', '.join(missing)} not installed. Try {fix}", file=sys.stderr)
        return exit_codes.ERROR
    platform.use_cpu_without_accelerator()
    try:
        option_names.check_filled(options, "calibration", "workdir")
        return _serve(options)
    except ValueError as error:
        names = option_names.options(options, _PATHS)
        print(f"error: {option_names.as_typed(error, names)}", file=sys.stderr)
        return exit_codes.of(error)
    except MemoryError:
        print("error: not enough memory. Give a smaller --cache or --slots", file=sys.stderr)
        return exit_codes.ERROR


def _serve(options: argparse.Namespace) -> int:
    from mor_jax.config import parsing
    from mor_jax.inference.engine.engine import Engine, EngineConfig
    from mor_jax.inference.load_model import load_model
    from mor_jax.inference.server.api_server import Server, address, bind, run
    from mor_jax.inference.server.app import ApiApp
    from mor_jax.inference.server.startup import announce, log_to_stderr, read_keys

    limits = _limits(options)
    keys = read_keys(options.api_key_file)
    cache_bytes = None if options.cache is None else parsing.parse_bytes("cache", options.cache)
    cfg = EngineConfig(
        slots=options.slots,
        cache_bytes=cache_bytes,
        max_length=options.max_length,
        max_waiting=options.max_waiting,
        dtype=options.dtype,
        # Compiling would hold up every answer under way.
        warm=True,
    )
    log_to_stderr()
    # Before anything that takes long: an address in use is reported at once.
    bound = bind(options.host, options.port)
    served = load_model(
        options.workdir,
        step=options.step,
        calibration=options.calibration,
        recursions=options.recursions,
    )
    with Engine(served, cfg) as engine:
        api = ApiApp(engine, limits, keys)
        url = address(bound)
        ready = functools.partial(announce, engine, url, api.supports_chat, len(keys))
        return run(Server(api, engine, limits, ready), bound)


def _limits(options: argparse.Namespace) -> "Limits":
    from mor_jax.config.parsing import parse_bytes
    from mor_jax.inference.server.limits import Limits

    limits = Limits(
        timeout=options.timeout,
        drain=options.drain,
        max_requests=options.max_requests,
        max_body=parse_bytes("max_body", options.max_body),
        max_choices=options.max_choices,
        write_timeout=options.write_timeout,
        keep_alive=options.keep_alive,
    )
    limits.validate()
    return limits


def _parser() -> CommandParser:
    parser = CommandParser(__doc__)
    add = parser.add_argument
    add("--workdir", required=True, help="run directory")
    add("--step", type=int, help="step of the checkpoint; default: the newest good one")
    add("--calibration", help="name or file of thresholds made by mor calibrate")
    add("--recursions", type=int, help="number of recursions to run; default: as trained")
    add("--host", default="127.0.0.1", help="default: %(default)s; 0.0.0.0 for every interface")
    add("--port", type=int, default=8000, help="default: %(default)s; 0 takes a free one")
    add(
        "--slots",
        type=int,
        help="sequences that decode together; default: as many as the cache holds",
    )
    add("--cache", help="memory of the KV cache, such as 2GB; default: 32 full contexts")
    add("--max_length", type=int, help="tokens of prompt and answer; default: the model's context")
    add("--dtype", choices=("float32", "bfloat16"), help="default: the model's; float32 on CPUs")
    add(
        "--max_waiting",
        type=int,
        default=1024,
        help="largest number of waiting requests; default: %(default)s",
    )
    add(
        "--timeout",
        type=float,
        default=600.0,
        help="time limit of a request in seconds; default: 600",
    )
    add("--drain", type=float, default=30.0, help="seconds to finish running answers at shutdown")
    add("--api_key_file", help="file with one key per line; or set MOR_API_KEY")
    add(
        "--max_requests",
        type=int,
        default=2048,
        help="largest number of concurrent requests; default: %(default)s",
    )
    add("--max_choices", type=int, default=128, help="largest n of a request; default: %(default)s")
    add("--max_body", default="2MB", help="largest request body; default: %(default)s")
    add(
        "--write_timeout",
        type=float,
        default=30.0,
        help="seconds after which a client that does not read is disconnected",
    )
    add("--keep_alive", type=float, default=75.0, help="idle seconds of a connection; default: 75")
    return parser


if __name__ == "__main__":
    # The running server handles signals itself.
    with Signals("no request was accepted", "Run the same command again", exit_codes.OK):
        sys.exit(main())
