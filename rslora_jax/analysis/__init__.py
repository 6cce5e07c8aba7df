"""Analysis: gradient magnitude measured, not asserted.

* one step: `gradient_report`; the norms of every step are `rslora_jax.optim.record_norms`;
* many ranks: `rank_sweep`, then `slopes`, `advice`, `against_step`, `against_rank`, `write_page`;
* the theory: `theory`, its closed forms, `definition_check`, and what follows for
  hyperparameters, `equivalent_hparams` and `lr_for_rank`;
* what was learned: `spectrum`, `delta_spectrum`, `intruders`, and the ranks and adapters that
  it suggests, `advise_rank`, `allocate_ranks`, `bits_rank`, `extract`.
"""

from rslora_jax.analysis.gradients import GradientReport, gradient_report
from rslora_jax.analysis.laws.closed_forms import (
    FirstStep,
    ReconstructionError,
    adam_first_step,
    crossover_rank,
    grad_b_square,
    reconstruction_error,
    sgd_first_step,
)
from rslora_jax.analysis.laws.definition import definition_check, definition_slopes
from rslora_jax.analysis.laws.exponents import Exponent, verdict
from rslora_jax.analysis.laws.hparams import Hparams, RankRule, equivalent_hparams, lr_for_rank
from rslora_jax.analysis.laws.theory import Exponents, theory
from rslora_jax.analysis.spectra.allocate import allocate_ranks
from rslora_jax.analysis.spectra.bits import Bits, bits_rank
from rslora_jax.analysis.spectra.effective_rank import EffectiveRanks, effective_ranks
from rslora_jax.analysis.spectra.extract import Extracted, extract
from rslora_jax.analysis.spectra.folders import compare_folders
from rslora_jax.analysis.spectra.intruders import Intruders, chance_cosine, intruders
from rslora_jax.analysis.spectra.randomized import DeltaSvd, delta_svd
from rslora_jax.analysis.spectra.rank_advice import Advice, advise_rank
from rslora_jax.analysis.spectra.spectrum import Spectra, Spectrum, delta_spectrum, spectrum
from rslora_jax.analysis.spectra.spectrum_plot import plot_energy
from rslora_jax.analysis.sweeps.advice import advice
from rslora_jax.analysis.sweeps.page import write as write_page
from rslora_jax.analysis.sweeps.plots import against_rank, against_step
from rslora_jax.analysis.sweeps.slopes import slopes
from rslora_jax.analysis.sweeps.sweep import Sweep, rank_sweep

__all__ = [
    "Advice",
    "Bits",
    "DeltaSvd",
    "EffectiveRanks",
    "Exponent",
    "Exponents",
    "Extracted",
    "FirstStep",
    "GradientReport",
    "Hparams",
    "Intruders",
    "RankRule",
    "ReconstructionError",
    "Spectra",
    "Spectrum",
    "Sweep",
    "adam_first_step",
    "advice",
    "advise_rank",
    "against_rank",
    "against_step",
    "allocate_ranks",
    "bits_rank",
    "chance_cosine",
    "compare_folders",
    "crossover_rank",
    "definition_check",
    "definition_slopes",
    "delta_spectrum",
    "delta_svd",
    "effective_ranks",
    "equivalent_hparams",
    "extract",
    "grad_b_square",
    "gradient_report",
    "intruders",
    "lr_for_rank",
    "plot_energy",
    "rank_sweep",
    "reconstruction_error",
    "sgd_first_step",
    "slopes",
    "spectrum",
    "theory",
    "verdict",
    "write_page",
]
