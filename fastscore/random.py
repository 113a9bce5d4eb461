"""Counter-based noise: a pure function of (seed, stream, substream, step, element), the same on
every device and for every split.

Philox4x32-10 with key = (seed mod 2^32, seed >> 32) and
counter = (block_lo, block_hi, step, stream | substream << 16).
Element i of a tensor is entry i % 4 of block i // 4, where i = offset + its C-order index.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastscore import backend as _backend
from fastscore import direct
from fastscore.compiling import allow_in_graph
from fastscore.messages import shown
from fastscore.scalars import integer, plain_int, whole
from fastscore.tensors import check_device, check_tensor

__all__ = [
    "CORRECTOR", "DEQUANTIZE", "INIT", "LANGEVIN", "LEVEL", "PERTURB", "PROJECTION",
    "normal", "rademacher", "uniform", "words",
]

LANGEVIN, PERTURB, PROJECTION, INIT, LEVEL, DEQUANTIZE, CORRECTOR = 1, 2, 3, 4, 5, 6, 7

# 8 to 11 are kept for dropout, the order of data, dropped labels and augmentation.
DATA = 12

# What the raw op `fill` writes.
WORDS, UNIFORM, NORMAL, RADEMACHER = 0, 1, 2, 3

# No normal is larger: the radius of the least u, 2^-33, is 6.764.
LARGEST = 6.77

_M32 = 0xFFFFFFFF
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Seed = int | Tensor | None
Shape = int | Iterable[int]
Device = torch.device | str | int | None


class Key(NamedTuple):
    """A checked noise key, as the raw ops take it.

    `stream` holds the substream, too; `tensor`, int64 (seed, step), replaces the two numbers.
    """

    tensor: Tensor | None
    seed: int
    step: int
    stream: int
    offset: int

    def at(self, step: int, stream: int | None = None) -> "Key":
        """The key of another step, and stream, of the same run: nothing is checked again."""
        stream = self.stream if stream is None else stream
        if self.tensor is None:
            return Key(None, self.seed, step & _M32, stream, self.offset)

        own = torch.full((1,), step, dtype=torch.int64, device=self.tensor.device)
        return Key(torch.cat([self.tensor[:1], own]), 0, 0, stream, self.offset)


def words(
    n: int,
    *,
    seed: Seed,
    step: int | Tensor = 0,
    stream: int,
    substream: int = 0,
    offset: int = 0,
    device: Device = None,
    backend: str | None = None,
) -> Tensor:
    """Draw n Philox words.

    Args:
        n: how many, an int.
        seed: any int (taken mod 2^64), None (one draw from torch's default generator) or an int64
            tensor on the device.
        step, stream, substream, offset: the rest of the key; stream in 1..65535, yours from 1024
            on.

    Returns:
        int64 (n,), values in [0, 2^32).

    Raises:
        ValueError: n, stream, substream or offset out of range.
    """
    if backend is None and not is_compiling() and (door := direct.automatic) is not None:
        drawn = door.fill(WORDS, (n,), seed, step, stream, substream, offset, None, device)
        if drawn is not None:
            return drawn

    key = (seed, step, stream, substream, offset)
    return draw("words", WORDS, (n,), *key, torch.int64, device, backend)


def uniform(
    shape: Shape,
    *,
    seed: Seed,
    step: int | Tensor = 0,
    stream: int,
    substream: int = 0,
    offset: int = 0,
    dtype: torch.dtype | None = None,
    device: Device = None,
    backend: str | None = None,
) -> Tensor:
    """Draw uniforms in (0, 1], ((w >> 8) + 1/2) 2^-24 rounded to float32 (1 comes once in 2^24
    draws). Arguments as for `normal`."""
    key = (seed, step, stream, substream, offset)
    return draw("uniform", UNIFORM, shape, *key, dtype, device, backend)


def normal(
    shape: Shape,
    *,
    seed: Seed,
    step: int | Tensor = 0,
    stream: int,
    substream: int = 0,
    offset: int = 0,
    dtype: torch.dtype | None = None,
    device: Device = None,
    backend: str | None = None,
) -> Tensor:
    """Draw standard normals by Box-Muller on word pairs.

        u = (w_even + 1/2) 2^-32,  z_even = √(-2 ln u) cos(2π w_odd 2^-32),  z_odd the same with sin

    Args:
        shape: of the result.
        seed: any int (taken mod 2^64), None (one draw from torch's default generator) or an int64
            tensor on the device.
        step: any int (taken mod 2^32) or an int64 tensor.
        stream: 1..65535, yours from 1024 on.
        substream: 0..65535.
        offset: index of the first element; sample n of a batch of d-dimensional samples starts at
            n d.
        dtype: any float dtype (drawn in float32, cast once).
        device: of the result.

    Raises:
        ValueError: a key part out of range.
        TypeError: dtype is not a float dtype.

    >>> normal((2,), seed=0, stream=1024)
    tensor([-0.6864, -0.0049])
    """
    if backend is None and not is_compiling() and (door := direct.automatic) is not None:
        drawn = door.fill(NORMAL, shape, seed, step, stream, substream, offset, dtype, device)
        if drawn is not None:
            return drawn

    key = (seed, step, stream, substream, offset)
    return draw("normal", NORMAL, shape, *key, dtype, device, backend)


def rademacher(
    shape: Shape,
    *,
    seed: Seed,
    step: int | Tensor = 0,
    stream: int,
    substream: int = 0,
    offset: int = 0,
    dtype: torch.dtype | None = None,
    device: Device = None,
    backend: str | None = None,
) -> Tensor:
    """Draw signs: element i is bit i % 32 of word (i % 128) // 32 of block i // 128; 0 is +1 and 1
    is -1. Arguments as for `normal`."""
    key = (seed, step, stream, substream, offset)
    return draw("rademacher", RADEMACHER, shape, *key, dtype, device, backend)


def draw_seed() -> int:
    """One 63-bit seed from torch's default generator, so that torch.manual_seed decides."""
    if (door := direct.door) is not None and (seed := door.draw_seed()) is not None:
        return seed
    # Never from a GPU, which would be waited for.
    return int(torch.randint(0, 2**63 - 1, (), device="cpu").item())


def noise_key(
    op: str,
    seed: Seed,
    step: int | Tensor,
    stream: int,
    substream: int,
    offset: int,
    device: torch.device,
) -> Key:
    """A noise key, checked."""
    # Python's own numbers, as nearly every draw has them.
    plain = type(seed) is type(step) is type(stream) is type(substream) is type(offset) is int
    if (
        plain
        and 1 <= stream <= 65535
        and 0 <= substream <= 65535
        and 0 <= offset < 2**63
        and not is_compiling()
    ):
        return Key(None, _signed(seed), step & _M32, stream | substream << 16, offset)

    stream = integer(op, "stream", stream, 1, 65535)
    substream = integer(op, "substream", substream, 0, 65535)
    offset = integer(op, "offset", offset, 0, limit=2**63 - 1)
    if seed is None:
        compiled = is_compiling()
        seed = torch.randint(0, 2**63 - 1, (), device=device) if compiled else draw_seed()
    seed = _key_part(op, "seed", seed, device)
    step = _key_part(op, "step", step, device)

    word = stream | substream << 16
    if not (isinstance(seed, Tensor) or isinstance(step, Tensor) or is_compiling()):
        return Key(None, _signed(seed), step & _M32, word, offset)

    # In a compiled graph a number would be a constant, and every new step a recompilation.
    made = {"dtype": torch.int64, "device": device}
    parts = [
        part.reshape(1) if isinstance(part, Tensor) else torch.full((1,), _signed(part), **made)
        for part in (seed, step)
    ]
    return Key(torch.cat(parts), 0, 0, word, offset)


def _key_part(op, name, value, device):
    if not isinstance(value, Tensor):
        if not whole(value):
            found = type(value).__name__
            raise TypeError(f"{op}: {name} must be an int or an int64 tensor; got {found}.")
        return plain_int(value)

    check_tensor(op, name, value)
    if value.dtype != torch.int64 or value.numel() != 1 or value.device != device:
        found = f"{value.dtype} {tuple(value.shape)} on {value.device}"
        raise ValueError(f"{op}: a {name} tensor must hold one int64 on {device}; got {found}.")
    return value


def _signed(value):
    """Mod 2^64, as the int64 that carries the same bits."""
    if isinstance(value, torch.SymInt) or -(2**63) <= value < 2**63:
        return value
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def draw(
    op: str,
    kind: int,
    shape: Shape,
    seed: Seed,
    step: int | Tensor = 0,
    stream: int = 0,
    substream: int = 0,
    offset: int = 0,
    dtype: torch.dtype | None = None,
    device: Device = None,
    backend: str | None = None,
) -> Tensor:
    """What `normal` and its kin return, drawn in the name of an op: errors speak of that one."""
    if backend is None and not is_compiling() and (door := direct.automatic) is not None:
        drawn = door.fill(kind, shape, seed, step, stream, substream, offset, dtype, device)
        if drawn is not None:
            return drawn

    shape = sizes(op, shape)
    dtype = torch.int64 if kind == WORDS else check_dtype(op, dtype)
    device = check_device(op, device)
    key = noise_key(op, seed, step, stream, substream, offset, device)
    return filled(kind, shape, key, dtype, device, _backend.choose(device, backend))


def check_seed(op: str, seed: Seed, device: torch.device) -> Seed:
    """A seed as keys of noise take it: refused before anything is computed."""
    noise_key(op, 0 if seed is None else seed, 0, LANGEVIN, 0, 0, device)
    return seed


def check_dtype(op: str, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that noise is drawn in, the default one for None."""
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or dtype not in _FLOATS:
        known = "float32, float64, bfloat16 or float16"
        raise TypeError(f"{op}: dtype must be {known}; got {shown(dtype)}.")
    return dtype


def sizes(op: str, shape: Shape) -> tuple[int, ...]:
    """The shape as a tuple of ints, checked; what is no sequence counts as the one size."""
    single = isinstance(shape, str | bytes | dict) or not isinstance(shape, Iterable)
    single = single or getattr(shape, "ndim", 1) == 0
    shape = (shape,) if single else tuple(shape)
    if any(not whole(n) or n < 0 for n in shape):
        raise ValueError(f"{op}: shape must be non-negative ints; got {shown(shape)}.")

    shape = tuple(map(plain_int, shape))
    if math.prod(shape) > 2**40:
        found = shown(shape)
        raise ValueError(f"{op}: at most 2^40 numbers can be drawn at once; got shape {found}.")
    return shape


def filled(
    kind: int,
    shape: tuple[int, ...],
    key: Key,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
) -> Tensor:
    """Noise under a checked key, where the back end is chosen."""
    door = direct.door if backend == "cpp" else direct.served.get(backend)
    if door is not None and not is_compiling() and key[0] is None:
        _, seed, step, word, offset = key
        stream, substream = word & 0xFFFF, word >> 16
        drawn = door.fill(kind, shape, seed, step, stream, substream, offset, dtype, device)
        if drawn is not None:
            return drawn

    if backend == "reference":
        return fill_ref(kind, shape, key, dtype, device)
    return _fill_op(backend, kind, shape, *key, dtype, device)


@allow_in_graph
def _fill_op(chosen, kind, shape, key, seed, step, stream, offset, dtype, device):
    out = torch.empty(shape, dtype=dtype, device=device)
    _backend.call(chosen, "fill", out, kind, key, seed, step, stream, offset)
    return out


def normal_like(
    x: Tensor, key: Key, backend: str | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """z for the elements of x under a checked key: contiguous, in x's dtype."""
    chosen = _backend.choose(x.device, backend)
    return filled(NORMAL, tuple(x.shape), key, dtype or x.dtype, x.device, chosen)


def philox_ref(block: Tensor, step: int, stream: int, k0: int, k1: int) -> Tensor:
    """Philox4x32-10 in plain PyTorch: block int64 (n,) -> words int64 (n, 4). The truth for every
    kernel."""
    c0, c1 = block & _M32, (block >> 32) & _M32
    c2, c3 = torch.zeros_like(c0) + step, torch.zeros_like(c0) + stream
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # int64 wraps, and the bits stay right
        high0, high1 = (p0 >> 32) & _M32, (p1 >> 32) & _M32
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & _M32, high0 ^ c3 ^ k1, p0 & _M32
        k0, k1 = (k0 + 0x9E3779B9) & _M32, (k1 + 0xBB67AE85) & _M32
    return torch.stack([c0, c1, c2, c3], -1)


def _words_ref(first, n, key, device):
    """Words of elements first .. first + n - 1, from whole blocks: int64, and their position in the
    first block."""
    tensor, seed, step, stream, _ = key
    if tensor is not None:
        seed, step = tensor[0], tensor[1] & _M32
    lead = first % 4
    blocks = first // 4 + torch.arange((lead + n + 3) // 4, device=device)
    return philox_ref(blocks, step, stream, seed & _M32, (seed >> 32) & _M32), lead


def fill_ref(
    kind: int,
    shape: tuple[int, ...],
    key: Key,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The noise contract in plain PyTorch, in float64 until the last cast."""
    n, first = math.prod(shape), key[-1]
    if kind == RADEMACHER:
        w, lead = _words_ref(first // 32, (first % 32 + n + 31) // 32, key, device)
        bits = (w.flatten()[lead:, None] >> torch.arange(32, device=device)) & 1
        return (1 - 2 * bits.flatten()[first % 32 :][:n]).to(dtype).reshape(shape)

    w, lead = _words_ref(first, n, key, device)
    if kind == NORMAL:
        u = (w[:, 0::2].double() + 0.5) * 2**-32
        angle = w[:, 1::2].double() * (2 * math.pi * 2**-32)
        w = torch.stack([angle.cos(), angle.sin()], -1) * (-2 * u.log()).sqrt()[..., None]
    w = w.flatten()[lead:][:n].reshape(shape)
    if kind == UNIFORM:
        w = ((w >> 8).double() + 0.5) * 2**-24
    return w if kind == WORDS else w.float().to(dtype)
