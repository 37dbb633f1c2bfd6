"""Serves a run's model over HTTP, in the form of OpenAI's API.

    python launch/serve.py --workdir=runs/mor
    python launch/serve.py --workdir=runs/mor --host=0.0.0.0 --port=8000 --slots=64 --cache=8GB \\
        --api_key_file=keys.txt
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"prompt": "Once upon a time", "max_tokens": 32}'

SIGTERM or Ctrl-C finishes the answers under way (--drain) and ends with code 0. docs/serving.md.
"""

import argparse
import functools
import importlib.util
import sys
from typing import TYPE_CHECKING

from mor_jax.cli import option_names
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
"""Options under other names than their settings."""

NEEDED = ("httptools", "jinja2", "prometheus_client", "starlette", "uvicorn")


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        fix = "pip install -c requirements.lock -r requirements-serve.txt"
        print(f"error: {', '.join(missing)} not installed. Try {fix}", file=sys.stderr)
        return exit_codes.ERROR
    platform.skip_absent()
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
    # Before anything that takes long: an address in use is told at once.
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
        ready = functools.partial(announce, engine, url, api.chats, len(keys))
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


def _parser() -> argparse.ArgumentParser:
    about, _, more = (__doc__ or "").partition("\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, epilog=more, formatter_class=raw)
    add = parser.add_argument
    add("--workdir", required=True, help="run whose model is served")
    add("--step", type=int, help="checkpoint; default: the newest good one")
    add("--calibration", help="of launch/calibrate.py: its name, or a file")
    add("--recursions", type=int, help="to run in place of those trained")
    add("--host", default="127.0.0.1", help="default: %(default)s; 0.0.0.0 for every interface")
    add("--port", type=int, default=8000, help="default: %(default)s; 0 takes a free one")
    add("--slots", type=int, help="sequences at work at once; default: what the cache holds")
    add("--cache", help="bytes for keys and values, such as 2GB; default: 32 full contexts")
    add("--max_length", type=int, help="tokens of prompt and answer; default: the model's context")
    add("--dtype", choices=("float32", "bfloat16"), help="default: the model's; float32 on CPUs")
    add("--max_waiting", type=int, default=1024, help="texts in the queue; default: %(default)s")
    add("--timeout", type=float, default=600.0, help="seconds an answer may take; default: 600")
    add("--drain", type=float, default=30.0, help="seconds to finish answers when told to end")
    add("--api_key_file", help="file with a key a line; or set MOR_API_KEY")
    add("--max_requests", type=int, default=2048, help="requests at once; default: %(default)s")
    add("--max_choices", type=int, default=128, help="answers to a request; default: %(default)s")
    add("--max_body", default="2MB", help="largest request; default: %(default)s")
    add("--write_timeout", type=float, default=30.0, help="seconds an answer may lie unread")
    add("--keep_alive", type=float, default=75.0, help="seconds a connection may idle; default: 75")
    return parser


if __name__ == "__main__":
    # Once it serves the server listens to signals itself.
    with Signals("no request was taken", "The same command serves", exit_codes.OK):
        sys.exit(main())
