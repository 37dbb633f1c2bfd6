"""Pages on the host: which are free, and which sequence holds which."""

import dataclasses

import numpy as np

from mor_jax.inference.config import CachePlan


class BlockPool:
    """The pages of one pool. A page is free or held by one list of one sequence."""

    def __init__(self, pages: int):
        self.size = pages
        self._free = list(range(pages - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def allocate(self, number: int) -> list[int] | None:
        """`number` pages, or None and nothing taken where there are fewer."""
        if number > len(self._free):
            return None
        return [self._free.pop() for _ in range(number)]

    def free_blocks(self, pages: list[int]) -> None:
        """Frees pages that were taken."""
        self._free += pages


@dataclasses.dataclass
class BlockLists:
    """The pages of one sequence, in the order of its tokens."""

    ends: list[int]
    block: list[list[int]]


class BlockAllocator:
    """Both pools, and the tables that the device reads. Slot `slots` belongs to nobody."""

    def __init__(self, plan: CachePlan):
        self.plan = plan
        self.ends, self.block = BlockPool(plan.end_pages), BlockPool(plan.block_pages)
        most = -(-plan.max_length // plan.geometry.size)
        shape = (plan.slots + 1, plan.geometry.lists)
        self.end_table = np.zeros((plan.slots + 1, most), np.int32)
        self.block_table = np.zeros((*shape, most), np.int32)
        self.room = np.zeros(shape, np.int32)
        self.changed = True

    @property
    def used(self) -> tuple[int, int]:
        """Pages given out: at the ends, in the block's pool."""
        return self.ends.size - self.ends.free, self.block.size - self.block.free

    def reserve(self, slot: int, ends: int, lists: tuple[int, ...]) -> BlockLists | None:
        """Pages for a sequence, or None and nothing taken."""
        if ends > self.ends.free or sum(lists) > self.block.free:
            return None
        taken = BlockLists(
            self.ends.allocate(ends) or [], [self.block.allocate(n) or [] for n in lists]
        )
        self._tell(slot, taken)
        return taken

    def extend(self, slot: int, held: BlockLists, number: int) -> bool:
        """One more page for list `number`; False where none is free."""
        page = self.block.allocate(1)
        if page is None:
            return False
        held.block[number] += page
        self._tell(slot, held)
        return True

    def release(self, held: BlockLists) -> None:
        """Frees all pages of a sequence."""
        self.ends.free_blocks(held.ends)
        for pages in held.block:
            self.block.free_blocks(pages)

    def _tell(self, slot: int, held: BlockLists) -> None:
        self.end_table[slot, : len(held.ends)] = held.ends
        for number, pages in enumerate(held.block):
            self.block_table[slot, number, : len(pages)] = pages
            self.room[slot, number] = len(pages) * self.plan.geometry.size
        self.changed = True
