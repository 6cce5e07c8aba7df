"""Where the model's arrays lie on a mesh of Auto or Explicit axes."""

from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

SPECS = (
    (r".*/(q|k|v|gate|up)_proj/kernel", P(None, "fsdp", "tensor")),
    (r".*/(o|down)_proj/kernel", P(None, "tensor", "fsdp")),
    (r".*/(q|k|v|gate|up)_proj/bias", P(None, "tensor")),
    (r"(.*/)?embed_tokens/embedding", P("tensor", None)),
    (r"(.*/)?lm_head/kernel", P(None, "tensor")),
    (r".*", P()),
)
"""How parameters lie on a mesh: (regex of the whole path, spec), the first that matches."""


def place(x: jax.Array, spec: P | None) -> jax.Array:
    """`x` where `spec` says on the current mesh, or wherever XLA likes."""
    return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def as_rows(x: jax.Array, ndim: int) -> NamedSharding | None:
    """Where an array of `ndim` axes lies whose rows (and tokens) lie as those of `x` do.

    Only meshes of Explicit axes ask for such a word; elsewhere it is None. The first two axes,
    rows and tokens, lie as in `x`; the rest is whole on each device.
    """
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return NamedSharding(sharding.mesh, P(*sharding.spec[: min(2, ndim)], *[None] * (ndim - 2)))


def look_up(embedding: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of an embedding, which lie on the mesh as the tokens do: [B, T] -> [B, T, d]."""
    return embedding.at[tokens].get(mode="fill", out_sharding=as_rows(tokens, 3))


def pick(x: jax.Array, positions: jax.Array) -> jax.Array:
    """The tokens at `positions` of each row: [B, T, d] and [B, P] -> [B, P, d]."""
    return jax.vmap(lambda row, at: row[at])(x, positions)


def row_parallel(x: jax.Array, kernel: jax.Array, *args: Any, **options: Any) -> jax.Array:
    """A `dot_general` summed over a sharded axis: its result lies as the rest of `x` does.

    Explicit axes ask where such a sum goes: [B, T, in] and [in, out] -> [B, T, out].
    """
    return jax.lax.dot_general(x, kernel, *args, **options, out_sharding=as_rows(x, 3))
