"""What operators do while it runs: pure functions of the state.

Each is looked at twice by the same function: before it is a row, so that what is refused gets none, and when the row is
folded, because a replay under other settings must not stumble over it.
"""

from __future__ import annotations

from common.errors import UserError
from common.wire.to_master import Admit, Change, Kick, Operation, Pause, Resume
from common.wire.to_node import Answer
from common.wire.update_rule import UpdateRule
from master_service.decisions import changes, membership
from master_service.decisions.effects import Effect, Send
from master_service.decisions.membership import Advance, rule_for, update_rule_of
from master_service.decisions.messages_out import shortened
from master_service.decisions.settings import Settings
from master_service.decisions.state import EncoderState, State


def refused(state: State, operation: Operation) -> str:
    """Why an operation is not even noted, in one line; empty if it is."""
    try:
        match operation:
            case Change():
                _changed(state, operation)
            case Pause() | Resume():
                _meant(state, operation)
            case Kick() | Admit():
                _check_member(state, operation)
    except UserError as error:
        return str(error)
    return ""


def change(state: State, body: Change, at: float, advance: Advance) -> list[Effect]:
    """Settings are others from here on: nodes whose rule it is are told, and what has become due by it is done."""
    try:
        before, after, live = _changed(state, body)
    except UserError as error:
        return [_answered(body, str(error), accepted=False)]
    rules = _rules(state)
    if body.member is None:
        state.configured = state.configured or state.settings
        state.settings, state.live = after, live
        # as it is in a log where nothing was ever changed
        state.configured = state.configured if live else None
    else:
        state.own[body.member] = live
        if not live:
            del state.own[body.member]
    effects: list[Effect] = []
    for encoder in state.encoders.values():
        if encoder.status != "running":
            continue
        for member in encoder.members.values():
            told = update_rule_of(state, member.node)
            if encoder.started and member.accepted and told != rules[encoder.encoder, member.node]:
                effects.append(rule_for(state, encoder, member, at))
        effects += advance(encoder, at)
    return [*effects, _answered(body, changes.in_words(before, after, body.changes))]


def changed_settings(state: State, body: Change) -> Settings | None:
    """The settings that hold after a change of all nodes'; None if it is refused, or of one node alone."""
    try:
        return _changed(state, body)[1] if body.member is None else None
    except UserError:
        return None


def pause(state: State, body: Pause, at: float) -> list[Effect]:
    """No version is made from here on, and nothing runs out. Nodes are told to take no step; what comes is kept."""
    try:
        encoders = _meant(state, body)
    except UserError as error:
        return [_answered(body, str(error), accepted=False)]
    effects: list[Effect] = []
    for encoder in encoders:
        encoder.paused_at = at
        effects += _told(state, encoder, at)
    lines = [f"{each.encoder}: paused at version {each.version}" for each in encoders]
    return [*effects, _answered(body, "\n".join(lines))]


def resume(state: State, body: Resume, at: float, advance: Advance) -> list[Effect]:
    """It goes on as if no time had passed: what counts time counts from as much later."""
    try:
        encoders = _meant(state, body)
    except UserError as error:
        return [_answered(body, str(error), accepted=False)]
    effects: list[Effect] = []
    for encoder in encoders:
        assert encoder.paused_at is not None, "only a paused one is meant"
        # what began meanwhile begins now
        encoder.run_started_at += at - max(encoder.paused_at, encoder.run_started_at)
        encoder.buffer_since += at - max(encoder.paused_at, encoder.buffer_since)
        encoder.paused_at = None
        effects += _told(state, encoder, at) + advance(encoder, at)
    lines = [f"{each.encoder}: goes on from version {each.version}" for each in encoders]
    return [*effects, _answered(body, "\n".join(lines))]


def kick(state: State, body: Kick, at: float, advance: Advance) -> list[Effect]:
    """A node is taken out until it is let in again."""
    try:
        _check_member(state, body)
    except UserError as error:
        return [_answered(body, str(error), accepted=False)]
    effects = membership.kick(state, body.member, body.reason, at, advance)
    return [*effects, _answered(body, f"{body.member} is out; what was counted of it stays counted")]


def admit(state: State, body: Admit) -> list[Effect]:
    """A node is let in again."""
    try:
        _check_member(state, body)
    except UserError as error:
        return [_answered(body, str(error), accepted=False)]
    return [*membership.admit(state, body.member), _answered(body, f"{body.member} may take part again")]


def _check_member(state: State, body: Kick | Admit) -> None:
    """Raises UserError for a node that is not known, or is out, or is not."""
    _check_known(state, body.member)
    if (body.member in state.kicked) == isinstance(body, Kick):
        raise UserError(f"{body.member} is out already" if isinstance(body, Kick) else f"{body.member} is not out")


def _check_known(state: State, node: str) -> None:
    if node not in state.nodes:
        raise UserError(f"no node {node} is known here; there are: {', '.join(state.nodes) or 'none'}")


def _told(state: State, encoder: EncoderState, at: float) -> list[Effect]:
    """Every member has its rule again."""
    members = [each for each in encoder.members.values() if each.accepted and encoder.started]
    return [rule_for(state, encoder, member, at) for member in members]


def _meant(state: State, body: Pause | Resume) -> list[EncoderState]:
    """The encoders that are to rest, or to go on. Raises UserError if there is none."""
    pausing = isinstance(body, Pause)
    found = [each for each in state.encoders.values() if body.encoder in (None, each.encoder)]
    if body.encoder is not None and not found:
        raise UserError(f"no encoder {body.encoder} is known here; there are: {', '.join(state.encoders) or 'none'}")
    meant = [each for each in found if each.status == "running" and (each.paused_at is None) == pausing]
    if not meant and body.encoder is not None and found[0].status == "running":
        raise UserError(f"{body.encoder} is paused already" if pausing else f"{body.encoder} is not paused")
    if not meant and body.encoder is not None:
        raise UserError(f"{body.encoder} is {found[0].status}: only what is being trained is paused")
    if not meant:
        raise UserError("nothing is being trained that could be paused" if pausing else "nothing is paused")
    return meant


def _changed(state: State, body: Change) -> tuple[Settings, Settings, dict[str, object]]:
    """The settings before and after a change, and what is changed then. Raises UserError."""
    if not body.changes and not body.back:
        raise UserError("nothing to change was named; for instance rule.outer.lr=2")
    if body.member is None:
        configured = state.configured or state.settings
        live = changes.above(state.live, body.changes, body.back)
        after = changes.changed(configured, live)
        return state.settings, after, live
    _check_known(state, body.member)
    own = state.own.get(body.member, {})
    live = changes.above(own, body.changes, body.back)
    before, after = (
        state.settings.model_copy(update={"update_rule": changes.changed_for_one(state.settings.update_rule, each)})
        for each in (own, live)
    )
    return before, after, live


def _rules(state: State) -> dict[tuple[str, str], UpdateRule]:
    """By encoder and member, what each has been told to train by."""
    return {
        (encoder.encoder, node): update_rule_of(state, node)
        for encoder in state.encoders.values()
        if encoder.status == "running"
        for node in encoder.members
    }


def _answered(body: Operation, detail: str, *, accepted: bool = True) -> Send:
    return Send(body.sender, Answer(accepted=accepted, detail=shortened(detail)))
