"""A model of mma.m16n8k16 for 16-bit floats, lane by lane, written from the PTX manual.

Source: PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type". Slow loops on purpose: nothing here
shares code with the packing that it checks.
"""

import torch
from matrix_packing import empty_matrix, weight_of


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


def as_instructions_see_it(packed, path):
    """(K, C, R, S) float64, put together from the model of the instruction: chunk by chunk, each lane reading on."""
    weight, matrix = packed.operand(path), empty_matrix(packed)
    for slab in range(packed.slabs):
        for block in range(packed.blocks):
            chunk = (weight.first_slab + slab) * packed.blocks + block
            registers = torch.zeros(4, 4, 32, 8, dtype=weight.values.dtype)  # [step][matrix][lane][element]
            at = int(weight.starts[chunk])
            assert at % 8 == 0
            for lane in range(32):
                for step in range(4):
                    word = int(weight.bits[chunk, lane, step]) & 0xFFFFFFFF
                    for bit in range(32):
                        if word >> bit & 1:
                            registers[step, bit // 8, lane, bit % 8] = weight.values[at]
                            at += 1
            assert at <= int(weight.starts[chunk + 1]) < at + 8
            for step in range(4):
                for m in range(4):
                    row, column = 32 * slab + m // 2 * 16, 128 * block + 32 * step + m % 2 * 16
                    matrix[row : row + 16, column : column + 16] = operand(registers[step, m])
    return weight_of(matrix, packed.shape)
