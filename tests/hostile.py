"""Hostile checkpoint files, made when they are needed: every generator yields ``(case name, bytes)``.

Nothing here comes from a malware collection: the names of gadgets and techniques are public, the bytes are ours.
Run as a script it reads cases under an audit hook (``audit``) or one file under a memory limit (``measure``); hooks
and limits cannot be taken back, so both need a process of their own.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import struct
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

Case = tuple[str, bytes]

CODE_GADGETS = """
    builtins.eval builtins.exec builtins.compile __builtin__.eval __builtin__.exec __builtin__.execfile
    timeit.timeit timeit.repeat timeit.main cProfile.run cProfile.runctx profile.run profile.runctx pdb.run
    pdb.runeval bdb.Bdb.run bdb.Bdb.runctx trace.Trace.run trace.Trace.runctx doctest.debug_script
    code.InteractiveInterpreter.runcode code.interact codeop.compile_command test.support.run_code
    idlelib.run.Executive.runcode numpy.testing._private.utils.runstring numpy.testing.rundocs
    torch._dynamo.guards.GuardBuilder.get torch.utils._config_module.load_config
    torch.jit.unsupported_tensor_ops.execWrapper
    torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_guards_expression torch.utils.collect_env.run
    ensurepip._run_pip
"""
SHELL_GADGETS = """
    os.system os.popen os.execv os.execvp os.execl os.spawnv os.spawnl os.posix_spawn os.startfile os.remove os.open
    os.rename posix.system posix.execv posix.fork nt.system subprocess.Popen subprocess.run subprocess.call
    subprocess.check_call subprocess.check_output subprocess.getoutput subprocess.getstatusoutput pty.spawn
    commands.getoutput popen2.popen3 platform.popen asyncio.create_subprocess_shell
    asyncio.unix_events._UnixSubprocessTransport._start uuid._get_command_stdout uuid._popen imaplib.IMAP4_stream
    _osx_support._read_output _osx_support._find_build_tool _aix_support._read_cmd_output _pyrepl.pager.pipe_pager
    _pyrepl.pager.tempfile_pager ctypes.util._findLib_gcc webbrowser.open webbrowser.GenericBrowser
    distutils.spawn.spawn distutils.file_util.write_file multiprocessing.util.spawnv_passfds multiprocessing.Process
    _posixsubprocess.fork_exec shutil.rmtree shutil.move shutil.copyfile lib2to3.pgen2.pgen.ParserGenerator pip.main
    pip._internal.main numpy.f2py.compile numpy.f2py.crackfortran.getlincoef
    numpy.distutils.exec_command.exec_command torch.utils.cpp_extension.load_inline
"""
OTHER_GADGETS = """
    builtins.__import__ builtins.getattr builtins.setattr builtins.open builtins.globals builtins.breakpoint
    builtins.input importlib.import_module importlib.reload runpy.run_path runpy.run_module runpy._run_code
    marshal.loads types.FunctionType types.CodeType ctypes.CDLL ctypes.PyDLL ctypes.cdll.LoadLibrary pydoc.locate
    pydoc.pipepager pkgutil.resolve_name operator.methodcaller operator.attrgetter functools.partial
    functools.reduce itertools.starmap pickle.loads _pickle.loads copyreg._reconstructor socket.socket
    socket.create_connection urllib.request.urlopen smtplib.SMTP ftplib.FTP http.client.HTTPSConnection
    logging.config.listen torch.load torch.hub.load torch.jit.load torch.package.PackageImporter
    torch.storage._load_from_bytes torch.utils.model_zoo.load_url numpy.load joblib.load dill.loads
    cloudpickle.loads sys.exit
