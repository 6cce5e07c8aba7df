"""Theory: how every magnitude of an adapter scales with its rank, and what to make of it.

Each quantity is a power law gamma^p * r^q * sigma^t: gamma is the scale, r the rank, sigma the
standard deviation of the entries of `a` at the start. With gamma = alpha/r (`"lora"`),
alpha/sqrt(r) (`"rslora"`) or alpha (`"constant"`), and sigma free of r, one number remains: the
exponent of r. 0 is stable, below 0 collapses as the rank grows, above 0 explodes.

**What is proven.** Theorem 3.2 of Kalajdzievski 2023 (arXiv 2312.03732): the adapter's outputs
and the gradient into its inputs keep their size as r grows if and only if gamma ~ 1/sqrt(r).
It holds for SGD, in the limit r -> infinity, in expectation over a random `a` whose variance does
not depend on r, and `b` starting at zero. Three limits of that statement matter in practice:

* *In expectation.* The mean over draws of `a` is stable. One adapter has one draw: the norm of
  its update, of its output on other inputs and of the gradient into its input fall as 1/sqrt(r)
  under rsLoRA until r is above the width n of the input (`closed_forms.crossover_rank`;
  `definition.definition_check` measures both).
* *Large r.* The law needs r well above the intrinsic dimension of the layer's inputs,
  r* = tr S / |S| with S their second moment: the curvature in `b` at the start is about
  gamma^2 sigma^2 (r |S| + tr S). Below r* it is a constant gamma that keeps it.
* *SGD.* It says nothing on Adam, and nothing on the quality of what is learned.

**What holds under Adam.** Gradient norms are stable under rsLoRA, as the paper's figures show.
The update is not: Adam divides the gradient's size out, every entry of `b` moves by the learning
rate, and where the inputs are coherent (r above r*) the function moves as gamma r. So early on
alpha/r is the scale whose steps do not depend on the rank, as Schulman et al. 2025 ("LoRA Without
Regret") observe, and one rsLoRA step is sqrt(r) times as large. Both are right, about different
quantities. `hparams.equivalent_hparams` gives the exact exchange rate: under Adam, rsLoRA is LoRA
with a learning rate of `b` that is sqrt(r) times higher.

**What is left after tuning.** Tuned learning rates close most of the gap: comparisons of LoRA
variants with a learning rate tuned for each (arXiv 2602.04998) find all of them within 1 to 2 %.
``examples/style_vs_facts.py`` shows the gap at one rate for all ranks, and with ``--adam`` how it
shrinks at another.

**What to do.**

1. *Plain SGD or a clip that is always active*: use rsLoRA. alpha/r stalls at high ranks.
2. *Adam, one learning rate for all ranks, no budget to tune*: rsLoRA lets high ranks train at a
   rate that suits low ones, and alpha/r leaves them about as fast as rank 4. If a high rank
   diverges, lower the rate (by r^-1/4 to r^-1/2, `hparams.lr_for_rank`), not the rank.
3. *Adam, learning rate tuned at each rank*: either scale will do. Choose rsLoRA to keep gradient
   norms, and so clipping thresholds and Adam's eps, meaningful across ranks.
4. *Any optimizer*: start `a` with a variance free of r. A standard deviation of 1/r (PEFT's
   ``init_lora_weights="gaussian"``) brings the gradient of `b` back to r^-1 under rsLoRA.
5. alpha = 2 r with alpha/r is a *constant* scale: everything grows with the rank.
6. Measure: these are exponents of simple models, `verdict` judges those of your own run.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from rslora_jax.analysis.laws.exponents import (
    INITS,
    SCALINGS,
    Exponent,
    Verdict,
    named_exponent,
    verdict,
)
from rslora_jax.paths import AdapterError, nearest
from rslora_jax.tables import Table

__all__ = [
    "INITS",
    "LAWS",
    "OPTIMIZERS",
    "QUANTITIES",
    "REGIMES",
    "SCALINGS",
    "Exponent",
    "Exponents",
    "Law",
    "Verdict",
    "theory",
    "verdict",
]

REGIMES = ("low", "high")


class Law(NamedTuple):
    """gamma^gamma * r^rank * sigma^sigma."""

    gamma: float
    rank: float
    sigma: float

    def exponent(self, gamma: float, sigma: float) -> float:
        """The exponent of r for gamma ~ r^gamma and sigma ~ r^sigma."""
        return self.gamma * gamma + self.rank + self.sigma * sigma

    def __str__(self) -> str:
        powers = zip(("gamma", "r", "sigma"), self, strict=True)
        return " ".join(n if p == 1 else f"{n}^{p:g}" for n, p in powers if p) or "1"


# The one table of laws. B = 0 at the start, G = dL/dW, step 1:
#   gB = gamma A^T G is the same for all. SGD steps by gB, Adam by sign(gB), normalized by gB/|gB|;
#   then dW = gamma A B, gA = gamma G B^T. `delta` is the spread over random directions, which a
#   rank far above the input's width leaves behind the part along the gradient (`signal`).
LAWS = {
    "sgd": {"signal": Law(2, 1, 2), "delta": Law(2, 0.5, 2), "grad_a": Law(2, 0.5, 1)},
    "adam": {"signal": Law(1, 1, 1), "delta": Law(1, 0.5, 1), "grad_a": Law(1, 0.5, 0)},
    "normalized": {"signal": Law(1, 0.5, 1), "delta": Law(1, 0, 1), "grad_a": Law(1, 0, 0)},
}
OPTIMIZERS = tuple(LAWS)
_AT_START = {"grad_b": Law(1, 0.5, 1), "grad_b_rms": Law(1, 0, 1)}
_LIKE = {"output": "delta", "output_trained": "signal", "input_grad": "delta"}
QUANTITIES = (
    "grad_b",
    "grad_b_rms",
    "grad_a",
    "grad",
    "signal",
    "delta",
    "output",
    "output_trained",
    "input_grad",
)


@dataclasses.dataclass(frozen=True)
class Exponents(Mapping[str, Exponent]):
    """The exponent of each of `QUANTITIES`, by name; `print` shows them with their verdicts.

    Attributes:
      gamma: the exponent of the scale.
      sigma: the exponent of the standard deviation of `a`.
      optimizer: one of `OPTIMIZERS`.
      regime: ``"low"``, ``"high"`` or None for both.
    """

    gamma: float
    sigma: float
    optimizer: str
    regime: str | None

    def __getitem__(self, name: str) -> Exponent:
        if name not in QUANTITIES:
            raise AdapterError(
                f"The theory has no quantity {name!r}. The nearest are {nearest(name, QUANTITIES)}."
            )
        if name == "grad":
            b, a = self["grad_b"], self["grad_a"]
            return Exponent(b.low, max(a.high, b.high))
        found = [law.exponent(self.gamma, self.sigma) for law in self.laws(name)]
        return Exponent(min(found), max(found))

    def laws(self, name: str) -> tuple[Law, ...]:
        """The laws that a quantity follows in the regimes asked for; none for ``"grad"``."""
        regimes = (self.regime,) if self.regime else REGIMES
        laws = {**_AT_START, **LAWS[self.optimizer]}
        many = name == "output_trained" and self.regime is None  # their interference is spread
        name = "delta" if many else _LIKE.get(name, name)
        names = ["signal" if (name, regime) == ("delta", "high") else name for regime in regimes]
        return tuple(dict.fromkeys(laws[name] for name in names if name in laws))

    def table(self) -> Table:
        """One row a quantity: its law, its exponent and the verdict."""
        return Table.of(
            {
                "quantity": name,
                "law": " to ".join(map(str, self.laws(name))) or "grad_b and grad_a",
                "exponent": str(self[name]),
                "verdict": verdict(self[name]),
            }
            for name in self
        )

    def __iter__(self) -> Iterator[str]:
        return iter(QUANTITIES)

    def __len__(self) -> int:
        return len(QUANTITIES)

    def __str__(self) -> str:
        return str(self.table())


def theory(
    scaling: str | float,
    optimizer: str,
    init: str | float = "kaiming",
    regime: str | None = "low",
) -> Exponents:
    """The exponent of the rank in every magnitude of an adapter around its first step.

    The quantities, for y = x (W + gamma a b) and G = dL/dW:

    * ``grad_b``, ``grad_b_rms``: the gradient of `b` at the start: its Frobenius norm and the
      root mean square of its entries. That of `a` is 0 there.
    * ``grad_a``: the norm of the gradient of `a` after one step.
    * ``grad``: the norm of both together after one step. To first order in the learning rate it
      is that of `b`; it is a range where `a` has the larger exponent and takes over.
    * ``signal``: <dW, -G> after one step, the loss that the step is predicted to save.
    * ``delta``: |dW|_F after one step; ``input_grad``: the gradient into the adapter's input.
    * ``output``: the adapter's output on inputs unrelated to those it was trained on. On inputs
      *exactly* orthogonal to them the low regime's law holds at every rank.
    * ``output_trained``: its output on the input it was trained on, if that is one or the rank
      is above their number; of many inputs each disturbs the others as `output` does, which
      ``regime=None`` includes.

    Args:
      scaling: ``"lora"``, ``"rslora"``, ``"constant"``, or the exponent g of a scale ~ r^g.
      optimizer: ``"sgd"``; ``"adam"`` for any that divides by a second moment or takes the
        sign (AdamW, Adafactor, Lion); ``"normalized"`` for a gradient divided by its global
        norm, as under a clip that is always active.
      init: how `a` starts: ``"kaiming"`` or ``"normal"``, free of the rank; ``"fan_out"`` with a
        standard deviation of 1/sqrt(r); ``"gaussian"`` with 1/r, as PEFT's; or the exponent.
      regime: ``"low"`` for ranks far below the width of the input, ``"high"`` for ranks far
        above, None for the range that covers both.

    Returns:
      A mapping from each of `QUANTITIES` to its `Exponent`.

    Raises:
      AdapterError: for a name that is unknown, with those that are known.

    Example:
      >>> print(theory("rslora", "adam", regime=None))
      quantity        law                                  exponent  verdict
      grad_b          gamma r^0.5 sigma                    0         stable
      grad_b_rms      gamma sigma                          -0.5      collapsing
      grad_a          gamma r^0.5                          0         stable
      grad            grad_b and grad_a                    0         stable
      signal          gamma r sigma                        0.5       exploding
      delta           gamma r^0.5 sigma to gamma r sigma   0..0.5    exploding
      output          gamma r^0.5 sigma to gamma r sigma   0..0.5    exploding
      output_trained  gamma r^0.5 sigma to gamma r sigma   0..0.5    exploding
      input_grad      gamma r^0.5 sigma to gamma r sigma   0..0.5    exploding
    """
    if optimizer not in OPTIMIZERS:
        raise AdapterError(
            f"optimizer must be one of {OPTIMIZERS}, found {optimizer!r}. Use 'adam' for any that "
            "divides by a second moment or takes the sign (AdamW, Adafactor, Lion)."
        )
    if regime is not None and regime not in REGIMES:
        raise AdapterError(
            f"regime must be 'low' (rank far below the input's width), 'high' (far above) or None "
            f"(the range of both), found {regime!r}."
        )
    gamma = named_exponent(scaling, SCALINGS, "scaling")
    return Exponents(gamma, named_exponent(init, INITS, "init"), optimizer, regime)
