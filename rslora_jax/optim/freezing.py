"""Freezing: the adapters train, each factor at its own rate, and the base does not move."""

from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from rslora_jax.factors import LoraParams
from rslora_jax.paths import AdapterError

__all__ = ["apply_updates", "freeze_base", "labels", "lora_plus", "trainable_mask"]

PyTree: TypeAlias = Any


def freeze_base(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Lets `tx` see the adapters only: the base does not move by one bit.

    `optax.masked` alone passes raw gradients through to what it masks. Here the optimizer's
    state holds nothing for the base, and decay, clipping and norms never read it.

    Args:
      tx: any Optax transform, `optax.MultiSteps` included.

    Returns:
      A transform for `LoraParams`. `update` takes the gradients of ``params.lora`` alone
      (what `value_and_grad` gives) or a whole `LoraParams` of gradients, and returns
      updates of the same structure; those of the base are -0.0. Apply them with
      `apply_updates`.

    Raises:
      AdapterError: if it is used on anything but a `LoraParams`.

    Example:
      >>> import jax.numpy as jnp, optax, rslora_jax as rl
      >>> params = rl.LoraParams({"w": jnp.ones(2)}, {"w": {"a": jnp.ones(2), "b": jnp.ones(2)}})
      >>> tx = freeze_base(optax.sgd(0.5))
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> new = optax.apply_updates(params, updates)
      >>> new.base["w"].tolist(), new.lora["w"]["a"].tolist()
      ([1.0, 1.0], [0.5, 0.5])
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        return inner.init(_lora(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        lora = params.lora if isinstance(params, LoraParams) else params
        if not isinstance(updates, LoraParams):
            return inner.update(updates, state, lora, **extra)
        new, state = inner.update(updates.lora, state, lora, **extra)
        return updates._replace(base=jax.tree.map(_nothing, updates.base), lora=new), state

    return optax.GradientTransformationExtraArgs(init, update)


def apply_updates(params: LoraParams, updates: Any) -> LoraParams:
    """`optax.apply_updates` for the adapters; the base is handed on, not added to.

    Adding the nothing that `freeze_base` gives the base keeps every bit of normal numbers,
    but XLA flushes subnormal numbers in any sum on a CPU. Here no sum is formed.

    Args:
      params: base and factors.
      updates: of ``params.lora`` alone, or a `LoraParams` of which the base part is unused.

    Returns:
      `LoraParams` with the same base and new factors.

    Example:
      >>> import rslora_jax as rl
      >>> params = rl.LoraParams({"w": 1.0}, {"w": {"a": 1.0, "b": 2.0}})
      >>> apply_updates(params, {"w": {"a": 0.5, "b": 0.5}}).lora["w"]["b"].item()
      2.5
    """
    lora = updates.lora if isinstance(updates, LoraParams) else updates
    return params._replace(lora=optax.apply_updates(_whole(params).lora, lora))


def trainable_mask(params: LoraParams) -> LoraParams:
    """True for every factor, False for the base: the polarity of this library.

    Example:
      >>> import rslora_jax as rl
      >>> trainable_mask(rl.LoraParams({"w": 1.0}, {"w": {"a": 1.0, "b": 1.0}}))
      LoraParams(base={'w': False}, lora={'w': {'a': True, 'b': True}})
    """
    base, lora = _whole(params)
    return LoraParams(jax.tree.map(lambda _: False, base), jax.tree.map(lambda _: True, lora))


def labels(params: PyTree) -> PyTree:
    """Names each leaf ``"a"``, ``"b"`` or ``"base"``, for `optax.partition`.

    Args:
      params: a `LoraParams`, or the adapter tree alone.

    Returns:
      A tree of strings.

    Example:
      >>> labels({"w": {"a": 1.0, "b": 1.0}})
      {'w': {'a': 'a', 'b': 'b'}}
    """
    if isinstance(params, LoraParams):
        return LoraParams(jax.tree.map(lambda _: "base", params.base), labels(params.lora))
    return jax.tree_util.tree_map_with_path(_factor_name, params)


def lora_plus(
    learning_rate: optax.ScalarOrSchedule,
    ratio: float = 16.0,
    optimizer: Callable[..., optax.GradientTransformation] = optax.adamw,
) -> optax.GradientTransformationExtraArgs:
    """LoRA+ (Hayou et al. 2024, arXiv 2402.12354): `b` learns `ratio` times as fast as `a`.

    Args:
      learning_rate: of `a`: a number or an Optax schedule.
      ratio: the learning rate of `b` over that of `a`; the paper recommends about 16.
      optimizer: makes a transform from a learning rate.

    Returns:
      A transform for `LoraParams`, frozen by `freeze_base`.

    Raises:
      AdapterError: if `ratio` is not above 0.

    Example:
      >>> import jax.numpy as jnp, optax, rslora_jax as rl
      >>> params = rl.LoraParams({"w": 1.0}, {"w": {"a": jnp.ones(1), "b": jnp.ones(1)}})
      >>> tx = lora_plus(0.1, ratio=4.0, optimizer=optax.sgd)
      >>> updates, _ = tx.update(params.lora, tx.init(params), params)
      >>> [round(float(updates["w"][name][0]), 3) for name in "ab"]
      [-0.1, -0.4]
    """
    if not ratio > 0:
        raise AdapterError(f"lora_plus needs a ratio above 0, found {ratio!r}.")

    def faster(step: Any) -> Any:
        return ratio * learning_rate(step)  # pyright: ignore[reportCallIssue]

    rate_b = faster if callable(learning_rate) else ratio * learning_rate
    parts: dict[Hashable, optax.GradientTransformation] = {
        "a": optimizer(learning_rate),
        "b": optimizer(rate_b),
    }
    return freeze_base(optax.partition(parts, labels))


def _lora(params: Any) -> Any:
    """The adapter tree of a `LoraParams`; an adapter tree, as a nested `freeze_base` gets it."""
    if isinstance(params, LoraParams):
        return params.lora
    keyed = jax.tree_util.tree_leaves_with_path(params)
    names = {getattr(keys[-1], "key", None) if keys else None for keys, _ in keyed}
    return params if names == {"a", "b"} else _whole(params).lora


def _factor_name(keys: tuple[Any, ...], _: Any) -> str:
    name = getattr(keys[-1], "key", None) if keys else None
    if name not in ("a", "b"):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        raise AdapterError(f"labels needs a LoraParams or its adapter tree; {path!r} is no factor.")
    return name


def _whole(params: Any) -> LoraParams:
    if not isinstance(params, LoraParams):
        raise AdapterError(
            f"This needs the LoraParams that `adapt` returned, found {type(params).__name__}: "
            "a mask or optimizer of anything else could train the base."
        )
    return params


def _nothing(update: Any) -> Any:
    """The update that changes no bit: -0.0 + -0.0 is -0.0, whereas -0.0 + 0.0 is 0.0."""
    return jnp.full_like(update, -0.0)
