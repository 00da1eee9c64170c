"""OpenTelemetry: alone responsible for what a lane measures and traces, and for its way to a collector.

Unless FARTHING_OTEL is set it is off: nothing of it is imported, and no reply is looked at twice. Where to send is
OpenTelemetry's own setting (OTEL_EXPORTER_OTLP_ENDPOINT and the like, over HTTP). No text of a document or of a model
leaves by this door, and no key: names, numbers and instants do. The ledger is the truth; what a lane that was killed
had not sent yet is only there. A collector that is away costs a log line and, at the end, `CLOSE_S` seconds.

    run ── lane ── shard ── attempt      (the spans; of attempts that are alike each `otel_every`-th has one)
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import structlog

from schemas.attempts import LaneId, Purpose, Reply, Signal
from schemas.booking import Booking
from schemas.errors import ConfigurationError
from schemas.records import Ending
from schemas.settings import Settings
from tasks.ledger.runs import Run
from tasks.limiter import Limiter

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.metrics import CallbackOptions, Meter, Observation
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

log = structlog.get_logger("farthing.telemetry")

SCOPE = "farthing"
#: How long the end of a lane or a run waits for a collector to take the last of it.
CLOSE_S = 5.0
#: Seconds of an attempt: most take a few, and one that waits for a free machine may take minutes.
BUCKETS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0, 900.0)
#: The variable by which a process hands its span to those it starts (W3C trace context, as an environment).
PARENT = "TRACEPARENT"
#: A collector that stays away is told of so often.
TOLD_EVERY_S = 60.0


def require(settings: Settings) -> None:
    """Raises ConfigurationError where telemetry is asked for and cannot be."""
    if not settings.otel:
        return
    try:
        import opentelemetry.exporter.otlp.proto.http
        import opentelemetry.sdk.metrics  # noqa: F401 (only to see whether it is there)
    except ImportError:
        raise ConfigurationError(
            "FARTHING_OTEL is set, but OpenTelemetry is not installed: pip install 'farthing[otel]', or unset it"
        ) from None
    if os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf") != "http/protobuf":
        raise ConfigurationError(
            "OTEL_EXPORTER_OTLP_PROTOCOL is not http/protobuf, which is all that Farthing speaks: unset it, and let "
            "OTEL_EXPORTER_OTLP_ENDPOINT name the collector's HTTP port, as in http://127.0.0.1:4318"
        )


@asynccontextmanager
async def traced(settings: Settings, run: Run) -> AsyncIterator[None]:
    """A span for the run while the block lasts, under which the lanes that this process starts put theirs."""
    if not settings.otel:
        yield
        return
    traces = _open_traces(_resource(run, f"run-{run.run_id}"))
    try:
        with _span(traces.get_tracer(SCOPE), "run", _outer(), run) as inner, _handed_on(inner):
            yield
    finally:
        await _close(traces.shutdown)


@asynccontextmanager
async def measured(settings: Settings, run: Run, lane_id: LaneId) -> AsyncIterator[Telemetry | None]:
    """What a lane is to tell of its work, sent as it goes; None where it is off."""
    if not settings.otel:
        yield None
        return
    resource = _resource(run, f"run-{run.run_id}-lane-{lane_id}")
    traces, meters = _open_traces(resource), _open_meters(resource)
    try:
        with _span(traces.get_tracer(SCOPE), "lane", _outer(), run) as inner:
            tracer, meter = traces.get_tracer(SCOPE), meters.get_meter(SCOPE)
            yield Telemetry(run, meter, tracer, inner, settings.otel_every)
    finally:
        await _close(traces.shutdown, meters.shutdown)


@dataclass(frozen=True, slots=True)
class UnderWay:
    """When a request left and its reply was there, by the event loop's clock."""

    began_s: float
    ended_s: float

    @property
    def seconds(self) -> float:
        return self.ended_s - self.began_s


