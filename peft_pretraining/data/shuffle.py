"""The order in which a run sees its rows: a permutation for each epoch, computed point by point, so that no array holds it."""

from __future__ import annotations

import hashlib

import numpy as np

# Over four elements (the worst case) the distance from a uniform permutation halves with each round: after 16 it is 2e-5.
ROUNDS = 16


class RowOrder:
    """The endless order of `n` rows: epoch after epoch, each a fresh permutation that depends on the seed and the epoch alone.

    Position p of an epoch goes through a keyed Feistel network on the fewest bits that hold n (two at least). What comes out at n
    or above goes through again until it is below ("cycle-walking", Black and Rogaway, CT-RSA 2002), twice on average at most.
    """

    def __init__(self, seed: int, n: int):
        self.seed, self.n = seed, n
        bits = max(2, (n - 1).bit_length())
        self._right_bits = bits // 2
        self._masks = (
            (1 << (bits - self._right_bits)) - 1,
            (1 << self._right_bits) - 1,
        )  # of the left and the right half

    def indices(self, start: int, stop: int) -> np.ndarray:
        """The rows at the positions [start, stop): int64 [stop - start]. Any position costs the same, however far it is."""
        if stop <= start:
            return np.empty(0, np.int64)
        epochs, rows = np.divmod(np.arange(start, stop, dtype=np.int64), self.n)
        keys = np.stack(
            [self._keys(epoch) for epoch in range(start // self.n, (stop - 1) // self.n + 1)]
        )[epochs - epochs[0]]
        rows = self._network(rows.astype(np.uint64), keys)
        while len(outside := np.flatnonzero(rows >= self.n)):
            rows[outside] = self._network(rows[outside], keys[outside])
        return rows.astype(np.int64)

    def _network(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Each value (uint64 [values]) under its keys (uint64 [values, ROUNDS]); the halves alter each other in turn."""
        shift, (left_mask, right_mask) = (
            np.uint64(self._right_bits),
            np.array(self._masks, np.uint64),
        )
        left, right = values >> shift, values & right_mask
        for i in range(0, ROUNDS, 2):
            left ^= _mix(keys[:, i] | right) & left_mask
            right ^= _mix(keys[:, i + 1] | left) & right_mask
        return left << shift | right

    def _keys(self, epoch: int) -> np.ndarray:
        """The keys of an epoch's rounds in the upper halves of uint64 [ROUNDS]; the lower halves are for what is mixed."""
        digest = hashlib.blake2b(f"{self.seed} {epoch}".encode(), digest_size=4 * ROUNDS).digest()
        return np.frombuffer(digest, "<u4").astype(np.uint64) << np.uint64(32)


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of 64 bits in which each bit of the result depends on all of x: uint64, any shape.

    The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), with Stafford's constants (variant 13).
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
