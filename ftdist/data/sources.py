"""What the user calls data → files → blocks of raw rows. The whole is never in memory, only a block at a time."""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ftdist.errors import UserError

BLOCK_BYTES = 4 << 20
BLOCK_ROWS = 20_000
LONGEST_LINE = 256 << 20

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
PACKERS = (".gz", ".zst")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?$")
_HELD_OUT = re.compile(r"(^|[-_./])(validation|valid|val|dev)([-_./]|$)")
_TEST = re.compile(r"(^|[-_./])(test|eval)([-_./]|$)")

Kind = str  # "against" (only to decontaminate), "validation" or "train": this is also the order of precedence
KINDS = ("against", "validation", "train")


@dataclass(frozen=True)
class Source:
    """One thing that the user named: its files, and what was said about it."""

    name: str
    kind: Kind
    files: tuple[Path, ...]
    weight: float
    format: str
    columns: dict[str, str]


@dataclass(frozen=True)
class Block:
    """Raw rows that lie together in one file. Either `lines` (bytes, whole lines, `first` is the first one's number)
    or `rows` ((line, row) pairs), or `table` (an Arrow record batch, `first` is the first row's number)."""

    index: int
    source: int
    file: int
    first: int
    lines: bytes | None = None
    rows: list[tuple[int, Any]] | None = None
    table: Any = None


class BadRow(str):
    """In place of a row: why this piece of the file is no row. The text is the piece."""

    reason: str
    detail: str

    @staticmethod
    def of(text: str, reason: str, detail: str) -> BadRow:
        row = BadRow(text)
        row.reason, row.detail = reason, detail
        return row

    def __reduce__(self) -> tuple[Any, ...]:
        return BadRow.of, (str(self), self.reason, self.detail)


# --- which files -------------------------------------------------------------------------------------------------


def find(named: str, *, key: str) -> tuple[list[Path], list[Path], list[Path]]:
    """(files, held-out files, test files left aside) of a file, a folder, a glob or a hub id.

    Only in a folder or on the hub do names like `validation` and `test` decide. UserError names the key `key`.
    """
    path = Path(named).expanduser()
    try:
        if path.is_file():
            _check_ending(path, key)
            return [path], [], []
        if path.is_dir():
            return _folder(path, named, key)
    except OSError as error:
        raise UserError(f"{key}={named}: cannot be read ({error.strerror}); check the path and its permissions") from None
    if glob.has_magic(named):
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
        files = [p for p in found if p.is_file()]
        if not files:
            raise UserError(f"{key}={named}: the pattern matches no file; check it with `ls {named}`")
        for file in files:
            _check_ending(file, key)
        return files, [], []
    if _HUB_ID.match(named) and not any(named.endswith(e) for e in ENDINGS + PACKERS):
        return _folder(_download(named, key), named, key)
    raise UserError(f"{key}={named}: no such file, folder, pattern or hub id; give a path that exists")


def ending(path: Path) -> str:
    """The format's ending without the packer's: chat.jsonl.zst → .jsonl."""
    name = path.name.lower()
    for packer in PACKERS:
        name = name.removesuffix(packer)
    return Path(name).suffix


def _check_ending(path: Path, key: str) -> None:
    if ending(path) not in ENDINGS:
        raise UserError(
            f"{key}={path}: unknown file type {ending(path) or '(none)'!r}; allowed: {' '.join(ENDINGS)}, "
            "each also as .gz or .zst"
        )


def _folder(path: Path, named: str, key: str) -> tuple[list[Path], list[Path], list[Path]]:
    files = sorted(
        p
        for p in path.rglob("*")
        if p.is_file()
        and ending(p) in ENDINGS
        and not any(part.startswith(".") for part in p.relative_to(path).parts)
        and p.name not in ("dataset_infos.json", "dataset_info.json", "state.json")
        and p.stem.lower() not in ("readme", "license", "requirements")
    )
    if not files:
        raise UserError(f"{key}={named}: the folder holds no data file; looked for {' '.join(ENDINGS)}")
    test = [p for p in files if _TEST.search(str(p.relative_to(path)).lower())]
    held_out = [p for p in files if p not in test and _HELD_OUT.search(str(p.relative_to(path)).lower())]
    rest = [p for p in files if p not in test and p not in held_out]
    if not rest:  # the names say nothing about a split when they say the same of every file
        return files, [], []
    return rest, held_out, test


