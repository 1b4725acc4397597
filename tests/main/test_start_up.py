"""A start imports and launches no more than it needs."""

import gc
import sys

import torch

from ftdist import imports, launcher

PACKAGE = """
import torch

@torch.compile
def one(x):
    return x + 1

@torch.compile(dynamic=False)
def two(x):
    return x + 2
"""


def test_compiled_functions_of_a_package_are_compiled_when_called(tmp_path, monkeypatch):
    (tmp_path / "bitsandbytes.py").write_text(PACKAGE)
    compiled = []

    def compiler(function, **keywords):
        compiled.append((function.__name__, keywords))
        return function

    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch, "compile", compiler)
    imports.bitsandbytes()
    package = sys.modules["bitsandbytes"]
    del sys.modules["bitsandbytes"]  # monkeypatch brings the real one back
    assert not compiled and torch.compile is compiler
    assert [package.one(1), package.one(2), package.two(1)] == [2, 3, 3]
    assert compiled == [("one", {}), ("two", {"dynamic": False})]


def test_a_process_alone_has_no_launcher_and_one_gpu(tmp_path):
    assert launcher.command(tmp_path, alone=True) == [sys.executable, "-m", "ftdist.worker", str(tmp_path)]
    assert "accelerate.commands.launch" in launcher.command(tmp_path, alone=False)
    assert launcher.told_alone({}, deepspeed=False, gpu=False) == {}
    assert launcher.told_alone({"CUDA_VISIBLE_DEVICES": "3,5"}, deepspeed=False, gpu=True) == {
        "CUDA_VISIBLE_DEVICES": "3"
    }
    told = launcher.told_alone({}, deepspeed=True, gpu=True)
    assert (told["RANK"], told["WORLD_SIZE"], told["CUDA_VISIBLE_DEVICES"]) == ("0", "1", "0")


def test_what_is_imported_without_collection_is_walked_by_none_later():
    before = gc.get_freeze_count()
    with imports.uncollected():
        assert not gc.isenabled()
        made = [[number] for number in range(1000)]
    assert gc.isenabled() and gc.get_freeze_count() >= before + len(made)
    gc.unfreeze()
