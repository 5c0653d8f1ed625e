"""What the service measures of itself, for Prometheus and for /v1/performance."""

import asyncio
import os
import resource
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from app.core.scan import State
from app.engine.limits import REFUSING, Limits
from app.engine.reaper import KINDS, Reaper
from app.engine.runner import Runner
from app.engine.sessions import Sessions
from app.log.eventlog import EventLog
from app.observe.incidents import Change
from app.observe.lookout import Lookout
from app.observe.measures import Severity
from app.observe.tally import read_memory
from app.observe.watchdog import Watchdog
from app.push.hub import Hub

LAG_EVERY_S = 0.1
TRANSPORTS = ("event-stream", "x-ndjson", "websocket", "long-poll", "poll")
_OPEN_FILES = "/proc/self/fd"
_KEPT = 2048  # of the latest lags, for quantiles
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)


class Lags(Collector):
    """How late something was, in seconds: the latest values, and a histogram of all. Prometheus' own takes ten times
    as long for each value, and there is one for every flush."""

    def __init__(self, name: str, text: str) -> None:
        self.latest: deque[float] = deque(maxlen=_KEPT)
        self._name = name
        self._text = text
        self._counts = [0] * (len(_BUCKETS) + 1)  # by bucket, those above all of them last
        self._sum_s = 0.0

    def note(self, lag_s: float) -> None:
        self.latest.append(lag_s)
        self._counts[bisect_left(_BUCKETS, lag_s)] += 1
        self._sum_s += lag_s

    def collect(self) -> Iterator[Metric]:
        bounds = (*map(str, map(float, _BUCKETS)), "+Inf")
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(
            f"scanwire_{self._name}_seconds", self._text, buckets=buckets, sum_value=self._sum_s
        )


class Metrics:
    """Counters and histograms that are written where things happen; all else is read when it is asked for."""

    def __init__(self, legacy_routes: Iterable[str] = ()) -> None:
        self.registry = CollectorRegistry()
        self._push_lags = Lags(
            "push_lag",
            "From the making of a durable event to its being handed to the transports of those who waited for it",
        )
        self._loop_lags = Lags("loop_lag", "How much later than asked for the event loop runs a timer")
        # Who else wants to know, in seconds.
        self.tell_push_lag: Callable[[float], None] = lambda lag_s: None
        self.tell_loop_lag: Callable[[float], None] = lambda lag_s: None
        self._legacy_calls = Counter(dict.fromkeys(legacy_routes, 0))
        self._legacy_answers: deque[float] = deque(maxlen=_KEPT)
        self._process = _Process()
        for own in (self._push_lags, self._loop_lags, self._process):
            self.registry.register(own)

    def note_push_lag(self, lag_s: float) -> None:
        """From the making of a durable event to its being handed to the last transport that waited for it."""
        lag_s = max(0.0, lag_s)
        self.tell_push_lag(lag_s)
        self._push_lags.note(lag_s)

    def count_legacy_call(self, route: str) -> None:
        """One request under /api, answered or refused."""
        self._legacy_calls[route] += 1

    def note_legacy_answer(self, seconds: float) -> None:
        """From a request under /api to the head of its answer."""
        self._legacy_answers.append(seconds)

    @property
    def legacy_answer_s(self) -> float:
        """Mean over the latest answers under /api; 0 before there was one."""
        return sum(self._legacy_answers) / max(1, len(self._legacy_answers))

    async def measure_loop_lag(self, watchdog: Watchdog) -> None:
        """Measures for ever how late the event loop is; the watchdog looks at it when it is far too late."""
        while True:
            due = watchdog.due = time.monotonic() + LAG_EVERY_S
            await asyncio.sleep(LAG_EVERY_S)
            lag_s = max(0.0, time.monotonic() - due)
            self.tell_loop_lag(lag_s)
            self._loop_lags.note(lag_s)

    def quantiles(self) -> dict[str, dict[str, float | None]]:
        """Median, 99th percentile and maximum of the latest lags, in milliseconds."""
        return {"loop_lag_ms": _quantiles(self._loop_lags.latest), "push_lag_ms": _quantiles(self._push_lags.latest)}

    async def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        self._process.open_fds = await count_open_files()
        return generate_latest(self.registry)

    def watch_incidents(self, lookout: Lookout) -> None:
        """From now on incidents and emergencies are among the metrics."""
        self.registry.register(_Incidents(lookout))

    def watch(
        self,
        log: EventLog,
        hub: Hub,
        runner: Runner,
        sessions: Sessions,
        limits: Limits,
        reaper: Reaper,
        watchdog: Watchdog,
    ) -> None:
        """From now on the statistics of these parts are among the metrics."""
        self.registry.register(_Parts(log, hub, runner, sessions, limits, reaper, watchdog, self._legacy_calls))


