import json
import subprocess
import sys

import pytest

from benchmarks import report


def test_the_tables_in_readme_are_those_of_the_result_files():
    text = report.README.read_text(encoding="utf-8")
    assert report.updated(text) == text, "run `make results`"


def test_the_coverage_table_is_that_of_its_result_files():
    assert report.coverage() == report.COVERAGE.read_text(encoding="utf-8"), "run `make results`"


def test_every_result_file_says_where_it_comes_from():
    for file in report.RESULTS.glob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        assert set(content) >= {"machine", "versions", "commit", "command", "rows"}, file.name
        assert not content["commit"].endswith("-dirty"), f"{file.name} was measured on changed code"
        assert all(row["max_rel_error"] < 1e-4 for row in content["rows"])


def test_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="lacks the markers"):
        report.insert("# A title", "results", "a table")


def test_a_suite_runs_from_the_command_line(tmp_path):
    command = ["-m", "benchmarks.run", "--suite", "smoke", "--peers", "eager", "--budget", "0.01", "--out"]
    subprocess.run([sys.executable, *command, str(tmp_path)], check=True, capture_output=True, cwd=report.ROOT)
    (file,) = tmp_path.iterdir()
    rows = json.loads(file.read_text())["rows"]
    assert {row["runner"] for row in rows} == {"eager", "smart_kernels"}
    assert "| tiny | 2 | adv |" in report.render(json.loads(file.read_text()), file.name)
