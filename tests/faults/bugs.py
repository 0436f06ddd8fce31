"""Eight deliberate mistakes in resuming: each must turn the comparison of bits red, or the comparison proves nothing.

`bug.txt` in the folder of the command names one; it is in force from the second attempt on, or at saves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def install(injector: Any) -> None:
    path = injector.folder / "bug.txt"
    if path.exists():
        BUGS[path.read_text()](injector.attempt > 1)


def _skip_a_sample(resumed: bool) -> None:
    from orchestrator.data.stream import Filler

    fill, left = Filler.fill, [resumed]

    def shortened(self: Filler, request: Any) -> Any:
        if left.pop():
            request = request._replace(ids=request.ids[1:], copies=request.copies[1:], rows=request.rows - 1)
        left.append(False)
        return fill(self, request)

    Filler.fill = shortened


def _drop_the_momentum(resumed: bool) -> None:
    from orchestrator.train.loop import StepBorder

    start = StepBorder.on_train_start

    def forgetful(self: StepBorder, trainer: Any, pl_module: Any) -> None:
        start(self, trainer, pl_module)
        if resumed:
            trainer.optimizers[0].state.clear()

    StepBorder.on_train_start = forgetful


def _forget_the_average(resumed: bool) -> None:
    _change_loaded(resumed, lambda state: setattr(state, "ema", None))


def _forget_the_step(resumed: bool) -> None:
    """The schedule of the learning rate begins anew."""
    from orchestrator.model.module import Classifier, learning_rate_factor

    def rate(self: Classifier) -> float:
        span, step = self.span, self.step - (self.span.first_step if resumed else 0)
        return self.peak_lr * learning_rate_factor(self.config.recipe, step, span.steps_per_epoch, span.total_steps)

    Classifier.lr = property(rate)  # pyright: ignore[reportAttributeAccessIssue]


def _forget_random_states(resumed: bool) -> None:
    """Dropout draws on from where a fresh process stands, as it does where nothing is restored."""
    from orchestrator.model.module import Classifier

    if resumed:
        Classifier.on_train_batch_start = lambda self, batch, batch_idx: None


def _save_buffers_of_another_rank(resumed: bool) -> None:
    from orchestrator.train.loop import StepBorder

    collect = StepBorder._state

    def mixed_up(self: StepBorder, trainer: Any) -> Any:
        state = collect(self, trainer)
        for name in sorted(state.model):
            if "running" in name:
                state.model[name] = state.model[name].clone()
                dist.broadcast(state.model[name], 1)
        return state

    StepBorder._state = mixed_up


def _resume_one_step_off(resumed: bool) -> None:
    from orchestrator.train import assembly

    span = assembly.Span

    def late(first_step: int, *arguments: Any, **named: Any) -> Any:
        return span(first_step + (first_step > 0 and resumed), *arguments, **named)

    assembly.Span = late  # pyright: ignore[reportAttributeAccessIssue]


def _load_a_stale_checkpoint(resumed: bool) -> None:
    """Tensors of the checkpoint before the one whose step the run goes on from."""
    from orchestrator.train.checkpoint import Checkpoint

    load = Checkpoint.load_state

    def stale(self: Checkpoint) -> Any:
        older = [path for path in sorted(self.folder.parent.glob("step_*")) if path < self.folder]
        return load(Checkpoint(older[-1], self.manifest) if resumed else self)

    Checkpoint.load_state = stale


def _change_loaded(resumed: bool, change: Callable[[Any], None]) -> None:
    from orchestrator.train.checkpoint import Checkpoint

    load = Checkpoint.load_state

    def changed(self: Checkpoint) -> Any:
        state = load(self)
        if resumed:
            change(state)
        return state

    Checkpoint.load_state = changed


BUGS: dict[str, Callable[[bool], None]] = {
    "skip a sample": _skip_a_sample,
    "drop the momentum": _drop_the_momentum,
    "forget the moving average": _forget_the_average,
    "forget the step of the schedule": _forget_the_step,
    "forget random states": _forget_random_states,
    "save another rank's buffers": _save_buffers_of_another_rank,
    "resume one step off": _resume_one_step_off,
    "load a stale checkpoint": _load_a_stale_checkpoint,
}
