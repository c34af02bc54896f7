"""When the training of an encoder ends, and how far it is: pure functions of the encoder's state."""

from __future__ import annotations

import math
from collections.abc import Sequence

from master_service.decisions.settings import StopRule
from master_service.decisions.state import EncoderState


def stop_reason(encoder: EncoderState, rule: StopRule, at: float) -> str:
    """Why the training ends now, in words; empty if it goes on."""
    if encoder.stop_requested:
        return encoder.stop_requested
    if not encoder.started:
        return ""
    if rule.versions is not None and encoder.version - encoder.run_first_version >= rule.versions:
        return f"{rule.versions} versions"
    if rule.updates is not None and encoder.updates - encoder.run_first_update >= rule.updates:
        return f"{rule.updates} updates"
    # the same sum as the coordinator's deadline, so that a Tick at that moment is not a rounding error too early
    if rule.seconds is not None and at >= encoder.run_started_at + rule.seconds:
        return f"{rule.seconds:g} seconds"
    if rule.plateau is not None and encoder.versions_without_gain >= rule.plateau.patience:
        return f"no better loss for {rule.plateau.patience} versions"
    return ""


def progress(encoder: EncoderState, rule: StopRule, at: float) -> float:
    """How far the training is towards its nearest limit, 0 to 1; nodes steer their learning rate by it."""
    if not encoder.started:
        return 0.0
    parts = [0.0]
    if rule.versions is not None:
        parts.append((encoder.version - encoder.run_first_version) / rule.versions)
    if rule.updates is not None:
        parts.append((encoder.updates - encoder.run_first_update) / rule.updates)
    if rule.seconds is not None:
        parts.append((at - encoder.run_started_at) / rule.seconds)
    return min(1.0, max(parts))


def observe_loss(encoder: EncoderState, losses: Sequence[float], rule: StopRule) -> None:
    """Note the mean training loss of a version for the plateau rule; losses that are not finite do not count."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        return
    mean = math.fsum(loss / len(finite) for loss in finite)  # a sum first could pass what a float holds
    margin = rule.plateau.min_change if rule.plateau else 0.0
    if encoder.best_loss is None or mean < encoder.best_loss - margin:
        encoder.best_loss, encoder.versions_without_gain = mean, 0
    else:
        encoder.versions_without_gain += 1
