"""What the operators of programs check of what they are given."""

import pytest
import torch

from smart_kernels import native, programs

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


def create_program(tensors=(), inputs=(2, 4, 4), steps=None, outputs=(1,), batch=1, isa=""):
    steps = step_of(programs.ADD) if steps is None else steps
    create = torch.ops.smart_kernels.program_create
    return create([*tensors, torch.zeros(1)], list(inputs), list(steps), list(outputs), batch, isa)


def step_of(kind, x=0, other=-1, y=1, second=-1, tensors=(-1,) * 7, numbers=(0,) * 5, geometry=(0,) * 13):
    return [kind, x, other, y, second, *tensors, *numbers, *geometry]


def test_a_good_one_runs():
    number = create_program(steps=step_of(programs.ADD, other=0))
    (y,) = torch.ops.smart_kernels.program_run(number, [torch.ones(1, 2, 4, 4)])
    assert torch.equal(y, torch.full((1, 2, 4, 4), 2.0))
    for wrong in (torch.ones(2, 2, 4, 4), torch.ones(1, 2, 4, 5), torch.ones(1, 2, 4, 4).double()):
        with pytest.raises(RuntimeError, match="made for float32"):
            torch.ops.smart_kernels.program_run(number, [wrong])
    with pytest.raises(RuntimeError, match="takes 1 inputs"):
        torch.ops.smart_kernels.program_run(number, [torch.ones(1, 2, 4, 4)] * 2)
    native.free_program(number)
    native.free_program(number)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "batch"),
        ({"inputs": (2, 4)}, "three numbers"),
        ({"inputs": (2, 0, 4)}, "below 1"),
        ({"steps": ()}, "steps"),
        ({"steps": (0,) * 7}, "steps"),
        ({"outputs": (0,)}, "made by no step"),
        ({"outputs": (2,)}, "made by no step"),
        ({"outputs": (-1,)}, "made by no step"),
        ({"isa": "mmx"}, "mmx"),
    ],
)
def test_its_arguments(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        create_program(**arguments)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"kind": 7}, "unknown kind"),
        ({"kind": -1}, "unknown kind"),
        ({"kind": programs.ADD, "x": 1}, "reads value 1"),
        ({"kind": programs.ADD, "x": -1}, "reads value -1"),
        ({"kind": programs.ADD, "other": 5}, "reads value 5"),
        ({"kind": programs.ADD, "y": 0}, "makes value 0"),
        ({"kind": programs.ADD, "second": 2}, "only a convolution makes"),
        ({"kind": programs.AVERAGE, "other": 0}, "only a convolution or a sum"),
        ({"kind": programs.AFFINE}, "needs a scale"),
        ({"kind": programs.AFFINE, "tensors": (-1, -1, -1, -1, -1, 0, 0)}, "affine_scale"),
        ({"kind": programs.AFFINE, "tensors": (-1, -1, -1, -1, -1, 3, 3)}, "reads tensor 3"),
        ({"kind": programs.CONVOLUTION}, "geometry"),
        ({"kind": programs.CONVOLUTION, "geometry": (4, 2, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1)}, "reads tensor -1"),
        ({"kind": programs.CONVOLUTION, "geometry": (4, 3, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1)}, "2 channels"),
        ({"kind": programs.MAX_POOL, "geometry": (1, 1, 5, 5, 1, 1, 0, 0, 0, 0, 1, 1, 1)}, "smaller than the"),
        ({"kind": programs.MAX_POOL, "geometry": (1, 1, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1)}, "padding"),
    ],
)
def test_its_steps(step, message):
    with pytest.raises(RuntimeError, match=message):
        create_program(steps=step_of(**step))


def test_sizes_of_what_is_added():
    pool = step_of(programs.MAX_POOL, geometry=(1, 1, 2, 2, 2, 2, 0, 0, 0, 0, 1, 1, 1))
    with pytest.raises(RuntimeError, match="the size of what"):
        create_program(steps=[*pool, *step_of(programs.ADD, x=1, other=0, y=2)])
