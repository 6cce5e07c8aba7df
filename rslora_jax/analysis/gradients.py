"""Gradients: every magnitude of one training step, per module, in one compiled pass.

`gradient_report` differentiates a loss once, with taps beside the factors (see
`rslora_jax.taps`): gradients, activations and the gradients into them come out of the same
backward pass. No array of the size of a weight is formed, except where `weights=True` asks
for the gradient of the weights themselves.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rslora_jax.analysis import magnitudes
from rslora_jax.analysis.magnitudes import Quantities
from rslora_jax.factors import LoraParams, factors_of
from rslora_jax.formats import formed
from rslora_jax.paths import AdapterError, flatten, unflatten
from rslora_jax.sites import Site
from rslora_jax.tables import Table
from rslora_jax.taps import tap, untap

__all__ = ["ADAM_EPS", "GradientReport", "gradient_report"]

ADAM_EPS = 1e-8
"""Adam's usual eps: entries of a gradient below it hardly move their parameter."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradientReport:
    """Magnitudes of one step: per module, their mean, and global norms.

    NaN stands for what the step did not show, such as the inputs of an embedding.

    Attributes:
      loss: the loss, a scalar.
      modules: ``{path: {quantity: [b..]}}``, one entry for each module of the site.
        ``grad_a``, ``grad_b``: Frobenius norms; ``grad_a_rms``, ``grad_b_rms``: per entry;
        ``below_eps_a``, ``below_eps_b``: share of entries smaller than eps;
        ``nonfinite``: entries of both gradients that are NaN or infinite;
        ``output_1``, ``output_2``, ``output_4``: mean of |adapter output|^m, and its
        ``output_rms``, ``base_rms`` (of the base output), ``output_ratio`` (between them)
        and ``output_cosine``; ``output_grad_rms``; ``input_rms``;
        ``input_grad_1``, ``_2``, ``_4`` and ``input_grad_rms``: of the gradient that the
        adapter sends into its input; ``delta``, ``delta_2``: Frobenius and spectral norm of
        scale * a @ b; ``delta_ratio``: delta over the norm of W; ``signal``: <dW, -G>, how
        far the change has gone along the gradient G of the weight;
        ``intrinsic_dim``: r* = tr S / |S| of the inputs' second moment S.
        With `tx`: ``update_a``, ``update_b``, ``update_ratio_a``, ``update_ratio_b`` (over
        the norm of the factor), ``update_ratio`` (the change of scale * a @ b over the norm
        of W), ``predicted_change`` of the loss, <g, u>.
        With `weights`: ``weight_grad`` |G|, ``signal_share`` signal / |G|^2, and
        ``captured``: the share of |G|^2 that a step of the factors can follow.
      means: the mean over all modules of each quantity: for ``grad_b`` the "average
        parameter gradient norm" of arXiv 2312.03732, figure 3.
      totals: ``grad``, ``grad_a``, ``grad_b`` (and ``update``): norms over all factors;
        ``signal`` and ``predicted_change``: sums; ``nonfinite``: a count.
    """

    loss: jax.Array
    modules: dict[str, Quantities]
    means: Quantities
    totals: Quantities

    def table(self) -> Table:
        """One row for each module: its path, its index in the stack, its quantities."""
        rows = []
        for path, found in self.modules.items():
            arrays = {name: np.asarray(value) for name, value in found.items()}
            for index in np.ndindex(next(iter(arrays.values())).shape):
                cells = {name: _or_none(array[index]) for name, array in arrays.items()}
                rows.append({"path": path, "index": "/".join(map(str, index)), **cells})
        return Table.of(rows)

    def __str__(self) -> str:
        """The means over the modules of each site, the means of all, and the totals."""
        rows = [(path, found) for path, found in self.modules.items()]
        shown = [name for name in SHOWN if name in self.means]
        table = Table.of(
            {"path": path, **{name: _or_none(_mean([found[name]])) for name in shown}}
            for path, found in [*rows, ("mean of modules", self.means)]
        )
        totals = ", ".join(f"{name} {float(value):.4g}" for name, value in self.totals.items())
        lines = [f"{table}", f"loss {float(self.loss):.6g}; total {totals}", *self._warnings()]
        return "\n".join(lines)

    def _warnings(self) -> list[str]:
        if not self.totals["nonfinite"]:
            return []
        paths = [path for path, found in self.modules.items() if np.any(found["nonfinite"])]
        return [f"not finite: gradients of {', '.join(paths)}; the first step to look at is this"]


SHOWN = (
    *("grad_a", "grad_b", "below_eps_b", "output_rms", "output_ratio", "input_grad_rms"),
    *("delta", "delta_2", "delta_ratio", "signal", "intrinsic_dim"),
    *("update_ratio", "predicted_change", "weight_grad", "captured"),
)
"""What the printed report shows, in this order; `GradientReport.table` holds everything."""


