"""Rows of a SQLite file read page by page, for a file whose trees cannot be followed any more.

The format is that of https://sqlite.org/fileformat2.html: each page that holds rows says so in its first byte and can
be read by itself, whatever became of the pages above it. A row that ends on a page which is not there any more, or
that was overwritten, is left out or comes with wrong values: whoever reads rows checks each one.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_INDEX_INNER, _INDEX_LEAF, _TABLE_LEAF = 2, 10, 13
_PAGE_SIZES = frozenset(1 << power for power in range(9, 17))
_USUAL_PAGE_SIZE = 4096
_INT_BYTES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}
_WAL_MAGIC = (0x377F0682, 0x377F0683)

Value = int | float | str | bytes | None


class Row(NamedTuple):
    values: tuple[Value, ...]
    rowid: int | None  # None: in an index, or in a table without rowids


class Pages:
    """The pages of a database file, with what its write-ahead log has committed on top."""

    def __init__(self, path: Path) -> None:
        self._data = path.read_bytes()
        head = self._data[16:18]
        size = int.from_bytes(head, "big") if len(head) == 2 else 0
        size = 65536 if size == 1 else size
        self._size = size if size in _PAGE_SIZES else _USUAL_PAGE_SIZE
        self._newer = self._read_wal(path.with_name(path.name + "-wal"))
        self.count = max([len(self._data) // self._size, *self._newer])
        self._free = self._find_free()

    def _read_wal(self, path: Path) -> dict[int, bytes]:
        """The pages of the committed transactions in the write-ahead log, by number."""
        wal = path.read_bytes() if path.exists() else b""
        if len(wal) < 32 or int.from_bytes(wal[:4], "big") not in _WAL_MAGIC:
            return {}
        size, salts = int.from_bytes(wal[8:12], "big"), wal[16:24]
        newer: dict[int, bytes] = {}
        open_: dict[int, bytes] = {}
        for at in range(32, len(wal) - 24 - size + 1, 24 + size):
            number, is_commit = struct.unpack_from(">II", wal, at)
            if size != self._size or wal[at + 8 : at + 16] != salts:  # left from before the log began anew
                break
            open_[number] = wal[at + 24 : at + 24 + size]
            if is_commit:
                newer |= open_
                open_ = {}
        return newer

    def get(self, number: int) -> bytes:
        """One page, counted from 1; empty when there is none."""
        return self._newer.get(number) or self._data[(number - 1) * self._size : number * self._size]

    def _find_free(self) -> set[int]:
        """Pages that are in no tree: what they hold was deleted. As far as the list of them can be read."""
        free: set[int] = set()
        trunk = int.from_bytes(self.get(1)[32:36], "big")
        while 1 < trunk <= self.count and trunk not in free:
            page = self.get(trunk)
            free.add(trunk)
            following, count = struct.unpack_from(">II", page)
            if count > self._size // 4 - 2:
                break
            free.update(struct.unpack_from(f">{count}I", page, 8))
            trunk = following
        return free

    def rows(self) -> Iterator[Row]:
        """Every row that is on some page, in no order."""
        for number in range(1, self.count + 1):
            if number not in self._free:
                yield from self._rows_on(number)

    def _rows_on(self, number: int) -> Iterator[Row]:
        page, start = self.get(number), 100 if number == 1 else 0
        if len(page) != self._size or page[start] not in (_INDEX_INNER, _INDEX_LEAF, _TABLE_LEAF):
            return
        kind, cells = page[start], int.from_bytes(page[start + 3 : start + 5], "big")
        pointers = start + (12 if kind == _INDEX_INNER else 8)
        for place in range(min(cells, self._size // 2)):
            at = int.from_bytes(page[pointers + 2 * place : pointers + 2 * place + 2], "big")
            try:
                rowid, payload = self._read_payload(page, at + 4 * (kind == _INDEX_INNER), is_table=kind == _TABLE_LEAF)
                yield Row(_read_record(payload), rowid)
            except (IndexError, ValueError, KeyError, struct.error):  # no row, whatever it was
                continue

    def _read_payload(self, page: bytes, at: int, *, is_table: bool) -> tuple[int | None, bytes]:
        length, at = _read_varint(page, at)
        rowid = None
        if is_table:
            rowid, at = _read_varint(page, at)
        usable = self._size
        most = usable - 35 if is_table else (usable - 12) * 64 // 255 - 23
        if length > self.count * usable:
            raise IndexError(length)
        if length <= most:
            return rowid, _take(page, at, length)
        least = (usable - 12) * 32 // 255 - 23
        local = least + (length - least) % (usable - 4)
        local = local if local <= most else least
        parts = [_take(page, at, local)]
        following, left = int.from_bytes(_take(page, at + local, 4), "big"), length - local
        while left > 0:
            page = self.get(following)
            parts.append(_take(page, 4, min(left, usable - 4)))
            left -= len(parts[-1])
            following = int.from_bytes(page[:4], "big")
        return rowid, b"".join(parts)


def _take(data: bytes, at: int, length: int) -> bytes:
    part = data[at : at + length]
    if len(part) != length or not length:
        raise IndexError(at)
    return part


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of 1 to 9 bytes, and where it ends."""
    value = 0
    for place in range(at, at + 8):
        value = value << 7 | data[place] & 0x7F
        if data[place] < 0x80:
            return value, place + 1
    return value << 8 | data[at + 8], at + 9


def _read_record(payload: bytes) -> tuple[Value, ...]:
    end, at = _read_varint(payload, 0)
    values: list[Value] = []
    place = end
    while at < end:
        kind, at = _read_varint(payload, at)
        value, size = _read_value(payload, place, kind)
        values.append(value)
        place += size
    return tuple(values)


def _read_value(payload: bytes, at: int, kind: int) -> tuple[Value, int]:
    if kind in (0, 8, 9):
        return (None if kind == 0 else kind - 8), 0
    if kind == 7:
        return struct.unpack_from(">d", payload, at)[0], 8
    if kind < 12:
        size = _INT_BYTES[kind]
        return int.from_bytes(_take(payload, at, size), "big", signed=True), size
    size = (kind - 12) // 2
    part = _take(payload, at, size) if size else b""
    return (part.decode() if kind % 2 else part), size
