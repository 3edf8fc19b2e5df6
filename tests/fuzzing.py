"""Damage for files: bytes, trees of plain data, pickles and archives; and a judge of what a reader makes of them.

A reader may raise an error of this library that names the file, or return something. Another exception, ten seconds,
a gigabyte, or a call of something that the file names is a failure, with the file in the message.
"""

from __future__ import annotations

import base64
import io
import json
import pickletools
import resource
import signal
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any, NoReturn, TypeVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from oneshot.errors import OneshotError

_T = TypeVar("_T")
_SECONDS = 10
_MORE_BYTES = 2**30
SENTINEL = "code-of-a-file-was-run"


def examples(n: int) -> settings:
    """So many files, the same ones in every run."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    # Without shrinking: a damage is an operation or three on a small file, and its seed is all that is drawn.
    phases = (Phase.explicit, Phase.generate)
    return settings(
        max_examples=n, deadline=None, derandomize=True, database=None, suppress_health_check=checks, phases=phases
    )


randoms = st.integers(0, 2**62).map(Random)


# ---- the judge -----------------------------------------------------------------------------------------------------


class Hang(BaseException):
    """Not an Exception: a reader may catch those."""


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Hang


@contextmanager
def bounded() -> Iterator[None]:
    """Ten seconds of the processor, however busy it is, and a gigabyte more than now."""
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = Path("/proc/self/statm")
    if pages.exists():
        now = int(pages.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + _MORE_BYTES, hard))
    handler = signal.signal(signal.SIGPROF, _stop)
    signal.setitimer(signal.ITIMER_PROF, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))


def judged(path: Path, read: Callable[[], _T]) -> _T | None:
    """What is read, or None for an error of ours that names the file."""
    found, said = None, str(path)
    try:
        with bounded():
            found = read()
    except OneshotError as error:
        said = str(error)
    except (Exception, Hang) as error:
        kind = "a hang" if isinstance(error, Hang) else f"{type(error).__name__}: {str(error)[:500]}"
        packed = base64.b85encode(zlib.compress(path.read_bytes(), 9)).decode()
        raise AssertionError(f"{kind}. zlib.decompress(base64.b85decode({packed!r}))") from error
    assert not Path(SENTINEL).exists(), "code of the file was run"
    assert str(path) in said, f"the error does not name the file {path}: {said[:500]}"
    assert len(said) < 500_000
    return found


# ---- bytes ---------------------------------------------------------------------------------------------------------


def damaged_bytes(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """One to three of: bits, bytes, slices deleted, doubled or put elsewhere, the end cut off, half of another file."""
    for _ in range(random.randint(1, 3)):
        at, size = random.randrange(len(data) + 1), random.choice((1, 1, 2, 4, 8, 30))
        kind = random.randrange(8)
        if kind == 0:
            data = data[:at] + bytes(b ^ (1 << random.randrange(8)) for b in data[at : at + 1]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + bytes([random.choice((0, 1, 127, 128, 255, random.randrange(256)))]) + data[at + 1 :]
        elif kind == 2:
            data = data[:at]
        elif kind == 3:
            data = data[:at] + data[at + size :]
        elif kind == 4:
            data = data[: at + size] + data[at:]
        elif kind == 5:
            data = data[:at] + random.randbytes(size) + data[at:]
        elif kind == 6:
            data, to = data[:at] + data[at + size :], random.randrange(len(data) + 1)
            data = data[:to] + data[at : at + size] + data[to:]
        else:
            other = random.choice(others)
            data = data[:at] + other[random.randrange(len(other) + 1) :]
    return data


# ---- trees of plain data -------------------------------------------------------------------------------------------


class Raw(str):
    """A value as it stands in the file."""

    __slots__ = ()


class Pairs(list[tuple[Any, Any]]):
    """A mapping whose keys may be anything, and stand twice."""


def _nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def _laughs(n: int, of: Callable[[str], str]) -> str:
    """Each line ten times the one before: 10**n values."""
    lines = ["a0: &a0 {x: 1}", *(f"a{k}: &a{k} {of(f'*a{k - 1}')}" for k in range(1, n))]
    return "{" + ", ".join(lines) + "}"


JSON_VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 0.5, "", "x", "0", "1", [], {}, [[]], [0], {"a": {}}, -0.0, 5e-324),
    *(Raw("1e400"), Raw("-1e400"), Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), 2**63, -(2**63), 2**31, 10**300),
    *(Raw("1" * 4000), Raw("1" * 5000), "x" * 10**5, "\ud800", "\0", "é\u202e", [0] * 300, [None, True, "a", 1.5]),
    *(
        Raw(_nested(10)),
        Raw(_nested(300)),
        Raw(_nested(900)),
        Raw(_nested(10**4)),
        Raw('{"a":' * 10**4 + "1" + "}" * 10**4),
    ),
    *(Raw('{"a": 1, "a": 2}'), Raw('"\\u0000"'), Raw("01"), Raw("'a'"), Raw("1 2"), Raw("//"), Raw("")),
]
YAML_VALUES: list[Any] = [
    *(value for value in JSON_VALUES if not str(value).startswith("[" * 100)),
    Raw(_nested(2000)),
    *map(Raw, ("2001-01-01", "2001-99-99", "2001-01-01 01:01:01 +99:99", "0o17", "017", "0x1F", "0b11", "1_000")),
    *map(
        Raw, ("1:59:59", "1" + ":59" * 5000, "1:1.5", "on", "No", "~", ".inf", "-.INF", ".nan", "=", "<<", "1e3", "?")
    ),
    *map(Raw, ("!!binary '='", "!!binary aGk=", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1, a: 2]", "!!bool x")),
    *map(
        Raw, ("!!int ''", "!!int x", "!!float ''", "!!float x", "!!timestamp x", "!!null []", "!!str [1]", "!!seq {}")
    ),
    *map(
        Raw, ("&a [*a]", "&a {x: *a}", "*nobody", "&a 1", "{<<: 1}", "{<<: [1]}", "{<<: {a: 1}, a: 2}", "{a: 1, a: 2}")
    ),
    *map(
        Raw, ("{? [1, 2] : 3}", "{? {a: b} : 3}", "{null: 1, ~: 2}", "{1: 2, '1': 3}", "!local 1", "!<tag:x> {}", "|")
    ),
    Raw(f"!!python/object/apply:os.system ['touch {SENTINEL}']"),
    Raw(f"!!python/object/new:os.system ['touch {SENTINEL}']"),
    Raw("!!python/name:os.system"),
    Raw("!!python/tuple [1, 2]"),
    Raw(_laughs(4, lambda name: f"[{', '.join([name] * 10)}]")),
    Raw(_laughs(40, lambda name: f"[{', '.join([name] * 10)}]")),
    Raw(_laughs(40, lambda name: f"{{<<: [{name}, {name}]}}")),
    Raw(_laughs(40, lambda name: f"{{x: {name}, y: {name}}}")),
]
KEYS: list[Any] = ["", "a", "0", "format", "x" * 10**4, "\ud800", "-input:", "fixed", "median", "name", "version"]
YAML_KEYS: list[Any] = [
    *KEYS,
    *map(
        Raw,
        ("null", "1", "1.5", "true", "2001-01-01", "? [1]", "? {a: 1}", "<<", "*a", "&k k", "!!binary aGk=", ".nan"),
    ),
]


def dumped(tree: Any) -> str:
    """JSON, which is YAML too, but for what is raw."""
    if isinstance(tree, Raw):
        return str(tree)
    if isinstance(tree, Pairs):
        return "{" + ", ".join(f"{dumped(key)}: {dumped(value)}" for key, value in tree) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(dumped, tree)) + "]"
    return dumped(as_pairs(tree)) if isinstance(tree, dict) else json.dumps(tree)


def as_pairs(tree: Any) -> Any:
    """A copy that can be damaged in place."""
    if isinstance(tree, dict):
        return Pairs((key, as_pairs(value)) for key, value in tree.items())
    return [as_pairs(value) for value in tree] if isinstance(tree, list | tuple) else tree


def _containers(tree: Any) -> list[list[Any]]:
    """All lists and mappings in a tree, the outermost first."""
    if not isinstance(tree, list):
        return []
    inner = [pair[1] for pair in tree] if isinstance(tree, Pairs) else tree
    return [tree, *(found for one in inner for found in _containers(one))]


def damaged_tree(tree: Any, values: Sequence[Any], keys: Sequence[Any], random: Random) -> Any:
    """One to three of: another value, a key less, more, twice or of another name, two values changed, one wrapped."""
    tree = as_pairs(tree)
    if random.randrange(40) == 0:
        return as_pairs(random.choice(values))
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        container = random.choice(_containers(tree))
        if not container:
            container.append(
                ("a", as_pairs(random.choice(values)))
                if isinstance(container, Pairs)
                else as_pairs(random.choice(values))
            )
        elif isinstance(container, Pairs):
            _damage_pairs(container, random.choice(_containers(tree)), values, keys, random)
        else:
            _damage_list(container, values, random)
    return tree


def _damage_pairs(pairs: Pairs, other: list[Any], values: Sequence[Any], keys: Sequence[Any], random: Random) -> None:
    at, kind = random.randrange(len(pairs)), random.randrange(10)
    key, value = pairs[at]
    if kind < 5:
        pairs[at] = (key, as_pairs(random.choice(values)))
    elif kind == 5:
        del pairs[at]
    elif kind == 6:
        pairs[at] = (random.choice(keys), value)
    elif kind == 7:
        pairs.insert(at, (random.choice([*keys, key]), as_pairs(random.choice([*values, value]))))
    elif kind == 8:
        pairs[at] = (key, random.choice([[value], Pairs([(key, value)]), str(value)[:100]]))
    elif isinstance(other, Pairs) and other:
        pairs[at] = (key, as_pairs(random.choice(other)[1]) if other is not value else None)


def _damage_list(items: list[Any], values: Sequence[Any], random: Random) -> None:
    at, kind = random.randrange(len(items)), random.randrange(5)
    if kind < 2:
        items[at] = as_pairs(random.choice(values))
    elif kind == 2:
        del items[at]
    elif kind == 3:
        items.insert(at, as_pairs(items[at]))
    else:
        items.insert(at, as_pairs(random.choice(values)))


def damaged_json(tree: Any, others: Sequence[bytes], random: Random) -> bytes:
    """The file of damaged data, or a damaged file."""
    if random.randrange(3) == 0:
        return damaged_bytes(dumped(tree).encode("utf-8", "replace"), others, random)
    return dumped(damaged_tree(tree, JSON_VALUES, KEYS, random)).encode("utf-8", "replace")


def damaged_yaml(tree: Any, others: Sequence[bytes], random: Random) -> bytes:
    if random.randrange(3) == 0:
        return damaged_bytes(random.choice([dumped(tree).encode("utf-8", "replace"), *others]), others, random)
    return dumped(damaged_tree(tree, YAML_VALUES, YAML_KEYS, random)).encode("utf-8", "replace")


# ---- pickles -------------------------------------------------------------------------------------------------------

_TOUCH = f"touch {SENTINEL}".encode()
# As long as they are whole, each leaves one value on the stack.
PICKLE_PARTS: list[bytes] = [
    b"cposix\nsystem\n(S'" + _TOUCH + b"'\ntR",
    b"cos\nsystem\n(S'" + _TOUCH + b"'\ntR",
    b"cbuiltins\neval\n(S'open(\"" + SENTINEL.encode() + b'", "w")\'\ntR',
    b"cbuiltins\ngetattr\n",
    b"\x8c\x05posix\x8c\x06system\x93\x8c" + bytes([len(_TOUCH)]) + _TOUCH + b"\x85R",
    b"csubprocess\nPopen\n",
    b"cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x10\x85R",
    b"ctorch\nTensor\n\x8a\x06\x00\x00\x00\x00\x00\x10\x85R",
    b"ctorch.storage\nUntypedStorage\n\x8a\x06\x00\x00\x00\x00\x00\x10\x85R",
    b"cnumpy\nzeros\n\x8a\x06\x00\x00\x00\x00\x00\x10\x85R",
    b"cnumpy\ndtype\nX\x02\x00\x00\x00f8\x89\x88\x87R",
    b"ctorch\nfloat32\n",
    b"ccollections\nOrderedDict\n)R",
    b"N",
    b"\x88",
    b"K\x00",
    b"J\xff\xff\xff\xff",
    b"\x8a\x09\x00\x00\x00\x00\x00\x00\x00\x00\x01",
    b"\x8b\xff\xff\xff\x7f",  # a number of 2 GB
    b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",  # a text of 8 EB
    b"X\xff\xff\xff\xff",
    b"B\xff\xff\xff\xff",
    b"\x8e\x00\x00\x00\x00\x10\x00\x00\x00",
    b"\x96\x00\x00\x00\x00\x10\x00\x00\x00",
    b"\x95\xff\xff\xff\xff\xff\xff\xff\xff",
    b"G\x7f\xf8\x00\x00\x00\x00\x00\x00",
    b"G\x7f\xf0\x00\x00\x00\x00\x00\x00",
    b"]",
    b"}",
    b")",
    b"]q\xf0h\xf0a",  # a list that holds itself
    b"]" + b"q\xf0]h\xf0h\xf0h\xf0h\xf0h\xf0h\xf0h\xf0h\xf0h\xf0h\xf0".join([b""] * 1),
    b"(" * 3000,
    b"]" * 3000 + b"a" * 2999,
    b")" + b"\x85" * 3000,
    b"}" + b")" + b"\x85" * 3000 + b"Ns",  # a tuple in a tuple ... as key
    b"r\xff\xff\xff\xff",  # memo number 2**32
    b"j\xff\xff\xff\xff",
    b"P1\n",
    b"K\x01Q",
    b"\x82\x01",
    b"b",
    b"R",
    b"\x81",
    b"s",
    b"a",
    b"e",
    b"u",
    b"t",
    b"0",
    b"2",
    b".",
    b"\x80\x05",
]


def laughing_pickle(n: int) -> bytes:
    """A list of lists, each of ten times the list before: 10**n values in 25 n bytes."""
    lines = [b"](]q\x00"]
    for k in range(1, n):
        lines.append(b"](" + (b"h" + bytes([k - 1])) * 10 + b"eq" + bytes([k]))
    return b"".join(lines) + b"e"


def boundaries(data: bytes) -> list[int]:
    """Where the instructions of a pickle begin; some, where the text of Python 2 cannot be told from it."""
    starts: list[int] = []
    with suppress(ValueError):
        starts += [position for _, _, position in pickletools.genops(data) if position is not None]
    return starts


def damaged_pickle(data: bytes, starts: Sequence[int], others: Sequence[bytes], random: Random) -> bytes:
    """An instruction replaced, deleted, doubled or put before another one, else bytes."""
    for _ in range(random.choice((1, 1, 2))):
        at = random.randrange(1, len(starts) - 1)
        begin, end = starts[at], starts[at + 1]
        part = random.choice([*PICKLE_PARTS, laughing_pickle(3), laughing_pickle(60)])
        kind = random.randrange(8)
        if kind < 3:
            return data[:begin] + part + data[end:]
        if kind < 5:
            return data[:begin] + part + data[begin:]
        if kind == 5:
            return data[:begin] + data[end:]
        if kind == 6:
            return data[:end] + data[begin:]
        data = damaged_bytes(data, others, random)
        starts = [s for s in starts if s < len(data)]
        if len(starts) < 4:
            break
    return data


# ---- archives ------------------------------------------------------------------------------------------------------


def members_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archive_of(members: dict[str, bytes], packed: str = "") -> bytes:
    """A zip archive, of which one member is compressed."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            kind = zipfile.ZIP_DEFLATED if name == packed else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(name), content, kind)
    return file.getvalue()


def damaged_archive(members: dict[str, bytes], random: Random) -> bytes:
    """A member less, more, of another name, with other bytes, compressed, twice, or claimed larger."""
    members, packed = dict(members), ""
    name = random.choice(list(members))
    kind = random.randrange(8)
    if kind == 0:
        del members[name]
    elif kind == 1:
        members[random.choice(["../x", name.upper(), "", "archive/data/999", f"/{name}"])] = members.pop(name)
    elif kind == 2:
        members[random.choice([name.upper(), "other/data.pkl", "archive/code/x.py", "archive/.data/y"])] = members[name]
    elif kind == 3:
        members[name] = damaged_bytes(members[name], [b"", *members.values()], random)
    elif kind == 4:
        members[name], packed = bytes(10**6), name
    elif kind == 5:
        packed = name
    elif kind == 6:
        other = random.choice(list(members))
        members[name], members[other] = members[other], members[name]
    data = archive_of(members, packed)
    if kind == 7:  # the sizes in the directory at the end
        at = data.rfind(b"PK\x01\x02") + random.choice((20, 24))
        data = data[:at] + random.choice((b"\xff\xff\xff\x7f", b"\0\0\0\0")) + data[at + 4 :]
    return data
