"""What a file is, by its first bytes, and the zip container of a torch checkpoint, checked before anything is read.

Only the layout that torch and the standard zip writers produce is accepted: stored members that follow each other
without holes, from the first byte of the file to its directory, each with the same name, size and checksum in both
of its headers. A reader of that layout can neither be made to inflate anything nor be shown two different files.
"""

from __future__ import annotations

import re
import shlex
import struct
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from loraconv.errors import CorruptCheckpoint, FormatError, LoraconvError, UnsafeCheckpoint
from loraconv.io.crc import crc32
from loraconv.io.input_file import InputFile
from loraconv.names import printable

MAX_MEMBERS = 200_000
MAX_DIRECTORY_BYTES = 64 << 20
MAX_PICKLE_BYTES = 64 << 20
MAX_SMALL_BYTES = 4096

_END = struct.Struct("<4s4H2IH")
_LOCATOR64 = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_DESCRIPTORS = {16: struct.Struct("<4s3I"), 24: struct.Struct("<4sI2Q")}

# torch sets 0x808 (sizes follow the data, UTF-8 name) on a member with data and 0x800 on an empty one.
_FLAGS = (0, 0x800, 0x808)
_SATURATED = 0xFFFFFFFF
_ZIP64_TAG, _PADDING_TAG = 0x0001, 0x4246
_WINDOW = 512
_MEMBER = re.compile(
    r"data/(?:0|[1-9][0-9]{0,8})|data\.pkl|version|byteorder|\.format_version|\.storage_alignment"
    r"|\.data/serialization_id"
)
_TEXT_PICKLE = re.compile(rb"[ci]\w[\w.]*\n\w[\w.]*\n")

_MAGIC = (
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "zip"),
    (b"7z\xbc\xaf\x27\x1c", "7z"),
    (b"\x1f\x8b", "gzip"),
)
_REFUSALS = {
    "torchscript": "a TorchScript archive, which carries code",
    "legacy-pickle": "a pickle outside a zip (torch.save before version 1.6, or another program)",
    "7z": "a 7z archive",
    "tar": "a tar archive",
    "gzip": "gzip data",
}


class Entry(NamedTuple):
    """One line of the central directory."""

    name: bytes
    flags: int
    crc: int
    size: int
    header: int


class Member(NamedTuple):
    """The data of one member: first byte, length, and the declared CRC-32 (None where the writer left it out)."""

    start: int
    size: int
    crc: int | None


@dataclass(frozen=True, slots=True)
class Directory:
    """The central directory and the byte at which it starts."""

    entries: list[Entry]
    start: int


def sniff(file: InputFile) -> str:
    """What the file is, by its bytes and never by its name.

    One of ``torch-zip``, ``zip``, ``torchscript``, ``legacy-pickle``, ``7z``, ``tar``, ``gzip``, ``safetensors``,
    ``empty``, ``unknown``. A damaged zip counts as ``torch-zip`` when its first member is a ``data.pkl``.
    """
    kind = _by_magic(file)
    if kind != "zip":
        return kind
    try:
        return _zip_kind(directory(file).entries)
    except LoraconvError:
        head = file.pread(0, min(file.size, _WINDOW))
        return "torch-zip" if b"/data.pkl" in head else "zip"


def open_torch_zip(file: InputFile) -> dict[str, Member]:
    """The members of a torch checkpoint, by their name below the root folder.

    Raises :class:`UnsafeCheckpoint` or :class:`FormatError` for anything that is no torch zip, and
    :class:`CorruptCheckpoint` for a damaged one.
    """
    kind = _by_magic(file)
    if kind != "zip":
        _refuse_kind(file, kind)
    found = directory(file)
    kind = _zip_kind(found.entries)
    if kind != "torch-zip":
        _refuse_kind(file, kind)
    names = _member_names(file, found.entries)
    members = dict(zip(names, _locate(file, found), strict=True))
    if len(members) != len(names):
        unsafe(file, "two members have the same name", "zip-member")
    _check_small_members(file, members)
    return members


