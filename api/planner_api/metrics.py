"""Prometheus metrics of one service: its requests, and the jobs and trials in its store."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from planner.jobs import JobState
from planner.store import Store


class Metrics:
    """A registry of its own, so that two services in one process do not share counts."""

    def __init__(self, store: Store) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "planner_http_requests", "Requests answered", ("method", "route", "status"), registry=self._registry
        )
        self.seconds = Histogram(
            "planner_http_request_duration_seconds",
            "Time to the first byte",
            ("method", "route"),
            registry=self._registry,
        )
        self._registry.register(_StoreCollector(store))

    def render(self) -> bytes:
        """The Prometheus text format. Raises ``StoreError`` when the store does not answer."""
        return generate_latest(self._registry)


class _StoreCollector:
    """Read at each scrape: the store is shared by several processes, so a counter in this one would be wrong."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        jobs = GaugeMetricFamily("planner_jobs", "Jobs in the store", labels=("state",))
        counts = self._store.count_jobs()
        for state in JobState:
            jobs.add_metric((state.value,), counts.get(state, 0))
        yield jobs
        trials = GaugeMetricFamily("planner_trials", "Trials in the store", labels=("source", "outcome"))
        for (source, outcome), count in sorted(self._store.count_trials().items()):
            trials.add_metric((source, outcome), count)
        yield trials
