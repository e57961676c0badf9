"""GET /metrics in Prometheus' format."""

import prometheus_client

PATHS = (
    "/",
    "/predict",
    "/info",
    "/metrics",
    "/openapi.json",
    "/docs",
    "/health/live",
    "/health/ready",
)


class Metrics:
    """What GET /metrics shows, beside the process itself."""

    def __init__(self, queued):
        prometheus_client.disable_created_metrics()  # a second series for each, of little use
        self.registry = prometheus_client.CollectorRegistry()
        for collector in (prometheus_client.ProcessCollector, prometheus_client.PlatformCollector):
            collector(registry=self.registry)

        def new(kind, name, what, labels=(), **settings):
            return kind(f"seqcls_{name}", what, labels, registry=self.registry, **settings)

        counter, histogram = prometheus_client.Counter, prometheus_client.Histogram
        self.requests = new(counter, "requests", "answers by path and status", ["path", "status"])
        self.seconds = new(
            histogram,
            "request_seconds",
            "of /predict, from the head of a request to its answer",
            buckets=[0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30],
        )
        self.texts = new(counter, "texts", "texts that were labelled")
        self.cut = new(counter, "texts_cut", "texts longer than the model takes")
        sizes = [1, 2, 4, 8, 16, 32, 64, 128]
        self.batch = new(histogram, "batch_texts", "texts of a forward pass", buckets=sizes)
        self.reloads = new(counter, "reloads", "bundles that were loaded again", ["result"])
        gauge = prometheus_client.Gauge
        new(gauge, "queue_texts", "texts that wait").set_function(queued)

    def answered(self, record):
        """Called with every access line."""
        path = record["path"] if record["path"] in PATHS else "other"
        self.requests.labels(path, record["status"]).inc()
        if path == "/predict" and record["status"] == 200:
            self.seconds.observe(record["ms"] / 1000)
            self.texts.inc(record["texts"])
            self.cut.inc(record["cut"])

    def text(self):
        return prometheus_client.generate_latest(self.registry)
