"""Plan: does a training step fit on a TPU slice, and what does it cost there?

The real TPU compiler answers, without a TPU: `plan` compiles any step for any topology; `frozen`,
`adapters` and `full` are the steps of a Llama.
"""

from rslora_jax.plan.advice import advise, nearest_fit
from rslora_jax.plan.chips import CHIPS, Chip
from rslora_jax.plan.layout import Layout
from rslora_jax.plan.models import MODELS, find_model
from rslora_jax.plan.plan import plan
from rslora_jax.plan.report import Plan, Traffic, compare
from rslora_jax.plan.sizes import Model
from rslora_jax.plan.topologies import KNOWN, Topology, abstract_mesh, topology
from rslora_jax.plan.training import Run, Variant, adapters, frozen, full

__all__ = [
    "CHIPS",
    "KNOWN",
    "MODELS",
    "Chip",
    "Layout",
    "Model",
    "Plan",
    "Run",
    "Topology",
    "Traffic",
    "Variant",
    "abstract_mesh",
    "adapters",
    "advise",
    "compare",
    "find_model",
    "frozen",
    "full",
    "nearest_fit",
    "plan",
    "topology",
]
