"""What the master's metrics say of the federation: pure, from its report and what it has answered.

Names that others choose are bounded: of the encoders those that are being made come first and then the newest, of
members those that joined first, so that whoever makes up names pushes out no one; the rest are counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from deploy.monitoring.table import Buckets, Sample
from master_service.counts import Counts
from master_service.decisions.state import Status
from master_service.status import EncoderReport, MemberReport, Report

#: Encoders, and members over all of them, that have metrics of their own.
MOST_ENCODERS, MOST_MEMBERS = 64, 1_000

_OVER = ("finished", "failed")


def samples(report: Report, counts: Counts, needed_bytes: int) -> Iterator[Sample]:
    """`needed_bytes`: of free disk, below which nothing is accepted."""
    yield Sample("disk_min_free_bytes", needed_bytes)
    yield Sample("log_rows", report.log.entries)
    if report.snapshot.age_seconds is not None:
        yield Sample("snapshot_age_seconds", report.snapshot.age_seconds)
    yield Sample("snapshot_missing_rows", max(0, report.log.entries - 1 - report.snapshot.offset))
    yield Sample("dead_letters_total", report.dead_letters)
    yield Sample("published_bytes_total", report.bytes_published)
    yield Sample("nodes", len(report.nodes))
    listed = encoders(report)
    yield Sample("encoders_unlisted", len(report.encoders) - len(listed))
    for name, encoder in listed.items():
        yield from _encoder(name, encoder, counts.version_at.get(name))
    left = MOST_MEMBERS
    for name, encoder in listed.items():
        for node, member in list(encoder.members.items())[:left]:
            yield from _member({"encoder": name, "node": node}, member)
            left -= 1
    everybody = sum(len(encoder.members) for encoder in report.encoders.values())
    yield Sample("members_unlisted", everybody - (MOST_MEMBERS - left))
    yield from _answered(counts)


def encoders(report: Report) -> dict[str, EncoderReport]:
    """Those that have metrics of their own."""
    newest = list(reversed(report.encoders.items()))
    ordered = sorted(newest, key=lambda item: item[1].status in _OVER)
    return dict(ordered[:MOST_ENCODERS])


def _encoder(name: str, encoder: EncoderReport, version_at: float | None) -> Iterator[Sample]:
    about = {"encoder": name}
    for status in get_args(Status):
        yield Sample("encoder_status", encoder.status == status, {**about, "status": status})
    yield Sample("encoder_version", encoder.version, about)
    if version_at is not None:
        yield Sample("encoder_version_timestamp_seconds", version_at, about)
    yield Sample("encoder_parameters", encoder.parameters, about)
    yield Sample("encoder_buffered_updates", encoder.buffered, about)
    yield Sample("encoder_progress_ratio", encoder.progress, about)
    yield Sample("encoder_active_nodes", sum(member.active for member in encoder.members.values()), about)
    yield Sample("encoder_missing_nodes", encoder.waiting_for_nodes, about)
    if encoder.held_out is not None:
        yield Sample("encoder_held_out_loss", encoder.held_out, about)
    if encoder.best_held_out is not None:
        yield Sample("encoder_best_held_out_loss", encoder.best_held_out, about)


def _member(about: dict[str, str], member: MemberReport) -> Iterator[Sample]:
    yield Sample("member_active", member.active, about)
    yield Sample("member_vanished", member.takes_part and not member.present, about)
    yield Sample("member_returns", member.returns, about)
    yield Sample("member_refused_updates", member.refused, about)
    if member.last_weight is not None:
        yield Sample("member_last_weight", member.last_weight, about)
    yield Sample("member_staleness_versions", member.staleness, about)
    yield Sample("member_version", member.version, about)
    yield Sample("member_steps", member.steps, about)
    yield Sample("member_steps_per_second", member.steps_per_second, about)
    if member.loss is not None:
        yield Sample("member_loss", member.loss, about)
    if member.held_out is not None:
        yield Sample("member_held_out_loss", member.held_out, about)
    yield Sample("member_step_seconds_total", member.step_seconds, about)
    yield Sample("member_waiting_seconds_total", member.waiting_seconds, about)
    for work, seconds in member.lost_seconds.items():
        yield Sample("member_lost_seconds_total", seconds, {**about, "work": work})
    yield Sample("member_sent_bytes", member.bytes_sent, about)
    if member.silent_seconds is not None:
        yield Sample("member_silent_seconds", member.silent_seconds, about)


def _answered(counts: Counts) -> Iterator[Sample]:
    for answered, count in counts.answered.items():
        yield Sample("updates_total", count, answered._asdict())
    for name, sums in (("update_weight", counts.weights), ("update_staleness_versions", counts.staleness)):
        for encoder, histogram in sums.items():
            yield Sample(name, Buckets(histogram.cumulative(), histogram.total), {"encoder": encoder})
    for encoder, size in counts.payload_bytes.items():
        yield Sample("update_payload_bytes_total", size, {"encoder": encoder})
