"""Watch: says when gradients collapse or explode, at which site, how far, and what to try."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

import rslora_jax as rl

COLLAPSED = 1e-3  # of the median
EXPLODED = 30.0  # times the median
LEAST = 12  # steps before there is a median to compare with
RECENT = 3  # steps in a row that make a collapse: one easy batch is none


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
        self._advice: dict[str, Callable[[], str]] = {
            "exploded": lambda: _calm(learning_rate),
            "collapsed": lambda: _wake(use_rslora, learning_rate),
            "missing": lambda: MISSING,
        }
        self._told: set[str] = set()
        self._first: np.ndarray | None = None
        self._seen = after_step

    def look(self, opt_state: Any) -> list[str]:
        """New warnings, from the state of an optimizer with `rl.optim.record_norms` inside.

        Look more often than the records are long, or steps go by unseen.
        """
        return self.compare(Magnitudes.of(rl.optim.recorded(opt_state)))

    def compare(self, found: Magnitudes) -> list[str]:
        """New warnings, most of the time none."""
        if len(found.steps) < LEAST:
            return []
        usual = np.median(found.values, 0)
        if self._first is None:
            self._first = usual
        fresh = found.steps > self._seen
        self._seen = int(found.steps[-1])
        cases = self._cases(found, usual, fresh)
        new = [(kind, text) for kind, text in cases if text and kind not in self._told]
        self._told.update(kind for kind, _ in new)
        return [f"{text} {self._advice[kind]()}" for kind, text in new]

    def _cases(
        self, found: Magnitudes, usual: np.ndarray, fresh: np.ndarray
    ) -> Sequence[tuple[str, str]]:
        assert self._first is not None
        return (
            # Where a loss has become tiny, one hard batch is no explosion: compare with the start.
            ("exploded", _exploded(found, np.maximum(usual, self._first), fresh)),
            ("collapsed", _collapsed(found, usual)),
            ("missing", _missing(found)),
        )


def _exploded(found: Magnitudes, usual: np.ndarray, fresh: np.ndarray) -> str:
    """Any fresh step far above the usual: a sentence, or nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        times = np.where(usual > 0, found.values / usual, 0.0) * fresh[:, None]
    step, place = np.unravel_index(np.argmax(times), times.shape)
    if not times[step, place] > EXPLODED:
        return ""
    return _sentence(
        found,
        step,
        place,
        f"exploded to {times[step, place]:.3g} times its median "
        f"({found.values[step, place]:.3g} after {usual[place]:.3g})",
        int((times > EXPLODED).any(0).sum()),
    )


def _collapsed(found: Magnitudes, usual: np.ndarray) -> str:
    """The latest steps all far below the usual: a sentence, or nothing."""
    latest = found.values[-RECENT:].max(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(usual > 0, latest / usual, 1.0)
    place = np.argmin(share)
    if not share[place] < COLLAPSED:
        return ""
    return _sentence(
        found,
        -1,
        place,
        f"collapsed to {share[place]:.2g} of its median "
        f"({latest[place]:.3g} after {usual[place]:.3g})",
        int((share < COLLAPSED).sum()),
    )


def _missing(found: Magnitudes) -> str:
    """A place without any gradient at any step: a sentence, or nothing."""
    silent = ~found.values.any(0)
    if not silent.any():
        return ""
    what = f"is 0 in all of the last {len(found.steps)} steps"
    return _sentence(found, -1, np.argmax(silent), what, int(silent.sum()))


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
