"""Tracing: evaluates a jaxpr with some weights held as base + low-rank factors.

A `Held` weight travels through the program in place of its array. Two tables say what each
primitive does with it (`rewrites` for mathematics, `control` for control flow); everything
that no held weight enters is bound unchanged.
While the factors are absent the same walk *discovers*: it reports each use of a weight.

All knowledge of how JAX versions differ lives in this file.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jax.extend import source_info_util
from jax.extend.core import DropVar, Jaxpr, JaxprEqn, Literal, Var

from rslora_jax.deferred import Deferred, form, put_off, transposed
from rslora_jax.factors import Factor
from rslora_jax.paths import AdapterError

__all__ = [
    "Cut",
    "Held",
    "Unsupported",
    "Walk",
    "beside",
    "bind",
    "describe_use",
    "evaluate",
    "open_jaxpr",
    "scan_counts",
    "settle",
    "where",
]

Rule: TypeAlias = Callable[..., Any]
View: TypeAlias = tuple[frozenset[int], ...]

EACH = ("convert_element_type", "copy", "copy_p", "name", "neg", "stop_gradient")
"""Primitives that treat every entry of their one operand alike."""

FOREIGN = ("jax", "jaxlib", "flax", "haiku", "equinox", "rslora_jax")


class Unsupported(Exception):
    """Raised by a rule: this use has no low-rank form, for the reason given."""


class Cut(NamedTuple):
    """A weight that differs from device to device inside a shard_map.

    Attributes:
      name: the mesh axis that the devices lie along.
      view: the axes of the weight that are shared out among them.
      owners: which of the factors differ, by position.
    """

    name: str
    view: frozenset[int]
    owners: frozenset[int]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Held:
    """A weight, or a view of it, as base + scale * (factors multiplied over the rank).

    Attributes:
      base: the array, transformed just as the program transforms it; of a quantized weight
        what is still to be done, `Deferred`.
      factors: `a` and `b`, labelled by the axes of `base`; ``()`` while discovering, and for a
        quantized weight without an adapter.
      path: the weight's path.
      view: for each axis of `base`, the axes of the weight that it came from.
      scale: the site's scale.
      merge: form the whole weight for a use that has no low-rank form.
      rows: the axes of the weight that rows were picked along, where the result may be an
        activation; empty for a weight.
      cuts: the mesh axes that cut it, inside a shard_map.
    """

    base: Any
    factors: tuple[Factor, ...]
    path: str = dataclasses.field(metadata={"static": True})
    view: View = dataclasses.field(metadata={"static": True})
    scale: float = dataclasses.field(metadata={"static": True}, default=1.0)
    merge: bool = dataclasses.field(metadata={"static": True}, default=False)
    rows: frozenset[int] = dataclasses.field(metadata={"static": True}, default=frozenset())
    cuts: tuple[Cut, ...] = dataclasses.field(metadata={"static": True}, default=())


@dataclasses.dataclass(frozen=True)
class Walk:
    """What one walk over a program carries along.

    Attributes:
      rules: primitive name -> ``rule(walk, eqn, *operands) -> result(s)``.
      control: primitive name -> ``rule(walk, eqn, operands, needed) -> results``, where
        `needed` says which results are used.
      whole: forms base + delta of a `Held`.
      record: called as ``record(walk, held, eqn, kind, roles, whole=..., reason=...)``
        while discovering; it returns the name of the use.
      memo: rebuilt functions, so that a function used twice is traced once.
      inside: the walk is inside a function with a derivative rule of its own.
      callers: the equations around the present program, outermost first.
      forks: the activations of the present program that `beside` was asked for, by id.
    """

    rules: Mapping[str, Rule]
    control: Mapping[str, Rule]
    whole: Callable[[Held], jax.Array]
    record: Callable[..., str] | None = None
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict)
    inside: bool = False
    callers: tuple[JaxprEqn, ...] = ()
    forks: dict[int, tuple[Any, Any]] = dataclasses.field(default_factory=dict)

    @property
    def discovering(self) -> bool:
        """Whether uses are reported, and nothing is adapted."""
        return self.record is not None


def evaluate(
    walk: Walk, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], wanted: Any = None
) -> list[Any]:
    """Evaluates `jaxpr` on arrays and `Held` weights.

    Args:
      walk: rules and policy.
      jaxpr: the program, without its constants.
      consts: values of ``jaxpr.constvars``.
      args: values of ``jaxpr.invars``: arrays or `Held`.
      wanted: which outputs are needed (a tuple of bools); None means all. What only
        serves the others is not evaluated.

    Returns:
      The outputs; a `Held` that reaches an output stays one, an unwanted output is None.
    """
    walk = dataclasses.replace(walk, forks={})
    wanted = tuple(wanted) if wanted is not None else (True,) * len(jaxpr.outvars)
    env: dict[Var, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    outer = source_info_util.current_name_stack()
    for eqn, needed in _live(jaxpr, wanted):
        stack = outer + eqn.source_info.name_stack
        traceback = eqn.source_info.traceback
        with source_info_util.user_context(traceback, name_stack=stack), eqn.ctx.manager:
            results = _step(walk, eqn, [_read(env, v) for v in eqn.invars], needed)
        env.update(zip(eqn.outvars, results, strict=True))
    walk.forks.clear()
    return [_read(env, v) if want else None for v, want in zip(jaxpr.outvars, wanted, strict=True)]


def beside(walk: Walk, x: Any) -> Any:
    """An activation as the factors see it: the same numbers under a name of their own.

    All products with factors that share `x` get the same one, so that their gradients into it
    are summed apart from those of the weights. On a mesh each gradient through a split weight
    is a sum over devices: XLA communicates once for all that are added to one another, and
    would for each of them with a gradient through factors, which is complete, in between. An
    activation that a backward pass keeps for another use too is kept twice where XLA does not
    see that they are one (on a CPU, in a scan without remat; the TPU's does).
    """
    if not isinstance(x, Tracer):
        return x
    if id(x) not in walk.forks:
        walk.forks[id(x)] = x, jnp.copy(x)
    return walk.forks[id(x)][1]


def settle(walk: Walk, eqn: Any, value: Any, reason: str = "", kind: str = "opaque") -> Any:
    """The array that `value` stands for, where a `Held` cannot go on.

    Args:
      walk: rules and policy.
      eqn: the equation that needs it, for messages; None for the function's output.
      value: an array, or a `Held`.
      reason: why the low-rank form ends here.
      kind: ``"opaque"``, ``"lookup"`` or ``"output"``.

    Raises:
      AdapterError: if the use is opaque and the site is not to be merged.
    """
    if not isinstance(value, Held):
        return value
    if walk.discovering:
        return _discovered(walk, eqn, value, reason, kind)
    if not value.factors:
        return form(value.base)
    if kind == "opaque" and not (value.merge or value.rows):
        ask = "Exclude it" if reason else "Adapt with an example call that shows this use"
        raise AdapterError(
            f"{value.path!r} has an adapter, but {describe_use(walk, eqn, reason)} uses the weight "
            f"in a way that has no low-rank form. {ask}, or set LoraConfig(unsupported='merge')."
        )
    return walk.whole(value)


def open_jaxpr(closed: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """A jaxpr and its constants; newer JAX keeps both in one class."""
    return getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())


def scan_counts(eqn: JaxprEqn) -> tuple[int, int]:
    """How many operands of a `scan` are constants, and how many are carried."""
    params = eqn.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def where(walk: Walk, eqn: JaxprEqn) -> str:
    """The user's file, line and function behind an equation, or behind its nearest caller."""
    for at in (eqn, *reversed(walk.callers)):
        for frame in _frames(at):
            if not frame.file_name.startswith(_foreign()):
                return _place(frame)
    library = [f for f in _frames(eqn) if "jax" not in Path(f.file_name).parts]
    return _place(library[0]) if library else "an unknown line"


@functools.cache
def _foreign() -> tuple[str, ...]:
    """Where the libraries lie whose frames are not the user's."""
    specs = [importlib.util.find_spec(name) for name in FOREIGN]
    folders = [f for spec in specs if spec for f in spec.submodule_search_locations or ()]
    return (*(f"{folder}{os.sep}" for folder in folders), contextlib.__file__)


def _frames(eqn: JaxprEqn) -> Sequence[Any]:
    traceback = eqn.source_info.traceback
    return () if traceback is None else traceback.frames


def _place(frame: Any) -> str:
    file = "/".join(Path(frame.file_name).parts[-2:])
    return f"{file}:{frame.line_num} ({frame.function_name})"


def describe_use(walk: Walk, eqn: Any, reason: str) -> str:
    """`primitive` at file:line, and why it has no low-rank form."""
    if eqn is None:
        return "the function's output"
    return f"`{eqn.primitive.name}` at {where(walk, eqn)}" + (f" ({reason})" if reason else "")


def _read(env: dict[Var, Any], var: Any) -> Any:
    return var.val if isinstance(var, Literal) else env[var]


def _live(jaxpr: Jaxpr, wanted: tuple[bool, ...]) -> list[tuple[JaxprEqn, tuple[bool, ...]]]:
    """The equations that the wanted outputs need, with which of their results are used."""
    used = {v for v, want in zip(jaxpr.outvars, wanted, strict=True) if want and isinstance(v, Var)}
    live: list[tuple[JaxprEqn, tuple[bool, ...]]] = []
    for eqn in reversed(jaxpr.eqns):
        needed = tuple(not isinstance(v, DropVar) and v in used for v in eqn.outvars)
        if any(needed) or eqn.effects:
            live.append((eqn, needed))
            used.update(v for v in eqn.invars if isinstance(v, Var))
    return live[::-1]


def _step(walk: Walk, eqn: JaxprEqn, args: list[Any], needed: tuple[bool, ...]) -> list[Any]:
    if not any(isinstance(arg, Held) for arg in args):
        return bind(eqn, args)
    name = eqn.primitive.name
    try:
        if name in walk.control:
            return walk.control[name](walk, eqn, _typed(eqn, args), needed)
        if name in walk.rules:
            results = walk.rules[name](walk, eqn, *args)
            return list(results) if eqn.primitive.multiple_results else [results]
        reason = ""
    except Unsupported as error:
        reason = str(error)
    return bind(eqn, [settle(walk, eqn, arg, reason) for arg in args])


def _typed(eqn: JaxprEqn, args: list[Any]) -> list[Any]:
    """Literals as arrays: a rebuilt loop or call must not see Python numbers."""
    avals: list[Any] = [v.aval for v in eqn.invars]
    literal = [isinstance(v, Literal) for v in eqn.invars]
    return [
        jnp.asarray(arg, aval.dtype) if fixed else arg
        for arg, aval, fixed in zip(args, avals, literal, strict=True)
    ]


def bind(eqn: JaxprEqn, args: Sequence[Any]) -> list[Any]:
    """Binds an equation's primitive unchanged; what it does to a deferred weight is put off."""
    if any(isinstance(arg, Deferred) for arg in args):
        return _put_off(eqn, args)
    params = eqn.primitive.get_bind_params(eqn.params)
    results = eqn.primitive.bind(*args, **params)
    return list(results) if eqn.primitive.multiple_results else [results]


def _put_off(eqn: JaxprEqn, args: Sequence[Any]) -> list[Any]:
    base, *others = (arg for arg in args if isinstance(arg, Deferred))
    turning = eqn.primitive.name == "transpose"
    turned = transposed(base, eqn.params["permutation"]) if turning else None
    if turned is not None:
        return [turned]
    args = [form(arg) if any(arg is other for other in others) else arg for arg in args]
    each = eqn.primitive.name in EACH
    results = range(len(eqn.outvars))
    return [put_off(base, functools.partial(_result, eqn, k), args, each=each) for k in results]


def _result(eqn: JaxprEqn, number: int, *args: Any) -> Any:
    return bind(eqn, args)[number]


def _discovered(walk: Walk, eqn: Any, held: Held, reason: str, kind: str) -> Any:
    assert walk.record is not None
    if kind == "opaque" and held.rows:
        kind, reason = "lookup", ""
    name = walk.record(walk, held, eqn, kind, (), reason=reason)
    if kind == "output":
        return held.base
    return checkpoint_name(held.base, name)
