"""Elementwise functions and products in programs of the CPU kernels."""

import operator

import pytest
import torch
import torch.nn.functional as F
from networks import MaskedConv
from programmed import forced, programs_of
from torch import fx, nn

from smart_kernels import elementwise, lowering, native, programs, verify
from smart_kernels.modules import SparseConv2d

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
FUNCTIONS = {
    programs.RELU6: F.relu6,
    programs.SILU: F.silu,
    programs.SIGMOID: torch.sigmoid,
    programs.HARDSWISH: F.hardswish,
    programs.HARDSIGMOID: F.hardsigmoid,
}


def run(step, isa, *inputs):
    """The value that one step makes of its inputs."""
    program = programs.Program([x.shape for x in inputs], [step], [len(inputs)], isa=isa)
    fields = programs._fields(step, "clean", [])
    sizes = [size for x in inputs for size in x.shape[1:]]
    create = torch.ops.smart_kernels.program_create  # which dispatches on a tensor
    number = create([torch.zeros(1)], sizes, fields, list(program.outputs), len(inputs[0]), isa)
    (y,) = torch.ops.smart_kernels.program_run(number, inputs)
    native.free_program(number)
    return y


@pytest.mark.parametrize("isa", native.cpu_isas())
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda number: FUNCTIONS[number].__name__)
def test_functions_are_those_of_torch(isa, function):
    x = torch.cat([torch.linspace(-110, 110, 4321), torch.randn(999), torch.randn(99) * 1e-3])
    special = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 88.7, -88.7, 3e38, -3e38]
    x = torch.cat([x, torch.tensor(special)]).reshape(1, 1, 1, -1)
    y, expected = run(programs.Step(programs.ACTIVATION, 0, -1, 1, function=function), isa, x), FUNCTIONS[function](x)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-36, equal_nan=True)


@pytest.mark.parametrize("isa", native.cpu_isas())
@pytest.mark.parametrize("other", [(5, 7, 3), (5, 1, 1)], ids=["of one size", "one pixel"])
@pytest.mark.parametrize("batch", [1, 18])
def test_products(isa, other, batch):
    x, y = torch.randn(batch, 5, 7, 3), torch.randn(batch, *other)
    assert torch.equal(run(programs.Step(programs.PRODUCT, 0, 1, 2), isa, x, y), x * y)


@pytest.mark.parametrize(
    ("step", "inputs", "message"),
    [
        ({"kind": programs.ACTIVATION, "function": 5}, [(2, 3, 3)], "unknown function 5"),
        ({"kind": programs.ACTIVATION, "function": -1}, [(2, 3, 3)], "unknown function -1"),
        ({"kind": programs.ACTIVATION, "other": 0}, [(2, 3, 3)], "only a convolution or a sum"),
        ({"kind": programs.PRODUCT}, [(2, 3, 3)], "a product needs another value"),
        ({"kind": programs.PRODUCT, "other": 1}, [(2, 3, 3), (3, 3, 3)], "must have the size"),
        ({"kind": programs.PRODUCT, "other": 1}, [(2, 3, 3), (2, 1, 3)], "must have the size"),
        ({"kind": programs.PRODUCT, "other": 1}, [(2, 1, 1), (2, 3, 3)], "must have the size"),
    ],
)
def test_steps_that_do_not_fit_are_refused(step, inputs, message):
    step = programs.Step(**{"x": 0, "other": -1, "y": len(inputs), **step})
    with pytest.raises(RuntimeError, match=message):
        run(step, "", *(torch.zeros(1, *shape) for shape in inputs))


class Gated(nn.Module):
    """Inverted residuals with squeeze and excitation, and every function that programs have, in place and not."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Sequential(MaskedConv(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU6(inplace=True))
        self.squeeze, self.excite = MaskedConv(12, 4, 1, density=0.6), MaskedConv(4, 12, 1, density=0.6)
        self.convs = nn.ModuleList(MaskedConv(12, 12, 3, padding=1, groups=12, density=0.8) for _ in range(5))
        self.modules_ = nn.ModuleList([nn.SiLU(inplace=True), nn.Hardswish(), nn.Hardsigmoid(), nn.Sigmoid()])
        self.last = MaskedConv(12, 5, 1)

    def forward(self, x):
        x = self.enter(x)
        gate = torch.sigmoid(self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        x = gate * x
        for conv, function in zip(self.convs, self.modules_, strict=False):
            x = function(conv(x))
        y = F.relu6(self.convs[-1](x), inplace=True)
        return self.last(F.hardswish(y) * F.hardsigmoid(x) * y.sigmoid())


def test_a_module_with_a_hook_is_no_part_of_a_program():
    model, x = nn.Sequential(MaskedConv(3, 4, 3), nn.SiLU(), MaskedConv(4, 4, 1)).eval(), torch.randn(2, 3, 6, 6)
    model[1].register_forward_hook(lambda module, inputs, output: output + 1)
    sparse = forced(model, x)
    assert lowering.rewrite(sparse.net, x) is None
    verify(model, sparse, x)


@pytest.mark.parametrize("batch", [1, 3, 16, 35])
def test_networks_of_them_are_one_program(poisoned, batch):
    model, x = Gated().eval(), torch.randn(batch, 3, 9, 8)
    sparse = forced(model, x)
    assert max(verify(model, sparse, x).values()) < 1e-5
    inside = list(sparse._graph_for(sparse.net, x).graph.find_nodes(op="call_module"))
    assert len(inside) == 1
    (program,) = programs_of(sparse, x)
    assert sum(isinstance(step.module, SparseConv2d) for step in program.steps) == 9


def test_other_products_and_functions_are_left_to_torch():
    graph = fx.Graph()
    x, y, flat = (graph.placeholder(name) for name in "xyf")
    shapes = {x: torch.Size((2, 3, 4, 4)), y: torch.Size((2, 3, 4, 1)), flat: torch.Size((2, 3))}
    for arguments in ((x, y), (x, 2.0), (x, flat)):
        assert elementwise.factors(shapes, graph.call_function(operator.mul, arguments)) is None
    assert elementwise.factors(shapes, graph.call_function(operator.mul, (x, x))) == (x, x)
    for node in (
        graph.call_function(F.gelu, (x,)),
        graph.call_method("tanh", (x,)),
        graph.call_function(F.silu, (x, y)),
    ):
        assert elementwise.activation({}, node) is None


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda number: FUNCTIONS[number].__name__)
@pytest.mark.parametrize("size", [1, 3, 4, 9, 20])
@pytest.mark.parametrize("batch", [1, 17])
def test_functions_of_convolutions_bound_and_keep_what_they_must(function, size, batch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (MaskedConv(2, 2, 1, bias=False, groups=groups, density=1.0) for groups in (1, 2))
            self.last = MaskedConv(2, 2, 1, bias=False, groups=2, density=1.0)

        def forward(self, x):
            y = FUNCTIONS[function](self.b(FUNCTIONS[function](self.a(x))))
            return self.last(y), y

    model = Net().eval()
    for conv, weight in ((model.a, torch.eye(2)), (model.b, torch.full((2, 1), 2.0)), (model.last, torch.ones(2, 1))):
        conv.weight.data = weight[:, :, None, None].clone()
    x = torch.randn(batch, 2, size, size) * 20
    sparse = forced(model, x)
    x[0, :, 0, 0], x[-1, :, -1, -1] = float("nan"), 1e30
    for ours, theirs in zip(sparse(x), model(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)
