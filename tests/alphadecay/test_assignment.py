import math

import pytest
import torch

from alphadecay.assignment import MAPS, assign_decays
from alphadecay.spectral.statistics import softplus

SCORES = torch.tensor([2.0, 3.0, 5.0, 4.0])


def test_linear_map_spans_the_range():
    assert assign_decays(SCORES, 0.1, min_ratio=0.5, max_ratio=2).tolist() == pytest.approx(
        [0.05, 0.1, 0.2, 0.15]
    )
    assert assign_decays(
        SCORES, 0.1, min_ratio=0.5, max_ratio=2, positive=False
    ).tolist() == pytest.approx([0.2, 0.15, 0.05, 0.1])


@pytest.mark.parametrize("mapping", MAPS)
@pytest.mark.parametrize("positive", [True, False])
def test_equal_scores(mapping, positive):
    expected = 0.1 * (0.6666 + 3) / 2 if mapping in ("tb_linear_map", "tb_quantile") else 0.1
    for score in (3.0, 1.0, 0.0):
        decays = assign_decays(
            torch.full((4,), score), 0.1, mapping, positive=positive, blocks=list("aabb")
        )
        assert decays.tolist() == pytest.approx([expected] * 4)


@pytest.mark.parametrize("mapping", MAPS)
def test_the_reverse_keeps_the_range(mapping):
    mirrored = torch.tensor([5.0, 4.0, 2.0, 3.0])  # a -> a_min + a_max - a
    reverse = assign_decays(SCORES, 0.1, mapping, positive=False, blocks=list("aabb"))
    assert torch.equal(reverse, assign_decays(mirrored, 0.1, mapping, blocks=list("aabb")))
    assert assign_decays(torch.empty(0), 0.1).tolist() == []


@pytest.mark.parametrize("mapping", ["tb_sqrt", "tb_log2"])
def test_shares_keep_the_mean(mapping):
    assert float(assign_decays(SCORES, 0.1, mapping).mean()) == pytest.approx(0.1)


def test_sigmoid_is_within_a_block():
    decays = assign_decays(SCORES, 0.1, "layerwise_sigmoid", blocks=["a", "a", "b", "b"])
    low, high = 0.2 / (1 + math.exp(4)), 0.2 / (1 + math.exp(-4))
    assert decays.tolist() == pytest.approx([low, high, high, low])


def test_a_map_without_a_decay_is_refused():
    with pytest.raises(ValueError, match="tb_log2 gives no decay >= 0 .* use tb_linear_map"):
        assign_decays(torch.tensor([0.5, 8.0]), 0.1, "tb_log2")
    with pytest.raises(ValueError, match="unknown map"):
        assign_decays(SCORES, 0.1, "tb_cubic")
    with pytest.raises(ValueError, match="not finite"):
        assign_decays(torch.tensor([1.0, math.nan]), 0.1)


def test_softplus_does_not_overflow():
    assert softplus(1e6) == 1e6
    assert softplus(-1e6) == 0.0
    assert softplus(0.3) == pytest.approx(math.log(1 + math.exp(0.3)))


def test_without_blocks_all_modules_are_one_block():
    one_block = assign_decays(SCORES, 0.1, "layerwise_sigmoid", blocks=["a"] * 4)
    assert assign_decays(SCORES, 0.1, "layerwise_sigmoid").equal(one_block)
