"""A file of both paths against the dense file of one."""

import pytest
import torch

import smart_kernels
from smart.checkpoint import save_dense
from smart.models import create_model


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 0.43), (torch.float16, 0.50)], ids=["float32", "float16"])
@pytest.mark.parametrize("name", ["wrn_40_2", "wrn_16_8"])
def test_both_paths_take_less_than_half_of_one_dense_file(name, dtype, limit, tmp_path):
    model = create_model(name, density=0.2).eval().to(dtype)
    x = torch.rand(1, 3, 16, 16).to(dtype)
    sparse, dense = tmp_path / "sparse.safetensors", tmp_path / "dense.safetensors"
    smart_kernels.save(smart_kernels.swap(model, x, measure=False), sparse)
    save_dense(dense, model, "clean")
    ratio = sparse.stat().st_size / dense.stat().st_size
    print(name, dtype, ratio)
    assert ratio <= limit
