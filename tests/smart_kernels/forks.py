"""Checks in a forked process, as data loaders and servers make them."""

import os

import pytest
import torch

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


def holds_in_fork(check, prepare):
    """Whether ``check(prepare())`` is true in a child of this process, where ``prepare()`` has run."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # torch's own threads do not survive a fork
        prepared = prepare()
        child = os.fork()
        if child == 0:
            holds = False
            try:
                holds = check(prepared)
            finally:
                os._exit(0 if holds else 1)
        return os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)
