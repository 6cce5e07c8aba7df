"""Plan: does a training step fit on a TPU slice, and what does it cost there?

The real TPU compiler answers, without a TPU: `plan` compiles any step for any topology.
"""

from rslora_jax.plan.chips import CHIPS, Chip
from rslora_jax.plan.plan import plan
from rslora_jax.plan.report import Plan, Traffic, compare
from rslora_jax.plan.topologies import KNOWN, Topology, abstract_mesh, topology

__all__ = [
    "CHIPS",
    "KNOWN",
    "Chip",
    "Plan",
    "Topology",
    "Traffic",
    "abstract_mesh",
    "compare",
    "plan",
    "topology",
]
