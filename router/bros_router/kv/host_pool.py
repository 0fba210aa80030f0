"""Which blocks of the host pool are free, and which hold a copy that could be given up."""

from __future__ import annotations


class HostPool:
    """Block ids 0 to `num_blocks - 1` of the ranks' host memory. Every operation is O(1).

    A copy is *spare* while its tokens are in the KV region as well: it makes taking that block free of cost, but
    nothing is lost without it, so a spare copy gives way to one that is needed.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        #: Host block of each spare copy to (sequence id, index in its block table); the oldest first.
        self._spare: dict[int, tuple[int, int]] = {}

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def num_spare(self) -> int:
        """Blocks whose copy could be given up."""
        return len(self._spare)

    def take(self) -> int:
        """Take a block that is free."""
        return self._free.pop()

    def give_back(self, host_block: int) -> None:
        """Free a block that was taken."""
        self._spare.pop(host_block, None)
        self._free.append(host_block)

    def mark_spare(self, host_block: int, sequence_id: int, index: int) -> None:
        """The tokens of this copy are in the KV region too."""
        self._spare[host_block] = (sequence_id, index)

    def mark_needed(self, host_block: int) -> None:
        """This copy is the only one."""
        self._spare.pop(host_block, None)

    def oldest_spare(self) -> tuple[int, int] | None:
        """Whose copy to give up first: (sequence id, index); `None` where none is spare."""
        return next(iter(self._spare.values()), None)
