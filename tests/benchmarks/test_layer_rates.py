import json

import pytest

from benchmarks import layers
from benchmarks.cases import LAYERS
from smart_kernels import native

needs_library = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


@needs_library
def test_rows_hold_both_times_and_the_yardstick(tmp_path, monkeypatch, capsys):
    name = str(LAYERS[0])
    file = tmp_path / "layers.json"
    monkeypatch.setattr("sys.argv", ["layers", "--only", name, "--budget", "0.01", "--out", str(file)])
    layers.main()
    assert "written" in capsys.readouterr().out
    content = json.loads(file.read_text())
    (row,) = content["rows"]
    assert row["layer"] == name
    assert min(row["dense_us"], row["sparse_us"], row["gflops_on_nonzeros"], row["matrix_product_gflops"]) > 0
    table = layers.markdown(content, "layers.json").splitlines()
    assert len(table) == 5
    assert f"{row['sparse_us']:.0f}" in table[2]
    assert len({line.count("|") for line in table[:3]}) == 1


@needs_library
def test_a_layer_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["layers", "--only", "17x17"])
    with pytest.raises(SystemExit):
        layers.main()
    assert "no layer's name contains '17x17'" in capsys.readouterr().err


@needs_library
def test_wrong_results_are_not_timed(monkeypatch):
    monkeypatch.setattr(layers.reference, "sparse_conv2d", lambda x, weight, geometry: x.new_ones(1))
    with pytest.raises(layers.VerificationError, match="not timed"):
        layers.measure(LAYERS[0], 0.01)
