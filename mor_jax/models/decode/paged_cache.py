"""The paged KV cache: pools of pages, and block tables.

Keys and values of a sequence are in lists that grow token by token. What a list holds depends on
the model (paper section 2.2.2):

- layers that every token passes have one list with every token;
- recursion-wise caching has one list per recursion, with the tokens that entered it;
- shared keys and values have one list with every token, written by recursion 0; if they are
  updated, recursion r >= 1 also has a list of its own, with the tokens that entered it.

A list is a row of page numbers in a table; a page holds `size` tokens of all layers of its pool, so
one table serves them all. Pages of different pools have different sizes in bytes.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mor_jax.config import ModelConfig
from mor_jax.types import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """All pages of one layer: p pages of t tokens. Keys are transposed, for the matrix product."""

    k: Float[Array, "p g k t"]
    v: Float[Array, "p g t k"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """All keys and values.

    ends: of the first and the last layer, if they are outside the shared block. block: of each
    layer of the shared block, or of a vanilla model. reach: for updated sharing, the last recursion
    that the token of a list-0 entry entered; later recursions do not see the entry.
    """

    ends: tuple[Pages, ...]
    block: tuple[Pages, ...]
    reach: Int[Array, "p t"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockTables:
    """Page numbers of every slot's lists, at most m per list; entries past its end are not read.

    The last slot is unused: padding rows point to it.
    """

    ends: Int[Array, "slots m"]
    block: Int[Array, "slots lists m"]


@dataclasses.dataclass(frozen=True)
class KVCacheSpec:
    """Layout of a model's KV cache. size: tokens per page."""

    cfg: ModelConfig
    size: int

    @property
    def end_layers(self) -> int:
        """Layers whose pages hold every token of a routed or recursive model."""
        return 2 if self.cfg.is_middle else 0

    @property
    def block_layers(self) -> int:
        """Layers that share a table of lists."""
        return self.cfg.shared_layers

    @property
    def lists(self) -> int:
        """Lists of a sequence in the block's pool."""
        return 1 if self.cfg.kv_mode == "shared" else self.cfg.num_recursions

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value in one layer."""
        return 2 * self.cfg.num_kv_heads * self.cfg.head_dim * jnp.dtype(self.cfg.dtype).itemsize

    @property
    def end_page_bytes(self) -> int:
        """Bytes of one page of the first and last layer together."""
        return self.end_layers * self.size * self.token_bytes

    @property
    def block_page_bytes(self) -> int:
        """Bytes of one page of all layers of the block."""
        return self.block_layers * self.size * self.token_bytes

    def list_of(self, recursion: Int[Array, "*n"]) -> Int[Array, "*n"]:
        """The list that tokens of a recursion are written to."""
        return jnp.zeros_like(recursion) if self.cfg.kv_mode == "shared" else recursion

    def holds_all(self, number: int) -> bool:
        """Whether list `number` gets every token, whatever the routers select."""
        if self.cfg.router.kind == "none":
            return True
        if number == 0 and self.cfg.kv_mode != "recursion":
            return True
        return self.cfg.router.kind == "token" and number == 0

    def cache(self, end_pages: int, block_pages: int) -> Cache:
        """An empty cache."""
        return Cache(
            tuple(self._pages(end_pages) for _ in range(self.end_layers)),
            tuple(self._pages(block_pages) for _ in range(self.block_layers)),
            jnp.zeros((block_pages, self.size), jnp.int8) if self.updates else None,
        )

    @property
    def updates(self) -> bool:
        """Whether later recursions replace the shared keys and values of their own tokens."""
        return self.cfg.kv_mode == "shared_update" and self.cfg.router.kind != "none"

    def _pages(self, number: int) -> Pages:
        g, k, dtype = self.cfg.num_kv_heads, self.cfg.head_dim, jnp.dtype(self.cfg.dtype)
        return Pages(
            jnp.zeros((number, g, k, self.size), dtype), jnp.zeros((number, g, self.size, k), dtype)
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CacheSlots:
    """Where rows are written: page and offset in it; a page past the last one writes nothing."""

    page: Int[Array, "n"]
    offset: Int[Array, "n"]

    @classmethod
    def of(
        cls, lists: Int[Array, "n m"], index: Int[Array, "n"], size: int, do: Array
    ) -> "CacheSlots":
        """Slot of entry `index` of each row's list, for the rows where `do` is True."""
        at = jnp.clip(index // size, 0, lists.shape[1] - 1)
        page = jnp.take_along_axis(lists, at[:, None], axis=1)[:, 0]
        return cls(jnp.where(do, page, jnp.iinfo(jnp.int32).max), index % size)


def write(
    pages: Pages, place: CacheSlots, k: Float[Array, "n g k"], v: Float[Array, "n g k"]
) -> Pages:
    """Writes keys and values of n rows to their slots, which are distinct."""
    return Pages(
        pages.k.at[place.page, :, :, place.offset].set(k, mode="drop"),
        pages.v.at[place.page, :, place.offset, :].set(v, mode="drop"),
    )
