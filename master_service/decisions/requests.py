"""Requests for encoders, and how an encoder comes to be: pure functions of the state."""

from __future__ import annotations

import hashlib

from common.numbers.layout import Layout
from common.wire.to_master import Continue, Get
from common.wire.to_node import Answer
from master_service.decisions import stopping
from master_service.decisions.effects import Broadcast, Effect, Generate, Send
from master_service.decisions.messages_out import (
    answer,
    instruction,
    provide,
    provide_again,
    publish,
    shortened,
    unmade,
)
from master_service.decisions.records import Entry, Generated, GenerationFailed, Provided
from master_service.decisions.settings import Settings
from master_service.decisions.state import EncoderState, State
from master_service.decisions.tally import changing


def get(state: State, entry: Entry, request: Get) -> list[Effect]:
    """Join the encoder being trained, answer with the newest finished one, or start one."""
    same = alike(state, request)
    running = next((encoder for encoder in same if encoder.status != "finished"), None)
    if running is not None:
        if running.status == "generating":
            running.askers.append(request.sender)
            return []
        # each wish is answered at once; who says it again while words are gathered, which may take long, is told once
        if running.status == "gathering" and request.sender not in running.askers:
            running.askers.append(request.sender)
        return [Send(request.sender, answer(running))]
    if same and not request.fresh:
        same[-1].observed = True
        written = [publish(state.settings, same[-1], entry.at), *provide_again(same[-1], entry.at)]
        return [*written, Send(request.sender, answer(same[-1]))]
    # an id has at most 64 characters, whatever the type is called
    name = f"{request.encoder_type[:57]}-{hashlib.sha256(entry.message_id.encode()).hexdigest()[:6]}"
    encoder = EncoderState(
        encoder=name,
        encoder_type=request.encoder_type,
        architecture={**state.settings.architecture, **request.architecture},
        askers=[request.sender],
    )
    state.encoders[name] = encoder
    return [generate(state, encoder)]


def alike(state: State, request: Get) -> list[EncoderState]:
    """The encoders that are what is asked for, in the order in which they were begun."""
    return [
        encoder
        for encoder in state.encoders.values()
        if encoder.encoder_type == request.encoder_type
        and encoder.status != "failed"
        and all(encoder.architecture.get(key) == value for key, value in request.architecture.items())
    ]


def go_on(state: State, request: Continue, at: float) -> list[Effect]:
    """Train a known encoder further: another run, under the settings of now."""
    encoder = state.encoders.get(request.encoder)
    if encoder is None or encoder.status == "failed":
        return [Send(request.sender, Answer(accepted=False, detail=f"no encoder {request.encoder} is known here"))]
    if encoder.status != "finished":
        return [Send(request.sender, answer(encoder))]
    encoder.status, encoder.started, encoder.stop_requested, encoder.reason = "running", False, "", ""
    encoder.run_first_version, encoder.run_first_update = encoder.version, encoder.updates
    encoder.best_loss, encoder.versions_without_gain = None, 0
    stopping.forget_held_out(encoder)
    encoder.waiting = {}
    for member in encoder.members.values():
        with changing(encoder, member):
            member.accepted, member.claimed_loss = False, None
    return [
        publish(state.settings, encoder, at),
        *provide(encoder, at),
        Broadcast(encoder.encoder_type, instruction(encoder)),
        Send(request.sender, answer(encoder)),
    ]


def generate(state: State, encoder: EncoderState) -> Generate:
    """The order to make version 0, of the words that were gathered if any were asked for."""
    settings = state.settings
    return Generate(
        encoder.encoder,
        encoder.encoder_type,
        encoder.architecture,
        settings.generation,
        settings.source,
        settings.seed,
        sources(settings),
        None if encoder.gathered is None else dict(encoder.gathered),
        settings.max_parameters,
    )


def sources(settings: Settings) -> dict[str, str]:
    """What an encoder type may make its assets of, by name. Who goes on from a directory, or updates the base in one,
    and names no tokenizer means the one in it."""
    going_on = settings.source if settings.generation == "continue" else settings.base
    named = {"tokenizer": settings.tokenizer or going_on, "reference": settings.reference, "base": settings.base}
    return {name: source for name, source in named.items() if source is not None}


def provided(state: State, body: Provided) -> list[Effect]:
    """An asset is durable. The one before of this name was of an attempt that the master did not live to end."""
    encoder = state.encoders[body.encoder]
    encoder.assets = [*(entry for entry in encoder.assets if entry.name != body.name), body.entry]
    return []


def generated(state: State, body: Generated, at: float) -> list[Effect]:
    """Version 0 is here: everybody is told."""
    encoder = state.encoders[body.encoder]
    encoder.status = "running"
    encoder.architecture, encoder.layout, encoder.layout_digest = body.architecture, body.layout, body.layout_digest
    encoder.size, encoder.digest = Layout(body.layout).size, body.digest
    encoder.shards = state.settings.shards
    encoder.assets = [entry for entry in encoder.assets if entry.name in body.assets]
    encoder.gathered = None
    askers, encoder.askers = encoder.askers, []
    return [
        publish(state.settings, encoder, at),
        *provide(encoder, at),
        Broadcast(encoder.encoder_type, instruction(encoder)),
        *(Send(asker, answer(encoder)) for asker in askers),
    ]


def generation_failed(state: State, body: GenerationFailed) -> list[Effect]:
    """Who asked is told why, and so are the nodes that could have trained it. Of failed encoders the newest few are
    remembered."""
    encoder = state.encoders[body.encoder]
    encoder.status, encoder.reason, encoder.gathered = "failed", body.reason, None
    refusal = Answer(accepted=False, encoder=body.encoder, status="failed", detail=shortened(body.reason))
    if state.kept_failed is not None:
        failed = [name for name, each in state.encoders.items() if each.status == "failed"]
        for name in failed[: max(0, len(failed) - state.kept_failed)]:
            del state.encoders[name]
    return [Broadcast(encoder.encoder_type, unmade(encoder)), *(Send(asker, refusal) for asker in encoder.askers)]
