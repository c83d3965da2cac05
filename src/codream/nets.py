"""Networks: MLP, CNN, and a causal transformer with a key-value cache.

Modules take one unbatched example; callers `vmap`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from codream import kernels
from codream.attention import place, recall, reread, turns
from codream.linear import Input, Linear, linear, tree_of
from codream.normalisation import activated, normalised

__all__ = ["CNN", "MLP", "DeconvCNN", "KVCache", "Transformer", "products"]


class MLP(eqx.Module):
    """(linear → RMS norm → SiLU) × layers → linear.

    With `norm_first` off the first hidden layer is not normalised, so that sharp functions of an input's scale,
    such as "closer than the sum of two radii", are learned several times faster.
    """

    hidden: list[Linear]
    norms: list[eqx.nn.RMSNorm | eqx.nn.Identity]
    out: Linear

    def __init__(
        self,
        in_size: int,
        out_size: int,
        units: int,
        layers: int,
        key: PRNGKeyArray,
        out_gain: float = 1.0,
        norm_first: bool = True,
    ):
        *keys, out_key = jax.random.split(key, layers + 1)
        sizes = [in_size, *[units] * layers]
        self.hidden = [linear(a, b, k) for a, b, k in zip(sizes[:-1], sizes[1:], keys, strict=True)]
        self.norms = [
            eqx.nn.RMSNorm(units, use_bias=False) if i or norm_first else eqx.nn.Identity() for i in range(layers)
        ]
        self.out = linear(sizes[-1], out_size, out_key, out_gain)

    def __call__(self, x: Input) -> Float[Array, " out"]:
        return self.biased(self.product(x))

    def rows(self, x: Input) -> Float[Array, "*b out"]:
        """The outputs of a batch, with any leading axes."""
        return self.biased(self._from(0, x, activated))

    def product(self, x: Input, first: int = 0) -> Float[Array, " out"]:
        """The output before its bias, of what the hidden layer number `first` reads."""
        return self._from(first, x, lambda norm, layer, product: normalised(norm, layer, product, silu=True)[0])

    def biased(self, product: Float[Array, "*b out"]) -> Float[Array, "*b out"]:
        """The output, of what `product` gave."""
        return product.astype(self.out.bias.dtype) + self.out.bias

    def _from(self, first: int, x: Input, activated: Callable[..., Array]) -> Float[Array, "*b out"]:
        layers = [*self.hidden, self.out][first:]
        product = layers[0].product(x)
        for norm, layer, following in zip(self.norms[first:], layers, layers[1:], strict=False):
            product = following.product(activated(norm, layer, product))
        return product


def products(nets: Sequence[MLP], x: Float[Array, " in"]) -> list[Float[Array, " _"]]:
    """The outputs, before their biases, of nets that read the same. On a GPU their first layers are one product and one
    kernel of norms, where nothing is learned through them."""
    layers = [net.hidden[0] for net in nets if net.hidden and net.hidden[0].frozen]
    norms = [norm for net in nets for norm in net.norms[:1] if isinstance(norm, eqx.nn.RMSNorm)]
    widths = {len(layer.bias) for layer in layers}
    if len(layers) < len(nets) or len(norms) < len(nets) or len(widths) > 1 or not kernels.suits(*widths):
        return [net.product(x) for net in nets]
    weight, bias = (jnp.concatenate([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    product = Linear(weight, bias).product(x).reshape(len(layers), -1)
    scales = [norm.weight for norm in norms if norm.weight is not None]
    activated = kernels.activated(product, [layer.bias for layer in layers], scales, norms[0].eps)
    return [net.product(y, first=1) for net, y in zip(nets, activated, strict=True)]


def _halve(x: Float[Array, "h w c"]) -> Float[Array, "h2 w2 c16"]:
    """All 4 × 4 patches at stride 2 (padding 1), each as one row of 16 c entries.

    A convolution is this and a dense layer. Written so because XLA's CPU backend runs the gradient of a
    convolution inside a loop some thirty times slower than outside one.
    """
    h, w, c = x.shape
    x = jnp.pad(x, ((1, 1), (1, 1), (0, 0)))
    x = x.reshape(h // 2 + 1, 2, w // 2 + 1, 2, c).transpose(0, 2, 1, 3, 4).reshape(h // 2 + 1, w // 2 + 1, 4 * c)
    return jnp.concatenate([x[:-1, :-1], x[:-1, 1:], x[1:, :-1], x[1:, 1:]], axis=-1)


def _double(x: Float[Array, "h w c"], layer: Linear) -> Float[Array, "h2 w2 out"]:
    """The transposed convolution of kernel 4 and stride 2 (padding 1), as a dense layer and shifted sums."""
    h, w, _ = x.shape
    y = jax.vmap(jax.vmap(layer))(x)
    c = y.shape[-1] // 16
    y = y.reshape(h, w, 2, 2, 2, 2, c)  # shift (row, column), then place within the 2 × 2 block
    y = jnp.pad(y, ((0, 1), (0, 1)) + ((0, 0),) * 5)
    total = jnp.zeros(())
    for i in range(2):
        for j in range(2):
            total += jnp.roll(y[:, :, i, j], (i, j), axis=(0, 1))  # [h + 1, w + 1, 2, 2, c]
    full = total.transpose(0, 2, 1, 3, 4).reshape(2 * h + 2, 2 * w + 2, c)
    return full[1:-1, 1:-1]


class CNN(eqx.Module):
    """Image encoder: 4 convolutions of kernel 4 and stride 2, channels doubling, then flat."""

    layers: list[Linear]
    norms: list[eqx.nn.RMSNorm]
    out_size: int = eqx.field(static=True)

    def __init__(self, shape: tuple[int, int, int], depth: int, key: PRNGKeyArray):
        height, width, channels = shape
        if height % 16 or width % 16:
            raise ValueError(f"expected an image whose sides are multiples of 16, got {shape}; resize it")
        sizes = [channels, depth, 2 * depth, 4 * depth, 8 * depth]
        keys = jax.random.split(key, 4)
        self.layers = [linear(16 * a, b, k) for a, b, k in zip(sizes[:-1], sizes[1:], keys, strict=True)]
        self.norms = [eqx.nn.RMSNorm(size, use_bias=False) for size in sizes[1:]]
        self.out_size = (height // 16) * (width // 16) * sizes[-1]

    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, " out"]:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = jax.nn.silu(jax.vmap(jax.vmap(lambda p, la=layer, no=norm: no(la(p))))(_halve(x)))
        return x.reshape(-1)


class DeconvCNN(eqx.Module):
    """Image decoder: the mirror of `CNN`."""

    first: Linear
    layers: list[Linear]
    norms: list[eqx.nn.RMSNorm]
    shape: tuple[int, int, int] = eqx.field(static=True)

    def __init__(self, in_size: int, shape: tuple[int, int, int], depth: int, key: PRNGKeyArray):
        height, width, channels = shape
        sizes = [8 * depth, 4 * depth, 2 * depth, depth, channels]
        first_key, *keys = jax.random.split(key, 5)
        self.shape = (height // 16, width // 16, sizes[0])
        self.first = linear(in_size, math.prod(self.shape), first_key)
        self.layers = [linear(a, 16 * b, k) for a, b, k in zip(sizes[:-1], sizes[1:], keys, strict=True)]
        self.norms = [eqx.nn.RMSNorm(size, use_bias=False) for size in sizes[:-1]]

    def __call__(self, z: Input) -> Float[Array, "h w c"]:
        x = self.first(z).reshape(self.shape)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = _double(jax.nn.silu(jax.vmap(jax.vmap(norm))(x)), layer)
        return x


class KVCache(eqx.Module):
    """Rotated keys and values of the last `size` tokens of one sequence, as a ring; one array per layer, in the
    precision of the products that made them.

    Positions are rotary, so attention depends only on how far apart two tokens are: counting from the start
    of an episode or of a window is the same, a sequence may outlast the ring, and a whole batch can share one
    position. `axes` is the `vmap` axis of every leaf for such a batch.
    """

    keys: tuple[Float[Array, "heads size head"], ...]
    values: tuple[Float[Array, "heads size head"], ...]
    valid: Bool[Array, " size"]
    position: Int[Array, ""]  # of the next token

    @staticmethod
    def axes() -> KVCache:
        return tree_of(KVCache, keys=0, values=0, valid=0, position=None)

    def cleared(self, where: Bool[Array, ""]) -> KVCache:
        """Forget everything where `where` is true: the start of an episode."""
        return eqx.tree_at(lambda c: c.valid, self, self.valid & ~where)


class Block(eqx.Module):
    """Pre-norm attention and feed-forward block."""

    norm1: eqx.nn.RMSNorm
    norm2: eqx.nn.RMSNorm
    qkv: Linear
    out: Linear
    up: Linear
    down: Linear
    heads: int = eqx.field(static=True)

    def __init__(self, size: int, heads: int, layers: int, key: PRNGKeyArray):
        k1, k2, k3, k4 = jax.random.split(key, 4)
        self.norm1 = eqx.nn.RMSNorm(size, use_bias=False)
        self.norm2 = eqx.nn.RMSNorm(size, use_bias=False)
        self.qkv = linear(size, 3 * size, k1)
        self.out = linear(size, size, k2, gain=0.5 / layers)
        self.up = linear(size, 4 * size, k3)
        self.down = linear(4 * size, size, k4, gain=0.5 / layers)
        self.heads = heads

    def project(self, y: Float[Array, " size"]) -> Float[Array, "3 heads head"]:
        """Query, key and value of a token after `norm1`, not rotated and without `bias`, as `qkv` multiplies."""
        return self.qkv.product(y).reshape(3, self.heads, -1)

    @property
    def bias(self) -> Float[Array, "3 heads head"]:
        """What is added to a query, a key and a value."""
        return self.qkv.bias.reshape(3, self.heads, -1)

    def add(
        self, x: Float[Array, " size"], seen: Float[Array, "heads head"], norm: eqx.nn.RMSNorm
    ) -> tuple[Float[Array, " size"], Float[Array, " size"]]:
        """The block's output for one token, with what attention has seen for it; and that after the `norm` that follows
        the block."""
        y, x = normalised(self.norm2, self.out, self.out.product(seen.reshape(-1)), x)
        y, x = normalised(norm, self.down, self.down.product(jax.nn.silu(self.up(y))), x)
        return x, y


class Transformer(eqx.Module):
    """Causal transformer; `full` reads a sequence at once, `step` one token at a time, with equal results.

    A token is given as a `layer` multiplied it, its bias still to be added, so that on a GPU the first norm reads it
    once; without a layer it is given as it is.
    """

    blocks: list[Block]
    norm: eqx.nn.RMSNorm
    size: int = eqx.field(static=True)
    heads: int = eqx.field(static=True)

    def __init__(self, size: int, layers: int, heads: int, key: PRNGKeyArray):
        self.blocks = [Block(size, heads, layers, k) for k in jax.random.split(key, layers)]
        self.norm = eqx.nn.RMSNorm(size, use_bias=False)
        self.size, self.heads = size, heads

    def _after(self, block: int) -> eqx.nn.RMSNorm:
        """The norm that follows a block: the next one's, or the last."""
        return self.blocks[block + 1].norm1 if block + 1 < len(self.blocks) else self.norm

    def empty_cache(self, size: int) -> KVCache:
        zeros = (jnp.zeros((self.heads, size, self.size // self.heads)),) * len(self.blocks)
        return KVCache(zeros, zeros, jnp.zeros(size, bool), jnp.zeros((), jnp.int32))

    def full(
        self,
        x: Float[Array, "time size"],
        segment: Int[Array, " time"],
        valid: Bool[Array, " time"],
        room: int = 0,
        layer: Linear | None = None,
    ) -> tuple[Float[Array, "time size"], KVCache]:
        """Outputs for every token, and the cache from which `step` goes on for `room` more tokens.

        A token attends to itself and to earlier valid tokens of its own segment (episode).
        """
        return self._read(x, segment, valid, room, layer, 0, remembered=False)

    def prefill(
        self,
        x: Float[Array, "time size"],
        segment: Int[Array, " time"],
        valid: Bool[Array, " time"],
        room: int,
        layer: Linear | None = None,
    ) -> tuple[Float[Array, " size"], KVCache]:
        """As `full`, but the output of the last token only: the last block is spared for all others."""
        y, cache = self._read(x, segment, valid, room, layer, len(x) - 1, remembered=True)
        return y[0], cache

    def _entered(self, x: Float[Array, " size"], layer: Linear | None) -> tuple[Float[Array, " size"], ...]:
        """A token after the first norm, and before."""
        norm = self.blocks[0].norm1
        return (norm(x), x) if layer is None else normalised(norm, layer, x)

    def _read(
        self,
        x: Float[Array, "time size"],
        segment: Int[Array, " time"],
        valid: Bool[Array, " time"],
        room: int,
        layer: Linear | None,
        since: int,
        *,
        remembered: bool,
    ) -> tuple[Float[Array, "wanted size"], KVCache]:
        """Outputs from token `since` on, and the cache."""
        time = jnp.arange(len(x))
        allowed = (time[:, None] >= time) & (segment[:, None] == segment) & (valid | (time[:, None] == time))
        turned = jnp.asarray(turns(len(x), self.size // self.heads // 2))
        keys, values = [], []
        y, x = jax.vmap(lambda x: self._entered(x, layer))(x)
        for i, block in enumerate(self.blocks):
            first = since if i == len(self.blocks) - 1 else 0
            seen, k, v = reread(jax.vmap(block.project)(y), block.bias, turned, allowed, room, first, remembered)
            x, y = jax.vmap(block.add, in_axes=(0, 0, None))(x[first:], seen, self._after(i))
            keys.append(k)
            values.append(v)
        cache = KVCache(
            tuple(keys),
            tuple(values),
            jnp.pad(valid & (segment == segment[-1]), (0, room)),
            jnp.asarray(len(time), jnp.int32),
        )
        return y.astype(x.dtype), cache

    def step(
        self, x: Float[Array, " size"], cache: KVCache, layer: Linear | None = None
    ) -> tuple[Float[Array, " size"], KVCache]:
        """Output for one more token, which sees the cache and itself."""
        at, valid = place(cache.position, len(cache.valid), self.size // self.heads // 2), cache.valid
        all_keys, all_values = [], []
        y, x = self._entered(x, layer)
        for i, (block, keys, values) in enumerate(zip(self.blocks, cache.keys, cache.values, strict=True)):
            seen, keys, values, valid = recall(block.project(y), block.bias, at, keys, values, valid)
            x, y = block.add(x, seen, self._after(i))
            all_keys.append(keys)
            all_values.append(values)
        return y.astype(x.dtype), KVCache(tuple(all_keys), tuple(all_values), valid, cache.position + 1)
