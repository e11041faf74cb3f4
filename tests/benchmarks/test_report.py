import json
import shutil

import pytest
import torch

from benchmarks import report
from benchmarks.studies import dial as study_dial
from benchmarks.studies.tables import in_common
from smart_kernels.verify import TOLERANCE


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_the_tables_are_those_of_the_result_files(page):
    assert report.updated(page) == page.read_text(encoding="utf-8"), "run `make results`"


def test_the_coverage_table_is_that_of_its_result_files():
    assert report.coverage() == report.COVERAGE.read_text(encoding="utf-8"), "run `make results`"


def test_every_result_file_says_where_it_comes_from():
    for file in report.RESULTS.glob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        assert set(content) >= {"machine", "versions", "commit", "command", "rows"}, file.name
        assert not content["commit"].endswith("-dirty"), f"{file.name} was measured on changed code"
        # Errors of single layers are checked before timing, and not kept; training has no output to compare.
        if not file.name.startswith(("layers-", "training-")):
            assert all(row["max_rel_error"] < TOLERANCE[getattr(torch, row["dtype"])] for row in content["rows"])


def test_every_study_says_where_it_comes_from():
    for file in (report.RESULTS / "studies").rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        assert set(content) >= {"machine", "versions", "commit", "command", "data", "recipe", "rows"}, file.name
        assert not content["commit"].endswith("-dirty"), f"{file.name} was measured on changed code"
        assert (
            all(len(content["data"][split]["sha256"]) == 64 for split in ("train", "val", "test")) and content["rows"]
        )
        for row in content["rows"]:
            assert set(row["accuracy"]) == set(row["robust"]) == {"clean", "adv"}
            assert row["robust"]["adv"] <= min(row["accuracy"]["adv"].values())


def test_what_the_page_says_of_every_seed_holds_in_every_seed():
    names = {
        "free": "SMART, density 0.2",
        "sparser": "SMART, density 0.1",
        "floats": "FLOATS, density 0.2",
        "dual": "dense, two batch norms",
        "pgd_at": "dense, PGD-AT",
        "shared": "shared",
        "disjoint": "disjoint",
    }
    rows = {(row["case"], row["seed"]): row for row in report.read(report.studies_file())["rows"]}
    for seed in {seed for case, seed in rows if case == names["free"]}:
        of_seed = {short: rows[name, seed] for short, name in names.items()}
        clean = {name: row["accuracy"]["clean"]["clean"] for name, row in of_seed.items()}
        clean_attacked = {name: row["robust"]["clean"] for name, row in of_seed.items()}
        robust = {name: row["robust"]["adv"] for name, row in of_seed.items()}
        weights = {name: row["nonzeros"]["union"] for name, row in of_seed.items()}
        assert max(robust, key=robust.get) == "pgd_at" and clean["pgd_at"] < clean["dual"]
        assert robust["sparser"] < robust["free"] < robust["dual"]
        assert clean["free"] < clean["dual"] and clean["free"] < clean["floats"]
        assert min(robust["shared"], robust["disjoint"]) - robust["free"] > 0.0295
        assert clean["free"] < clean["shared"] < clean["disjoint"]
        assert robust["disjoint"] <= robust["shared"]
        assert -1e-9 < robust["dual"] - robust["shared"] < 0.0145
        assert 0.003 < clean["dual"] - clean["shared"] < 0.0225
        assert clean_attacked["disjoint"] < 0.03 < clean_attacked["free"] < clean_attacked["shared"]
        assert weights["disjoint"] > 1.48 * weights["free"] and weights["shared"] < 0.76 * weights["free"]


def test_what_the_page_says_of_patterns_holds_in_every_seed():
    rows = {(row["case"], row["seed"]): row for row in report.read(report.studies_file())["rows"]}
    less = {"2:4": [], "blocks of 8x8, 0.5": [], "channels, 0.5": []}
    for seed in range(3):
        robust = {name: 100 * rows[name, seed]["robust"]["adv"] for name in (*less, "unstructured, 0.5")}
        for name, differences in less.items():
            differences.append(robust[name] - robust["unstructured, 0.5"])
    assert max(less["channels, 0.5"]) < -13
    for name in ("2:4", "blocks of 8x8, 0.5"):
        assert min(less[name]) < 0 < max(less[name]) and max(map(abs, less[name])) < 3


def test_what_the_page_says_at_density_0_2_holds_in_every_seed():
    rows = {(row["case"], row["seed"]): row for row in report.read(report.studies_file())["rows"]}

    def more(case: str, seed: int) -> tuple[float, float]:
        """Points of robustness and of clean accuracy more than standard masks give."""
        pair = rows[case, seed], rows["SMART, density 0.2", seed]
        robust, clean = ([row["robust"]["adv"] for row in pair], [row["accuracy"]["clean"]["clean"] for row in pair])
        return 100 * (robust[0] - robust[1]), 100 * (clean[0] - clean[1])

    for seed in range(3):
        for case in ("masks of their own in the last two stages", "masks in the last two stages"):
            robust, clean = more(case, seed)
            assert 0.8 < robust < 4 and 0.3 < clean < 2.4
        robust, clean = more("blocks of 8x8, 0.2", seed)
        assert -7.1 < robust < -3 and -6.3 < clean < -1.9
        robust, clean = more("channels, 0.2", seed)
        assert robust < -22 and clean < -13


