"""Files → blocks of raw rows. The whole is never in memory, only a block at a time."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ftdist.data.formats import detect
from ftdist.data.sources import KINDS, Source, ending
from ftdist.errors import UserError

BLOCK_BYTES = 4 << 20
BLOCK_ROWS = 20_000
LONGEST_LINE = 256 << 20


@dataclass(frozen=True)
class Block:
    """Raw rows that lie together in one file. Either `lines` (bytes, whole lines, `first` is the first
    one's number) or `rows` ((line, row) pairs), or `table` (an Arrow record batch, `first` is the first
    row's number)."""

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
        self._text = codecs.getreader(encoding)(stream, "replace")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._text.read(len(buffer) // 4).encode("utf-8", "surrogatepass")
        buffer[: len(data)] = data
        return len(data)


def _open(file: Path) -> Any:
    """The file's bytes, unpacked, as UTF-8 without a byte order mark. What is not UTF-8 is found line by
    line later."""
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


_SPACE = re.compile(r"[\s,]*")
_NEXT_OBJECT = re.compile(r"\}\s*,?\s*(?=\{)")


def _json_values(stream: Any) -> Iterator[tuple[int, Any, int]]:
    """The elements of a JSON array (also of an object's only list), or values one after another.

    A broken element is one bad row: reading goes on where the next object seems to begin.
    """
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    decoder = json.JSONDecoder()
    buffer, at, line, finished = "", 0, 1, False
    array: bool | None = None
    first = True
    wanted = _JSON_STEP

    while True:
        skipped = _SPACE.match(buffer, at)
        assert skipped
        line += buffer.count("\n", at, skipped.end())
        at = skipped.end()
        if at >= len(buffer) and finished:
            if array:
                yield line, BadRow.of("", "not valid JSON", "the file ends inside the array"), 0
            return
        if at < len(buffer) and array is None:
            array = buffer[at] == "["
            at += array
            continue
        if array and buffer[at : at + 1] == "]":
            return
        value, end, error = _decode(decoder, buffer, at, finished)
        if error is None and end < 0:  # the value goes on in what is not read yet
            more = text.read(wanted)
            wanted = min(wanted * 2, LONGEST_LINE)  # a long value is not parsed again for every step
            finished = not more
            buffer, at = buffer[at:] + more, 0
            if len(buffer) > 2 * LONGEST_LINE:
                raise UserError(f"data.path={getattr(stream, 'name', 'file')}: line {line}: a value without an end")
            continue
        wanted = _JSON_STEP
        if error is not None:
            resume = _NEXT_OBJECT.search(buffer, at + 1)
            if resume is None and not finished:
                more = text.read(wanted)
                finished = not more
                buffer, at = buffer[at:] + more, 0
                continue
            end = resume.end() if resume else len(buffer)
            yield line, BadRow.of(buffer[at:end], "not valid JSON", error), end - at
        else:
            items = [value]
            if isinstance(value, list) and not array:
                items = value
            elif first and not array and isinstance(value, dict):
                items = _only_list(value)
            for item in items:
                yield line, item, (end - at) // max(len(items), 1)
        first = False
        line += buffer.count("\n", at, end)
        at = end
        if at > 4 * _JSON_STEP:
            buffer, at = buffer[at:], 0


_JSON_STEP = 1 << 20


def _decode(decoder: json.JSONDecoder, buffer: str, at: int, finished: bool) -> tuple[Any, int, str | None]:
    """(value, end, None), (None, -1, None) when more text is needed, or (None, -1, what is wrong)."""
    if at >= len(buffer):
        return None, -1, None
    try:
        value, end = decoder.raw_decode(buffer, at)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(buffer) - 16 or error.msg.startswith("Unterminated string")
        return None, -1, None if cut and not finished else error.msg
    except RecursionError:
        return None, -1, "nested too deep"
    if end == len(buffer) and not finished and buffer[end - 1] not in '}]"':
        return None, -1, None  # a number or a word may go on
    return value, end, None


def _only_list(value: dict[str, Any]) -> list[Any]:
    """{"data": [rows]} → rows."""
    lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
    return lists[0] if detect(value) is None and len(lists) == 1 else [value]


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
                yield (
                    block.first + number,
                    BadRow.of(line.decode("utf-8", "replace"), "wrong encoding", str(error)),
                )
                continue
            try:
                yield block.first + number, json.loads(text)
            except (ValueError, RecursionError) as error:
                yield block.first + number, BadRow.of(text, "not valid JSON", str(error))