"""
FORMS = ("global-p0", "global-p2", "stack-global", "inst", "obj", "build")
CONTAINERS = ("raw", "torch-zip", "legacy")

BENIGN = b"\x80\x02}."


# Building blocks.


def member_header(name: bytes, data: bytes, *, flags: int = 0, crc: int | None = None) -> bytes:
    """A local header with its name."""
    crc = zlib.crc32(data) if crc is None else crc
    fixed = struct.pack("<4s5H3I2H", b"PK\3\4", 20, flags, 0, 0, 33, crc, len(data), len(data), len(name), 0)
    return fixed + name


def zip_of(members: Iterable[tuple[str, bytes]], *, flags: int = 0, crc_error: int = 0, rename: bytes = b"") -> bytes:
    """A stored zip. ``flags``, ``crc_error`` and ``rename`` (its name in its own header) damage its first member."""
    body, lines = io.BytesIO(), io.BytesIO()
    count = 0
    for path, data in members:
        name = path.encode()
        crc = zlib.crc32(data) ^ (0 if count else crc_error)
        bits = 0 if count else flags
        hidden = name if count or not rename else rename
        offset = body.tell()
        body.write(member_header(hidden, data, flags=bits, crc=crc))
        body.write(data)
        size, length = len(data), len(name)
        fields = (b"PK\1\2", 20, 20, bits, 0, 0, 33, crc, size, size, length, 0, 0, 0, 0, 0, offset)
        lines.write(struct.pack("<4s6H3I5H2I", *fields))
        lines.write(name)
        count += 1
    start, size = body.tell(), lines.tell()
    short = min(count, 0xFFFF)
    if count > 0xFFFE:
        lines.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start))
        lines.write(struct.pack("<4sIQI", b"PK\6\7", 0, start + size, 1))
    lines.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, short, short, size, start, 0))
    return body.getvalue() + lines.getvalue()


def checkpoint(pickle: bytes, storages: Iterable[bytes] = (), **damage: object) -> bytes:
    """A torch zip around ``pickle``, with one member for each storage."""
    members = [("archive/data.pkl", pickle), ("archive/byteorder", b"little")]
    members += [(f"archive/data/{number}", data) for number, data in enumerate(storages)]
    members += [("archive/version", b"3\n")]
    return zip_of(members, **damage)  # type: ignore[arg-type]


def legacy(pickle: bytes) -> bytes:
    """The layout of torch.save before 1.6: magic number, protocol, system, the object, the storage keys."""
    return b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}." + pickle + b"\x80\x02]."


def text(value: str) -> bytes:
    """BINUNICODE."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    """LONG1, which holds any size up to 255 bytes."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def numbers(values: Iterable[int]) -> bytes:
    """A tuple of integers."""
    return b"(" + b"".join(map(integer, values)) + b"t"


