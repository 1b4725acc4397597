"""Rows → a folder that `datasets.load_from_disk` maps, without importing datasets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

SHARD_TOKENS = 8_000_000
_BATCH_ROWS = 1_000


def write_shard(
    path: Path,
    columns: list[str],
    rows: int,
    lists: Callable[[int, int], list[tuple[np.ndarray, np.ndarray]]],
) -> None:
    """An Arrow stream of list<int32> columns. `lists(start, stop)` gives (values, lengths) of each column."""
    import pyarrow as pa

    schema = pa.schema(
        [(name, pa.list_(pa.int32())) for name in columns],
        metadata={"huggingface": json.dumps({"info": {"features": _features(columns)}})},
    )
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for start in range(0, rows, _BATCH_ROWS):
            arrays = []
            for values, lengths in lists(start, min(start + _BATCH_ROWS, rows)):
                offsets = np.zeros(len(lengths) + 1, np.int32)
                np.cumsum(lengths, out=offsets[1:])
                arrays.append(
                    pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.astype(np.int32, copy=False)))
                )
            writer.write_batch(pa.record_batch(arrays, schema=schema))


def finish(folder: Path, columns: list[str], shards: list[str], *, fingerprint: str) -> None:
    """The two JSON files that make a folder of Arrow files a data set."""
    state: dict[str, object] = {
        "_data_files": [{"filename": name} for name in shards],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": folder.name,
    }
    info = {"citation": "", "description": "", "features": _features(columns), "homepage": "", "license": ""}
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))


def _features(columns: list[str]) -> dict[str, object]:
    return {name: {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"} for name in columns}
