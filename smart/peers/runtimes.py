"""Runtimes that read ONNX: ONNX Runtime, OpenVINO, DeepSparse. Static shapes, one request at a time, float32."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from smart.peers.ready import Ready
from smart_kernels.onnx_export import INPUT, OUTPUT, write_onnx

# Writing takes seconds, and several runtimes read the same: shape -> file, kept as long as the network.
_written: weakref.WeakKeyDictionary[nn.Module, dict[torch.Size, bytes]] = weakref.WeakKeyDictionary()


def onnxruntime(net: nn.Module, example: Tensor) -> Ready:
    """ONNX Runtime's CPU provider, all graph optimisations on; it reads images and writes its output in place."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Threads that go on waiting actively after a call would slow down the runner whose turn is next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(onnx_file(net, example), options, providers=["CPUExecutionProvider"])
    output = torch.empty(session.get_outputs()[0].shape)
    binding = session.io_binding()
    binding.bind_output(OUTPUT, "cpu", 0, np.float32, tuple(output.shape), output.data_ptr())

    def call(x: Tensor) -> Tensor:
        x = x.contiguous()
        binding.bind_input(INPUT, "cpu", 0, np.float32, tuple(x.shape), x.data_ptr())
        session.run_with_iobinding(binding)
        return output

    return Ready(call)


def openvino(net: nn.Module, example: Tensor, precision: str = "f32") -> Ready:
    """OpenVINO's CPU plugin for latency: one stream with all threads; images and output share torch's memory.

    Args:
        precision: in which it may compute, ``"f32"`` or ``"bf16"``; left to itself it rounds float32 networks to
            bfloat16 on processors that have it.
    """
    import openvino as ov

    core = ov.Core()
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
    }
    request = core.compile_model(core.read_model(onnx_file(net, example)), "CPU", config).create_infer_request()
    output = torch.empty(tuple(request.get_output_tensor().shape))
    request.set_output_tensor(ov.Tensor(output.numpy(), shared_memory=True))

    def call(x: Tensor) -> Tensor:
        x = x.contiguous()  # the name keeps the memory that is shared
        request.set_input_tensor(ov.Tensor(x.numpy(), shared_memory=True))
        request.infer()
        return output

    return Ready(call, precision)


def openvino_bf16(net: nn.Module, example: Tensor) -> Ready:
    """The same computing in bfloat16, which other peers of a float32 network do not: less exact, and faster."""
    return openvino(net, example, "bf16")


def lacks_bf16() -> str | None:
    """Why OpenVINO has no bfloat16 here; None if it has."""
    import openvino as ov

    if "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return None
    return "this processor has no bfloat16 instructions that OpenVINO uses"


def deepsparse(net: nn.Module, example: Tensor) -> Ready:
    """DeepSparse, whose own kernels skip zeros too. Its licence allows evaluation only: it is never installed here."""
    from deepsparse import compile_model

    # It reads files only, and does not say when it has finished reading: the folder lives as long as the call.
    folder = tempfile.TemporaryDirectory()
    file = Path(folder.name) / "network.onnx"
    file.write_bytes(onnx_file(net, example))
    engine = compile_model(str(file), batch_size=len(example), num_cores=torch.get_num_threads())

    def call(x: Tensor, folder: tempfile.TemporaryDirectory[str] = folder) -> Tensor:
        return torch.from_numpy(engine.run([x.contiguous().numpy()])[0])

    return Ready(call)


def onnx_file(net: nn.Module, example: Tensor) -> bytes:
    """A network as ONNX for one shape of input, its zeros in place and its batch norms folded.

    Raises:
        ImportError: onnx or onnxscript is missing.
        ValueError: ONNX cannot express the network.
    """
    files = _written.setdefault(net, {})
    if example.shape not in files:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "network.onnx"
            write_onnx(net, (example,), None, file)
            files[example.shape] = file.read_bytes()
    return files[example.shape]
