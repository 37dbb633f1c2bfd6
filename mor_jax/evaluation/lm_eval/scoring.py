"""Log-likelihoods of continuations, under causal routing, in a few static shapes.

Batches are padded to one size and one of a few lengths, so that only a few functions are compiled.
Padding is never routed or attended to, and sequences are independent: the score of a request
depends on the other requests of its batch by rounding only, because matrix products of other shapes
add up in another order.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mor_jax.config import MeshConfig, ModelConfig
from mor_jax.distributed import mesh as sharding
from mor_jax.distributed.collectives import shard_map_over_batch
from mor_jax.distributed.mesh import param_specs, spec_of
from mor_jax.models.layers.embedding import unembed
from mor_jax.models.params import abstract_params, forward, logical_axes, logits_table
from mor_jax.models.routing.router import Route
from mor_jax.runtime.free_memory import CheckedFunction
from mor_jax.training.losses import token_losses
from mor_jax.types import IGNORE, Array, Batch, Bool, Float, Int, Params

Pair = tuple[Sequence[int], Sequence[int]]
Answer = tuple[float, bool]

_AUTO_TOKENS, _AUTO_ROWS = 2**14, 64
"""Most tokens and sequences of a batch whose size is automatic."""

_SHORTEST = 32
_WINDOW = 32
"""Logits are computed for this many last positions, or for whole sequences."""

_ALTERNATIVES = 8
"""Last tokens scored with one sequence: answers to a question often differ in that token only."""

_LOGITS = 2**26
"""Logits materialised at one time."""


class _Row(NamedTuple):
    """One sequence. inputs: tokens of the model's input. scored: targets before the last one.
    last: alternatives for the last target, each with the index of its request."""

    inputs: tuple[int, ...]
    scored: int
    last: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class ScoringBatch:
    """A batch, int32: tokens [b l], lengths [b], targets of the last w positions without the very
    last [b w], alternatives for the last [b k]."""

    tokens: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray
    last: np.ndarray


class Scorer:
    """Scores continuations with one model; shards the batch over devices, replicates parameters.

    batch_size: sequences, rounded up to a multiple of the devices; None: up to 16,384 tokens.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: Params,
        thresholds: tuple[float, ...] | None,
        max_length: int,
        batch_size: int | None = None,
    ) -> None:
        self._mesh = sharding.make_mesh(MeshConfig(fsdp=1))
        where = sharding.param_shardings(self._mesh, logical_axes(cfg), abstract_params(cfg))
        self._params = jax.device_put(params, where)
        self._score = _scoring_function(cfg, thresholds, self._mesh)
        self._max_length, self._batch_size = max_length, batch_size
        self._chunk = cfg.vocab_size

    def scores(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Answer]]:
        """(index of the pair, (log-likelihood in nats, whether greedy decoding gives it)), batch
        by batch, longest sequences first. Sequences that are too long are truncated on the left.

        pairs: context, at least one token, and continuation, 1 .. max_length tokens.
        """
        waiting: list[tuple[list[_Row], Any]] = []
        for part, batch in self._batches(_grouped(pairs, self._max_length)):
            waiting.append((part, self._run(batch)))
            # The device runs the next batch while the results of the last one are read.
            if len(waiting) > 1:
                yield from _answers(*waiting.pop(0))
        for part, found in waiting:
            yield from _answers(part, found)

    def _batches(self, rows: list[_Row]) -> Iterator[tuple[list[_Row], ScoringBatch]]:
        """Batches of sequences of similar length, the longest first."""
        short = [row for row in rows if row.scored < _WINDOW]
        long = [row for row in rows if row.scored >= _WINDOW]
        for some in (short, long):
            left = sorted(some, key=lambda row: -len(row.inputs))
            few = 1 << max(len(left) - 1, 0).bit_length()
            while left:
                length = _bucket(len(left[0].inputs), self._max_length)
                window = min(_WINDOW, length) if some is short else length
                size = self.batch_rows(length, few)
                part, left = left[:size], left[size:]
                yield part, _padded(part, size, length, window)

    def batch_rows(self, length: int, most: int) -> int:
        """Sequences per batch at this length, about `most` at most."""
        size = self._batch_size or max(1, min(_AUTO_ROWS, _AUTO_TOKENS // length))
        size = min(size, most)
        devices = self._mesh.size
        return -(-size // devices) * devices

    def _run(self, rows: ScoringBatch) -> Any:
        chunk = max(1, _LOGITS // (rows.tokens.shape[0] * self._chunk))
        where = sharding.batch_sharding(self._mesh)
        with jax.set_mesh(self._mesh):
            arrays = jax.device_put((rows.tokens, rows.lengths, rows.targets, rows.last), where)
            return self._score(self._params, *arrays, chunk=min(chunk, rows.targets.shape[1]))


@functools.lru_cache(maxsize=8)
def _scoring_function(
    cfg: ModelConfig, thresholds: tuple[float, ...] | None, mesh: Mesh
) -> CheckedFunction:
    """The scoring function, compiled once per model, shape and mesh, for any weights."""
    route = Route(mode="causal", thresholds=thresholds)

    def run(
        params: Params,
        tokens: Int[Array, "b l"],
        lengths: Int[Array, "b"],
        targets: Int[Array, "b w"],
        last: Int[Array, "b k"],
        chunk: int,
    ) -> tuple[Float[Array, "b w"], Float[Array, "b k"], Bool[Array, "b"], Int[Array, "b"]]:
        def mine(params: Params, tokens: Array, lengths: Array, targets: Array, last: Array) -> Any:
            places = jnp.arange(tokens.shape[1])[None]
            segments = (places < lengths[:, None]).astype(jnp.int32)
            unread = jnp.full_like(tokens, IGNORE)
            hidden = forward(cfg, params, Batch(tokens, unread, segments), route).hidden
            window = lengths[:, None] + jnp.arange(-targets.shape[1], 0)[None]
            hidden = jnp.take_along_axis(hidden, jnp.maximum(window, 0)[..., None], axis=1)
            table = logits_table(cfg, params)
            ce, hit = token_losses(hidden, table, targets, chunk)
            logits = unembed(hidden[:, -1], table)
            log_p = jax.nn.log_softmax(logits, axis=-1)
            greedy = jnp.all(hit | (targets == IGNORE), axis=1)
            found = jnp.take_along_axis(log_p, last, axis=1)
            return ce, found, greedy, jnp.argmax(logits, axis=-1)

        rows = spec_of(("batch",))
        cut = param_specs(logical_axes(cfg))
        return shard_map_over_batch(mine, (cut, rows, rows, rows, rows), rows)(
            params, tokens, lengths, targets, last
        )

    return CheckedFunction(run, "batch_size")


def _grouped(pairs: Sequence[Pair], max_length: int) -> list[_Row]:
    """Sequences that score all pairs; pairs that differ only in the last token share one."""
    rows: list[_Row] = []
    open_rows: dict[tuple[tuple[int, ...], int], _Row] = {}
    for number, (context, continuation) in enumerate(pairs):
        assert len(context) and 0 < len(continuation) <= max_length
        *inputs, last = [*context, *continuation][-(max_length + 1) :]
        key = (tuple(inputs), len(continuation) - 1)
        row = open_rows.get(key)
        if row is None or len(row.last) == _ALTERNATIVES:
            row = open_rows[key] = _Row(*key, [])
            rows.append(row)
        row.last.append((number, last))
    return rows


def _bucket(length: int, longest: int) -> int:
    """Length that a sequence is padded to: 32, 48, 64, 96, 128, ..., at most `longest`."""
    size = _SHORTEST
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, longest)


def _padded(rows: Sequence[_Row], size: int, length: int, window: int) -> ScoringBatch:
    tokens = np.zeros((size, length), np.int32)
    lengths = np.ones(size, np.int32)
    targets = np.full((size, window), IGNORE, np.int32)
    last = np.zeros((size, _ALTERNATIVES), np.int32)
    for i, row in enumerate(rows):
        lengths[i] = len(row.inputs)
        tokens[i, : lengths[i]] = row.inputs
        if row.scored:
            targets[i, -1 - row.scored : -1] = row.inputs[-row.scored :]
        last[i, : len(row.last)] = [token for _, token in row.last]
    return ScoringBatch(tokens, lengths, targets, last)


def _answers(rows: Sequence[_Row], found: Any) -> Iterator[tuple[int, Answer]]:
    ce, last, greedy, best = (np.asarray(x) for x in jax.device_get(found))
    # Summed in single precision, a long text would be off by more than 1e-4.
    before = ce.sum(axis=1, dtype=np.float64)
    for i, row in enumerate(rows):
        for k, (number, token) in enumerate(row.last):
            value = float(last[i, k] - before[i])
            yield number, (value, bool(greedy[i]) and int(best[i]) == token)
