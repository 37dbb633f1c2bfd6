"""How fast each model could be served at best: what its FLOPs and its bytes allow on a machine.

Everything that an answer token needs is added up, its share of the prompt included: the products of
its layers and of the output matrix at the rate that this machine reaches with as many rows as one
call has, and attention. That is counted twice. Bare: at the rate of large products, or as fast as
the stored keys and values can be read from memory, whichever takes longer. Measured: at the rate
that the engine's own attention reaches by itself, softmax and gathering of pages included. Nothing
else is counted: no norms, routing, sampling, writing of pages, scheduling. The ratio of two models
is what they would differ by if all of that were free.

A routed model advances all its sequences by one recursion a tick. A token that has finished leaves
and its successor enters in the same tick: with B rows and P passes a token, B / P of them.
"""

import bisect
import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mor_jax.config import ModelConfig
from mor_jax.inference.engine.model_runner import CHUNK_TOKENS
from mor_jax.models.decode.attention import Extent, Queue, Softmax, by_list, by_queue
from mor_jax.models.decode.paged_cache import KVCacheSpec, Pages
from mor_jax.models.param_count import key_value_weights, layer_weights
from mor_jax.types import Array

_ITEMSIZE = {"bfloat16": 2, "float32": 4}
_ROWS = (1, 4, 8, 12, 16, 24, 32, 64, 128, 256, 512)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """rates: rows of a product and the FLOP/s reached with them. bandwidth: bytes/s of reading.

    decoding: bytes/s of keys and values through the engine's attention, 32 sequences of 384 tokens.
    prefill: FLOP/s of its attention for the second 128 tokens of a prompt.
    """

    rates: tuple[tuple[int, float], ...]
    bandwidth: float
    decoding: float
    prefill: float

    def rate(self, rows: float) -> float:
        """FLOP/s of products with so many rows; between two that were measured, on a line."""
        after = bisect.bisect_left([measured for measured, _ in self.rates], rows)
        if after in (0, len(self.rates)):
            return self.rates[min(after, len(self.rates) - 1)][1]
        (low, slow), (high, fast) = self.rates[after - 1 : after + 1]
        return slow + (fast - slow) * (rows - low) / (high - low)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """batch: sequences at a time. prompt, answer: mean tokens. piece: prompt tokens of one call."""

    batch: float
    prompt: float
    answer: float
    piece: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """What one token needs of some layers, or of the output matrix.

    products: FLOPs in calls of `rows` rows. attention: FLOPs. read: bytes of keys and values.
    decodes: each sequence reads its own; otherwise many tokens of one read them together.
    """

    products: float
    rows: float
    attention: float = 0.0
    read: float = 0.0
    decodes: bool = True

    @property
    def flops(self) -> float:
        """All of them."""
        return self.products + self.attention

    def seconds(self, machine: Machine, *, bare: bool) -> float:
        """Least time. bare: attention as fast as products and memory are, not as it is."""
        if bare:
            fastest = machine.rates[-1][1]
            attention = max(self.attention / fastest, self.read / machine.bandwidth)
        elif self.decodes:
            attention = self.read / machine.decoding
        else:
            attention = self.attention / machine.prefill
        return self.products / machine.rate(self.rows) + attention

    def times(self, number: float) -> "Part":
        """Of so many tokens."""
        names = ("products", "attention", "read")
        return dataclasses.replace(self, **{name: number * getattr(self, name) for name in names})


def per_token(cfg: ModelConfig, shares: tuple[float, ...], traffic: Traffic) -> list[Part]:
    """Everything that an answer token needs.

    shares: of all tokens, those that go through each recursion; (1,) for a plain model.
    """
    context = traffic.prompt + traffic.answer / 2
    decoding = _layers(cfg, shares, traffic.batch, (context, 1))
    turning = traffic.batch / (max(1.0, sum(shares)) if cfg.sharing != "none" else 1.0)
    head = Part(products=2.0 * cfg.hidden_size * cfg.vocab_size, rows=turning)
    piece = min(traffic.piece, traffic.prompt)
    prefill = _layers(cfg, shares, piece, (traffic.prompt / 2, piece))
    scale = traffic.prompt / traffic.answer
    return [*decoding, head, *(part.times(scale) for part in prefill)]


def seconds(parts: list[Part], machine: Machine, *, bare: bool) -> float:
    """Least time of all. bare: as for `Part.seconds`."""
    return sum(part.seconds(machine, bare=bare) for part in parts)


def flops(parts: list[Part]) -> float:
    """FLOPs of all."""
    return sum(part.flops for part in parts)