def _download(named: str, key: str) -> Path:
    """A local copy of a hub data set, from the hub's own cache when it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    repo, _, revision = named.partition("@")
    patterns = [f"*{e}{p}" for e in ENDINGS for p in ("", *PACKERS)]
    try:
        return Path(
            snapshot_download(repo, repo_type="dataset", revision=revision or None, allow_patterns=patterns)
        )
    except (OSError, HFValidationError, ValueError) as error:
        raise UserError(
            f"{key}={named}: no such file or folder here, and the hub gave no data set of that name "
            f"({type(error).__name__}); check the name, the network, and `hf auth login` for a gated one"
        ) from None


# --- files → blocks ----------------------------------------------------------------------------------------------


def blocks(sources: list[Source]) -> Iterator[Block]:
    """All blocks, numbered; the kinds in the order of precedence."""
    index = 0
    for kind in KINDS:
        for number, source in enumerate(sources):
            if source.kind != kind:
                continue
            for file_number, file in enumerate(source.files):
                try:
                    for piece in _pieces(file):
                        yield Block(index, number, file_number, **piece)
                        index += 1
                except OSError as error:
                    raise UserError(f"data.path={file}: cannot be read ({error}); check the file") from None


def _pieces(file: Path) -> Iterator[dict[str, Any]]:
    kind = ending(file)
    if kind == ".parquet":
        yield from _parquet(file)
        return
    try:
        with _open(file) as stream:
            if kind == ".txt":
                yield from _grouped(_paragraphs(stream))
            elif kind in (".csv", ".tsv"):
                yield from _grouped(_csv(stream, file, "\t" if kind == ".tsv" else None))
            elif kind == ".json" and not _is_json_lines(stream):
                yield from _grouped(_json_values(stream))
            else:
                yield from _lines(stream)
    except EOFError as error:
        raise UserError(f"data.path={file}: the compressed file is cut ({error}); fetch it again") from None
    except (gzip.BadGzipFile, _zstd_error()) as error:
        raise UserError(f"data.path={file}: not a valid compressed file ({error}); fetch it again") from None


def _zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError


class _Utf16Lines(io.RawIOBase):
    """UTF-16 and UTF-32 (told by their byte order mark) as UTF-8."""

    def __init__(self, stream: IO[bytes], encoding: str) -> None:
        self._text = codecs.getreader(encoding)(stream, errors="replace")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._text.read(len(buffer) // 4).encode("utf-8", "surrogatepass")
        buffer[: len(data)] = data
        return len(data)


def _open(file: Path) -> Any:
    """The file's bytes, unpacked, as UTF-8 without a byte order mark. What is not UTF-8 is found line by line later."""
    raw: Any = file.open("rb")
    name = file.name.lower()
    if name.endswith(".gz"):
        raw = io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20)
    elif name.endswith(".zst"):
        import zstandard

        raw = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True), 1 << 20)
    head = raw.peek(4)[:4]
    if head.startswith(codecs.BOM_UTF8):
        raw.read(3)
    elif head in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        raw = io.BufferedReader(_Utf16Lines(raw, "utf-32"), 1 << 20)
    elif head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raw = io.BufferedReader(_Utf16Lines(raw, "utf-16"), 1 << 20)
    return raw


def _is_json_lines(stream: Any) -> bool:
    """A .json file whose first line is a whole JSON object is JSON lines; it is read line by line then."""
    head = bytes(stream.peek(1 << 20)).lstrip()
    first, newline, _ = head.partition(b"\n")
    if not first.startswith(b"{") or not newline:
        return False
    try:
        json.loads(first)
    except ValueError:
        return False
    return True


def _lines(stream: Any) -> Iterator[dict[str, Any]]:
    first = 1
    rest = b""
    while True:
        chunk = stream.read(BLOCK_BYTES)
        if not chunk:
            break
        cut = chunk.rfind(b"\n") + 1
        if not cut:
            rest += chunk
            if len(rest) > LONGEST_LINE:
                raise UserError(
                    f"data.path={getattr(stream, 'name', 'file')}: line {first} is longer than "
                    f"{LONGEST_LINE >> 20} MB; this is not a file of JSON lines"
                )
            continue
        whole, rest = rest + chunk[:cut], chunk[cut:]
        yield {"first": first, "lines": whole}
        first += whole.count(b"\n")
    if rest:
        yield {"first": first, "lines": rest}


def _grouped(rows: Iterator[tuple[int, Any, int]]) -> Iterator[dict[str, Any]]:
    """(line, row, bytes) → blocks of limited size."""
    group: list[tuple[int, Any]] = []
    size = 0
    for line, row, weight in rows:
        group.append((line, row))
        size += weight
        if size >= BLOCK_BYTES or len(group) >= BLOCK_ROWS:
            yield {"first": group[0][0], "rows": group}
            group, size = [], 0
    if group:
        yield {"first": group[0][0], "rows": group}


