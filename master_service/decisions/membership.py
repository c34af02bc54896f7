"""Nodes come, are let in, vanish, leave and ask: pure functions of the state.

`advance` is called when an encoder's nodes have changed: the coordinator may then step, or end the training.
"""

from __future__ import annotations

from collections.abc import Callable

from common.wire.to_master import Fetch, FetchAssets, InstructionAck, Join, Leave
from common.wire.to_node import Introduce, Rule, Withdrawn
from common.wire.update_rule import UpdateRule
from master_service.decisions import gathering, streams
from master_service.decisions.changes import changed_for_one
from master_service.decisions.effects import Effect, Send
from master_service.decisions.messages_out import (
    finish,
    instruction,
    kicked,
    notify,
    provide_again,
    publish,
    publish_again,
    unmade,
)
from master_service.decisions.records import Presence
from master_service.decisions.settled import remember
from master_service.decisions.state import EncoderState, Member, NodeState, State
from master_service.decisions.stopping import progress
from master_service.decisions.tally import changing, enrolled

Advance = Callable[[EncoderState, float], list[Effect]]


def join(state: State, body: Join) -> list[Effect]:
    """A node introduces itself, is told what is running for it, and asked for words if some are being gathered. Of a
    type whose newest encoder could not be made it is told why: nothing else comes of its waiting."""
    state.nodes[body.node] = NodeState(node=body.node, incarnation=body.incarnation, types=body.types)
    if body.node in state.kicked:
        mine = [each for each in state.encoders.values() if each.encoder_type in body.types]
        return [_out(state, body.node, each.encoder) for each in mine if each.status == "running"]
    effects = gathering.ask(state, body.node)
    newest: dict[str, EncoderState] = {}
    for encoder in state.encoders.values():
        if encoder.encoder_type in body.types:
            newest[encoder.encoder_type] = encoder
            if encoder.status == "running":
                effects.append(Send(body.node, instruction(encoder)))
    return effects + [Send(body.node, unmade(each)) for each in newest.values() if each.status == "failed"]


def ack(state: State, body: InstructionAck, at: float, advance: Advance) -> list[Effect]:
    """A node is in, or refuses. Its returns are kept when it comes back under a new incarnation."""
    encoder = state.encoders.get(body.encoder)
    if encoder is None or encoder.status == "failed":
        return [Send(body.node, Withdrawn(encoder=body.encoder))] if body.accepted else []
    if encoder.status == "finished":
        return [Send(body.node, finish(encoder))] if body.accepted else []
    if encoder.status != "running":
        return []
    if body.node in state.kicked:
        return [_out(state, body.node, body.encoder)] if body.accepted else []
    known = state.nodes.get(body.node)
    if known is None or known.incarnation != body.incarnation:
        return [Send(body.node, Introduce(node=body.node))]
    known.present = True
    member = encoder.members.get(body.node)
    if not body.accepted:
        if member is not None:
            with changing(encoder, member):
                member.accepted = False
        return advance(encoder, at)
    if member is None:
        member = enrolled(encoder, Member(node=body.node, incarnation=body.incarnation, samples=body.samples))
    member.incarnation = body.incarnation
    remember(member, body.incarnation)
    with changing(encoder, member):
        member.accepted, member.present, member.samples = True, True, body.samples
        member.named = body.named
    return _rules(state, encoder, [body.node], at) if encoder.started else _begin(state, encoder, at)


def leave(state: State, body: Leave, at: float, advance: Advance) -> list[Effect]:
    """A node goes: nobody waits for it any more. What it handed in stays; to come back it joins again."""
    known = state.nodes.get(body.node)
    if known is None or known.incarnation != body.incarnation:
        return []
    known.present = False
    effects: list[Effect] = []
    for encoder in state.encoders.values():
        member = encoder.members.get(body.node)
        if member is not None and member.accepted:
            encoder.waiting.pop(body.node, None)
            with changing(encoder, member):
                member.accepted = False
            effects += advance(encoder, at)
        effects += streams.gone(encoder, body.node, at)
    return effects + gathering.look(state, at)


def presence(state: State, body: Presence, at: float, advance: Advance) -> list[Effect]:
    """A node vanished, or is back without having left: the rules count with it or not."""
    known = state.nodes.get(body.node)
    if known is None:
        return []
    known.present = body.present
    effects: list[Effect] = []
    for encoder in state.encoders.values():
        member = encoder.members.get(body.node)
        if member is not None and member.present != body.present:
            with changing(encoder, member):
                member.present = body.present
            effects += _begin(state, encoder, at) + advance(encoder, at)
            if not body.present:
                effects += streams.gone(encoder, body.node, at)
    return effects + gathering.look(state, at)