def _layers(
    cfg: ModelConfig, shares: tuple[float, ...], rows: float, seen: tuple[float, float]
) -> list[Part]:
    """One token through all layers. seen: tokens before it, and tokens that read them together."""

    def part(layers: int, share: float, rows: float, keys: float, fresh: bool = True) -> Part:
        weights = layer_weights(cfg) - (0 if fresh else key_value_weights(cfg))
        heads, entry = cfg.num_heads * cfg.head_dim, 2 * cfg.num_kv_heads * cfg.head_dim
        return Part(
            products=2.0 * share * layers * weights,
            rows=rows,
            attention=4.0 * share * layers * keys * heads,
            read=share * layers * keys * entry * _ITEMSIZE[cfg.dtype] / together,
            decodes=together == 1,
        )

    context, together = seen
    if cfg.sharing == "none":
        return [part(cfg.num_layers, 1.0, rows, context)]
    own = cfg.kv_mode == "recursion"
    parts = [
        part(cfg.shared_layers, share, rows, (share if own else 1.0) * context, own or r == 0)
        for r, share in enumerate(shares)
    ]
    # A piece of a prompt stays together; in decoding only those that leave or enter turn over.
    ends = rows if together > 1 else rows / max(1.0, sum(shares))
    return [*parts, part(2 * cfg.is_middle, 1.0, ends, context)]


def measure(cfg: ModelConfig) -> Machine:
    """What this machine does with the weights of 32 layers of the model's width, unshared."""
    dtype, layers = jnp.dtype(cfg.dtype), 32
    stack = jnp.ones((layers, cfg.hidden_size, 3 * cfg.intermediate_size), dtype)

    def through(x: Array, stack: Array) -> Array:
        def layer(total: Array, weights: Array) -> tuple[Array, None]:
            return total + jnp.sum(x @ weights), None

        return jax.lax.scan(layer, jnp.zeros((), dtype), stack)[0]

    products, best = jax.jit(through), 0.0
    rates = []
    for rows in _ROWS:
        x = jnp.ones((rows, cfg.hidden_size), dtype)
        rate = 2.0 * rows * stack.size / _fastest(lambda x=x: products(x, stack))
        # More rows are never slower, but for noise.
        best = max(best, rate)
        rates.append((rows, round(best)))
    # Larger than any cache of the processor.
    large = jnp.ones((1 << 28,), jnp.float32)
    total = jax.jit(jnp.sum)
    bandwidth = round(large.nbytes / _fastest(lambda: total(large), 3))
    return Machine(
        rates=tuple(rates),
        bandwidth=bandwidth,
        decoding=round(_decoding(cfg)),
        prefill=round(_prefill(cfg)),
    )


_PAGE, _LAYERS, _QUERIES = 32, 8, 128


def _pages(cfg: ModelConfig, tokens: int) -> tuple[Pages, ...]:
    """Pages of some layers, together larger than the processor's caches."""
    pool = KVCacheSpec(dataclasses.replace(cfg, num_layers=_LAYERS), _PAGE)
    return pool.cache(0, tokens // _PAGE).block


def _decoding(cfg: ModelConfig) -> float:
    """Bytes a second that the attention of decoding goes through."""
    rows, length = 32, 384
    layers = _pages(cfg, rows * length)
    q = jnp.ones(
        (rows, cfg.num_kv_heads, cfg.num_heads // cfg.num_kv_heads, cfg.head_dim), cfg.dtype
    )
    lists = jnp.arange(rows * length // _PAGE, dtype=jnp.int32).reshape(rows, -1)

    @jax.jit
    def through(layers: tuple[Pages, ...], q: Array) -> Array:
        queue = Queue.of(lists, jnp.full(rows, length), _PAGE, _chunk())
        for pages in layers:
            # Each layer waits for the one before, as it does in a model.
            q = by_queue(Softmax.empty(q), q, pages, queue).result(q.dtype)
        return q

    size = sum(leaf.nbytes for leaf in jax.tree.leaves(layers))
    return size / _fastest(lambda: through(layers, q))


def _prefill(cfg: ModelConfig) -> float:
    """FLOP/s of attention while the second piece of a prompt is stored."""
    layers = _pages(cfg, 2 * _QUERIES)
    q = jnp.ones(
        (_QUERIES, cfg.num_kv_heads, cfg.num_heads // cfg.num_kv_heads, cfg.head_dim), cfg.dtype
    )
    lengths = _QUERIES + 1 + jnp.arange(_QUERIES, dtype=jnp.int32)
    extent = Extent(jnp.arange(2 * _QUERIES // _PAGE, dtype=jnp.int32), lengths, _chunk())

    @jax.jit
    def through(layers: tuple[Pages, ...], q: Array) -> Array:
        for pages in layers:
            q = by_list(Softmax.empty(q), q, pages, extent).result(q.dtype)
        return q

    flops = 4.0 * float(jnp.sum(lengths)) * cfg.num_heads * cfg.head_dim * _LAYERS
    return flops / _fastest(lambda: through(layers, q))


def _chunk() -> int:
    return max(1, CHUNK_TOKENS.get(jax.default_backend(), 16384) // _PAGE)


def _fastest(call: Callable[[], Array], rounds: int = 5) -> float:
    """Seconds of the fastest of some calls, after one that compiles."""
    taken = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - start)
    return min(taken[1:])
