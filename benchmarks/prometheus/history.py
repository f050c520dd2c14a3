"""Three hours of a small fleet with planted faults, as a Prometheus data folder: what the previews are drawn from.

    python benchmarks/prometheus/history.py DIR [--hours 3]
    prometheus --storage.tsdb.path DIR/data --config.file DIR/prometheus.yml --web.listen-address 127.0.0.1:9090
    python grafana/preview.py --url http://127.0.0.1:9090 --end $(cat DIR/end) --out DIR

Three servers of OLMoE's shape over four expert-parallel ranks. 70 minutes before the end the traffic of server b
changes from c4 to github; 45 minutes before it layer 11 of server c collapses, and an expert of its layer 7 dies; 50
minutes before it the device of rank 2 of server a becomes 1.9 times slower, 40 minutes before it all of server b 1.7
times.
The rules are those that are shipped, backfilled by promtool.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import yaml
from fleet import OLMOE, ROOT, Server, record_baseline, samples, traffic

from moe_monitor.catalog import BY_NAME

STEP = 60
JOB = "vllm"


def label_text(pairs) -> str:
    return "{" + ",".join(f'{k}="{v}"' for k, v in pairs) + "}"


REQUESTS = (
    "moe_request_entropy_ratio",
    "moe_request_concentration_ratio",
    "moe_request_drift_bits",
    "moe_request_e2e_seconds",
    "moe_request_ttft_seconds",
    "moe_request_tpot_seconds",
)

#: vLLM's.
ITL_BUCKETS = (
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
TTFT_BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    *ITL_BUCKETS[11:],
    160.0,
    640.0,
    2560.0,
)


class Histogram:
    """A histogram of vLLM's."""

    def __init__(self, name: str, bounds: tuple[float, ...]) -> None:
        self.name, self.bounds = name, bounds
        self.counts, self.sum = np.zeros(len(bounds) + 1, dtype=np.int64), 0.0

    def add(self, values: np.ndarray) -> None:
        self.counts += np.bincount(np.searchsorted(self.bounds, values), minlength=len(self.counts))
        self.sum += float(values.sum())

    def samples(self, identity):
        for bound, count in zip([*map(float, self.bounds), "+Inf"], np.cumsum(self.counts), strict=True):
            yield f"{self.name}_bucket", (*identity, ("le", str(bound))), int(count)
        yield f"{self.name}_count", identity, int(self.counts.sum())
        yield f"{self.name}_sum", identity, self.sum


