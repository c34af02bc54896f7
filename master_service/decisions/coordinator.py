"""The master's decisions as a fold over its message log: `handle(entry)` gives what is to be done.

Pure: no clock (time is `entry.at`), no I/O, no randomness, no tensor. The same entries lead to the same state and the
same effects, which is what recovery, replay and simulation rest on. What to do with one update stands in `verdicts`.
"""

from __future__ import annotations

from common.wire.to_master import (
    Admit,
    Change,
    Continue,
    Fetch,
    FetchAssets,
    Finished,
    Get,
    InstructionAck,
    Join,
    Kick,
    Leave,
    Pause,
    Resume,
    Stop,
    UpdateManifest,
    Words,
)
from common.wire.to_node import Introduce, Reason
from master_service.decisions import gathering, guarding, membership, operating, requests, streams, tally
from master_service.decisions.effects import (
    Broadcast,
    Conclude,
    Contribution,
    Effect,
    Generate,
    Refused,
    Send,
    SetAside,
    Step,
)
from master_service.decisions.messages_out import finish, instruction, kicked, notify, publish, resend
from master_service.decisions.records import (
    Configured,
    Entry,
    Gathering,
    Generated,
    GenerationFailed,
    Presence,
    Provided,
    Repaired,
    Skipped,
    Started,
    StepFailed,
    Tick,
    UpdateFacts,
    Versioned,
)
from master_service.decisions.rules.buffer import is_ready
from master_service.decisions.rules.rate import mean_cosine, rate, smoothed
from master_service.decisions.settled import is_settled, settle, stored
from master_service.decisions.state import Buffered, EncoderState, State
from master_service.decisions.stopping import close_windows, observe_held_out, observe_loss, observe_losses, stop_reason
from master_service.decisions.verdicts import (
    accepted,
    count,
    issued,
    left_over,
    refusal,
    refused,
    stranger,
)
from master_service.decisions.weighing import by_node, grace_ends, observe_norms, weigh


