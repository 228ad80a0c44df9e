"""Figures for Prometheus: what was asked, how it ended, how long it took. Nothing of what was said is in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from openelm.serve.scheduler import Scheduler

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """One server's figures; the scheduler's own are read when they are asked for."""

    def __init__(self, scheduler: Scheduler) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram

        registry = CollectorRegistry()
        self._registry = registry
        self.requests = Counter("openelm_requests", "Requests answered", ("path", "status"), registry=registry)
        self.first_token_s = Histogram(
            "openelm_first_token_seconds", "From request to first token", buckets=SECONDS, registry=registry
        )
        self.token_s = Histogram(
            "openelm_token_seconds", "Between two tokens of a text", buckets=SECONDS, registry=registry
        )
        registry.register(_OfScheduler(scheduler))

    def page(self) -> tuple[bytes, str]:
        """All figures, and the media type that they are written in."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class _OfScheduler:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        totals = self._scheduler.totals
        yield GaugeMetricFamily("openelm_running", "Texts that have a slot", self._scheduler.running)
        yield GaugeMetricFamily("openelm_waiting", "Texts that wait for one", self._scheduler.waiting)
        for name, what, value in (
            ("prompt_tokens", "Tokens of prompts", totals.prompt_tokens),
            ("reused_tokens", "Of these, tokens that were there from other texts", totals.reused_tokens),
            ("completion_tokens", "Tokens written", totals.completion_tokens),
            ("steps", "Tokens written, those of several texts at once counted once", totals.steps),
            ("cancelled_texts", "Texts that were let go", totals.cancelled),
            ("failed_texts", "Texts that could not be computed", totals.failed),
        ):
            yield CounterMetricFamily(f"openelm_{name}", what, value)
