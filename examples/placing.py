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
    """`x` where `spec` says on the current mesh, or wherever XLA likes.

    On Explicit axes it stays: there the types of the arguments say where everything lies.
    """
    explicit = AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types
    return x if spec is None or explicit else jax.lax.with_sharding_constraint(x, spec)


def as_rows(x: jax.Array, ndim: int) -> NamedSharding | None:
    """Where an array of `ndim` axes lies whose rows and tokens lie as the first two of `x` do.

    Only meshes of Explicit axes ask for such a word; elsewhere it is None.
    """
    return _on_explicit_mesh(x, P(*jax.typeof(x).sharding.spec[:2], *[None] * (ndim - 2)))


def beside(rows: jax.Array, x: jax.Array) -> jax.Array:
    """`x` with its first axis where that of `rows` lies, whole on each device otherwise."""
    spec = P(jax.typeof(rows).sharding.spec[0], *[None] * (x.ndim - 1))
    sharding = _on_explicit_mesh(rows, spec)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def alike(other: jax.Array, x: jax.Array) -> jax.Array:
    """`x` with each axis where that of `other` lies; both have the same number of axes."""
    sharding = _on_explicit_mesh(other, jax.typeof(other).sharding.spec)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def look_up(embedding: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of an embedding, which lie on the mesh as the tokens do: [B, T] -> [B, T, d]."""
    return embedding.at[tokens].get(mode="fill", out_sharding=as_rows(tokens, 3))


def pick(x: jax.Array, positions: jax.Array) -> jax.Array:
    """The tokens at `positions` of each row: [B, T, d] and [B, P] -> [B, P, d]."""
    return jax.vmap(lambda row, at: row[at])(x, beside(x, positions))


def row_parallel(x: jax.Array, kernel: jax.Array, *args: Any, **options: Any) -> jax.Array:
    """A `dot_general` summed over a sharded axis: its result lies as the rest of `x` does.

    Explicit axes ask where such a sum goes: [B, T, in] and [in, out] -> [B, T, out].
    """
    return jax.lax.dot_general(x, kernel, *args, **options, out_sharding=as_rows(x, 3))


def _on_explicit_mesh(x: jax.Array, spec: P) -> NamedSharding | None:
    mesh = jax.typeof(x).sharding.mesh
    # Arrays of the host know no mesh: they are whole on each device of the current one.
    mesh = jax.sharding.get_abstract_mesh() if mesh.empty else mesh
    return NamedSharding(mesh, spec) if AxisType.Explicit in mesh.axis_types else None
