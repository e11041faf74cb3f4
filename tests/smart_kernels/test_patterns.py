import pytest
import torch

from smart_kernels import patterns


@pytest.mark.parametrize(
    "text",
    ["unstructured", "2:4", "1:4", "4:8", "64:2:8", "block:64x16", "block:1x1", "channel", "coupled", "coupled:16"],
)
def test_spellings_round_trip(text):
    assert str(patterns.parse(text)) == text
    assert patterns.parse(patterns.parse(text)) == patterns.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4:2",
        "0:4",
        "2:4:8",
        "64:2:4",
        "64:2:10",
        "0:2:8",
        "1:0:8",
        "block",
        "block:0x4",
        "block:4",
        "random",
        "2 : 4",
        "coupled:0",
        "coupled:",
    ],
)
def test_other_spellings_are_refused(text):
    with pytest.raises(ValueError, match="pattern"):
        patterns.parse(text)


def test_n_of_m_counts_along_input_channels():
    mask = torch.zeros(1, 6, 1, 1, dtype=torch.bool)
    mask[0, [0, 1, 4, 5]] = True
    assert patterns.NM(2, 4).holds(mask)
    mask[0, 2] = True
    assert not patterns.NM(2, 4).holds(mask)
    assert patterns.NM(3, 4).holds(mask)


def test_blocks_live_or_die_whole():
    mask = torch.zeros(4, 6, 3, 3, dtype=torch.bool)
    mask[:2, 4:, 1, 2] = True
    assert patterns.Block(2, 4).holds(mask)
    assert not patterns.Block(4, 4).holds(mask)
    mask[0, 0, 0, 0] = True
    assert not patterns.Block(2, 4).holds(mask)


def test_one_slab_of_several_lives_and_obeys_n_of_four():
    pattern = patterns.VNM(2, 1, 8)
    mask = torch.zeros(4, 64, 1, 2, dtype=torch.bool)
    mask[0, 16, 0, 0] = mask[1, 31, 0, 0] = mask[2, 0, 0, 0] = mask[0, 3, 0, 1] = mask[0, 63, 0, 0] = True
    assert pattern.holds(mask)
    assert not patterns.VNM(4, 1, 8).holds(mask)
    for other in ((0, 18), (1, 15), (0, 40)):
        broken = mask.clone()
        broken[other[0], other[1], 0, 0] = True
        assert not pattern.holds(broken)
    assert pattern.misfit((4, 64, 1, 1)) is None
    assert "48 input channels are no multiple of 32" in pattern.misfit((4, 48, 1, 1))
    assert "3 output channels are no multiple of 2" in pattern.misfit((3, 64, 1, 1))


def test_channels_are_whole_rows_and_columns():
    mask = torch.ones(4, 6, 3, 3, dtype=torch.bool)
    mask[1], mask[:, 2] = False, False
    assert patterns.Channel().holds(mask)
    mask[0, 0, 0, 0] = False
    assert not patterns.Channel().holds(mask)


def test_description_names_the_most_regular_pattern():
    ones = torch.ones(64, 32, 3, 3, dtype=torch.bool)
    assert patterns.describe([ones, ones]) == "dense"
    block = ones.clone()
    block[:, :16, 1, 1] = False
    assert str(patterns.describe([ones, block])) == "block:64x16"
    assert str(patterns.describe([torch.rand(64, 32, 3, 3) < 0.3])) == "unstructured"
