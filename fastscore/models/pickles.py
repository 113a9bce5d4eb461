"""What a checkpoint's pickle would build, found without building it.

torch.load(weights_only=True) runs no foreign code, but believes what it is told: sizes that are
not there, numbers that are no tensors' and keys whose hash takes for ever. Here a pickle is run
through with stand-ins for everything; what passes is a file of tensors that are in it.
"""

import math
import pickletools
from collections.abc import Callable
from typing import IO, Any

_STEPS = 600_000   # of a pickle; the deepest published network with its optimizer takes 150,000
_DIMENSIONS = 16

# Bytes of an element, by the storage.
_SIZES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2,
    "LongStorage": 8, "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1,
    "BoolStorage": 1,
}   # fmt: skip

_DTYPES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
)   # fmt: skip

_REBUILD = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
_PARAMETER = "torch._utils._rebuild_parameter"
_DICTIONARY = "collections.OrderedDict"
# Of the state of learning rate schedules; called with a dictionary or a list of plain values.
_COLLECTIONS = ("collections.Counter", "builtins.set", "__builtin__.set")
# Called with plain values.
_PLAIN = ("torch.Size", "torch.device", "_codecs.encode")
# Instead of numpy's numbers, which torch.load is given stand-ins for.
NUMPY = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype")


class Refused(Exception):
    """A pickle that is no checkpoint's, and why."""


class Storage:
    """Bytes that a pickle says to be elsewhere in its file."""

    bytes: int

    def __init__(self, key: str, width: int, count: int) -> None:
        self.key = key
        self.width = width
        self.bytes = width * count


class _Global:
    def __init__(self, name):
        self.name = name


class _Built:
    """What a call returns; `keys` of a dictionary."""

    def __init__(self, of):
        self.of = of
        self.keys = []


class _Mark:
    pass