def test_what_the_page_says_of_learning_holds_in_every_seed():
    names = {
        "momentum": "SMART, density 0.2",
        "kept": "sparse momentum, layers keep their density",
        "rigl": "RigL",
        "static": "static",
        "shared": "shared",
        "disjoint": "disjoint",
    }
    rows = {(row["case"], row["seed"]): row for row in report.read(report.studies_file())["rows"]}
    kept_less = []
    for seed in range(3):
        of_seed = {short: rows[name, seed] for short, name in names.items()}
        clean = {name: 100 * row["accuracy"]["clean"]["clean"] for name, row in of_seed.items()}
        robust = {name: 100 * row["robust"]["adv"] for name, row in of_seed.items()}
        work = {name: row["macs"]["adv"] for name, row in of_seed.items()}
        common = {name: in_common(row) for name, row in of_seed.items()}
        assert robust["static"] >= robust["momentum"] and clean["static"] > clean["momentum"] + 1.3
        assert work["momentum"] > 1.78 * work["static"] and work["static"] == work["kept"] == work["rigl"]
        assert robust["static"] - robust["kept"] > 1.49 and robust["static"] - robust["rigl"] > 3.99
        assert clean["static"] >= max(clean["kept"], clean["rigl"])
        assert 2.49 < robust["momentum"] - robust["rigl"] < 4.01
        assert common["static"] < 0.22 < 0.48 < min(common["kept"], common["rigl"]) < common["momentum"]
        assert 0 < clean["disjoint"] - clean["static"] < 1.34 and robust["static"] < robust["shared"]
        assert of_seed["static"]["nonzeros"]["union"] > 1.33 * of_seed["momentum"]["nonzeros"]["union"]
        kept_less.append(robust["kept"] - robust["momentum"])
    assert sorted(round(difference, 1) for difference in kept_less) == [-5.2, -2.7, 0.5]


def test_what_the_page_says_of_channels_holds_in_every_seed():
    rows = {(row["case"], row["seed"]): row for row in report.read(report.studies_file("channels"))["rows"]}
    others = {(row["case"], row["seed"]): row for row in report.read(report.studies_file())["rows"]}
    coupled_more = []
    for seed in range(3):
        standard, static = rows["SMART, density 0.2", seed], others["static", seed]
        each, coupled = (rows[f"{name}, 0.2, static", seed] for name in ("channels", "coupled"))

        def more(row, than):
            """Points of robustness and of clean accuracy."""
            robust = row["robust"]["adv"] - than["robust"]["adv"]
            return 100 * robust, 100 * (row["accuracy"]["clean"]["clean"] - than["accuracy"]["clean"]["clean"])

        for row in (each, coupled):
            assert abs(more(row, standard)[0]) < 3.01 and abs(more(row, standard)[1]) < 1
            assert 0.5 < row["macs"]["adv"] / standard["macs"]["adv"] < 0.56
        robust, clean = more(coupled, static)
        assert -1.9 < robust < 0.7 and -4.7 < clean < -0.9
        assert coupled["accuracy"]["adv"]["clean"] - each["accuracy"]["adv"]["clean"] > 0.0099
        coupled_more.append(round(more(coupled, each)[0], 1))
        for name in ("channels, 0.2", "coupled, 0.2"):
            robust, clean = more(rows[name, seed], standard)
            assert robust < -6 and clean < -7
        assert standard == standard | {"robust": others["SMART, density 0.2", seed]["robust"]}  # the same run again
    assert sorted(coupled_more) == [-0.3, 2.5, 2.8]


