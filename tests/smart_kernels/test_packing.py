import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smart_kernels import pack
from smart_kernels.packing import FORMATS
from smart_kernels.packing.bits import pack_bits, unpack_bits
from smart_kernels.packing.unstructured import UnstructuredWeight, slab_channels

SHAPES = [(1, 1, 1, 1), (5, 3, 3, 3), (8, 70, 1, 1), (4, 33, 5, 5), (3, 9, 7, 7), (2, 3, 17, 19), (16, 40, 3, 3)]


def masked(shape, density_clean=0.2, density_adv=0.2, dtype=torch.float32):
    weight = torch.randn(shape).to(dtype)
    return weight, {"clean": torch.rand(shape) < density_clean, "adv": torch.rand(shape) < density_adv}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("densities", [(0.2, 0.2), (0.0, 1.0), (0.0, 0.0), (1.0, 1.0), (0.05, 0.7)], ids=str)
def test_every_format_gives_the_masked_weight_back_exactly(format, shape, dtype, densities):
    weight, masks = masked(shape, *densities, dtype=dtype)
    packed = pack(weight, masks, format)
    packed.validate()
    for path, mask in masks.items():
        assert torch.equal(packed.dense(path), weight * mask)
        assert packed.dense(path).dtype == dtype
        assert torch.equal(packed.mask(path), mask)
        assert packed.nonzeros(path) == int(mask.sum())
        assert packed.density(path) == pytest.approx(float(mask.float().mean()))


@pytest.mark.parametrize("format", FORMATS)
def test_a_kept_zero_is_told_from_a_dropped_weight(format):
    weight, masks = torch.zeros(2, 3, 3, 3), {"clean": torch.rand(2, 3, 3, 3) < 0.5}
    assert torch.equal(pack(weight, masks, format).mask("clean"), masks["clean"])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("lam", [0.25, 0.5, 0.9])
def test_a_lambda_mixes_the_masks(format, lam):
    weight, masks = masked((8, 20, 3, 3))
    packed = pack(weight, masks, format)
    expected = weight * ((1 - lam) * masks["clean"].float() + lam * masks["adv"].float())
    torch.testing.assert_close(packed.dense(lam), expected, rtol=1e-6, atol=0)
    both = masks["clean"] & masks["adv"]
    assert torch.equal(packed.dense(lam)[both], weight[both])


def test_two_paths_share_every_value():
    weight, masks = masked((32, 32, 3, 3))
    packed = UnstructuredWeight(weight, masks)
    assert len(packed.values) == int((masks["clean"] | masks["adv"]).sum())
    # Five bytes a non-zero of the union, and the segments' offsets.
    assert packed.nbytes <= 5 * len(packed.values) + 4 * packed.segments.numel()
    assert packed.nbytes <= 0.60 * 4 * weight.numel()


def test_running_a_path_copies_no_weights():
    packed = UnstructuredWeight(*masked((8, 8, 3, 3)))
    assert packed.path_values("clean").data_ptr() == packed.path_values("adv").data_ptr() == packed.values.data_ptr()


def test_mixed_values_are_kept_for_a_few_lambdas_only():
    packed = UnstructuredWeight(*masked((8, 8, 3, 3)))
    assert packed.path_values(0.5) is packed.path_values(0.5)
    for i in range(1, 20):
        packed.path_values(i / 20)
    assert len(packed._mixes) <= 4


@given(st.integers(1, 600), st.integers(1, 400))
def test_slabs_keep_codes_in_a_byte_where_they_can(channels, taps):
    slab = slab_channels(channels, taps)
    assert 1 <= slab <= channels
    assert slab * taps <= 256 or slab == 1


def test_auto_takes_the_smaller_format():
    weight, masks = masked((16, 16, 3, 3))
    assert pack(weight, masks).format == "unstructured"
    full = dict.fromkeys(masks, torch.ones_like(masks["clean"]))
    assert pack(weight, full).format == "dense"


@given(st.lists(st.booleans(), min_size=0, max_size=70))
def test_bits_round_trip(values):
    mask = torch.tensor(values, dtype=torch.bool)
    bits = pack_bits(mask)
    assert len(bits) == (len(values) + 7) // 8
    assert torch.equal(unpack_bits(bits, (len(values),)), mask)


def test_bits_of_another_size_or_with_a_stray_bit_are_refused():
    with pytest.raises(ValueError, match=r"takes uint8 \(2,\)"):
        unpack_bits(torch.zeros(3, dtype=torch.uint8), (3, 3))
    with pytest.raises(ValueError, match="corrupt"):
        unpack_bits(torch.tensor([0, 255], dtype=torch.uint8), (3, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, m: (w[0], m), r"\(K, C/groups, R, S\) is needed"),
        (lambda w, m: (w.long(), m), "floating-point"),
        (lambda w, m: (w, {}), "one or two paths"),
        (lambda w, m: (w, {**m, "third": m["adv"]}), "one or two paths"),
        (lambda w, m: (w, {"clean": m["clean"].float()}), "bool is needed"),
        (lambda w, m: (w, {"clean": m["clean"][:1]}), "the weight's"),
        (lambda w, m: (w.fill_(float("nan")), m), "NaN or infinity"),
        (lambda w, m: (torch.zeros(0, 3, 3, 3), m), "none of them 0"),
    ],
)
def test_what_cannot_be_packed_is_refused(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pack(*change(*masked((4, 3, 3, 3))))


def test_nan_outside_the_masks_is_no_concern():
    weight, masks = masked((4, 3, 3, 3))
    weight[~(masks["clean"] | masks["adv"])] = float("nan")
    assert torch.isfinite(pack(weight, masks, "unstructured").dense("clean")).all()
    assert torch.isfinite(pack(weight, masks, "dense").dense("clean")).all()


def test_unknown_names_are_refused():
    weight, masks = masked((4, 3, 3, 3))
    with pytest.raises(ValueError, match="unknown format 'csr'"):
        pack(weight, masks, "csr")
    for format in FORMATS:
        with pytest.raises(ValueError, match="unknown path 'other'"):
            pack(weight, masks, format).dense("other")


@pytest.mark.parametrize("corrupt", ["codes", "segments"])
def test_corrupt_indices_are_refused_when_loaded_and_never_run(corrupt):
    weight, masks = masked((8, 20, 3, 3))
    packed = UnstructuredWeight(weight, masks)
    state = {name: value.clone() for name, value in packed.state_dict().items()}
    state[corrupt][3] = 200
    with pytest.raises(ValueError, match="corrupt"):
        packed.load_state_dict(state)
    assert int(packed.segments[-1]) != len(packed.values)  # what makes the kernel refuse it
