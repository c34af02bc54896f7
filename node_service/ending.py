"""What a node does once it has the last version of an encoder: it exports its whole model, after a finishing phase that
it goes through by itself where the rule has one. The master waits for none of it."""

from __future__ import annotations

from pathlib import Path

import structlog

from common.wire.to_node import Instruction
from common.wire.transfer import CompleteVersion
from node_service.figures import NodeFigures
from node_service.handover.local_state import LocalState
from node_service.training.looks import Looks
from node_service.training.training import Training

log = structlog.get_logger()


class Ending:
    """`begin` when the last version was read; then `stepped` after every step while `training.finishing` says that the
    phase goes on. `finished`: a whole model was exported. `export` is where to; None: into the state directory."""

    def __init__(self, name: str, state: LocalState, figures: NodeFigures, export: Path | None) -> None:
        self.finished = False
        self._name = name
        self._state = state
        self._figures = figures
        self._export = export

    def begin(self, training: Training, read: CompleteVersion) -> None:
        """Take the last version. Raises what `Training.finish` raises."""
        model = training.finish(read, self._export)
        phase = training.finishing
        if phase is not None:
            # written before what was trained is forgotten: a process that dies in between goes on with the phase
            self._state.remember_finishing(training.instruction)
        self._state.forget_current()
        if phase is not None:
            self._figures.note = _progress(phase)
            log.info("finishing phase begins", **self._about(training), steps=phase.total, held_out=_short(phase.best))
        elif model is not None:
            self._exported(training, model)

    def stepped(self, training: Training, phase: Looks) -> None:
        """A step of the phase was taken. Raises what `Training.conclude` raises."""
        self._figures.note = _progress(phase)
        if phase.over:
            self.end(training)

    def end(self, training: Training | None) -> None:
        """End the phase with its best so far, if there is one. Raises what `Training.conclude` raises."""
        phase = training.finishing if training is not None else None
        if training is None or phase is None:
            return
        model = training.conclude(self._export)
        self._state.forget_finishing()
        facts = {"steps": phase.steps, "held_out_before": _short(phase.before), "held_out_after": _short(phase.best)}
        log.info("finishing phase ended", **self._about(training), **facts)
        self._exported(training, model)

    def left(self) -> Instruction | None:
        """The encoder whose phase an earlier process began."""
        return self._state.finishing()

    def go_on(self, training: Training) -> None:
        """Go on with that phase, the master being there or not. Raises UserError if it is damaged."""
        goes_on = training.finish_on()
        self._state.forget_current()  # a process that died in `begin` may have left it
        phase = training.finishing
        if not goes_on or phase is None:
            self._state.forget_finishing()  # one that died in `end` had exported
            self._figures.note = "finished"
            self.finished = True
            return
        self._figures.steps, self._figures.version = training.steps, training.version
        self._figures.note = _progress(phase)
        log.info("finishing phase goes on", **self._about(training), done=phase.steps, steps=phase.total)

    def _exported(self, training: Training, model: Path) -> None:
        self._figures.note = "finished"
        figures = self._figures
        log.info(
            "encoder finished",
            **self._about(training),
            model=str(model),
            steps=training.steps,
            seconds=round(figures.training_seconds + figures.waiting_seconds, 1),
            step_seconds=round(figures.step_seconds, 1),
            lost_seconds={what: round(seconds, 1) for what, seconds in figures.lost_seconds.items()},
        )
        self.finished = True

    def _about(self, training: Training) -> dict[str, object]:
        return {"node": self._name, "encoder": training.instruction.encoder, "version": training.version}


def _progress(phase: Looks) -> str:
    """A finishing phase in a note."""
    words = f"finishing {phase.steps}/{phase.total} steps"
    if phase.newest is None or phase.best is None:
        return words
    return f"{words}, held-out {phase.newest:.2f} (best {phase.best:.2f})"


def _short(loss: float | None) -> float | None:
    """A loss for a line of the log."""
    return None if loss is None else round(loss, 3)
