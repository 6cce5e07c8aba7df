"""How fast the fine-tune program trains SmolLM2: beside PEFT, transformers and torch on this CPU.

Both sides train the same adapters (the program's own, exported and loaded by PEFT) on the same
packed batches in float32, each with AdamW, clipping and the same learning rates, step by step in
turn, in one process. PEFT's loss is that of transformers, over the logits of all tokens. Needs
the extra `interop`:

    PYTHONPATH=. python tests/benchmarks/finetune_peft.py [--steps 6] [--json FILE]

That both compute the same thing is seen from their losses, step by step. Threads of torch that
wait for one another suffer most from other work on the machine: there `OMP_NUM_THREADS=1 taskset
-c 0` in front gives both sides one core, and processor times that can be compared.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import jax
import numpy as np
import peft
import torch
import transformers

import rslora_jax as rl
from finetune import exports, job, program
from finetune.batches import Batch
from finetune.settings import Settings
from hosts import mesh_of
from rslora_jax.tables import Table
from tests.benchmarks import finetune_speed as speed
from tests.benchmarks.step_cost import compiled_cost, interleaved

PEFT = "PEFT"
IGNORED = -100


def export(folder: Path, settings: Settings, source: Any, made: job.Job) -> None:
    """Writes the model and the adapters as they are at the start."""
    params, sites = rl.LoraParams(made.base, made.start.lora), made.adapted.sites
    exports.merge(folder / "model", source, params, sites)  # b is zero: this is the base
    where = {"form": "native", "base_model": str(folder / "model")}
    rl.peft.save(folder / "adapter", params.lora, sites, **where)


def loaded(folder: Path) -> torch.nn.Module:
    """What was exported, in PEFT, ready to be trained."""
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).train()


def in_torch(batch: Batch) -> dict[str, torch.Tensor]:
    """A packed batch as transformers takes it: every token sees its own text, up to itself."""
    host = jax.tree.map(np.asarray, batch)
    length = host.tokens.shape[1]
    same = host.segments[:, None, :, None] == host.segments[:, None, None, :]
    labels = np.full(host.tokens.shape, IGNORED, np.int64)
    rows, columns = np.nonzero(host.weights)
    labels[rows, host.positions[rows, columns]] = host.labels[rows, columns]
    arrays = {
        "input_ids": host.tokens.astype(np.int64),
        "attention_mask": same & np.tri(length, dtype=bool),
        "position_ids": host.offsets.astype(np.int64),
        "labels": labels,
        "shift_labels": labels,  # they stand where they are predicted, not one further
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class TorchTrainer:
    """Trains PEFT's model, a batch a call; keeps its losses."""

    def __init__(self, model: Any, settings: Settings, rates: Any, batches: Sequence[Any]) -> None:
        """Starts at the first batch."""
        self._model, self._settings, self._rates = model, settings, rates
        self._trained = [leaf for leaf in model.parameters() if leaf.requires_grad]
        decay = settings.weight_decay
        self._optimizer = torch.optim.AdamW(self._trained, weight_decay=decay)
        self._batches = iter(batches)
        self.losses: list[float] = []
        self.processor: list[float] = []

    def __call__(self) -> None:
        """One step."""
        start = time.process_time()
        for group in self._optimizer.param_groups:
            group["lr"] = float(self._rates(len(self.losses)))
        loss = self._model(**next(self._batches), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, self._settings.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.losses.append(loss.item())
        self.processor.append(time.process_time() - start)


def measure(settings: Settings) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """One row for each side, ratios to PEFT; and the losses of each."""
    data = program.read(settings)
    mesh = mesh_of(1, None, 1, settings.batch)
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        made = job.make(settings, data.source, data.batches, mesh)
        export(Path(folder), settings, data.source, made)
        batches = [made.place(made.batches.read(n, made.rows)) for n in range(made.batches.steps)]
        state = made.start.lora, made.start.opt_state
        compiled = made.step.lower(made.base, *state, batches[0]).compile()
        ours = speed.Side(compiled, compiled_cost(compiled))
        rates = job.schedule(settings, data.batches)
        trainers = {
            speed.OURS: speed.Trainer(ours, made.base, state, batches),
            PEFT: TorchTrainer(loaded(Path(folder)), settings, rates, list(map(in_torch, batches))),
        }
        times = interleaved(trainers, len(batches) - 1, time.perf_counter)
    tokens = [int((batch.segments > 0).sum()) for batch in batches[1:]]
    processor = {name: trainer.processor[1:] for name, trainer in trainers.items()}
    rows = [
        {"way": name, **speed.speed_of(name, PEFT, times, processor, tokens)} for name in trainers
    ]
    return rows, {name: trainer.losses for name, trainer in trainers.items()}


def main() -> None:
    """Measures, prints, and writes JSON if asked."""
    parser = speed.parser_of(str(__doc__))
    options = parser.parse_args()
    settings = speed.settings_of(options)
    rows, losses = measure(settings)
    versions = f"peft {peft.__version__}, torch {torch.__version__}"
    about = f"{speed.about(settings)}; {versions}, {torch.get_num_threads()} threads"
    print(about)
    print(Table.of(rows))
    print("x: ratio to PEFT, more is faster; median (quartiles) over the steps.")
    print(f"losses differ by {speed.furthest(losses, PEFT):.1e} of their size at most")
    print("losses:", *(f"{loss:.4f}" for loss in losses[speed.OURS]))
    if options.json:
        told = {"about": about, "rows": rows, "losses": losses}
        options.json.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
