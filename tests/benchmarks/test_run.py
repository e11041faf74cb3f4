import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from benchmarks import cases, coverage, run
from benchmarks.cases import SUITES, NetworkCase
from smart import peers, results

QUICK = ["--suite", "smoke", "--peers", "eager", "--budget", "0.01"]


@pytest.fixture
def measured(monkeypatch):
    """Names of the runs; they give rows without measuring anything."""
    names = []

    def measure(self, peers, backend, budget_s, device):
        names.append(str(self))
        pattern = getattr(self.case, "pattern", "unstructured")
        row = {"network": self.case.network, "pattern": pattern, "density": self.case.density + 0.001}
        row |= {"batch": self.batch, "device": device, "threads": torch.get_num_threads(), "dtype": "float32"}
        row |= {"ms_p20": 1.0, "ms_p50": 1.0, "ms_p80": 1.0, "images_per_s": 1000.0, "weight_bytes": 1}
        row |= {"asked_density": self.case.density, "asked_pattern": pattern}
        runners = [(runner, "clean") for runner in (*peers, "smart_kernels")] + [("smart_kernels", "adv")]
        return [{**row, "runner": runner, "path": path} for runner, path in runners]

    monkeypatch.setattr(run.Run, "measure", measure)
    threads = torch.get_num_threads()
    yield names
    torch.set_num_threads(threads)


def test_a_suite_runs_from_the_command_line(tmp_path):
    table = tmp_path / "table.md"
    command = [sys.executable, "-m", "benchmarks.run", *QUICK, "--out", str(tmp_path), "--markdown", str(table)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=run.RESULTS.parent.parent)
    (file,) = tmp_path.glob("smoke-cpu-*.json")
    assert f"written: {file}, {table}" in done.stdout
    rows = json.loads(file.read_text())["rows"]
    assert [(row["batch"], row["runner"], row["path"]) for row in rows[:3]] == [
        (1, "eager", "clean"),
        (1, "smart_kernels", "clean"),
        (1, "smart_kernels", "adv"),
    ]
    assert "| tiny | 0.2 | 2 |" in table.read_text()


def test_the_cpu_suite():
    assert {case.network for case in SUITES["cpu"]} == {"tiny", "resnet34", "wrn_16_8", "wrn_40_2"}
    batches = {(case.network, case.density): case.batches for case in SUITES["cpu"]}
    for network in ("resnet34", "wrn_16_8", "wrn_40_2"):
        assert [batches[network, density] for density in (0.2, 0.1, 0.36)] == [(1, 16, 64), (1,), (1, 16)]
    assert batches["tiny", 0.2] == (1, 16)


def test_parts_of_every_suite_can_be_run(measured, tmp_path):
    run.main(["--only", "wrn_40_2, density 0.2, batch 16", "--peers", "eager", "--out", str(tmp_path)])
    assert measured == ["wrn_40_2, density 0.2, batch 16"]
    measured.clear()
    run.main(["--only", "resnet34, density 0.2, batch 1,", "--peers", "eager", "--out", str(tmp_path)])
    assert measured == ["resnet34, density 0.2, batch 1"]
    assert str(run.Run(coverage.CASES[0], 1)) == f"{coverage.CASES[0]}, batch 1"


def test_what_was_measured_is_kept_when_a_run_dies(measured, tmp_path, monkeypatch):
    measure = run.Run.measure

    def die(self, *args):
        if self.batch == 2:
            raise RuntimeError("out of memory")
        return measure(self, *args)

    file = tmp_path / "part.json"
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "measure", die)
        with pytest.raises(RuntimeError):
            run.main([*QUICK, "--out", str(file)])
    assert {row["batch"] for row in results.read(file)["rows"]} == {1}
    measured.clear()
    run.main([*QUICK, "--out", str(file), "--append"])
    assert measured == ["tiny, density 0.2, batch 2"]
    assert [row["batch"] for row in results.read(file)["rows"]] == [1, 1, 1, 2, 2, 2]


