"""Steps of gradient descent that can be cut short and gone on with; the best weights are kept."""

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

Batch = TypeVar("Batch")


class Pace(NamedTuple):
    """How fast to learn."""

    warm_up: float = 0.06  # share of the steps; from there the rate falls evenly to 0
    save_every: int = 50  # steps
    looks: int = 8  # at the held-out loss, evenly over the run
    patience: int = 3  # looks without a better one end the run


def through(folder: Path) -> bool:
    """Whether a run has ended there. One killed before it first saved may have left model.pt."""
    return (folder / "last.pt").exists() and not (folder / "state.pt").exists()


class Loop(Generic[Batch]):
    """One training run: model, optimiser, schedule, and where it stands.

    The folder gets curve.jsonl, the weights of the lowest held-out loss as model.pt, those of the
    last step as last.pt (they may rank better and be calibrated worse) and, until the run is
    through, state.pt.
    """

    def __init__(
        self, folder: Path, model: nn.Module, groups: list[dict[str, Any]],
        loss: Callable[[Batch], Tensor], held_out: Callable[[], float], steps: Sequence[Batch],
        pace: Pace,
    ) -> None:  # fmt: skip
        """Goes on from the folder's state.pt where there is one.

        groups: of parameters with their rates, as torch's optimisers take them.
        loss: of a batch, to learn from. held_out: loss of what is held out, lower is better.
        """
        self._folder, self._model, self._steps, self._pace = folder, model, steps, pace
        self._loss, self._held_out = loss, held_out
        self._optimiser = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
        warm = max(1, int(pace.warm_up * len(steps)))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimiser,
            lambda step: min((step + 1) / warm, max(0.0, 1 - step / len(steps))),
        )
        self._step, self._best, self._worse = 0, float("inf"), 0
        self._curve: list[dict[str, float]] = []
        if (folder / "state.pt").exists():
            self._resume()

    def go(self) -> None:
        """The steps that are left; state.pt goes when nothing is left to resume.

        SIGTERM ends the run after the step under way, with SystemExit: start it again to go on.
        """
        asked: list[int] = []
        before = signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
        try:
            self._go(asked)
        finally:
            signal.signal(signal.SIGTERM, before)

    def _go(self, asked: list[int]) -> None:
        count, pace = len(self._steps), self._pace
        looks = {round(count * look / pace.looks) for look in range(1, pace.looks + 1)}
        with tqdm(total=count, initial=self._step, mininterval=10) as progress:
            for batch in self._steps[self._step :]:
                loss = self._learn(batch)
                self._step += 1
                self._curve.append({"step": self._step, "loss": round(loss, 5)})
                progress.update()
                progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
                if self._step in looks:
                    self._keep_if_best()
                if self._step % pace.save_every == 0 or asked:
                    self._save()
                if asked:
                    raise SystemExit(f"stopped after step {self._step}; start again to go on")
                if self._worse >= pace.patience:
                    break
        self._save()
        torch.save(self._model.state_dict(), self._folder / "last.pt")
        (self._folder / "state.pt").unlink()

    def _learn(self, batch: Batch) -> float:
        self._model.train()
        self._optimiser.zero_grad()
        loss = self._loss(batch)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimiser.step()
        self._schedule.step()
        return loss.item()

    def _keep_if_best(self) -> None:
        self._model.eval()
        with torch.no_grad():
            loss = self._held_out()
        print(f"step {self._step}: held-out loss {loss:.4f}", flush=True)
        self._curve[-1]["held_out"] = round(loss, 5)
        self._worse = 0 if loss < self._best else self._worse + 1
        if loss < self._best:
            self._best = loss
            torch.save(self._model.state_dict(), self._folder / "model.pt")

    def _save(self) -> None:
        state = {
            "model": self._model.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "schedule": self._schedule.state_dict(),
            "step": self._step,
            "best": self._best,
            "worse": self._worse,
            "curve": self._curve,
        }
        part = self._folder / "state.part"
        torch.save(state, part)
        part.replace(self._folder / "state.pt")  # a kill in between leaves the last whole one
        lines = "".join(json.dumps(point) + "\n" for point in self._curve)
        (self._folder / "curve.jsonl").write_text(lines)

    def _resume(self) -> None:
        state: dict[str, Any] = torch.load(self._folder / "state.pt", weights_only=True)
        self._model.load_state_dict(state["model"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._schedule.load_state_dict(state["schedule"])
        self._step, self._best, self._worse = state["step"], state["best"], state["worse"]
        self._curve = state["curve"]
