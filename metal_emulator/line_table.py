"""Which line of the source an instruction of a library comes from.

Reads the DWARF 4 line table of an ELF file, so that no symbolizer need be installed. Knows no more of DWARF than that.
"""

import struct
from bisect import bisect_right
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_SECTION = ".debug_line"
_ADVANCE_PC, _ADVANCE_LINE, _SET_FILE, _SET_COLUMN = 2, 3, 4, 5
_CONST_ADD_PC, _FIXED_ADVANCE_PC, _COPY = 8, 9, 1
_END_SEQUENCE, _SET_ADDRESS = 1, 2


@dataclass(frozen=True)
class Row:
    """From this address on, code is of this place; line 0 is code of no line."""

    address: int
    file: str
    line: int
    column: int


class _Reader:
    def __init__(self, data: bytes, position: int = 0) -> None:
        self.data, self.position = data, position

    def take(self, layout: str) -> int:
        (value,) = struct.unpack_from("<" + layout, self.data, self.position)
        self.position += struct.calcsize("<" + layout)
        return int(value)

    def text(self) -> str:
        end = self.data.index(b"\0", self.position)
        text = self.data[self.position : end].decode(errors="replace")
        self.position = end + 1
        return text

    def leb(self, *, signed: bool = False) -> int:
        value = shift = 0
        while True:
            byte = self.data[self.position]
            self.position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value - (1 << shift) if signed and byte & 64 else value


@cache
def read_lines(library: Path) -> tuple[Row, ...]:
    """All rows of a library's line table, by address; empty when it has none."""
    section = _section(library.read_bytes())
    rows: list[Row] = []
    reader = _Reader(section)
    while reader.position < len(section):
        end = reader.take("I") + reader.position
        if reader.take("H") == 4:
            rows += _program(reader, end)
        reader.position = end
    # Where one sequence ends and the next begins at one address, the end comes first; the last row of an address holds.
    return tuple(sorted(rows, key=lambda row: (row.address, row.file != "")))


def find_line(library: Path, address: int) -> Row | None:
    """The place of an instruction, by its offset in the library; where lines were merged, of the one before."""
    rows = read_lines(library)
    index = bisect_right(rows, address, key=lambda row: row.address) - 1
    while index >= 0 and rows[index].file and not rows[index].line:
        index -= 1
    return rows[index] if index >= 0 and rows[index].line else None


def _section(data: bytes) -> bytes:
    """The line table's bytes, from ELF's section headers."""
    headers, entry, count, names = struct.unpack_from("<40xQ10xHHH", data)[0:4]
    sections = [struct.unpack_from("<I4x16xQQ", data, headers + i * entry) for i in range(count)]
    table = sections[names][1]
    for name, offset, size in sections:
        if data[table + name : data.index(b"\0", table + name)].decode() == _SECTION:
            return data[offset : offset + size]
    return b""


def _program(reader: _Reader, end: int) -> list[Row]:
    """Run one unit's line number program."""
    reader.take("I")
    least, _, _ = reader.take("B"), reader.take("B"), reader.take("B")
    line_base, line_range, first_special = reader.take("b"), reader.take("B"), reader.take("B")
    lengths = [0, *(reader.take("B") for _ in range(first_special - 1))]
    folders = [""]
    while folder := reader.text():
        folders.append(f"{folder}/")
    files = [""]
    while name := reader.text():
        files.append(folders[reader.leb()] + name)
        reader.leb(), reader.leb()
    rows: list[Row] = []
    address, file, line, column = 0, 1, 1, 0
    while reader.position < end:
        code = reader.take("B")
        if code >= first_special:
            address += (code - first_special) // line_range * least
            line += line_base + (code - first_special) % line_range
            rows.append(Row(address, files[file], line, column))
        elif code == 0:
            length = reader.leb()
            after = reader.position + length
            extended = reader.take("B")
            if extended == _SET_ADDRESS:
                address = reader.take("Q")
            elif extended == _END_SEQUENCE:
                rows.append(Row(address, "", 0, 0))
                address, file, line, column = 0, 1, 1, 0
            reader.position = after
        elif code == _COPY:
            rows.append(Row(address, files[file], line, column))
        elif code == _ADVANCE_PC:
            address += reader.leb() * least
        elif code == _ADVANCE_LINE:
            line += reader.leb(signed=True)
        elif code == _SET_FILE:
            file = reader.leb()
        elif code == _SET_COLUMN:
            column = reader.leb()
        elif code == _CONST_ADD_PC:
            address += (255 - first_special) // line_range * least
        elif code == _FIXED_ADVANCE_PC:
            address += reader.take("H")
        else:
            for _ in range(lengths[code]):
                reader.leb()
    return rows