def read_member(file: InputFile, member: Member) -> bytes:
    """The bytes of a member; raises :class:`CorruptCheckpoint` when they do not match its checksum."""
    data = file.pread(member.start, member.size)
    if member.crc is not None and crc32(data) != member.crc:
        damaged(file, f"the checksum of the member at byte {member.start} does not match")
    return data


def damaged(file: InputFile, why: str) -> NoReturn:
    """Raise :class:`CorruptCheckpoint`: the bytes are not those that were written."""
    raise CorruptCheckpoint(
        f"{file.shown} is damaged",
        why=why,
        hint="fetch or copy the file again and compare its size and checksum with the original",
    )


def unsafe(file: InputFile, why: str, slug: str) -> NoReturn:
    """Raise :class:`UnsafeCheckpoint`: the bytes ask for something that no checkpoint needs."""
    raise UnsafeCheckpoint(f"refused to read {file.shown}", why=why, slug=slug, hint=resave(file))


def resave(file: InputFile) -> str:
    """The command that saves the tensors of a file again, in the safe form that is read here."""
    path = printable(shlex.quote(str(file.path)), limit=1000)
    code = "torch.save(torch.load(sys.argv[1], map_location='cpu', weights_only=True), sys.argv[2])"
    return f'python -c "import sys, torch; {code}" {path} resaved.pt'


def _by_magic(file: InputFile) -> str:
    if file.size == 0:
        return "empty"
    head = file.pread(0, min(file.size, _WINDOW))
    for magic, kind in _MAGIC:
        # A file cut inside its magic bytes is still a damaged file of that kind.
        if head.startswith(magic) or (len(head) < len(magic) and magic.startswith(head)):
            return kind
    if len(head) > 8 and int.from_bytes(head[:8], "little") <= 100_000_000 and head[8] == ord("{"):
        return "safetensors"
    if head[257:262] == b"ustar":
        return "tar"
    if head[0] == 0x80 and (len(head) == 1 or head[1] <= 5):
        return "legacy-pickle"
    # The text form has no magic: it starts with one of these opcodes, names something, and ends with a dot.
    if head[:1] in b"(]})c" and _TEXT_PICKLE.search(head) and file.pread(file.size - 1, 1) == b".":
        return "legacy-pickle"
    return "unknown"


def _zip_kind(entries: list[Entry]) -> str:
    below = [entry.name.partition(b"/")[2] for entry in entries]
    if b"constants.pkl" in below or any(name.startswith(b"code/") for name in below):
        return "torchscript"
    return "torch-zip" if b"data.pkl" in below else "zip"


def _refuse_kind(file: InputFile, kind: str) -> NoReturn:
    if kind == "empty":
        damaged(file, "the file is empty")
    if kind in _REFUSALS:
        why = f"it is {_REFUSALS[kind]}; only the zip that torch.save writes is read, because it can be checked"
        unsafe(file, why, "torchscript" if kind == "torchscript" else "container")
    what = {"safetensors": "a safetensors file", "zip": "a zip without data.pkl"}.get(kind, "of an unknown format")
    raise FormatError(
        f"not a torch checkpoint: {file.shown}",
        why=f"by its first bytes it is {what}",
        slug="not-torch",
        hint=f"file {printable(shlex.quote(str(file.path)), limit=1000)}",
    )


