"""Reads a pickle as data: what it says, never what it asks to be done.

A pickle is a program for a stack machine. Python's own reader runs it, and a program that calls ``os.system`` is as
valid as one that builds a list. The machine here knows the 53 instructions that plain data, numpy arrays,
scikit-learn estimators and the tensors of torch need. A class that the file names becomes a ``Record`` of that name,
of its arguments and its state: no class is looked up, no function of the file is called, and a name outside a closed
list is an error.

Instructions: PEP 307 (protocol 2), PEP 3154 (4), PEP 574 (5), and the module ``pickletools``.
"""

from __future__ import annotations

import pickletools
import re
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn, final

from ...errors import UnsafePickleError

__all__ = ["Blob", "Name", "Ordered", "Record", "latin1", "read_pickle"]

# A forest takes about 200 instructions per tree, whatever its size; without a bound, one byte of "new list" a time
# would take 60 bytes of memory.
_MOST_INSTRUCTIONS = 5_000_000
_LONG = 256  # bytes from which data is given out once, in a file that may be of 2 GB
_LONGEST_NUMBER = 1000  # digits or bytes
_PYTHON_NAMES = {
    ("copy_reg", "_reconstructor"): "new object",
    ("copyreg", "_reconstructor"): "new object",
    ("__builtin__", "object"): "object",
    ("builtins", "object"): "object",
    ("_codecs", "encode"): "encode",
    ("__builtin__", "bytes"): "no bytes",
    ("builtins", "bytes"): "no bytes",
}


@final
@dataclass(frozen=True)
class Name:
    """A class or function that the file names and the reader knows; ``kind`` is the reader's word for it."""

    kind: str


@final
@dataclass(eq=False)
class Record:
    """What the file says about one object. Nothing was made of it."""

    kind: str
    args: tuple[Any, ...]
    state: Any = None


@final
class Ordered(dict[Any, Any]):
    """What the file calls an OrderedDict; ``state``: the attributes that it sets on it."""

    state: Any = None


@final
class Blob:
    """Long bytes or text of the file, given out once, so that what was used does not stay in memory.

    A pickle may refer again to anything it wrote; nobody refers again to the raw bytes of an array.
    """

    def __init__(self, data: bytes | str) -> None:
        self._data: bytes | str | None = data

    def take(self) -> bytes | str:
        if self._data is None:
            raise UnsafePickleError("one block of data is used twice, which no array needs")
        data, self._data = self._data, None
        return data


def read_pickle(
    file: BinaryIO,
    size: int,
    names: Mapping[tuple[str, str], str],
    built: Callable[[Record], None] = lambda record: None,
    *,
    stored: Callable[[Any], Any] | None = None,
    keys: tuple[type, ...] = (str,),
    blobs: bool = True,
    protocols: Collection[int] = range(6),
) -> Any:
    """What the first pickle in ``file`` holds: plain data and ``Record``, with ``Blob`` for what is long.

    Args:
        file: opened for binary reading.
        size: bytes from the current position to the end. A length field that claims more is an error, before
            anything is allocated.
        names: (module, name) that the file may name -> ``kind`` of the records; else UnsafePickleError.
        built: called with every record when the file has set its state, so that big states need not pile up.
        stored: what stands for a thing outside of the pickle, from the reference to it; None: there are none.
        keys: the types of dict keys. A tuple is none: the hash of a tuple in a tuple in a tuple ... overflows the
            stack of the process.
        protocols: those that the file may say it is written in.
        blobs: whether long bytes and texts are a ``Blob``; without, they are plain.

    >>> import io, pickle
    >>> data = pickle.dumps({"a": [1, (2.5, None)], "b": complex(1, 2)}, protocol=4)
    >>> read_pickle(io.BytesIO(data), len(data), {("builtins", "complex"): "complex number"})
    {'a': [1, (2.5, None)], 'b': Record(kind='complex number', args=(1.0, 2.0), state=None)}
    >>> read_pickle(io.BytesIO(data), len(data), {})
    Traceback (most recent call last):
    oneshot.errors.UnsafePickleError: it names 'builtins.complex', which nothing here needs (byte 62 of 87)
    """
    machine = _Machine(file, size, {**_PYTHON_NAMES, **names}, built)
    machine.stored, machine.keys, machine.longest = stored, keys, _LONG if blobs else size
    machine.protocols = protocols
    try:
        return machine.run()
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{error} (byte {machine.position} of {size})") from None


