"""The HTTP endpoints of one engine: completions, chat, models, health and metrics."""

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from mor_jax.inference.engine.engine import Engine
from mor_jax.inference.engine.request import Busy, Stopped
from mor_jax.inference.server.errors import APIError, from_busy, from_stopped
from mor_jax.inference.server.event_queue import EventDispatcher
from mor_jax.inference.server.input_processor import InputProcessor, ProcessedInput
from mor_jax.inference.server.limits import Limits
from mor_jax.inference.server.metrics import ServerMetrics
from mor_jax.inference.server.middleware import ENDPOINTS, Middleware, RequestRecord
from mor_jax.inference.server.responses import HTTPResponse, send_bytes, send_json
from mor_jax.inference.server.serving import Generation

Handler = Callable[[Scope, Receive, Send], object]

# Few: tokenizers use all cores for a batch by themselves.
_TOKENIZER_THREADS = 2

_MAX_RETRY_AFTER = 30.0

# Weight of the newest value in the moving average of slot times.
_EMA_WEIGHT = 0.05


class ApiApp:
    """An engine's HTTP endpoints. `app` is the ASGI application.

    draining: why requests are no longer accepted; "" while they are.
    """

    def __init__(self, engine: Engine, limits: Limits, keys: Sequence[bytes] = ()) -> None:
        """Raises `ValueError` if the model's chat template cannot be read."""
        limits.validate()
        # A request with more choices than the queue holds could never be accepted.
        max_choices = min(limits.max_choices, engine.cfg.max_waiting)
        limits = dataclasses.replace(limits, max_choices=max_choices)
        self._engine, self._limits = engine, limits
        self._model = engine.model
        self._input_processor = InputProcessor(engine.model, engine.max_length, limits)
        self._threads = ThreadPoolExecutor(_TOKENIZER_THREADS, "prepare")
        self._dispatcher: EventDispatcher | None = None
        self._generations: set[Generation] = set()
        # Moving average of the seconds that a sequence has its slot, for Retry-After.
        self._mean_slot_seconds: float | None = None
        self.draining = ""
        self.metrics = ServerMetrics(engine.statistics, self._model.name)
        routes = [
            Route("/v1/completions", _SingleMethod("POST", self._completions)),
            Route("/v1/chat/completions", _SingleMethod("POST", self._chat)),
            Route("/v1/models", _SingleMethod("GET", self._list_models)),
            Route("/v1/models/{name:path}", _SingleMethod("GET", self._retrieve_model)),
            Route("/health", _SingleMethod("GET", self._get_health)),
            Route("/metrics", _SingleMethod("GET", self._get_metrics)),
        ]
        router = Router(routes, redirect_slashes=False, default=_not_found)
        self.app: ASGIApp = Middleware(
            router, limits, self.metrics, keys, lambda: bool(self.unavailable_reason)
        )

    @property
    def unavailable_reason(self) -> str:
        """Why requests are rejected at present; "" if they are accepted."""
        return self.draining or ("the engine has failed" if self._engine.failure else "")

    @property
    def supports_chat(self) -> bool:
        """Whether the model's tokenizer has a chat template."""
        return self._input_processor.supports_chat

    def cancel_all(self) -> None:
        """Cancels all running requests. Call it on the event loop's thread."""
        for generation in tuple(self._generations):
            generation.stop()

    async def _completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._generate(scope, receive, send, self._input_processor.completion)

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._generate(scope, receive, send, self._input_processor.chat)

    async def _generate(
        self, scope: Scope, receive: Receive, send: Send, process: Callable[[bytes], ProcessedInput]
    ) -> None:
        record: RequestRecord = scope["state"]["record"]
        body = await scope["state"]["body"].read(scope)
        self._check_available()
        arrived = time.perf_counter()
        loop = asyncio.get_running_loop()
        processed = await loop.run_in_executor(self._threads, process, body)
        del body
        record.prompt_tokens = sum(processed.prompt_tokens)
        self._dispatcher = self._dispatcher or EventDispatcher(loop)
        generation = Generation(self._engine, self._dispatcher, self._limits, self.metrics)
        self._generations.add(generation)
        try:
            self._submit(generation, processed.after(time.perf_counter() - arrived))
            answer = HTTPResponse(processed, generation, record.request_id, self._model.name)
            await answer.send(receive, send, self._limits.ping)
            for seconds in generation.slot_seconds:
                mean = seconds if self._mean_slot_seconds is None else self._mean_slot_seconds
                self._mean_slot_seconds = mean + _EMA_WEIGHT * (seconds - mean)
        finally:
            generation.close("given_up")
            self._generations.discard(generation)
            record.tokens, record.first_token_seconds = (
                generation.tokens,
                generation.first_token_seconds,
            )
            # For a rejected request the error's own code says more.
            record.reason = generation.reason if generation.reason != "refused" else ""

    def _submit(self, generation: Generation, processed: ProcessedInput) -> None:
        # The server may have started to shut down during tokenisation.
        self._check_available()
        try:
            generation.submit(processed.requests, processed.echoes)
        except Busy as error:
            now = self._engine.statistics()
            # 0 until the first sequence has finished.
            wait = (self._mean_slot_seconds or 0.0) * (now.waiting + 1) / max(now.slots, 1)
            raise from_busy(error, min(wait, _MAX_RETRY_AFTER)) from None
        except Stopped as error:
            raise from_stopped(error) from None

    def _check_available(self) -> None:
        if self.unavailable_reason:
            raise APIError(503, self.unavailable_reason, code="stopped", retry_after=5)

    async def _list_models(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(send, 200, {"object": "list", "data": [self._model_card()]})

    async def _retrieve_model(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path_params"]["name"] != self._model.name:
            message = f"unknown model. This server has {self._model.name}"
            raise APIError(404, message, param="model", code="model_not_found")
        await send_json(send, 200, self._model_card())

    def _model_card(self) -> dict[str, object]:
        entry = {"id": self._model.name, "object": "model", "created": self._model.created}
        return entry | {"owned_by": "mor_jax", "max_model_len": self._engine.max_length}

    async def _get_health(self, scope: Scope, receive: Receive, send: Send) -> None:
        reason = self.unavailable_reason
        await send_json(send, 503 if reason else 200, {"status": reason or "ok"})

    async def _get_metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {"content-type": "text/plain; version=0.0.4; charset=utf-8"}
        await send_bytes(send, 200, headers, self.metrics.render())


class _SingleMethod:
    """ASGI application of an endpoint that allows one HTTP method."""

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
    raise APIError(404, f"unknown path. Use one of {', '.join(ENDPOINTS)}", code="not_found")
