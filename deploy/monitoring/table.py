"""Every metric that /metrics has: name, help, labels, and which party has it. Named as Prometheus wants it: base units,
`_total` for what only grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["master", "node", "aggregator"]
Kind = Literal["counter", "gauge", "histogram"]

PREFIX = "shared_encoder_"


@dataclass(frozen=True, slots=True)
class Metric:
    """`name` is without the prefix; a counter's is with `_total`. `of`: the parties that have it."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    of: tuple[Role, ...] = ("master", "node", "aggregator")

    @property
    def full_name(self) -> str:
        return PREFIX + self.name


@dataclass(frozen=True, slots=True)
class Buckets:
    """A histogram's value: (upper bound, values up to it) with an infinite last one, and the sum of all values."""

    cumulative: Sequence[tuple[float, int]]
    total: float


@dataclass(frozen=True, slots=True)
class Sample:
    """One value of a metric; `name` as the table has it."""

    name: str
    value: float | Buckets
    labels: Mapping[str, str] = field(default_factory=dict)


_LOG: tuple[Role, ...] = ("master", "aggregator")
_MASTER: tuple[Role, ...] = ("master",)
_NODE: tuple[Role, ...] = ("node",)
_AGGREGATOR: tuple[Role, ...] = ("aggregator",)
_MEMBER = ("encoder", "node")

