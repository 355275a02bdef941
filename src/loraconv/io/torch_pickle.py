"""An interpreter for the few pickle opcodes that ``torch.save`` writes; it builds plain values and nothing else.

The standard unpickler is not used. It trusts lengths and indices of the stream, hashes whatever becomes a dictionary
key, and calls what it finds; here every opcode has its own short method, an opcode without one is refused, and a name
in the file is only looked up in a table by :meth:`Machine.find_global`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, NoReturn

from loraconv.errors import UnsafeCheckpoint
from loraconv.io.input_file import InputFile
from loraconv.io.torch_zip import damaged, resave, unsafe
from loraconv.names import printable

MAX_OPCODES = 2_000_000
BATCH = 1000
MAX_COPIED_BYTES = 64 << 20
MAX_DEPTH = 64
MAX_KEY_ITEMS = 16
#: An empty set takes about as much memory as this many other small objects.
SET_WEIGHT = 4

_U2, _U4, _U8 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")
_I4, _F8 = struct.Struct("<i"), struct.Struct(">d")
_SCALARS = frozenset((str, bytes, float, bool, type(None)))
_CONTAINERS = frozenset((dict, list, tuple))


@dataclass(frozen=True, slots=True)
class Opaque:
    """Something the file holds that is recognised by ``kind`` but never built."""

    kind: str


@dataclass(frozen=True, slots=True, eq=False)
class Global(Opaque):
    """A name of the table. ``call`` gives the plain value that stands for calling it; classes also allow NEWOBJ."""

    call: Callable[[tuple[object, ...]], object]
    is_class: bool = False


class Machine:
    """Runs one pickle. Subclasses say what the names and the persistent ids of the file stand for."""

    __slots__ = ("copied", "data", "done", "file", "framed", "left", "memo", "outer", "stack", "table")

    _METHODS: ClassVar[dict[int, str]] = {
        0x80: "proto", 0x95: "frame", 0x2E: "stop", 0x28: "mark",
        0x4E: "none", 0x88: "true", 0x89: "false", 0x5D: "empty_list", 0x7D: "empty_dict", 0x29: "empty_tuple",
        0x8F: "empty_set", 0x4A: "binint", 0x4B: "binint1", 0x4D: "binint2", 0x8A: "long1", 0x47: "binfloat",
        0x58: "binunicode", 0x8C: "short_binunicode", 0x8D: "binunicode8",
        0x42: "binbytes", 0x43: "short_binbytes", 0x8E: "binbytes8",
        0x71: "binput", 0x72: "long_binput", 0x94: "memoize", 0x68: "binget", 0x6A: "long_binget",
        0x85: "tuple1", 0x86: "tuple2", 0x87: "tuple3", 0x74: "tuple", 0x91: "frozenset",
        0x61: "append", 0x65: "appends", 0x73: "setitem", 0x75: "setitems", 0x90: "additems",
        0x63: "global", 0x93: "stack_global", 0x52: "reduce", 0x81: "newobj", 0x62: "build", 0x51: "binpersid",
    }  # fmt: skip

    def __init__(self, file: InputFile, data: bytes) -> None:
        self.file = file
        self.data = data
        self.memo: dict[int, object] = {}
        self.stack: list[object] = []
        self.outer: list[list[object]] = []
        self.left = MAX_OPCODES
        self.copied = 0
        self.done = self.framed = False
        self.table: list[Callable[[int], int]] = [self._unknown] * 256
        for code, name in self._METHODS.items():
            self.table[code] = getattr(self, f"_{name}")

    def find_global(self, module: str, name: str) -> object:
        """What stands for a name of the file; raises for every name that is not in the table."""
        raise NotImplementedError

    def persistent_load(self, pid: object) -> object:
        """What stands for a persistent id (a storage)."""
        raise NotImplementedError

    def load(self) -> object:
        """The root object. Raises :class:`UnsafeCheckpoint`, or any exception of a damaged stream."""
        if self.data[:1] != b"\x80":
            self.refuse("data.pkl does not start as a binary pickle")
        self._run(0, len(self.data))
        if not self.done or self.outer:
            damaged(self.file, "data.pkl has no end")
        (root,) = self.stack
        self._measure(root, {}, 0)
        return root

    def refuse(self, why: str) -> NoReturn:
        """Raise :class:`UnsafeCheckpoint` for an instruction that no checkpoint needs."""
        unsafe(self.file, why, "pickle-opcode")

    def spend(self, count: int) -> None:
        """Count bytes that the stream makes out of few opcodes; raises when they add up to a bomb."""
        self.copied += count
        if self.copied > MAX_COPIED_BYTES:
            unsafe(self.file, "data.pkl asks for far more memory than its own size", "bomb")

    def check_keys(self, keys: list[object]) -> None:
        """Raise unless hashing the keys is cheap: nested tuples and huge integers are made to be slow, or to crash."""
        for key in keys:
            if type(key) not in _SCALARS and not self._cheap(key):
                self.refuse(f"a dictionary key or set item is a {type(key).__name__} that no checkpoint has")

    def _cheap(self, key: object) -> bool:
        if type(key) is int:
            return -(1 << 63) <= key < 1 << 64
        if type(key) is tuple:
            return len(key) <= MAX_KEY_ITEMS and all(
                type(item) in _SCALARS or (type(item) is not tuple and self._cheap(item)) for item in key
            )
        return isinstance(key, Opaque)

    def _run(self, at: int, end: int) -> None:
        data, table = self.data, self.table
        while at < end:
            # The budget is looked at once per batch: the count of single steps stays in the fast loop of range().
            for _ in range(min(BATCH, end - at)):
                at = table[data[at]](at + 1)
                if at >= end:
                    break
            self.left -= BATCH
            if self.left < 0:
                unsafe(self.file, f"data.pkl has more than {MAX_OPCODES} instructions", "bomb")
        if at != end:
            damaged(self.file, "an instruction of data.pkl reaches beyond its frame")

    def _measure(self, node: object, seen: dict[int, int], depth: int) -> int:
        """The number of values below ``node`` once shared parts are written out; refuses loops, depth and bombs."""
        known = seen.get(id(node))
        if known is not None:
            if not known:
                unsafe(self.file, "data.pkl contains itself", "bomb")
            return known
        if depth > MAX_DEPTH:
            unsafe(self.file, f"data.pkl nests deeper than {MAX_DEPTH} levels", "bomb")
        seen[id(node)] = 0
        total = 1
        for child in _children(node):
            total += self._measure(child, seen, depth + 1) if type(child) in _CONTAINERS and child else 1
        if total > MAX_OPCODES:
            unsafe(self.file, "data.pkl grows beyond measure when its shared parts are written out", "bomb")
        seen[id(node)] = total
        return total

    def _unknown(self, at: int) -> int:
        self.refuse(f"data.pkl has the instruction {self.data[at - 1]:#04x}, which torch.save never writes")

    # The stream itself.

    def _proto(self, at: int) -> int:
        if at != 1 or not 2 <= self.data[at] <= 5:
            self.refuse("data.pkl has a second start, or an unknown protocol")
        return at + 1

    def _frame(self, at: int) -> int:
        start = at + 8
        end: int = start + _U8.unpack_from(self.data, at)[0]
        if self.framed or end > len(self.data):
            self.refuse("the frames of data.pkl overlap")
        self.framed = True
        self._run(start, end)
        self.framed = False
        return end

    def _stop(self, at: int) -> int:
        if at != len(self.data):
            self.refuse("data.pkl goes on after its end")
        self.done = True
        return at

    def _mark(self, at: int) -> int:
        self.outer.append(self.stack)
        self.stack = []
        return at

    def _pop_mark(self) -> list[object]:
        items = self.stack
        self.stack = self.outer.pop()
        return items

    # Constants.

    def _none(self, at: int) -> int:
        self.stack.append(None)
        return at

    def _true(self, at: int) -> int:
        self.stack.append(True)
        return at

    def _false(self, at: int) -> int:
        self.stack.append(False)
        return at

    def _empty_list(self, at: int) -> int:
        self.stack.append([])
        return at

    def _empty_dict(self, at: int) -> int:
        self.stack.append({})
        return at

    def _empty_tuple(self, at: int) -> int:
        self.stack.append(())
        return at

    def _empty_set(self, at: int) -> int:
        self.left -= SET_WEIGHT
        self.stack.append(set())
        return at

    def _binint(self, at: int) -> int:
        self.stack.append(_I4.unpack_from(self.data, at)[0])
        return at + 4

    def _binint1(self, at: int) -> int:
        self.stack.append(self.data[at])
        return at + 1

    def _binint2(self, at: int) -> int:
        self.stack.append(_U2.unpack_from(self.data, at)[0])
        return at + 2

    def _long1(self, at: int) -> int:
        end = at + 1 + self.data[at]
        self.stack.append(int.from_bytes(self.data[at + 1 : end], "little", signed=True))
        return end

    def _binfloat(self, at: int) -> int:
        self.stack.append(_F8.unpack_from(self.data, at)[0])
        return at + 8

    # Strings: a length beyond the end gives a short slice, and _run then sees that the position is beyond its end.

    def _text(self, at: int, length: int) -> int:
        end = at + length
        raw = self.data[at:end]
        if not raw.isascii():
            # One wide character makes every character of the decoded text four bytes long.
            self.spend(4 * len(raw))
        self.stack.append(raw.decode("utf-8", "surrogatepass"))
        return end

    def _binunicode(self, at: int) -> int:
        return self._text(at + 4, _U4.unpack_from(self.data, at)[0])

    def _short_binunicode(self, at: int) -> int:
        return self._text(at + 1, self.data[at])

    def _binunicode8(self, at: int) -> int:
        return self._text(at + 8, _U8.unpack_from(self.data, at)[0])

    def _bytes(self, at: int, length: int) -> int:
        self.stack.append(self.data[at : at + length])
        return at + length

    def _binbytes(self, at: int) -> int:
        return self._bytes(at + 4, _U4.unpack_from(self.data, at)[0])

    def _short_binbytes(self, at: int) -> int:
        return self._bytes(at + 1, self.data[at])

    def _binbytes8(self, at: int) -> int:
        return self._bytes(at + 8, _U8.unpack_from(self.data, at)[0])

    # The memo is a dictionary, so a huge index costs nothing; it is refused because no writer makes one.

    def _binput(self, at: int) -> int:
        self.memo[self.data[at]] = self.stack[-1]
        return at + 1

    def _long_binput(self, at: int) -> int:
        index = _U4.unpack_from(self.data, at)[0]
        if index > MAX_OPCODES:
            self.refuse(f"data.pkl stores a value under the number {index}")
        self.memo[index] = self.stack[-1]
        return at + 4

    def _memoize(self, at: int) -> int:
        self.memo[len(self.memo)] = self.stack[-1]
        return at

    def _binget(self, at: int) -> int:
        self.stack.append(self.memo[self.data[at]])
        return at + 1

    def _long_binget(self, at: int) -> int:
        self.stack.append(self.memo[_U4.unpack_from(self.data, at)[0]])
        return at + 4

    # Containers.

    def _tuple1(self, at: int) -> int:
        self.stack[-1] = (self.stack[-1],)
        return at

    def _tuple2(self, at: int) -> int:
        last = self.stack.pop()
        self.stack[-1] = (self.stack[-1], last)
        return at

    def _tuple3(self, at: int) -> int:
        last, middle = self.stack.pop(), self.stack.pop()
        self.stack[-1] = (self.stack[-1], middle, last)
        return at

    def _tuple(self, at: int) -> int:
        items = tuple(self._pop_mark())
        self.stack.append(items)
        return at

    def _frozenset(self, at: int) -> int:
        items = self._pop_mark()
        self.check_keys(items)
        self.left -= SET_WEIGHT
        self.stack.append(frozenset(items))
        return at

    def _add(self, items: list[object]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif not isinstance(target, Opaque):
            self.refuse(f"data.pkl appends to a {type(target).__name__}")

    def _append(self, at: int) -> int:
        self._add([self.stack.pop()])
        return at

    def _appends(self, at: int) -> int:
        self._add(self._pop_mark())
        return at

    def _update(self, items: list[object]) -> None:
        target = self.stack[-1]
        if type(target) is dict:
            keys = items[::2]
            self.check_keys(keys)
            target.update(zip(keys, items[1::2], strict=True))
        elif not isinstance(target, Opaque):
            self.refuse(f"data.pkl sets items of a {type(target).__name__}")

    def _setitem(self, at: int) -> int:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])
        return at

    def _setitems(self, at: int) -> int:
        self._update(self._pop_mark())
        return at

    def _additems(self, at: int) -> int:
        items = self._pop_mark()
        target = self.stack[-1]
        if type(target) is not set:
            self.refuse(f"data.pkl adds items to a {type(target).__name__}")
        self.check_keys(items)
        target.update(items)
        return at

    # Names and calls.

    def _global(self, at: int) -> int:
        middle = self.data.index(b"\n", at)
        end = self.data.index(b"\n", middle + 1)
        self.stack.append(self.find_global(self.data[at:middle].decode(), self.data[middle + 1 : end].decode()))
        return end + 1

    def _stack_global(self, at: int) -> int:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            self.refuse("data.pkl makes a name out of something that is no text")
        self.stack.append(self.find_global(module, name))
        return at

    def _reduce(self, at: int) -> int:
        args, target = self.stack.pop(), self.stack[-1]
        if type(target) is not Global or type(args) is not tuple:
            self.refuse(f"data.pkl calls a {type(target).__name__}")
        self.stack[-1] = target.call(args)
        return at

    def _newobj(self, at: int) -> int:
        if type(self.stack[-2]) is not Global or not self.stack[-2].is_class:
            self.refuse("data.pkl makes an instance of something that is no known class")
        return self._reduce(at)

    def _build(self, at: int) -> int:
        # The attributes of an opaque object, or those that a state dict carries (_metadata), are dropped.
        self.stack.pop()
        target = self.stack[-1]
        if type(target) is not dict and not isinstance(target, Opaque):
            self.refuse(f"data.pkl sets attributes of a {type(target).__name__}")
        return at

    def _binpersid(self, at: int) -> int:
        self.stack[-1] = self.persistent_load(self.stack[-1])
        return at


def _children(node: object) -> Iterable[object]:
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list | tuple) else ()


def refuse_global(file: InputFile, module: str, name: str) -> NoReturn:
    """Raise :class:`UnsafeCheckpoint` for a name that is not in the table."""
    raise UnsafeCheckpoint(
        f"refused to read {file.shown}",
        why=f"its pickle names {printable(f'{module}.{name}')}, which no tensor checkpoint needs",
        slug="pickle-global",
        hint=resave(file),
    )
