"""Program: an apply function traced once, with its parameters and arguments laid out flat."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import lax
from jax.core import Tracer

from rslora_jax.paths import AdapterError, Flat, flatten, unflatten
from rslora_jax.quantized import Quantized, struct_of
from rslora_jax.tracing import open_jaxpr

__all__ = ["Program", "all_consts", "capture", "capture_example", "is_array"]


STATIC = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced apply function.

    Attributes:
      jaxpr: the program, without its constants.
      consts: arrays that the function closed over.
      base: the parameters, flat.
      weights: the positions in `base` that are arrays: the first inputs of `jaxpr`.
      inputs: the arrays among the arguments: the other inputs of `jaxpr`.
      rebuild: puts the program's outputs back into the function's own output tree.
    """

    jaxpr: Any
    consts: Sequence[Any]
    base: Flat
    weights: tuple[int, ...]
    inputs: tuple[Any, ...]
    rebuild: Callable[[Sequence[Any]], Any]


def capture(
    apply_fn: Callable[..., Any], params: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Program:
    """Traces ``apply_fn(params, *args, **kwargs)``.

    Arrays and typed keys are traced, whether concrete, abstract or traced already; all other
    leaves of the arguments and parameters stay the Python values that they are.

    Raises:
      AdapterError: if the function uses a traced value as a static one, or leaks tracers.
    """
    base = flatten(params)
    weights = tuple(k for k, leaf in enumerate(base.leaves) if is_array(leaf))
    leaves, treedef = jax.tree.flatten((tuple(args), dict(kwargs)))
    inputs = tuple(k for k, leaf in enumerate(leaves) if is_array(leaf))
    output: dict[str, Any] = {}

    def flat(weight_values: Sequence[Any], input_values: Sequence[Any]) -> list[Any]:
        tree = unflatten(base, _fill(base.leaves, weights, weight_values))
        call_args, call_kwargs = jax.tree.unflatten(treedef, _fill(leaves, inputs, input_values))
        given = (tree, call_args, call_kwargs)
        before = jax.tree.leaves(given)
        results, output["treedef"] = jax.tree.flatten(apply_fn(tree, *call_args, **call_kwargs))
        _refuse_changes(given, before)
        output["arrays"] = [k for k, leaf in enumerate(results) if is_array(leaf)]
        output["leaves"] = [None if is_array(leaf) else leaf for leaf in results]
        return [results[k] for k in output["arrays"]]

    structs = [struct_of(base.leaves[k]) for k in weights]
    closed = _trace(flat, structs, [leaves[k] for k in inputs])
    jaxpr, consts = open_jaxpr(closed)

    def rebuild(values: Sequence[Any]) -> Any:
        filled = _fill(output["leaves"], output["arrays"], values)
        return jax.tree.unflatten(output["treedef"], filled)

    return Program(jaxpr, consts, base, weights, tuple(leaves[k] for k in inputs), rebuild)


def capture_example(
    apply_fn: Callable[..., Any], params: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Program:
    """`capture` for an example call: whatever fails says which call it was.

    Raises:
      AdapterError: if the function fails on these parameters and arguments.
    """
    try:
        return capture(apply_fn, params, args, kwargs)
    except AdapterError:
        raise
    except Exception as error:
        shapes = jax.tree.map(lambda x: getattr(x, "shape", x), (tuple(args), dict(kwargs)))
        paths = flatten(params).paths
        raise AdapterError(
            f"The apply function fails on the example call, with {type(error).__name__}: "
            f"{_first_line(error)}. It was given {len(paths)} parameters "
            f"({', '.join(paths[:4])}{', ...' if len(paths) > 4 else ''}) and arguments of "
            f"shapes {shapes}. Pass the parameters and arguments of one working call."
        ) from error


def all_consts(program: Program) -> list[Any]:
    """The arrays that the function closed over, also inside a jit of its own."""
    params = [value for eqn in program.jaxpr.eqns for value in eqn.params.values()]
    return [*program.consts, *(c for p in params for c in getattr(p, "consts", ()))]


def is_array(leaf: Any) -> bool:
    """Whether a leaf is traced: an array, a quantized weight, a key or an abstract array."""
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct | Quantized)


def _refuse_changes(given: Any, before: list[Any]) -> None:
    """A module or `nnx.Rngs` that the function changes in place would lose the change."""
    stateful = (nnx.Module, nnx.Rngs)
    nodes = jax.tree.leaves(given, is_leaf=lambda node: isinstance(node, stateful))
    changed = any(a is not b for a, b in zip(before, jax.tree.leaves(given), strict=False))
    if changed and any(isinstance(node, stateful) for node in nodes):
        raise AdapterError(
            "The apply function is not pure: it changes an nnx object among its arguments in "
            "place, such as batch statistics or the counters of nnx.Rngs. Pass nnx.split's state "
            "instead, merge it inside the function, and return what changed: nnx.state(model)."
        )


def _fill(leaves: Sequence[Any], places: Sequence[int], values: Sequence[Any]) -> list[Any]:
    filled = list(leaves)
    for place, value in zip(places, values, strict=True):
        filled[place] = value
    return filled


def _trace(flat: Callable[..., Any], weights: list[Any], inputs: list[Any]) -> Any:
    try:
        closed = jax.make_jaxpr(flat)(weights, inputs)
        for const in open_jaxpr(closed)[1]:
            if isinstance(const, Tracer):
                lax.broadcast(const, (1,))  # raises if its trace is over
        return closed
    except jax.errors.UnexpectedTracerError as error:
        raise AdapterError(
            "The apply function is not pure: it used a value left over from an earlier trace "
            "(a leaked tracer), for example one stored in a global, a closure or an object. "
            f"Return such values instead of storing them. JAX says: {_first_line(error)}"
        ) from error
    except TypeError as error:  # ConcretizationTypeError and its kin are TypeErrors
        if not (isinstance(error, STATIC) or "concrete values" in str(error)):
            raise
        raise AdapterError(
            "The apply function uses a traced value as a static one, for example in a Python "
            "`if`. Arrays are traced and plain Python values are static: pass the argument as "
            f"a Python bool, int or str instead of an array. JAX says: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
