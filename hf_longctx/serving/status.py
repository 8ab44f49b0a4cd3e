"""``GET /longctx`` and ``GET /metrics``: what is patched, what was read and reused, and what is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..model.report import Report, report
from .kept import OUTCOMES, WAYS, KeptGenerate
from .models import ServeSettings

PREFIX = "hf_longctx"


@dataclass(frozen=True)
class Status:
    """What a server did since its model was loaded, as plain numbers.

    Attributes:
        model: its name.
        report: of the model, after its last answer; with continuous batching, after its last step.
        prompts: what is kept, and how often it was of use.
        requests: how many ended how, and how many went which way.
        tokens: read, reused and generated.
    """

    model: str
    report: Report
    prompts: dict[str, int]
    requests: dict[str, int]
    tokens: dict[str, int]

    @classmethod
    def of(cls, settings: ServeSettings, kept: KeptGenerate) -> Status:
        now = report(kept.model) if settings.continuous_batching else kept.seen
        cache = kept.prompts
        prompts = {"stored": len(cache), "bytes": cache.nbytes, "limit": kept.max_bytes}
        prompts |= {"hits": cache.hits, "misses": cache.misses, "dropped": cache.evicted}
        requests = {name: kept.outcomes[name] for name in (*OUTCOMES, *WAYS)}
        tokens = {"read": cache.tokens_read, "reused": cache.tokens_reused, "generated": kept.tokens}
        return cls(settings.model, now, prompts, requests, tokens)

    def __str__(self) -> str:
        p, r, t = self.prompts, self.requests, self.tokens
        ended = ", ".join(f"{r[name]} {name}" for name in OUTCOMES if r[name]) or "none yet"
        held = f"{p['stored']} stored, {p['bytes'] / 1e6:.2f} of {p['limit'] / 1e6:.2f} MB"
        return (
            f"model         {self.model}\n{self.report}\n"
            f"requests      {ended}; {r['plain']} with prompts that are not kept\n"
            f"tokens        {t['read']} read, {t['reused']} reused, {t['generated']} generated\n"
            f"prompts       {held}, hits {p['hits']}, misses {p['misses']}, dropped {p['dropped']}\n"
        )


class Metrics:
    """The numbers of a `Status` for Prometheus."""

    def __init__(self, status: Callable[[], Status | None]):
        self.status = status

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client asks of a collector."""
        if (now := self.status()) is None:
            return
        yield self._counter("requests", "Requests by how they ended.", "outcome", now.requests, OUTCOMES)
        yield self._counter("calls", "Requests whose prompt is kept, or not.", "way", now.requests, WAYS)
        yield self._counter("tokens", "Tokens that were read, reused and generated.", "kind", now.tokens, now.tokens)
        found = now.prompts
        yield self._counter(
            "prompts",
            "Prompts that had a stored beginning (hits) or none (misses).",
            "found",
            found,
            ("hits", "misses"),
        )
        yield CounterMetricFamily(f"{PREFIX}_prompts_dropped", "Stored prompts dropped.", value=found["dropped"])
        yield GaugeMetricFamily(f"{PREFIX}_prompts_stored", "Prompts that are stored.", value=found["stored"])
        yield GaugeMetricFamily(f"{PREFIX}_prompt_bytes", "Bytes of the stored prompts.", value=found["bytes"])
        yield GaugeMetricFamily(f"{PREFIX}_prompt_bytes_limit", "The most they may take.", value=found["limit"])
        yield GaugeMetricFamily(f"{PREFIX}_kv_heads", "KV heads of the model.", value=now.report.kv_heads)
        yield GaugeMetricFamily(
            f"{PREFIX}_retrieval_heads", "Those that keep every token.", value=now.report.retrieval_heads
        )

    @staticmethod
    def _counter(name: str, said: str, label: str, numbers: dict[str, int], of: Any) -> Metric:
        family = CounterMetricFamily(f"{PREFIX}_{name}", said, labels=[label])
        for one in of:
            family.add_metric([one], numbers[one])
        return family


def show_status(app: FastAPI, status: Callable[[], Status | None]) -> None:
    """Add both pages to a server.

    Args:
        status: None where no model is loaded.
    """
    registry = CollectorRegistry()
    registry.register(Metrics(status))
    ProcessCollector(registry=registry)

    @app.get("/longctx")
    def longctx(request: Request, format: str | None = None) -> Response:
        now = status()
        accepts = request.headers.get("accept", "").startswith("text/plain")
        if format == "text" or (format is None and accepts):
            return PlainTextResponse("no model is loaded\n" if now is None else str(now))
        return JSONResponse(None if now is None else asdict(now))

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