@dataclass
class Telemetry:
    """The recorder of one lane. Its calls cost microseconds and wait for nobody."""

    run: Run
    meter: Meter
    tracer: Tracer
    #: Where the lane's span is: that of its shards hang on it.
    context: Context
    every: int
    _shards: dict[int, Context] = field(default_factory=dict)
    _alike: Counter[tuple[str, Purpose, Signal]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        meter, pico = self.meter, f"p{self.run.currency.value}"
        self._duration = meter.create_histogram(
            "farthing.attempt.duration",
            "s",
            "From sending a request to its whole reply",
            explicit_bucket_boundaries_advisory=BUCKETS_S,
        )
        self._attempts = meter.create_counter("farthing.attempts", "{attempt}", "Attempts whose outcome is durable")
        self._tokens = meter.create_counter("farthing.tokens", "{token}", "Tokens that the provider bills")
        self._cost = meter.create_counter("farthing.cost", pico, "Known cost, in 1e-12 of the currency")
        self._unknown = meter.create_counter("farthing.cost.unknown", pico, "The most that unknown attempts can cost")
        self._documents = meter.create_counter("farthing.documents", "{document}", "Documents that have ended")

    def watch(self, in_flight: Callable[[], int], limiters: Mapping[str, Limiter]) -> None:
        """Show how much is in flight and may be, whenever the collector is due to hear."""
        gauges: dict[str, tuple[str, Callable[[], Iterable[tuple[str | None, int]]]]] = {
            "farthing.in_flight": ("Attempts on their way now", lambda: [(None, in_flight())]),
            "farthing.limiter.limit": (
                "How many the adaptive limiter lets be in flight",
                lambda: [(name, limiter.limit) for name, limiter in limiters.items()],
            ),
            "farthing.limiter.ceiling": (
                "How many the job, or an operator, lets this lane have in flight",
                lambda: [(name, limiter.ceiling) for name, limiter in limiters.items()],
            ),
        }
        for name, (description, read) in gauges.items():
            self.meter.create_observable_gauge(name, [self._observer(read)], "{attempt}", description)

    async def shard(self, number: int, finish: Callable[[], Awaitable[None]]) -> None:
        """A shard's work, with a span of its own."""
        with _span(self.tracer, "shard", self.context, self.run, {"farthing.shard": number}) as inner:
            self._shards[number] = inner
            try:
                await finish()
            finally:
                del self._shards[number]

    def see_attempt(
        self, tier: str, purpose: Purpose, shard_no: int, reply: Reply, booking: Booking, under_way: UnderWay | None
    ) -> None:
        """Count an attempt whose outcome is on the ledger, as it was booked. None: its request never left."""
        attributes = self._attributes(tier, purpose, reply.signal)
        self._attempts.add(1, attributes)
        if booking.cost is not None:
            self._cost.add(booking.cost, attributes)
        if booking.bound is not None:
            self._unknown.add(booking.bound, attributes)
        if reply.usage is not None:
            for bucket in ("hit", "miss", "output"):
                kind = {"farthing.job": self.run.job, "farthing.tier": tier, "farthing.token": bucket}
                self._tokens.add(getattr(reply.usage, bucket), kind)
        if under_way is not None:
            self._duration.record(under_way.seconds, attributes)
            alike = (tier, purpose, reply.signal)
            if self._alike[alike] % self.every == 0:
                self._trace(attributes, shard_no, reply, under_way)
            self._alike[alike] += 1

    def see_endings(self, endings: Sequence[Ending]) -> None:
        """Count documents whose end is on the ledger."""
        for ending in endings:
            self._documents.add(1, {"farthing.job": self.run.job, "farthing.state": ending.state.value})

    def _attributes(self, tier: str, purpose: Purpose, signal: Signal) -> dict[str, str]:
        return {
            "farthing.job": self.run.job,
            "farthing.tier": tier,
            "farthing.purpose": purpose.value,
            "farthing.signal": signal.value,
        }

    def _trace(self, attributes: Mapping[str, str], shard_no: int, reply: Reply, under_way: UnderWay) -> None:
        from opentelemetry.trace import SpanKind, StatusCode

        ago_s = asyncio.get_running_loop().time() - under_way.ended_s
        ended = time.time_ns() - round(ago_s * 1e9)
        span = self.tracer.start_span(
            "attempt",
            self._shards.get(shard_no, self.context),
            SpanKind.CLIENT,
            {**attributes, **_numbers(reply)},
            start_time=ended - round(under_way.seconds * 1e9),
        )
        if reply.signal is not Signal.ANSWERED:
            span.set_status(StatusCode.ERROR)
        span.end(ended)

    def _observer(
        self, read: Callable[[], Iterable[tuple[str | None, int]]]
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        """Reads plain integers, so that it may do so in the exporter's thread."""
        from opentelemetry.metrics import Observation

        job = {"farthing.job": self.run.job}

        def observe(_: CallbackOptions) -> Iterable[Observation]:
            return [
                Observation(number, job if tier is None else {**job, "farthing.tier": tier})
                for tier, number in read()
            ]

        return observe


def _numbers(reply: Reply) -> dict[str, int]:
    """What an attempt's span says besides its kind."""
    numbers = {} if reply.http_status is None else {"http.response.status_code": reply.http_status}
    if reply.usage is None:
        return numbers
    usage = reply.usage
    return numbers | {
        "farthing.tokens.hit": usage.hit,
        "farthing.tokens.miss": usage.miss,
        "farthing.tokens.output": usage.output,
    }


@contextmanager
def _span(
    tracer: Tracer, name: str, outer: Context | None, run: Run, attributes: Mapping[str, int] | None = None
) -> Iterator[Context]:
    """A span while the block lasts; yields the context to hang others on it. An exception's words stay here (G15)."""
    from opentelemetry.trace import StatusCode, set_span_in_context

    about: dict[str, str | int] = {
        "farthing.run": run.run_id,
        "farthing.job": run.job,
        "farthing.simulated": run.is_simulated,
    }
    span = tracer.start_span(name, outer, attributes={**about, **(attributes or {})})
    try:
        yield set_span_in_context(span, outer)
    except BaseException as error:
        span.set_status(StatusCode.ERROR, type(error).__name__)
        raise
    finally:
        span.end()


def _outer() -> Context:
    """The span under which this process was started, if there is one."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": os.environ.get(PARENT, "")})


@contextmanager
def _handed_on(inner: Context) -> Iterator[None]:
    """Let the lanes, here or in processes that this one starts, find the run's span."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, inner)
    before = os.environ.get(PARENT)
    os.environ[PARENT] = carrier.get("traceparent", "")
    try:
        yield
    finally:
        if before is None:
            del os.environ[PARENT]
        else:
            os.environ[PARENT] = before


def _resource(run: Run, instance: str) -> Resource:
    """What sends. The usual variables, OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES, have the last word."""
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    about: dict[str, Any] = {"service.name": "farthing", "service.instance.id": instance, "farthing.run": run.run_id}
    return Resource(about).merge(OTELResourceDetector().detect())


def _open_traces(resource: Resource) -> TracerProvider:
    """Not made everybody's: Prefect would then trace its own steps into it, too."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    _speak_for_opentelemetry()
    traces = TracerProvider(resource=resource, shutdown_on_exit=False)
    traces.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return traces


def _open_meters(resource: Resource) -> MeterProvider:
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

    _speak_for_opentelemetry()
    reader = PeriodicExportingMetricReader(OTLPMetricExporter())
    return MeterProvider([reader], resource=resource, shutdown_on_exit=False)


async def _close(*shutdowns: Callable[[], object]) -> None:
    """Send what is left, in a thread that holds nobody up for long where the collector is away."""

    def close() -> None:
        for shutdown in shutdowns:
            shutdown()

    closing = threading.Thread(target=close, name="farthing-telemetry", daemon=True)
    closing.start()
    await asyncio.to_thread(closing.join, CLOSE_S)
    if closing.is_alive():
        log.warning("telemetry is not all delivered: the collector is away")


class _Undelivered(logging.Handler):
    """OpenTelemetry's own words may quote an address with a password in it: this says in ours what they come to."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._told_at = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        if record.created - self._told_at >= TOLD_EVERY_S:
            self._told_at = record.created
            log.warning("telemetry is not delivered: is there a collector at OTEL_EXPORTER_OTLP_ENDPOINT?")


def _speak_for_opentelemetry() -> None:
    logger = logging.getLogger("opentelemetry")
    if not any(isinstance(handler, _Undelivered) for handler in logger.handlers):
        logger.addHandler(_Undelivered())
        logger.propagate = False
