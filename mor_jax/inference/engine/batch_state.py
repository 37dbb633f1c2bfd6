"""What the device remembers of every running sequence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.inference.engine.request import Request
from mor_jax.inference.engine.sampling import SamplingArrays
from mor_jax.models.decode.paged_cache import BlockTables, KVCacheSpec
from mor_jax.models.decode.routed_decode import TokenState
from mor_jax.types import Array, Bool, Int

IDLE, ENTERS, FLIES = 0, 1, 2
"""Phases of a slot: nothing to do; a token waits for the first layer; a token waits for the block.

In a model without routers a token goes all the way at once, so nothing ever flies.
"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchState:
    """One row a slot, and one more that belongs to nobody.

    token, position: the token that is being processed. left: tokens that may still be sampled.
    filled: tokens of the prompt that are stored. counts: entries of the lists in the block's pool.
    flight: where the token stands; None for models without routers. said, heard: tokens of the
    answer (how often) and of the prompt, for penalties. ends_text: the end of a document ends it.
    """

    phase: Int[Array, "s"]
    token: Int[Array, "s"]
    position: Int[Array, "s"]
    left: Int[Array, "s"]
    filled: Int[Array, "s"]
    counts: Int[Array, "s lists"]
    flight: TokenState | None
    settings: SamplingArrays
    output_counts: Int[Array, "s v"]
    in_prompt: Bool[Array, "s v"]
    ends_text: Bool[Array, "s"]

    @classmethod
    def empty(cls, geometry: KVCacheSpec, number: int) -> "BatchState":
        """`number` slots and nobody in them."""
        cfg, s = geometry.cfg, number + 1

        def zeros() -> Array:
            # Arrays of their own: all of them are given to the device's programs for good.
            return jnp.zeros(s, jnp.int32)

        flight = None
        if cfg.router.kind != "none":
            flight = jax.tree.map(jnp.copy, TokenState.empty(cfg, s))
        return cls(
            phase=zeros(),
            token=zeros(),
            position=zeros(),
            left=zeros(),
            filled=zeros(),
            counts=jnp.zeros((s, geometry.lists), jnp.int32),
            flight=flight,
            settings=jax.tree.map(jnp.asarray, SamplingArrays.greedy(s)),
            output_counts=jnp.zeros((s, cfg.vocab_size), jnp.int16),
            in_prompt=jnp.zeros((s, cfg.vocab_size), bool),
            ends_text=jnp.zeros(s, bool),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SequenceBlocks:
    """The pages that the host has given out. room: entries that each list may hold."""

    tables: BlockTables
    room: Int[Array, "s lists"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Admission:
    """A sequence whose tokens but the last are stored. Members as in `Slots`, of one slot."""

    slot: Int[Array, ""] | np.int32
    token: Int[Array, ""] | np.int32
    position: Int[Array, ""] | np.int32
    left: Int[Array, ""] | np.int32
    settings: dict[str, np.generic | Array]
    output_counts: Int[Array, "v"] | np.ndarray
    in_prompt: Bool[Array, "v"] | np.ndarray
    ends_text: Bool[Array, ""] | np.bool_

    @classmethod
    def of(cls, request: Request, slot: int, answer: list[int], seed: int, v: int) -> "Admission":
        """Of a request whose `answer` so far is to be continued. v: size of the vocabulary."""
        tokens = [*request.prompt, *answer]
        heard = np.zeros(v, bool)
        heard[list(request.prompt)] = True
        said = np.bincount(np.asarray(answer, np.int64), minlength=v)
        return cls(
            slot=np.int32(slot),
            token=np.int32(tokens[-1]),
            position=np.int32(len(tokens) - 1),
            left=np.int32(request.max_tokens - len(answer)),
            settings=SamplingArrays.row(request.sampling, seed),
            output_counts=np.minimum(said, np.iinfo(np.int16).max).astype(np.int16),
            in_prompt=heard,
            ends_text=np.bool_(not request.ignore_eos),
        )


def admit(slots: BatchState, new: Admission) -> BatchState:
    """Starts a sequence, unless its prompt turned out not to be stored whole."""
    at = new.slot
    ready = (slots.filled[at] == new.position) | (new.position == 0)
    settings = SamplingArrays(
        **{
            name: getattr(slots.settings, name).at[at].set(value)
            for name, value in new.settings.items()
        }
    )
    # A prompt of one token stores nothing beforehand: its lists start empty here.
    counts = jnp.where(new.position == 0, 0, slots.counts[at])
    return dataclasses.replace(
        slots,
        phase=slots.phase.at[at].set(jnp.where(ready, ENTERS, IDLE)),
        token=slots.token.at[at].set(new.token),
        position=slots.position.at[at].set(new.position),
        left=slots.left.at[at].set(new.left),
        counts=slots.counts.at[at].set(counts),
        settings=settings,
        output_counts=slots.output_counts.at[at].set(new.output_counts),
        in_prompt=slots.in_prompt.at[at].set(new.in_prompt),
        ends_text=slots.ends_text.at[at].set(new.ends_text),
    )
