"""Attention as codream has it (products that XLA compiles) beside cuDNN's, at the shapes of preset `paper`.

    python benchmarks/attention.py [--trajectories 3072] [--repeats 50] [--out FILE]

For an NVIDIA GPU; elsewhere only the first column. In bfloat16, microseconds of a call, started one after the other.
"Time first" has what is remembered as [time, heads, head] instead of codream's [heads, time, head].
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import dot_product_attention

from codream.runs import device

HEADS_FIRST, TIME_FIRST = "nsh", "snh"


def products(q: Any, k: Any, v: Any, allowed: Any, order: str) -> Any:
    """q: [batch, queries, heads, head]; k, v: [batch, *order]; allowed: [batch, 1, queries, keys]."""
    scores = jnp.einsum(f"btnh,b{order}->bnts", q, k, preferred_element_type=jnp.float32) / q.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(allowed, scores, -1e30)).astype(v.dtype)
    return jnp.einsum(f"bnts,b{order}->btnh", weights, v, preferred_element_type=jnp.float32).astype(v.dtype)


def microseconds(function: Callable[..., Any], args: tuple[Any, ...], repeats: int) -> str:
    """Of a call, as a cell of the table; a dash where the device cannot do it."""
    compiled = jax.jit(function)
    try:
        found = jax.block_until_ready(compiled(*args))
    except (RuntimeError, ValueError):
        return "–"
    began = time.perf_counter()
    for _ in range(repeats):
        found = compiled(*args)
    jax.block_until_ready(found)
    return f"{(time.perf_counter() - began) / repeats * 1e6:,.0f}"


def row(name: str, shape: tuple[int, int, int, int, int], repeats: int, *, gradient: bool = False) -> str:
    batch, queries, seen, heads, size = shape
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (batch, length, heads, size), jnp.bfloat16)
        for key, length in zip(keys, (queries, seen, seen), strict=True)
    )
    last = jnp.arange(queries) if queries > 1 else jnp.array([2 * seen // 3])
    allowed = jnp.broadcast_to(jnp.arange(seen) <= last[:, None], (batch, 1, queries, seen))
    lengths = jnp.full(batch, int(last[-1]) + 1, jnp.int32)
    k_first, v_first = (jnp.swapaxes(x, 1, 2) for x in (k, v))

    def wanted(function: Callable[..., Any]) -> Callable[..., Any]:
        if not gradient:
            return function
        return jax.grad(lambda *args: jnp.sum(function(*args).astype(jnp.float32)), (0, 1, 2))

    def cudnn(**how: Any) -> Callable[..., Any]:
        return wanted(lambda q, k, v: dot_product_attention(q, k, v, implementation="cudnn", **how))

    cells = [
        microseconds(wanted(lambda q, k, v: products(q, k, v, allowed, HEADS_FIRST)), (q, k_first, v_first), repeats),
        microseconds(wanted(lambda q, k, v: products(q, k, v, allowed, TIME_FIRST)), (q, k, v), repeats),
        microseconds(cudnn(mask=allowed), (q, k, v), repeats),
        microseconds(cudnn(key_value_seq_lengths=lengths), (q, k, v), repeats) if queries == 1 else "–",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=3072)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    n = args.trajectories
    lines = [
        f"{device()}, jax {jax.__version__}",
        "",
        "| µs | XLA | XLA, time first | cuDNN, mask | cuDNN, lengths |",
        "|---|---|---|---|---|",
        row(f"imagining: {n:,} queries, 19 keys, 8 heads of 64", (n, 1, 19, 8, 64), args.repeats),
        row("the same of the teammate predictor, 20 keys, 4 heads of 32", (n, 1, 20, 4, 32), args.repeats),
        row("learning: 16 × 64, 8 heads of 64", (16, 64, 64, 8, 64), args.repeats),
        row("its gradient", (16, 64, 64, 8, 64), args.repeats, gradient=True),
    ]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
