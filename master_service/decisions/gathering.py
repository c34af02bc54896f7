"""The words for a vocabulary that all agree on: nodes are asked for them, and once enough have answered, or the time is
over, the encoder is made. Pure functions of the state.

The counts of nodes are added up, so their order makes no difference; of each node the first answer counts.
"""

from __future__ import annotations

from common.wire.messages import Introduce, Words, WordsWanted
from master_service.decisions.effects import Broadcast, Effect, Send
from master_service.decisions.messages_out import answer
from master_service.decisions.records import Gathering
from master_service.decisions.requests import generate
from master_service.decisions.state import EncoderState, State


def begin(state: State, body: Gathering, at: float) -> list[Effect]:
    """Every node of the type is asked. Who wants the encoder is told that it takes a while."""
    encoder = state.encoders[body.encoder]
    encoder.status, encoder.gathered = "gathering", {}
    return [*ask_again(state, encoder, at), *(Send(asker, answer(encoder)) for asker in encoder.askers)]


def ask_again(state: State, encoder: EncoderState, at: float) -> list[Effect]:
    """Every node of the type is asked, and the time begins anew: while a master was away, answers could not come."""
    encoder.gathering_until = at + state.settings.words.seconds
    return [Broadcast(encoder.encoder_type, _wanted(encoder))]


def ask(state: State, node: str) -> list[Effect]:
    """A node that has just introduced itself is asked, unless it has answered already."""
    return [
        Send(node, _wanted(encoder))
        for encoder in _gathering(state)
        if encoder.encoder_type in state.nodes[node].types and node not in encoder.answered
    ]


def contributed(state: State, body: Words, at: float) -> list[Effect]:
    """A node's answer, with words or without. One that comes again, or too late, or from a node that was not asked has
    no effect."""
    known = state.nodes.get(body.node)
    if known is None or known.incarnation != body.incarnation:
        return [Send(body.node, Introduce(node=body.node))]
    encoder = state.encoders.get(body.encoder)
    if encoder is None or encoder.gathered is None or encoder.status != "gathering":
        return []
    if encoder.encoder_type not in known.types or body.node in encoder.answered:
        return []
    known.present = True
    encoder.answered[body.node] = bool(body.words)
    for word, count in body.words:
        encoder.gathered[word] = encoder.gathered.get(word, 0) + count
    return look(state, at)


def look(state: State, at: float) -> list[Effect]:
    """Whatever may have changed: the encoders whose words are complete, or whose time is over, are made."""
    effects: list[Effect] = []
    for encoder in _gathering(state):
        if at >= encoder.gathering_until or _is_complete(state, encoder):
            encoder.status = "generating"
            effects.append(generate(state, encoder))
    return effects


def _is_complete(state: State, encoder: EncoderState) -> bool:
    missing = any(
        node.present and encoder.encoder_type in node.types and node.node not in encoder.answered
        for node in state.nodes.values()
    )
    return not missing and len(encoder.answered) >= max(state.settings.words.nodes, state.settings.min_nodes)


def _gathering(state: State) -> list[EncoderState]:
    return [encoder for encoder in state.encoders.values() if encoder.status == "gathering"]


def _wanted(encoder: EncoderState) -> WordsWanted:
    return WordsWanted(encoder=encoder.encoder, encoder_type=encoder.encoder_type)
