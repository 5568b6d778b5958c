"""Shuffling: a permutation for each epoch, computed index by index, so that no array stores it.

The permutations must never change: a resumed run would otherwise see other data.
"""

from __future__ import annotations

import hashlib

import numpy as np

# Over four elements (the worst case) each round halves the distance from a uniform permutation:
# after 16 rounds it is 2e-5.
ROUNDS = 16


class ShuffledIndices:
    """An endless sequence of the indices 0 ... n - 1: one new permutation of them for each epoch.

    The permutation depends only on the seed and the epoch. Position p of an epoch is encrypted by a
    keyed Feistel network on the smallest number of bits that can represent n - 1 (at least two).
    Outputs >= n are encrypted again until they are below n ("cycle walking", Black and Rogaway,
    CT-RSA 2002), on average at most twice.

    Args:
        seed: Seed of all permutations.
        n: Number of indices, above 0.
    """

    def __init__(self, seed: int, n: int):
        self.seed, self.n = seed, n
        bits = max(2, (n - 1).bit_length())
        self._right_bits = bits // 2
        self._left_mask = np.uint64((1 << (bits - self._right_bits)) - 1)
        self._right_mask = np.uint64((1 << self._right_bits) - 1)

    def indices(self, start: int, stop: int) -> np.ndarray:
        """Return the indices at the positions [start, stop), counted over all epochs.

        The cost does not depend on `start`.

        Returns:
            int64 [stop - start].
        """
        if stop <= start:
            return np.empty(0, np.int64)
        epochs, positions = np.divmod(np.arange(start, stop, dtype=np.int64), self.n)
        first_epoch, last_epoch = start // self.n, (stop - 1) // self.n
        keys_of_epochs = [self._round_keys(epoch) for epoch in range(first_epoch, last_epoch + 1)]
        keys = np.stack(keys_of_epochs)[epochs - first_epoch]
        values = self._encrypt(positions.astype(np.uint64), keys)
        while len(outside := np.flatnonzero(values >= self.n)):
            values[outside] = self._encrypt(values[outside], keys[outside])
        return values.astype(np.int64)

    def _encrypt(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Return the output of the Feistel network, whose two halves change each other in turn.

        Args:
            values: uint64 [count].
            keys: Keys of the rounds for each value, uint64 [count, ROUNDS].

        Returns:
            uint64 [count], a bijection of `values` for equal keys.
        """
        shift = np.uint64(self._right_bits)
        left, right = values >> shift, values & self._right_mask
        for i in range(0, ROUNDS, 2):
            left ^= _mix(keys[:, i] | right) & self._left_mask
            right ^= _mix(keys[:, i + 1] | left) & self._right_mask
        return left << shift | right

    def _round_keys(self, epoch: int) -> np.ndarray:
        """Return the keys of an epoch's rounds, uint64 [ROUNDS].

        Each key occupies the upper 32 bits; the lower 32 bits are left for the value.
        """
        digest = hashlib.blake2b(f"{self.seed} {epoch}".encode(), digest_size=4 * ROUNDS).digest()
        return np.frombuffer(digest, "<u4").astype(np.uint64) << np.uint64(32)


def _mix(x: np.ndarray) -> np.ndarray:
    """Return a bijection of 64 bits in which each output bit depends on all input bits.

    The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) with Stafford's constants
    (variant 13).

    Args:
        x: uint64, any shape.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
