"""A model of mma.sp::ordered_metadata.m16n8k32 for 16-bit floats, lane by lane, written from the PTX manual.

Sources: PTX ISA, "Sparse matrix storage" and "Matrix fragments for sparse mma.m16n8k32 with .f16 and .bf16 types". Slow
loops on purpose: nothing here shares code with the packing that it checks.
"""

import torch
from matrix_packing import empty_matrix, weight_of

# a0..a7 of a lane: (row, compressed column), where group = lane >> 2 and thread = lane & 3.
A = [(0, 0), (0, 1), (8, 0), (8, 1), (0, 8), (0, 9), (8, 8), (8, 9)]


def row_of(lane, i):
    return (lane >> 2) + A[i][0]


def chunk_of(lane, i):
    """Which four neighbours of its row element i comes from: columns 4 * thread on for i < 4, plus 16 for the rest."""
    return (lane & 3) + (4 if i >= 4 else 0)


def metadata_of(metadata, selector, row, chunk):
    """The positions (first, second) in a chunk of four columns of a row.

    The selector picks threads 0 and 1 or 2 and 3 of each four. Of these the first holds columns 0 to 15, the second
    columns 16 to 31; the low half of its register is row ``group``, the high half row ``group + 8``.
    """
    lane = (row % 8) * 4 + selector * 2 + chunk // 4
    half = (int(metadata[lane]) & 0xFFFFFFFF) >> (16 if row >= 8 else 0) & 0xFFFF
    bits = half >> (chunk % 4) * 4 & 0xF
    return bits & 3, bits >> 2


def operand(a, metadata, selector):
    """The 16 x 32 matrix, float64, that registers ``a`` (32 lanes, 8) and ``metadata`` (32 lanes,) stand for."""
    matrix = torch.zeros(16, 32, dtype=torch.float64)
    for lane in range(32):
        for i in range(8):
            row, chunk = row_of(lane, i), chunk_of(lane, i)
            first, second = metadata_of(metadata, selector, row, chunk)
            assert first < second, "ordered metadata must ascend: anything else is undefined"
            matrix[row, 4 * chunk + (second if i % 2 else first)] += a[lane, i].double()
    return matrix


def as_instructions_see_it(packed, path):
    """(K, C, R, S) float64, put together from the model of the instruction, step by step as a kernel walks them."""
    weight, matrix = packed.operand(path), empty_matrix(packed)

    def tile(values, metadata):
        return torch.cat([operand(values[i], metadata, selector=i) for i in range(2)])

    for slab in range(packed.slabs):
        rows = slice(32 * slab, 32 * slab + 32)
        for step in range(packed.steps):
            of_step = weight.values[weight.first_slab + slab, step], weight.metadata[weight.first_slab + slab, step]
            matrix[rows, 32 * step : 32 * step + 32] += tile(*of_step)
        for block in range(packed.blocks):
            at = (weight.first_slab + slab) * packed.blocks + block
            for extra in range(int(weight.extra_starts[at]), int(weight.extra_starts[at + 1])):
                found = tile(weight.extra_values[extra], weight.extra_metadata[extra])
                for column in range(32):
                    # Thread t of four reads the columns of its B registers: 8 j + 2 t and the next, for j of 0 to 3.
                    j, t, i = column // 8, column % 8 // 2, column % 2
                    repeated = int(weight.extra_columns[extra, 8 * t + 2 * j + i])
                    matrix[rows, 128 * block + repeated] += found[:, column]
    return weight_of(matrix, packed.shape)
