"""A small tokenizer and a shortcut to `prepare` with the shipped defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_help import CHATML, DEFAULTS, build_tokenizer


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tokenizer(tmp_path_factory.mktemp("chatml"), CHATML, eos="<|im_end|>")


@pytest.fixture(scope="session")
def bare_tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tokenizer(tmp_path_factory.mktemp("bare"), None)


@pytest.fixture
def run_prepare(tmp_path: Path, tokenizer_path: Path) -> Any:
    from ftdist.data.prepare import prepare

    def run(path: Any, **changes: Any) -> Path:
        context: dict[str, Any] = {
            "tokenizer_path": str(tokenizer_path),
            "revision": None,
            "trust_remote_code": False,
            "max_length": 128,
            "packing": True,
            "task": "sft",
            "seed": 42,
            "cache_dir": tmp_path / "cache",
        }
        paths = [str(p) if isinstance(p, Path) else p for p in path] if isinstance(path, list) else str(path)
        return prepare(**{**DEFAULTS, **context, "path": paths, **changes})

    return run
