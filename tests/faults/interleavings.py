"""Interleavings of a federation with whatever can go wrong between its parties, and what must be true after each.

A plan is a list of actions: progress of single parties, and faults. After the last one the storm is over: everything
is started, delivered and waited for; then `World.check` holds the receipts, the counts and the log against each other.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.brokers.memory import MemoryServer, MemorySubscription
from common.errors import BrokerUnavailable, Unroutable
from common.wire.base import update_id
from common.wire.broker import Publication
from common.wire.codec import decode, encode
from common.wire.to_master import Continue, Get, Stop, UpdateManifest
from common.wire.to_node import Answer, AssetChunk, ParameterChunk, Receipt, receipt_hash
from common.wire.update_rule import ReturnWhen, UpdateRule
from master_service.decisions.coordinator import Coordinator
from master_service.decisions.effects import Send
from master_service.decisions.records import Gathering, Versioned
from master_service.decisions.rules.model import aggregation_rule
from master_service.decisions.settings import Settings, StopRule, WordsRule
from master_service.history.fold import Fold
from master_service.history.replay import Refold
from master_service.wire.inbox import named
from tests.faults.simulated import (
    ALIVE,
    TOPOLOGY,
    WORLD,
    Killed,
    MasterDisk,
    SimMaster,
    SimNode,
    Wire,
    incarnation_of,
)
from tests.faults.workbench import Tokens, Violation, bodies_of, demand

Act = tuple[Any, ...]
#: Every update in the versions by its digest: encoder, version, weight.
Counted = dict[str, tuple[str, int, float]]
RULES = ("return-count", "fedasync", "fedbuff", "fedavg")
FAULTS = ("lost", "half", "unconfirmed", "twice")
STOPS = (StopRule(versions=400), StopRule(updates=6), StopRule(versions=3), StopRule(seconds=90.0))
NODES = ("a", "b", "c", "d")
#: A sign of life of a node that sends again what is unanswered for 180 s, as it does by itself.
PATIENT = ALIVE.model_copy(update={"resend_after_seconds": 180.0})


#: What a plan may ask of one node.
NODE_ACTS: dict[str, Callable[[SimNode], Any]] = {
    "hear": SimNode.hear,
    "send": SimNode.flush,
    "read": SimNode.read,
    "train": SimNode.train,
    "alive": SimNode.say_alive,
    "ask": SimNode.ask,
    "leave": SimNode.leave,
}


@dataclass(frozen=True)
class Plan:
    """`nodes` are there; those from `present` on are started only by an action. `warm`: all present ones are training
    when the actions begin. `assets`: how many each encoder has; `words`: it is made of words that nodes contribute."""

    rule: str = "fedasync"
    nodes: int = 1
    present: int = 1
    min_nodes: int = 1
    stop: int = 0
    warm: bool = True
    assets: int = 0
    words: bool = False
    actions: tuple[Act, ...] = ()

    def settings(self, rule: str | None = None) -> Settings:
        changes = {"buffer": {"grace_seconds": 30.0}}
        return Settings(
            rule=aggregation_rule(rule or self.rule, changes),
            update_rule=UpdateRule(when=ReturnWhen(steps=10)),
            stop=STOPS[self.stop],
            min_nodes=min(self.min_nodes, self.nodes),
            publish_every_seconds=40.0,
            words=WordsRule(nodes=min(2, self.nodes, self.present), seconds=60.0),
        )


class World:
    """The broker, the master, the nodes and an operator."""

    def __init__(self, plan: Plan) -> None:
        WORLD[:] = [self]
        self.plan = plan
        self.now = 1000.0
        self.server = MemoryServer(clock=lambda: self.now)
        self.disk = MasterDisk()
        self.seen: Counter[str] = Counter()
        self.confirmed: list[Publication] = []
        self.asked_again: set[str] = set()
        #: Words that would have changed nothing when the master heard them: these need not be in the log.
        self.idle_words: set[str] = set()
        self.heard: list[Receipt] = []
        #: Every update that was ever owed, by digest.
        self.trail: dict[str, UpdateManifest] = {}
        self.trains = False
        self.acting: SimNode | None = None
        self.tokens = itertools.count()
        self.kill_in = -1
        self.deadly: set[str] = set()
        #: How often the master died while it said that it worked on this, be it by chance.
        self.died_of: Counter[str] = Counter()
        self.deadly_next, self.rows = False, -1
        self._ids = itertools.count()
        self._incarnations = itertools.count()
        #: Incarnations whose state was once replaced by an older copy: their numbers may be used twice.
        self.restored: set[str] = set()
        self.answers: Counter[str] = Counter()
        self.settings = plan.settings()
        #: Of each queue the messages that were acked last: a broker that dies may have forgotten that.
        self.acked: dict[str, deque[Any]] = {}
        #: Versions (of an encoder) that a stream has lost, or a part of them.
        self.lost: set[tuple[str, int]] = set()
        #: Encoders whose stream of assets has lost something.
        self.lost_assets: set[str] = set()
        #: What was in the log before a wipe: its answers may be gone.
        self.unanswered_for: set[str] = set()
        self.operator = Wire(self, "operator")
        self.operator.declare(TOPOLOGY.observer("operator"))
        self.operator_outbox: list[Publication] = []
        self.master: SimMaster | None = None
        self._start_master()
        self.nodes = {name: SimNode(self, name, {}) for name in NODES[: plan.nodes]}
        self.backups: dict[str, dict[str, bytes]] = {}
        for index, node in enumerate(self.nodes.values()):
            node.alive = index < plan.present
            if node.alive:
                node.start()
        if plan.warm:
            self.run(200)
        for index in range(plan.nodes):
            self.do_backup(index)

    # --- what the parties need ---------------------------------------------------------------------------------------

    def message_id(self) -> str:
        return f"m{next(self._ids)}"

    def incarnation(self, node: str) -> str:
        return f"{node}{next(self._incarnations)}"

    def stream(self, encoder: str) -> list[ParameterChunk]:
        name = TOPOLOGY.stream(encoder)
        subscription = MemorySubscription(self.server, name, lambda delivery: None, 1 << 30, 0)
        chunks = []
        while (delivery := subscription.take()) is not None:
            chunk = decode(delivery.body)
            assert isinstance(chunk, ParameterChunk)
            chunks.append(chunk)
        return chunks

    def loses(self, name: str) -> None:
        """A queue or stream is gone, with what is in it."""
        if (encoder := name.removeprefix(TOPOLOGY.asset_stream(""))) != name:
            self.lost_assets.add(encoder)
        elif (encoder := name.removeprefix(TOPOLOGY.stream(""))) != name:
            self.lost |= {(encoder, chunk.version) for chunk in self.stream(encoder)}

    def reached(self, label: str) -> None:
        if label == "node after owe":
            self.trail |= {m.digest: m for node in self.nodes.values() for m in node.node.state.owed.values()}
        if label == "before append":
            self.rows = self.disk.newest()[0]
        if label == "after append" and self.deadly_next:
            offset, kind, message_id = self.disk.newest()
            # never a row that is there already, nor one of the master's own records
            if offset > self.rows and (kind.startswith("request.") or kind in ("ack", "update")):
                self.deadly.add(message_id)  # not by its row: one that is not durable yet is another's later
                self.deadly_next = False
        whose, node = label.partition(" ")[0], self.acting
        if whose == "node":
            self.seen[f"node: {label}"] += 1
            if node is not None:
                node.kill_in -= 1
                if node.kill_in == 0:
                    self.seen[f"killed: {label}"] += 1
                    raise Killed
            return
        self.seen[f"master: {label}"] += 1
        self.kill_in -= 1
        if self.kill_in == 0:
            self.seen[f"killed: master {label}"] += 1
            raise Killed

    # --- actions -----------------------------------------------------------------------------------------------------

    def act(self, action: Act) -> None:
        kind, *rest = action
        if kind in NODE_ACTS:
            self._node(rest[0], NODE_ACTS[kind])
        else:
            getattr(self, f"do_{kind}")(*rest)

    def do_run(self, steps: int) -> None:
        self.run(steps)

    def do_take(self, name: str) -> None:
        """One message of a queue to the master."""
        master = self.master
        if master is not None and (master.prefetch(name) or master.arrived):
            self._master(master.turn)

    def do_prefetch(self, name: str) -> None:
        if self.master is not None:
            self.master.prefetch(name)

    def do_chunks_missing(self) -> None:
        if self.master is not None:
            self._master(self.master.chunks_missing)

    def do_later(self, seconds: float) -> None:
        self.now += seconds
        if self.master is not None:
            self._master(self.master.turn)

    def do_fault(self, who: str | int, fault: str) -> None:
        """What becomes of the next publish of a party."""
        self._wire(who).faults.append(fault)

    def do_channel(self, who: str | int) -> None:
        self._wire(who).reopen()

    def do_kill_broker(self, late: int) -> None:
        """It is back at once, and every channel is new. RabbitMQ promises no order then: what was unacked may come
        after up to `late` others, and what was acked last may come again. A stream may have lost its end, and what is
        transient is gone from classic queues."""
        self.seen["killed: broker"] += 1
        for wire in self._wires():
            wire.reopen()
        acked, self.acked = self.acked, {}
        for name, found in self.server._queues.items():  # private: what a broker loses when it is killed
            if found.declared.kind == "stream":
                for _ in range(min(late, len(found.ready))):
                    message = found.ready.pop()
                    found.bytes -= message.size
                    found.next_offset -= 1
                    match decode(message.publication.body):
                        case ParameterChunk() as chunk:
                            self.lost.add((chunk.encoder, chunk.version))
                        case AssetChunk() as part:
                            self.lost_assets.add(part.encoder)
                continue
            if found.declared.kind == "classic":
                before = len(found.ready)
                found.ready = deque(message for message in found.ready if message.publication.persistent)
                found.bytes = sum(message.size for message in found.ready)
                self.seen["transient: gone"] += before - len(found.ready)
            last = acked.get(name, ()) if late % 2 else ()
            again = [each for each in last if each.publication.persistent or found.declared.kind != "classic"]
            found.bytes += sum(message.size for message in again)
            while found.ready and found.ready[0].redelivered:
                again.append(found.ready.popleft())
            overtaking = [found.ready.popleft() for _ in range(min(late, len(found.ready)))]
            for message in again:
                message.redelivered = True
            found.ready.extendleft(reversed([*overtaking, *again]))

    def do_wipe_broker(self) -> None:
        """It is back at once with an empty disk; who is there declares again what is theirs."""
        self.seen["wiped: broker"] += 1
        # private: what a broker with a new disk has lost
        for name in self.server._queues:
            self.loses(name)
        self.server = MemoryServer(clock=lambda: self.now)
        for wire in self._wires():
            wire.move()
        self.unanswered_for = {row.message_id for row in self.disk.log().rows()}
        self.confirmed.clear()
        self.acked.clear()

    def do_kill_master(self, steps: int) -> None:
        """Now, or at a labelled step to come."""
        if steps == 0:
            self._master_died()
        else:
            self.kill_in = steps

    def do_stop_master(self) -> None:
        if self.master is not None:
            master = self.master
            self._master(master.stop)
            self._master_died()

    def do_start_master(self, snapshot: bool = True) -> None:
        if self.master is None:
            self._start_master(snapshot)

    def do_restart_master(self, snapshot: bool = True) -> None:
        self._master_died()
        self._start_master(snapshot)

    def do_snapshot(self) -> None:
        if self.master is not None:
            self._master(self.master.snapshot)

    def do_settings(self, rule: str) -> None:
        """Another rule, from the next start of the master on."""
        self.settings = self.plan.settings(rule)

    def do_kill_node(self, node: int, steps: int) -> None:
        party = self._pick(node)
        if not party.alive:
            return
        if steps == 0:
            party.kill()
        else:
            party.kill_in = steps

    def do_start_node(self, node: int) -> None:
        party = self._pick(node)
        if not party.alive:
            self._begin(party.name, party.files)

    def do_restart_node(self, node: int) -> None:
        party = self._pick(node)
        party.kill()
        self._begin(party.name, party.files)

    def do_wipe(self, node: int) -> None:
        """The state directory is lost."""
        party = self._pick(node)
        party.kill()
        self._begin(party.name, {})

    def do_backup(self, node: int) -> None:
        party = self._pick(node)
        self.backups[party.name] = dict(party.files)

    def do_restore(self, node: int) -> None:
        """The state directory is replaced by an older copy."""
        party = self._pick(node)
        copy = self.backups.get(party.name)
        if copy is not None:
            self.seen["restored"] += 1
            self.restored.add(incarnation_of(copy))
            party.kill()
            self._begin(party.name, dict(copy))

    def do_deadly(self) -> None:
        """The next message that is folded kills the master, now and whenever it is folded again."""
        self.deadly_next = True

    def do_operator(self, what: str) -> None:
        encoders = [body.encoder for body in self.disk.log().bodies("generated")]  # type: ignore[union-attr]
        message: Any
        match what:
            case "stop":
                message = Stop(sender="operator")
            case "continue":
                message = Continue(sender="operator", encoder=encoders[-1] if encoders else "none")
            case _:
                message = Get(sender="operator", encoder_type="image" if what == "image" else "text")
        key = f"operator.{message.kind.removeprefix('request.')}"
        self.operator_outbox.append(Publication(TOPOLOGY.request, key, encode(message), message_id=self.message_id()))

    # --- progress ----------------------------------------------------------------------------------------------------

    def run(self, steps: int) -> bool:
        """So many rounds in which everybody does one thing, if there is one to do; whether there still was."""
        return all(self.round() for _ in range(steps))

    def round(self) -> bool:
        busy = self._operator_speaks()
        for index in range(len(self.nodes)):
            for does in (SimNode.flush, SimNode.hear, SimNode.read):
                busy = self._node(index, does) or busy
        master = self.master
        if master is not None:
            for name in ("inbox", "updates", "chunks"):
                if self.master is master and (master.prefetch(name) or master.arrived):
                    self._master(master.turn)
                    busy = True
        return busy

    def quiesce(self) -> None:
        """The storm is over: nothing fails any more, everybody is there, and time passes."""
        self.kill_in, self.deadly_next = -1, False
        self.operator.faults.clear()
        if self.master is not None:
            self.master.wire.faults.clear()
        for index, node in enumerate(self.nodes.values()):
            node.kill_in = -1
            node.wire.faults.clear()
            self.do_start_node(index)
        self.settle_down()
        for _ in range(60):
            self.now += 16.0
            for node in self.nodes.values():
                node.say_alive(PATIENT)
                node.ask()
                if node.node.encoder is not None and node.node.encoder not in self._running():
                    node.train()  # it has not heard of the end, and will when it hands in
            self.do_chunks_missing()
            self.settle_down()
            if self.quiet():
                break
        demand(self.quiet(), f"updates are never answered: {self.unanswered()}")

    def settle_down(self) -> None:
        """Deliver everything; a master that a message kills is started until it sets that aside."""
        for _ in range(6):
            for _ in range(6):
                if self.master is None:
                    self._start_master()
            demand(self.master is not None, "the master does not start")
            demand(not self.run(1000), "messages go back and forth for ever")
            if self.master is not None:
                return
        raise Violation("the master dies again and again")

    def quiet(self) -> bool:
        """Whether all that nodes owe is answered, and all who could be let in are."""
        assert self.master is not None
        state, running = self.master.master.state, self._running()
        for encoder in state.encoders.values():
            enough = len(encoder.active()) >= state.settings.min_nodes
            if encoder.status == "gathering" or (encoder.status == "running" and enough and not encoder.started):
                return False
        for node in self.nodes.values():
            current = node.node.encoder
            if node.node.state.owed or (running and current is None):
                return False
            if current is not None and current not in running:
                return False
            if current is not None and state.encoders[current].started and not node.node.ready:
                return False
        return True

    def _running(self) -> set[str]:
        assert self.master is not None
        encoders = self.master.master.state.encoders.values()
        return {each.encoder for each in encoders if each.status == "running"}

    def unanswered(self) -> dict[str, Any]:
        return {
            node.name: (sorted(node.node.state.owed), node.node.encoder, node.node.figures.version)
            for node in self.nodes.values()
        }

    # --- what must be true -------------------------------------------------------------------------------------------

    def check(self) -> None:
        """After `quiesce`: nothing lost, nothing doubled, and everybody says the same."""
        reference, receipts = self._reference()
        assert self.master is not None
        live = self.master.journal.fold
        demand(
            live.coordinator.state.model_dump_json() == reference.coordinator.state.model_dump_json(),
            "the state after all crashes is not the fold of the log",
        )
        counted = self._counted(reference)
        self._check_counts(reference, counted)
        self._check_receipts(reference, receipts, counted)
        self._check_nodes(counted)
        self._check_broker(reference)
        self._check_refold(reference)

    def _reference(self) -> tuple[Fold[Any], list[Receipt]]:
        """The log folded from the start without a crash: every version must come out as it was logged."""
        fold, issued = Fold(Tokens(self.disk.payloads)), []
        for entry in self.disk.log().entries():
            if isinstance(entry.body, Versioned):
                demand(fold.check(entry.body).identical, f"version {entry.body.version} does not come out as logged")
            effects = fold.apply(entry)
            issued += [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, Receipt)]
        demand(not fold.pending, "a version that was decided was never made")
        return fold, issued

    def _counted(self, fold: Fold[Any]) -> Counted:
        """Every update in the versions by its digest: (encoder, version, weight). None is there twice."""
        found: Counted = {}
        tokens: Any = fold.arithmetic
        for encoder, target in tokens.targets.items():
            for step in target.steps:
                for contribution in step.contributions:
                    demand(contribution.payload not in found, "an update is counted twice")
                    weight = contribution.coefficient * len(step.contributions)
                    found[contribution.payload] = (encoder, step.version, weight)
        return found

    def _check_counts(self, fold: Fold[Any], counted: Counted) -> None:
        """Return counts and totals are what is in the versions and in the buffers, no more and no less."""
        returns: Counter[tuple[str, str]] = Counter()
        for digest, (where, _, _) in counted.items():
            returns[where, self.trail[digest].node] += 1
        for encoder in fold.coordinator.state.encoders.values():
            waiting = [item.digest for item in encoder.buffer]
            demand(not counted.keys() & set(waiting) and len(waiting) == len(set(waiting)), "counted, and waits too")
            for item in encoder.buffer:
                returns[encoder.encoder, item.node] += 1
            for member in encoder.members.values():
                expected = returns.pop((encoder.encoder, member.node), 0)
                demand(member.returns == expected, f"{member.node} returned {expected}, counted {member.returns}")
            total = sum(member.returns for member in encoder.members.values())
            demand(encoder.updates == total, f"{total} updates, counted {encoder.updates}")
            demand(encoder.status == "running" or not encoder.buffer, "accepted and forgotten")
        demand(not +returns, "an update of nobody is counted")

    def _check_receipts(self, fold: Fold[Any], receipts: list[Receipt], counted: Counted) -> None:
        """The chain is whole, every receipt that a node got is in it, and says what the versions say."""
        last: dict[str, str] = {}
        chain: set[str] = set()
        for receipt in receipts:
            found = receipt_hash(receipt)
            if found in chain:
                continue  # the stored one again
            demand(receipt.previous == last.get(receipt.encoder, ""), "the chain of receipts is broken")
            last[receipt.encoder] = found
            chain.add(found)
        for encoder in fold.coordinator.state.encoders.values():
            demand(encoder.last_receipt == last.get(encoder.encoder, ""), "the chain of receipts has another end")
        held = [receipt for node in self.nodes.values() for receipt in node.receipts()]
        for receipt in [*self.heard, *held]:
            demand(receipt_hash(receipt) in chain, f"a receipt was never issued: {receipt}")
            where = counted.get(receipt.digest)
            if receipt.accepted:
                demand(where is not None, f"accepted and not counted: {receipt}")
                assert where is not None
                demand(where[:2] == (receipt.encoder, receipt.version), f"counted in {where}: {receipt}")
                demand(abs(where[2] - receipt.weight) < 1e-12, f"weighed {where[2]}: {receipt}")
                continue
            demand(where is None, f"refused and counted in {where}: {receipt}")
            demand(receipt.reason in self._reasons(receipt), f"refused without a reason: {receipt}")

    def _reasons(self, receipt: Receipt) -> set[str]:
        """Why a receipt may refuse an update; no node here sends what is wrong in itself."""
        reasons = {"finished", "set-aside"} if self.disk.log().skipped() else {"finished"}
        if self.died_of[f"update {update_id(receipt)}"] >= 2:
            reasons.add("set-aside")  # its row was never durable
        if receipt.incarnation in self.restored:
            # two updates of one number: the later is in conflict, unless the chunks of both were mixed up
            reasons |= {"conflict", "digest"}
        if any(entry.body.kind == "request.update" for entry in self.disk.log().entries()):
            reasons.add("early")  # of a run that has ended, while the next one still waits for its nodes
        return reasons

    def _check_nodes(self, counted: Counted) -> None:
        """What a state directory that was never lost has handed in is answered."""
        answered = {receipt.digest for receipt in self.heard}
        for node in self.nodes.values():
            mine = node.incarnation
            if mine in self.restored:
                continue
            for digest, manifest in self.trail.items():
                if manifest.incarnation == mine:
                    demand(digest in answered, f"{manifest.update_id} was never answered")

    def _check_broker(self, fold: Fold[Any]) -> None:
        """What was confirmed to a sender is in the log, or set aside because it killed the master twice; operators are
        answered; the stream tells no other version."""
        inbox = {TOPOLOGY.ack, TOPOLOGY.request}
        letters = [each.publication for each in self.server.queue(TOPOLOGY.dead_letters).ready]
        found = {f"{letter.headers.get('x-routing-key')}:{letter.message_id}" for letter in letters}
        aside = {name for name in found if name in self.deadly or self.died_of[named(name)] >= 2}
        for publication in self.confirmed:
            if publication.exchange in inbox and not publication.routing_key.endswith(".alive"):
                name = f"{publication.routing_key}:{publication.message_id}"
                idle = name in self.idle_words
                demand(idle or name in aside or self.disk.has(name), f"{name} was confirmed and is not in the log")
        asked = sum(
            p.exchange == TOPOLOGY.request
            and p.routing_key in ("operator.get", "operator.update")
            and f"{p.routing_key}:{p.message_id}" not in self.unanswered_for
            for p in self.confirmed
        )
        log = self.disk.log()
        skipped = sum(log.entry(n).body.kind in ("request.get", "request.update") for n in log.skipped())
        skipped += sum(name.startswith(("operator.get:", "operator.update:")) for name in aside)
        answers = (decode(body) for body in self._bodies(TOPOLOGY.node_inbox("operator")))
        told = sum(isinstance(answer, Answer) for answer in answers) - self._told_besides()
        demand(told + skipped >= asked, f"the operator asked {asked} times and was answered {told} times")
        dead = [letter.routing_key for letter in letters]
        demand(set(dead) <= {"kills"}, f"set aside: {dead}")
        tokens: Any = fold.arithmetic
        for encoder, target in tokens.targets.items():
            digests = target.digests
            for chunk in self.stream(encoder):
                written = bodies_of(digests[chunk.version], chunk.encoding)[chunk.index]
                demand(chunk.data == written, f"the stream holds another version {chunk.version}")

    def _told_besides(self) -> int:
        """How often the operator was told that words are gathered first, without having asked just then."""
        coordinator, told = Coordinator(), 0
        for entry in self.disk.log().entries() if self.plan.words else ():
            effects = coordinator.handle(entry)
            if isinstance(entry.body, Gathering) and entry.message_id not in self.unanswered_for:
                told += sum(isinstance(effect, Send) and effect.to == "operator" for effect in effects)
        return told

    def _check_refold(self, fold: Fold[Any]) -> None:
        """Decided anew without its outcomes, the log leads to the same versions and the same state."""
        log = self.disk.log()
        refold = Refold(log, fold=Fold(Tokens(self.disk.payloads)))
        for _ in refold.run():
            pass
        tokens: Any = refold.fold.arithmetic
        logged: Any = fold.arithmetic
        demand(tokens.saved() == logged.saved(), "the log decided anew leads to other versions")
        if not log.skipped():
            again, first = refold.fold.coordinator.state, fold.coordinator.state
            demand(again.model_dump_json() == first.model_dump_json(), "the log decided anew leads to another state")

    def probe(self) -> None:
        """Nobody was left behind: whoever trains hands in once more, and is counted."""
        assert self.master is not None
        for attempt in range(6):
            handed: dict[str, tuple[str, str]] = {}
            for node in self.nodes.values():
                manifest = node.train()
                if manifest is not None:
                    handed[node.name] = (manifest.digest, manifest.incarnation)
            self.quiesce()
            answers = {receipt.digest: receipt for receipt in self.heard}
            refused = {}
            for name, (digest, incarnation) in handed.items():
                receipt = answers.get(digest)
                if receipt is None or not (receipt.accepted or receipt.reason == "finished"):
                    refused[name] = (receipt.reason if receipt else "", incarnation)
            if not refused:
                return
            for name, (reason, incarnation) in refused.items():
                # after a conflict this one was of the incarnation before
                again = incarnation in self.restored and attempt < 5
                demand(again, f"{name} is left behind: {reason or 'no answer'}")

    # --- parties -----------------------------------------------------------------------------------------------------

    def _bodies(self, queue: str) -> list[bytes]:
        return [message.publication.body for message in self.server.queue(queue).ready]

    def _wires(self) -> list[Wire]:
        """Of who is there."""
        nodes = [node.wire for node in self.nodes.values() if node.alive]
        return [self.operator, *nodes, *([self.master.wire] if self.master is not None else [])]

    def _pick(self, index: int) -> SimNode:
        return list(self.nodes.values())[index % len(self.nodes)]

    def _wire(self, who: str | int) -> Wire:
        if who == "operator":
            return self.operator
        if who == "master":
            return self.master.wire if self.master is not None else Wire(self, "nobody")
        assert isinstance(who, int)
        return self._pick(who).wire

    def _node(self, index: int, does: Callable[[SimNode], Any]) -> bool:
        node = self._pick(index)
        if not node.alive:
            return False
        self.acting = node
        try:
            return bool(does(node))
        except Killed:
            node.kill()
            return True
        finally:
            self.acting = None

    def _begin(self, name: str, files: dict[str, bytes]) -> None:
        self.nodes[name] = node = SimNode(self, name, files)
        node.start()

    def _master(self, does: Callable[[], None]) -> None:
        try:
            does()
        except Killed:
            self._master_died()

    def _master_died(self) -> None:
        if self.master is not None:
            self.died_of.update(self.disk.mark.read().splitlines())
            self.master.wire.close()
            self.master, self.kill_in = None, -1
            self.disk.db.rollback()  # rows that were not committed went with it

    def _start_master(self, snapshot: bool = True) -> None:
        if not snapshot:
            self.disk.snapshots = []
        try:
            self.master = SimMaster(self, self.settings)
            self.master.start()
        except Killed:
            self._master_died()

    def _operator_speaks(self) -> bool:
        if not self.operator_outbox:
            return False
        try:
            self.operator.publish(self.operator_outbox[0])
        except (BrokerUnavailable, Unroutable):
            return True
        self.operator_outbox.pop(0)
        return True


def weather(plan: Plan) -> World:
    """Live through a plan and check everything. Raises Violation."""
    world = World(plan)
    for action in plan.actions:
        world.act(action)
    world.quiesce()
    world.check()
    world.probe()
    world.check()
    return world
