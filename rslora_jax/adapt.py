"""Adapt: the front door, which puts adapters on a model without touching it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rslora_jax.config import LoraConfig
from rslora_jax.deferred import Deferred
from rslora_jax.discover import sites_of
from rslora_jax.factors import LoraParams, factors_of, init, init_abstract, labelled
from rslora_jax.paths import AdapterError, flatten
from rslora_jax.program import Program, capture, capture_example
from rslora_jax.quantized import is_quantized
from rslora_jax.rewrites import new_walk
from rslora_jax.sites import Site, Sites
from rslora_jax.targets import choose
from rslora_jax.tracing import Held, evaluate, settle

__all__ = ["Adapted", "adapt", "attach", "value_and_grad"]


class Adapted(NamedTuple):
    """A model with adapters.

    Attributes:
      params: the caller's tree beside the factors.
      apply: ``apply(params, *args, **kwargs)``, with the outputs of the original function.
      sites: what was adapted, and how.
    """

    params: LoraParams
    apply: Callable[..., Any]
    sites: Sites


def adapt(
    apply_fn: Callable[..., Any],
    params: Any,
    *example_args: Any,
    config: LoraConfig,
    key: jax.Array,
    **example_kwargs: Any,
) -> Adapted:
    """Adds rank-stabilized LoRA adapters to any model, given as a pure function.

    The function is traced to see how it uses each weight. `Adapted.apply` evaluates that
    trace with ``x W + scale * (x a) b`` at every product of an adapted weight; the sum
    W + scale * a @ b is never formed, and the base gets no gradient.

    Args:
      apply_fn: ``apply_fn(params, *args, **kwargs)``, jitted or not.
      params: its parameter pytree. With `jax.ShapeDtypeStruct`s in it nothing is computed,
        and the factors are structs too.
      *example_args: example arguments, concrete or abstract; shapes may differ later.
      config: which weights, of what rank and scale.
      key: a typed PRNG key for the factors.
      **example_kwargs: example keyword arguments; values that are no arrays are static.

    Returns:
      `Adapted(params, apply, sites)`.

    Raises:
      AdapterError: if the request and the model do not fit: a target that matches nothing
        or cannot be adapted, parameters that do not match the example call, and so on.

    Example:
      >>> import jax, jax.numpy as jnp, rslora_jax as rl
      >>> base = {"w": jnp.ones((4, 8)), "head": jnp.ones((8, 2))}
      >>> model = lambda p, x: jnp.tanh(x @ p["w"]) @ p["head"]
      >>> config = rl.LoraConfig(rank=2, alpha=4.0)
      >>> params, apply, sites = rl.adapt(
      ...     model, base, jnp.ones((3, 4)), config=config, key=jax.random.key(0)
      ... )
      >>> print(sites)
      path  axes  shape  by          rank  alpha  scale  a    b    parameters
      w     io    4x8    all-linear  2     4      2.828  4x2  2x8  24
      trainable parameters: 24 of 72 (33.33 %) in 1 sites
      left alone, not targeted (head): head
      >>> apply(params, jnp.ones((3, 4))).shape
      (3, 2)
    """
    _check_call(config, key)
    program = capture_example(apply_fn, params, example_args, example_kwargs)
    sites = choose(sites_of(program, inner=isinstance(params, LoraParams)), config)
    structs = init_abstract(sites, config)
    jax.eval_shape(
        lambda weights, lora, inputs: _run(program, sites, lora, weights, inputs),
        [program.base.leaves[k] for k in program.weights],
        structs,
        program.inputs,
    )
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
    lora = structs if abstract else init(key, sites, config)
    return Adapted(LoraParams(params, lora), attach(apply_fn, sites), sites)


def attach(apply_fn: Callable[..., Any], sites: Sequence[Site]) -> Callable[..., Any]:
    """The function that applies adapters whose sites are known already.

    `adapt` finds sites and makes factors for them; `attach` serves sites and factors that
    were loaded, restored or computed.

    Args:
      apply_fn: ``apply_fn(params, *args, **kwargs)``, the original function.
      sites: sites with ranks and scales.

    Returns:
      ``apply(params, *args, **kwargs)`` of a `LoraParams`, with the outputs of `apply_fn`.
      It raises an AdapterError when called with factors or a base that the sites do not fit.

    Raises:
      AdapterError: if a site has no rank, or two sites are one weight.

    Example:
      >>> import jax.numpy as jnp, rslora_jax as rl
      >>> site = rl.Site("w", "io", (2, 2), "float32", rank=1, alpha=2.0, scale=2.0)
      >>> lora = {"w": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}
      >>> apply = attach(lambda p, x: x @ p["w"], [site])
      >>> apply(rl.LoraParams({"w": jnp.zeros((2, 2))}, lora), jnp.ones((1, 2))).tolist()
      [[4.0, 4.0]]
    """
    _check_sites(sites)

    def apply(params: LoraParams, *args: Any, **kwargs: Any) -> Any:
        """The original function, with the adapters of `params` applied."""
        if not isinstance(params, LoraParams):
            raise AdapterError(
                f"apply takes the LoraParams that `adapt` returned, found {_kind(params)}. "
                "For the base model alone pass LoraParams(base, {})."
            )
        if not params.lora and not any(map(is_quantized, flatten(params.base).leaves)):
            return apply_fn(params.base, *args, **kwargs)
        program = capture(apply_fn, params.base, args, kwargs)
        weights = [program.base.leaves[k] for k in program.weights]
        return program.rebuild(_run(program, sites, params.lora, weights, program.inputs))

    return apply


def value_and_grad(loss_fn: Callable[..., Any], has_aux: bool = False) -> Callable[..., Any]:
    """Like `jax.value_and_grad`, for the adapters only: the base gets no gradient at all.

    Args:
      loss_fn: ``loss_fn(params, *args, **kwargs)`` of a `LoraParams`, giving a scalar.
      has_aux: the loss comes with auxiliary data, as in JAX.

    Returns:
      A function with the arguments of `loss_fn` that gives ``(value, grads)``, where
      `grads` has the structure of ``params.lora``.

    Raises:
      AdapterError: when called with anything but a `LoraParams` that holds adapters.

    Example:
      >>> import jax.numpy as jnp, rslora_jax as rl
      >>> params = rl.LoraParams({"w": jnp.ones(3)}, {"w": {"a": jnp.ones(2), "b": jnp.ones(2)}})
      >>> loss = lambda p, x: x * jnp.vdot(p.lora["w"]["a"], p.lora["w"]["b"]) + p.base["w"].sum()
      >>> value, grads = value_and_grad(loss)(params, 2.0)
      >>> float(value), grads["w"]["a"].tolist()
      (7.0, [2.0, 2.0])
    """

    def function(params: LoraParams, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(params, LoraParams) or not jax.tree.leaves(params.lora):
            raise AdapterError(
                "value_and_grad differentiates the adapters of a LoraParams, found "
                f"{_kind(params)}. Pass the `params` that `adapt` returned."
            )

        def loss(lora: Any) -> Any:
            return loss_fn(params._replace(lora=lora), *args, **kwargs)

        return jax.value_and_grad(loss, has_aux=has_aux)(params.lora)

    return function


def _run(
    program: Program,
    sites: Sequence[Site],
    lora: Any,
    weights: Sequence[Any],
    inputs: Sequence[Any],
) -> list[Any]:
    """The program's outputs, with the sites' weights held as base and factors."""
    factors = factors_of(lora, sites)
    values = {k: weight for k, weight in zip(program.weights, weights, strict=True)}
    places = {path: k for k, path in enumerate(program.base.paths)}
    for site in sites if factors else ():
        place = places.get(site.path, -1)
        _check_base(site, values.get(place))
        values[place] = _held(site, values[place], factors[site.path])
    for place, weight in values.items():
        if is_quantized(weight):
            values[place] = _frozen(program.base.paths[place], weight)
    walk = new_walk()
    operands = [*(values[k] for k in program.weights), *inputs]
    results = evaluate(walk, program.jaxpr, program.consts, operands)
    return [settle(walk, None, result, kind="output") for result in results]


def _held(site: Site, weight: Any, factors: Any) -> Held:
    assert site.scale is not None
    held = _frozen(site.path, weight)
    factors = labelled(site, factors)
    return replace(held, factors=factors, scale=site.scale, merge=site.merge)


def _frozen(path: str, weight: Any) -> Held:
    """A weight without an adapter; only a quantized one needs to be held."""
    view = tuple(frozenset({k}) for k in range(weight.ndim))
    return Held(Deferred(weight) if is_quantized(weight) else weight, (), path, view)


def _check_base(site: Site, weight: Any) -> None:
    found = getattr(weight, "shape", None)
    if found != site.shape:
        raise AdapterError(
            f"The site {site.path!r} needs a base weight of shape {site.shape}, found "
            f"{'none' if found is None else found}. Pass the parameters that were adapted."
        )


def _check_sites(sites: Sequence[Site]) -> None:
    paths = [site.path for site in sites]
    for site in sites:
        if site.rank is None or site.scale is None:
            raise AdapterError(
                f"attach needs sites with ranks and scales, found {site.path!r} without. Pass the "
                "sites that came with the factors; `adapt` gives ranks to sites that were found."
            )
        if paths.count(site.path) > 1:
            raise AdapterError(f"attach needs one site for each weight, found two {site.path!r}.")


def _check_call(config: Any, key: Any) -> None:
    if not isinstance(config, LoraConfig):
        raise AdapterError(f"config must be a LoraConfig, found {_kind(config)}.")
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed or key.shape != ():
        raise AdapterError(
            f"key must be one typed PRNG key, found {_kind(key)}. Make one with jax.random.key(0)."
        )


def _kind(value: Any) -> str:
    if isinstance(value, LoraParams):
        return "a LoraParams without adapters"
    shape = getattr(value, "shape", None)
    return type(value).__name__ + (f" of shape {shape}" if shape is not None else "")
