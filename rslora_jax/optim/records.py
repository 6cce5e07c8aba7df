"""Records: an Optax transform that remembers the norms of every step in its own state."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rslora_jax import norms
from rslora_jax.factors import LoraParams, factors_of
from rslora_jax.paths import AdapterError
from rslora_jax.sites import Site
from rslora_jax.tables import Table

__all__ = ["QUANTITIES", "Records", "RecordsState", "record_norms", "recorded"]

QUANTITIES = ("grad_a", "grad_b", "update_a", "update_b", "signal", "predicted_change")
"""What is recorded of each module at each step: Frobenius norms of the gradients that come in
and of the updates that go out, <dW, -G> = -<b, grad b>, and <g, u>, the first-order change of
the loss that the update predicts."""


class RecordsState(NamedTuple):
    """The state of `record_norms`.

    Attributes:
      inner: the state of the transform that is recorded.
      step: how many steps were seen, int32.
      norms: ``{path: [capacity, b.., len(QUANTITIES)]}``, a ring that starts at step 0.
    """

    inner: Any
    step: jax.Array
    norms: dict[str, jax.Array]


def record_norms(
    tx: optax.GradientTransformation, sites: Sequence[Site], capacity: int = 1024
) -> optax.GradientTransformationExtraArgs:
    """Records, inside the training step, the norms of what goes into `tx` and what comes out.

    Nothing is sent to the host: the numbers lie in the optimizer's state until `recorded`
    reads them, and travel with its checkpoints. The updates of `tx` are handed on unchanged.

    Args:
      tx: the transform to record, such as ``optax.adam(1e-3)``, or
        ``optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))``.
      sites: the sites that `adapt` returned: stacked sites are recorded layer by layer.
      capacity: how many of the latest steps to keep.

    Returns:
      A transform for the adapter tree ``params.lora``; put `freeze_base` around it for a
      whole `LoraParams`.

    Raises:
      AdapterError: without sites, for a capacity below 1, and when the gradients do not
        fit the sites.

    Example:
      >>> import jax.numpy as jnp, optax, rslora_jax as rl
      >>> site = rl.Site("w", "io", (4, 9), "float32", rank=1, alpha=1.0, scale=1.0)
      >>> lora = {"w": {"a": jnp.ones((4, 1)), "b": jnp.zeros((1, 9))}}
      >>> grads = {"w": {"a": jnp.zeros((4, 1)), "b": jnp.ones((1, 9))}}
      >>> tx = record_norms(optax.sgd(0.5), [site])
      >>> _, state = tx.update(grads, tx.init(lora), lora)
      >>> print(recorded(state).table())
      step  path  index  grad_a  grad_b  update_a  update_b  signal  predicted_change
      0     w            0       3       0         1.5       -0      -4.5
    """
    if not sites:
        raise AdapterError("record_norms needs the sites that `adapt` returned, found none.")
    if capacity < 1:
        raise AdapterError(f"record_norms needs a capacity of at least 1, found {capacity!r}.")
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> RecordsState:
        lora = params.lora if isinstance(params, LoraParams) else params
        factors_of(lora, sites)
        rings = {
            site.path: jnp.zeros((capacity, *norms.module_shape(site), len(QUANTITIES)))
            for site in sites
        }
        return RecordsState(inner.init(params), jnp.zeros((), jnp.int32), rings)

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, RecordsState]:
        if params is None:
            raise AdapterError(
                "record_norms measures the change scale * a @ b too: call "
                "tx.update(grads, state, params.lora), with the parameters."
            )
        new, inside = inner.update(updates, state.inner, params, **extra)
        before, grads, after = (_factors(tree, sites) for tree in (params, updates, new))
        place = state.step % capacity
        rings = {
            site.path: state.norms[site.path]
            .at[place]
            .set(_row(site, before[site.path], grads[site.path], after[site.path]))
            for site in sites
        }
        return new, RecordsState(inside, state.step + 1, rings)

    return optax.GradientTransformationExtraArgs(init, update)


def _factors(tree: Any, sites: Sequence[Site]) -> dict[str, dict[str, Any]]:
    return factors_of(tree.lora if isinstance(tree, LoraParams) else tree, sites)


def _row(site: Site, factors: Any, grads: Any, updates: Any) -> jax.Array:
    """The quantities of one step, in their order: [b.., len(QUANTITIES)]."""
    every = zip(*(norms.matrices(site, tree) for tree in (grads, updates, factors)), strict=True)
    a, b = (_sums_of_products(*three) for three in every)
    sizes = [jnp.sqrt(found[k]) for k in (0, 1) for found in (a, b)]
    return jnp.stack([*sizes, -b[3], a[2] + b[2]], -1).astype(jnp.float32)


def _sums_of_products(g: jax.Array, u: jax.Array, p: jax.Array) -> Sequence[jax.Array]:
    """Sums over a matrix of g g, u u, g u and p g, in one pass over the memory."""
    products = (g * g, u * u, g * u, p * g)
    zeros = tuple(jnp.zeros((), product.dtype) for product in products)
    axes = (g.ndim - 2, g.ndim - 1)
    return jax.lax.reduce(products, zeros, lambda x, y: tuple(map(jnp.add, x, y)), axes)


@dataclasses.dataclass(frozen=True)
class Records:
    """The norms of the latest steps, on the host.

    Attributes:
      steps: the numbers of the steps, int [n], rising.
      norms: ``{path: float32 [n, b.., len(QUANTITIES)]}``.
    """

    steps: np.ndarray
    norms: dict[str, np.ndarray]

    def table(self) -> Table:
        """One row for each step and module; write it with `to_csv`, `to_jsonl`, `to_frame`."""
        rows: list[dict[str, Any]] = []
        for k, step in enumerate(self.steps):
            for path, found in self.norms.items():
                for index in np.ndindex(found.shape[1:-1]):
                    place = {"step": int(step), "path": path, "index": "/".join(map(str, index))}
                    values = zip(QUANTITIES, found[(k, *index)].tolist(), strict=True)
                    rows.append({**place, **dict(values)})
        return Table.of(rows)

    def means(self) -> Table:
        """One row for each step: the mean over all modules of each norm, the sum of changes."""
        flat = [
            found.reshape(len(self.steps), -1, len(QUANTITIES)) for found in self.norms.values()
        ]
        every = np.concatenate(flat, 1)
        rows = []
        for k, step in enumerate(self.steps):
            summed = dict(zip(QUANTITIES, every[k].sum(0).tolist(), strict=True))
            mean = dict(zip(QUANTITIES, every[k].mean(0).tolist(), strict=True))
            whole = {name: summed[name] for name in ("signal", "predicted_change")}
            rows.append({"step": int(step), **mean, **whole})
        return Table.of(rows)

    def scalars(self, prefix: str = "rslora") -> Iterator[tuple[str, float, int]]:
        """``(tag, value, step)`` of the means, as TensorBoard writers take them.

        Example:
          >>> import numpy as np
          >>> records = Records(np.array([7]), {"w": np.ones((1, len(QUANTITIES)), np.float32)})
          >>> next(records.scalars())
          ('rslora/grad_a', 1.0, 7)
        """
        for record in self.means().records():
            step = record.pop("step")
            yield from ((f"{prefix}/{name}", value, step) for name, value in record.items())


def recorded(state: Any) -> Records:
    """Reads what `record_norms` kept, from any optimizer state that holds its state.

    Args:
      state: the state of the whole optimizer.

    Returns:
      The `Records` of the steps that are still in the ring; one transfer to the host.

    Raises:
      AdapterError: if `state` holds no records, or more than one.
    """
    found = [
        node
        for node in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, RecordsState))
        if isinstance(node, RecordsState)
    ]
    if len(found) != 1:
        raise AdapterError(
            f"recorded reads the state of one `record_norms`, found {len(found)} in this "
            "optimizer state. Wrap the transform that is to be recorded, once."
        )
    count, rings = jax.device_get((found[0].step, found[0].norms))
    return Records(*_unrolled(int(count), rings))


def _unrolled(count: int, rings: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, Any]]:
    """Rings of any capacity, laid out from the oldest step that they hold."""
    capacity = len(next(iter(rings.values())))
    steps = np.arange(max(0, count - capacity), count)
    return steps, {path: ring[steps % capacity] for path, ring in rings.items()}