def tensor(
    shape: Iterable[int],
    strides: Iterable[int],
    *,
    offset: int = 0,
    count: int = 0,
    key: str = "0",
    storage: str = "FloatStorage",
) -> bytes:
    """The opcodes of one tensor; ``count`` is the number of elements its storage declares."""
    pid = b"(" + text("storage") + f"ctorch\n{storage}\n".encode() + text(key) + text("cpu") + integer(count) + b"tQ"
    view = integer(offset) + numbers(shape) + numbers(strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + view + b"\x89ccollections\nOrderedDict\n)RtR"


def small_checkpoint() -> bytes:
    """A valid file of about 2.2 KB: two tensors, one of them a view with an offset."""
    values = struct.pack("<256f", *range(256))
    body = text("module") + b"}(" + text("a.weight") + tensor((8, 16), (16, 1), count=256)
    body += text("b.weight") + tensor((64,), (1,), offset=192, count=256) + b"u" + text("iteration") + b"K\x02"
    return checkpoint(b"\x80\x02}(" + body + b"u.", [values])


# P1: code.


def gadgets() -> list[str]:
    """The dotted names that the attacks call."""
    return (CODE_GADGETS + SHELL_GADGETS + OTHER_GADGETS).split()


def attack(gadget: str, form: str, canary: Path) -> bytes:
    """A pickle that calls ``gadget`` with a payload that would create ``canary``."""
    module, _, name = gadget.rpartition(".")
    payload = f"touch {canary}" if gadget in SHELL_GADGETS.split() else f"__import__('os').system('touch {canary}')"
    line, old = f"{module}\n{name}\n".encode(), b"S" + repr(payload).encode() + b"\n"
    if form == "global-p0":
        return b"c" + line + b"(" + old + b"tR."
    if form == "global-p2":
        return b"\x80\x02c" + line + text(payload) + b"\x85R."
    if form == "stack-global":
        return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(payload) + b"\x85R."
    if form == "inst":
        return b"(" + old + b"i" + line + b"."
    if form == "obj":
        return b"(c" + line + old + b"o."
    hook = b"}" + text("__setstate__") + b"c" + line + b"sb"
    return b"\x80\x02cargparse\nNamespace\n)\x81" + hook + text(payload) + b"b."


def malicious(canary: Path) -> Iterator[Case]:
    """Every gadget in every opcode form in every container."""
    for gadget in gadgets():
        for form in FORMS:
            pickle = attack(gadget, form, canary)
            yield f"{gadget}/{form}/raw", pickle
            yield f"{gadget}/{form}/torch-zip", checkpoint(pickle)
            yield f"{gadget}/{form}/legacy", legacy(pickle)


def structural(canary: Path) -> Iterator[Case]:
    """Containers and streams that are made to be read differently by a scanner and by a loader."""
    payload = attack("os.system", "global-p2", canary)
    yield "bad-crc", checkpoint(BENIGN, crc_error=1)
    for bit in (0x1, 0x20, 0x40):
        yield f"flag-{bit:#x}", checkpoint(BENIGN, flags=bit)
    yield "name-mismatch", checkpoint(BENIGN, rename=b"archive/data.pkI")
    yield "wrong-extension.safetensors", payload
    yield "7z", b"7z\xbc\xaf\x27\x1c\x00\x04" + payload
    yield "tar", _tar(payload)
    inner = text("a" * 20)
    yield "frame-straddle", checkpoint(b"\x80\x04\x95" + struct.pack("<Q", len(inner) - 5) + inner + b".")
    yield "two-pickles", checkpoint(BENIGN + payload)
    yield "trailing-payload", checkpoint(BENIGN) + payload
    yield "leading-payload", payload + checkpoint(BENIGN)
    yield (
        "nested-pickle",
        checkpoint(b"\x80\x03cpickle\nloads\nB" + struct.pack("<I", len(payload)) + payload + b"\x85R."),
    )
    yield "torchscript", zip_of([("a/data.pkl", BENIGN), ("a/code/x.py", b"import os"), ("a/constants.pkl", BENIGN)])
    yield "path-traversal", zip_of([("archive/data.pkl", BENIGN), ("archive/../../x", b"")])
    yield "absolute-name", zip_of([("/data.pkl", BENIGN)])
    yield "backslash-name", zip_of([("archive\\x/data.pkl", BENIGN)])
    yield "two-data-pkl", zip_of([("archive/data.pkl", BENIGN), ("archive/data.pkl", payload)])
    yield "two-roots", zip_of([("archive/data.pkl", BENIGN), ("b/version", b"3\n")])
    yield "extension-registry", checkpoint(b"\x80\x02\x82\x01.")
    yield "obj-and-pop", checkpoint(b"\x80\x02}(cos\nsystem\n" + text("true") + b"o0.")


def _tar(payload: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo("data.pkl")
        info.size = len(payload)
        archive.addfile(info, io.BytesIO(payload))
    return out.getvalue()


# P3: bombs.


def bombs() -> Iterator[Case]:
    """Small or sparse files that ask for far more memory or time than their size."""
    for name, make in BOMBS.items():
        yield name, make()


def _around(before: bytes, after: bytes = b".", *storages: bytes) -> bytes:
    return checkpoint(b"\x80\x04" + before + after, storages)


def _keys(count: int) -> bytes:
    return b"".join(b"J" + struct.pack("<i", number) + b"N" for number in range(count))


def _colliding(count: int) -> bytes:
    return b"".join(integer(number * (2**61 - 1)) + b"N" for number in range(count))


def _tensors_again() -> bytes:
    """One tensor of 64 dimensions, rebuilt 600,000 times from arguments in the memo."""
    once = tensor((1,) * 63 + (0,), (1,) * 64)
    return b"(" + once.replace(b"\n(", b"\nq\0(", 1).removesuffix(b"R") + b"q\1R" + b"h\0h\1R" * 600_000


def _encode_again() -> bytes:
    names = b"c_codecs\nencode\nq\0" + text("a" * (1 << 20)) + text("latin1") + b"\x86q\x01"
    return b"(" + names + b"h\0h\x01R" * 1000 + b"t"


def _laugh(level: int) -> bytes:
    return f"](h{chr(level)}h{chr(level)}eq{chr(level + 1)}".encode()


def _deflated(data: bytes) -> bytes:
    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    raw = packed.compress(data) + packed.flush()
    name, crc = b"archive/data.pkl", zlib.crc32(data)
    head = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 8, 0, 33, crc, len(raw), len(data), len(name), 0) + name
    fields = (b"PK\1\2", 20, 20, 0, 8, 0, 33, crc, len(raw), len(data), len(name), 0, 0, 0, 0, 0, 0)
    line = struct.pack("<4s6H3I5H2I", *fields) + name
    return head + raw + line + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(line), len(head) + len(raw), 0)


def _many(count: int) -> Iterator[tuple[str, bytes]]:
    yield "a/data.pkl", BENIGN
    for number in range(count):
        yield f"a/data/{number}", b"\0\0\0\0"


