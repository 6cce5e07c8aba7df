"""Policies: what the factors of a weight take over from the weight's PartitionSpec."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from jax.sharding import PartitionSpec

from rslora_jax.axes import factor_specs
from rslora_jax.paths import AdapterError, nearest
from rslora_jax.sharding.patterns import Pairs, are_pairs, check_pairs, first_match

__all__ = ["DEFAULT", "NAMED", "Policy", "PolicyLike", "entry_names", "policies_of"]

Entry: TypeAlias = str | tuple[str, ...] | None

DEFAULT = "inherit"
"""The policy of a site that nothing else was asked for.

Chosen by `tests/benchmarks/collectives.py` and `rslora plan`: leaving the fsdp axis off sends
less, 0.4 % of the network's time of an 8B model at rank 64 on v5e:16x16, and takes 0.95 GiB more
of each chip; and nothing here need know which mesh axis is which."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """How the factors of a site are sharded.

    Attributes:
      without: mesh axes of the weight that the factors leave off, such as ``("fsdp",)``.
      rank: the mesh axis, or axes, that split the rank; None keeps the rank whole. One mesh
        axis can split one axis of a factor, so an axis that the weight uses must be left off
        for it: ``Policy(without=("tensor",), rank="tensor")``.
      replicate: take over nothing from the weight: with `rank` the factors are split along
        the rank alone, without it they are whole on every device.

    Raises:
      AdapterError: if a name is no mesh axis's, or an option would do nothing.

    Example:
      >>> Policy(without=("fsdp",)).specs("io", (("data", "fsdp"), "tensor"))
      (P('data', None), P(None, 'tensor'))
      >>> Policy(rank="tensor", replicate=True).specs("io", ("fsdp", "tensor"))
      (P(None, 'tensor'), P('tensor', None))
    """

    without: tuple[str, ...] = ()
    rank: Entry = None
    replicate: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "without", _names(self.without, "without"))
        if self.rank is not None:
            names = _names(self.rank, "rank")
            object.__setattr__(self, "rank", _entry(names))
        if self.replicate and self.without:
            raise AdapterError(
                f"Policy(replicate=True) takes over no mesh axis, so without={self.without!r} "
                "would do nothing. Leave one of them out."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The mesh axes that the policy speaks of."""
        return (*self.without, *entry_names(self.rank))

    def specs(self, axes: str, spec: Sequence[Any]) -> tuple[PartitionSpec, PartitionSpec]:
        """The PartitionSpecs of `a` and `b`.

        Args:
          axes: one letter for each axis of the weight.
          spec: one entry for each axis of the weight.
        """
        return factor_specs(axes, [self._kept(entry) for entry in spec], self.rank)

    def _kept(self, entry: Entry) -> Entry:
        dropped = (*self.without, *entry_names(entry)) if self.replicate else self.without
        return _entry(tuple(name for name in entry_names(entry) if name not in dropped))


PolicyLike: TypeAlias = str | Policy | Pairs


def policies_of(policy: PolicyLike, paths: Iterable[str]) -> dict[str, Policy]:
    """The policy of every site.

    Args:
      policy: a name of `NAMED`, a `Policy`, or ``[(pattern, policy), ...]``: a regex that must
        match the whole path, of which the first match wins; the other sites get `DEFAULT`.
      paths: the paths of the sites.

    Returns:
      ``{path: Policy}``.

    Raises:
      AdapterError: for an unknown policy, and for a pattern that matches no site.

    Example:
      >>> policies_of([(".*/q", "replicated")], ["layers/q", "layers/k"])["layers/k"]
      Policy(without=(), rank=None, replicate=False)
    """
    known = list(paths)
    if not are_pairs(policy):
        return dict.fromkeys(known, _policy(policy))
    pairs = [(regex, _policy(value)) for regex, value in policy]  # pyright: ignore
    check_pairs(pairs, known, "sharding policy")
    return {path: first_match(pairs, path, _policy(DEFAULT)) for path in known}


def entry_names(entry: Entry) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec.

    Example:
      >>> entry_names(("data", "fsdp")), entry_names("tensor"), entry_names(None)
      (('data', 'fsdp'), ('tensor',), ())
    """
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _entry(names: tuple[str, ...]) -> Entry:
    return (names[0] if len(names) == 1 else names) if names else None


def _policy(value: Any) -> Policy:
    if isinstance(value, Policy):
        return value
    if isinstance(value, str) and value in NAMED:
        return NAMED[value]
    near = f" The nearest is {nearest(value, NAMED, 1)}." if isinstance(value, str) else ""
    raise AdapterError(
        f"A sharding policy is one of {sorted(NAMED)}, a Policy(...), or a list of "
        f"(pattern, policy) pairs; found {value!r}.{near}"
    )


def _names(value: Any, field: str) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, tuple | list) or not all(
        isinstance(name, str) and name for name in names
    ):
        raise AdapterError(
            f"Policy({field}=...) takes the name of a mesh axis or a tuple of them, found "
            f"{value!r}."
        )
    return tuple(names)


NAMED: dict[str, Policy] = {"inherit": Policy(), "replicated": Policy(replicate=True)}
"""What the names of policies stand for."""
