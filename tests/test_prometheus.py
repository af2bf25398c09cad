"""The metrics of closers, read back by prometheus_client's own parsers.

Made-up numbers show that each arrives where it belongs, a real closer that real numbers do.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import pytest

pytest.importorskip("prometheus_client", reason="metrics need the extra 'prometheus'")

import prometheus_client.openmetrics.exposition
import prometheus_client.openmetrics.parser
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families as parse

from connections import DEADLINE, PairMaker
from lingerx import Drain, Outcome
from lingerx.closer import Closer, Stats
from lingerx.prometheus import CloserCollector, register

if TYPE_CHECKING:
    from closers import CloserMaker

openmetrics: Any = prometheus_client.openmetrics  # without types

OUTCOMES = {outcome: place for place, outcome in enumerate(Outcome, 1)}
TIMES = {0.001: 60, 0.5: 10, 1.0: 0, 60.0: 7, float("inf"): 1}
MADE_UP = Stats(
    handed_over=83,
    pending=5,
    buffered=65536,
    drained=1 << 33,
    outcomes=OUTCOMES,
    linger_times=TIMES,
    total_linger_time=210.25,
)

METRICS = {
    "lingerx_closer_handed_over_sockets": "counter",
    "lingerx_closer_closed_sockets": "counter",
    "lingerx_closer_pending_sockets": "gauge",
    "lingerx_closer_buffered_bytes": "gauge",
    "lingerx_closer_drained_bytes": "counter",
    "lingerx_closer_linger_seconds": "histogram",
}


class MadeUp:
    """A closer that only counts: its `Stats`, and how often it was asked."""

    def __init__(self, stats: Stats = MADE_UP) -> None:
        self._stats = stats
        self.asked = 0

    def stats(self) -> Stats:
        self.asked += 1
        return self._stats


def as_closer(made_up: MadeUp) -> Closer:
    return cast("Closer", made_up)


def scrape(registry: CollectorRegistry) -> str:
    return generate_latest(registry).decode()


def values(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    """(name, label values in the order of their names) -> value, of all samples."""
    found = {}
    for family in parse(scrape(registry)):
        for sample in family.samples:
            labels: Mapping[str, str] = sample.labels
            key = (sample.name, *(labels[name] for name in sorted(labels)))
            assert key not in found
            found[key] = sample.value
    return found


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry(auto_describe=True)  # as the default one


# What is exposed -------------------------------------------------------------------------------------------


def test_every_number_arrives_under_its_name(registry: CollectorRegistry) -> None:
    closer = MadeUp()
    registry.register(CloserCollector(as_closer(closer), "uploads"))
    expected: dict[tuple[str, ...], float] = {
        ("lingerx_closer_handed_over_sockets_total", "uploads"): 83,
        ("lingerx_closer_pending_sockets", "uploads"): 5,
        ("lingerx_closer_buffered_bytes", "uploads"): 65536,
        ("lingerx_closer_drained_bytes_total", "uploads"): 1 << 33,
        ("lingerx_closer_linger_seconds_bucket", "uploads", "0.001"): 60,
        ("lingerx_closer_linger_seconds_bucket", "uploads", "0.5"): 70,
        ("lingerx_closer_linger_seconds_bucket", "uploads", "1.0"): 70,
        ("lingerx_closer_linger_seconds_bucket", "uploads", "60.0"): 77,
        ("lingerx_closer_linger_seconds_bucket", "uploads", "+Inf"): 78,
        ("lingerx_closer_linger_seconds_count", "uploads"): 78,
        ("lingerx_closer_linger_seconds_sum", "uploads"): 210.25,
    }
    for outcome, count in OUTCOMES.items():
        expected["lingerx_closer_closed_sockets_total", "uploads", outcome.value] = count
    assert values(registry) == expected


def test_types_and_help(registry: CollectorRegistry) -> None:
    closer = MadeUp()
    register(as_closer(closer), registry=registry)
    families = list(parse(scrape(registry)))
    # The text format counts "_total" to the name.
    assert {family.name.removesuffix("_total"): family.type for family in families} == METRICS
    assert all(family.documentation.endswith(".") for family in families)


def test_one_scrape_asks_each_closer_once(registry: CollectorRegistry) -> None:
    closers = [MadeUp(), MadeUp()]
    for name, closer in zip("ab", closers, strict=True):
        register(as_closer(closer), name, registry)
    assert [closer.asked for closer in closers] == [0, 0]
    scrape(registry)
    assert [closer.asked for closer in closers] == [1, 1]
    scrape(registry)
    assert [closer.asked for closer in closers] == [2, 2]


def test_a_real_closer(closers: CloserMaker, tcp: PairMaker, registry: CollectorRegistry) -> None:
    closer = closers(Drain(timeout=DEADLINE))
    register(closer, "real", registry)
    ours, peer = tcp()
    peer.sendall(b"unread")
    done = closer.submit(ours)
    waiting, _peer = tcp()
    closer.close(waiting)
    peer.close()
    assert done.result(DEADLINE).outcome is Outcome.PEER_CLOSED
    found = values(registry)
    assert found["lingerx_closer_handed_over_sockets_total", "real"] == 2
    assert found["lingerx_closer_pending_sockets", "real"] == 1
    assert found["lingerx_closer_closed_sockets_total", "real", "peer_closed"] == 1
    assert found["lingerx_closer_closed_sockets_total", "real", "timed_out"] == 0
    assert found["lingerx_closer_drained_bytes_total", "real"] == len(b"unread")
    assert found["lingerx_closer_buffered_bytes", "real"] == 0
    assert found["lingerx_closer_linger_seconds_count", "real"] == 1
    assert 0 < found["lingerx_closer_linger_seconds_sum", "real"] < DEADLINE
    assert len(found) == 5 + len(Outcome) + len(closer.stats().linger_times) + 1


# Several closers -------------------------------------------------------------------------------------------


def test_two_closers_in_one_registry(registry: CollectorRegistry) -> None:
    first, second = MadeUp(), MadeUp(MADE_UP._replace(pending=6))
    collector = register(as_closer(first), "first", registry)
    assert register(as_closer(second), "second", registry) is collector
    found = values(registry)
    assert found["lingerx_closer_pending_sockets", "first"] == 5
    assert found["lingerx_closer_pending_sockets", "second"] == 6


def test_two_real_closers_in_one_registry(closers: CloserMaker, tcp: PairMaker, registry: CollectorRegistry) -> None:
    busy, idle = closers(Drain(timeout=DEADLINE)), closers()
    register(busy, "busy", registry)
    register(idle, "idle", registry)
    ours, _peer = tcp()
    busy.close(ours)
    found = values(registry)
    assert found["lingerx_closer_pending_sockets", "busy"] == 1
    assert found["lingerx_closer_pending_sockets", "idle"] == 0


def test_every_metric_is_described_once(registry: CollectorRegistry) -> None:
    """The parser of OpenMetrics refuses a metric that is described twice, and a histogram that does not add up."""
    closers = [MadeUp(), MadeUp()]
    for name, closer in zip(('"quoted"\n', "b"), closers, strict=True):
        register(as_closer(closer), name, registry)
    text = openmetrics.exposition.generate_latest(registry).decode()
    families = openmetrics.parser.text_string_to_metric_families(text)
    assert {family.name: family.type for family in families} == METRICS


def test_a_name_that_another_closer_has(registry: CollectorRegistry) -> None:
    first, second = MadeUp(), MadeUp()
    collector = register(as_closer(first), registry=registry)
    with pytest.raises(ValueError, match="another closer is exposed as 'default': give this one another name"):
        register(as_closer(second), registry=registry)
    collector.remove("default")
    collector.remove("default")
    register(as_closer(second), registry=registry)
    scrape(registry)
    assert (first.asked, second.asked) == (0, 1)


def test_the_same_closer_again(registry: CollectorRegistry) -> None:
    closer = MadeUp()
    assert register(as_closer(closer), registry=registry) is register(as_closer(closer), registry=registry)
    assert values(registry)["lingerx_closer_pending_sockets", "default"] == 5


def test_a_collector_that_was_unregistered_meanwhile(registry: CollectorRegistry) -> None:
    closer = MadeUp()
    registry.unregister(register(as_closer(closer), registry=registry))
    assert scrape(registry) == ""
    register(as_closer(closer), registry=registry)
    assert values(registry)["lingerx_closer_pending_sockets", "default"] == 5


def test_a_collector_whose_names_somebody_else_has_by_now(registry: CollectorRegistry) -> None:
    first, second = MadeUp(), MadeUp()
    registry.unregister(register(as_closer(first), registry=registry))
    registry.register(CloserCollector())
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        register(as_closer(second), "second", registry)


def test_a_collector_that_somebody_else_registered(registry: CollectorRegistry) -> None:
    first, second = MadeUp(), MadeUp()
    collector = CloserCollector(as_closer(first))
    registry.register(collector)
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        register(as_closer(second), "second", registry)
    collector.add(as_closer(second), "second")
    assert values(registry)["lingerx_closer_pending_sockets", "second"] == 5


def test_registries_do_not_mix(registry: CollectorRegistry) -> None:
    closer = MadeUp()
    other = CollectorRegistry()
    register(as_closer(closer), registry=registry)
    assert scrape(other) == ""
    register(as_closer(closer), registry=other)
    assert values(registry) == values(other)


def test_the_default_registry() -> None:
    closer = MadeUp()
    collector = register(as_closer(closer), "test")
    try:
        assert values(REGISTRY)["lingerx_closer_pending_sockets", "test"] == 5
    finally:
        REGISTRY.unregister(collector)


# Who holds whom --------------------------------------------------------------------------------------------


def test_a_closer_that_is_gone_yields_nothing(registry: CollectorRegistry) -> None:
    gone, other = MadeUp(), MadeUp()
    register(as_closer(gone), "gone", registry)
    register(as_closer(other), "other", registry)
    scrape(registry)
    alive = weakref.ref(gone)
    del gone
    gc.collect()
    assert alive() is None
    assert {key[1] for key in values(registry)} == {"other"}
    del other
    gc.collect()
    assert scrape(registry) == ""
    closer = MadeUp()
    register(as_closer(closer), "gone", registry)  # the name is free again
    assert values(registry)["lingerx_closer_pending_sockets", "gone"] == 5


def test_a_real_closer_that_is_dropped(closers: CloserMaker, registry: CollectorRegistry) -> None:
    """Looked at between the metrics of one scrape, too."""
    kept = closers()
    dropped = type(kept)()
    register(dropped, "dropped", registry)
    metrics = registry.collect()
    next(iter(metrics))
    alive = weakref.ref(dropped)
    del dropped
    gc.collect()
    assert alive() is None
    assert scrape(registry) == ""


def test_a_closer_after_its_shutdown(closers: CloserMaker, registry: CollectorRegistry) -> None:
    closer = closers()
    register(closer, registry=registry)
    closer.shutdown()
    assert values(registry)["lingerx_closer_handed_over_sockets_total", "default"] == 0


def test_a_registry_is_not_kept_alive() -> None:
    closer = MadeUp()
    registry = CollectorRegistry()
    register(as_closer(closer), registry=registry)
    alive = weakref.ref(registry)
    del registry
    gc.collect()
    assert alive() is None


# The import ------------------------------------------------------------------------------------------------


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE)


@pytest.mark.slow
def test_lingerx_does_not_import_it() -> None:
    done = run("import sys, lingerx; print('prometheus_client' in sys.modules, 'lingerx.prometheus' in sys.modules)")
    assert (done.stdout, done.stderr) == ("False False\n", "")


@pytest.mark.slow
def test_without_prometheus_client() -> None:
    """None in sys.modules: as if it were not installed."""
    done = run("import sys; sys.modules['prometheus_client'] = None; import lingerx, lingerx.prometheus")
    last = done.stderr.rstrip().rpartition("\n")[2]
    assert done.returncode == 1
    assert last.startswith("ImportError: ")
    assert "pip install 'lingerx[prometheus]'" in last


@pytest.mark.slow
def test_a_prometheus_client_that_is_broken() -> None:
    """Installing it once more would not help: the error is left as it is."""
    done = run("import sys; sys.modules['prometheus_client.core'] = None; import lingerx.prometheus")
    last = done.stderr.rstrip().rpartition("\n")[2]
    assert last.startswith("ModuleNotFoundError: ")
    assert "prometheus_client.core" in last
