"""Sparse learning at a fixed density: groups of weights are pruned by size and regrown where gradients are large."""

from smart.rewire.methods import METHODS, REDISTRIBUTE, SCHEDULES, check_method
from smart.rewire.rewirer import Rewirer

__all__ = ["METHODS", "REDISTRIBUTE", "SCHEDULES", "Rewirer", "check_method"]
