"""The statistics of tests/experiments.py on data whose answers are known, and the README's table against the raw figures."""
import gzip
import json
from pathlib import Path

import numpy as np

import experiments

ROOT = Path(__file__).resolve().parent.parent


def run(setting, seed, speed, gold_per_score, updates=100):
    """A run whose score rises by `speed` / 100 an update up to 2, with noise of its seed."""
    noise = np.random.default_rng([seed, int(speed * 10)]).normal(0, 0.01, updates)
    score = np.minimum(speed * np.arange(1, updates + 1) / 100, 2)
    columns = {name: np.full(updates, 3.0).tolist() for name in experiments.COLUMNS}
    columns |= {"objective/scores": (score + noise).tolist(), "objective/gold": (gold_per_score * score).tolist(), "seconds": [0.5] * updates}
    return {"kind": "run", "setting": setting, "group": "short", "seed": seed, "result": {"by_update": columns}}


def test_comparison_finds_what_was_put_in():
    rows = [run("PPO", seed, 1, 0.5) for seed in range(10)] + [run("n = 5", seed, 2, 0.25) for seed in range(10)]
    result = experiments.compared(rows)["short", "n = 5"]
    # a mean of ten updates lags by 4.5: PPO's gain from 0.055 to 0.955 is at 90% at 0.865, update 91; at twice the speed at 48
    for figure, expected, near in (("middle", 0.355, 0.02), ("end", 0.955, 0.02), ("speed", 91 / 48, 0.06), ("speed_seconds", 91 / 48, 0.06),
                                   ("to_the_end", 100 / 52.25, 0.06), ("gold_at_score", -0.25 * 0.865, 0.02), ("gold_fall", 0, 1e-6),
                                   ("kl", 3, 1e-9)):
        estimate, low, high = result[figure]
        assert abs(estimate - expected) < near and low - 1e-9 <= estimate <= high + 1e-9, (figure, result[figure])
    assert experiments.compared(rows)["short", "PPO"]["speed"][0] == 1
    slow = experiments.compared([row for row in rows if row["setting"] == "PPO"] + [run("n = 5", seed, 0.3, 1) for seed in range(10)])
    assert experiments.show(slow["short", "n = 5"]["speed"]) == "never (never to never)"


def test_signal_and_alignment_of_known_gradients():
    draw = np.random.default_rng(0)
    mean, sigma, size, width = draw.normal(size=400), 0.5, 200, 400
    g = mean + sigma * draw.normal(size=(size, width))
    figures = experiments.signal_and_alignment(g, g)
    signal = (mean @ mean) / (width * sigma**2)
    assert abs(figures["signal"][0] / signal - 1) < 0.05 and figures["signal"][1] < signal < figures["signal"][2]
    assert abs(figures["alignment"][0] - (1 + 1 / signal)**-0.5) < 0.01
    pure = experiments.signal_and_alignment(draw.normal(size=(20, 5000)), draw.normal(size=(20, 5000)))
    assert abs(pure["signal"][0]) < 0.01 and abs(pure["alignment"][0]) < 0.05  # a gradient's own rollout is not in the mean that it is compared with


def test_the_readme_shows_what_the_raw_figures_say():
    rows = [json.loads(line) for line in gzip.decompress((ROOT / "docs/experiments.jsonl.gz").read_bytes()).decode().splitlines()]
    runs = [row for row in rows if row["kind"] == "run"]
    assert all(len({row["seed"] for row in runs if (row["group"], row["setting"]) == (group, setting)}) >= 10
               for group, (*_, settings) in experiments.GROUPS.items() for setting in settings)
    assert not {row["seed"] for row in rows if row["kind"] == "tuning"} & {row["seed"] for row in runs}
    assert experiments.table(rows) in (ROOT / "README.md").read_text()
