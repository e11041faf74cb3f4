"""`smart export`: from checkpoints and from files of `smart swap`."""

import pytest
import torch

import smart
import smart_kernels
from smart import cli
from smart.checkpoint import save_checkpoint

SHAPE = ["--example-shape", "3", "1", "8", "8"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    file = tmp_path_factory.mktemp("run") / "tiny.safetensors"
    save_checkpoint(file, smart.create_model("tiny", num_classes=10, in_channels=1, density=0.2, seed=0))
    return str(file)


@pytest.fixture
def export(capfd, tmp_path):
    """Runs the command; gives its exit code, what it said, and the file it was to write."""

    def call(*argv):
        out = tmp_path / "net"
        try:
            code = cli.main(["export", *map(str, argv), "--out", str(out)])
        except SystemExit as stop:
            code = stop.code
        said = capfd.readouterr()
        assert "Traceback" not in said.err
        return code, said.out + said.err, out

    return call


def test_a_checkpoint_becomes_a_program_of_both_paths(checkpoint, export):
    code, said, out = export(checkpoint, *SHAPE)
    assert code == 0, said
    assert "format pt2; path both; images (N, 1, 8, 8), float32 on cpu" in said
    assert "largest relative error on 3 images: clean" in said and f"written: {out}" in said
    model, _ = smart.load_checkpoint(checkpoint)
    program, x = smart_kernels.load_exported(out), torch.rand(2, 1, 8, 8)
    for path in ("clean", "adv"):
        torch.testing.assert_close(program(x, path=path), model.eval()(x, path=path), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", ["adv", "0.3"])
def test_a_swapped_file_becomes_a_program_of_one_path(checkpoint, export, tmp_path, path):
    swapped = tmp_path / "s.safetensors"
    assert cli.main(["swap", checkpoint, "--out", str(swapped), *SHAPE]) == 0
    code, said, out = export(swapped, *SHAPE, "--path", path, "--fixed-batch")
    assert code == 0, said
    assert f"path {path}; images (3, 1, 8, 8)" in said
    assert smart_kernels.load_exported(out).shape == (3, 1, 8, 8)


def test_a_program_of_a_path_for_each_stage(checkpoint, export):
    code, said, out = export(checkpoint, *SHAPE, "--path", "adv,clean,0.5")
    assert code == 0 and "path adv,clean,0.5; " in said, said
    model, _ = smart.load_checkpoint(checkpoint)
    x = torch.rand(2, 1, 8, 8)
    expected = model.eval()(x, path=("adv", "clean", 0.5))
    torch.testing.assert_close(smart_kernels.load_exported(out)(x), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, model(x, path="adv"), rtol=1e-3)


def test_images_of_data_serve_as_example(checkpoint, export):
    code, said, _ = export(checkpoint, "--data", "digits", "--path", "clean", "--batch", 5)
    assert code == 0 and "largest relative error on 5 images" in said


def test_onnx(checkpoint, export):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    code, said, out = export(checkpoint, *SHAPE, "--path", "adv", "--format", "onnx")
    assert code == 0 and "format onnx; path adv" in said
    assert [each.name for each in onnx.load(out).graph.input] == ["images"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--format", "onnx"], 2, "an ONNX file holds one path: give --path clean, adv or a lambda"),
        (["--path", "7"], 2, "lambda is 7.0: it must lie in [0, 1]"),
        (["--path", "adv,clean"], 1, "a sequence of 2, one for each stage of the network: it has 3 stages"),
        (["--path", "adv,clean,dirty"], 2, "'dirty' is not a number"),
        (["--format", "tflite"], 2, "invalid choice: 'tflite'"),
        (["--example-shape", "2", "3", "8", "8"], 1, "this network takes"),
    ],
)
def test_wrong_usage(checkpoint, export, arguments, code, words):
    actual, said, out = export(checkpoint, *SHAPE, *arguments)
    assert actual == code and words in said and said.count("\n") == 1
    assert not out.exists()


def test_what_a_swapped_file_cannot_tell_must_be_said(checkpoint, export, tmp_path):
    swapped = tmp_path / "s.safetensors"
    assert cli.main(["swap", checkpoint, "--out", str(swapped), *SHAPE]) == 0
    code, said, _ = export(swapped)
    assert code == 2 and "give --example-shape or --data" in said
    code, said, _ = export(swapped, *SHAPE, "--backend", "dense")
    assert code == 2 and "is swapped already" in said
    code, said, _ = export(tmp_path / "missing", *SHAPE)
    assert code == 1 and "missing" in said
