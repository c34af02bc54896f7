"""Samples in the words of Prometheus or OpenMetrics: the only file that imports prometheus_client."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import inf

from prometheus_client import CollectorRegistry, ProcessCollector, exposition
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from deploy.monitoring.table import Buckets, Metric, Sample


def exposed(table: Iterable[Metric], samples: Iterable[Sample], accept: str = "") -> tuple[bytes, str]:
    """The body of /metrics and its content type, in the form that the `Accept` header asks for; this process's memory,
    processor time and files are there too. A sample that the table does not have is a KeyError."""
    registry = CollectorRegistry()
    registry.register(_Collected(list(families(table, samples))))
    ProcessCollector(registry=registry)
    encode, content_type = exposition.choose_encoder(accept)
    return encode(registry), content_type


def families(table: Iterable[Metric], samples: Iterable[Sample]) -> Iterator[Family]:
    """Metrics that have a sample, in the order of the table."""
    metrics = {metric.name: metric for metric in table}
    found: dict[str, list[Sample]] = {name: [] for name in metrics}
    for sample in samples:
        found[sample.name].append(sample)
    for name, each in found.items():
        if each:
            yield _family(metrics[name], each)


def _family(metric: Metric, samples: list[Sample]) -> Family:
    name, about, labels = metric.full_name, metric.help, metric.labels
    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(name, about, labels=labels)
        for sample in samples:
            assert isinstance(sample.value, Buckets), f"{name} is a histogram"
            buckets = [
                ("+Inf" if bound == inf else str(bound), float(count)) for bound, count in sample.value.cumulative
            ]
            histogram.add_metric(_values(metric, sample), buckets, sample.value.total)
        return histogram
    family = (CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily)(name, about, labels=labels)
    for sample in samples:
        assert not isinstance(sample.value, Buckets), f"{name} is one number"
        family.add_metric(_values(metric, sample), sample.value)
    return family


def _values(metric: Metric, sample: Sample) -> list[str]:
    assert set(sample.labels) == set(metric.labels), f"{metric.name} has {metric.labels}, not {sample.labels}"
    return [sample.labels[label] for label in metric.labels]


class _Collected(Collector):
    def __init__(self, families: list[Family]) -> None:
        self._families = families

    def collect(self) -> Iterable[Family]:
        return self._families