def _quantiles(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"p50": None, "p99": None, "max": None}
    ordered = sorted(values)
    return {
        name: round(ordered[min(int(share * len(ordered)), len(ordered) - 1)] * 1000, 3)
        for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
    }


async def count_open_files(folder: str = _OPEN_FILES) -> int | None:
    """The descriptors of this process; None where the system does not tell.

    Since Linux 6.2 the size of the directory is their number. Before, all are listed: in a thread, since with thousands
    of connections that holds up the loop for as long as a flush.
    """
    try:
        return os.stat(folder).st_size or len(await asyncio.to_thread(os.listdir, folder))
    except OSError:
        return None


class _Process(Collector):
    """What Prometheus expects of any process, under the names that it has for that."""

    def __init__(self) -> None:
        self.open_fds: int | None = None
        try:
            ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
            boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
            self._started_s: float | None = int(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, IndexError, StopIteration):
            self._started_s = None

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily("process_cpu_seconds", "User and system CPU time", value=time.process_time())
        gauges = (
            ("virtual_memory_bytes", "Virtual memory", read_memory(column=0)),
            ("resident_memory_bytes", "Resident memory", read_memory()),
            ("start_time_seconds", "Start of the process, since 1970", self._started_s),
            ("open_fds", "Open file descriptors", self.open_fds),
            ("max_fds", "File descriptors that may be open", resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        )
        for name, text, value in gauges:
            if value is not None:
                yield GaugeMetricFamily(f"process_{name}", text, value=value)


class _Parts(Collector):
    def __init__(self, *parts: Any) -> None:
        self._parts = parts

    def collect(self) -> Iterator[Metric]:
        log, hub, runner, sessions, limits, reaper, watchdog, legacy_calls = self._parts
        running, limited = runner.statistics(), limits.statistics()
        states = Counter(scan.state for scan in log.list_scans())
        yield _by("gauge", "scans", "Scans kept, by state", "state", states, State)
        yield _gauge("queue_length", "Scans that wait for a slot", running.queued)
        yield _gauge("slots_used", "Scans that run", running.running)
        yield _gauge("slots", "Scans that may run at the same time", running.slots)
        yield _gauge("workers_busy", "Worker processes at work", running.workers_busy)
        subscribers, pushed = hub.statistics()[:2]
        yield _by("gauge", "subscribers", "Open subscriptions", "transport", subscribers, TRANSPORTS)
        yield _gauge("channels", "Scans that somebody watches", hub.statistics().channels)
        yield _gauge("sessions", "Clients present on a scan", sessions.statistics().sessions)
        yield _gauge("streams", "Open streams that hold a place", limited.streams)
        yield _gauge("buckets", "Token buckets held", limited.buckets)
        yield _gauge("log_memory_bytes", "Events of finished scans held in memory", log.statistics().memory_bytes)
        yield _gauge("journal_writable", "1 while the journal can be written", int(log.fault is None))
        yield _counter("events_appended", "Durable events committed", log.statistics().events_appended)
        yield _counter("loop_blocks", "Times that the event loop was blocked for too long", watchdog.blocks)
        yield _counter("worker_crashes", "Worker processes that died on a chunk", running.worker_crashes)
        yield _by("counter", "events_pushed", "Events handed to a transport", "transport", pushed, TRANSPORTS)
        yield _by("counter", "refusals", "Requests refused, by bucket", "bucket", limited.refused, REFUSING)
        yield _by("counter", "legacy_calls", "Requests under /api, by route", "route", legacy_calls, ())
        yield _by("counter", "reaped", "What the reaper took back, by kind", "kind", reaper.reaped, KINDS)


class _Incidents(Collector):
    def __init__(self, lookout: Lookout) -> None:
        self._lookout = lookout

    def collect(self) -> Iterator[Metric]:
        open_ = self._lookout.count_open()
        severities = [severity for severity in Severity if severity is not Severity.HEALTHY]
        yield _by("gauge", "incidents_open", "Incidents that are open, by severity", "severity", open_, severities)
        yield _by("counter", "incidents", "Changes of incidents", "change", self._lookout.changes, Change)
        yield _gauge("emergency", "1 while the limits are those of an emergency", int(self._lookout.is_emergency))


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"scanwire_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"scanwire_{name}", text, value=value)


def _by(kind: str, name: str, text: str, label: str, values: Mapping[Any, float], known: Iterable[str]) -> Metric:
    """A sample for each `known` label as well, 0 without a value: no alert works on a series that comes and goes."""
    make = GaugeMetricFamily if kind == "gauge" else CounterMetricFamily
    family = make(f"scanwire_{name}", text, labels=[label])
    for key, value in {**dict.fromkeys(known, 0), **values}.items():
        family.add_metric([str(key)], value)
    return family
