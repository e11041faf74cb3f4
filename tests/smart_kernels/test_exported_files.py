"""Files of exported networks that are not as they were written."""

import io
import json
import pickle
import shutil
import zipfile

import pytest
import torch
from exporting import PACKAGE, in_fresh_process, needs_library

from smart_kernels import FileError, load_exported


def rewritten(file, target, change):
    """A copy of an archive whose entries ``change(name without root, content)`` has altered."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name.partition("/")[2], old.read(name)))
    return target


def about(**changes):
    def change(name, content):
        return json.dumps(json.loads(content) | changes) if name.endswith("smart_kernels.json") else content

    return change


def test_damaged_and_foreign_files_are_refused(exported, tmp_path):
    content, file = bytearray(exported[1].read_bytes()), tmp_path / "net.pt2"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_exported(file)
    for cut in (0, 10, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:cut])
        with pytest.raises(FileError, match="is not a whole file of an exported network"):
            load_exported(file)
    with zipfile.ZipFile(exported[1]) as archive:
        entry = next(each for each in archive.infolist() if "weight_0" in each.filename)
    content[entry.header_offset + 200] ^= 1
    file.write_bytes(content)
    with pytest.raises(FileError, match=r"was damaged after it was written, in .*: copy or export it again"):
        load_exported(file)
    torch.save({}, file)
    with pytest.raises(FileError, match="an archive, but no exported network"):
        load_exported(file)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"version": 2}, FileError, "format version 2: this library reads version 1"),
        ({"kind": "other"}, FileError, "no exported network"),
        ({"operators": ["smart_kernels::sparse_conv9d"]}, RuntimeError, "operator smart_kernels::sparse_conv9d, which"),
        ({"format": "aoti", "machine": "pdp11"}, RuntimeError, "machine code for pdp11 .*: export it on a machine"),
        ({"format": "aoti"}, FileError, r"exported with torch .*, cannot be loaded"),
    ],
)
def test_files_this_machine_cannot_run_are_refused(exported, tmp_path, changes, error, message):
    file = rewritten(exported[1], tmp_path / "net.pt2", about(**changes))
    with pytest.raises(error, match=message):
        load_exported(file)


@needs_library
def test_a_machine_without_the_compiled_library_says_so(exported, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "smart_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import smart_kernels
try:
    smart_kernels.load_exported(sys.argv[2])
except RuntimeError as error:
    print(error)
"""
    said = in_fresh_process(code, tmp_path, exported[1])
    assert "needs the operator smart_kernels::sparse_conv2d" in said and "compiled library was not built" in said


class Bomb:
    def __reduce__(self):
        return exec, ("import builtins; builtins.bomb_went_off = True",)


def _bomb(save):
    buffer = io.BytesIO()
    save(Bomb(), buffer)
    return buffer.getvalue()


def _pickled_weight(name, content):
    if name.endswith("weights_config.json"):
        config = json.loads(content)
        next(entry for entry in config["config"].values() if entry["path_name"] == "weight_0")["use_pickle"] = True
        return json.dumps(config)
    return _bomb(torch.save) if name.endswith("/weight_0") else content


def _opaque_constant(name, content):
    if name.endswith("constants_config.json"):
        entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        return json.dumps({"config": {"bomb": entry}})
    return content


def _sample_inputs(name, content):
    return _bomb(torch.save) if "sample_inputs" in name else content


@pytest.mark.parametrize("change", [_pickled_weight, _opaque_constant, _sample_inputs])
def test_nothing_is_ever_unpickled(exported, tmp_path, change):
    import builtins

    file = rewritten(exported[1], tmp_path / "net.pt2", change)
    with pytest.raises(FileError, match=r"holds pickled data or machine code \(.*do not open it"):
        load_exported(file)
    assert not hasattr(builtins, "bomb_went_off")


def test_an_archive_of_torchs_older_pickles_is_refused(exported, tmp_path):
    file = rewritten(exported[1], tmp_path / "net.pt2", lambda name, content: content)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("version", "8.14")
        archive.writestr("serialized_state_dict.pt", _bomb(pickle.dump))
    with pytest.raises(FileError, match=r"holds pickled data or machine code \(version\)"):
        load_exported(file)
