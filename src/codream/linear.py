"""Linear layers, and what they read: vectors, of which parts may be one-hot vectors as indices (`OneHots`, `joined`).

Weights start from a truncated normal of variance gain / fan-in; biases at 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, PRNGKeyArray

from codream import kernels, products

__all__ = ["Input", "Joined", "Linear", "OneHots", "dense", "joined", "linear", "lowered", "tree_of"]


T = TypeVar("T", bound=eqx.Module)

TILE = 64
"""Rows and columns of a matrix on which a tensor core works at once."""
FEWEST = 16
"""Of which it can make a product."""


def tree_of(cls: type[T], **fields: Any) -> T:
    """A module's tree with other leaves than it is annotated with, such as `vmap` axes. Runs no `__init__`."""
    tree = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(tree, name, value)
    return tree


class OneHots(eqx.Module):
    """One-hot vectors side by side, as the places of their ones. Data: no gradient passes."""

    index: Integer[Array, "*b groups"]
    classes: int = eqx.field(static=True)

    @property
    def size(self) -> int:
        """Entries of the vectors."""
        return self.index.shape[-1] * self.classes

    def flat(self) -> Float[Array, "*b entries"]:
        ones = jax.nn.one_hot(self.index, self.classes)
        return ones.reshape(*self.index.shape[:-1], self.size)


class Joined(eqx.Module):
    """A concatenation, some of whose parts are `OneHots`."""

    parts: tuple[Float[Array, "..."] | OneHots, ...]


# What a linear layer reads.
Input = Float[Array, "..."] | OneHots | Joined


def joined(*parts: Float[Array, "..."] | OneHots) -> Input:
    """The concatenation of the parts: an array if all of them are."""
    if any(isinstance(part, OneHots) for part in parts):
        return Joined(parts)
    return jnp.concatenate([dense(part) for part in parts], axis=-1)


def dense(x: Input) -> Float[Array, "*b in"]:
    """The vector itself."""
    if isinstance(x, Joined):
        return jnp.concatenate([dense(part) for part in x.parts], axis=-1)
    return x.flat() if isinstance(x, OneHots) else x


def _flat(x: Input, width: int, dtype: Any) -> Float[Array, "*b width"]:
    """The vector itself, with zeros up to `width`."""
    parts = x.parts if isinstance(x, Joined) else ()
    if any(isinstance(part, OneHots) and kernels.suits(part.index.shape[-1], part.classes) for part in parts):
        numbers = [part.index if isinstance(part, OneHots) else part for part in parts]
        classes = tuple(part.classes if isinstance(part, OneHots) else 0 for part in parts)
        rows = [n.reshape(-1, n.shape[-1]) for n in numbers]
        return jax.vmap(_written(classes, width, dtype))(*rows).reshape(*numbers[0].shape[:-1], width)
    x = dense(x).astype(dtype)
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])]) if width > x.shape[-1] else x


@cache
def _written(classes: tuple[int, ...], width: int, dtype: Any) -> Callable[..., Array]:
    """`kernels.flat`, with its gradient."""

    @jax.custom_vjp
    def written(*parts: Array) -> Array:
        return kernels.flat(parts, classes, width, dtype)

    def backward(parts: tuple[Array, ...], grad: Array) -> tuple[Array | None, ...]:
        ends = np.cumsum([len(part) * max(1, n) for part, n in zip(parts, classes, strict=True)])
        return tuple(
            None if n else grad[end - len(part) : end].astype(part.dtype)
            for part, n, end in zip(parts, classes, ends, strict=True)
        )

    written.defvjp(lambda *parts: (written(*parts), parts), backward)
    return written


