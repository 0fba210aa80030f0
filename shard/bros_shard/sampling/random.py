"""Randomness that is a function of (seed, position): one uniform per token from a counter-based generator.

Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) has no state to carry, so
a step that is overrun, replayed or resumed after preemption draws the same number for the same position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

_NUM_ROUNDS: Final = 10
_MASK_32: Final = 0xFFFFFFFF
#: Multipliers of words 0 and 2, and increments of the two key words ("Weyl sequence"), from the paper.
_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS: Final = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Ten rounds of Philox4x32: four random 32-bit words for each (counter, key).

    Args:
        counter: int64 (4, num), each word in [0, 2**32).
        key: int64 (2, num), each word in [0, 2**32).

    Returns:
        int64 (4, num), each word in [0, 2**32), on the device of `counter`.
    """
    multipliers = torch.tensor(_MULTIPLIERS, device=counter.device)[:, None]
    increments = torch.tensor(_KEY_INCREMENTS, device=counter.device)[:, None]
    rounds = torch.arange(_NUM_ROUNDS, device=counter.device)[:, None, None]
    round_keys = (key + rounds * increments) & _MASK_32
    even, odd = counter[0::2], counter[1::2]  # words (0, 2) and (1, 3)
    for round_key in round_keys:
        # The product needs 64 bits unsigned. int64 wraps, which keeps its bits; masking drops the sign's copies.
        product = even * multipliers
        high, low = (product >> 32) & _MASK_32, product & _MASK_32
        even, odd = high.flip(0) ^ odd ^ round_key, low.flip(0)
    return torch.stack((even[0], odd[0], even[1], odd[1]))


def uniforms(seeds: Sequence[int], positions: Tensor) -> Tensor:
    """One number in [0, 1) for each (seed, position), with all 53 bits of a float64.

    Args:
        seeds: unsigned 64-bit keys; higher bits are ignored.
        positions: int64 (len(seeds),), not negative.

    Returns:
        float64 (len(seeds),) on the device of `positions`.
    """
    words = [[seed & _MASK_32 for seed in seeds], [(seed >> 32) & _MASK_32 for seed in seeds]]
    key = torch.tensor(words, dtype=torch.int64, device=positions.device)
    zeros = torch.zeros_like(positions)
    counter = torch.stack((positions & _MASK_32, positions >> 32, zeros, zeros))
    random_words = philox4x32(counter, key)
    fraction = (random_words[0] << 21) | (random_words[1] >> 11)
    return fraction.double() * 2.0**-53
