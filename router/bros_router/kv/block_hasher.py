"""What a full block holds, as a number of fixed length: equal hashes, equal keys and values."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import sha256

#: Who computes keys and values besides the model itself, such as an adapter; empty: the model alone.
ModelVariant = str


class BlockHasher:
    """Chained SHA-256, as vLLM's: the hash of a block covers its tokens and all that come before it.

    The first link is a salt, so that nobody can tell by the time of a first token what others have asked, nor prepare
    prompts that collide; and the variant of the model, for the same tokens have other keys and values there.
    """

    def __init__(self, block_size: int, salt: bytes) -> None:
        """`salt`: secret, and the same for as long as blocks are to be found again."""
        self.block_size = block_size
        self._salt = salt

    def extend(
        self, hashes: list[bytes], prompt: Sequence[int], output: Sequence[int], variant: ModelVariant = ""
    ) -> None:
        """Add the hashes of the full blocks of prompt and output that `hashes` does not have yet."""
        num_blocks = (len(prompt) + len(output)) // self.block_size
        if num_blocks == len(hashes):
            return
        start, stop = len(hashes) * self.block_size, num_blocks * self.block_size
        in_output = slice(max(0, start - len(prompt)), max(0, stop - len(prompt)))
        tokens = memoryview(array("i", [*prompt[start:stop], *output[in_output]])).cast("B")
        block_bytes = len(tokens) // (num_blocks - len(hashes))
        parent = hashes[-1] if hashes else sha256(self._salt + variant.encode()).digest()
        for offset in range(0, len(tokens), block_bytes):
            parent = sha256(parent + tokens[offset : offset + block_bytes]).digest()
            hashes.append(parent)
