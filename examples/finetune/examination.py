"""Examination: the held-out rows of a run, and the model's own answers to some of them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

import rslora_jax as rl
from finetune.batches import Batch, fixed, local_rows, place
from finetune.corpus import Corpus
from finetune.evaluation import Evaluation, answer, evaluate
from finetune.model import ROWS, Adapted
from finetune.processes import whole
from finetune.settings import Settings
from finetune.step import scores_of
from generate import Cache, empty_cache, generate, left_padded


class StoppedError(Exception):
    """A notice came in the midst of an evaluation, which is left out."""


class Examination:
    """Called as ``examine(step, params, stop)``; gives None if it was stopped."""

    def __init__(
        self, settings: Settings, source: Any, corpus: Corpus, adapted: Adapted, mesh: Mesh
    ) -> None:
        """Compiles nothing yet."""
        self._tokenizer, self._eos, self._adapted = source.tokenizer, source.eos, adapted
        self._asked = corpus.held[: settings.eval_generate]
        self._batches = fixed(corpus.held, settings.batch, settings.length)
        self._place, self._size = NamedSharding(mesh, ROWS), settings.batch
        self._split = mesh.size // mesh.shape["tensor"]  # what the number of rows must divide by
        self._scores = jax.jit(lambda params, batch: scores_of(adapted.apply, params, batch))

    def __call__(
        self, step: int, params: rl.LoraParams, stop: Callable[[], bool]
    ) -> Evaluation | None:
        """Scores all held-out rows, and lets the model answer a few."""
        try:
            held = evaluate(self._scores, params, self._placed(stop))
            said = answer(self._write(params, stop), self._asked, self._tokenizer)
        except StoppedError:
            return None
        return Evaluation(step, held, said)

    def _placed(self, stop: Callable[[], bool]) -> Iterator[Batch]:
        rows = local_rows(self._place, (self._size, 1))
        for batch in self._batches:
            _check(stop)
            yield place(Batch(*(field[rows] for field in batch)), self._place, self._size)

    def _write(self, params: rl.LoraParams, stop: Callable[[], bool]) -> Callable[..., Any]:
        def write(prompts: Sequence[np.ndarray], limit: int) -> Any:
            _check(stop)
            some = [*prompts, *[prompts[0]] * (-len(prompts) % self._split)]
            tokens, lengths = left_padded(some)
            cache = self._room(len(some), tokens.shape[1] + limit)
            said = generate(
                self._adapted.apply, params, cache, tokens, lengths, limit=limit, eos=self._eos
            )
            return whole(said).rows()[: len(prompts)]

        return write

    def _room(self, rows: int, length: int) -> Cache:
        model = self._adapted.model
        return empty_cache(model.config, rows, length, model.dtype)


def _check(stop: Callable[[], bool]) -> None:
    if stop():
        raise StoppedError