def gradient_report(
    loss_fn: Callable[..., jax.Array],
    params: LoraParams,
    sites: Sequence[Site],
    *args: Any,
    tx: optax.GradientTransformation | None = None,
    state: Any = None,
    eps: float = ADAM_EPS,
    weights: bool = False,
) -> GradientReport:
    """Measures one step of training: gradients, activations, the change so far, the update.

    One jit-compiled pass; a second call with the same functions and shapes compiles nothing.

    Args:
      loss_fn: ``loss_fn(params, *args) -> scalar``, using the `apply` of `adapt`.
      params: base and factors.
      sites: what `adapt` returned.
      *args: the other arguments of `loss_fn`, such as a batch.
      tx: an Optax transform whose own update is to be measured too.
      state: its state; None for a fresh one.
      eps: the size below which an entry of a gradient counts as lost to Adam.
      weights: form the gradient of each whole weight too, for ``weight_grad``,
        ``signal_share`` and ``captured``.

    Returns:
      A `GradientReport`, which is a pytree of arrays.

    Raises:
      AdapterError: without sites, if the factors do not fit them, or for a loss that is no
        scalar.

    Example:
      >>> import jax, jax.numpy as jnp, rslora_jax as rl
      >>> model = lambda p, x: jnp.tanh(x @ p["w"]) @ p["head"]
      >>> base = {"w": jnp.ones((4, 8)) / 4, "head": jnp.ones((8, 2)) / 8}
      >>> config = rl.LoraConfig(rank=2, alpha=4.0)
      >>> x = jnp.eye(4)
      >>> params, apply, sites = rl.adapt(model, base, x, config=config, key=jax.random.key(0))
      >>> loss_fn = lambda p, x: jnp.mean(apply(p, x) ** 2)
      >>> report = gradient_report(loss_fn, params, sites, x)
      >>> float(report.modules["w"]["grad_a"]), round(float(report.means["intrinsic_dim"]))
      (0.0, 4)
    """
    if not sites:
        raise AdapterError("gradient_report needs at least one site, found none. Adapt a weight.")
    if not isinstance(params, LoraParams):
        raise AdapterError(
            "gradient_report takes the LoraParams that `adapt` returned as `params`, found "
            f"{type(params).__name__}."
        )
    factors_of(params.lora, sites)
    _check_scalar(loss_fn, params, args)
    if tx is not None and state is None:
        state = tx.init(params.lora)
    return _report(_Request(loss_fn, tuple(sites), tx, weights), params, args, state, eps)


class _Request(NamedTuple):
    """What is static about a report."""

    loss_fn: Callable[..., jax.Array]
    sites: tuple[Site, ...]
    tx: optax.GradientTransformation | None
    weights: bool


@partial(jax.jit, static_argnums=0)
def _report(request: _Request, params: LoraParams, args: Any, state: Any, eps: Any) -> Any:
    loss_fn, sites, tx, weights = request
    flat = flatten(params.base)
    leaves = dict(zip(flat.paths, flat.leaves, strict=True))
    matrices = {site.path: formed(leaves[site.path]) for site in sites}

    def loss(lora: Any, chosen: Mapping[str, Any]) -> jax.Array:
        base = unflatten(flat, [chosen.get(path, leaves[path]) for path in flat.paths])
        return loss_fn(params._replace(base=base, lora=lora), *args)

    wanted = (0, 1) if weights else (0,)
    tapped = tap(params.lora, sites, spectral=True)
    value, (grads, *more) = jax.value_and_grad(loss, wanted)(tapped, matrices if weights else {})
    grads, taps = untap(grads, sites)
    updates: Any = {}
    if tx is not None:
        extended = optax.with_extra_args_support(tx)
        updates, _ = extended.update(grads, state, params.lora, value=value, grad=grads)
    lora, slopes, moved = (factors_of(tree, sites) for tree in (params.lora, grads, updates))
    modules: dict[str, Quantities] = {}
    for site in sites:
        here, weight = (site, lora[site.path], slopes[site.path]), matrices[site.path]
        modules[site.path] = {
            **magnitudes.gradients(site, slopes[site.path], eps),
            **magnitudes.activations(taps[site.path]),
            **magnitudes.change(*here, weight),
            **(magnitudes.update(*here, moved[site.path], weight) if moved else {}),
            **(magnitudes.captured(*here, more[0][site.path]) if more else {}),
        }
    names = dict.fromkeys(name for found in modules.values() for name in found)
    means = {name: _mean([found[name] for found in modules.values()]) for name in names}
    return GradientReport(value, modules, means, _totals(modules))


def _mean(arrays: Sequence[Any]) -> jax.Array:
    """The mean over all modules that show the quantity."""
    return jnp.nanmean(jnp.concatenate([jnp.ravel(array) for array in arrays]))


def _totals(modules: Mapping[str, Quantities]) -> Quantities:
    def total(name: str) -> jax.Array:
        return sum((found[name].sum() for found in modules.values()), jnp.zeros(()))

    def norm(*names: str) -> jax.Array:
        squares = ((found[n] ** 2).sum() for found in modules.values() for n in names)
        return jnp.sqrt(sum(squares, jnp.zeros(())))

    found = {
        "grad": norm("grad_a", "grad_b"),
        "grad_a": norm("grad_a"),
        "grad_b": norm("grad_b"),
        "signal": total("signal"),
        "nonfinite": total("nonfinite"),
    }
    if "update_a" in next(iter(modules.values())):
        found["update"] = norm("update_a", "update_b")
        found["predicted_change"] = total("predicted_change")
    return found


def _check_scalar(loss_fn: Callable[..., Any], params: LoraParams, args: Any) -> None:
    found = jax.eval_shape(loss_fn, params, *args)
    if getattr(found, "shape", None) != ():
        shapes = jax.tree.map(lambda x: x.shape, found)
        raise AdapterError(
            f"gradient_report needs a loss that is one scalar, found shapes {shapes}. Take the "
            "mean in loss_fn, and leave auxiliary outputs out."
        )


def _or_none(value: Any) -> float | None:
    number = float(value)
    return None if np.isnan(number) else number