def directory(file: InputFile) -> Directory:
    """The central directory; raises :class:`CorruptCheckpoint` or :class:`UnsafeCheckpoint`."""
    tail = file.pread(max(0, file.size - _END.size), min(file.size, _END.size))
    if len(tail) < _END.size or not tail.startswith(b"PK\x05\x06"):
        damaged(file, "it does not end with a zip directory")
    _, disk, first_disk, here, total, size, start, comment = _END.unpack(tail)
    if disk or first_disk or here != total or comment:
        damaged(file, "the end of its zip directory is malformed")
    end, total, size, start = _end64(file, total, size, start)
    if start + size != end:
        damaged(file, "the zip directory is not where the file says")
    if total > MAX_MEMBERS or size > MAX_DIRECTORY_BYTES:
        unsafe(file, f"{total} members, {size} bytes of directory: more than any checkpoint has", "bomb")
    return Directory(_entries(file, file.pread(start, size), total), start)


def _end64(file: InputFile, total: int, size: int, start: int) -> tuple[int, int, int, int]:
    """End of the directory, members, size and start; from the 64-bit records where the file has them."""
    end = file.size - _END.size
    if end < _LOCATOR64.size + _END64.size:
        return end, total, size, start
    magic, disk, record, disks = _LOCATOR64.unpack(file.pread(end - _LOCATOR64.size, _LOCATOR64.size))
    if magic != b"PK\x06\x07":
        return end, total, size, start
    if disk or disks != 1 or record != end - _LOCATOR64.size - _END64.size:
        damaged(file, "its 64-bit zip directory is malformed")
    fields = _END64.unpack(file.pread(record, _END64.size))
    magic, length, disk, first_disk, here64, total64, size64, start64 = fields[0], fields[1], *fields[4:]
    if magic != b"PK\x06\x06" or length != _END64.size - 12 or disk or first_disk or here64 != total64:
        damaged(file, "its 64-bit zip directory is malformed")
    for short, long, most in ((total, total64, 0xFFFF), (size, size64, _SATURATED), (start, start64, _SATURATED)):
        if short not in (long, most):
            damaged(file, "the two ends of its zip directory disagree")
    return record, total64, size64, start64


def _entries(file: InputFile, raw: bytes, total: int) -> list[Entry]:
    entries = []
    at = 0
    for _ in range(total):
        if at + _CENTRAL.size > len(raw):
            damaged(file, "its zip directory is cut short")
        line = _CENTRAL.unpack_from(raw, at)
        flags, method, crc, packed, size, length, extra, comment, disk, header = line[3], line[4], *line[7:14], line[16]
        if line[0] != b"PK\x01\x02" or comment or disk:
            damaged(file, "its zip directory is malformed")
        name_end = at + _CENTRAL.size + length
        at = name_end + extra
        if extra:
            size, packed, header = _wide(file, raw[name_end:at], size, packed, header)
        if method or flags not in _FLAGS or packed != size:
            unsafe(file, f"a member is compressed or encrypted (method {method}, flags {flags:#x})", "compressed")
        entries.append(Entry(raw[name_end - length : name_end], flags, crc, size, header))
    if at != len(raw):
        damaged(file, "its zip directory is longer than its members")
    return entries


def _wide(file: InputFile, extra: bytes, *fields: int) -> list[int]:
    """The sizes and offset of an entry, taken from its 64-bit field where the 32-bit ones are saturated."""
    wide = _fields(file, extra).get(_ZIP64_TAG, b"")
    numbers = [int.from_bytes(wide[i : i + 8], "little") for i in range(0, len(wide), 8)]
    if len(numbers) != fields.count(_SATURATED) or len(wide) % 8:
        damaged(file, "a 64-bit field of its zip directory is malformed")
    return [numbers.pop(0) if field == _SATURATED else field for field in fields]


