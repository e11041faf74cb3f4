"""A model of wgmma.mma_async.sp.m64nNk32 for 16-bit floats with A in registers, thread by thread.

Sources: PTX ISA, "Sparse matrix storage" of wgmma.mma_async.sp and "Register fragments" of wgmma.mma_async. Each of the
four warps of a warpgroup holds 16 of 64 rows. Slow loops on purpose: nothing here shares code with the packing that it
checks.
"""

import torch

# a0..a7 of a lane: (row, compressed column), where group = lane >> 2 and thread = lane & 3; columns from 2 thread on.
A = [(0, 0), (0, 1), (8, 0), (8, 1), (0, 8), (0, 9), (8, 8), (8, 9)]


def metadata_of(metadata, selector, row, chunk):
    """The positions (first, second) in a chunk of four columns of a row.

    The selector, one for the whole warpgroup, picks threads 0 and 1 or 2 and 3 of each four. Of these the first holds
    columns 0 to 15, the second columns 16 to 31; the low half of a register is row ``group``, the high half
    ``group + 8``, of the warp's 16 rows.
    """
    thread = row // 16 * 32 + row % 8 * 4 + selector * 2 + chunk // 4
    half = (int(metadata[thread]) & 0xFFFFFFFF) >> (16 if row % 16 >= 8 else 0) & 0xFFFF
    bits = half >> (chunk % 4) * 4 & 0xF
    return bits & 3, bits >> 2


def operand(a, metadata, selector=0):
    """The 64 x 32 matrix, float64, that registers ``a`` (128 threads, 8) and ``metadata`` (128 threads,) stand for."""
    matrix = torch.zeros(64, 32, dtype=torch.float64)
    for thread in range(128):
        for i, (down, right) in enumerate(A):
            row = thread // 32 * 16 + (thread % 32 >> 2) + down
            compressed = 2 * (thread & 3) + right
            first, second = metadata_of(metadata, selector, row, compressed // 2)
            assert first < second, "metadata must ascend: anything else is undefined"
            matrix[row, compressed // 2 * 4 + (second if compressed % 2 else first)] += a[thread, i].double()
    return matrix
