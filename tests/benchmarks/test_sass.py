"""CUDA kernels compiled for GPUs that are not here: no spills, sparse tensor cores, copies that run beside them."""

import pytest

from benchmarks import sass
from smart_kernels import two_four_ops

pytestmark = pytest.mark.skipif(sass.missing() is not None, reason=str(sass.missing()))


@pytest.fixture(scope="module")
def kernels():
    return sass.read_kernels()


def test_every_tile_is_there_for_both_types(kernels):
    for architecture in {kernel.architecture for kernel in kernels}:
        names = sorted(kernel.name for kernel in kernels if kernel.architecture == architecture)
        of_direct = [f"direct, {tile}" for tile in sass.DIRECT_TILES.values()]
        tiles = [
            *sass.TILES.values(),
            *sass.BITMAP_TILES.values(),
            sass.SUM,
            *(sass.WGMMA_TILES.values() if architecture == "sm_90a" else ()),
        ]
        assert names == sorted([f"{t}, {tile}" for t in ("float16", "bfloat16") for tile in tiles] + of_direct)


def test_nothing_spills_and_all_fits_the_smallest_gpu(kernels):
    for kernel in kernels:
        assert kernel.stack_bytes == 0, kernel
        assert 0 < kernel.registers <= 255
        assert kernel.registers * kernel.threads <= 65536
        # What Hopper has, and what the smallest GPUs since 8.0 have.
        assert kernel.shared_bytes <= (227 if "wgmma" in kernel.name else 99) * 1024


def test_sparse_tensor_cores_multiply(kernels):
    for kernel in kernels:
        if kernel.name.startswith("direct") or any(name in kernel.name for name in ("wgmma", "bitmap", sass.SUM)):
            continue
        assert kernel.instructions["HMMA.SP"] > 0, kernel
        assert kernel.instructions["HMMA"] == 0, kernel
        assert kernel.instructions["LDGSTS"] > 0 and kernel.instructions["LDSM"] > 0, kernel


def test_bitmaps_are_decoded_into_dense_products(kernels):
    """A lane reads at most 32 values a step; what beside them, products and pixels decoding takes is counted."""
    for kernel in kernels:
        if "bitmap" in kernel.name:
            found = kernel.instructions
            assert found["HMMA"] > 0 and found["HMMA.SP"] == 0, kernel
            assert found["LDGSTS"] > 0 and found["LDSM"] > 0 and found["LDS.U16"] == 32, kernel
            assert 0 < kernel.step - found["HMMA"] - found["LDSM"] <= 160, kernel


def test_the_innermost_loop_that_multiplies_is_found():
    lines = [
        "MOV R1, R2",
        "HMMA.16816.F32 R1, R2",
        "@P0 BRA 0x10",
        "IADD R1, R2",
        "@!P1 BRA 0x0",
        "EXIT",
        "@P0 BRA 0x50",
    ]
    text = "".join(
        f"        /*{16 * i:04x}*/                   {line} ;   /* 0x01 */\n" for i, line in enumerate(lines)
    )
    assert [line.split()[0] for line in sass.innermost_loop(text)] == ["HMMA.16816.F32", "@P0"]


def test_the_kernel_for_hopper_multiplies_by_warpgroups_what_its_copies_bring(kernels):
    for kernel in kernels:
        if "wgmma" in kernel.name:
            found = kernel.instructions
            # Four steps of a full block, three of one cut short, an extra step of each of two slabs.
            assert found["HGMMA.SP"] >= 9, kernel
            assert found["HMMA"] == found["HMMA.SP"] == found["LDGSTS"] == 0, kernel
            assert found["UTMALDG"] > 0 and found["UBLKCP"] > 0, kernel
            assert kernel.overwrites == 0, kernel
            if "twin" in kernel.name:
                assert 2 * kernel.registers * kernel.threads <= 65536  # two thread blocks share a multiprocessor


def test_registers_that_are_written_too_early_are_found():
    product = "/*0100*/  HGMMA.SP.64x128x32.F32 R24, R92, gdesc[UR20], R24, R88, 0x0, gsb0 ; /* 0x1 */\n"
    wait = "/*0120*/  WARPGROUP.DEPBAR.LE gsb0, 0x0 ; /* 0x3 */\n"
    for write, found in (
        ("LDS.128 R92, [R92]", 1),
        ("LDS.128 R90, [R5]", 1),
        ("@!P0 LDS R88, [R4]", 1),
        ("IMAD.WIDE R94, R2, R3, R4", 1),
        ("LDS.128 R96, [R92]", 0),
        ("STS.128 [R92], R88", 0),
        ("LDS R91, [R4]", 0),
    ):
        line = f"/*0110*/  {write} ; /* 0x2 */\n"
        assert len(sass.overwrites(product + line + wait)) == found, write
        assert not sass.overwrites(product + wait + line)


def test_the_direct_kernel_multiplies_in_float32(kernels):
    """On plain cores: tensor cores would round."""
    for kernel in kernels:
        if kernel.name.startswith("direct"):
            assert kernel.instructions["FFMA"] > 0, kernel
            assert kernel.instructions["HMMA"] == kernel.instructions["HMMA.SP"] == 0, kernel
            assert 2 * kernel.registers * kernel.threads <= 65536  # two thread blocks share a multiprocessor


def test_the_sum_of_splits_only_adds(kernels):
    for kernel in kernels:
        if sass.SUM in kernel.name:
            assert not any(kernel.instructions[each] for each in ("HMMA", "HMMA.SP", "HGMMA.SP", "LDGSTS")), kernel


def test_the_table_has_a_line_a_kernel(kernels):
    assert len(list(sass.table(kernels))) == len(kernels) + 2


def test_tiles_are_as_tall_as_python_says():
    slabs = {name: of_warp * rows for (of_warp, _, rows, _), name in sass.TILES.items()}
    assert slabs == dict(zip(two_four_ops.TILES, two_four_ops.TILE_SLABS, strict=True))
