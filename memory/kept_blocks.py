"""Page-locked blocks that an ended call leaves for the next one."""

from __future__ import annotations

from ds_offload.memory.host_block import BlockLayout, HostBlock


class KeptBlocks:
    """Blocks of one layout that no pool holds, still page-locked; they hold what was last written to them.

    The device is done with a block when it is put here. One thread calls it. Whoever makes
    it closes it, after which nothing is kept any more.
    """

    def __init__(self) -> None:
        self._blocks: list[HostBlock] = []
        self._closed = False

    @property
    def nbytes(self) -> int:
        """Bytes kept now, all of them page-locked."""
        return sum(block.size for block in self._blocks)

    def put(self, block: HostBlock) -> None:
        """Keep a block that is locked as a whole; released at once where nothing is kept any more."""
        if self._closed:
            block.release()
            return
        self._blocks.append(block)

    def take(self, layout: BlockLayout, count: int) -> list[HostBlock]:
        """Up to `count` blocks of a layout. Those of another one are released: they are of no use to this call."""
        self._release([block for block in self._blocks if block.layout != layout])
        taken = [block for block in self._blocks if block.layout == layout][:count]
        for block in taken:
            self._blocks.remove(block)
        return taken

    def trim(self, most: int) -> None:
        """Release blocks until at most `most` bytes are kept."""
        while self._blocks and self.nbytes > most:
            self._release(self._blocks[-1:])

    def release(self) -> None:
        """Give all of it back."""
        self._release(list(self._blocks))

    def close(self) -> None:
        """Give all of it back, and keep nothing any more."""
        self._closed = True
        self.release()

    def _release(self, blocks: list[HostBlock]) -> None:
        for block in blocks:
            block.release()
            self._blocks.remove(block)
