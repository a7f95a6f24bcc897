"""Throughput of the compiler reward: 64 different quick programs of 5 tests, one JSON line.

    python tests/benchmark_programs.py

`floor_s` is what the programs themselves take, each started in its sandbox one after another, divided by the cores.
"""
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate

programs = [f"# {i}\nprint(sum(map(int, input().split())))" for i in range(64)]
tests = json.dumps({"inputs": [f"{i} 1\n" for i in range(5)], "outputs": [f"{i + 1}\n" for i in range(5)]})
evaluate.sandbox()
began = time.perf_counter()
for program in programs[:16]:
    for i in range(5):
        evaluate.run_program(program, f"{i} 1\n")
alone = (time.perf_counter() - began) * 4
began = time.perf_counter()
scores = evaluate.compiler_reward([""] * 64, programs, [{"input_output": tests}] * 64)
wall = time.perf_counter() - began
assert scores == [1.0] * 64
began = time.perf_counter()
evaluate.compiler_reward([""] * 64, programs[:1] * 64, [{"input_output": tests}] * 64)
print(json.dumps({"programs": 64, "tests": 5, "cores": os.cpu_count(), "wall_s": round(wall, 2), "floor_s": round(alone / os.cpu_count(), 2),
                  "ratio": round(wall * os.cpu_count() / alone, 2), "same_program_64_times_s": round(time.perf_counter() - began, 2)}))
