"""When the training of an encoder ends, how far it is, and how good: pure functions of the encoder's state.

How good is what the members measure on validation samples of their own. They measure every so many versions
(`UpdateRule.evaluate_every`), each at its own pace, so what they say comes together in windows of so many versions,
[0, 10), [10, 20), …: in each a member's newest measurement counts. A window is closed once as many versions again were
made, or at the end; later measurements in it change nothing. Its loss is the median over the members that measured in
it, its version the newest that they measured. It is better than the best so far if the median gain of the members that
measured in both is above `min_change`: so nobody's coming or going passes for a gain, and no minority's claim does.
Where these are less than half of the best one's members that are still active it is not compared at all; where none of
those is active, it begins anew. So it does where most of those who measured are not among the best one's members; and
a window in which less than half of those measured who do so at all, and are active, is not compared either.

Logs of masters that took claims as facts say so (`Claims`): there every median is a mean, of any number that a float
holds, and the last two conditions are not there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median, median_high

from common.wire.to_master import UpdateManifest
from master_service.decisions.guarding import MAX_LOSS
from master_service.decisions.settings import Claims, StopRule
from master_service.decisions.state import EncoderState, Measured


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
    if rule.plateau is not None:
        return _plateau(encoder, rule.plateau.patience)
    return ""


def _plateau(encoder: EncoderState, patience: int) -> str:
    """By held-out losses where any have come together, else by the training losses that the nodes claim."""
    if encoder.best_version is None or encoder.held_out_version is None:
        return f"no better loss for {patience} versions" if encoder.versions_without_gain >= patience else ""
    without_gain = encoder.held_out_version - encoder.best_version
    return f"no better held-out loss for {patience} versions" if without_gain >= patience else ""


def progress(encoder: EncoderState, rule: StopRule, at: float) -> float:
    """How far the training is towards its nearest limit, 0 to 1; nodes steer their learning rate by it."""
    if not encoder.started:
        return 0.0
    at = at if encoder.paused_at is None else encoder.paused_at
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
    mean = _mean(finite)
    margin = rule.plateau.min_change if rule.plateau else 0.0
    if encoder.best_loss is None or mean < encoder.best_loss - margin:
        encoder.best_loss, encoder.versions_without_gain = mean, 0
    else:
        encoder.versions_without_gain += 1


def observe_losses(encoder: EncoderState, rule: StopRule) -> None:
    """Note the training loss of a version for the plateau rule: the median over the active nodes of what each said
    last, so that a node counts once, whoever this version is made of. As long as no more than half have said something
    nothing is noted, and of two in the middle the higher one is taken: a single low claim would be a best for ever."""
    losses = encoder.tally.losses
    observe_loss(encoder, [median_high(losses)] if 2 * len(losses) > encoder.tally.active else [], rule)


def observe_held_out(encoder: EncoderState, update: UpdateManifest, every: int, claims: Claims) -> None:
    """Note what an accepted update says of the validation samples of its node."""
    loss, version = update.held_out, update.held_out_version
    if loss is None or version is None or not encoder.run_first_version <= version <= encoder.version:
        return
    if claims != "taken" and not abs(loss) <= MAX_LOSS:
        return
    member = encoder.members[update.node]
    if member.held_out is None or version >= member.held_out.version:
        member.held_out = Measured(version, loss)
    window = version - version % every if every > 0 else version
    if every == 0 or encoder.version >= window + 2 * every:
        return  # closed, or nobody was asked
    before = encoder.measured.setdefault(window, {}).get(update.node)
    if before is None or version >= before.version:
        encoder.measured[window][update.node] = Measured(version, loss)


def close_windows(encoder: EncoderState, rule: StopRule, every: int, claims: Claims, *, ending: bool = False) -> None:
    """Close the windows whose time has come, at the end all, the oldest first."""
    margin = rule.plateau.min_change if rule.plateau else 0.0
    for window in sorted(encoder.measured):
        if ending or encoder.version >= window + 2 * every:
            close = _close if claims != "taken" else _close_taken
            close(encoder, encoder.measured.pop(window), margin)


def forget_held_out(encoder: EncoderState) -> None:
    """Another run begins: what was measured in the one before is no yardstick for it."""
    encoder.measured, encoder.best_measured = {}, {}
    encoder.held_out = encoder.held_out_version = encoder.best_held_out = encoder.best_version = None


def _close(encoder: EncoderState, measured: dict[str, Measured], margin: float) -> None:
    losses = {node: each.loss for node, each in measured.items()}
    measuring = [each.node for each in encoder.members.values() if each.active and each.held_out is not None]
    if 2 * sum(node in losses for node in measuring) < len(measuring):
        return
    still = [node for node in encoder.best_measured if encoder.members[node].active]
    both = [node for node in still if node in losses]
    anew = 2 * len(both) < len(losses)
    if 2 * len(both) < len(still) and not anew:
        return
    encoder.held_out = median(losses.values())
    encoder.held_out_version = max(each.version for each in measured.values())
    if anew or median(encoder.best_measured[node] - losses[node] for node in both) > margin:
        encoder.best_held_out, encoder.best_version = encoder.held_out, encoder.held_out_version
        encoder.best_measured = losses


def _close_taken(encoder: EncoderState, measured: dict[str, Measured], margin: float) -> None:
    losses = {node: each.loss for node, each in measured.items()}
    still = [node for node in encoder.best_measured if encoder.members[node].active]
    both = [node for node in still if node in losses]
    if 2 * len(both) < len(still):
        return
    encoder.held_out = _mean(list(losses.values()))
    encoder.held_out_version = max(each.version for each in measured.values())
    # halves, because the difference of two could pass what a float holds
    gains = [encoder.best_measured[node] / 2 - losses[node] / 2 for node in both]
    if not gains or _mean(gains) > margin / 2:
        encoder.best_held_out, encoder.best_version = encoder.held_out, encoder.held_out_version
        encoder.best_measured = losses


def _mean(values: Sequence[float]) -> float:
    return math.fsum(value / len(values) for value in values)  # a sum first could pass what a float holds
