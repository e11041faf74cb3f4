"""What a network's graph becomes, and what is left alone."""

import operator

import pytest
import torch
import torch.nn.functional as F
from networks import DualNorm, MaskedConv, TwoPaths
from torch import nn

from smart_kernels import fusion, paths, swap, verify
from smart_kernels.modules import PathAffine, SparseConv2d

TOLERANCE = 1e-5


@pytest.fixture
def images():
    return torch.rand(5, 1, 9, 9)


def test_everything_fuses_into_convolutions_and_affines(images):
    sparse = swap(TwoPaths().eval(), images)
    kinds = [type(m) for m in sparse.net.modules()]
    assert kinds.count(SparseConv2d) == 8
    # The norm that opens the pre-activation block is the second result of the convolution before it.
    assert kinds.count(PathAffine) == 1
    assert [type(m.second) for m in sparse.net.modules() if isinstance(m, SparseConv2d)].count(PathAffine) == 1
    assert not {nn.ReLU, nn.BatchNorm2d, DualNorm, nn.Dropout} & set(kinds)
    called = [node.target for node in sparse.net.graph.nodes if node.op == "call_function"]
    assert called == [operator.getitem, operator.getitem, F.adaptive_avg_pool2d, torch.flatten]


class Sums(nn.Module):
    """Sums and rectifiers in spellings that must not be fused wrongly."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.a, self.b = MaskedConv(1, 6, 3, padding=1), MaskedConv(1, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.norm = nn.BatchNorm2d(6)
        self.norm.running_mean.normal_()

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        if self.kind == "broadcast":
            return F.relu(a + b.mean((2, 3), keepdim=True))
        if self.kind == "used twice":
            return F.relu(a + b) * a
        if self.kind == "itself":
            return torch.relu(a + a)
        if self.kind == "scaled":
            return torch.add(a, b, alpha=2)
        if self.kind == "into the residual":
            c = torch.relu(b)
            c += a
            return c + b.sum()
        if self.kind == "input changed in place":
            y = self.a(x * 1)
            z = x * 2
            w = self.b(z)
            self.relu(z.sub_(1))
            return y + w + z.sum()
        if self.kind == "input changed before the norm":
            z = x * 2
            y = self.a(z)
            z.sub_(1)
            y = self.norm(y)
            w = self.norm(z.expand(-1, 6, -1, -1) * 1)
            return y + w
        if self.kind == "norm's input changed in place":
            z = self.a(x) * 1
            y = self.norm(z)
            z.sub_(1)
            return torch.relu(y) + z
        if self.kind == "called by keyword":
            return torch.relu(self.norm(input=self.a(x=x)))
        if self.kind == "shared module":
            return self.a(x).relu() + self.a(x * 2)
        return a.relu().add_(b).relu_()


@pytest.mark.parametrize(
    "kind",
    [
        "broadcast",
        "used twice",
        "itself",
        "scaled",
        "into the residual",
        "input changed in place",
        "input changed before the norm",
        "norm's input changed in place",
        "called by keyword",
        "shared module",
        "methods",
    ],
)
def test_sums_that_look_fusible_stay_right(images, kind):
    model = Sums(kind).eval()
    sparse = swap(model, images)
    assert sparse.uncaptured is None
    assert max(verify(model, sparse, images).values()) < TOLERANCE


def test_a_convolution_with_hooks_is_left_alone_and_said_so(images):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    model[2].register_forward_hook(lambda module, inputs, output: output + 1)
    sparse = swap(model, images)
    verify(model, sparse, images, TOLERANCE)
    assert [row["backend"] for row in sparse.report() if row["name"] == "2"] == ["original"]


def test_layers_left_alone_still_run_the_path_asked_for(model, images):
    model.layers[0].conv1.register_forward_hook(lambda module, inputs, output: output + 1)
    model.bn.norms["clean"] = nn.BatchNorm2d(16, track_running_stats=False)
    sparse = swap(model, images)
    assert (sparse.uncaptured is None) == (not model.control_flow)
    assert max(verify(model, sparse, images, TOLERANCE).values()) < TOLERANCE
    assert not torch.allclose(sparse(images, path="clean"), sparse(images, path="adv"))


class PathOfItsOwn(nn.Module):
    """Depends on the path beyond its layers: a graph captured on one path would be wrong on the other."""

    def __init__(self):
        super().__init__()
        self.conv = MaskedConv(1, 4, 3)

    def forward(self, x, path="clean"):
        with paths.running(path):
            y = self.conv(x)
        return y * 2 if path == "adv" else y


def test_a_graph_that_would_be_wrong_is_not_used(images):
    model = PathOfItsOwn().eval()
    sparse = swap(model, images)
    assert "computed something else" in sparse.uncaptured
    assert max(verify(model, sparse, images).values()) < TOLERANCE


def test_capture_notes_shapes(images):
    traced = fusion.capture(TwoPaths().eval(), images)
    assert traced.graph.find_nodes(op="placeholder", target=fusion.PATH)
    shapes = {node.target: tuple(node.meta["shape"]) for node in traced.graph.nodes if node.op == "call_module"}
    assert shapes["stem"] == (5, 16, 9, 9)
    assert shapes["layers.1.conv2"] == (5, 24, 5, 5)
