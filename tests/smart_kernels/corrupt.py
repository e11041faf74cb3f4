"""Corrupt states of packed weights."""

import copy

import pytest
import torch


def check_refused(packed, change, message):
    """A state that ``change`` spoils is refused: it changes nothing where it is checked, and disables where loaded.

    Returns:
        The weight as it was before.
    """
    state = {name: value.clone() for name, value in packed.state_dict().items()}
    change(state)
    before = copy.deepcopy(packed)
    with pytest.raises(ValueError, match=message):
        packed.check_state(state)
    assert torch.equal(packed.dense("clean"), before.dense("clean"))
    with pytest.raises(ValueError, match=message):
        packed.load_state_dict(state)
    assert packed.disabled
    return before
