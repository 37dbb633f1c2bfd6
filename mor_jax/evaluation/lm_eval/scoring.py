"""Log-likelihoods of continuations, under causal routing, in a few static shapes.

Batches are filled up to one size and one of few lengths, so that a handful of programs is
compiled. Filling is never routed nor attended to and rows never meet: what a request scores depends
on the batch and on the requests beside it by rounding alone, because products of other shapes are
added up in another order.
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
"""Tokens and rows that a batch holds at most where its size is left to us."""

_SHORTEST = 32
_WINDOW = 32
"""Logits are made for so many last positions, or for whole rows."""

_ALTERNATIVES = 8
"""Last tokens that one row is scored with: answers to one question often differ in that alone."""

_LOGITS = 2**26
"""Logits that exist at one time."""


class _Row(NamedTuple):
    """inputs: what the model reads. scored: last tokens of it that are targets, without the very
    last one. last: alternatives for that one, each with the number of its request."""

    inputs: tuple[int, ...]
    scored: int
    last: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class ScoringBatch:
    """A batch: tokens [b l], their number [b], targets of the last w positions but one [b w], and
    alternatives for the last [b k]. int32."""

    tokens: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray
    last: np.ndarray


class Scorer:
    """Scores continuations with one model; every device takes rows and holds all parameters.

    batch_size: rows, raised to a multiple of the devices; None: as many as make 16,384 tokens.
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
        self._program = _program(cfg, thresholds, self._mesh)
        self._max_length, self._batch_size = max_length, batch_size
        self._chunk = cfg.vocab_size

    def scores(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Answer]]:
        """(number of the pair, (log-likelihood in nats, whether greedy decoding gives it)), batch
        by batch, longest rows first. Of rows that are too long the end is read.

        pairs: context, at least one token, and continuation, 1 .. max_length tokens.
        """
        waiting: list[tuple[list[_Row], Any]] = []
        for part, filled in self._batches(_grouped(pairs, self._max_length)):
            waiting.append((part, self._run(filled)))
            # The next batch is on its way while the last one's results are read.
            if len(waiting) > 1:
                yield from _answers(*waiting.pop(0))
        for part, found in waiting:
            yield from _answers(part, found)

    def _batches(self, rows: list[_Row]) -> Iterator[tuple[list[_Row], ScoringBatch]]:
        """Rows of about the same length together, the longest first."""
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
                yield part, _filled(part, size, length, window)

    def batch_rows(self, length: int, most: int) -> int:
        """Rows of a batch of this length, about `most` at most."""
        size = self._batch_size or max(1, min(_AUTO_ROWS, _AUTO_TOKENS // length))
        size = min(size, most)
        devices = self._mesh.size
        return -(-size // devices) * devices

    def _run(self, rows: ScoringBatch) -> Any:
        chunk = max(1, _LOGITS // (rows.tokens.shape[0] * self._chunk))
        where = sharding.batch_sharding(self._mesh)
        with jax.set_mesh(self._mesh):
            arrays = jax.device_put((rows.tokens, rows.lengths, rows.targets, rows.last), where)
            return self._program(self._params, *arrays, chunk=min(chunk, rows.targets.shape[1]))


@functools.lru_cache(maxsize=8)
def _program(cfg: ModelConfig, thresholds: tuple[float, ...] | None, mesh: Mesh) -> CheckedFunction:
    """Compiled once for a model and a shape, whichever weights come; `mesh` tells devices apart."""
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
    """Rows that answer all pairs; those that differ in the last token alone share one."""
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
    """The length that a row is filled up to: 32, 48, 64, 96, 128, ..., at most `longest`."""
    size = _SHORTEST
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, longest)


def _filled(rows: Sequence[_Row], size: int, length: int, window: int) -> ScoringBatch:
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
    # Of a long text a sum in single precision is off by more than a ten-thousandth.
    before = ce.sum(axis=1, dtype=np.float64)
    for i, row in enumerate(rows):
        for k, (number, token) in enumerate(row.last):
            value = float(last[i, k] - before[i])
            yield number, (value, bool(greedy[i]) and int(best[i]) == token)
