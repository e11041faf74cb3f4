"""Arguments and wrappings that users arrive with: each works, or is refused in one sentence that says what to do."""

import numpy as np
import pytest
import torch
from networks import MaskedConv, TwoPaths
from torch import nn

from smart_kernels import export, load, native, pack, save, sparse_conv2d, swap, verify
from smart_kernels.geometry import Geometry
from smart_kernels.paths import resolve

NATIVE = native.missing() is None


@pytest.fixture
def images():
    return torch.rand(3, 2, 9, 9)


def pruned(*layers):
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Conv2d):
                layer.weight.mul_(torch.rand_like(layer.weight) < 0.3)
    return model


@pytest.fixture
def model():
    return pruned(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel])
def test_a_wrapped_network_is_swapped_like_what_it_wraps(model, images, wrap):
    sparse = swap(wrap(model), images)
    assert sparse.uncaptured is None
    assert [row["name"] for row in sparse.report()] == ["0", "3"]
    torch.testing.assert_close(sparse(images), model(images))


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel])
def test_a_wrapped_network_of_two_paths_is_verified_on_both(wrap):
    model, images = wrap(TwoPaths().eval()), torch.rand(3, 1, 9, 9)
    assert set(verify(model, swap(model, images, measure=False), images)) == {"clean", "adv"}


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(2, 8, 3), nn.Linear(9, 5), MaskedConv(2, 8, 3)], ids=["conv", "fc", "masks"]
)
def test_a_bare_layer_is_a_network_of_one(images, layer):
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight) < 0.3)
    sparse = swap(layer, images, strict=NATIVE)
    assert [row["name"] for row in sparse.report()] == ["0"]
    torch.testing.assert_close(sparse(images), layer(images))


@pytest.mark.parametrize("made", ["traced", "scripted", "exported"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_program_is_refused(model, images, made):
    program = {
        "traced": lambda: torch.jit.trace(model, images),
        "scripted": lambda: torch.jit.script(model),
        "exported": lambda: torch.export.export(model, (images,)).module(),
    }[made]()
    with pytest.raises(TypeError, match="swap the network it was made from"):
        swap(program, images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.int32}, "dtype is torch.int32: a floating-point torch.dtype is needed"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16': a floating-point torch.dtype is needed"),
        ({"example": torch.rand(3, 2, 9, 9, device="meta")}, "example is on the meta device"),
        ({"example": torch.full((3, 2, 9, 9), torch.nan)}, "example holds NaN or infinity"),
    ],
)
def test_arguments_of_swap_are_checked(model, images, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        swap(**{"model": model, "example": images} | arguments)


@pytest.mark.parametrize("masks", [{}, None])
def test_masks_without_a_path_are_refused(images, masks):
    model = nn.Sequential(nn.Conv2d(2, 8, 3))
    model[0].masks = masks
    with pytest.raises(ValueError, match=r"0\.masks is (\{\}|None): a dict is needed"):
        swap(model, images)


@pytest.mark.parametrize("x", [None, [1.0], np.zeros((3, 2, 9, 9))])
def test_an_input_that_is_no_tensor_is_refused(model, images, x):
    with pytest.raises(TypeError, match=f"input is a {type(x).__name__}: a tensor"):
        swap(model, images, measure=False)(x)


@pytest.mark.skipif(not NATIVE, reason="the C++ kernels are not built")
def test_an_input_of_another_dtype_is_named(model, images):
    sparse = swap(model, images, backend="cpu")
    with pytest.raises(RuntimeError, match="input is not float32"):
        sparse(images.double())


def test_numbers_of_numpy_are_lambdas():
    assert resolve(np.float32(0.5)) == 0.5
    assert resolve(np.int64(1)) == "adv"
    with pytest.raises(ValueError, match="it has no stages"):
        resolve([])


@pytest.mark.parametrize("stride", [1.0, (1.5, 1), (1, 2, 3), ()])
def test_strides_are_integers(stride):
    with pytest.raises(ValueError, match="accepted are one integer, or two"):
        Geometry.of((4, 2, 3, 3), stride)


def test_the_operation_checks_its_operands():
    weight = torch.randn(4, 2, 3, 3)
    masks = {"clean": torch.rand(4, 2, 3, 3) < 0.5}
    for wrong in (None, masks["clean"], [masks["clean"]], {"clean": None}):
        with pytest.raises(TypeError, match=r"masks is a .*: a dict is needed"):
            pack(weight, wrong)
    for wrong in ([1], weight.to_sparse(), weight.to("meta")):
        with pytest.raises(TypeError, match="weight is a"):
            pack(wrong, masks)
    with pytest.raises(TypeError, match="packed is a Tensor"):
        sparse_conv2d(torch.rand(1, 2, 5, 5), weight)
    with pytest.raises(TypeError, match="input is a list"):
        sparse_conv2d([1], pack(weight, masks))


def test_functions_of_swapped_networks_refuse_others(model, images, tmp_path):
    for call in (lambda: save(model, tmp_path / "m.safetensors"), lambda: verify(swap(model, images), model, images)):
        with pytest.raises(TypeError, match="a Sequential was given: a swapped network is needed"):
            call()
    with pytest.raises(TypeError, match=r"timings is a str: give smart_kernels\.Timings"):
        swap(model, images, timings="times.json")


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_not_blamed_on_the_file(model, images, tmp_path, device):
    save(swap(model, images), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used here") as caught:
        load(tmp_path / "m.safetensors", device)
    assert type(caught.value) is ValueError


def test_a_name_of_another_format_is_refused(model, images, tmp_path):
    with pytest.raises(ValueError, match="named as an ONNX file, but format is 'pt2'"):
        export(swap(model, images), images, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not NATIVE, reason="the C++ kernels are not built")
def test_a_library_of_an_older_version_is_as_good_as_none(monkeypatch):
    monkeypatch.setattr(native, "OPERATORS", (*native.OPERATORS, "of_the_next_version"))
    with pytest.warns(RuntimeWarning, match="older than the package.*runs densely"):
        assert "it lacks of_the_next_version" in native._load()


class Normalised(nn.Module):
    """Subtracts a mean, which would make two channels of one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.rand(1, 2, 1, 1))
        self.body = pruned(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))

    def forward(self, x):
        return self.body(x - self.mean)


@pytest.mark.parametrize("x", [torch.rand(3, 1, 9, 9), torch.rand(2, 9, 9), torch.rand(9)], ids=["grey", "one", "row"])
def test_inputs_that_would_be_broadcast_are_refused(images, tmp_path, x):
    sparse = swap(Normalised().eval(), images)
    save(sparse, tmp_path / "m.safetensors")
    for each in (sparse, load(tmp_path / "m.safetensors")):
        for call in (each, each.replan):
            with pytest.raises(ValueError, match=r"input has shape .*: \(N, 2, H, W\) is needed"):
                call(x)
