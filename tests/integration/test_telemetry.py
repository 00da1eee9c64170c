"""What a collector gets of a run over the emulated DeepSeek: sums that are the ledger's, spans that hang together."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from structlog.testing import capture_logs

from schemas.errors import ConfigurationError
from schemas.settings import Settings
from tasks import telemetry
from tests.world import World, make_world

ROOT = Path(__file__).parents[2]


@dataclass
class Collector:
    """As much of an OpenTelemetry collector as takes OTLP over HTTP."""

    url: str
    bodies: list[tuple[str, bytes]] = field(default_factory=list)

    def sums(self, name: str, *labels: str) -> dict[tuple[str, ...], int]:
        """A counter's last value by some of its labels; a histogram counts its measurements."""
        sums: Counter[tuple[str, ...]] = Counter()
        for metric in self._metrics(name):
            for point in [*metric.sum.data_points, *metric.histogram.data_points]:
                of = {pair.key: pair.value.string_value for pair in point.attributes}
                sums[tuple(of[f"farthing.{label}"] for label in labels)] += (
                    point.count if metric.HasField("histogram") else point.as_int
                )
        return dict(sums)

    def gauges(self, name: str) -> set[str]:
        """For which tiers a gauge is shown."""
        points = [point for metric in self._metrics(name) for point in metric.gauge.data_points]
        return {
            pair.value.string_value for point in points for pair in point.attributes if pair.key == "farthing.tier"
        }

    def _metrics(self, name: str) -> list[Any]:
        *_, body = (body for path, body in self.bodies if path == "/v1/metrics")  # of one lane: sums only grow
        scopes = [
            scope
            for of in ExportMetricsServiceRequest.FromString(body).resource_metrics
            for scope in of.scope_metrics
        ]
        found = [metric for scope in scopes for metric in scope.metrics if metric.name == name]
        assert found, f"there is no {name}"
        return found

    def spans(self) -> list[Any]:
        requests = [ExportTraceServiceRequest.FromString(body) for path, body in self.bodies if path == "/v1/traces"]
        return [
            span
            for request in requests
            for of in request.resource_spans
            for scope in of.scope_spans
            for span in scope.spans
        ]


@contextmanager
def collecting() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.bodies.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector = Collector(f"http://127.0.0.1:{server.server_address[1]}")
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    try:
        yield collector
    finally:
        server.shutdown()
        serving.join()
        server.server_close()


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """What still tries to reach a collector draws from `random`, which disturbs Hypothesis in later tests."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith(("Otel", "farthing-telemetry")):
            thread.join(30)


@pytest.fixture
async def world(tmp_path: Path, ledger_url: str) -> AsyncIterator[World]:
    async with make_world(tmp_path, ledger_url) as made:
        made.settings = made.settings.model_copy(update={"otel": True, "otel_every": 1})
        yield made


async def test_a_collector_gets_the_ledger_s_sums_and_every_span(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.plan_mishaps({"kind": "reset_after", "share": 0.1}, {"kind": "blank", "share": 0.1})
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        run = await world.open()
        async with telemetry.traced(world.settings, run):
            await world.work(run)

    def rows(query: str) -> dict[tuple[str, ...], int]:
        return {tuple(key): int(value) for *key, value in world.sql(query)}

    by = "tier, purpose, signal"
    attempts = rows(f"SELECT {by}, count(*) FROM attempt GROUP BY {by}")
    assert len(attempts) > 3
    assert collector.sums("farthing.attempts", "tier", "purpose", "signal") == attempts
    assert collector.sums("farthing.attempt.duration", "tier", "purpose", "signal") == attempts
    known = f"SELECT {by}, sum(cost_pico) FROM attempt WHERE cost_pico IS NOT NULL GROUP BY {by}"
    assert collector.sums("farthing.cost", "tier", "purpose", "signal") == rows(known)
    unknown = f"SELECT {by}, sum(unknown_pico) FROM attempt WHERE cost_pico IS NULL GROUP BY {by}"
    assert collector.sums("farthing.cost.unknown", "tier", "purpose", "signal") == rows(unknown) != {}
    for bucket in ("hit", "miss", "output"):
        by_tier = rows(
            f"SELECT tier, '{bucket}', sum({bucket}) FROM attempt WHERE {bucket} IS NOT NULL GROUP BY tier"
        )
        assert collector.sums("farthing.tokens", "tier", "token").items() >= by_tier.items()
    states = rows("SELECT state, count(*) FROM document GROUP BY state")
    assert collector.sums("farthing.documents", "state") == states
    assert (
        collector.gauges("farthing.limiter.limit") == collector.gauges("farthing.limiter.ceiling") == {"flash", "pro"}
    )

    spans = {span.span_id: span for span in collector.spans()}
    kinds = Counter(span.name for span in spans.values())
    assert kinds == {"run": 1, "lane": 1, "shard": 3, "attempt": sum(attempts.values())}
    parents = {(span.name, spans[span.parent_span_id].name) for span in spans.values() if span.parent_span_id}
    assert parents == {("lane", "run"), ("shard", "lane"), ("attempt", "shard")}
    for span in spans.values():
        if span.name != "run":
            outer = spans[span.parent_span_id]
            assert outer.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
            assert span.end_time_unix_nano <= outer.end_time_unix_nano
    assert all(b"about a colour" not in body and b"sk-sandbox" not in body for _, body in collector.bodies)


async def test_of_attempts_that_are_alike_some_are_traced_and_all_are_counted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.settings = world.settings.model_copy(update={"otel_every": 25})
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        await world.run()
    counted = collector.sums("farthing.attempts", "tier", "purpose", "signal")
    traced = sum(-(-attempts // 25) for attempts in counted.values())
    assert sum(span.name == "attempt" for span in collector.spans()) == traced < sum(counted.values())


async def test_a_collector_that_is_away_holds_up_nothing_and_is_told_of(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "CLOSE_S", 0.5)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://somebody:secret@127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "3")
    with capture_logs() as logs:
        run, _ = await world.run()
    assert run.state == "done"
    told = [line["event"] for line in logs if line["event"].startswith("telemetry")]
    assert told == ["telemetry is not all delivered: the collector is away"]


async def test_another_protocol_than_ours_is_refused_before_anything_is_sent(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ConfigurationError, match="http/protobuf"):
        await world.open()


#: What a lane imports, without the setting and with it; then with it where the extra is not installed.
IMPORTS = """
import asyncio, sys
from schemas.settings import Settings
from tasks import enrichment, telemetry

async def lane(settings):
    async with telemetry.traced(settings, None), telemetry.measured(settings, None, 1) as recorder:
        return recorder

telemetry.require(Settings())
assert asyncio.run(lane(Settings())) is None
print([name for name in sys.modules if name.split(".")[0] == "opentelemetry"])
sys.modules["opentelemetry.sdk"] = None
try:
    telemetry.require(Settings(otel=True))
except Exception as error:
    print(error)
"""


def test_without_the_setting_nothing_of_it_is_imported_and_without_the_extra_it_says_what_to_install() -> None:
    said = subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, capture_output=True, text=True, check=True)
    nothing, missing = said.stdout.splitlines()
    assert nothing == "[]"
    assert "pip install 'farthing[otel]'" in missing


def test_the_setting_is_off_unless_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().otel is False
    monkeypatch.setenv("FARTHING_OTEL", "1")
    assert Settings().otel is True
