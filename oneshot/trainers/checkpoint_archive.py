"""Whether a checkpoint file may be loaded at all: what its archive and its pickle claim, read as data.

torch writes an uncompressed zip archive: one pickle, ``data.pkl``, and one member per storage, ``data/<key>``. Its own
reader runs no code of the file (``weights_only=True``), but it believes sizes: a header of 10**12 elements is
allocated, and a tuple in a tuple in a tuple ... as key of a dict overflows the stack of the process. So everything is
looked at before that, and no memory is taken for what is merely claimed.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..cost.nn_meter.restricted_pickle import Name, Ordered, Record, read_pickle
from ..errors import CheckpointError, UnsafePickleError

__all__ = ["check_archive"]

_DEEPEST = 50  # containers in containers; a model inside of a search inside of a state has 6
_MOST_DIMENSIONS = 64
# What zipfile raises for damaged archives: OSError and ValueError for an offset before the file's start, RuntimeError
# for an unknown method, struct.error for a short header.
_ZIP_ERRORS = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, OSError, ValueError),
    *(RuntimeError, EOFError, struct.error, OverflowError),
)
_STORAGE_BYTES = {
    **dict.fromkeys(("ByteStorage", "CharStorage", "BoolStorage", "UntypedStorage"), 1),
    **dict.fromkeys(("ShortStorage", "HalfStorage", "BFloat16Storage"), 2),
    **dict.fromkeys(("IntStorage", "FloatStorage"), 4),
    **dict.fromkeys(("LongStorage", "DoubleStorage", "ComplexFloatStorage"), 8),
    "ComplexDoubleStorage": 16,
}
_STORAGES = {("torch", name): f"storage {size}" for name, size in _STORAGE_BYTES.items()} | {
    ("torch.storage", "UntypedStorage"): "storage 1"
}
_DTYPES = {
    ("torch", name): f"dtype {dtype.itemsize}" for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)
}
_REBUILD = {
    ("torch._utils", "_rebuild_tensor_v2"): "tensor",
    ("torch._utils", "_rebuild_tensor_v3"): "tensor with dtype",
}
_PLAIN = {
    ("collections", "OrderedDict"): "ordered",
    ("collections", "Counter"): "counter",
    ("torch", "Size"): "size",
    ("torch", "device"): "device",
}


class _Storage(NamedTuple):
    """A reference of the pickle to a member of the archive."""

    n_bytes: int
    itemsize: int


def check_archive(path: Path) -> None:
    """CheckpointError unless the file is a whole archive of torch that claims no more than it holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = _sizes(archive, path.stat().st_size)
            broken = archive.testzip()
            if broken is not None:
                raise _Refused(f"damaged at {broken!r}")
            (pickled,) = (name for name in sizes if name.endswith("/data.pkl"))
            _check_pickle(archive.read(pickled), pickled.removesuffix("data.pkl"), sizes)
    except _Refused as error:
        raise CheckpointError(f"{path}: {error}") from None
    except UnsafePickleError as error:
        raise CheckpointError(f"{path}: not a checkpoint ({error})") from error
    except _ZIP_ERRORS as error:
        raise CheckpointError(f"{path}: truncated, or not a checkpoint ({error})") from error


class _Refused(Exception):
    """What is wrong with the file."""


def _sizes(archive: zipfile.ZipFile, file_size: int) -> dict[str, int]:
    """Member -> bytes. They lie under one name, each once, not compressed, and together fit into the file."""
    members = archive.infolist()
    names = [info.filename for info in members]
    packed = next((i.filename for i in members if i.compress_type != zipfile.ZIP_STORED or i.flag_bits & 1), None)
    if packed is not None:
        raise _Refused(f"damaged at {packed!r}: compressed or encrypted, which torch does not write")
    if len({name.lower() for name in names}) != len(names):  # readers differ in which of two they take
        raise _Refused("damaged: two members of the archive have one name")
    if len({name.split("/")[0] for name in names}) != 1 or sum(name.endswith("/data.pkl") for name in names) != 1:
        raise _Refused("not a checkpoint: the archive is not one of torch")
    if sum(max(info.file_size, info.compress_size) for info in members) > file_size:
        raise _Refused(f"damaged: the members of the archive claim more than the {file_size:,} bytes of the file")
    return {info.filename: info.file_size for info in members}


def _check_pickle(data: bytes, prefix: str, sizes: Mapping[str, int]) -> None:
    if data[:2] != b"\x80\x02":
        raise _Refused("not a checkpoint: torch.save writes protocol 2")

    safe = {(f"{one.__module__}", one.__qualname__): "the user's" for one in _allowed_by_user()}
    names = {**safe, **_STORAGES, **_DTYPES, **_REBUILD, **_PLAIN}
    stored = partial(_storage, prefix=prefix, sizes=sizes)
    file, keys = io.BytesIO(data), (str, int)
    found = read_pickle(file, len(data), names, stored=stored, keys=keys, blobs=False, protocols=(2,))
    most = sum(sizes.values())
    for value in _walk(found, most=len(data)):
        if type(value) is Record and value.kind.startswith("tensor"):
            _check_tensor(value, most)
        elif type(value) is Record and value.kind != "the user's":
            _check_call(value)
        elif type(value) is int and value.bit_length() > 64:
            raise UnsafePickleError(f"an integer of {value.bit_length()} bits; none has more than 64")
        elif type(value) is Ordered and not (value.state is None or list(value.state) == ["_metadata"]):
            raise UnsafePickleError("an OrderedDict with other attributes than _metadata")