def _fields(file: InputFile, extra: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    at = 0
    while at < len(extra):
        tag = int.from_bytes(extra[at : at + 2], "little")
        length = int.from_bytes(extra[at + 2 : at + 4], "little")
        if tag in found or tag not in (_ZIP64_TAG, _PADDING_TAG):
            damaged(file, f"a zip header has an unexpected field {tag:#x}")
        found[tag] = extra[at + 4 : at + 4 + length]
        at += 4 + length
    if at != len(extra):
        damaged(file, "a field of a zip header is cut short")
    return found


def _member_names(file: InputFile, entries: list[Entry]) -> list[str]:
    root = entries[0].name.partition(b"/")[0] + b"/"
    if root in (b"/", b"./", b"../") or b"\\" in root or b"\0" in root:
        unsafe(file, f"the root folder is named {printable(repr(root))}", "zip-member")
    names = []
    for entry in entries:
        name = entry.name[len(root) :].decode("ascii", "backslashreplace")
        if not entry.name.startswith(root) or not _MEMBER.fullmatch(name):
            unsafe(file, f"a member is named {printable(repr(entry.name))}", "zip-member")
        names.append(name)
    return names


def _locate(file: InputFile, found: Directory) -> list[Member]:
    """Where the data of each member lies. One read per member covers its header and the trailer of the one before."""
    # torch.serialization.set_crc32_options(False) leaves every checksum zero.
    unchecked = not any(entry.crc for entry in found.entries)
    located = []
    at, before = 0, None
    for entry in found.entries:
        gap = _gap(file, before, entry.header - at)
        window = file.pread(at, min(gap + _WINDOW, found.start - at))
        _check_trailer(file, before, window[:gap])
        at = entry.header + _check_local(file, entry, window[gap:])
        located.append(Member(at, entry.size, None if unchecked and entry.size else entry.crc))
        at += entry.size
        before = entry
    _check_trailer(file, before, file.pread(at, _gap(file, before, found.start - at)))
    return located


def _gap(file: InputFile, before: Entry | None, gap: int) -> int:
    if (gap in _DESCRIPTORS) if before and before.flags & 8 else gap == 0:
        return gap
    damaged(file, f"its zip members overlap or leave a hole of {gap} bytes")


def _check_trailer(file: InputFile, before: Entry | None, trailer: bytes) -> None:
    if not trailer or before is None:
        return
    if _DESCRIPTORS[len(trailer)].unpack(trailer) != (b"PK\x07\x08", before.crc, before.size, before.size):
        damaged(file, "size or checksum after a zip member disagree with the directory")


def _check_local(file: InputFile, entry: Entry, window: bytes) -> int:
    """The length of the local header; raises unless it agrees with the directory."""
    magic, _, flags, method, _, _, crc, packed, size, length, extra = _LOCAL.unpack_from(window)
    end: int = _LOCAL.size + length + extra
    if magic != b"PK\x03\x04" or window[_LOCAL.size : _LOCAL.size + length] != entry.name:
        unsafe(file, "a zip member has another name in its own header than in the directory", "zip-mismatch")
    if extra:
        inside = window[_LOCAL.size + length : end]
        if len(inside) < extra:
            inside = file.pread(entry.header + _LOCAL.size + length, extra)
        fields = _fields(file, inside)
        if size == _SATURATED and not flags & 8:
            size, packed = struct.unpack("<2Q", fields.get(_ZIP64_TAG, b""))
    expected = (entry.flags, 0, 0, 0, 0) if entry.flags & 8 else (entry.flags, 0, entry.crc, entry.size, entry.size)
    if (flags, method, crc, packed, size) != expected:
        unsafe(file, "size, flags or checksum of a zip member disagree with the directory", "zip-mismatch")
    return end


def _check_small_members(file: InputFile, members: dict[str, Member]) -> None:
    for name, member in members.items():
        if name == "data.pkl":
            if member.size > MAX_PICKLE_BYTES:
                unsafe(file, f"data.pkl has {member.size} bytes", "bomb")
        elif not name.startswith("data/") and member.size > MAX_SMALL_BYTES:
            unsafe(file, f"{name} has {member.size} bytes", "zip-member")
    if "byteorder" in members and read_member(file, members["byteorder"]) != b"little":
        raise FormatError(f"{file.shown} was saved on a big-endian machine", slug="byteorder", hint=resave(file))
