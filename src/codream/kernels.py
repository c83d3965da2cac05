"""Kernels for a GPU, in Pallas, where XLA would pass the same numbers through memory several times.

They take one example, of which `vmap` makes a program each; `reread` a sequence and `normed_gradient` rows. What they
are measured against is in docs/performance.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

__all__ = ["activated", "draw", "fits", "flat", "normed", "normed_gradient", "recall", "reread", "suits"]

NUMBERS = 512
"""That a warp of threads works on at once: 16 in each thread."""


def suits(*sizes: int) -> bool:
    """Whether there is a GPU that the kernels are for, and all sizes are powers of two, as they need."""
    powers = all(size > 0 and size & (size - 1) == 0 for size in sizes)
    return powers and jax.default_backend() == "gpu" and _ampere(jax.devices()[0]) and _settings() is not None


@cache
def _settings() -> Callable[..., Any] | None:
    """How Triton compiles; None where this JAX does not say it so (before 0.7, and once it has left Triton): then XLA's
    own kernels are used."""
    try:  # here, as it is slow to import and not needed on a CPU
        from jax.experimental.pallas.triton import CompilerParams
    except ImportError:
        return None
    return CompilerParams


def _ampere(device: Any) -> bool:
    """Whether it is NVIDIA's and of 2020 or later: Triton makes programs for no older one."""
    capability = str(getattr(device, "compute_capability", ""))
    return capability.replace(".", "").isdigit() and float(capability) >= 8


def recall(
    qkv: Float[Array, "3 heads head"],
    bias: Float[Array, "3 heads head"],
    position: Int[Array, ""],
    rates: Float[Array, " half"],
    keys: Float[Array, "heads time head"],
    values: Float[Array, "heads time head"],
    valid: Bool[Array, " time"],
    interpret: bool = False,
) -> Remembered:
    """`codream.attention.recall` of the token at `position`, whose angles are position · rates. The memory is written
    in place; what is not valid is not read."""
    time = keys.shape[1]

    def kernel(*refs: Any) -> None:
        qkv_ref, bias_ref, position_ref, rates_ref, keys_ref, values_ref, valid_ref, out_ref, *new_refs = refs
        position = position_ref[0]
        slot, angles = position % time, position.astype(jnp.float32) * rates_ref[...]
        turn = jnp.cos(angles)[None], jnp.sin(angles)[None]
        query, key, value = _token(qkv_ref, bias_ref, turn, keys.dtype)
        _write(new_refs[0], key, _ALL, slot)
        _write(new_refs[1], value, _ALL, slot)
        new_refs[2][slot] = True

        def remembered(t: int) -> tuple[Halves, Halves]:
            return _halves(keys_ref, _ALL, t), _halves(values_ref, _ALL, t)

        seen = _attended(query, key, value, time, lambda t: valid_ref[t] & (slot != t), remembered)
        _write(out_ref, seen, _ALL)

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (qkv[0].astype(values.dtype), keys, values, valid)]
    given = qkv, bias, position[None], rates, keys, values, valid
    return _called("recall", kernel, shapes, qkv[0].size, interpret, *given, aliases={4: 1, 5: 2, 6: 3})


