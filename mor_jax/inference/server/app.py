"""The endpoints: completions, chat, models, health and metrics over one engine."""

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from mor_jax.inference.engine.engine import Engine
from mor_jax.inference.engine.request import Busy, Stopped
from mor_jax.inference.server.errors import APIError, of_busy, of_stopped
from mor_jax.inference.server.event_queue import EventQueues
from mor_jax.inference.server.input_processor import InputProcessor, ProcessedInput
from mor_jax.inference.server.limits import Limits
from mor_jax.inference.server.metrics import ServerMetrics
from mor_jax.inference.server.middleware import ENDPOINTS, Middleware, Record
from mor_jax.inference.server.responses import HTTPResponse, send_bytes, send_json
from mor_jax.inference.server.serving import Generation

Handler = Callable[[Scope, Receive, Send], object]

# Tokenizers spread a batch over the cores by themselves.
_PREPARING_THREADS = 2

_MOST_RETRY = 30.0

# Weight of the newest text in the mean of what texts take.
_NEWEST = 0.05


class ApiApp:
    """An engine's HTTP endpoints. `app` is the ASGI application.

    draining: why no request is taken any more, "" while they are.
    """

    def __init__(self, engine: Engine, limits: Limits, keys: Sequence[bytes] = ()) -> None:
        """Raises `ValueError` if the model's chat template cannot be read."""
        limits.validate()
        # More than the queue ever holds would be told to come back again and again.
        most = min(limits.max_choices, engine.cfg.max_waiting)
        limits = dataclasses.replace(limits, max_choices=most)
        self._engine, self._limits = engine, limits
        self._served = engine.served
        self._preparer = InputProcessor(engine.served, engine.max_length, limits)
        self._threads = ThreadPoolExecutor(_PREPARING_THREADS, "prepare")
        self._mailbox: EventQueues | None = None
        self._generations: set[Generation] = set()
        # Of a text in its slot, in seconds: what a client waits for a place depends on it.
        self._usual: float | None = None
        self.draining = ""
        self.measures = ServerMetrics(engine.statistics, self._served.name)
        routes = [
            Route("/v1/completions", _Only("POST", self._completions)),
            Route("/v1/chat/completions", _Only("POST", self._chat)),
            Route("/v1/models", _Only("GET", self._models)),
            Route("/v1/models/{name:path}", _Only("GET", self._model)),
            Route("/health", _Only("GET", self._health)),
            Route("/metrics", _Only("GET", self._metrics)),
        ]
        router = Router(routes, redirect_slashes=False, default=_not_found)
        self.app: ASGIApp = Middleware(
            router, limits, self.measures, keys, lambda: bool(self.trouble)
        )

    @property
    def trouble(self) -> str:
        """Why requests are turned away at present, "" if they are not."""
        return self.draining or ("the engine has failed" if self._engine.failure else "")

    @property
    def chats(self) -> bool:
        """Whether the model's tokenizer has a chat template."""
        return self._preparer.chats

    def give_up(self) -> None:
        """Ends all answers under way, at once. To be called in the event loop's thread."""
        for generation in tuple(self._generations):
            generation.stop()

    async def _completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._generate(scope, receive, send, self._preparer.completion)

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._generate(scope, receive, send, self._preparer.chat)

    async def _generate(
        self, scope: Scope, receive: Receive, send: Send, prepare: Callable[[bytes], ProcessedInput]
    ) -> None:
        record: Record = scope["state"]["record"]
        body = await scope["state"]["body"].read(scope)
        self._check_open()
        arrived = time.perf_counter()
        loop = asyncio.get_running_loop()
        prepared = await loop.run_in_executor(self._threads, prepare, body)
        del body
        record.prompt_tokens = sum(prepared.prompts)
        self._mailbox = self._mailbox or EventQueues(loop)
        generation = Generation(self._engine, self._mailbox, self._limits, self.measures)
        self._generations.add(generation)
        try:
            self._submit(generation, prepared.after(time.perf_counter() - arrived))
            answer = HTTPResponse(prepared, generation, record.number, self._served.name)
            await answer.send(receive, send, self._limits.ping)
            for seconds in generation.worked:
                usual = seconds if self._usual is None else self._usual
                self._usual = usual + _NEWEST * (seconds - usual)
        finally:
            generation.close("given_up")
            self._generations.discard(generation)
            record.tokens, record.first = generation.tokens, generation.first
            # Of a request that was turned away, the refusal's own code says more.
            record.reason = generation.reason if generation.reason != "refused" else ""

    def _submit(self, generation: Generation, prepared: ProcessedInput) -> None:
        # It may have come to an end while the prompt was read.
        self._check_open()
        try:
            generation.submit(prepared.requests, prepared.echoes)
        except Busy as error:
            now = self._engine.statistics()
            # While no text has ended yet: soon, and by then more is known.
            wait = (self._usual or 0.0) * (now.waiting + 1) / max(now.slots, 1)
            raise of_busy(error, min(wait, _MOST_RETRY)) from None
        except Stopped as error:
            raise of_stopped(error) from None

    def _check_open(self) -> None:
        if self.trouble:
            raise APIError(503, self.trouble, code="stopped", retry=5)

    async def _models(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(send, 200, {"object": "list", "data": [self._card()]})

    async def _model(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path_params"]["name"] != self._served.name:
            message = f"no such model. This server has {self._served.name}"
            raise APIError(404, message, param="model", code="model_not_found")
        await send_json(send, 200, self._card())

    def _card(self) -> dict[str, object]:
        card = {"id": self._served.name, "object": "model", "created": self._served.created}
        return card | {"owned_by": "mor_jax", "max_model_len": self._engine.max_length}

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        trouble = self.trouble
        await send_json(send, 503 if trouble else 200, {"status": trouble or "ok"})

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {"content-type": "text/plain; version=0.0.4; charset=utf-8"}
        await send_bytes(send, 200, headers, self.measures.text())


class _Only:
    """An endpoint with one method, as an ASGI application."""

    def __init__(self, method: str, handler: Handler) -> None:
        self._methods = {method, "HEAD"} if method == "GET" else {method}
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in self._methods:
            methods = sorted(self._methods)
            message, allow = f"use {' or '.join(methods)} here", ", ".join(methods)
            raise APIError(405, message, code="method_not_allowed", allow=allow)
        await self._handler(scope, receive, send)


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    raise APIError(404, f"no such path. There are {', '.join(ENDPOINTS)}", code="not_found")
