"""Allocation of KV cache pages on the host."""

import dataclasses

import numpy as np

from mor_jax.inference.config import CachePlan


class BlockPool:
    """The pages of one pool. A page is free or belongs to one KV list of one sequence."""

    def __init__(self, pages: int):
        self.size = pages
        self._free = list(range(pages - 1, -1, -1))

    @property
    def free(self) -> int:
        """Number of free pages."""
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages, or None if fewer are free."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def free_blocks(self, pages: list[int]) -> None:
        """Returns pages to the pool."""
        self._free += pages


@dataclasses.dataclass
class BlockLists:
    """The pages of one sequence, in the order of its tokens: of the end layers and of each list."""

    ends: list[int]
    block: list[list[int]]


class BlockAllocator:
    """Both pools, and the block tables that the device reads. The last slot is for padding."""

    def __init__(self, plan: CachePlan):
        self.plan = plan
        self.ends, self.block = BlockPool(plan.end_pages), BlockPool(plan.block_pages)
        max_blocks = -(-plan.max_length // plan.spec.size)
        shape = (plan.slots + 1, plan.spec.lists)
        self.end_table = np.zeros((plan.slots + 1, max_blocks), np.int32)
        self.block_table = np.zeros((*shape, max_blocks), np.int32)
        self.capacity_tokens = np.zeros(shape, np.int32)
        self.changed = True

    @property
    def used(self) -> tuple[int, int]:
        """Allocated pages: of the end layers, of the block."""
        return self.ends.size - self.ends.free, self.block.size - self.block.free

    def reserve(self, slot: int, ends: int, lists: tuple[int, ...]) -> BlockLists | None:
        """Allocates pages for a sequence; None, and no change, if too few are free."""
        if ends > self.ends.free or sum(lists) > self.block.free:
            return None
        blocks = BlockLists(
            self.ends.allocate(ends) or [], [self.block.allocate(n) or [] for n in lists]
        )
        self._update_tables(slot, blocks)
        return blocks

    def extend(self, slot: int, blocks: BlockLists, index: int) -> bool:
        """One more page for list `index`; False if none is free."""
        page = self.block.allocate(1)
        if page is None:
            return False
        blocks.block[index] += page
        self._update_tables(slot, blocks)
        return True

    def release(self, blocks: BlockLists) -> None:
        """Frees all pages of a sequence."""
        self.ends.free_blocks(blocks.ends)
        for pages in blocks.block:
            self.block.free_blocks(pages)

    def _update_tables(self, slot: int, blocks: BlockLists) -> None:
        self.end_table[slot, : len(blocks.ends)] = blocks.ends
        for index, pages in enumerate(blocks.block):
            self.block_table[slot, index, : len(pages)] = pages
            self.capacity_tokens[slot, index] = len(pages) * self.plan.spec.size
        self.changed = True