def reread(
    qkv: Float[Array, "time 3 heads head"],
    bias: Float[Array, "3 heads head"],
    turns: Float[Array, "time two half"],
    allowed: Bool[Array, "time time"],
    room: int,
    interpret: bool = False,
) -> tuple[Float[Array, "time heads head"], Float[Array, "heads all head"], Float[Array, "heads all head"]]:
    """`codream.attention.reread`. The memory's room for more is left as it was found: it is not valid."""
    from jax.experimental import pallas

    time, _, heads, size = qkv.shape

    def kernel(qkv_ref: Any, bias_ref: Any, turns_ref: Any, allowed_ref: Any, out_ref: Any, *memory_refs: Any) -> None:
        now = pallas.program_id(0)
        turn = lambda t: (turns_ref[t, 0], turns_ref[t, 1])  # noqa: E731
        query, key, value = _token(qkv_ref, bias_ref, turn(now), qkv.dtype, now)
        _write(memory_refs[0], key, _ALL, now)
        _write(memory_refs[1], value, _ALL, now)

        def other(t: int) -> tuple[Halves, Halves]:
            return _token(qkv_ref, bias_ref, turn(t), qkv.dtype, t)[1:]

        seen = _attended(query, key, value, time, lambda t: allowed_ref[now, t] & (now != t), other)
        _write(out_ref, seen, now, _ALL)

    memory = jax.ShapeDtypeStruct((heads, time + room, size), qkv.dtype)
    shapes = [jax.ShapeDtypeStruct((time, heads, size), qkv.dtype), memory, memory]
    # For every head, as in the kernel threads would have to wait for each other to share them.
    turns = jnp.broadcast_to(turns[:, :, None], (time, 2, heads, size // 2))
    return _called("reread", kernel, shapes, heads * size, interpret, qkv, bias, turns, allowed, grid=(time,))


Remembered = tuple[
    Float[Array, "heads head"], Float[Array, "heads time head"], Float[Array, "heads time head"], Bool[Array, " time"]
]
Halves = tuple[Float[Array, "heads half"], Float[Array, "heads half"]]


def _attended(
    query: Halves,
    key: Halves,
    value: Halves,
    time: int,
    allowed: Callable[[int], Bool[Array, ""]],
    token: Callable[[int], tuple[Halves, Halves]],
) -> Halves:
    """Attention of a token to itself and to those of `time` that are allowed; the others' keys and values are not read.

    The softmax as it goes (Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3).
    """
    scale = 1 / math.sqrt(2 * value[0].shape[1])
    a, b = (x.astype(jnp.float32) * scale for x in query)

    def score(key: Halves) -> Float[Array, " heads"]:
        return jnp.sum(a * key[0].astype(jnp.float32) + b * key[1].astype(jnp.float32), axis=-1)

    def also(t: int, seen: tuple[Array, ...]) -> tuple[Array, ...]:
        top, total, *values = seen
        key, value = token(t)
        new = score(key)
        higher = jnp.maximum(top, new)
        kept, weight = jnp.exp(top - higher), jnp.exp(new - higher)
        more = (x * kept[:, None] + weight[:, None] * y.astype(jnp.float32) for x, y in zip(values, value, strict=True))
        return higher, total * kept + weight, *more

    first = score(key)
    seen = first, jnp.ones_like(first), *(x.astype(jnp.float32) for x in value)
    for t in range(time):
        seen = jax.lax.cond(allowed(t), partial(also, t), lambda seen: seen, seen)
    _, total, left, right = seen
    return left / total[:, None], right / total[:, None]


def _token(
    qkv_ref: Any, bias_ref: Any, turn: tuple[Array, Array], dtype: Any, *place: Any
) -> tuple[Halves, Halves, Halves]:
    """Rotated query, rotated key and value of the token at `place`."""
    cos, sin = turn

    def biased(part: int) -> Halves:
        (a, b), (c, d) = _halves(qkv_ref, *place, part, _ALL), _halves(bias_ref, part, _ALL)
        return a.astype(jnp.float32) + c, b.astype(jnp.float32) + d

    def rotated(part: int) -> Halves:
        a, b = biased(part)
        return (a * cos - b * sin).astype(dtype), (b * cos + a * sin).astype(dtype)

    a, b = biased(2)
    return rotated(0), rotated(1), (a.astype(dtype), b.astype(dtype))


_ALL = slice(None)


def _halves(ref: Any, *place: Any) -> Halves:
    """Both halves of what the last axis holds at `place`: a rotation needs them, and what goes with its result."""
    half = ref.shape[-1] // 2
    return ref[*place, :half], ref[*place, half:]


def _write(ref: Any, x: Halves, *place: Any) -> None:
    half = x[0].shape[1]
    ref[*place, :half], ref[*place, half:] = x[0].astype(ref.dtype), x[1].astype(ref.dtype)


def draw(
    product: Float[Array, "groups classes"],
    bias: Float[Array, "groups classes"],
    u: Float[Array, " groups"],
    share: float,
    dtype: Any,
    interpret: bool = False,
) -> Integer[Array, " groups"]:
    """A class of each categorical, whose logits are product + bias, by its number u from [0, 1), as `dtype`: see
    `codream.latents.sample_index`."""

    def kernel(product_ref: Any, bias_ref: Any, u_ref: Any, out_ref: Any) -> None:
        logits = product_ref[...].astype(jnp.float32) + bias_ref[...]
        weights = jnp.exp(logits - jnp.max(logits, axis=-1)[:, None])
        if share:
            weights = (1 - share) * weights + share / logits.shape[1] * jnp.sum(weights, axis=-1)[:, None]
        total = jnp.cumsum(weights, axis=-1)
        end = jnp.max(total, axis=-1)[:, None]
        passed = (total <= u_ref[...][:, None] * end) & (total < end)
        out_ref[...] = jnp.sum(passed.astype(jnp.int32), axis=-1).astype(dtype)

    return _called("draw", kernel, jax.ShapeDtypeStruct(u.shape, dtype), product.size, interpret, product, bias, u)


def normed(
    product: Float[Array, " size"],
    bias: Float[Array, " size"],
    scale: Float[Array, " size"],
    x: Float[Array, " size"] | None,
    eps: float,
    silu: bool,
    interpret: bool = False,
) -> tuple[Float[Array, " size"], Float[Array, " size"]]:
    """What a layer's output, added to x or without one, is after an RMS norm (Zhang and Sennrich 2019,
    arXiv:1910.07467), in the precision of `product`, and before. With `silu` the first goes through SiLU as well, and
    the second is the first."""

    def kernel(product_ref: Any, bias_ref: Any, scale_ref: Any, *refs: Any) -> None:
        total = product_ref[...].astype(jnp.float32) + bias_ref[...]
        if x is not None:
            total += refs[0][...]
        y = total * jax.lax.rsqrt(jnp.sum(total * total) / len(product) + eps) * scale_ref[...]
        y_ref, *total_refs = refs[0 if x is None else 1 :]
        y_ref[...] = (y / (1 + jnp.exp(-y)) if silu else y).astype(y_ref.dtype)
        for ref in total_refs:
            ref[...] = total

    given = [product, bias, scale] + ([] if x is None else [x])
    shapes = [jax.ShapeDtypeStruct(product.shape, product.dtype)] + ([] if silu else [bias])
    out = _called("normed", kernel, shapes, len(product), interpret, *given)
    return out[0], out[-1]


def activated(
    products: Float[Array, "layers size"],
    biases: Sequence[Float[Array, " size"]],
    scales: Sequence[Float[Array, " size"]],
    eps: float,
    interpret: bool = False,
) -> list[Float[Array, " size"]]:
    """What `normed` makes with SiLU of the outputs of several layers."""
    layers, size = products.shape

    def kernel(products_ref: Any, *refs: Any) -> None:
        bias_refs, scale_refs, out_refs = refs[:layers], refs[layers : 2 * layers], refs[2 * layers :]
        for i, (bias, scale, out) in enumerate(zip(bias_refs, scale_refs, out_refs, strict=True)):
            x = products_ref[i].astype(jnp.float32) + bias[...]
            y = x * jax.lax.rsqrt(jnp.sum(x * x) / size + eps) * scale[...]
            out[...] = (y / (1 + jnp.exp(-y))).astype(out.dtype)

    shapes = [jax.ShapeDtypeStruct((size,), products.dtype)] * layers
    return list(_called("activated", kernel, shapes, size, interpret, products, *biases, *scales))


def normed_gradient(
    product: Float[Array, "rows size"],
    bias: Float[Array, " size"],
    scale: Float[Array, " size"],
    grad: Float[Array, "rows size"],
    eps: float,
    interpret: bool = False,
) -> tuple[Float[Array, "rows size"], Float[Array, " size"], Float[Array, " size"]]:
    """Gradients of product, bias and scale, given that of what `normed` makes of rows with SiLU. `fits` says of
    which."""
    from jax.experimental import pallas

    rows, size = product.shape
    each = _rows_each(rows)

    def kernel(product_ref: Any, bias_ref: Any, scale_ref: Any, grad_ref: Any, *out_refs: Any) -> None:
        to_product_ref, to_bias_ref, to_scale_ref = out_refs
        bias, scale = bias_ref[...][None], scale_ref[...][None]
        first = pallas.program_id(0) * each

        def tile(i: Any, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            at = pallas.ds(first + i * TILE, TILE)
            x = product_ref[at, :].astype(jnp.float32) + bias
            inverse = jax.lax.rsqrt(jnp.sum(x * x, axis=1) / size + eps)[:, None]
            x = x * inverse
            y = x * scale
            sigmoid = 1 / (1 + jnp.exp(-y))
            to_y = grad_ref[at, :].astype(jnp.float32) * sigmoid * (1 + y * (1 - sigmoid))
            to_x = to_y * scale
            to_product = inverse * (to_x - x * (jnp.sum(to_x * x, axis=1) / size)[:, None])
            to_product_ref[at, :] = to_product.astype(to_product_ref.dtype)
            return sums[0] + to_product, sums[1] + to_y * x

        zeros = jnp.zeros((TILE, size), jnp.float32)
        to_bias, to_scale = jax.lax.fori_loop(0, each // TILE, tile, (zeros, zeros))
        to_bias_ref[pallas.program_id(0), :] = jnp.sum(to_bias, axis=0)
        to_scale_ref[pallas.program_id(0), :] = jnp.sum(to_scale, axis=0)

    part = jax.ShapeDtypeStruct((rows // each, size), bias.dtype)
    shapes = [jax.ShapeDtypeStruct(product.shape, product.dtype), part, part]
    given = product, bias, scale, grad
    found = _called("normed_gradient", kernel, shapes, 4 * size, interpret, *given, grid=(rows // each,))
    return found[0], jnp.sum(found[1], axis=0), jnp.sum(found[2], axis=0)


TILE = 8
"""Rows of which a gradient is computed at once."""


def fits(rows: int, size: int) -> bool:
    """Whether `normed_gradient` can be of so many rows, and a tile of them stays in registers."""
    return rows % TILE == 0 and size <= 1024


def _rows_each(rows: int) -> int:
    """Rows of one program: up to 64, as many in each."""
    return next(n for n in (64, 32, 16, TILE) if rows % n == 0)


def flat(
    parts: Sequence[Float[Array, " _"] | Integer[Array, " _"]],
    classes: Sequence[int],
    width: int,
    dtype: Any,
    interpret: bool = False,
) -> Float[Array, " width"]:
    """The parts one after the other, and zeros: numbers as they are, and indices as one-hot vectors of so many
    `classes` each (0 for numbers). See `codream.linear`."""

    def kernel(*refs: Any) -> None:
        *part_refs, out_ref = refs
        end = 0
        for ref, n in zip(part_refs, classes, strict=True):
            first, end = end, end + ref.shape[0] * max(1, n)
            whole = n & (n - 1) == 0 and ref.shape[0] & (ref.shape[0] - 1) == 0
            if n and whole:
                places = jax.lax.broadcasted_iota(jnp.int32, (ref.shape[0], n), 1)
                ones = (ref[...].astype(jnp.int32)[:, None] == places).astype(dtype)
                out_ref[first:end] = ones.reshape(end - first)
                continue
            for group in range(ref.shape[0] if n else 1):
                for at, size in _powers(n or ref.shape[0]):
                    if n:
                        place = jax.lax.broadcasted_iota(jnp.int32, (size,), 0) + at
                        numbers = place == ref[group].astype(jnp.int32)
                    else:
                        numbers = ref[at : at + size]
                    start = first + group * n + at
                    out_ref[start : start + size] = numbers.astype(dtype)
        for at, size in _powers(width - end):
            out_ref[end + at : end + at + size] = jnp.zeros(size, dtype)

    return _called("flat", kernel, jax.ShapeDtypeStruct((width,), dtype), width, interpret, *parts)


def _powers(length: int) -> Iterator[tuple[int, int]]:
    """Starts and lengths of stretches that make up `length`, each a power of two, as a block must be."""
    at = 0
    while at < length:
        n = 1 << ((length - at).bit_length() - 1)
        yield at, n
        at += n


def _called(
    name: str,
    kernel: Any,
    out: Any,
    numbers: int,
    interpret: bool,
    *given: Array,
    grid: tuple[int, ...] = (),
    aliases: dict[int, int] | None = None,
) -> Any:
    from jax.experimental import pallas  # slow to import as well

    warps = 1 << max(1, min(8, numbers // NUMBERS)).bit_length() - 1
    settings = _settings()
    return pallas.pallas_call(
        kernel,
        out_shape=out,
        grid=grid,
        input_output_aliases=aliases or {},
        compiler_params=None if settings is None else settings(num_warps=warps, num_stages=1),
        interpret=interpret,
        name=name,
    )(*given)
