"""Train the bundled vision model: `python scripts/train_pocket_vision.py` draws, trains, checks and exports.

One command, no data from outside. Needs torch (CPU), numpy, pillow, tokenizers and safetensors; nothing
else in the project needs torch. The state is kept in `--work`, and a second call goes on where the first
one stopped. Steps are counted, not minutes: two runs see the same screens in the same order.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from pocket_model import Muon, Schedule
from pocket_vision_batches import Rows
from pocket_vision_export import export
from pocket_vision_losses import NameIds, Probes, all_losses, weights_at
from pocket_vision_model import PocketVisionConfig, PocketVisionModel, initialize
from pocket_vision_screens import COLOURS, SHAPES, WORDS
from pocket_vision_tokens import build_tokenizer, single_ids
from torch import nn

ASSETS = Path(__file__).resolve().parent.parent / "mlx_edge" / "assets" / "pocket_vision"
SAVE_EVERY = 50
LOG_EVERY = 25


SCHEDULE = Schedule(
    (
        (0, 0.02),
        (40, 1.0),
        (1350, 1.0),
        (1400, 0.5),
        (2200, 0.5),
        (3350, 0.003),
    )
)


@dataclass(frozen=True)
class Recipe:
    """How the model is trained."""

    screens: int = 8
    schedule: Schedule = SCHEDULE
    matrix_lr: float = 0.02
    other_lr: float = 3e-3
    seed: int = 0


class Trainer:
    """Model, probes and optimiser, and where they stand."""

    def __init__(self, recipe: Recipe, work: Path, compiled: bool = True) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.path = recipe, work / "pocket_vision.pt"
        self.config = PocketVisionConfig()
        self.model = PocketVisionModel(self.config)
        initialize(self.model)
        self.probes = Probes(self.config.text.hidden_size)
        both = nn.ModuleDict({"model": self.model, "probes": self.probes})
        self.optimizer = Muon(both, recipe.matrix_lr, recipe.other_lr)
        tokenizer = build_tokenizer()
        self.rows = Rows(tokenizer)
        names = (single_ids(tokenizer, names) for names in (WORDS, SHAPES, tuple(COLOURS)))
        self.ids = NameIds(*(torch.tensor(found) for found in names))
        self.step = 0
        if self.path.exists():
            self.load()
        if compiled:
            self.model.model.visual.compile(dynamic=False)
            self.model.model.language_model.compile(dynamic=False)

    def load(self) -> None:
        """Go back to the last checkpoint."""
        state = torch.load(self.path, weights_only=True)
        self.step, self.optimizer.buffers = state["step"], state["buffers"]
        self.model.load_state_dict(state["model"])
        self.probes.load_state_dict(state["probes"])
        self.optimizer.adam.load_state_dict(state["adam"])

    def save(self) -> None:
        """Write everything needed to go on, in one move."""
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "probes": self.probes.state_dict(),
            "buffers": self.optimizer.buffers,
            "adam": self.optimizer.adam.state_dict(),
        }
        torch.save(state, self.path.with_suffix(".part"))
        self.path.with_suffix(".part").replace(self.path)

    def take_step(self) -> dict[str, float]:
        """Train on the next screens and return the losses."""
        recipe, rows = self.recipe, self.rows
        batch = rows.batch(self.step * recipe.screens, recipe.screens)
        seen = self.model(batch.patches, batch.tokens, rows.image_start, rows.turns, rows.mask)
        losses = all_losses(self.model, self.probes, seen, batch, self.ids, rows)
        weights = weights_at(self.step)
        total = sum((weight * losses[name] for name, weight in weights.items()), torch.zeros(()))
        total.backward()
        self.optimizer.step(recipe.schedule.scale(self.step))
        self.step += 1
        return {name: loss.item() for name, loss in losses.items()}

    def run(self, until: int) -> None:
        """Train up to a step, with progress."""
        size = sum(parameter.numel() for parameter in self.model.parameters())
        print(f"{size / 1e6:.3f}M parameters, from step {self.step}", flush=True)
        began, first = time.perf_counter(), self.step
        average: dict[str, float] = {}
        while self.step < until:
            for name, value in self.take_step().items():
                average[name] = 0.9 * average.get(name, value) + 0.1 * value
            if self.step % LOG_EVERY == 0:
                seconds = time.perf_counter() - began
                shown = " ".join(f"{name} {value:.3f}" for name, value in average.items())
                rate = (self.step - first) * self.recipe.screens / seconds
                print(
                    f"step {self.step}/{self.recipe.schedule.steps} {seconds:.0f} s {rate:.1f}/s {shown}",
                    flush=True,
                )
            if self.step % SAVE_EVERY == 0 or self.step == until:
                self.save()


def main() -> None:
    """Train, then write the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/pocket_vision"))
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--until", type=int, help="stop after this step, to go on later")
    parser.add_argument("--no-compile", action="store_true", help="run torch without its compiler")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    recipe = Recipe()
    trainer = Trainer(recipe, options.work, not options.no_compile)
    trainer.run(min(options.until or recipe.schedule.steps, recipe.schedule.steps))
    export(trainer.model, trainer.config, options.out)


if __name__ == "__main__":
    main()