def test_a_run_that_goes_on_finds_its_file_in_the_folder(measured, tmp_path, capsys):
    old = tmp_path / "smoke-cpu-2000-01-01.json"
    run.main([*QUICK, "--only", "batch 1", "--out", str(old)])
    run.main([*QUICK, "--append", "--out", str(tmp_path)])
    assert measured == ["tiny, density 0.2, batch 1", "tiny, density 0.2, batch 2"]
    assert list(tmp_path.iterdir()) == [old]
    assert "holds 1 of 2 already" in capsys.readouterr().err
    # Nothing is left to do, and nothing is lost.
    run.main([*QUICK, "--append", "--out", str(tmp_path)])
    assert len(measured) == 2 and len(results.read(old)["rows"]) == 6


def test_without_append_a_file_is_written_anew(measured, tmp_path):
    file = tmp_path / "file.json"
    for part in ("batch 1", "batch 2"):
        run.main([*QUICK, "--only", part, "--out", str(file)])
    assert {row["batch"] for row in results.read(file)["rows"]} == {2}


def test_other_threads_and_peers_are_measured_beside_what_is_there(measured, tmp_path):
    file = tmp_path / "file.json"
    run.main([*QUICK, "--only", "batch 1", "--out", str(file)])
    run.main([*QUICK, "--only", "batch 1", "--out", str(file), "--append", "--threads", "2"])
    assert [row["threads"] for row in results.read(file)["rows"]] == [1, 1, 1, 2, 2, 2]
    run.main([*QUICK, "--only", "batch 1", "--out", str(file), "--append", "--peers", "fused"])
    rows = [(row["runner"], row["threads"]) for row in results.read(file)["rows"]]
    assert len(measured) == 3 and len(rows) == len(set(rows)) + 2 == 7


def test_results_of_another_commit_are_not_gone_on_with(measured, tmp_path, monkeypatch, capsys):
    file = tmp_path / "smoke-cpu-2000-01-01.json"
    run.main([*QUICK, "--out", str(file)])
    before = file.read_text()
    monkeypatch.setattr(results, "commit", lambda: "0000")
    with pytest.raises(SystemExit) as stopped:
        run.main([*QUICK, "--out", str(file), "--append"])
    assert stopped.value.code == 2 and "is of another run: its commit is" in capsys.readouterr().err
    run.main([*QUICK, "--out", str(tmp_path), "--append"])
    assert file.read_text() == before and len(list(tmp_path.iterdir())) == 2


def test_density_and_network_tell_cases_apart(measured, tmp_path, monkeypatch):
    def case(density):
        return NetworkCase("tiny", (1, 8, 8), density, (1,))

    monkeypatch.setitem(cases.SUITES, "smoke", [case(0.2), case(0.1)])
    file = tmp_path / "file.json"
    run.main([*QUICK, "--only", "density 0.2", "--out", str(file)])
    run.main([*QUICK, "--append", "--out", str(file)])
    assert measured == ["tiny, density 0.2, batch 1", "tiny, density 0.1, batch 1"]