@jax.custom_vjp
def _rows(weight: Float[Array, "in out"], ones: OneHots) -> Float[Array, "*b out"]:
    """ones.flat() @ weight, as a sum of rows: on a CPU five times as fast as the product."""
    groups = ones.index.shape[-1]
    places = ones.index.astype(jnp.int32) + ones.classes * jnp.arange(groups)

    def add(total: Float[Array, "*b out"], place: Int[Array, "*b"]) -> tuple[Float[Array, "*b out"], None]:
        return total + weight.at[place].get(mode="promise_in_bounds"), None

    zero = jnp.zeros((*places.shape[:-1], weight.shape[1]))
    # A loop, for two reasons: gathered all at once the rows fill memory, and every reader of a bare sum sums anew.
    return jax.lax.scan(add, zero, jnp.moveaxis(places, -1, 0), unroll=max(1, min(8, groups // 2)))[0]


def _rows_fwd(weight: Float[Array, "in out"], ones: OneHots) -> tuple[Float[Array, "*b out"], Any]:
    return _rows(weight, ones), (ones, jnp.zeros((), weight.dtype))


def _rows_bwd(kept: Any, grad: Float[Array, "*b out"]) -> tuple[Float[Array, "in out"], None]:
    ones, like = kept
    merged = ones.flat().reshape(-1, ones.size)
    # Turned first: XLA would multiply it as it lies, on one core half as fast.
    grad = jax.lax.optimization_barrier(grad.reshape(len(merged), -1).T)
    return products.product(grad.astype(like.dtype), merged.T.astype(like.dtype)).T.astype(like.dtype), None


_rows.defvjp(_rows_fwd, _rows_bwd)


def _tiled(weight: Float[Array, "... out in"]) -> Float[Array, "... more_out more_in"]:
    """With zeros appended, so that rows begin where a tensor core can load them: three to four times faster. One row
    becomes some as well, else XLA multiplies without one, in two kernels."""
    beyond = [(0, FEWEST - 1 if size == 1 else -size % TILE if size > TILE else 0) for size in weight.shape[-2:]]
    return jnp.pad(weight, [(0, 0)] * (weight.ndim - 2) + beyond) if any(n for _, n in beyond) else weight


class Linear(eqx.Module):
    """x Wᵀ + b, of one x or a batch. Written as W x, nested `vmap`s would leave the rows behind the features and
    transpose every product: two to three times slower on a CPU.

    Where a gradient is wanted, an x with `OneHots` must be the whole batch: a loop is not summed over `vmap`.
    """

    weight: Float[Array, "out in"]
    bias: Float[Array, " out"]
    frozen: bool = eqx.field(static=True, default=False)
    """Whether nothing is learned through it: see `lowered`."""
    rows: Float[Array, "in out"] | None = None
    """The weight once more, by input, where `OneHots` pick from it again and again: see `lowered`."""

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def __call__(self, x: Input) -> Float[Array, "*b out"]:
        return self.product(x).astype(self.bias.dtype) + self.bias

    def product(self, x: Input) -> Float[Array, "*b out"]:
        """x Wᵀ, without the bias, of factors in the precision of the weight; so are the products of its gradient. On a
        CPU the result is float32, elsewhere in that precision too."""
        if jax.default_backend() != "cpu":  # where products are what is fast
            weight = _tiled(self.weight)
            return (_flat(x, weight.shape[1], weight.dtype) @ weight.T)[..., : len(self.bias)]
        if isinstance(x, OneHots):
            x = Joined((x,))
        if not isinstance(x, Joined):
            return products.product(x, self.weight)
        total, at = jnp.zeros(()), 0
        for part in x.parts:
            size = part.size if isinstance(part, OneHots) else part.shape[-1]
            weight = self.weight[:, at : at + size]
            rows = weight.T if self.rows is None else self.rows[at : at + size]
            total = total + (_rows(rows, part) if isinstance(part, OneHots) else products.product(part, weight))
            at += size
        return total


def linear(in_size: int, out_size: int, key: PRNGKeyArray, gain: float = 1.0) -> Linear:
    """A linear layer with weights of variance gain / in_size and zero bias."""
    # 0.8796 is the standard deviation of a unit normal cut at ±2.
    scale = math.sqrt(gain / in_size) / 0.87962566
    return Linear(scale * jax.random.truncated_normal(key, -2.0, 2.0, (out_size, in_size)), jnp.zeros(out_size))


def lowered(tree: Any, precision: str, frozen: bool = False) -> Any:
    """`tree` with the weights of all its linear layers in that precision, and on an accelerator as whole tiles. Inside
    the function that is differentiated, so that gradients and parameters stay float32. `frozen`: nothing is, so there
    may be kernels that have no gradient, and on a CPU every layer has its `rows`."""
    tiled = jax.default_backend() != "cpu"
    if precision == "float32" and not tiled and not frozen:
        return tree

    def lower(node: Any) -> Any:
        if not isinstance(node, Linear):
            return node
        weight = node.weight.astype(precision)
        rows = jnp.swapaxes(weight, -1, -2) if frozen and not tiled else None
        return tree_of(Linear, weight=_tiled(weight) if tiled else weight, bias=node.bias, frozen=frozen, rows=rows)

    return jax.tree.map(lower, tree, is_leaf=lambda node: isinstance(node, Linear))
