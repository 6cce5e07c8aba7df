"""Training: one run of a sweep as a pure function of its numbers, so that `vmap` makes many."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rslora_jax.analysis.sweeps.batches import Batches
from rslora_jax.analysis.sweeps.runs import RunData
from rslora_jax.analysis.sweeps.traces import ACTIVATIONS, Moment, observe
from rslora_jax.config import LoraConfig
from rslora_jax.factors import LoraParams, init
from rslora_jax.paths import insert, lookup
from rslora_jax.sites import Site
from rslora_jax.taps import tap, untap

__all__ = ["Plan", "draw", "train", "with_scale"]

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Plan:
    """What all runs of a sweep share and no run can change.

    Attributes:
      loss_fn: ``loss_fn(params, batch) -> scalar``.
      sites: the sites; their ranks are the padded sizes.
      optimizer: makes an Optax transform from a learning rate.
      config: how factors at the padded size start.
      quantities: what is recorded.
      keep: the trained factors are wanted.
    """

    loss_fn: Callable[[LoraParams, Any], Any]
    sites: Sequence[Site]
    optimizer: Callable[[Any], optax.GradientTransformation]
    config: LoraConfig
    quantities: tuple[str, ...]
    keep: bool = False

    @property
    def tapped(self) -> bool:
        """Whether an activation is to be recorded."""
        return not ACTIVATIONS.keys().isdisjoint(self.quantities)


def draw(plan: Plan, seeds: Sequence[int]) -> dict[str, Any]:
    """The random `a` of every seed at the padded size, by path: [seeds, b.., i.., r].

    They are drawn before the sweep is compiled, by programs that `adapt` compiled before: in
    the sweep's own program, random numbers would take longer to compile than all the rest.
    """
    every = [init(jax.random.key(seed), plan.sites, plan.config) for seed in seeds]
    return {
        site.path: np.stack([np.asarray(lookup(lora, site.path)["a"]) for lora in every])
        for site in plan.sites
    }


def train(
    plan: Plan, base: PyTree, draws: dict[str, Any], batches: Batches, run: RunData
) -> tuple[dict[str, Any], Any]:
    """All steps of one run.

    Args:
      plan: what the runs share.
      base: the frozen tree.
      draws: what `draw` gave.
      batches: one batch a step, or one for all.
      run: the numbers of this run, possibly traced.

    Returns:
      ``{quantity: [steps]}`` and, if they are to be kept, the factors after the last update,
      rescaled to be used with the sites' own scales.
    """
    tx = optax.with_extra_args_support(plan.optimizer(run.learning_rate))
    lora = _start(plan, draws, run)

    def step(carry: Any, batch: Any) -> Any:
        lora, state = carry
        batch = batches.single if batches.stacked is None else batch
        seen = tap(lora, plan.sites) if plan.tapped else lora
        loss, slopes = jax.value_and_grad(_loss(plan, base, batch, run))(seen)
        grads, taps = untap(slopes, plan.sites)
        updates, state = tx.update(grads, state, lora, value=loss, grad=grads)
        updates = _masked(plan.sites, updates, run.rank)
        scaled = with_scale(plan.sites, lora, run.ratio)
        moment = Moment(plan.sites, loss, lora, scaled, grads, updates, taps, run.rank)
        return (optax.apply_updates(lora, updates), state), observe(moment, plan.quantities)

    (lora, _), seen = jax.lax.scan(step, (lora, tx.init(lora)), batches.stacked, batches.steps)
    return seen, with_scale(plan.sites, lora, run.ratio) if plan.keep else None


def _start(plan: Plan, draws: dict[str, Any], run: RunData) -> dict[str, Any]:
    """The factors of a run: the first columns of the `a` of its seed, and zeros."""
    tree: dict[str, Any] = {}
    for site in plan.sites:
        a = jnp.asarray(draws[site.path])[run.draw]
        a = a * run.start.astype(a.dtype)
        insert(tree, site.path, {"a": a, "b": jnp.zeros(site.factor_shapes[1], a.dtype)})
    return _masked(plan.sites, tree, run.rank)


def with_scale(sites: Sequence[Site], lora: Any, ratio: Any) -> dict[str, Any]:
    """The factors with `b` multiplied by a ratio for each site [sites], which rescales a @ b."""
    ratios = {site.path: ratio[k] for k, site in enumerate(sites)}

    def scaled(site: Site, name: str, factor: Any) -> Any:
        return factor * ratios[site.path].astype(factor.dtype) if name == "b" else factor

    return _map(sites, lora, scaled)


def _loss(plan: Plan, base: PyTree, batch: Any, run: RunData) -> Callable[[Any], Any]:
    def loss(lora: Any) -> Any:
        return plan.loss_fn(LoraParams(base, with_scale(plan.sites, lora, run.ratio)), batch)

    return loss


def _masked(sites: Sequence[Site], lora: Any, rank: Any) -> dict[str, Any]:
    """Zeros beyond the run's rank, whatever an optimizer wrote there."""

    def masked(site: Site, name: str, factor: jax.Array) -> jax.Array:
        axis = factor.ndim - 1 if name == "a" else site.axes.count("b")
        places = jax.lax.broadcasted_iota(jnp.int32, factor.shape, axis)
        return jnp.where(places < rank, factor, jnp.zeros_like(factor))

    return _map(sites, lora, masked)


def _map(sites: Sequence[Site], lora: Any, function: Callable[..., Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for site in sites:
        factors = lookup(lora, site.path)
        insert(tree, site.path, {name: function(site, name, factors[name]) for name in factors})
    return tree