def fetch(state: State, body: Fetch, at: float) -> list[Effect]:
    """A node wants a newer version than it has: it is told of the newest, or as soon as there is one; or of the end."""
    encoder = state.encoders.get(body.encoder)
    if encoder is None or encoder.status == "failed":
        return [Send(body.node, Withdrawn(encoder=body.encoder))]
    if not encoder.layout:
        return []
    if encoder.status == "finished":
        return streams.last_version(state.settings, encoder, body.node, at, body.sought)
    if body.node in state.kicked:
        return [_out(state, body.node, body.encoder)]
    member = encoder.members.get(body.node)
    if member is None:
        return [Send(body.node, Introduce(node=body.node))]
    if not encoder.started:
        return []  # nobody trains yet; all are told when that begins
    if body.have_version >= encoder.version:
        encoder.waiting[body.node] = None
        return []
    again = publish_again(state.settings, encoder, body.sought, at)
    return [*again, *notify(state.settings, encoder, [body.node], at)]


def fetch_assets(state: State, body: FetchAssets, at: float) -> list[Effect]:
    """A node did not find the assets of an encoder on their stream: they are written again, for all who miss them."""
    known = state.nodes.get(body.node)
    if known is None or known.incarnation != body.incarnation:
        return [Send(body.node, Introduce(node=body.node))]
    encoder = state.encoders.get(body.encoder)
    if encoder is None or not (encoder.layout and encoder.assets):
        return []
    # of an encoder that has ended, for a node that was away; it does not say when it has read them
    encoder.observed |= encoder.status == "finished"
    return provide_again(encoder, at)


def kick(state: State, node: str, why: str, at: float, advance: Advance) -> list[Effect]:
    """A node is no member any more: nobody waits for it, and what it hands in from here on does not count. What has
    been counted, or waits for a version, stays."""
    state.kicked[node] = why
    effects: list[Effect] = []
    for encoder in state.encoders.values():
        member = encoder.members.get(node)
        if member is not None:
            encoder.waiting.pop(node, None)
            with changing(encoder, member):
                member.accepted = False
        if encoder.status == "running" and encoder.encoder_type in state.nodes[node].types:
            effects.append(_out(state, node, encoder.encoder))
        effects += advance(encoder, at) + streams.gone(encoder, node, at)
    return effects + gathering.look(state, at)


def admit(state: State, node: str) -> list[Effect]:
    """It is told of what is running, as one that has just joined."""
    del state.kicked[node]
    types = state.nodes[node].types
    running = [each for each in state.encoders.values() if each.status == "running" and each.encoder_type in types]
    return gathering.ask(state, node) + [Send(node, instruction(each)) for each in running]


def _out(state: State, node: str, encoder: str) -> Send:
    return Send(node, kicked(encoder, state.kicked[node]))


def _begin(state: State, encoder: EncoderState, at: float) -> list[Effect]:
    """The training starts once enough nodes are there."""
    if encoder.started or encoder.status != "running" or encoder.tally.active < state.settings.min_nodes:
        return []
    encoder.started, encoder.run_started_at = True, at
    return _rules(state, encoder, [member.node for member in encoder.members.values() if member.accepted], at)


def _rules(state: State, encoder: EncoderState, nodes: list[str], at: float) -> list[Effect]:
    """Everybody starts from the current version."""
    effects: list[Effect] = (
        [publish(state.settings, encoder, at)] if encoder.published_version < encoder.version else []
    )
    return effects + [rule_for(state, encoder, encoder.members[node], at) for node in nodes]


def update_rule_of(state: State, node: str) -> UpdateRule:
    """The update rule that a node is to train by: that of all, but for what was changed for it alone."""
    settings = state.settings
    update_rule = changed_for_one(settings.update_rule, state.own.get(node, {}))
    return update_rule.model_copy(update={"wait": True}) if settings.rule.synchronous else update_rule


def rule_for(state: State, encoder: EncoderState, member: Member, at: float) -> Send:
    """What a member is told to train by, from the newest version that was published."""
    update_rule = update_rule_of(state, member.node)
    member.may_owe = max(member.may_owe, update_rule.max_unanswered)
    rule = Rule(
        encoder=encoder.encoder,
        node=member.node,
        update_rule=update_rule,
        version=encoder.published_version,
        published_at=0.0,
        progress=progress(encoder, state.settings.stop, at),
        paused=encoder.paused_at is not None,
    )
    return Send(member.node, rule)
