"""Does the server stand what clients do to it?

    python benchmarks/serve_load.py --workdir=runs/quickstart
    python benchmarks/serve_load.py --url=http://127.0.0.1:8000

Against launch/serve.py, started here for the run in --workdir, or already listening at --url:

- crowd: --clients connections at the same moment, each with its own prompt and seed. Every answer
  has to be whole, and the same as when it is asked for alone.
- soak: --requests texts of random lengths, a third given up by their client at a random moment.
  Afterwards slots, queue, pages and the process's memory have to be where they were.
- stalled: clients that never read, beside others that do. The others must not wait for them, and
  what the stalled ones hold is given back.

One JSON line for each; exit code 1 if something did not hold.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import timing
from serve_client import TEXT, Connection, numbers, post

ROOT = Path(__file__).resolve().parent.parent
HELD = ("mor_engine_running", "mor_engine_waiting", "mor_cache_pages_used")
WORDS = ("def", "return", "the", "value", "of", "class", "import", "self", "for", "in", "\n")


def main(argv: list[str] | None = None) -> int:
    """Runs the questions one after the other."""
    options = _parser().parse_args(argv)
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(files, min(most, 8192)), most))
    with contextlib.ExitStack() as stack:
        url, pid = options.url, None
        if url is None:
            command = [f"--workdir={options.workdir}", f"--slots={options.slots}"]
            url, pid = stack.enter_context(started([*command, *options.serve]))
        rows = asyncio.run(_questions(url, pid, options))
    for row in rows:
        timing.report("serve_load", row, save=options.save)
    return 0 if all(row["holds"] for row in rows) else 1


async def _questions(url: str, pid: int | None, options: argparse.Namespace) -> list[dict]:
    return [
        await crowd(url, options.clients, options.seed),
        await soak(url, pid, options.requests, options.at_once, options.seed),
        await stalled(url, options.stalled, options.seed),
    ]


@contextlib.contextmanager
def started(arguments: list[str]) -> Iterator[tuple[str, int]]:
    """A server on a free port: its address and process. Asked to end afterwards, waited for."""
    command = [sys.executable, str(ROOT / "launch" / "serve.py"), "--port=0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.match(r"serving on (\S+)", line):
                break
        else:
            raise RuntimeError(f"{' '.join(command)} ended with code {process.wait()}")
        try:
            yield found[1], process.pid
        finally:
            process.terminate()
            # The server's own limits end it long before.
            if process.wait(3600):
                raise RuntimeError(f"the server ended with code {process.returncode}")


def question(rng: random.Random, longest: int) -> dict[str, Any]:
    """A request with random prompt, length and seed."""
    prompt = " ".join(rng.choices(WORDS, k=rng.randint(1, 20)))
    wanted = {"max_tokens": rng.randint(1, longest), "seed": rng.randrange(2**32)}
    return {"prompt": prompt, "temperature": 1.0, "ignore_eos": True, **wanted}


async def answer(url: str, asked: dict[str, Any], leave_after: int | None = None) -> str | None:
    """The streamed text; None if the client was made to leave after that many characters."""
    body = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    while True:
        async with Connection(url) as connection:
            await connection.ask(TEXT, json.dumps(body).encode())
            if await connection.head() == 200:
                return await _streamed(connection, asked["max_tokens"], leave_after)
            problem = await connection.body()
            if connection.status != 429:
                raise RuntimeError(f"{connection.status}: {problem.decode()}")
            wait = float(connection.headers["retry-after"])
        # The server has closed that connection, as it said with the refusal.
        await asyncio.sleep(wait * random.random())


async def _streamed(connection: Connection, wanted: int, leave_after: int | None) -> str | None:
    texts, tokens = [], 0
    async for event in connection.events():
        if "error" in event:
            raise RuntimeError(str(event))
        texts += [choice["text"] for choice in event["choices"]]
        tokens = (event["usage"] or {}).get("completion_tokens", tokens)
        # Characters, about one a token: how many tokens come at once depends on the machine.
        if leave_after is not None and sum(map(len, texts)) >= leave_after:
            return None
    if tokens != wanted:
        raise RuntimeError(f"{tokens} tokens of {wanted}")
    return "".join(texts)


async def crowd(url: str, clients: int, seed: int, longest: int = 32) -> dict[str, Any]:
    """All at once, then some of them again, alone."""
    rng = random.Random(seed)
    asked = [question(rng, longest) for _ in range(clients)]
    began = time.perf_counter()
    texts = await asyncio.gather(*(answer(url, one) for one in asked))
    seconds = time.perf_counter() - began
    again = rng.sample(range(clients), min(clients, 20))
    same = sum([await answer(url, asked[i]) == texts[i] for i in again])
    tokens = sum(one["max_tokens"] for one in asked)
    row = {"question": "crowd", "clients": clients, "seconds": seconds, "tokens": tokens}
    row |= {"answers": len(texts), "again": len(again), "same": same}
    return row | {"holds": len(texts) == clients and same == len(again)}


async def soak(url: str, pid: int | None, requests: int, at_once: int, seed: int) -> dict[str, Any]:
    """Random lengths and departures. Memory is compared with that after the first tenth, when all
    programs are compiled and all buffers made."""
    rng = random.Random(seed)
    kinds = [(question(rng, 64), rng.random() < 1 / 3) for _ in range(requests)]
    plans = [(one, rng.randint(0, one["max_tokens"]) if leaves else None) for one, leaves in kinds]
    before = await settled(url)
    began, tenth = time.perf_counter(), max(requests // 10, 1)
    whole = await _at_once([_job(url, *plan) for plan in plans[:tenth]], at_once)
    first = memory(pid)
    whole += await _at_once([_job(url, *plan) for plan in plans[tenth:]], at_once)
    seconds = time.perf_counter() - began
    after = await settled(url)
    grown = (memory(pid) - first) / 1e6 if pid is not None else None
    row = {"question": "soak", "requests": requests, "seconds": seconds, "whole": sum(whole)}
    stay = sum(leave is None for _, leave in plans)
    row |= {"left": requests - sum(whole), "at_once": at_once}
    row |= {name.removeprefix("mor_"): after[name] - before[name] for name in HELD}
    row |= {"grown_mb": grown}
    fine = all(after[name] == before[name] for name in HELD) and (grown is None or grown < 50)
    return row | {"holds": fine and sum(whole) >= stay}


def _job(url: str, asked: dict[str, Any], leave: int | None) -> Callable[[], Awaitable[bool]]:
    async def job() -> bool:
        return await answer(url, asked, leave) is not None

    return job


async def _at_once(jobs: list[Callable[[], Awaitable[bool]]], most: int) -> list[bool]:
    gate = asyncio.Semaphore(most)

    async def run(job: Callable[[], Awaitable[bool]]) -> bool:
        async with gate:
            return await job()

    return await asyncio.gather(*map(run, jobs))


async def settled(url: str, patience: float = 60.0) -> dict[str, float]:
    """/metrics once nothing is at work any more."""
    deadline = time.monotonic() + patience
    while True:
        now = await numbers(url)
        # This request is at work itself.
        idle = now["mor_http_requests_at_work"] <= 1
        idle = idle and now["mor_engine_running"] == now["mor_engine_waiting"] == 0
        if idle or time.monotonic() > deadline:
            return now
        await asyncio.sleep(0.05)


def memory(pid: int | None) -> int:
    """Resident bytes of the server."""
    return psutil.Process(pid).memory_info().rss if pid is not None else 0


async def stalled(url: str, clients: int, seed: int) -> dict[str, Any]:
    """Answers of others before and while clients do not read theirs."""
    rng = random.Random(seed)
    probe = question(rng, 32) | {"max_tokens": 32}
    alone = await _seconds(url, probe)
    before = await settled(url)
    async with contextlib.AsyncExitStack() as stack:
        # Alternatives make the answer long in bytes.
        greedy = {"prompt": "def", "max_tokens": 200, "ignore_eos": True, "logprobs": 20}
        for _ in range(clients):
            connection = await stack.enter_async_context(Connection(url, room=1024))
            body = {**greedy, "n": 8, "stream": True}
            await connection.ask(TEXT, json.dumps(body).encode())
        beside = await _seconds(url, probe)
        held = await settled(url)
    after = await settled(url)
    row = {"question": "stalled", "clients": clients, "seconds_alone": alone}
    row |= {"seconds_beside": beside, "pages_held": held["mor_cache_pages_used"]}
    return row | {"holds": all(after[name] == before[name] for name in HELD)}


async def _seconds(url: str, asked: dict[str, Any], times: int = 5) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        await post(url, TEXT, asked)
        taken.append(time.perf_counter() - began)
    return sorted(taken)[times // 2]


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--workdir", help="run to serve")
    where.add_argument("--url", help="server that listens already; its memory is not measured")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--at_once", type=int, default=64, help="clients of the soak")
    parser.add_argument("--stalled", type=int, default=16, help="clients that do not read")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", nargs="*", default=[], help="further flags of launch/serve.py")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