class Coordinator:
    """The state and the one function that changes it."""

    def __init__(self, state: State | None = None) -> None:
        self.state = state or State()

    def handle(self, entry: Entry) -> list[Effect]:
        """Fold one entry into the state; the effects are to be carried out in order. A skipped entry has none."""
        if entry.skipped:
            return []
        body, at = entry.body, entry.at
        match body:
            case UpdateManifest():
                return self._update(entry, body)
            case Versioned():
                return self._versioned(body, at)
            case StepFailed():
                return self._step_failed(body, at)
            case InstructionAck():
                return membership.ack(self.state, body, at, self._advance)
            case Join():
                return membership.join(self.state, body)
            case Fetch():
                return membership.fetch(self.state, body, at)
            case FetchAssets():
                return membership.fetch_assets(self.state, body, at)
            case Words():
                return gathering.contributed(self.state, body, at)
            case Finished():
                return streams.finished(self.state, body, at)
            case Leave():
                return membership.leave(self.state, body, at, self._advance)
            case Presence():
                return membership.presence(self.state, body, at, self._advance)
            case Get():
                return requests.get(self.state, entry, body)
            case Continue():
                return requests.go_on(self.state, body, at)
            case Gathering():
                return gathering.begin(self.state, body, at)
            case Provided():
                return requests.provided(self.state, body)
            case Generated():
                told = requests.generated(self.state, body, at)
                return told + self._advance(self.state.encoders[body.encoder], at)
            case GenerationFailed():
                return requests.generation_failed(self.state, body)
            case Stop():
                return self._stop(body, at)
            case Change():
                return operating.change(self.state, body, at, self._advance)
            case Kick():
                return operating.kick(self.state, body, at, self._advance)
            case Admit():
                return operating.admit(self.state, body)
            case Pause():
                return operating.pause(self.state, body, at)
            case Resume():
                return operating.resume(self.state, body, at, self._advance)
            case Tick():
                encoders = self.state.encoders.values()
                return gathering.look(self.state, at) + [
                    effect
                    for encoder in encoders
                    for effect in (*self._advance(encoder, at), *streams.release(encoder, at))
                ]
            case Configured():
                self.state.settings, self.state.claims = body.settings, body.claims
                self.state.configured, self.state.live = body.configured, dict(body.live)
                self.state.kept_failed = body.kept_failed
                return []
            case Started():
                self.state.epoch = body.epoch
                return self._restate(at)
            case Skipped():
                return [SetAside(body.offset)]
            case Repaired():
                return []
        raise AssertionError(f"a {body.kind} does not belong into the log")

    def deadline(self) -> float | None:
        """When a Tick is due, in `at` seconds; None if nothing waits for time to pass."""
        settings, due = self.state.settings, []
        for encoder in self.state.encoders.values():
            if (release_at := streams.release_at(encoder)) is not None:
                due.append(release_at)
            if encoder.status == "gathering":
                due.append(encoder.gathering_until)
            if encoder.status != "running" or encoder.paused_at is not None:
                continue
            if (flush_at := grace_ends(encoder, settings)) is not None:
                due.append(flush_at)
            if settings.stop.seconds is not None and encoder.started:
                due.append(encoder.run_started_at + settings.stop.seconds)
            if encoder.published_version < encoder.version:
                due.append(encoder.published_at + settings.publish_every_seconds)
        return min(due, default=None)

    def wants_payload(self, manifest: UpdateManifest) -> bool:
        """Whether the update's chunks must be fetched to decide on it; reads the state, changes nothing."""
        encoder = self.state.encoders.get(manifest.encoder)
        if stranger(encoder, manifest) or self._refusal(encoder, manifest, None) is not None:
            return False
        return not self._known_update(encoder, manifest)

    def knows(self, manifest: UpdateManifest) -> bool:
        """Whether an update has come before, and counts already or has its answer; reads the state, changes nothing."""
        return self._known_update(self.state.encoders.get(manifest.encoder), manifest)

    def has_place(self, manifest: UpdateManifest) -> bool:
        """Whether an update that counts may be taken in now: not while as many of its node wait for a version, or are
        being made one, as a rule has ever allowed it to have without an answer; reads the state, changes nothing."""
        encoder = self.state.encoders.get(manifest.encoder)
        member = encoder.members.get(manifest.node) if encoder is not None else None
        if member is None:
            return True
        return len(member.pending) < max(member.may_owe, self.state.settings.update_rule.max_unanswered)

    def wants_words(self, words: Words) -> bool:
        """Whether a node's words would count; reads the state, changes nothing."""
        return gathering.counts(self.state, words)

    def unmade(self) -> list[Generate]:
        """The encoders whose generation has no outcome yet; of interest to a master that starts again."""
        encoders = self.state.encoders.values()
        return [requests.generate(self.state, each) for each in encoders if each.status == "generating"]

    def _restate(self, at: float) -> list[Effect]:
        """What a master that starts again tells everybody: the newest versions, the running instructions, what it asks
        for."""
        effects: list[Effect] = []
        for encoder in self.state.encoders.values():
            if encoder.status == "running":
                effects += [
                    publish(self.state.settings, encoder, at),
                    Broadcast(encoder.encoder_type, instruction(encoder)),
                ]
            elif encoder.status == "gathering":
                effects += gathering.ask_again(self.state, encoder, at)
        return effects

    def _stop(self, stop: Stop, at: float) -> list[Effect]:
        effects: list[Effect] = []
        for encoder in self.state.encoders.values():
            if stop.encoder in (None, encoder.encoder) and encoder.status in ("running", "generating"):
                encoder.stop_requested = f"stopped by {stop.sender}"
                effects += self._advance(encoder, at)
            elif stop.encoder in (None, encoder.encoder) and encoder.status == "gathering":
                why = GenerationFailed(encoder=encoder.encoder, reason=f"stopped by {stop.sender}")
                effects += requests.generation_failed(self.state, why)
        return effects

    # --- updates and versions ----------------------------------------------------------------------------------------

    @property
    def checking(self) -> bool:
        """Whether what members claim is checked."""
        return self.state.claims != "taken"

    def _refusal(
        self, encoder: EncoderState | None, manifest: UpdateManifest, facts: UpdateFacts | None
    ) -> tuple[Reason, str] | None:
        """Why an update cannot be counted, as `refusal` has it; nothing counts before the training has started."""
        if encoder is not None and encoder.status == "running" and manifest.node in self.state.kicked:
            why = self.state.kicked[manifest.node]
            return "kicked", f"an operator has taken {manifest.node} out of the training{f': {why}' if why else ''}"
        problem = refusal(encoder, manifest, facts)
        if problem is None and self.checking and encoder is not None and not encoder.started:
            return "early", f"the training of {encoder.encoder} has not started yet"
        return problem

    def _known_update(self, encoder: EncoderState | None, update: UpdateManifest) -> bool:
        member = encoder.members.get(update.node) if encoder else None
        if encoder is None or member is None:
            return False
        return tally.pending(encoder, update) is not None or is_settled(member, update.incarnation, update.sequence)

    def _update(self, entry: Entry, manifest: UpdateManifest) -> list[Effect]:
        encoder = self.state.encoders.get(manifest.encoder)
        if encoder is not None and self._known_update(encoder, manifest):
            return self._duplicate(encoder, manifest)
        dropped: list[Effect] = [Refused(entry.payload)] if entry.payload else []
        if stranger(encoder, manifest):
            # no receipt: once it has joined it sends again what it owes
            if manifest.node in self.state.kicked:
                return [*dropped, Send(manifest.node, kicked(manifest.encoder, self.state.kicked[manifest.node]))]
            return [*dropped, Send(manifest.node, Introduce(node=manifest.node))]
        problem = self._refusal(encoder, manifest, entry.facts)
        if problem is None and encoder is not None:
            staleness = encoder.version - manifest.base_version
            if staleness > self.state.settings.rule.guards.max_staleness:
                problem = (
                    "stale",
                    f"{staleness} versions old, at most {self.state.settings.rule.guards.max_staleness}",
                )
        if problem is not None or encoder is None or entry.facts is None or entry.payload is None:
            reason, detail = problem or ("set-aside", "the master died of it twice; it is set aside")
            receipt = issued(encoder, refused(encoder, manifest, reason, detail))
            effects: list[Effect] = [*dropped, Send(manifest.node, receipt)]
            member = encoder.members.get(manifest.node) if encoder is not None else None
            if encoder is not None and member is not None:
                member.refused += 1
                settle(member, receipt)
                if encoder.status == "running" and manifest.base_version < encoder.version:
                    effects += notify(self.state.settings, encoder, [manifest.node], entry.at)
            if encoder is not None and encoder.status == "finished":
                effects += streams.last_version(self.state.settings, encoder, manifest.node, entry.at)
            return effects
        member = encoder.members[manifest.node]
        if self.checking:
            manifest = guarding.capped(
                manifest, encoder, membership.update_rule_of(self.state, manifest.node), entry.at
            )
        if not encoder.buffer:
            encoder.buffer_since = entry.at
        tally.buffer(
            encoder,
            Buffered(
                node=manifest.node,
                incarnation=manifest.incarnation,
                sequence=manifest.sequence,
                digest=manifest.digest,
                payload=entry.payload,
                encoding=manifest.encoding,
                base_version=manifest.base_version,
                attempt=manifest.attempt,
                steps=manifest.steps,
                samples=manifest.samples,
                seconds=manifest.seconds,
                size=manifest.size,
                norm=entry.facts.norm,
                loss=manifest.loss,
            ),
        )
        count(encoder, encoder.buffer[-1], 1)
        member.loss, member.version = manifest.loss, manifest.base_version
        if self.checking:
            guarding.note_loss(encoder, member, manifest.loss)
        observe_held_out(encoder, manifest, self.state.settings.update_rule.evaluate_every, self.state.claims)
        if manifest.wants_version:
            encoder.waiting[manifest.node] = None
        return self._advance(encoder, entry.at)

    def _duplicate(self, encoder: EncoderState, manifest: UpdateManifest) -> list[Effect]:
        """Settled once is settled: the stored receipt again; the same id with other bytes is a conflict."""
        member = encoder.members[manifest.node]
        member.duplicates += 1
        waiting = tally.pending(encoder, manifest)
        if waiting == manifest.digest:
            return []
        receipt = stored(encoder, member, manifest)
        if waiting is None and receipt is not None:
            return [Send(manifest.node, receipt)]
        detail = f"update {manifest.sequence} of this incarnation was another one; join under a new incarnation"
        return [Send(manifest.node, issued(encoder, refused(encoder, manifest, "conflict", detail)))]

    def _advance(self, encoder: EncoderState, at: float) -> list[Effect]:
        """Step if the buffer is ready or has waited its grace time; finish if the stop rule holds."""
        settings = self.state.settings
        if encoder.status != "running" or encoder.stepping:
            return []
        if encoder.paused_at is not None and not encoder.stop_requested:
            return []
        ending = stop_reason(encoder, settings.stop, at)
        turnout, needs = tally.turnout(encoder), settings.rule.combine.needs
        # the same sum as in `deadline`: at its very moment a Tick must not find it a rounding error away
        flush_at = grace_ends(encoder, settings)
        ready = is_ready(turnout, settings.rule.buffer, settings.update_rule.max_unanswered, needs)
        if ready and self.checking and settings.rule.guards.norm_clip is not None:
            ready = guarding.comparable(encoder)
        if flush_at is not None and (ending or at >= flush_at or ready):
            return [self._step(encoder)]
        if ending:
            return self._left_over(encoder) + self._finish(encoder, ending, at)
        if encoder.published_version < encoder.version and at >= encoder.published_at + settings.publish_every_seconds:
            return [publish(self.state.settings, encoder, at)]
        return []

    def _step(self, encoder: EncoderState) -> Step:
        """Weigh the buffer as a whole, now that the counts of all of it are known; answered once it is computed."""
        rule = self.state.settings.rule
        encoder.stepping = weigh(encoder, tally.emptied(encoder), rule, self.state.claims)
        name, version, shards = encoder.encoder, encoder.version + 1, encoder.shards
        if rule.combine.robust:
            return Step(name, version, by_node(encoder.stepping), rule.outer, rule.combine, shards)
        contributions = tuple(
            Contribution(weighed.item.payload, weighed.item.encoding, weighed.coefficient)
            for weighed in encoder.stepping
        )
        step_rate = rate(rule.outer, [weighed.coefficient for weighed in encoder.stepping], encoder.agreement)
        outer = rule.outer.model_copy(update={"lr": step_rate})
        return Step(name, version, contributions, outer, shards=shards)

    def _left_over(self, encoder: EncoderState) -> list[Effect]:
        """The training ends while fewer nodes' updates are at hand than a robust rule needs: they do not count."""
        effects: list[Effect] = []
        for item in tally.emptied(encoder):
            tally.no_longer_pending(encoder, item)
            count(encoder, item, -1)
            member = encoder.members[item.node]
            receipt = issued(encoder, left_over(encoder, item))
            member.refused += 1
            settle(member, receipt)
            effects.append(Send(item.node, receipt))
        return effects

    def _versioned(self, body: Versioned, at: float) -> list[Effect]:
        """A version is computed: its updates are answered, who waits is told, and it may have been the last."""
        encoder = self.state.encoders[body.encoder]
        counted, encoder.stepping = encoder.stepping, []
        encoder.version, encoder.digest = body.version, body.digest
        effects: list[Effect] = []
        for weighed in counted:
            item, member = weighed.item, encoder.members[weighed.item.node]
            receipt = issued(encoder, accepted(encoder, item, weighed.weight, weighed.staleness, member.returns))
            member.weight += weighed.weight
            member.last_weight, member.last_staleness = weighed.weight, weighed.staleness
            tally.no_longer_pending(encoder, item)
            settle(member, receipt)
            effects.append(Send(item.node, receipt))
        if body.norm is not None and not self.state.settings.rule.combine.robust:
            coefficients, norms = zip(*((each.coefficient, each.item.norm) for each in counted), strict=True)
            encoder.agreement = smoothed(encoder.agreement, mean_cosine(body.norm, coefficients, norms))
        settings, every = self.state.settings, self.state.settings.update_rule.evaluate_every
        if self.checking:
            guarding.observe(encoder, counted, self.state.claims)
            observe_losses(encoder, settings.stop)
        else:
            observe_norms(encoder, [weighed.item for weighed in counted])
            observe_loss(encoder, [weighed.item.loss for weighed in counted], settings.stop)
        close_windows(encoder, settings.stop, every, self.state.claims)
        ending = stop_reason(encoder, self.state.settings.stop, at)
        if ending:
            return effects + self._finish(encoder, ending, at)
        if encoder.waiting:
            return effects + notify(self.state.settings, encoder, list(encoder.waiting), at)
        return effects + self._advance(encoder, at)

    def _step_failed(self, body: StepFailed, at: float) -> list[Effect]:
        """Payloads were lost: their updates do not count, and their nodes, which have no receipt, send them again."""
        encoder = self.state.encoders[body.encoder]
        items, encoder.stepping = [weighed.item for weighed in encoder.stepping], []
        tally.put_back(encoder, [item for item in items if item.payload not in body.lost])
        effects: list[Effect] = []
        for item in items:
            if item.payload in body.lost:
                tally.no_longer_pending(encoder, item)
                count(encoder, item, -1)
                effects.append(Send(item.node, resend(encoder.encoder, item)))
        return effects + self._advance(encoder, at)

    def _finish(self, encoder: EncoderState, reason: str, at: float) -> list[Effect]:
        encoder.status, encoder.reason, encoder.paused_at = "finished", reason, None
        settings = self.state.settings
        every = settings.update_rule.evaluate_every
        close_windows(encoder, settings.stop, every, self.state.claims, ending=True)
        streams.ended(encoder)
        return [
            publish(self.state.settings, encoder, at),
            Conclude(encoder.encoder, encoder.version),
            Broadcast(encoder.encoder_type, finish(encoder)),
        ]
