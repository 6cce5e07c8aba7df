"""Random adapters: one linear layer trained from many draws of `a`, at every rank at once."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

__all__ = ["LEARNING_RATE", "OPTIMIZERS", "Cases", "Data", "Setting", "outputs_and_gradients"]

LEARNING_RATE = 1e-4
OPTIMIZERS = {
    "sgd": optax.sgd(LEARNING_RATE),
    "adam": optax.adam(LEARNING_RATE, eps=1e-30),  # as good as 0, but 0 / eps is a number
    "normalized": optax.chain(optax.normalize_by_update_norm(), optax.sgd(LEARNING_RATE)),
}
_CHUNK = 2**20  # entries of `a` that are in work at a time, over draws and ranks


class Data(NamedTuple):
    """The input that is trained on, one orthogonal to it [n], and the output gradient [out]."""

    x: jax.Array
    other: jax.Array
    gradient: jax.Array


class Cases(NamedTuple):
    """Per rank, [ranks]: the rank, the scale, and the standard deviation of `a`."""

    rank: jax.Array
    scale: jax.Array
    std: jax.Array


class Setting(NamedTuple):
    """How `a` is drawn, uniformly or from a normal distribution, and how often it is trained."""

    uniform: jax.Array | bool
    steps: jax.Array | int


@partial(jax.jit, static_argnames=("optimizer", "largest"))
def outputs_and_gradients(
    keys: jax.Array, data: Data, cases: Cases, setting: Setting, *, optimizer: str, largest: int
) -> dict[str, jax.Array]:
    """Trains y = scale x a b from each key's `a`, and b = 0, by a held output gradient.

    Factors are padded to the largest rank; rank r's `a` is the first r columns of the draw.

    Args:
      keys: typed PRNG keys, [draws].
      data: the inputs and the gradient into the outputs.
      cases: the ranks, with their scales and standard deviations.
      setting: the same for all ranks, but no cause to compile again.
      optimizer: one of `OPTIMIZERS`.
      largest: the largest rank.

    Returns:
      ``output_trained`` and ``output`` [draws, ranks, out], the adapter's outputs on the two
      inputs, and ``input_grad`` [draws, ranks, n], the gradient into the first.

    Example:
      >>> ones = jnp.ones(4)
      >>> cases = Cases(jnp.array([1, 2]), jnp.array([1.0, 0.5]), jnp.array([0.5, 0.5]))
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> data, setting = Data(ones, ones, ones), Setting(uniform=True, steps=1)
      >>> found = outputs_and_gradients(keys, data, cases, setting, optimizer="sgd", largest=2)
      >>> found["input_grad"].shape
      (3, 2, 4)
    """
    tx, n = OPTIMIZERS[optimizer], data.x.shape[0]

    def draw(key: jax.Array) -> dict[str, jax.Array]:
        entries = _draw(key, (n, largest), setting.uniform)
        return jax.vmap(lambda case: _case(entries, case, data, tx, setting.steps))(cases)

    most = max(1, _CHUNK // (n * largest * len(cases.rank)))
    batch = max(size for size in range(1, most + 1) if len(keys) % size == 0)
    return jax.lax.map(draw, keys, batch_size=batch)


def _case(
    entries: jax.Array, case: Cases, data: Data, tx: optax.GradientTransformation, steps: Any
) -> dict[str, jax.Array]:
    a = jnp.where(jnp.arange(entries.shape[1]) < case.rank, entries * case.std, 0)
    b = jnp.zeros((a.shape[1], data.gradient.shape[0]), a.dtype)
    a, b = _train((a, b), case.scale, data, tx, steps)
    return {
        "output_trained": _adapter((a, b), data.x, case.scale),
        "output": _adapter((a, b), data.other, case.scale),
        "input_grad": case.scale * (data.gradient @ b.T) @ a.T,
    }


def _train(
    factors: Any, scale: jax.Array, data: Data, tx: optax.GradientTransformation, steps: Any
) -> Any:
    """Steps on the loss whose gradient into the outputs is `data.gradient`."""

    def loss(factors: Any) -> jax.Array:
        return data.gradient @ _adapter(factors, data.x, scale)

    def step(_: Any, carry: Any) -> Any:
        factors, state = carry
        updates, state = tx.update(jax.grad(loss)(factors), state, factors)
        return optax.apply_updates(factors, updates), state

    return jax.lax.fori_loop(0, steps, step, (factors, tx.init(factors)))[0]


def _adapter(factors: Any, x: jax.Array, scale: jax.Array) -> jax.Array:
    a, b = factors
    return scale * (x @ a) @ b


def _draw(key: jax.Array, shape: tuple[int, int], uniform: jax.Array | bool) -> jax.Array:
    """Entries of variance 1, [n, largest]; a column does not depend on how many there are."""
    n, largest = shape
    least = jnp.nextafter(jnp.float32(-1), jnp.float32(0))  # erf_inv(-1) is infinite

    def column(k: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(key, k), (n,), minval=least, maxval=1.0)

    flat = jax.vmap(column, out_axes=1)(jnp.arange(largest))
    return jnp.where(uniform, 3**0.5 * flat, 2**0.5 * jax.scipy.special.erfinv(flat))
