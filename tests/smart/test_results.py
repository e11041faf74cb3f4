import json
import subprocess

import pytest
import torch

from smart import results

ROWS = [
    {"network": "net", "pattern": "unstructured", "density": 0.2, "batch": batch, "device": "cpu", "threads": 1}
    | {"path": "clean", "runner": "smart_kernels", "ms_p50": 1.0}
    for batch in (1, 16)
]


def test_results_say_where_they_come_from(tmp_path):
    content = results.write_results(ROWS, tmp_path / "bench.json", "a command")
    assert json.loads((tmp_path / "bench.json").read_text()) == content == results.read(tmp_path / "bench.json")
    assert set(content) == {"machine", "versions", "commit", "date", "command", "rows"}
    assert content["rows"] == ROWS
    assert content["versions"]["torch"] == torch.__version__
    assert "onnxruntime" not in content["versions"]


def test_versions_of_the_peers_belong_to_it(monkeypatch):
    monkeypatch.setattr(results.peers, "versions", lambda runners: {f"of {sorted(runners)}": "1"})
    assert results.results(ROWS, "a command")["versions"]["of ['smart_kernels', 'smart_kernels']"] == "1"


def test_later_rows_replace_those_of_the_same_thing():
    old = results.results(ROWS, "first")
    again = {**ROWS[1], "density": 0.2003, "ms_p50": 2.0}
    other = {**ROWS[1], "density": 0.1}
    threads = {**ROWS[1], "threads": 2}
    merged = results.merge(old, results.results([again, other, threads], "second"))
    assert merged["rows"] == [ROWS[0], again, other, threads]
    assert merged["command"] == "first; second"
    assert results.merge(merged, results.results([], "first"))["command"] == "second; first"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"machine": {"cpu": "another"}}, "its machine is {'cpu': 'another'}, here"),
        ({"commit": "0000"}, "its commit is 0000, here it is"),
        ({"versions": {"torch": "1.0"}}, "its torch is 1.0, here it is 2"),
    ],
)
def test_results_of_another_run_are_not_mixed_in(change, why):
    new = results.results(ROWS, "second")
    with pytest.raises(ValueError, match=f"these results are of another run: {why}"):
        results.merge({**results.results(ROWS, "first"), **change}, new)


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": 1}'])
def test_what_is_no_results_file(tmp_path, text):
    file = tmp_path / "bench.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"{file} is no results file"):
        results.read(file)


def test_the_commit_is_dirty_when_code_was_changed_but_not_by_results(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    for file in ("smart/results.py", "benchmarks/results/cpu.json"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("as committed")
    monkeypatch.setattr(results, "__file__", str(tmp_path / "smart" / "results.py"))
    git("init")
    assert results.commit() is None
    git("add", ".")
    git("commit", "-m", "all")
    clean = results.commit()
    assert len(clean) == 12
    (tmp_path / "benchmarks/results/cpu.json").write_text("one more row")
    assert results.commit() == clean
    (tmp_path / "smart" / "results.py").write_text("changed")
    assert results.commit() == f"{clean}-dirty"


def test_outside_a_checkout_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "__file__", str(tmp_path / "results.py"))
    assert results.commit() is None
