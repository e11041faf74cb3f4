import pytest

from smart.bench_tables import cases, commands_text, markdown, table

RESULTS = {
    "machine": {"cpu": "a processor", "gpu": None},
    "versions": {"python": "3", "torch": "2.13", "smart": "0", "smart_kernels": "0", "ncnn": "1.0"},
    "commit": "abc",
    "command": "a command",
}


def row(runner="smart_kernels", path="clean", ms=1.0, **other):
    """A row of which only what the tables read is meant."""
    times = {"ms_p20": 0.9 * ms, "ms_p50": ms, "ms_p80": 1.2 * ms}
    facts = {"network": "net", "pattern": "unstructured", "density": 0.2, "batch": 1, "device": "cpu", "threads": 1}
    rest = {"dtype": "float32", "images_per_s": 1e3 / ms, "weight_bytes": 40 if runner == "smart_kernels" else 100}
    return {**facts, **rest, **times, "runner": runner, "path": path, **other}


def one_case(**other):
    return [
        row("eager", ms=3.0, **other),
        row("ncnn", ms=2.0, **other),
        row(ms=1.0, **other),
        row(path="adv", ms=1.6, **other),
    ]


def test_every_path_is_compared_with_the_dense_runners_of_its_batch():
    small, large = cases([*one_case(batch=1), *one_case(batch=16)])
    assert (small.first["batch"], large.first["batch"]) == (1, 16)
    assert small.fastest_dense["runner"] == "ncnn"
    assert [small.speed_up(small.sparse[path]) for path in ("clean", "adv")] == [2.0, 1.25]


@pytest.mark.parametrize(
    "different", [{"density": 0.36}, {"batch": 2}, {"threads": 2}, {"network": "other"}, {"pattern": "2:4"}], ids=str
)
def test_what_differs_is_kept_apart(different):
    assert [len(case.sparse) for case in cases([*one_case(), *one_case(**different)])] == [2, 2]


def test_paths_of_different_densities_are_one_case():
    rows = [
        *one_case()[:3],
        row(path="adv", density=0.1),
        *one_case(batch=16)[:3],
        row(path="adv", density=0.1, batch=16),
    ]
    assert [list(case.sparse) for case in cases(rows)] == [["clean", "adv"]] * 2


def test_cases_are_sorted_but_networks_stay_in_order():
    rows = [*one_case(network="z", batch=16), *one_case(network="z"), *one_case(network="a", density=0.1)]
    assert [(case.first["network"], case.first["batch"]) for case in cases(rows)] == [("z", 1), ("z", 16), ("a", 1)]


def test_a_peer_of_less_precision_is_shown_but_not_compared_with():
    (case,) = cases([*one_case(), row("openvino-bf16", ms=0.5, dtype="bfloat16")])
    assert case.fastest_dense["runner"] == "ncnn"
    assert case.speed_up(case.dense["openvino-bf16"]) == 4.0


def test_without_dense_runners_there_is_nothing_to_compare():
    (case,) = cases([row()])
    assert case.fastest_dense is None and case.speed_up(case.sparse["clean"]) is None
    assert table([row()]).endswith("-")


def test_the_table_has_a_line_for_each_runner():
    heading, *lines = table(one_case()).splitlines()
    assert heading.split() == [
        *("network", "density", "batch", "runner", "path", "ms", "p20", "p50", "p80", "images/s", "speed-up")
    ]
    assert lines[1].split() == ["net", "0.20", "1", "ncnn", "1.800", "2.000", "2.400", "500.0", "1.00x"]
    assert lines[3].split() == ["net", "0.20", "1", "smart_kernels", "adv", "1.440", "1.600", "1.920", "625.0", "1.25x"]


def test_markdown_has_a_line_for_each_case():
    text = markdown({**RESULTS, "rows": [*one_case(), *one_case(batch=16)[:3]]}, ": there")
    lines = text.splitlines()
    heading = (
        "| network | density | batch | eager ms | ncnn ms | sparse clean ms | sparse adv ms | speed-up | weights |"
    )
    assert lines[0] == heading
    assert lines[2] == "| net | 0.2 | 1 | 3 | **2** | 1 | 1.6 | 2.00x / 1.25x | 0.40 |"
    assert lines[3] == "| net | 0.2 | 16 | 3 | **2** | 1 | - | 2.00x | 0.40 |"
    assert "a processor, 1 thread, float32; torch 2.13, ncnn 1.0." in lines[-1]
    assert lines[-1].endswith("at commit `abc` with `a command`: there.")


def test_threads_have_a_column_where_they_differ():
    text = markdown({**RESULTS, "rows": [*one_case(), *one_case(threads=4)]})
    assert "| batch | threads |" in text
    assert "| net | 0.2 | 1 | 4 | 3 |" in text
    assert "thread," not in text


def test_the_parts_of_a_suite_are_told_as_one_command():
    begin = "python -m benchmarks.run --suite cpu --append"
    joined = f"{begin} --only 'tiny, density 0.2'; {begin} --only wrn"
    assert commands_text(joined) == f"`{begin}`, in 2 parts (`--only`)"
    assert commands_text(f"{begin} --only wrn") == f"`{begin} --only wrn`"
    assert commands_text(f"{begin}; smart bench") == f"`{begin}; smart bench`"
