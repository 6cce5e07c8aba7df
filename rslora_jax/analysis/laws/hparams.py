"""Hyperparameters across scalings and ranks: exact identities, and rules with evidence.

`equivalent_hparams` is exact: LoRA and rsLoRA at one rank are the same family of adapters, and
each run of one *is* a run of the other with other learning rates. `lr_for_rank` is a rule: the
best learning rate at another rank depends on the inputs and on how long the run is, so the regime
has to be named, and the result says what an earlier study found for it.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

from rslora_jax.analysis.laws.exponents import SCALINGS, named_exponent
from rslora_jax.analysis.laws.lr_laws import LR_LAWS, LR_REGIMES, LrLaw
from rslora_jax.config import scale
from rslora_jax.paths import AdapterError

__all__ = ["LR_REGIMES", "Hparams", "RankRule", "equivalent_hparams", "lr_for_rank"]

CHANGES = ("learning_rate", "alpha")


@dataclasses.dataclass(frozen=True)
class Hparams:
    """What decides an adapter's training beside its rank, each factor's own numbers apart.

    Attributes:
      scaling: ``"lora"`` or ``"rslora"``.
      alpha: the numerator of the scale.
      lr_a: the learning rate of `a`.
      lr_b: the learning rate of `b`.
      eps_b: Adam's eps for `b`; 0 for SGD.
      weight_decay_b: the decoupled weight decay of `b`, as in `optax.adamw`: each step takes
        lr_b * weight_decay_b * b away.

    Raises:
      AdapterError: for an unknown scaling, or a number out of range.

    Example:
      >>> Hparams("rslora", alpha=16.0, lr_a=1e-4, lr_b=1e-4).eps_b
      0.0
    """

    scaling: Literal["lora", "rslora"]
    alpha: float
    lr_a: float
    lr_b: float
    eps_b: float = 0.0
    weight_decay_b: float = 0.0

    def __post_init__(self) -> None:
        scale(self.alpha, 1, self.scaling)
        for name in ("lr_a", "lr_b", "eps_b", "weight_decay_b"):
            _check_number(getattr(self, name), f"Hparams.{name}")


def equivalent_hparams(
    hparams: Hparams,
    to: Literal["lora", "rslora"],
    rank: int,
    optimizer: str = "adam",
    change: Literal["learning_rate", "alpha"] = "learning_rate",
) -> Hparams:
    """The hyperparameters that give the very same run under the other scaling, at one rank.

    With c = (scale of `hparams`) / (scale of `to`) and b' = c b, both adapters are the same
    function with the same gradient of `a`, and the gradient of b' is that of `b` over c. SGD
    (with or without momentum) then needs lr_b' = c^2 lr_b, and Adam, which divides the size of
    the gradient out, lr_b' = c lr_b and eps_b' = eps_b / c. A decoupled weight decay keeps
    lr_b weight_decay_b. From rsLoRA to LoRA c = sqrt(r): **rsLoRA under Adam is LoRA with a
    learning rate of `b` that is sqrt(r) times higher** (LoRA+ with that ratio).

    Exact in real numbers from b = 0 on (else start from c b): the tests hold two runs of 30 steps
    to 1e-12 in float64. `a` keeps its learning rate, eps and weight decay; a schedule of `b`'s
    learning rate is multiplied by lr_b' / lr_b. What breaks it:

    * a clip or normalization by the norm of both factors together (the norm of `b`'s part
      changes); ``change="alpha"`` has no such limit;
    * Adam's eps, or a weight decay, left as it was for `b` (1e-8 moves outputs by 1e-6);
    * a weight decay that is added to the gradient before Adam.

    Args:
      hparams: the run to reproduce.
      to: the scaling to reproduce it with.
      rank: r, the same for both.
      optimizer: ``"sgd"`` or ``"adam"`` (AdamW, Lion and others that are indifferent to the
        gradient's size).
      change: ``"learning_rate"`` keeps alpha and changes how `b` learns; ``"alpha"`` keeps
        everything but alpha: alpha' = alpha sqrt(r) from rsLoRA to LoRA has the same scale, so
        it is the same program, whatever the optimizer.

    Returns:
      `Hparams` with ``scaling=to``.

    Raises:
      AdapterError: for an unknown scaling, optimizer or change, or a rank below 1.

    Example:
      >>> run = Hparams("rslora", alpha=16.0, lr_a=1e-4, lr_b=1e-4)
      >>> equivalent_hparams(run, "lora", rank=256).lr_b
      0.0016
      >>> equivalent_hparams(run, "lora", rank=256, change="alpha").alpha
      256.0
    """
    if change not in CHANGES:
        raise AdapterError(f"change must be one of {CHANGES}, found {change!r}.")
    ratio = scale(1.0, rank, hparams.scaling) / scale(1.0, rank, to)
    if change == "alpha":
        return dataclasses.replace(hparams, scaling=to, alpha=hparams.alpha * ratio)
    if optimizer not in ("sgd", "adam"):
        raise AdapterError(
            f"optimizer must be 'sgd' or 'adam', found {optimizer!r}. For any other use "
            "change='alpha', which keeps the scale itself."
        )
    faster = ratio if optimizer == "adam" else ratio**2
    return dataclasses.replace(
        hparams,
        scaling=to,
        lr_b=hparams.lr_b * faster,
        eps_b=hparams.eps_b / ratio,
        weight_decay_b=hparams.weight_decay_b / faster,
    )


class RankRule(NamedTuple):
    """A learning rate for another rank, and what speaks for it.

    Attributes:
      value: the learning rate that the law gives.
      exponent: the law: the best learning rate goes as r^exponent.
      measured: the exponent recorded in an earlier study of this project (`lr_laws` has its
        setting), which the repository does not reproduce; None for a scaling that was not run.
      regime: the regime that was named.
      evidence: what the law and the recorded exponent are, and how far they agree.
    """

    value: float
    exponent: float
    measured: float | None
    regime: str
    evidence: str


def lr_for_rank(
    learning_rate: float,
    from_rank: int,
    to_rank: int,
    scaling: str | float,
    optimizer: str,
    regime: str,
) -> RankRule:
    """A learning rate tuned at one rank, carried over to another: a rule, with its evidence.

    Under Adam rsLoRA carries a learning rate across ranks where the inputs are incoherent, alpha/r
    where they are coherent. The measured exponents are recorded values of an earlier study of this
    project, on a linear teacher with two seeds; the repository does not reproduce them.

    Args:
      learning_rate: the one that was tuned, for both factors.
      from_rank: the rank that it was tuned at.
      to_rank: the rank to carry it to.
      scaling: ``"lora"``, ``"rslora"``, ``"constant"``, or the exponent of the scale.
      optimizer: ``"adam"`` (AdamW and others with a second moment) or ``"sgd"``.
      regime: ``"coherent"`` for ranks above the intrinsic dimension r* = tr S / |S| of the
        layers' inputs, ``"incoherent"`` for ranks below; with ``"-early"`` for runs so short (some
        tens of steps, or a tiny learning rate) that `a` hardly moves. In one trained transformer
        of 115,000 parameters the same study recorded r* from 1.5 to 3.7: coherent from rank 4.

    Returns:
      `RankRule`: the value by the law, both exponents, and the evidence in one sentence.

    Raises:
      AdapterError: for an unknown name, a rank below 1, or a learning rate that is not above 0.

    Example:
      >>> rule = lr_for_rank(1e-3, 8, 128, "rslora", "adam", "coherent")
      >>> rule.value, rule.exponent, rule.measured
      (0.0005, -0.25, -0.22)
      >>> print(rule.evidence)
      adam, coherent: once a has moved, LR ~ r^-(1-g)/2 for a scale r^-g (muA, arXiv 2602.06204):
      theory r^-0.25, measured r^-0.22 in an earlier study: they agree.
    """
    _check_number(learning_rate, "learning_rate", least=math.ulp(0.0))
    for name, rank in (("from_rank", from_rank), ("to_rank", to_rank)):
        _check_rank(rank, name)
    law = _lr_law(optimizer, regime)
    gamma = named_exponent(scaling, SCALINGS, "scaling")
    exponent = law.exponent(gamma)
    measured = dict(zip(SCALINGS.values(), law.recorded, strict=True)).get(gamma)
    evidence = f"{optimizer}, {regime}: {law.reason}: {_agreement(exponent, measured)}"
    value = learning_rate * (to_rank / from_rank) ** exponent
    return RankRule(value, exponent, measured, regime, evidence)


def _lr_law(optimizer: str, regime: str) -> LrLaw:
    if optimizer not in ("adam", "sgd"):
        raise AdapterError(f"optimizer must be 'adam' or 'sgd', found {optimizer!r}.")
    if regime not in LR_REGIMES:
        raise AdapterError(
            f"regime must be one of {LR_REGIMES}, found {regime!r}: 'coherent' for ranks above "
            "tr S / |S| of the layers' inputs, 'incoherent' below, '-early' while `a` hardly moves."
        )
    return LR_LAWS[optimizer, regime]


def _agreement(exponent: float, measured: float | None) -> str:
    if measured is None:
        return f"theory r^{exponent:g}, not measured for this scaling."
    gap = abs(exponent - measured)
    words = "they agree" if gap <= 0.05 else "roughly" if gap <= 0.2 else "they DISAGREE: tune it"
    return f"theory r^{exponent:g}, measured r^{measured:g} in an earlier study: {words}."


def _check_rank(rank: int, name: str) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise AdapterError(f"{name} must be an int of at least 1, found {rank!r}.")


def _check_number(value: float, name: str, least: float = 0.0) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value < math.inf:
        above = "at least 0" if least == 0 else "above 0"
        raise AdapterError(f"{name} must be a finite number {above}, found {value!r}.")
