"""Spectrum plot: the energy that each rank captures, one line a matrix."""

import os
from typing import Any

import numpy as np

from rslora_jax.analysis.spectra.effective_rank import energy_by_rank
from rslora_jax.analysis.spectra.spectrum import Spectra
from rslora_jax.extras import extra
from rslora_jax.files import whole_file
from rslora_jax.paths import AdapterError

__all__ = ["energy_figure", "plot_energy"]


def plot_energy(spectra: Spectra, path: str | os.PathLike[str]) -> None:
    """Writes `energy_figure` to a file whose ending names the format (``.png``, ``.svg``).

    Raises:
      AdapterError: if matplotlib is missing, or no spectrum holds a change.
    """
    figure = energy_figure(spectra)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150, bbox_inches="tight")


def energy_figure(spectra: Spectra) -> Any:
    """Captured energy against rank: a thin line for each module, a thick one for the median.

    Args:
      spectra: from `spectrum`, `delta_spectrum` or `compare_folders`; modules that did not
        change are left out.

    Returns:
      A `matplotlib.figure.Figure`.

    Raises:
      AdapterError: if matplotlib is missing, or no spectrum holds a change.

    Example:
      >>> import numpy as np
      >>> from rslora_jax.analysis.spectra.spectrum import Spectra, Spectrum
      >>> one = Spectrum("w", (8, 8), np.array([2.0, 1.0]), np.array(5**0.5))
      >>> len(energy_figure(Spectra([one])).axes[0].lines)
      2
    """
    curves = _curves(spectra)
    figure = extra("matplotlib.figure", "rslora_jax[cli]", "The plot of spectra").Figure((7, 4.5))
    axes = figure.subplots()
    for curve in curves:
        axes.plot(np.arange(1, len(curve) + 1), 100 * curve, color="0.6", lw=0.6, alpha=0.6)
    shortest = min(map(len, curves))
    median = 100 * np.median([curve[:shortest] for curve in curves], axis=0)
    axes.plot(np.arange(1, shortest + 1), median, color="tab:blue", lw=2.2, label="median")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="rank", ylabel="captured energy (%)", ylim=(0, 102))
    axes.set_title(f"Energy of the change by rank, {len(curves)} matrices")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    return figure


def _curves(spectra: Spectra) -> list[np.ndarray]:
    curves = [
        energy_by_rank(picked.s, total=picked.known_total)
        for item in spectra
        for _, picked in item.modules()
        if picked.total > 0
    ]
    if not curves:
        raise AdapterError(
            f"A plot of spectra was asked for, but none of the {len(spectra)} weights changed. "
            "Check that the second model is a fine-tune of the first."
        )
    return curves
