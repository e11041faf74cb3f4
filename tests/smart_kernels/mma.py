"""A model of mma.m16n8k16 for 16-bit floats, lane by lane, written from the PTX manual.

Source: PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type". Slow loops on purpose: nothing here
shares code with the packing that it checks.
"""

import torch


def place_of(lane, i):
    """The row and column of the 16 x 16 matrix that element a[i] of a lane is."""
    group, thread = lane >> 2, lane & 3
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    column = thread * 2 + (i & 1)
    return row, column if i < 4 else column + 8


def operand(a):
    """The 16 x 16 matrix, float64, that registers ``a`` (32 lanes, 8) stand for."""
    matrix = torch.zeros(16, 16, dtype=torch.float64)
    for lane in range(32):
        for i in range(8):
            matrix[place_of(lane, i)] = a[lane, i].double()
    return matrix