METRICS: tuple[Metric, ...] = (
    # every party
    Metric("build_info", "gauge", "Always 1: which party this is, and of which release.", ("role", "name", "version")),
    Metric("ready", "gauge", "Whether a part works: broker, lock, disk, log, loop.", ("role", "part")),
    Metric("loop_age_seconds", "gauge", "Since the thread that decides has last looked around.", ("role",)),
    Metric("logged_problems_total", "counter", "Lines logged as warnings and as errors.", ("role", "level")),
    Metric("last_error_timestamp_seconds", "gauge", "When the last error was logged; absent: never.", ("role",)),
    Metric("broker_connected", "gauge", "Whether there is a connection to the broker.", ("role",)),
    Metric("broker_blocked", "gauge", "Whether the broker takes nothing because of an alarm of its own.", ("role",)),
    Metric("broker_disconnects_total", "counter", "Connections to the broker that were lost.", ("role",)),
    Metric("broker_sent_bytes_total", "counter", "Bytes of messages published.", ("role",)),
    Metric("broker_received_bytes_total", "counter", "Bytes of messages received.", ("role",)),
    Metric("disk_free_bytes", "gauge", "Free on the disk of the state directory.", ("role",)),
    Metric("disk_min_free_bytes", "gauge", "Must be free before anything is accepted (master.min_free).", (), _MASTER),
    Metric(
        "disk_remaining_seconds",
        "gauge",
        "Until no more than min_free is free, as the state directory grows now; +Inf: it does not grow.",
        ("role",),
        _LOG,
    ),
    Metric("state_bytes", "gauge", "In the state directory: ledger, payloads, snapshots, other.", ("role", "part")),
    Metric(
        "state_growth_bytes_per_day",
        "gauge",
        "What ledger and payloads grow by in a day, as over the last six hours.",
        ("role",),
        _LOG,
    ),
    # the master
    Metric("log_rows", "gauge", "Rows in the message log.", (), _MASTER),
    Metric("snapshot_age_seconds", "gauge", "Since the newest snapshot was written.", (), _MASTER),
    Metric("snapshot_missing_rows", "gauge", "Rows that a start would have to fold again.", (), _MASTER),
    Metric("dead_letters_total", "counter", "Messages that were set aside.", (), _MASTER),
    Metric("published_bytes_total", "counter", "Bytes of versions published.", (), _MASTER),
    Metric(
        "queue_messages",
        "gauge",
        "Waiting in this process: arrived, updates (for their turn), outbox, held (while the disk is full).",
        ("role", "queue"),
        _LOG,
    ),
    Metric("nodes", "gauge", "Nodes that ever joined.", (), _MASTER),
    Metric("members_unlisted", "gauge", "Members without metrics of their own, beyond a thousand.", (), _MASTER),
    Metric("encoders_unlisted", "gauge", "Encoders without metrics of their own.", (), _MASTER),
    Metric("encoder_status", "gauge", "1 for what the encoder is, 0 for the rest.", ("encoder", "status"), _MASTER),
    Metric("encoder_version", "gauge", "The current version.", ("encoder",), _MASTER),
    Metric(
        "encoder_version_timestamp_seconds",
        "gauge",
        "When the newest version was made; absent: none since the master started.",
        ("encoder",),
        _MASTER,
    ),
    Metric("encoder_parameters", "gauge", "Numbers that travel.", ("encoder",), _MASTER),
    Metric("encoder_buffered_updates", "gauge", "Updates that wait for the next version.", ("encoder",), _MASTER),
    Metric("encoder_progress_ratio", "gauge", "Of the nearest limit of the stop rule, 0 to 1.", ("encoder",), _MASTER),
    Metric("encoder_active_nodes", "gauge", "Members that take part and give signs of life.", ("encoder",), _MASTER),
    Metric("encoder_missing_nodes", "gauge", "Wanted before the training starts.", ("encoder",), _MASTER),
    Metric("encoder_held_out_loss", "gauge", "Mean held-out loss of the members.", ("encoder",), _MASTER),
    Metric("encoder_best_held_out_loss", "gauge", "The lowest such mean.", ("encoder",), _MASTER),
    Metric(
        "updates_total",
        "counter",
        "Updates answered since the start: counted, refused (with the reason of the receipt), duplicate.",
        ("encoder", "outcome", "reason"),
        _MASTER,
    ),
    Metric("update_weight", "histogram", "Weights of counted updates.", ("encoder",), _MASTER),
    Metric("update_staleness_versions", "histogram", "Versions that counted ones were behind.", ("encoder",), _MASTER),
    Metric("update_payload_bytes_total", "counter", "Payloads of updates taken in.", ("encoder",), _MASTER),
    Metric("member_active", "gauge", "Whether it takes part and gives signs of life.", _MEMBER, _MASTER),
    Metric("member_vanished", "gauge", "Whether it takes part and gives no sign of life.", _MEMBER, _MASTER),
    Metric("member_returns", "gauge", "Updates accepted.", _MEMBER, _MASTER),
    Metric("member_refused_updates", "gauge", "Updates refused.", _MEMBER, _MASTER),
    Metric("member_last_weight", "gauge", "Weight of the update accepted last.", _MEMBER, _MASTER),
    Metric("member_staleness_versions", "gauge", "Versions that the one accepted last was behind.", _MEMBER, _MASTER),
    Metric("member_version", "gauge", "The newest version that it is known to have.", _MEMBER, _MASTER),
    Metric("member_steps", "gauge", "Training steps, as it says.", _MEMBER, _MASTER),
    Metric("member_steps_per_second", "gauge", "Now; 0 while it does not train this encoder.", _MEMBER, _MASTER),
    Metric("member_loss", "gauge", "Mean training loss, as it says.", _MEMBER, _MASTER),
    Metric("member_held_out_loss", "gauge", "Loss of its validation samples, as it says.", _MEMBER, _MASTER),
    Metric("member_step_seconds_total", "counter", "Spent in training steps, as it says.", _MEMBER, _MASTER),
    Metric("member_waiting_seconds_total", "counter", "Without training for want of the master.", _MEMBER, _MASTER),
    Metric(
        "member_lost_seconds_total",
        "counter",
        "In which no step ran though one could have, by what was done instead.",
        (*_MEMBER, "work"),
        _MASTER,
    ),
    Metric("member_sent_bytes", "gauge", "Sent by the node since it began, as it says.", _MEMBER, _MASTER),
    Metric("member_silent_seconds", "gauge", "Since its last message to this master.", _MEMBER, _MASTER),
    # a node
    Metric("node_samples", "gauge", "Training samples here.", ("type",), _NODE),
    Metric("node_version", "gauge", "The version that it trains on; -1: none.", ("encoder",), _NODE),
    Metric("node_staleness_versions", "gauge", "Versions that the one counted last was behind.", ("encoder",), _NODE),
    Metric("node_last_weight", "gauge", "Weight of the update counted last.", ("encoder",), _NODE),
    Metric("node_steps", "gauge", "Training steps on this encoder.", ("encoder",), _NODE),
    Metric("node_steps_per_second", "gauge", "Smoothed over the last steps.", ("encoder",), _NODE),
    Metric("node_loss", "gauge", "Mean training loss.", ("encoder",), _NODE),
    Metric(
        "node_held_out_loss", "gauge", "Loss of validation samples under a version as it came.", ("encoder",), _NODE
    ),
    Metric("node_training_seconds_total", "counter", "Spent training, by the rule's clock.", ("encoder",), _NODE),
    Metric("node_step_seconds_total", "counter", "Spent in training steps.", ("encoder",), _NODE),
    Metric("node_waiting_seconds_total", "counter", "Without training for want of the master.", ("encoder",), _NODE),
    Metric(
        "node_lost_seconds_total",
        "counter",
        "In which no step ran though one could have, by what was done instead.",
        ("encoder", "work"),
        _NODE,
    ),
    Metric("node_sending_seconds_total", "counter", "Spent sending, confirms included; training goes on.", (), _NODE),
    Metric(
        "node_updates_total",
        "counter",
        "Updates of this encoder since the start: handed_in, counted, refused.",
        ("encoder", "outcome"),
        _NODE,
    ),
    Metric("node_pending_updates", "gauge", "On disk, handed in and not answered yet.", (), _NODE),
    Metric("node_pending_bytes", "gauge", "Payloads of those.", (), _NODE),
    Metric("node_waiting_for_master", "gauge", "Whether it waits for the master now.", (), _NODE),
    Metric("node_paused", "gauge", "Whether its owner's hours let it rest.", (), _NODE),
    Metric("node_turned_away_messages_total", "counter", "Messages dropped that were not the master's.", (), _NODE),
    # an aggregator
    Metric("aggregator_version", "gauge", "The version that it holds its part of.", ("encoder",), _AGGREGATOR),
)

BY_NAME = {metric.name: metric for metric in METRICS}


def of(role: Role) -> list[Metric]:
    """The metrics that a party has, in order."""
    return [metric for metric in METRICS if role in metric.of]


def rows() -> list[str]:
    """The table as docs/operations.md has it, in Markdown."""
    lines = ["| metric | kind | labels | of | what it is |", "|---|---|---|---|---|"]
    for metric in METRICS:
        labels = " ".join(f"`{label}`" for label in metric.labels)
        of_all = "all" if len(metric.of) == 3 else ", ".join(metric.of)
        lines.append(f"| `{metric.full_name}` | {metric.kind} | {labels} | {of_all} | {metric.help} |")
    return lines
