"""Watch: says when gradients collapse or explode, at which site, how far, and what to try."""

from typing import Any, NamedTuple

import numpy as np

import rslora_jax as rl

COLLAPSED = 1e-3  # of the median
EXPLODED = 30.0  # times the median
LEAST = 12  # steps before there is anything to say
FEW = 3  # steps that make a median, or a collapse: one easy batch is none


class Magnitudes(NamedTuple):
    """Sizes of the gradients of `a` and `b` together, root of the sum of squares.

    Attributes:
      steps: the numbers of the steps as a run counts them, from 1: int [n].
      places: which layer of which site, such as ``layers/q/kernel[3]``.
      values: float [n, places]; NaN becomes infinity.
    """

    steps: np.ndarray
    places: tuple[str, ...]
    values: np.ndarray

    @classmethod
    def of(cls, records: rl.optim.Records) -> "Magnitudes":
        """Reads what `record_norms` kept."""
        places, columns = [], []
        for path, norms in records.norms.items():
            sizes = np.hypot(norms[..., 0], norms[..., 1])
            for index in np.ndindex(sizes.shape[1:]):
                places.append(f"{path}[{','.join(map(str, index))}]" if index else path)
                columns.append(sizes[(slice(None), *index)])
        values = np.nan_to_num(np.stack(columns, 1), nan=np.inf, posinf=np.inf)
        return cls(records.steps + 1, tuple(places), values)


class Watch:
    """Compares the gradients of every layer with what they were; warns once of each kind.

    Example:
      >>> watch = Watch(use_rslora=False, learning_rate=1e-3)
      >>> values = np.ones((16, 1))
      >>> values[-1] = 45.0
      >>> print(*watch.compare(Magnitudes(np.arange(1, 17), ("q/kernel",), values)))
      step 16: the gradient at q/kernel exploded to 45 times its median (45 after 1). Try ...
    """

    def __init__(self, use_rslora: bool, learning_rate: float, after_step: int = 0) -> None:
        """Watches the steps after one.

        Args:
          use_rslora: whether the scale is alpha/sqrt(rank); advice depends on it.
          learning_rate: of the run; advice depends on it.
          after_step: the step that the run goes on from: what was before was spoken of then.
        """
        self._advice = {
            "exploded": _calm(learning_rate),
            "collapsed": _wake(use_rslora, learning_rate),
            "missing": MISSING,
        }
        self._told: set[str] = set()
        self._start: np.ndarray | None = None
        self._seen = self._after = after_step

    def look(self, opt_state: Any) -> list[str]:
        """New warnings, from the state of an optimizer with `rl.optim.record_norms` inside.

        Look more often than the records are long, or steps go by unseen.
        """
        return self.compare(Magnitudes.of(rl.optim.recorded(opt_state)))

    def compare(self, found: Magnitudes) -> list[str]:
        """New warnings, most of the time none."""
        if len(found.steps) < LEAST:
            return []
        beginning = self._start is None and not self._after
        if self._start is None:
            self._start = np.median(found.values[:FEW], 0)
        cases = {
            "exploded": _exploded(found, self._start, self._seen),
            # All of a first look may lie behind a collapse at the first steps.
            "collapsed": _collapsed(found, self._start if beginning else np.zeros(())),
            "missing": _missing(found),
        }
        self._seen = int(found.steps[-1])
        new = [kind for kind, text in cases.items() if text and kind not in self._told]
        self._told.update(new)
        return [f"{cases[kind]} {self._advice[kind]}" for kind in new]


def _exploded(found: Magnitudes, start: np.ndarray, seen: int) -> str:
    """A step after `seen` that is far above those before it: a sentence, or nothing.

    Where a loss has become tiny, one hard batch is no explosion: `start` [places] is usual too.
    """
    fresh = [k for k in range(FEW, len(found.steps)) if found.steps[k] > seen]
    if not fresh:
        return ""
    usual = np.stack([np.maximum(np.median(found.values[:k], 0), start) for k in fresh])
    times = _ratio(found.values[fresh], usual, 0.0)
    row, place = np.unravel_index(np.argmax(times), times.shape)
    if not times[row, place] > EXPLODED:
        return ""
    after = f"({found.values[fresh[row], place]:.3g} after {usual[row, place]:.3g})"
    what = f"exploded to {times[row, place]:.3g} times its median {after}"
    count = int((times > EXPLODED).any(0).sum())
    return _sentence(found, fresh[row], place, what, count)


def _collapsed(found: Magnitudes, start: np.ndarray) -> str:
    """The latest steps, all far below those before them: a sentence, or nothing."""
    usual = np.maximum(np.median(found.values[:-FEW], 0), start)
    latest = found.values[-FEW:].max(0)
    share = _ratio(latest, usual, 1.0)
    place = np.argmin(share)
    if not share[place] < COLLAPSED:
        return ""
    after = f"({latest[place]:.3g} after {usual[place]:.3g})"
    what = f"collapsed to {share[place]:.2g} of its median {after}"
    return _sentence(found, -1, place, what, int((share < COLLAPSED).sum()))


def _missing(found: Magnitudes) -> str:
    """A place without any gradient at any step: a sentence, or nothing."""
    silent = ~found.values.any(0)
    if not silent.any():
        return ""
    what = f"is 0 in all of the last {len(found.steps)} steps"
    return _sentence(found, -1, np.argmax(silent), what, int(silent.sum()))


def _ratio(above: np.ndarray, below: np.ndarray, otherwise: float) -> np.ndarray:
    """Entry by entry; `otherwise` where there is nothing usual, or nothing finite, to divide by."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((below > 0) & np.isfinite(below), above / below, otherwise)


def _sentence(found: Magnitudes, step: Any, place: Any, what: str, count: int) -> str:
    others = f", and {count - 1} more like it" if count > 1 else ""
    return f"step {found.steps[step]}: the gradient at {found.places[place]}{others} {what}."


def _calm(learning_rate: float) -> str:
    return (
        f"Try a learning_rate of {learning_rate / 3:.2g} in place of {learning_rate:.2g}, a longer "
        "warmup, or clip: 1.0; and look at the rows of that step."
    )


def _wake(use_rslora: bool, learning_rate: float) -> str:
    start = "If the loss is near 0 there is nothing left to learn: stop here. Otherwise try "
    if not use_rslora:
        return start + "use_rslora: true, which keeps the signal from shrinking with the rank."
    return start + f"a learning_rate below {learning_rate:.2g}: the step before went too far."


MISSING = (
    "It learns nothing: leave it out of targets, or look at why the loss does not depend on it."
)
