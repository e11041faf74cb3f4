"""ncnn, through its converter pnnx, in float32."""

from __future__ import annotations

import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smart.peers.ready import Call, Ready, fastest

# Which of its convolution algorithms are switched off. It picks the largest Winograd tile it may, not the fastest.
MODES = {
    "winograd63": (),
    "winograd43": ("use_winograd63_convolution",),
    "winograd23": ("use_winograd63_convolution", "use_winograd43_convolution"),
    "sgemm": ("use_winograd_convolution",),
}
REDUCED = ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_packed", "use_bf16_storage")


def ncnn(net: nn.Module, example: Tensor) -> Ready:
    """ncnn with packed layouts; Winograd tiles, and images together or one by one, as is fastest.

    Raises:
        ValueError: pnnx cannot convert the network.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = _convert(net, example, Path(folder))
        loaded = {mode: _load(files, off) for mode, off in MODES.items()}
    together = fastest({mode: _together(network) for mode, network in loaded.items()}, example)
    if len(example) == 1:
        return together
    chosen = loaded[together.mode]
    return fastest({together.mode: together.call, f"{together.mode}, one by one": _one_by_one(chosen)}, example)


def _convert(net: nn.Module, example: Tensor, folder: Path) -> Path:
    """Writes ``.ncnn.param`` and ``.ncnn.bin`` files; returns their common beginning."""
    import pnnx

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch deprecating TorchScript, which pnnx reads
        torch.jit.trace(net, example).save(folder / "network.pt")
    shape = ",".join(map(str, example.shape))
    command = [pnnx.EXEC_PATH, "network.pt", f"inputshape=[{shape}]", "fp16=0"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    files = folder / "network"
    if done.returncode or not files.with_suffix(".ncnn.param").exists():
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(f"pnnx cannot convert the network: {last}")
    return files


def _load(files: Path, off: tuple[str, ...]) -> Any:
    import ncnn

    network = ncnn.Net()
    network.opt.num_threads = torch.get_num_threads()
    network.opt.use_vulkan_compute = False
    for option in (*REDUCED, *off):
        setattr(network.opt, option, False)
    parts = (network.load_param, ".ncnn.param"), (network.load_model, ".ncnn.bin")
    for load, suffix in parts:
        if load(str(files.with_suffix(suffix))):
            raise ValueError(f"ncnn cannot read the network: it refused what pnnx wrote as {suffix}")
    return network


def _together(network: Any) -> Call:
    import ncnn

    def call(x: Tensor) -> Tensor:
        x = x.contiguous()  # the name keeps the memory that is shared
        extractor = network.create_extractor()
        extractor.input("in0", ncnn.Mat(x.numpy(), batch_index=0))
        _, out = extractor.extract("out0")
        # The extractor's memory is gone when this returns.
        return torch.from_numpy(out.numpy(batch_index=0)).clone()

    return call


def _one_by_one(network: Any) -> Call:
    together = _together(network)
    return lambda x: torch.cat([together(image) for image in x.split(1)])
