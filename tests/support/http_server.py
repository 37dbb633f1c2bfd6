"""A server in a thread of the test's process, around an engine that the test made."""

import asyncio
import contextlib
import dataclasses
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from support.patience import PATIENCE, until
from support.served_runs import of_bytes, write_run

from mor_jax.inference.engine.engine import Engine, EngineConfig
from mor_jax.inference.load_model import load_model
from mor_jax.inference.server.api_server import Server, address, bind
from mor_jax.inference.server.app import ApiApp
from mor_jax.inference.server.limits import Limits

MODEL = of_bytes("expert_cycle", max_seq_len=512)
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def engine_of(workdir, **settings):
    """An engine, not started, for a small run that is written there."""
    write_run(workdir, MODEL)
    served = dataclasses.replace(load_model(workdir), chat_template=TEMPLATE)
    return Engine(served, EngineConfig(**{"slots": 4, "max_waiting": 32} | settings))


@dataclasses.dataclass
class Serving:
    """A server that runs. code: its exit code once it has ended."""

    url: str
    api: ApiApp
    server: Server
    thread: threading.Thread
    engine: Engine

    def stop(self):
        self.server.stop()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def serving(engine, limits=None, keys=()):
    """Serves until the end of the block; the engine goes on."""
    limits = limits or Limits()
    bound = bind("127.0.0.1", 0)
    api = ApiApp(engine, limits, keys)
    server = Server(api, engine, limits)
    thread = threading.Thread(target=lambda: server.run(sockets=[bound]), daemon=True)
    running = Serving(address(bound), api, server, thread, engine)
    thread.start()
    until(lambda: server.started)
    try:
        yield running
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


def idle(engine):
    """Whether nothing is at the engine."""
    now = engine.statistics()
    return now.running == now.waiting == now.pages_used == 0


def run(coroutine):
    """Result of a coroutine that has to come to an end."""
    return asyncio.run(asyncio.wait_for(coroutine, PATIENCE))