def test_peers_are_all_that_are_installed_by_default(measured, tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ncnn" else found(name))
    run.main(["--suite", "smoke", "--out", str(tmp_path / "file.json")])
    assert "not installed, so not measured: " in capsys.readouterr().err
    runners = {row["runner"] for row in results.read(tmp_path / "file.json")["rows"]}
    assert {"eager", "fused", "compile"} <= runners and "ncnn" not in runners


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "vgg"], "no case's name contains 'vgg': the first is 'tiny, density 0.2, batch 1'"),
        (["--suite", "coverage", "--plot", "a.png"], "the coverage suite has its own table"),
        (["--device", "cuda", "--peers", "eager"], "suite 'cpu' is for CPUs"),
        (["--suite", "gpu", "--device", "cpu", "--peers", "eager"], "suite 'gpu' is for GPUs"),
        (["--peers", "tvm"], "invalid choice: 'tvm'"),
        (["--peers", "nowhere"], "peer 'nowhere' needs what is not installed: pip install no_such_package"),
    ],
)
def test_wrong_usage(arguments, message, monkeypatch, capsys):
    monkeypatch.setitem(peers.PEERS, "nowhere", peers.Peer(lambda net, x: None, ("no_such_package",)))
    with pytest.raises(SystemExit) as stopped:
        run.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_picture_is_drawn(measured, tmp_path):
    pytest.importorskip("matplotlib")
    run.main([*QUICK, "--out", str(tmp_path / "file.json"), "--plot", str(tmp_path / "bars.png")])
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_the_gpu_suite():
    runs = [
        (case.network, case.pattern, case.density, case.dtype, batch)
        for case in SUITES["gpu"]
        for batch in case.batches
    ]
    assert len(runs) == len(set(runs)) == 54 and {run[-1] for run in runs} == {1, 16, 256}
    assert {run[1:4] for run in runs} == {
        ("block:64x16", 0.2, "float16"),
        ("channel", 0.2, "float16"),
        ("coupled:16", 0.2, "float16"),
        ("unstructured", 1.0, "float16"),
        ("2:4", 0.5, "float16"),
        ("unstructured", 0.2, "float16"),
    }
    assert {(case.pattern, case.density) for case in SUITES["gpu"] if case.backend == "cuda"} == {
        ("2:4", 0.5),
        ("unstructured", 0.2),
    }
    assert runs[0] == ("resnet34", "block:64x16", 0.2, "float16", 256)


def test_the_gpu_suite_stops_at_its_limit_and_goes_on(measured, tmp_path, monkeypatch, capsys):
    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))
    suite = ["--suite", "gpu", "--only", "batch 256", "--peers", "eager", "--append", "--out", str(tmp_path)]
    run.main([*suite, "--limit", "250"])
    assert measured == [
        "resnet34, block:64x16, density 0.2, batch 256",
        "wrn_16_8, block:64x16, density 0.2, batch 256",
    ]
    (file,) = tmp_path.glob("gpu-cuda-*.json")
    assert "16 of 18 are left after 250 s: --append goes on" in capsys.readouterr().out
    run.main(suite)
    assert len(measured) == len(set(measured)) == 18
    run.main(suite)
    assert len(measured) == 18 and len(results.read(file)["rows"]) == 54


@pytest.mark.parametrize(("own", "taken"), [("channels", "channels"), (None, "dense")])
def test_a_case_may_name_its_backend(monkeypatch, own, taken):
    asked = []

    def swap(model, x, backend):
        asked.append(backend)
        raise InterruptedError

    monkeypatch.setattr(run.smart_kernels, "swap", swap)
    case = NetworkCase("tiny", (1, 8, 8), 0.2, (1,), backend=own)
    with pytest.raises(InterruptedError):
        run.Run(case, 1).measure(["eager"], "dense", 0.1, "cpu")
    assert asked == [taken]


def test_peers_of_the_gpu_suite_are_the_fastest_dense_ones(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = []
    monkeypatch.setattr(peers, "select", lambda *given: asked.append(given) or (["eager"], None))
    with pytest.raises(SystemExit):
        run.main(["--suite", "gpu", "--only", "nothing"])
    assert asked == [(["cudnn", "max-autotune"], "cuda")]


def test_a_case_in_half_precision_with_a_pattern_is_measured_as_such(monkeypatch):
    case = NetworkCase("tiny", (3, 8, 8), 0.5, (2,), "channel", "bfloat16")
    rows = run.Run(case, 2).measure(["eager"], "auto", 0.01, "cpu")
    assert {row["dtype"] for row in rows} == {"bfloat16"} and {row["pattern"] for row in rows} == {"channel"}
    assert run.Run(case, 2).is_in(rows, ["eager"], "cpu")
    assert not run.Run(NetworkCase("tiny", (3, 8, 8), 0.5, (2,)), 2).is_in(rows, ["eager"], "cpu")