def scan(file: IO[bytes], stored: Callable[[Storage], None]) -> Any:
    """Run through the pickle at the file's position; afterwards it is behind it.

    stored: called with each storage that is named.

    Returns:
        What is pickled: plain values, tuples and lists as they are, and stand-ins.

    Raises:
        Refused: it is not what torch.save writes of tensors and plain values.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    storages: dict[str, Storage] = {}
    try:
        for step, (opcode, value, _) in enumerate(pickletools.genops(file)):
            if step == _STEPS:
                raise Refused(f"its pickle takes more than {_STEPS} steps")
            _take(opcode.name, value, stack, memo, storages, stored)
        (found,) = stack
        return found
    except (ValueError, IndexError, KeyError, UnicodeError, OverflowError) as error:
        # Of genops and of a stack that is too short.
        raise Refused("its pickle is cut off or damaged") from error


def _take(name, value, stack, memo, storages, stored):
    if name in _VALUES:
        stack.append(_VALUES[name](value))
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[value])
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[value] = stack[-1]
    elif name == "GLOBAL":
        stack.append(_named(value.replace(" ", ".", 1)))
    elif name in _TUPLES:
        count = _TUPLES[name]
        items = tuple(stack[len(stack) - count :])
        if len(items) != count or _Mark in map(type, items):
            raise Refused("its pickle is damaged")
        del stack[len(stack) - count :]
        stack.append(items)
    elif name == "TUPLE":
        stack.append(tuple(_since_mark(stack)))
    elif name == "APPEND":
        item = stack.pop()
        _list(stack[-1]).append(item)
    elif name == "APPENDS":
        items = _since_mark(stack)
        _list(stack[-1]).extend(items)
    elif name == "SETITEM":
        item, key = stack.pop(), stack.pop()
        _set(stack[-1], [key, item])
    elif name == "SETITEMS":
        items = _since_mark(stack)
        _set(stack[-1], items)
    elif name == "REDUCE":
        arguments, function = stack.pop(), stack.pop()
        stack.append(_called(function, arguments))
    elif name == "BUILD":
        state = stack.pop()
        _check_state(stack[-1], state)
    elif name == "BINPERSID":
        stack.append(_storage(stack.pop(), storages, stored))
    elif name != "STOP" and (name, value) != ("PROTO", 2):
        raise Refused(f"its pickle has {name}, which torch.save does not write")


_VALUES = {
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"),
        lambda value: value,
    ),
    "NONE": lambda value: None,
    "NEWTRUE": lambda value: True,
    "NEWFALSE": lambda value: False,
    "EMPTY_TUPLE": lambda value: (),
    "EMPTY_LIST": lambda value: [],
    "EMPTY_DICT": lambda value: _Built("dict"),
    "MARK": lambda value: _Mark(),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _since_mark(stack):
    items = []
    while type(item := stack.pop()) is not _Mark:
        items.append(item)
    return items[::-1]


def _list(value):
    if type(value) is not list:
        raise Refused("its pickle appends to what is no list")
    return value


def _set(target, items):
    if type(target) is not _Built or target.of not in ("dict", _DICTIONARY) or len(items) % 2:
        raise Refused("its pickle sets items of what is no dictionary")
    for key in items[::2]:
        # The hash of a tuple of tuples of tuples may take for ever.
        if not _is_plain(key):
            raise Refused("it has a dictionary whose keys are neither names nor numbers")
        target.keys.append(key)


def _is_plain(value):
    return value is None or type(value) in (str, bytes, int, float, bool)


def _named(name):
    module, _, last = name.rpartition(".")
    known = (*_REBUILD, _PARAMETER, _DICTIONARY, *_COLLECTIONS, *_PLAIN, *NUMPY)
    if name in known or (module == "torch" and last in (*_SIZES, *_DTYPES)):
        return _Global(name)
    raise Refused(f"it names {name[:80]}, of which no tensor is made")


def _called(function, arguments):
    name = function.name if type(function) is _Global else None
    if type(arguments) is not tuple or name is None:
        raise Refused("its pickle calls what is no function")

    if name in _REBUILD and len(arguments) >= 4:
        _check_tensor(*arguments[:4])
        return _Built("tensor")
    if name == _PARAMETER and arguments and _is_built(arguments[0], "tensor"):
        return _Built("tensor")
    if name == _DICTIONARY and not arguments:
        return _Built(_DICTIONARY)
    if name in _COLLECTIONS and len(arguments) == 1:
        (items,) = arguments
        if _is_built(items, "dict") or (type(items) is list and all(map(_is_plain, items))):
            return _Built(name)
    if name in _PLAIN and all(map(_is_plain, _flat(arguments))):
        return _Built(name)
    if name in NUMPY:
        return _Built("number")
    raise Refused(f"its pickle calls {name} with what is no argument of it")


def _is_built(value, of):
    return type(value) is _Built and value.of == of


def _flat(arguments):
    """The values of a tuple, of which the first may be a tuple itself, as that of torch.Size."""
    first = arguments[0] if arguments else ()
    return (*first, *arguments[1:]) if type(first) is tuple else arguments


def _check_state(target, state):
    """An ordered dictionary may have _metadata beside its items, a number what it likes."""
    if _is_built(target, "number"):
        return
    if _is_built(target, _DICTIONARY) and _is_built(state, "dict") and (
        set(state.keys) <= {"_metadata"}
    ):
        return
    raise Refused("its pickle gives attributes to what has none")


def _storage(found, storages, stored):
    if type(found) is not tuple or len(found) not in (5, 6) or found[0] != "storage":
        raise Refused("its pickle names something outside that is no storage")
    _, kind, key, _, count, *views = found
    width = _SIZES.get(kind.name.rpartition(".")[2]) if type(kind) is _Global else None
    if width is None or type(key) is not str or type(count) is not int or count < 0:
        raise Refused("its pickle names a storage without a type, a name or a length")
    if any(view is not None for view in views):
        raise Refused("its storages are views of others")

    storage = Storage(key, width, count)
    first = storages.setdefault(key, storage)
    if (first.width, first.bytes) != (storage.width, storage.bytes):
        raise Refused(f"it declares the storage {key[:40]} twice, with different lengths")
    if first is storage:
        stored(storage)
    return storage


def _check_tensor(storage, offset, shape, strides):
    shape, strides = (
        tuple(numbers) if type(numbers) is tuple else None for numbers in (shape, strides)
    )
    if type(storage) is not Storage or shape is None or strides is None:
        raise Refused("its pickle makes a tensor of what is no storage")
    if len(shape) != len(strides) or len(shape) > _DIMENSIONS or not all(
        type(n) is int and 0 <= n < 2**63 for n in (offset, *shape, *strides)
    ):
        raise Refused("it has a tensor whose shape is none")

    count = math.prod(shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides)) if count else 0
    if count and max(count, last + 1) * storage.width > storage.bytes:
        raise Refused(
            f"it declares a tensor of {'×'.join(map(str, shape)) or '1'} elements in a storage of "
            f"{storage.bytes} bytes"
        )
