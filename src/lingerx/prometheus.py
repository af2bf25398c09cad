"""What closers count, as Prometheus metrics. Needs the extra `prometheus` (prometheus_client).

Names, help texts and the way from `Stats` to samples live here, and nothing that counts: every scrape asks each closer
once, and holds none of them. All closers of a registry share one collector, because an exposition may describe a metric
only once.
"""

from __future__ import annotations

import threading
import weakref
from itertools import accumulate
from typing import TYPE_CHECKING

from .closer import Closer, Stats

try:
    from prometheus_client import REGISTRY, CollectorRegistry
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.registry import Collector
except ModuleNotFoundError as missing:
    if missing.name != "prometheus_client":
        raise
    raise ImportError(
        "the metrics need prometheus_client, which is not installed: pip install 'lingerx[prometheus]'"
    ) from missing

if TYPE_CHECKING:
    from prometheus_client.core import Metric

__all__ = ["CloserCollector", "register"]

_lock = threading.RLock()  # reentrant: a signal handler may register a closer while another is being registered


class CloserCollector(Collector):
    """The metrics of any number of closers, each with its name in the label `closer`.

    lingerx_closer_handed_over_sockets_total: sockets that were handed over.
    lingerx_closer_closed_sockets_total: closed sockets; label `outcome`: the value of an Outcome, such as "acked".
    lingerx_closer_pending_sockets: sockets that are not closed yet.
    lingerx_closer_buffered_bytes: bytes kept for data that is not sent yet.
    lingerx_closer_drained_bytes_total: bytes of input that were discarded, of closed sockets.
    lingerx_closer_linger_seconds: histogram of the seconds from hand-over to close.

    The numbers of one closer are all of one moment in each scrape. A closer is not kept alive; when it is gone, so are
    its metrics. One that was shut down shows its last numbers for as long as somebody holds it.

    prometheus_client does not collect from custom collectors in its multiprocess mode: there each process has to
    expose its own closers.

    Source: https://prometheus.io/docs/instrumenting/writing_clientlibs/ and /docs/practices/naming/.
    """

    def __init__(self, closer: Closer | None = None, name: str = "default") -> None:
        self._closers: weakref.WeakValueDictionary[str, Closer] = weakref.WeakValueDictionary()
        if closer is not None:
            self.add(closer, name)

    def add(self, closer: Closer, name: str) -> None:
        """Expose `closer` from the next scrape on, as closer=`name`. Adding it once more changes nothing.

        Raises ValueError when another closer has that name, and is neither gone nor removed.
        """
        with _lock:
            if self._closers.setdefault(name, closer) is not closer:
                raise ValueError(f"another closer is exposed as {name!r}: give this one another name")

    def remove(self, name: str) -> None:
        """Expose the closer of that name no longer. Nothing happens when there is none (any more)."""
        with _lock:
            self._closers.pop(name, None)

    def describe(self) -> list[Metric]:
        """The metrics without numbers: the names that a registry allows only once."""
        return _metrics([])

    def collect(self) -> list[Metric]:
        """The metrics of all closers that are not gone; none when there is no such closer. For the registry."""
        snapshots = self._snapshots()
        return _metrics(snapshots) if snapshots else []

    def _snapshots(self) -> list[tuple[str, Stats]]:
        with _lock:
            closers = list(self._closers.items())
        return [(name, closer.stats()) for name, closer in closers]


_collectors: weakref.WeakKeyDictionary[CollectorRegistry, CloserCollector] = weakref.WeakKeyDictionary()
"""Those that `register` has made."""


def register(closer: Closer, name: str = "default", registry: CollectorRegistry = REGISTRY) -> CloserCollector:
    """Expose `closer` in `registry`, as closer=`name`, for as long as somebody holds it; returns its collector.

    Raises ValueError when another closer has that name, or when a CloserCollector that was not made here is
    registered already (then use its `add`).
    """
    with _lock:
        known = _collectors.get(registry)
        collector = CloserCollector() if known is None else known
        try:
            registry.register(collector)  # also one that somebody has unregistered
        except ValueError:  # its names are in use: by itself, or by another
            try:
                registry.unregister(collector)
            except KeyError:
                is_itself = False
            else:
                is_itself = True
            if not is_itself:
                raise
            registry.register(collector)
        collector.add(closer, name)
        _collectors[registry] = collector
    return collector


def _metrics(snapshots: list[tuple[str, Stats]]) -> list[Metric]:
    handed_over = CounterMetricFamily(
        "lingerx_closer_handed_over_sockets", "Sockets that were handed over to the closer.", labels=["closer"]
    )
    closed = CounterMetricFamily(
        "lingerx_closer_closed_sockets", "Sockets that the closer has closed, by outcome.", labels=["closer", "outcome"]
    )
    pending = GaugeMetricFamily(
        "lingerx_closer_pending_sockets", "Sockets that the closer has not closed yet.", labels=["closer"]
    )
    buffered = GaugeMetricFamily(
        "lingerx_closer_buffered_bytes", "Bytes kept for data that is not sent yet.", labels=["closer"]
    )
    drained = CounterMetricFamily(
        "lingerx_closer_drained_bytes", "Bytes of input that were discarded, of closed sockets.", labels=["closer"]
    )
    linger = HistogramMetricFamily(
        "lingerx_closer_linger_seconds", "Seconds from the hand-over of a socket to its close.", labels=["closer"]
    )
    for name, stats in snapshots:
        handed_over.add_metric([name], stats.handed_over)
        for outcome, count in stats.outcomes.items():
            closed.add_metric([name, outcome.value], count)
        pending.add_metric([name], stats.pending)
        buffered.add_metric([name], stats.buffered)
        drained.add_metric([name], stats.drained)
        bounds = ["+Inf" if bound == float("inf") else str(bound) for bound in stats.linger_times]
        counts = accumulate(stats.linger_times.values())
        linger.add_metric([name], list(zip(bounds, counts, strict=True)), stats.total_linger_time)
    return [handed_over, closed, pending, buffered, drained, linger]