class Requests:
    """Request histograms of a server: lognormal, slower in the upper quartiles of concentration."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.bounds = {name: BY_NAME[name].buckets for name in REQUESTS}
        self.counts: dict[tuple[str, str], np.ndarray] = {}
        self.sums: dict[tuple[str, str], float] = {}
        self.sampled = 0
        self.itl = Histogram("vllm:inter_token_latency_seconds", ITL_BUCKETS)
        self.ttft = Histogram("vllm:time_to_first_token_seconds", TTFT_BUCKETS)

    def step(self, hot: float, decode: float, prefill: float) -> None:
        n = int(self.rng.poisson(30))
        self.sampled += n
        concentration = self.rng.lognormal(np.log(1.6 * hot), 0.3, n)
        quartile = np.digitize(concentration, [1.3, 1.6, 2.0]) + 1
        values = {
            "moe_request_entropy_ratio": self.rng.beta(20, 5, n),
            "moe_request_concentration_ratio": concentration,
            "moe_request_drift_bits": self.rng.lognormal(np.log(0.05 * hot), 0.5, n),
            "moe_request_e2e_seconds": self.rng.lognormal(1.0, 0.5, n) * (1 + 0.08 * quartile),
            "moe_request_ttft_seconds": self.rng.lognormal(-2, 0.4, n),
            "moe_request_tpot_seconds": self.rng.lognormal(-4.6, 0.2, n) * (1 + 0.1 * quartile),
        }
        for name, column in values.items():
            bounds = self.bounds[name]
            for which in ("1", "2", "3", "4") if name.endswith("_seconds") else ("",):
                chosen = column if not which else column[quartile == int(which)]
                binned = np.bincount(np.searchsorted(bounds, chosen), minlength=len(bounds) + 1)
                key = (name, which)
                self.counts[key] = self.counts.get(key, 0) + binned
                self.sums[key] = self.sums.get(key, 0.0) + float(chosen.sum())

        self.itl.add(self.rng.gamma(8, decode * 1.15 / 8, 400))
        self.ttft.add(prefill * self.rng.lognormal(0.9, 0.5, n))

    def samples(self, identity):
        yield from self.itl.samples(identity)
        yield from self.ttft.samples(identity)
        for (name, which), counts in self.counts.items():
            own = (*identity, ("quartile", which)) if which else identity
            bounds = [*map(float, self.bounds[name]), "+Inf"]
            for bound, count in zip(bounds, np.cumsum(counts), strict=True):
                yield f"{name}_bucket", (*own, ("le", str(bound))), int(count)
            yield f"{name}_count", own, int(counts.sum())
            yield f"{name}_sum", own, self.sums[name, which]


def write_history(folder: Path, start: int, steps: int) -> None:
    record_baseline(OLMOE, "c4", folder / "normal.json", start - 9 * 86400)
    servers = [Server(f"{name}:8000", OLMOE, seed) for seed, name in enumerate("abc")]
    requests = [Requests(seed) for seed in range(3)]
    normal, github = traffic(OLMOE, "c4", 6000), traffic(OLMOE, "github", 6000)
    with (folder / "history.om").open("w") as file:
        for step in range(steps):
            at, left = start + step * STEP, (steps - step) * STEP / 60
            for i, server in enumerate(servers):
                now = github if i == 1 and left <= 70 else normal
                if i == 2 and left <= 45:
                    p, entropy, mass = normal.p.copy(), normal.entropy.copy(), normal.mass.copy()
                    p[7, p[7].argsort()[-3]] = 0
                    p[11] = 1e-6
                    p[11, :8] = 1
                    entropy[11], mass[11] = 0.04, 0.99
                    now = type(normal)(p, normal.tokens, entropy, mass)
                wave = 1 + 0.4 * np.sin(at / 3000 + i)
                now = type(normal)(now.p, int(now.tokens * wave), now.entropy, now.mass)
                if i == 0 and left <= 50:
                    server.timed.slow = {2: 1.9}
                if i == 1 and left <= 40:
                    server.timed.slow = dict.fromkeys(range(4), 1.7)
                server.batch = 24 * wave
                server.step(now, STEP)
                if i == 1 and left <= 70:
                    server.status.dropped["request"] = server.status.dropped.get("request", 0) + int(left > 50) * 3
                if i == 0 and left < 100:
                    server.status.errors["collect"] = 1
                server.age = float(server.rng.uniform(0.1, 0.9)) if not (i == 2 and 100 < left < 105) else 40.0
                requests[i].step(1.4 if i == 1 and left <= 70 else 1.0, *server.timed.seconds.values())
                server.status.sampled = requests[i].sampled
                place = (("job", JOB), ("instance", server.instance))
                identity = (("model_name", OLMOE.name), ("engine", "0"))
                for name, labels, value in [*samples(server.metrics()), *requests[i].samples(identity)]:
                    file.write(f"{name}{label_text(place + labels)} {value:.9g} {at}\n")
                for name, value in {"up": 1, "scrape_duration_seconds": float(server.rng.normal(0.012, 0.001))}.items():
                    file.write(f"{name}{label_text(place)} {value:.4g} {at}\n")
        file.write("# EOF\n")


def promtool(*arguments: str) -> None:
    subprocess.run(["promtool", *arguments], check=True, stdout=subprocess.DEVNULL)


class Prometheus:
    def __init__(self, folder: Path, port: int = 19090) -> None:
        self.url = f"http://127.0.0.1:{port}"
        command = ["prometheus", f"--storage.tsdb.path={folder / 'data'}", f"--config.file={folder / 'prometheus.yml'}"]
        command += [f"--web.listen-address=127.0.0.1:{port}", "--storage.tsdb.retention.time=10y", "--log.level=error"]
        self.process = subprocess.Popen(command)

    def __enter__(self):
        for _ in range(200):
            try:
                with urllib.request.urlopen(self.url + "/-/ready", timeout=5):
                    return self
            except OSError:
                time.sleep(0.2)
        raise RuntimeError("Prometheus did not start")

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(60)


def write_alerts(folder: Path, url: str, start: int, end: int) -> None:
    """What Prometheus would have recorded of alerts: since when the expression is true, and what fires."""
    text = (ROOT / "grafana" / "rules" / "moe-monitor-alerts.yml").read_text()
    with (folder / "alerts.om").open("w") as file:
        for rule in yaml.safe_load(text)["groups"][0]["rules"]:
            query = urllib.parse.urlencode({"query": rule["expr"], "start": start, "end": end, "step": STEP})
            with urllib.request.urlopen(f"{url}/api/v1/query_range?{query}", timeout=60) as answer:
                result = json.load(answer)["data"]["result"]
            hold = int(rule["for"].removesuffix("m")) * 60
            for series in result:
                own = {k: v for k, v in series["metric"].items() if k != "__name__"} | rule["labels"]
                own |= {"alertname": rule["alert"]}
                firing = own | {"alertstate": "firing"}
                since = last = None
                for at, _ in series["values"]:
                    since = at if last is None or at - last > STEP else since
                    last = at
                    file.write(f"ALERTS_FOR_STATE{label_text(own.items())} {since} {at}\n")
                    if at - since >= hold:
                        file.write(f"ALERTS{label_text(firing.items())} 1 {at}\n")
        file.write("# EOF\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hours", type=float, default=3.0)
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    data = str(folder / "data")
    steps = int(arguments.hours * 3600 / STEP)
    # An hour ago: Prometheus takes backfilled blocks only where it has none of its own.
    end = int(time.time()) // STEP * STEP - 3600
    start = end - steps * STEP
    (folder / "prometheus.yml").write_text("{}\n")
    write_history(folder, start, steps)
    promtool("tsdb", "create-blocks-from", "openmetrics", str(folder / "history.om"), data)
    rules = str(ROOT / "grafana" / "rules" / "moe-monitor-recording.yml")
    # Rules that build on rules: each pass backfills one level more.
    for _ in range(3):
        with Prometheus(folder) as server:
            span = ["--start", str(start), "--end", str(end), "--eval-interval", f"{STEP}s", "--output-dir", data]
            promtool("tsdb", "create-blocks-from", "rules", "--url", server.url, *span, rules)
    with Prometheus(folder) as server:
        write_alerts(folder, server.url, start, end)
    promtool("tsdb", "create-blocks-from", "openmetrics", str(folder / "alerts.om"), data)
    (folder / "end").write_text(f"{end - STEP}\n")


if __name__ == "__main__":
    main()
