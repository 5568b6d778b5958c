"""The order of the sequences: a random permutation for each epoch that never changes."""

import hashlib

import numpy as np
import pytest

from peft_pretraining.data.shuffle import ROUNDS, ShuffledIndices

SIZES = [1, 2, 3, 10, 255, 256, 257, 1000, 65537]


def plain_index(seed, n, position):
    """One position of the order, in Python's integers."""
    epoch, value = divmod(position, n)
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=4 * ROUNDS).digest()
    keys = [int.from_bytes(digest[4 * i : 4 * i + 4], "little") for i in range(ROUNDS)]
    bits = 2
    while 2**bits < n:
        bits += 1
    right_bits = bits // 2
    while True:
        halves = [value >> right_bits, value % 2**right_bits]
        widths = [bits - right_bits, right_bits]
        for i, key in enumerate(keys):
            halves[i % 2] ^= plain_mix(key * 2**32 + halves[1 - i % 2]) % 2 ** widths[i % 2]
        value = halves[0] * 2**right_bits + halves[1]
        if value < n:
            return value


def plain_mix(x):
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


@pytest.mark.parametrize("n", SIZES)
def test_each_epoch_is_a_permutation_of_its_own(n):
    order = ShuffledIndices(5, n)
    epochs = [order.indices(epoch * n, (epoch + 1) * n) for epoch in (0, 1, 7)]
    for epoch in epochs:
        assert epoch.dtype == np.int64 and np.array_equal(np.sort(epoch), np.arange(n))
    if n >= 10:
        assert not any(np.array_equal(a, b) for a, b in zip(epochs, epochs[1:], strict=False))
        assert not np.array_equal(epochs[0], ShuffledIndices(6, n).indices(0, n))


@pytest.mark.parametrize("n", [*SIZES, 4, 17, 2**40, 2**40 - 1, 10**12 + 1])
def test_order_is_that_of_plain_integers(n):
    for start in (0, max(0, n - 3), 3 * n // 2, 10**13 + 5):
        expected = [plain_index(9, n, position) for position in range(start, start + 7)]
        assert ShuffledIndices(9, n).indices(start, start + 7).tolist() == expected


def test_any_part_is_a_part_of_the_whole():
    straight = ShuffledIndices(5, 10).indices(0, 35).tolist()
    for start in range(36):
        for stop in range(start, 36):
            assert ShuffledIndices(5, 10).indices(start, stop).tolist() == straight[start:stop]


@pytest.mark.parametrize("n", [2, 3, 4, 5, 10, 16, 20, 100])
def test_places_are_those_of_random_permutations(n):
    """Over many epochs, a sequence comes equally often at each place, far from its neighbours."""
    epochs = 20_000 if n < 20 else 4000
    order = ShuffledIndices(3, n).indices(0, n * epochs).reshape(epochs, n)
    counts = np.stack([np.bincount(order[:, place], minlength=n) for place in range(n)])
    chi_square, freedom = ((counts - epochs / n) ** 2 / (epochs / n)).sum(), (n - 1) ** 2
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)
    distances = np.abs(np.diff(order, axis=1)).mean(axis=1)
    assert abs(distances.mean() - (n + 1) / 3) <= 5 * distances.std() / np.sqrt(epochs)


@pytest.mark.parametrize("n, permutations", [(3, 6), (4, 24), (5, 120)])
def test_all_permutations_are_as_frequent(n, permutations):
    order = ShuffledIndices(8, n).indices(0, n * 20_000).reshape(-1, n)
    counts = np.unique(order, axis=0, return_counts=True)[1]
    expected = 20_000 / permutations
    chi_square, freedom = ((counts - expected) ** 2 / expected).sum(), permutations - 1
    assert len(counts) == permutations and chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_large_epochs_are_spread_evenly():
    """The first 20,000 of 2**40 indices are evenly distributed and independent of each other."""
    rows = ShuffledIndices(2, 2**40).indices(0, 20_000)
    counts = np.bincount(rows * 1000 // 2**40, minlength=1000)
    assert abs(((counts - 20) ** 2 / 20).sum() - 999) < 5 * np.sqrt(2 * 999)
    assert abs(np.corrcoef(rows[1:], rows[:-1])[0, 1]) < 5 / np.sqrt(20_000)


def test_order_is_never_changed():
    """Written down once: other numbers would show a continued run other rows."""
    assert ShuffledIndices(0, 8).indices(0, 16).tolist() == [
        0,
        4,
        2,
        1,
        5,
        6,
        3,
        7,
        7,
        2,
        5,
        6,
        0,
        3,
        4,
        1,
    ]
    assert ShuffledIndices(5, 10**6).indices(10**9, 10**9 + 4).tolist() == [
        49705,
        183775,
        788954,
        628636,
    ]
