"""Would the limits hold on texts that they were not chosen on? Chosen on some published texts, tried on the others.

    python benchmarks/alert_limits.py [--out benchmarks/results/alert_limits.json]

The multiples in moe_monitor/baseline.py were chosen with all four texts in view. Here they are chosen again, by the
rule that gave the shipped ones (the largest change between the chosen texts, and the same margin over it), on two or
three of the texts, for every such choice. Of the
coefficient of variation nothing is chosen: its limit is half way to the worst; beside it stands, for comparison, four
times the normal.

Tried on what was held out: every change of text that has a held-out text in it must stay below, every fault planted in
a held-out text must be above. Windows of 20,000 tokens in requests of alike ones are drawn for both; what is drawn for
a choice is not what it is tried on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import published

from moe_monitor import statistics

WINDOWS, TOKENS = 10, 20_000
WORST = published.EXPERTS / published.TOP_K
WORST_CV = math.sqrt(WORST - 1)
RANKS = [slice(r * 8, r * 8 + 8) for r in range(8)]


def window(rng, p):
    return published.draw(rng, p, TOKENS)


def by_rank(counts):
    return np.stack([counts[..., experts].sum(axis=-1) for experts in RANKS], axis=-1)


@dataclass(frozen=True)
class Kind:
    """A limit of the form min(multiple * normal, normal + part * (worst - normal)).

    ``margin``: shipped multiple over the largest published change, infinite where there is no multiple. ``rest``: how
    much of what is left to the worst the shipped part leaves, 0 where ``part`` is given and not chosen. ``broken``: the
    fault that it is there for.
    """

    name: str
    worst: float
    margin: float
    rest: float
    part: float
    measure: object
    broken: object


def few(p):
    """Every token to the same eight experts, one on each of eight ranks."""
    made = np.full_like(p, 1e-6)
    made[:, ::8] = 1
    return made


def one_rank(p):
    """Every token to the eight experts of the first rank."""
    return np.where(np.arange(p.shape[1]) < 8, 1.0, 1e-6) * np.ones_like(p)


KINDS = (
    Kind("imbalance", WORST, 3.5 / 2.6, (1 - 0.9) / (1 - 0.85), 0.0, statistics.imbalance, published.collapsed),
    Kind("cv", WORST_CV, math.inf, 0.0, 0.5, statistics.cv, few),
    Kind("cv, four times", WORST_CV, 4 / 3.4, 0.0, 0.5, statistics.cv, few),
    Kind("ranks", 8.0, 2.6 / 1.97, 0.0, 0.5, lambda counts: statistics.imbalance(by_rank(counts)), one_rank),
)


def values(kind, rng, texts, change=lambda p: p):
    """text -> [windows, layers]"""
    return {
        t: np.stack([kind.measure(window(rng, change(published.probabilities(t)))) for _ in range(WINDOWS)])
        for t in texts
    }


def normal(kind, found):
    """As a baseline holds it: the largest of its windows, [layers]."""
    return found.max(axis=0)


def choose(kind, found):
    """(multiple, part) by the rule above, from text -> [windows, layers]."""
    changes = [(normal(kind, found[a]), found[b].max(axis=0)) for a, b in itertools.permutations(found, 2)]
    multiple = kind.margin * max(float((after / before).max()) for before, after in changes)
    reached = max(float(((after - before) / (kind.worst - before)).max()) for before, after in changes)
    return multiple, 1 - kind.rest * (1 - reached) if kind.rest else kind.part


def limit(kind, before, chosen):
    multiple, part = chosen
    return np.minimum(multiple * before, before + part * (kind.worst - before))


def tried(kind, chosen, held, seed):
    """How it does on changes of text with a held-out one in it, and on broken routers of held-out ones."""
    rng = np.random.default_rng(seed)
    then, now = values(kind, rng, published.TEXTS), values(kind, rng, published.TEXTS)
    broken = values(kind, rng, held, kind.broken)
    pairs = [p for p in itertools.permutations(published.TEXTS, 2) if set(p) & set(held)]
    pairs += [(t, t) for t in held]
    over = [float((now[b].max(axis=0) / limit(kind, normal(kind, then[a]), chosen)).max()) for a, b in pairs]
    caught = [float((broken[t].min(axis=0) / limit(kind, normal(kind, then[t]), chosen)).min()) for t in held]
    return over, caught


def run(seed=0):
    rows = []
    for n in (3, 2):
        for chosen_on in itertools.combinations(published.TEXTS, n):
            held = [t for t in published.TEXTS if t not in chosen_on]
            row = {"chosen_on": chosen_on, "held_out": held}
            for kind in KINDS:
                chosen = choose(kind, values(kind, np.random.default_rng(seed), chosen_on))
                over, caught = tried(kind, chosen, held, seed + 1)
                row[kind.name] = {
                    "multiple": round(chosen[0], 2) if math.isfinite(chosen[0]) else None,
                    "part": round(chosen[1], 2),
                    "changes": len(over),
                    "false_alarms": sum(x > 1 for x in over),
                    "highest_of_limit": round(max(over), 3),
                    "broken_missed": sum(x <= 1 for x in caught),
                }
            rows.append(row)
    return rows


SHIPPED = {"imbalance": (3.5, 0.9), "cv": (math.inf, 0.5), "ranks": (2.6, 0.5)}


def shipped():
    """The shipped limits on all texts, with windows drawn anew: [highest healthy, lowest broken], of the limit."""
    made = {}
    for kind in KINDS:
        if kind.name in SHIPPED:
            over, caught = tried(kind, SHIPPED[kind.name], list(published.TEXTS), 7)
            made[kind.name] = [round(max(over), 3), round(min(caught), 3)]
    return made


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "alert_limits.json")
    arguments = parser.parse_args()
    rows = run()
    result = {
        "command": "python benchmarks/alert_limits.py",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "windows": WINDOWS,
        "tokens_a_window": TOKENS,
        "shipped": {"imbalance": [3.5, 0.9], "cv": [None, 0.5], "ranks": [2.6, 0.5]},
        "shipped_on_all": shipped(),
        "choices": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(" ".join(row["chosen_on"]), "->", " ".join(row["held_out"]))
        for kind in KINDS:
            print(f"  {kind.name:10}", row[kind.name])


if __name__ == "__main__":
    main()