class _Machine:
    def __init__(
        self, file: BinaryIO, size: int, names: Mapping[tuple[str, str], str], built: Callable[[Record], None]
    ) -> None:
        self._file, self._size, self.position = file, size, 0
        self._names, self._built = names, built
        self.stored: Callable[[Any], Any] | None = None
        self.keys: tuple[type, ...] = (str,)
        self.longest = _LONG
        self.protocols: Collection[int] = range(6)
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(_MOST_INSTRUCTIONS):
            code = self.read(1)
            if code == b".":
                return self.pop()
            if code not in _INSTRUCTIONS:
                _refuse_instruction(code)
            _INSTRUCTIONS[code](self)
        raise UnsafePickleError(f"more than {_MOST_INSTRUCTIONS:,} instructions; a forest of 10,000 trees has fewer")

    # --- the file ---

    def read(self, n: int) -> bytes:
        left = self._size - self.position
        data = self._file.read(n) if n <= left else b""
        if len(data) != n:
            raise UnsafePickleError(f"{n:,} bytes are claimed where {left:,} are left: cut off or damaged")
        self.position += n
        return data

    def line(self, longest: int | None = None) -> bytes:
        left = self._size - self.position
        data = self._file.readline(left if longest is None else min(left, longest))
        if not data.endswith(b"\n"):
            raise UnsafePickleError("a line of text does not end: cut off or damaged")
        self.position += len(data)
        return data[:-1]

    def unsigned(self, n: int) -> int:
        return int.from_bytes(self.read(n), "little")

    # --- the stack ---

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def push_data(self, data: bytes | str) -> None:
        self._stack.append(Blob(data) if len(data) > self.longest else data)

    def pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise UnsafePickleError("an instruction finds nothing to work on: damaged")
        return self._stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self._stack.append(value)
        return value

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise UnsafePickleError("an instruction finds no mark: damaged")
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    # --- numbers and text ---

    def protocol(self) -> None:
        version = self.unsigned(1)
        if version not in self.protocols:
            raise UnsafePickleError(f"pickle protocol {version}; {list(self.protocols)} are known")

    def frame(self) -> None:
        left, length = self._size - self.position - 8, self.unsigned(8)
        if length > left:
            raise UnsafePickleError(f"{length:,} bytes are claimed where {left:,} are left: cut off or damaged")

    def number_line(self, convert: Callable[[str], Any]) -> None:
        text = self.line(_LONGEST_NUMBER)
        try:
            self.push(convert(text.decode("ascii")))
        except ValueError:
            raise UnsafePickleError(f"{text[:20]!r} is no number: damaged") from None

    def long(self, n_length: int) -> None:
        n = self.unsigned(n_length)
        if n > _LONGEST_NUMBER:
            raise UnsafePickleError(f"a number of {n:,} bytes; at most {_LONGEST_NUMBER:,} are read")
        self.push(int.from_bytes(self.read(n), "little", signed=True))

    def text(self, data: bytes, encoding: str) -> None:
        try:
            self.push_data(data.decode(encoding))
        except UnicodeDecodeError:
            raise UnsafePickleError(f"{data[:20]!r} is no {encoding} text: damaged") from None

    # --- lists and dicts ---

    def extend(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not list:
            raise UnsafePickleError(f"items for a list go into a {_called(target)}")
        target.extend(items)

    def update(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) not in (dict, Ordered) or len(items) % 2:
            raise UnsafePickleError(f"{len(items)} keys and values go into a {_called(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in self.keys:
                allowed = " or ".join(kind.__name__ for kind in self.keys)
                raise UnsafePickleError(f"a dict with a {_called(key)} as key; {allowed} is known")
            target[key] = value

    def dict_from_mark(self) -> None:
        items = self.pop_to_mark()
        self.push({})
        self.update(items)

    # --- the memo ---

    def put(self, index: int) -> None:
        self._memo[index] = self.top()

    def put_next(self) -> None:
        self.put(len(self._memo))

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise UnsafePickleError(f"it refers to value {index}, which is not there: damaged")
        self.push(self._memo[index])

    def index_line(self) -> int:
        self.number_line(int)
        return self.pop()

    # --- names and objects ---

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise UnsafePickleError(f"a {_called(module)} and a {_called(name)} where a name is due")
        if (module, name) not in self._names:
            raise UnsafePickleError(f"it names {f'{module}.{name}'!r}, which nothing here needs")
        self.push(Name(self._names[module, name]))

    def name_lines(self) -> None:
        self.text(self.line(_LONG), "utf-8")
        self.text(self.line(_LONG), "utf-8")
        self.name_popped()

    def name_popped(self) -> None:
        name = self.pop()
        self.name(self.pop(), name)

    def make(self) -> None:
        """A call, as the file puts it: it becomes a record."""
        args, called = self.pop(), self.pop()
        if type(called) is not Name or type(args) is not tuple:
            raise UnsafePickleError(f"a call of a {_called(called)} with a {_called(args)}")
        if called.kind == "encode":
            self.push_data(_encoded(args))
        elif called.kind == "no bytes" and not args:
            self.push(b"")
        elif called.kind == "new object":
            self.push(_new_object(args))
        elif called.kind == "ordered" and not args:
            self.push(Ordered())
        else:
            self.push(Record(called.kind, args))

    def build(self) -> None:
        state, record = self.pop(), self.top()
        if type(record) not in (Record, Ordered) or record.state is not None:
            raise UnsafePickleError(f"the state of a {_called(record)} is set; it has none, or has one already")
        record.state = state
        if type(record) is Record:
            self._built(record)

    def refer(self) -> None:
        """A reference to what is stored outside of the pickle."""
        if self.stored is None:
            _refuse_instruction(b"Q")
        self.push(self.stored(self.pop()))


def _called(value: Any) -> str:
    """What a value is, in words; the values themselves may be endless."""
    return f"{type(value).__name__} ({value.kind})" if isinstance(value, Name | Record) else type(value).__name__


def _refuse_instruction(code: bytes) -> NoReturn:
    name = {known.code: known.name for known in pickletools.opcodes}.get(code.decode("latin-1"))
    what = f"the instruction {name}" if name else f"the byte 0x{code.hex()}, which is no instruction"
    raise UnsafePickleError(f"it holds {what}; nothing here needs it")


def _encoded(args: tuple[Any, ...]) -> bytes:
    """Bytes in protocols 0 to 2 of Python 3 are written as text that is to be encoded."""
    text = args[0].take() if args and isinstance(args[0], Blob) else args[0] if args else None
    if type(text) is not str or args[1:] not in [("latin1",), ("latin-1",)]:
        raise UnsafePickleError("it encodes something other than text as latin-1")
    return latin1(text)


def latin1(text: str) -> bytes:
    """Bytes that were written as text, one character each."""
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        raise UnsafePickleError("bytes are written as text that has other characters: damaged") from None


def _new_object(args: tuple[Any, ...]) -> Record:
    """An object in protocols 0 and 1 is written as a call of copyreg's function for its class."""
    if len(args) != 3 or type(args[0]) is not Name or args[1] != Name("object") or args[2] is not None:
        raise UnsafePickleError("copyreg._reconstructor with other arguments than a class, object and None")
    return Record(args[0].kind, ())


_ESCAPES = {rb"\n": b"\n", rb"\r": b"\r", rb"\t": b"\t", rb"\\": b"\\", rb"\'": b"'", rb"\"": b'"'}


def _quoted(line: bytes) -> str:
    """Text of Python 2 in protocol 0, as its repr writes it; bytes are text there."""
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise UnsafePickleError("a line of text without quotes: damaged")

    def plain(match: re.Match[bytes]) -> bytes:
        found = match[0]
        if found not in _ESCAPES and len(found) != 4:
            raise UnsafePickleError(f"{found!r} in a line of text: damaged")
        return _ESCAPES[found] if found in _ESCAPES else bytes.fromhex(found[2:].decode("ascii"))

    return re.sub(rb"\\(?:x[0-9a-f]{2}|.)", plain, line[1:-1], flags=re.DOTALL).decode("latin-1")


def _integer(text: str) -> int:
    return int(text.removesuffix("L"))


def _integer_or_bool(text: str) -> int | bool:
    return {"00": False, "01": True}[text] if text in ("00", "01") else int(text)


_INSTRUCTIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.protocol,
    b"\x95": _Machine.frame,
    # numbers
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"I": lambda m: m.number_line(_integer_or_bool),
    b"L": lambda m: m.number_line(_integer),
    b"F": lambda m: m.number_line(float),
    b"K": lambda m: m.push(m.unsigned(1)),
    b"M": lambda m: m.push(m.unsigned(2)),
    b"J": lambda m: m.push(int.from_bytes(m.read(4), "little", signed=True)),
    b"\x8a": lambda m: m.long(1),
    b"\x8b": lambda m: m.long(4),
    b"G": lambda m: m.push(struct.unpack(">d", m.read(8))[0]),
    # text, and the bytes that are text in Python 2
    b"V": lambda m: m.text(m.line(), "raw-unicode-escape"),
    b"\x8c": lambda m: m.text(m.read(m.unsigned(1)), "utf-8"),
    b"X": lambda m: m.text(m.read(m.unsigned(4)), "utf-8"),
    b"\x8d": lambda m: m.text(m.read(m.unsigned(8)), "utf-8"),
    b"S": lambda m: m.push_data(_quoted(m.line())),
    b"U": lambda m: m.text(m.read(m.unsigned(1)), "latin-1"),
    b"T": lambda m: m.text(m.read(m.unsigned(4)), "latin-1"),
    # bytes
    b"C": lambda m: m.push_data(m.read(m.unsigned(1))),
    b"B": lambda m: m.push_data(m.read(m.unsigned(4))),
    b"\x8e": lambda m: m.push_data(m.read(m.unsigned(8))),
    b"\x96": lambda m: m.push_data(m.read(m.unsigned(8))),
    # tuples, lists, dicts
    b"(": _Machine.mark,
    b")": lambda m: m.push(()),
    b"t": lambda m: m.push(tuple(m.pop_to_mark())),
    b"\x85": lambda m: m.push((m.pop(),)),
    b"\x86": lambda m: m.push((m.pop(), m.pop())[::-1]),
    b"\x87": lambda m: m.push((m.pop(), m.pop(), m.pop())[::-1]),
    b"]": lambda m: m.push([]),
    b"l": lambda m: m.push(m.pop_to_mark()),
    b"a": lambda m: m.extend([m.pop()]),
    b"e": lambda m: m.extend(m.pop_to_mark()),
    b"}": lambda m: m.push({}),
    b"d": _Machine.dict_from_mark,
    b"s": lambda m: m.update([m.pop(), m.pop()][::-1]),
    b"u": lambda m: m.update(m.pop_to_mark()),
    # the memo
    b"p": lambda m: m.put(m.index_line()),
    b"q": lambda m: m.put(m.unsigned(1)),
    b"r": lambda m: m.put(m.unsigned(4)),
    b"\x94": _Machine.put_next,
    b"g": lambda m: m.get(m.index_line()),
    b"h": lambda m: m.get(m.unsigned(1)),
    b"j": lambda m: m.get(m.unsigned(4)),
    # names and objects
    b"c": _Machine.name_lines,
    b"\x93": _Machine.name_popped,
    b"R": _Machine.make,
    b"\x81": _Machine.make,
    b"b": _Machine.build,
    b"Q": _Machine.refer,
}
