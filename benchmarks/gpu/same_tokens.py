"""The same greedy request again and again, while one pass in ten is timed by twins of the CUDA graphs.

same_tokens.py [--requests 40] [SERVER OPTIONS]     for example: -tp 2 --enable-expert-parallel
One request at a time, so that every decode pass has a batch of one: all answers must be the same. Prints one JSON line,
with how many passes were timed layer by layer, on all ranks.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import models
from servers import Server, end_on_sigterm, total


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--port", type=int, default=8700)
    parser.add_argument("--deadline-s", type=float, default=280)
    args, options = parser.parse_known_args()
    end_on_sigterm()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        folder = models.write(scratch / "olmoe")
        arguments = ["--load-format", "dummy", "--max-model-len", "1024", "--gpu-memory-utilization", "0.2"]
        arguments += ["--kv-cache-memory-bytes", "1000000000", "--no-enable-prefix-caching"]
        arguments += ["--cudagraph-capture-sizes", "1", "2", "4", "8", *options]
        env = {"MOE_MONITOR_LATENCY_EVERY": "10", "MOE_MONITOR_DIR": str(scratch / "run")}
        server = Server(folder, args.port, scratch / "log", arguments, env)
        try:
            server.wait_ready(args.deadline_s)
            body = {"model": "m", "prompt": list(range(5, 45)), "max_tokens": 64, "temperature": 0, "ignore_eos": True}
            body["return_token_ids"] = True
            answers = set()
            for _ in range(args.requests):
                request = urllib.request.Request(
                    server.url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
                )
                with urllib.request.urlopen(request, timeout=60) as answer:
                    answers.add(tuple(json.load(answer)["choices"][0]["token_ids"]))
            time.sleep(2)
            samples = server.metrics()
            layers = {labels["layer"] for n, labels, _ in samples if n == "moe_layer_duration_seconds_count"}
            by_stage = {
                (labels["stage"], labels["kind"]): v
                for n, labels, v in samples
                if n == "moe_layer_duration_seconds_count" and labels["layer"] == "1"
            }
            mean = {
                f"{labels['stage']} us": round(1e6 * v / by_stage[labels["stage"], "decode"], 1)
                for n, labels, v in samples
                if n == "moe_layer_duration_seconds_sum" and labels["layer"] == "1" and labels["kind"] == "decode"
            }
            wait = {labels["ep_rank"]: v for n, labels, v in samples if n == "moe_ep_straggler_wait_ratio"}
            result = {
                "options": options,
                "ready_s": round(server.ready_s or 0, 1),
                "different_answers": len(answers),
                "distinct_tokens": len(set(next(iter(answers)))),
                "passes": total(samples, "moe_forward_passes_total"),
                "layers": len(layers),
                "timed_layer_1": {f"{s} {k}": v for (s, k), v in by_stage.items()},
                "mean_layer_1_decode": mean,
                "straggler_wait": wait or None,
                "errors": total(samples, "moe_monitor_errors_total"),
                "active": total(samples, "moe_monitor_active"),
            }
            print("SAME " + json.dumps(result), flush=True)
            print("\n".join(server.notes()[-4:]), flush=True)
        except Exception as error:
            print("FAILED", repr(error)[-3000:], flush=True)
            raise
        finally:
            server.stop()


if __name__ == "__main__":
    main()
