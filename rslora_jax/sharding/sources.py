"""Sources: the PartitionSpec of every base weight, from wherever a model keeps it."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
from flax import nnx
from flax.core.meta import AxisMetadata
from flax.linen import logical_to_mesh  # pyright: ignore[reportPrivateImportUsage]
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from rslora_jax.paths import AdapterError, flatten, nearest
from rslora_jax.quantized import Quantized
from rslora_jax.sharding.checks import Placing, check_length
from rslora_jax.sharding.patterns import are_pairs, check_pairs, first_match
from rslora_jax.sharding.policies import entry_names

__all__ = ["AxisRules", "Source", "base_specs", "read_specs"]

Source: TypeAlias = Any
AxisRules: TypeAlias = Sequence[tuple[str, Any]]


def base_specs(
    source: Source, params: Any = None, *, rules: AxisRules | None = None
) -> dict[str, PartitionSpec]:
    """The PartitionSpec of every base weight, by path.

    A weight whose spec is None, and an axis whose entry is None or UNCONSTRAINED, count as not
    sharded: an array that is kept between steps needs a definite place, so nothing is left
    open to the compiler. Arrays on one device, uncommitted arrays, numpy arrays and structs
    without a sharding count as not sharded too.

    Args:
      source: where the specs are read from, one of

        - a tree of PartitionSpecs (`nn.get_partition_spec`, `nnx.get_partition_spec`) or of
          NamedShardings;
        - the parameters themselves, concrete or abstract: a box of Flax (`nn.Partitioned`,
          `nn.LogicallyPartitioned`, an `nnx.Variable`) speaks by its metadata, and any other
          array by its ``.sharding``;
        - ``[(pattern, spec), ...]``: a regex that must match the whole path, of which the first
          match wins. Those of a model family may match nothing in one model. Parameters that
          none matches have no spec; scalars are not sharded.
      params: the base's parameters, if the source is to be held against them: then their
        structures must agree, and every spec is filled up with None to the weight's axes.
        Regex rules need them.
      rules: logical axis rules, ``[("embed", "fsdp"), ...]``, for specs and boxes with logical
        names; they are applied by `nn.logical_to_mesh`. Without them boxes use their own, or
        those of ``with nn.logical_axis_rules(...)``.

    Returns:
      ``{path: PartitionSpec}`` in the order of the source (of `params` for regex rules).

    Raises:
      AdapterError: if the source has another structure than `params`, a spec is longer than
        its weight has axes, no pattern that splits matches a weight, a box has logical names
        without rules, or a sharding has no PartitionSpec.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.ones((4, 8)), "bias": jnp.ones(8)}
      >>> base_specs([(".*w", PartitionSpec("fsdp")), ("bias", None)], params)
      {'bias': P(None,), 'w': P('fsdp', None)}
    """
    if params is None:
        return read_specs(source, None, rules=rules)
    flat = flatten(params)
    shapes = {p: tuple(getattr(x, "shape", ())) for p, x in zip(*flat[:2], strict=True)}
    found = read_specs(source, shapes, rules=rules)
    if are_pairs(source):
        _check_splits(source, found)
        scalars = {path: PartitionSpec() for path, shape in shapes.items() if not shape}
        found = {**scalars, **found}
    else:
        _check_structure(found, shapes, _vague(source))
    return {p: _padded(p, found[p], shape) for p, shape in shapes.items() if p in found}


def read_specs(
    source: Source, paths: Any, *, rules: AxisRules | None = None
) -> dict[str, PartitionSpec]:
    """The specs that a source holds, as they stand there.

    Args:
      source: as in `base_specs`.
      paths: what regex rules are matched with; None where no path is known.
      rules: logical axis rules.
    """
    _check_rules(rules)
    if are_pairs(source):
        return _matched(source, paths, rules)
    nodes = jax.tree_util.tree_leaves_with_path(source, is_leaf=_is_leaf)
    named = ((jax.tree_util.keystr(k, simple=True, separator="/"), node) for k, node in nodes)
    return {path: _plain(_read(path, node, rules)) for path, node in named}


def _matched(source: Any, paths: Any, rules: Any) -> dict[str, PartitionSpec]:
    if paths is None:
        raise AdapterError(
            "Regex rules for base specs need the paths that they are to match. Pass the base's "
            "parameters as well: base_specs(rules, params)."
        )
    # They may be those of a family, of which this model lacks the biases, say.
    check_pairs(source, None, "base spec")
    found = {path: first_match(source, path, _ABSENT) for path in paths}
    return {
        path: _plain(_read(path, spec, rules))
        for path, spec in found.items()
        if spec is not _ABSENT
    }


_ABSENT = object()


def _check_rules(rules: AxisRules | None) -> None:
    for name, value in rules or ():
        if isinstance(value, PartitionSpec):
            raise AdapterError(
                f"rules are logical axis rules, such as ('embed', 'fsdp'), found {(name, value)}. "
                "Pass (pattern, PartitionSpec) pairs as the source."
            )


def _check_splits(pairs: Any, found: dict[str, PartitionSpec]) -> None:
    """A misspelt pattern must not leave every weight whole on every device."""
    wished = [regex for regex, spec in pairs if isinstance(spec, PartitionSpec) and any(spec)]
    if wished and not any(any(spec) for spec in found.values()):
        raise AdapterError(
            f"The patterns {wished} are to split weights, and match none. The nearest to "
            f"{wished[0]!r} are {nearest(wished[0], found)}; a pattern must match a whole path."
        )


def _is_leaf(node: Any) -> bool:
    return node is None or isinstance(node, AxisMetadata | nnx.Variable | PartitionSpec | Quantized)


def _read(path: str, node: Any, rules: AxisRules | None) -> PartitionSpec:
    node = node.values if isinstance(node, Quantized) else node  # of arrays or of shardings
    if node is None:
        return PartitionSpec()
    if isinstance(node, PartitionSpec):
        return _on_mesh(node, rules)
    if isinstance(node, Sharding):
        return _of_sharding(path, node)
    if isinstance(node, AxisMetadata | nnx.Variable):
        return _of_box(path, node, rules)
    if isinstance(node, Tracer):
        return _of_sharding(path, jax.typeof(node).sharding)
    return _read(path, _sharding_of(path, node), rules)


def _sharding_of(path: str, node: Any) -> Sharding | None:
    found = getattr(node, "sharding", None)
    if isinstance(found, Sharding | None) and not isinstance(node, str):
        return found
    raise AdapterError(
        f"The base spec of {path!r} is read from a PartitionSpec, a sharding, an array or a box "
        f"of Flax, found {node!r}."
    )


def _of_sharding(path: str, sharding: Sharding) -> PartitionSpec:
    if isinstance(sharding, NamedSharding):
        return sharding.spec
    if sharding.is_fully_replicated:
        return PartitionSpec()
    raise AdapterError(
        f"The base weight {path!r} has the sharding {sharding!r}, which names no mesh axes. "
        "Place it with a NamedSharding, or pass PartitionSpecs as the source."
    )


def _of_box(path: str, box: Any, rules: AxisRules | None) -> PartitionSpec:
    inner = jax.tree.leaves(box, is_leaf=lambda node: isinstance(node, PartitionSpec | Quantized))
    inside = inner[0] if inner else None
    inside = inside.values if isinstance(inside, Quantized) else inside
    if isinstance(inside, PartitionSpec | Sharding):  # `shardings` and `nnx.get_partition_spec`
        return _read(path, inside, rules)
    if isinstance(box, nnx.Variable):
        names = box.get_metadata().get("out_sharding")
        if isinstance(names, Sharding):
            return _of_sharding(path, names)
        with nn.logical_axis_rules(rules or nn.get_logical_axis_rules()):
            spec = jax.tree.leaves(nnx.get_partition_spec(box))[0] if names else None
        return _read(path, inside, rules) if spec is None else spec
    if isinstance(box, nn.LogicallyPartitioned):
        return _of_logical(path, box, rules)
    if isinstance(box, nn.Partitioned):
        return _on_mesh(box.get_partition_spec(), rules)
    return _read(path, inside, rules)


def _of_logical(path: str, box: Any, rules: AxisRules | None) -> PartitionSpec:
    used = box.rules or rules or nn.get_logical_axis_rules()
    spec = box.get_partition_spec()
    if not used and any(spec):
        raise AdapterError(
            f"The parameter {path!r} has the logical axes {tuple(spec)}, and there are no rules "
            'that map them to mesh axes. Pass rules=[("embed", "fsdp"), ...], or call this '
            "within `with nn.logical_axis_rules(...)`."
        )
    return logical_to_mesh(spec, used)


def _on_mesh(spec: PartitionSpec, rules: AxisRules | None) -> PartitionSpec:
    """Flax replicates a name that no rule lists; a spec without a listed name is no logical one."""
    known = {name for name, _ in rules or ()}
    names = {name for entry in spec if _is_named(entry) for name in entry_names(entry)}
    return logical_to_mesh(spec, rules) if names & known else spec


def _is_named(entry: Any) -> bool:
    return isinstance(entry, str | tuple)


def _plain(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*(entry if _is_named(entry) and entry else None for entry in spec))


def _padded(path: str, spec: PartitionSpec, shape: tuple[int, ...]) -> PartitionSpec:
    check_length(Placing.of_weight(path, shape, spec))
    return PartitionSpec(*spec, *[None] * (len(shape) - len(spec)))


def _vague(source: Any) -> set[str]:
    """Paths of None: an absent bias in one tree, an unsharded weight in another."""
    nodes = jax.tree_util.tree_leaves_with_path(source, is_leaf=_is_leaf)
    nones = (keys for keys, node in nodes if node is None or not jax.tree.leaves(node))
    return {jax.tree_util.keystr(keys, simple=True, separator="/") for keys in nones}


def _check_structure(found: Any, shapes: Any, vague: set[str]) -> None:
    missing = [path for path in shapes if path not in found]
    extra = [path for path in found if path not in shapes and path not in vague]
    if not missing and not extra:
        return
    near = f" The nearest to {missing[0]!r} are {nearest(missing[0], found)}." if missing else ""
    raise AdapterError(
        "The base specs have another structure than the base: no spec for "
        f"{_some(missing)}; specs without a parameter: {_some(extra)}.{near} Make them from the "
        "same tree, such as nn.get_partition_spec(jax.eval_shape(model.init, ...))."
    )


def _some(paths: list[str], most: int = 6) -> str:
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return (", ".join(map(repr, paths[:most])) or "none") + more
