"""Spectra: the singular values of what fine-tuning added, for adapters and for full tuning."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rslora_jax.analysis.spectra.effective_rank import effective_ranks, energy_by_rank
from rslora_jax.analysis.spectra.pairs import Pair, pairs
from rslora_jax.analysis.spectra.randomized import delta_svd
from rslora_jax.axes import fan_in, fan_out
from rslora_jax.factors import LoraParams, factors_of
from rslora_jax.norms import factored_svd
from rslora_jax.paths import AdapterError
from rslora_jax.sites import Site
from rslora_jax.tables import Table

__all__ = ["Spectra", "Spectrum", "delta_spectrum", "pair_spectrum", "spectrum"]

RANKS = tuple(2**n for n in range(13))


class Spectrum(NamedTuple):
    """The singular values of one weight's change, per module.

    Attributes:
      path: the weight's path.
      matrix: (inputs, outputs) of one module.
      s: singular values [b.., k], falling (NumPy).
      total: the Frobenius norm [b..] of the whole change.
      base: the Frobenius norm [b..] of the weight before; None if it is unknown.
      residual: the share of `total` [b..] that the randomized search did not see; None if
        the spectrum is exact.
    """

    path: str
    matrix: tuple[int, int]
    s: np.ndarray
    total: np.ndarray
    base: np.ndarray | None = None
    residual: np.ndarray | None = None

    @property
    def known_total(self) -> np.ndarray | None:
        """What `effective_ranks` calls `total`: None if no singular value is missing."""
        return None if self.residual is None else self.total

    def modules(self) -> Iterator[tuple[str, "Spectrum"]]:
        """Each module by its index along the b axes: ``""``, ``"3"``, ``"3,0"``."""
        for index in np.ndindex(self.total.shape):
            base = None if self.base is None else self.base[index]
            residual = None if self.residual is None else self.residual[index]
            picked = self._replace(
                s=self.s[index], total=self.total[index], base=base, residual=residual
            )
            yield ",".join(map(str, index)), picked


class Spectra(tuple[Spectrum, ...]):
    """The spectra of many weights; `print` shows the table of effective ranks."""

    def ranks(self) -> Table:
        """One row a module: its size, the norm of its change and every effective rank.

        Columns: ``path``, ``module`` (index along the stack), ``inputs``, ``outputs``,
        ``norm``; ``relative`` (norm over that of the weight) and ``residual`` where known;
        the ranks of `effective_ranks`; ``truncated``: all but ``stable`` and the energy
        ranks up to k are then lower bounds. They are the ranks of the values that were
        found, which a randomized search of a flat spectrum puts too low.
        """
        return Table.of(
            _rank_row(item.path, module, picked)
            for item in self
            for module, picked in item.modules()
        )

    def energy(self, ranks: Sequence[int] = RANKS) -> Table:
        """One row a module and rank: the share of |change|_F^2 that this rank can hold.

        Ranks above a module's smaller side are left out, and those above the number of
        known singular values hold None.
        """
        return Table.of(
            {"path": item.path, "module": module, "rank": rank, "energy": _energy(picked, rank)}
            for item in self
            for module, picked in item.modules()
            for rank in ranks
            if rank <= min(item.matrix)
        )

    def __str__(self) -> str:
        return str(self.ranks())


def spectrum(lora: LoraParams | Mapping[str, Any], sites: Sequence[Site]) -> Spectra:
    """The singular values of scale * a @ b at every site: exact, by two QRs per module.

    Args:
      lora: the adapter tree, or a `LoraParams` that holds one.
      sites: the sites that `adapt` returned.

    Returns:
      `Spectra`; each `s` is [b.., rank].

    Raises:
      AdapterError: if the factors do not fit the sites, are absent, or are not finite.

    Example:
      >>> import jax.numpy as jnp, rslora_jax as rl
      >>> site = rl.Site("w", "io", (4, 9), "float32", rank=1, alpha=2.0, scale=2.0)
      >>> found = spectrum({"w": {"a": jnp.ones((4, 1)), "b": jnp.ones((1, 9))}}, [site])
      >>> found[0].s.round(3).tolist(), round(found.ranks().column("stable")[0], 3)
      ([12.0], 1.0)
    """
    factors = factors_of(lora.lora if isinstance(lora, LoraParams) else lora, sites)
    if not factors:
        raise AdapterError(
            f"spectrum needs adapters, found none ({len(sites)} sites). Pass the `params` and "
            "`sites` that `adapt` returned; for two full trees use `delta_spectrum`."
        )
    return Spectra(_adapter_spectrum(site, factors[site.path]) for site in sites)


def delta_spectrum(
    base: Any,
    tuned: Any,
    k: int = 64,
    *,
    sites: Sequence[Site] | None = None,
    key: jax.Array | None = None,
    oversample: int = 8,
    iterations: int = 2,
) -> Spectra:
    """The leading singular values of tuned - base, per module, by randomized SVD.

    The difference is never formed, and sharded weights are not gathered: see `delta_svd`.
    The Frobenius norm of the change is exact, so the captured energy follows from the
    first k singular values alone.

    Args:
      base: the tree before fine-tuning.
      tuned: the tree after: the same paths and shapes.
      k: how many singular values; cut to the smaller side of each module.
      sites: the roles of the axes, from `find_sites` or `adapt`; needed for stacked layers.
        None takes every matrix, the last axis as output and the others as inputs.
      key: a typed PRNG key for the sketches.
      oversample: columns of the sketch beyond k.
      iterations: of the power method; raise it where `residual` shows a flat spectrum.

    Returns:
      `Spectra`, with `residual`.

    Raises:
      AdapterError: if the trees or the sites do not match, with paths and shapes; if a
        weight is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> base = {"w": jnp.zeros((4, 4))}
      >>> found = delta_spectrum(base, {"w": jnp.diag(jnp.array([4.0, 3.0, 0.0, 0.0]))}, k=2)
      >>> [round(share, 4) for share in found.energy(ranks=[1, 2]).column("energy")]
      [0.64, 1.0]
    """
    found = pairs(base, tuned, sites)
    options = {"key": key, "oversample": oversample, "iterations": iterations}
    return Spectra(pair_spectrum(pair, k, **options) for pair in found)


def pair_spectrum(pair: Pair, k: int, **options: Any) -> Spectrum:
    """The spectrum of one weight before and after; `options` go to `delta_svd`.

    Raises:
      AdapterError: if the weight is not finite.
    """
    svd = delta_svd(pair.base, pair.tuned, pair.axes, k, **options)
    whole = svd.s.shape[-1] == min(pair.matrix)
    found = Spectrum(
        path=pair.path,
        matrix=pair.matrix,
        s=np.asarray(svd.s),
        total=np.asarray(svd.total),
        base=np.asarray(_norm(pair.base, pair.axes)),
        residual=None if whole else np.asarray(svd.residual),
    )
    return _finite(found)


def _adapter_spectrum(site: Site, factors: Mapping[str, Any]) -> Spectrum:
    alike = dataclasses.replace(site, path="", uses=(), rule="")  # one compilation a shape
    s = np.asarray(_singular_values(alike, dict(factors)))
    matrix = fan_in(site.axes, site.shape), fan_out(site.axes, site.shape)
    return _finite(Spectrum(site.path, matrix, s, np.sqrt((s * s).sum(-1))))


@partial(jax.jit, static_argnums=0)
def _singular_values(site: Site, factors: dict[str, Any]) -> jax.Array:
    return factored_svd(site, factors).s


@partial(jax.jit, static_argnums=1)
def _norm(weight: Any, axes: str) -> jax.Array:
    wide = jnp.asarray(weight).astype(jnp.promote_types(jnp.float32, jnp.result_type(weight)))
    return jnp.sqrt((wide * wide).sum(tuple(n for n, a in enumerate(axes) if a != "b")))


def _finite(found: Spectrum) -> Spectrum:
    if not (np.isfinite(found.total).all() and np.isfinite(found.s).all()):
        raise AdapterError(
            f"{found.path!r}: the change of {found.matrix[0]}x{found.matrix[1]} is not finite. "
            "Look for NaN or infinity in the weights before and after."
        )
    return found


def _rank_row(path: str, module: str, picked: Spectrum) -> dict[str, Any]:
    ranks = effective_ranks(picked.s, total=picked.known_total, shape=picked.matrix)
    row: dict[str, Any] = {"path": path, "module": module}
    row |= {"inputs": picked.matrix[0], "outputs": picked.matrix[1], "norm": picked.total}
    if picked.base is not None:
        row["relative"] = picked.total / picked.base if picked.base > 0 else None
    if picked.residual is not None:
        row["residual"] = picked.residual
    return {**row, **ranks._asdict()}


def _energy(picked: Spectrum, rank: int) -> float | None:
    known = picked.s.shape[-1]
    if rank > known and picked.residual is not None:
        return None
    held = energy_by_rank(picked.s, total=picked.known_total)
    return float(held[min(rank, known) - 1])
