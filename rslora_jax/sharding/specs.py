"""Specs: the PartitionSpecs of `a` and `b`, axis by axis from those of the weight."""

from collections.abc import Sequence
from typing import Any

from jax.sharding import PartitionSpec

from rslora_jax.paths import AdapterError, insert, nearest
from rslora_jax.sharding.checks import Placing, check_length, check_names, check_placing
from rslora_jax.sharding.policies import DEFAULT, Policy, PolicyLike, policies_of
from rslora_jax.sharding.sources import AxisRules, Source, read_specs
from rslora_jax.sites import Site

__all__ = ["specs"]


def specs(
    source: Source,
    sites: Sequence[Site],
    policy: PolicyLike = DEFAULT,
    *,
    mesh: Any = None,
    rules: AxisRules | None = None,
) -> dict[str, Any]:
    """The PartitionSpecs of the factors, in the shape of ``params.lora``.

    `a` [b.., i.., r] has the weight's entries of its b and i axes, `b` [b.., r, o..] those of
    its b and o axes; the rank is whole unless the policy splits it. So a product with a factor
    meets the activations where the product with the weight does.

    Args:
      source: where the weights' specs come from, see `base_specs`: ``params.base`` itself, a
        tree of specs or shardings, or ``[(pattern, spec), ...]``.
      sites: the sites that `adapt` returned.
      policy: ``"inherit"``, ``"replicated"``, a `Policy`, or ``[(pattern, policy), ...]`` on
        the sites' paths, of which the first match wins; the other sites get `DEFAULT`.
      mesh: a Mesh or AbstractMesh to hold names and sizes against, if there is one already.
      rules: logical axis rules, for sources with logical names.

    Returns:
      A nested dict with ``{"a": PartitionSpec, "b": PartitionSpec}`` at each path, with one
      entry for each axis of the factor.

    Raises:
      AdapterError: if a site has no base spec or one with too many entries, a mesh axis would
        be used twice in one factor, a policy or pattern means nothing, or, with a mesh, an
        axis does not exist or does not divide what it splits.

    Example:
      >>> import rslora_jax as rl
      >>> site = rl.Site("q/kernel", "ioo", (64, 4, 16), "float32", rank=8)
      >>> specs({"q": {"kernel": PartitionSpec("fsdp", "tensor")}}, [site])
      {'q': {'kernel': {'a': P('fsdp', None), 'b': P(None, 'tensor', None)}}}
    """
    found = read_specs(source, [site.path for site in sites], rules=rules)
    policies = policies_of(policy, [site.path for site in sites])
    tree: dict[str, Any] = {}
    for site in sites:
        base = _base_spec(site, found)
        a, b = _factor_specs(site, base, policies[site.path], mesh)
        insert(tree, site.path, {"a": a, "b": b})
    return tree


def _base_spec(site: Site, found: dict[str, PartitionSpec]) -> PartitionSpec:
    if site.path not in found:
        raise AdapterError(
            f"There is no base spec for the site {site.path!r}. The nearest of the {len(found)} "
            f"specs are for {nearest(site.path, found)}. Pass the specs of the tree that was "
            'adapted (params.base), or add a pair such as (".*", PartitionSpec()).'
        )
    placing = Placing.of_weight(site.path, site.shape, found[site.path])
    check_length(placing)
    padding = [None] * (len(site.shape) - len(placing.spec))
    return PartitionSpec(*placing.spec, *padding)


def _factor_specs(
    site: Site, base: PartitionSpec, policy: Policy, mesh: Any
) -> tuple[PartitionSpec, PartitionSpec]:
    check_placing(Placing.of_weight(site.path, site.shape, base), mesh)
    if mesh is not None:
        check_names(policy.names, mesh, f"{policy} was asked for {site.path!r}")
    pair = policy.specs(site.axes, tuple(base))
    placings = Placing.of_factors(site.path, site.axes, site.factor_shapes, pair)
    for step in (None, mesh):  # what no mesh could carry out comes first
        for placing in placings:
            check_placing(placing, step)
    return pair
