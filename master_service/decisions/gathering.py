"""The words for a vocabulary that all agree on: nodes are asked for them, and once all that are there have answered, or
the time is over and enough have, the encoder is made. Pure functions of the state.

The counts of nodes are added up, so their order makes no difference; of each node the first answer counts.
"""

from __future__ import annotations

from common.encoders.words import weighed
from common.wire.to_master import Words
from common.wire.to_node import Introduce, WordsWanted
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
        if encoder.encoder_type in state.nodes[node].types and node not in (*encoder.answered, *state.kicked)
    ]


def counts(state: State, body: Words) -> bool:
    """Whether a node's answer would count: not one that comes again, or too late, or from a node that was not asked;
    reads the state, changes nothing."""
    known, encoder = state.nodes.get(body.node), state.encoders.get(body.encoder)
    if known is None or known.incarnation != body.incarnation or encoder is None or body.node in state.kicked:
        return False
    if encoder.gathered is None or encoder.status != "gathering":
        return False
    return encoder.encoder_type in known.types and body.node not in encoder.answered


def contributed(state: State, body: Words, at: float) -> list[Effect]:
    """A node's answer, with words or without. One that does not count has no effect, but that a stranger is asked to
    join."""
    known = state.nodes.get(body.node)
    if known is None or known.incarnation != body.incarnation:
        return [Send(body.node, Introduce(node=body.node))]
    if not counts(state, body):
        return []
    encoder = state.encoders[body.encoder]
    assert encoder.gathered is not None
    known.present = True
    encoder.answered[body.node] = bool(body.words)
    for word, count in weighed(body.documents, body.words):
        encoder.gathered[word] = encoder.gathered.get(word, 0) + count
    return look(state, at)


def look(state: State, at: float) -> list[Effect]:
    """Whatever may have changed: the encoders whose words are complete are made, and those whose time is over, if
    enough nodes have answered and one of them with words. If not, the time begins anew, and who is missing is asked
    again."""
    effects: list[Effect] = []
    for encoder in _gathering(state):
        over = at >= encoder.gathering_until
        if _is_complete(state, encoder) or (over and _is_enough(state, encoder)):
            encoder.status = "generating"
            effects.append(generate(state, encoder))
        elif over:
            encoder.gathering_until = at + state.settings.words.seconds
            effects += [Send(node, _wanted(encoder)) for node in _missing(state, encoder)]
    return effects


def _is_complete(state: State, encoder: EncoderState) -> bool:
    """Nobody is waited for any more. That none of them contributes is an answer too: it ends with an error."""
    least = max(state.settings.words.nodes, state.settings.min_nodes)
    return not _missing(state, encoder) and len(encoder.answered) >= least


def _is_enough(state: State, encoder: EncoderState) -> bool:
    """What has come will do once the time is over."""
    return len(encoder.answered) >= state.settings.words.nodes and any(encoder.answered.values())


def _missing(state: State, encoder: EncoderState) -> list[str]:
    """The nodes that are there and have not answered."""
    return [
        node.node
        for node in state.nodes.values()
        if node.present
        and encoder.encoder_type in node.types
        and node.node not in encoder.answered
        and node.node not in state.kicked
    ]


def _gathering(state: State) -> list[EncoderState]:
    return [encoder for encoder in state.encoders.values() if encoder.status == "gathering"]


def _wanted(encoder: EncoderState) -> WordsWanted:
    return WordsWanted(encoder=encoder.encoder, encoder_type=encoder.encoder_type)