def _storage(reference: Any, prefix: str, sizes: Mapping[str, int]) -> _Storage:
    """``('storage', kind, key, device, elements)``, if the archive has a member of just that many bytes."""
    kinds = (str, Name, str, str, int)
    if type(reference) is not tuple or tuple(map(type, reference)) != kinds or reference[0] != "storage":
        raise UnsafePickleError("a reference to something other than a storage: damaged")
    _, name, key, place, n = reference
    if not name.kind.startswith("storage ") or not re.fullmatch(r"\d{1,9}", key, re.ASCII):
        raise UnsafePickleError("a storage of another kind, or without a number: damaged")
    if not re.fullmatch(r"[a-z]{1,20}(:\d{1,3})?", place, re.ASCII) or place == "meta":
        raise UnsafePickleError("a storage of a device that does not exist: damaged")
    claimed, there = n * int(name.kind.split()[1]), sizes.get(f"{prefix}data/{key}")
    if claimed != there:
        raise UnsafePickleError(f"storage {key} claims {_shown(claimed)} bytes, the archive has {there}: damaged")
    return _Storage(claimed, int(name.kind.split()[1]))


def _allowed_by_user() -> list[Any]:
    return [one for one in torch.serialization.get_safe_globals() if not isinstance(one, tuple)]


def _walk(found: Any, most: int) -> Iterator[Any]:
    """Every value, as often as it stands somewhere: a list of one list ten times, nested, is endless.

    ``most``: the bytes of the pickle, of which every value takes about three where nothing stands twice.
    """
    left, open_ones = most + 10_000, [(found, 0)]
    while open_ones:
        value, depth = open_ones.pop()
        left -= 1
        if depth > _DEEPEST or left < 0:
            raise UnsafePickleError(f"lists in lists, deeper than {_DEEPEST} or without an end")
        yield value
        inner: list[Any] = []
        if isinstance(value, dict):
            inner = [*value, *value.values(), *([value.state] if type(value) is Ordered else [])]
        elif type(value) in (list, tuple):
            inner = list(value)
        elif type(value) is Record:
            inner = [*value.args, value.state]
        open_ones += [(one, depth + 1) for one in inner]


def _check_tensor(tensor: Record, most: int) -> None:
    """``_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks[, metadata])``; v3 has a dtype too."""
    n_args, args = (8 if tensor.kind != "tensor" else 7), tensor.args
    if tensor.state is not None or len(args) not in (n_args - 1, n_args) or type(args[0]) is not _Storage:
        raise UnsafePickleError("a tensor that is none: damaged")
    storage, offset, size, stride, requires_grad, hooks = args[:6]
    itemsize = _itemsize(tensor)
    shape_ok = type(size) is tuple and type(stride) is tuple and len(size) == len(stride) <= _MOST_DIMENSIONS
    if not shape_ok or any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise UnsafePickleError("a tensor without a shape: damaged")
    if requires_grad is not False or not isinstance(hooks, dict) or hooks or not _is_metadata(args[n_args - 1 :]):
        raise UnsafePickleError("a tensor with a gradient or hooks, which no checkpoint has")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if 0 not in size else 0
    if last * itemsize > storage.n_bytes or math.prod(size) * itemsize > most:
        raise UnsafePickleError(
            f"a tensor of {_shown(math.prod(size))} elements where the file has {storage.n_bytes:,} bytes: damaged"
        )


def _itemsize(tensor: Record) -> int:
    """Bytes of an element: a storage of bytes has it from the dtype, else from the storage, whose claim was checked."""
    if tensor.kind == "tensor":
        return tensor.args[0].itemsize
    dtype = tensor.args[6] if len(tensor.args) > 6 else None
    if type(dtype) is not Name or not dtype.kind.startswith("dtype "):
        raise UnsafePickleError("a tensor without a dtype: damaged")
    return int(dtype.kind.split()[1])


def _is_metadata(rest: tuple[Any, ...]) -> bool:
    """What torch keeps of a conjugate or negative view."""
    return all(
        type(one) is dict and set(one) <= {"conj", "neg"} and all(v is True for v in one.values()) for one in rest
    )


def _check_call(record: Record) -> None:
    kinds = {"counter": (dict,), "size": (tuple,), "device": (str,)}.get(record.kind)
    got = tuple(map(type, record.args))
    if record.state is not None or (got != kinds and not (record.kind == "device" and got == (str, int))):
        raise UnsafePickleError(f"a call of {record.kind} with other arguments than it takes: damaged")


def _shown(n: int) -> str:
    return f"{n:,}" if n < 2**63 else "2**63 or more"