def _paragraphs(stream: Any) -> Iterator[tuple[int, Any, int]]:
    """Plain text: a row is what lies between empty lines."""
    held: list[str] = []
    started = 1
    size = 0
    for number, line in enumerate(stream, 1):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            yield number, BadRow.of(line.decode("utf-8", "replace"), "wrong encoding", str(error)), len(line)
            continue
        if text.strip():
            if not held:
                started = number
            held.append(text)
            size += len(line)
        elif held:
            yield started, {"text": "".join(held).strip("\r\n")}, size
            held, size = [], 0
    if held:
        yield started, {"text": "".join(held).strip("\r\n")}, size


def _csv(stream: Any, file: Path, delimiter: str | None) -> Iterator[tuple[int, Any, int]]:
    csv.field_size_limit(LONGEST_LINE)
    if delimiter is None:
        first = bytes(stream.peek(1 << 16)).split(b"\n", 1)[0].decode("utf-8", "replace")
        delimiter = max(",;\t|", key=first.count)
    # a byte that is no UTF-8 becomes half a surrogate pair, and the row that holds it a reject
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    reader = csv.reader((line.replace("\0", "") for line in text), delimiter=delimiter)
    header = next(reader, None)
    if header is None:
        return
    header = [name.strip() for name in header]
    if len(set(header)) != len(header):
        raise UserError(f"data.path={file}: two columns have the same name ({', '.join(header)}); rename one")
    line = reader.line_num
    while True:
        started = line + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield started, BadRow.of("", "not valid CSV", str(error)), 0
            line = reader.line_num
            continue
        line = reader.line_num
        if cells is None:
            return
        if not cells:
            continue
        size = sum(map(len, cells))
        if len(cells) != len(header):
            detail = f"{len(cells)} cells where the header has {len(header)}"
            yield started, BadRow.of(delimiter.join(cells), "not valid CSV", detail), size
        else:
            # an empty cell is how CSV writes "nothing"
            yield started, {k: v if v != "" else None for k, v in zip(header, cells, strict=True)}, size


def _json_values(stream: Any) -> Iterator[tuple[int, Any, int]]:
    """The elements of a JSON array (also one inside an object's only list), or values one after another."""
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    decoder = json.JSONDecoder()
    space = re.compile(r"[\s,]*")
    buffer, at, line, finished = "", 0, 1, False
    array: bool | None = None
    wanted = 1 << 20

    while True:
        skipped = space.match(buffer, at)
        assert skipped
        line += buffer.count("\n", at, skipped.end())
        at = skipped.end()
        if at < len(buffer) and array is None:
            array = buffer[at] == "["
            at += array
            continue
        value: Any = None
        try:
            if at >= len(buffer):
                raise ValueError("end of file inside an array" if array else "")
            if array and buffer[at] == "]":
                return
            value, end = decoder.raw_decode(buffer, at)
            # a number or a word at the very end may go on in the next piece
            if end == len(buffer) and not finished and buffer[end - 1] not in "}]\"":
                raise ValueError
        except ValueError as error:
            if not finished:
                more = text.read(wanted)
                wanted = min(wanted * 2, LONGEST_LINE)  # a long value is not parsed again for every megabyte
                finished = not more
                buffer, at = buffer[at:] + more, 0
                continue
            if str(error):
                yield line, BadRow.of(buffer[at:], "not valid JSON", str(error)), len(buffer) - at
            return
        wanted = 1 << 20
        items = value if isinstance(value, list) and not array else [value]
        if not array and isinstance(value, dict) and line == 1:
            lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
            from ftdist.data.formats import detect

            if detect(value) is None and len(lists) == 1:
                items = lists[0]  # {"data": [rows]}
        for item in items:
            yield line, item, (end - at) // max(len(items), 1)
        line += buffer.count("\n", at, end)
        at = end
        if at > 1 << 22:
            buffer, at = buffer[at:], 0


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            first = 1
            for batch in parquet.iter_batches(batch_size=2_000):
                yield {"first": first, "table": batch}
                first += batch.num_rows
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        message = str(error).splitlines()[0]
        raise UserError(f"data.path={file}: not a readable parquet file ({message}); write it again") from None


def parse(block: Block) -> Iterator[tuple[int, Any]]:
    """(line, raw row or BadRow) of a block. Empty lines are no rows."""
    if block.rows is not None:
        yield from block.rows
    elif block.table is not None:
        for number, row in enumerate(block.table.to_pylist()):
            yield block.first + number, row
    elif block.lines is not None:
        for number, line in enumerate(block.lines.split(b"\n")):
            if not line or line.isspace():
                continue
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                yield block.first + number, BadRow.of(line.decode("utf-8", "replace"), "wrong encoding", str(error))
                continue
            try:
                yield block.first + number, json.loads(text)
            except (ValueError, RecursionError) as error:
                yield block.first + number, BadRow.of(text, "not valid JSON", str(error))