def test_what_the_page_says_of_dials_holds_in_every_seed():
    rows = {(row["case"], row["seed"]): row for row in report.read(report.studies_file("dial"))["rows"]}
    ends, trained = "SMART, density 0.2", "SMART, dial trained"
    for seed in range(3):
        at = {case: study_dial.places(rows[case, seed]) for case in (ends, trained)}
        clean, robust = (
            {case: {name: 100 * place[what] for name, place in places.items()} for case, places in at.items()}
            for what in ("clean", study_dial.ATTACK)
        )
        stages = [name for name in at[ends] if "stage" in name]
        assert all(clean[ends]["lambda 0.75"] > clean[ends][name] for name in stages)
        assert all(robust[ends]["lambda 0.75"] > robust[ends][name] for name in stages)
        least = min(clean[ends]["clean path"], clean[ends]["adversarial path"])
        assert clean[ends]["first 2 stages adversarial"] < least - 3
        assert robust[trained]["clean path"] > robust[ends]["clean path"] + 20
        assert 0.49 < robust[trained]["adversarial path"] - robust[ends]["adversarial path"] < 3.01
        assert robust[trained]["lambda 0.5"] > robust[trained]["adversarial path"] - 4
        assert clean[trained]["lambda 0.5"] > clean[trained]["clean path"] - 1.3
        assert min(clean[trained], key=clean[trained].get) == "adversarial path"
        for case in (ends, trained):
            for some in ("stage", "2 stages"):
                assert robust[case][f"first {some} adversarial"] > robust[case][f"last {some} adversarial"]
            saved = [1 - at[case][name]["macs"] / at[case]["lambda 0.5"]["macs"] for name in stages]
            assert min(saved) > 0.09 and max(saved) < 0.2, saved


def test_what_the_page_says_of_stronger_attacks_holds_in_every_seed():
    rows = report.read(report.studies_file("attacks"))["rows"]
    for row in rows:
        found = row["strong"]
        for path, most in {"clean": 6, "adv": 3}.items():
            if path in found["clean"]:
                pgd, restarts, autoattack = (
                    round(200 * found[name][path]) for name in ("pgd", "restarts", "autoattack")
                )
                assert 0 <= restarts - autoattack <= pgd - autoattack <= most
        assert all(check["passed"] for check in found.get("sanity", {}).get("checks", ()))
    for seed in {row["seed"] for row in rows}:
        of_seed = [row["strong"] for row in rows if row["seed"] == seed]
        by_pgd, by_autoattack = (sorted(of_seed, key=lambda each: each[name]["adv"]) for name in ("pgd", "autoattack"))
        assert by_pgd == by_autoattack


def test_pictures_are_of_the_newest_studies():
    for name, (kind, _) in report.STUDY_PICTURES.items():
        assert report.is_of(report.IMAGES / name, report.studies_file(kind)), "run `make results`"


def test_pictures_of_studies_are_drawn_when_the_results_changed_only(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    for kind in {kind for kind, _ in report.STUDY_PICTURES.values()}:
        (tmp_path / "studies" / kind).mkdir(parents=True, exist_ok=True)
        shutil.copy(report.studies_file(kind), tmp_path / "studies" / kind / "data-cpu-2000-01-02.json")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "IMAGES", tmp_path)
    report.draw_studies()
    before = {name: (tmp_path / name).read_bytes() for name in report.STUDY_PICTURES}
    ages = {name: (tmp_path / name).stat().st_mtime_ns for name in before}
    report.draw_studies()
    assert ages == {name: (tmp_path / name).stat().st_mtime_ns for name in before}
    (tmp_path / "methods.png").unlink()
    report.draw_studies()
    assert (tmp_path / "methods.png").read_bytes() == before["methods.png"]


def test_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="lacks the markers"):
        report.insert("# A title", "results", "a table")


def test_the_picture_is_of_the_newest_results():
    assert report.is_of(report.PICTURE, report.newest("cpu-cpu")), "run `make results`"


def test_the_picture_is_drawn_when_the_results_changed_only(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    for name in ("cpu-cpu-2000-01-02.json", "cpu-cpu-2000-01-01.json"):
        shutil.copy(report.newest("cpu-cpu"), tmp_path / name)
    picture = tmp_path / "cpu.png"
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "PICTURE", picture)
    report.draw()
    first, age = picture.read_bytes(), picture.stat().st_mtime_ns
    report.draw()
    assert picture.stat().st_mtime_ns == age
    (tmp_path / "cpu-cpu-2000-01-01.json").write_text("of no interest")
    report.draw()
    assert picture.stat().st_mtime_ns == age
    picture.unlink()
    report.draw()
    assert picture.read_bytes() == first, "the same picture must be the same file"
    newest = tmp_path / "cpu-cpu-2000-01-02.json"
    newest.write_text(newest.read_text() + "\n")
    assert not report.is_of(picture, newest)
    report.draw()
    assert report.is_of(picture, newest)


def test_speed_ups_of_channel_masks_are_those_of_their_files():
    text = report.COVERAGE.with_name("swapping.md").read_text(encoding="utf-8")
    for network in ("resnet34", "wrn_16_8"):
        for batch in (1, 16):
            cells = []
            for pattern in ("channel", "coupled", "coupled-16"):
                rows = report.read(report.newest(f"{network}-{pattern}-cpu"))["rows"]
                ms = {dense: [] for dense in (True, False)}
                for row in rows:
                    if row["batch"] == batch:
                        ms[row["runner"] != "smart_kernels"].append(row["ms_p50"])
                cells.append(f"{min(ms[True]) / max(ms[False]):.1f}x")
            assert f"| {batch} | {' | '.join(cells)} |" in text