BOMBS: dict[str, Callable[[], bytes]] = {
    "deflated-member": lambda: _deflated(b"\0" * (64 << 20)),
    "nested-zip": lambda: checkpoint(_deflated(b"\0" * (64 << 20))),
    "stride-0-expand": lambda: _around(tensor((1000, 1000, 1000), (0, 0, 0), count=4), b".", b"\0" * 16),
    "memo-laughs": lambda: _around(b"(]q\0" + b"".join(_laugh(level) for level in range(60)), b"t."),
    "dup": lambda: _around(b"(]" + b"2" * 1_500_000, b"t."),
    "tuple-1000000-deep": lambda: _around(b")" + b"\x85" * 1_000_000),
    "key-1000000-deep": lambda: _around(b"})" + b"\x85" * 1_000_000, b"Ns."),
    "dict-10000000-keys": lambda: _around(b"}(" + _keys(10_000_000), b"u."),
    "tensors-300000": lambda: zip_of(_many(300_000)),
    "huge-dim-by-0": lambda: _around(tensor((1 << 59, 0), (1, 1), count=0), b".", b""),
    "sparse-tail": small_checkpoint,
    "sets": lambda: _around(b"(" + b"\x8f" * 1_900_000, b"t."),
    "lists": lambda: _around(b"(" + b"]" * 1_900_000, b"t."),
    "tuples": lambda: _around(b"(" + b"N\x85" * 950_000, b"t."),
    "memo": lambda: _around(b"(" + b"]\x94" * 950_000, b"t."),
    "one-key-dicts": lambda: _around(b"(" + b"}NNs" * 480_000, b"t."),
    "tensors-again": lambda: _around(_tensors_again(), b"t.", b""),
    "wide-text": lambda: _around(text("\U0001f600" + "a" * (60 << 20))),
    "encode-again": lambda: _around(_encode_again()),
    "colliding-keys": lambda: _around(b"}(" + _colliding(100_000), b"u."),
    "memo-index": lambda: _around(b"]r\xff\xff\xff\xff"),
    "long-length": lambda: _around(b"\x8b\xff\xff\xff\x7f"),
    "bytes-length": lambda: _around(b"\x8e" + b"\xff" * 7 + b"\x7f"),
}


# P5: damage.


def truncations(data: bytes) -> Iterator[Case]:
    """The file cut at every byte."""
    for length in range(len(data)):
        yield f"first {length} bytes", data[:length]


def bit_flips(data: bytes, count: int, seed: int = 1) -> Iterator[Case]:
    """``count`` copies with one bit turned, drawn with ``seed``."""
    draw = random.Random(seed)
    for _ in range(count):
        bit = draw.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit}", bytes(flipped)


def write(case: Case, folder: Path) -> Path:
    """The case as a file; the sparse tail is added here, because its bytes would fill the memory."""
    name, data = case
    path = folder / (name if name.endswith(".safetensors") else "case.pt")
    path.write_bytes(data)
    if name == "sparse-tail":
        os.truncate(path, 100 << 30)
    return path


# The two runs that need a process of their own.

WATCHED = (
    "os.",
    "subprocess.",
    "socket.",
    "exec",
    "compile",
    "ctypes.",
    "import",
    "pty.",
    "shutil.",
    "marshal.",
    "pickle.",
)


def audit() -> dict[str, object]:
    """Read every malicious and structural case under an audit hook; what happened, as counts."""
    from loraconv.io.input_file import InputFile
    from loraconv.io.torch_read import read_torch

    hits: list[str] = []
    watched: list[Path] = []

    def hook(event: str, args: tuple[object, ...]) -> None:
        if watched and (event.startswith(WATCHED) or (event == "open" and args[0] != str(watched[0]))):
            hits.append(f"{event} {args!r:.200}")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        codes: dict[str, list[str]] = {}
        canary = folder / "canary"
        cases = [*malicious(canary), *structural(canary)]
        _outcome(write(("valid", small_checkpoint()), folder), InputFile, read_torch)
        sys.addaudithook(hook)
        for case in cases:
            path = write(case, folder)
            watched[:] = [path]
            outcome = _outcome(path, InputFile, read_torch)
            watched.clear()
            codes.setdefault(outcome, []).append(case[0])
        executed, seen = canary.exists(), list(hits)
        watched[:] = [canary]
        os.system("true")
        watched.clear()
        return {
            "cases": len(cases),
            "hits": seen,
            "control": hits[len(seen) :],
            "executed": executed,
            "outcomes": {outcome: len(names) for outcome, names in codes.items()},
            "not exit 4": [names[:5] for outcome, names in codes.items() if not outcome.startswith("4 ")],
        }


def _outcome(path: Path, open_file: object, read: object) -> str:
    from loraconv.errors import LoraconvError

    try:
        with open_file(path) as file:  # type: ignore[operator]
            read(file)  # type: ignore[operator]
    except LoraconvError as error:
        return f"{error.exit_code} {error.slug}"
    return "read"


def measure(path: Path) -> dict[str, object]:
    """Read one file under a limit of 2 GB of address space; outcome, seconds, and memory beyond the imports."""
    from loraconv.io.input_file import InputFile
    from loraconv.io.torch_read import read_torch

    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    before, start = _peak_kilobytes(), time.perf_counter()
    outcome = _outcome(path, InputFile, read_torch)
    seconds = time.perf_counter() - start
    return {"outcome": outcome, "seconds": round(seconds, 3), "megabytes": (_peak_kilobytes() - before) // 1000}


def _peak_kilobytes() -> int:
    # ru_maxrss would do, but a child inherits the peak of the process that started it.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


if __name__ == "__main__":
    print(json.dumps(audit() if sys.argv[1] == "audit" else measure(Path(sys.argv[2]))))
