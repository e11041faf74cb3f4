"""ONNX files."""

import sys

import pytest
import torch
from exporting import TOLERANCE

from smart_kernels import export
from smart_kernels.verify import relative_error


@pytest.mark.parametrize("path", ["clean", "adv", 0.3])
def test_onnx_computes_the_same_for_any_batch(sparse, images, tmp_path, path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    from onnx.reference import ReferenceEvaluator

    errors = export(sparse, images, tmp_path / "net.onnx", path, format="onnx")
    assert max(errors.values()) < TOLERANCE
    model = onnx.load(tmp_path / "net.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    assert list(tmp_path.iterdir()) == [tmp_path / "net.onnx"]
    for batch in (1, 7):
        x = torch.rand(batch, 1, 9, 9)
        (y,) = ReferenceEvaluator(model).run(None, {"images": x.numpy()})
        assert relative_error(torch.from_numpy(y), sparse(x, path=path)) < TOLERANCE


def test_missing_packages_for_onnx_are_named(sparse, images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"format 'onnx' needs onnx: pip install onnx onnxscript"):
        export(sparse, images, tmp_path / "net.onnx", "adv", format="onnx")
    assert not list(tmp_path.iterdir())
