"""Traces: what is recorded of every step of a run, measured before the step's update."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from rslora_jax import norms
from rslora_jax.paths import AdapterError, lookup, nearest
from rslora_jax.sites import Site
from rslora_jax.taps import SUMS

__all__ = ["ACTIVATIONS", "QUANTITIES", "Moment", "check_quantities", "observe"]

Factors: TypeAlias = Mapping[str, Any]


class Moment(NamedTuple):
    """One step of one run, as the quantities see it.

    Attributes:
      sites: the sites, whose own scales are those of `scaled`.
      loss: the loss of the step's batch.
      lora: the factors before the update.
      scaled: the same with `b` multiplied by the run's scale over the site's.
      grads: the gradients of `lora`.
      updates: the optimizer's own updates of `lora`.
      taps: ``{path: taps}`` as `taps.untap` gives them, where an activation is asked for.
      rank: the run's rank; factors are padded beyond it.
    """

    sites: Sequence[Site]
    loss: jax.Array
    lora: Factors
    scaled: Factors
    grads: Factors
    updates: Factors
    taps: Mapping[str, Any]
    rank: jax.Array

    def mean(self, values: Callable[[Site], jax.Array]) -> jax.Array:
        """The mean over all modules of a quantity [b..] of each site."""
        total = sum(values(site).sum() for site in self.sites)
        return jnp.asarray(total) / norms.module_count(self.sites)

    def total(self, left: Factors, right: Factors, names: str = "ab") -> jax.Array:
        """The inner product of two adapter trees, over the factors in `names`."""
        found = (norms.inner(s, lookup(left, s.path), lookup(right, s.path)) for s in self.sites)
        return jnp.asarray(sum(inner[name].sum() for inner in found for name in names))


def _grad_norm(moment: Moment, name: str) -> jax.Array:
    return moment.mean(lambda s: norms.factor_norm(s, lookup(moment.grads, s.path))[name])


def _grad_b_rms(moment: Moment) -> jax.Array:
    def rms(site: Site) -> jax.Array:
        outputs = math.prod(n for n, axis in zip(site.shape, site.axes, strict=True) if axis == "o")
        norm = norms.factor_norm(site, lookup(moment.grads, site.path))["b"]
        return norm / jnp.sqrt(jnp.asarray(moment.rank * outputs, norm.dtype))

    return moment.mean(rms)


def _rms(moment: Moment, name: str, count: str) -> jax.Array:
    """The root mean square of an activation, the mean over the modules that show it."""
    sums = [moment.taps[site.path]["sums"].reshape(-1, len(SUMS)) for site in moment.sites]
    every = jnp.concatenate(sums)
    return jnp.nanmean(jnp.sqrt(every[:, SUMS.index(name)] / every[:, SUMS.index(count)]))


ACTIVATIONS: dict[str, Callable[[Moment], jax.Array]] = {
    "output_trained": lambda moment: _rms(moment, "output_2", "outputs"),
    "input_grad": lambda moment: _rms(moment, "input_grad_2", "input_grads"),
}
"""What needs taps on the activations: the root mean squares, on the step's own batch, of the
adapters' outputs and of the gradients that they send into their inputs, means over modules."""

QUANTITIES: dict[str, Callable[[Moment], jax.Array]] = {
    "loss": lambda moment: moment.loss,
    "grad_a": lambda moment: _grad_norm(moment, "a"),
    "grad_b": lambda moment: _grad_norm(moment, "b"),
    "grad_b_rms": _grad_b_rms,
    "grad": lambda moment: jnp.sqrt(moment.total(moment.grads, moment.grads)),
    "delta": lambda moment: moment.mean(
        lambda site: norms.delta_norm(site, lookup(moment.scaled, site.path))
    ),
    "signal": lambda moment: -moment.total(moment.lora, moment.grads, "b"),
    "predicted_change": lambda moment: moment.total(moment.grads, moment.updates),
    "update": lambda moment: jnp.sqrt(moment.total(moment.updates, moment.updates)),
}
"""What a sweep records, by name; `grad_a`, `grad_b`, `grad_b_rms` and `delta` are means over
modules, the others are totals. A quantity that is added here can be asked for at once."""


def observe(moment: Moment, quantities: Sequence[str]) -> dict[str, jax.Array]:
    """The quantities asked for, as scalars."""
    known = {**QUANTITIES, **ACTIVATIONS}
    return {name: known[name](moment) for name in quantities}


def check_quantities(quantities: Sequence[str]) -> tuple[str, ...]:
    """The names, with the loss in front.

    Raises:
      AdapterError: for a name that is unknown, with the nearest.

    Example:
      >>> check_quantities(["delta"])
      ('loss', 'delta')
    """
    for name in quantities:
        known = (*QUANTITIES, *ACTIVATIONS)
        if name not in known:
            raise AdapterError(
                f"A sweep cannot record {name!r}. The nearest are {nearest(name, known)}."
            )
    return tuple(dict.fromkeys(("loss", *quantities)))
