"""evaluate.py: statistics against closed forms, brute force and coverage; every command on real small models, and the judge
against a real server on loopback that misbehaves in every way that it must survive."""
import http.server
import itertools
import json
import math
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import evaluate
import sft
from conftest import DATA, ROOT, run


def call(*argv):
    evaluate.main([str(word) for word in argv])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def samples(tmp_path, name, scores, tokens=None, **more):
    tokens = tokens or [10] * len(scores)
    return write(tmp_path / name, [{"task": "hh", "prompt": f"p{i}", "response": f"{name} {i}", "score": s, "tokens": t, "sample": 0,
                                    "temperature": 0.8, "ended": True, **more} for i, (s, t) in enumerate(zip(scores, tokens))])


# ---- statistics ----
def covers(truth, draw, statistic=lambda x: x.mean(1), times=300, resamples=2000):
    """Share of simulated data sets whose 95% interval holds the truth."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(times):
        low, high = evaluate.interval(draw(rng), statistic, resamples)
        hits += low <= truth <= high
    return hits / times


def test_coverage_of_a_mean():
    assert 0.92 <= covers(0.0, lambda rng: rng.normal(size=200)) <= 0.98


def test_coverage_of_a_win_rate():
    assert 0.92 <= covers(0.6, lambda rng: rng.choice([1, 0.5, 0], p=[0.5, 0.2, 0.3], size=200)) <= 0.98


@pytest.mark.slow
def test_coverage_of_the_length_controlled_win_rate():
    def draw(rng):
        length = rng.normal(1.0, 1.0, size=200)  # the winner's answers are longer, too
        wins = rng.random(200) < 1 / (1 + np.exp(-(0.5 + 1.0 * length)))
        return np.stack([wins, length], 1)
    statistic = lambda x: evaluate.length_controlled(x[..., 0], x[..., 1])
    assert 0.92 <= covers(1 / (1 + math.exp(-0.5)), draw, statistic, resamples=200) <= 0.98


def test_coverage_of_kappa():
    def draw(rng):
        truth = rng.integers(0, 3, 400)
        return np.stack([np.where(rng.random(400) < 0.8, truth, rng.integers(0, 3, 400)) for _ in range(2)], 1)
    # the same with chance 0.64, else like chance: kappa is 0.64
    assert 0.92 <= covers(0.64, draw, lambda x: evaluate.kappa(x[..., 0], x[..., 1]), resamples=600) <= 0.98


def test_the_sign_test_by_counting():
    for wins, losses in itertools.product(range(6), range(6)):
        n = wins + losses
        outcomes = [sum(o) for o in itertools.product((0, 1), repeat=n)]
        extreme = sum(abs(o - n / 2) >= abs(wins - n / 2) for o in outcomes) / len(outcomes)
        assert evaluate.sign_test(wins, losses) == pytest.approx(extreme)


def test_length_control():
    rng = np.random.default_rng(0)
    length = rng.normal(size=4000) * 30 + 40
    by_length = (length + rng.normal(size=4000) * 5 > 40).astype(float)  # who is longer than 40 more wins, nothing else counts
    assert by_length.mean() == pytest.approx(0.5, abs=0.05) and evaluate.length_controlled(by_length, length) < 0.05
    fair = (rng.random(4000) < 0.7).astype(float)
    assert evaluate.length_controlled(fair, length) == pytest.approx(0.7, abs=0.04)
    assert evaluate.length_controlled(fair, np.zeros(4000)) == pytest.approx(fair.mean(), abs=1e-3)
    assert 0.9 < evaluate.length_controlled(np.ones(50), np.arange(50.0)) < 1  # separated: finite
    batch = evaluate.length_controlled(np.stack([fair, by_length]), np.stack([length, length]))
    assert batch.shape == (2,) and batch[0] == pytest.approx(evaluate.length_controlled(fair, length))


def test_best_of_is_the_mean_over_all_choices():
    scores = np.random.default_rng(0).normal(size=(5, 6))
    for n in range(1, 7):
        brute = [np.mean([max(choice) for choice in itertools.combinations(row, n)]) for row in scores]
        assert evaluate.best_of(scores, n) == pytest.approx(brute)


def test_kappa():
    a, b = np.array([0] * 45 + [0] * 15 + [1] * 25 + [1] * 15), np.array([0] * 45 + [1] * 15 + [0] * 25 + [1] * 15)
    assert evaluate.kappa(a, b) == pytest.approx((0.6 - 0.54) / 0.46)  # agreement 0.6; by chance 0.6 * 0.7 + 0.4 * 0.3
    assert evaluate.kappa(a, a) == 1 and evaluate.kappa(np.zeros(3), np.zeros(3)) == 1


# ---- generate and score ----
GENERATE = ["--num", 7, "--n", 2, "--temperature", 0, 0.9, "--max_response_length", 9, "--batch_size", 4]


@pytest.fixture(scope="module")
def generated(tiny_models, tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluate") / "samples.jsonl"
    call("generate", "--policy", tiny_models["llama"][0], "--output", path, *GENERATE)
    return path


def test_generate(generated, tiny_models):
    rows = [json.loads(line) for line in generated.read_text().splitlines()]
    assert len(rows) == 7 * 2 * 2 == len({(row["prompt"], row["sample"], row["temperature"]) for row in rows})
    assert {row["prompt"] for row in rows} <= {row["prompt"] for row in sft.toy_rows("eval")}
    assert all(row["tokens"] <= 9 and row["chosen"] and row["rejected"] for row in rows)
    greedy = [row for row in rows if row["temperature"] == 0]
    assert all(len({row["response"] for row in greedy if row["prompt"] == prompt}) == 1 for prompt in {row["prompt"] for row in rows})
    # greedy is what transformers' own generate finds
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_models["llama"][0])
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_models["llama"][0])
    for row in greedy[:4]:
        ids = torch.tensor([sft.encode(tokenizer, row["prompt"])[0]])
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=9,
                                suppress_tokens=[tokenizer.pad_token_id])
        assert tokenizer.decode(output[0, ids.shape[1]:], skip_special_tokens=True) == row["response"]


def test_an_interrupted_run_goes_on(generated, tiny_models, tmp_path, capsys):
    """Cut off anywhere, in the middle of a line too, the file ends up with the same answers."""
    whole = generated.read_text()
    part = tmp_path / "part.jsonl"
    for size in (0, len(whole) // 3, len(whole) - 5):
        part.write_text(whole[:size])
        call("generate", "--policy", tiny_models["llama"][0], "--output", part, *GENERATE)
        assert sorted(part.read_text().splitlines()) == sorted(whole.splitlines())
    assert "half-written" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="has answers of other options"):
        call("generate", "--policy", tiny_models["llama"][0], "--output", part, "--num", 2)


@pytest.mark.slow
def test_generate_on_two_processes(generated, tiny_models, tmp_path):
    done = run(["evaluate.py", "generate", "--policy", tiny_models["llama"][0], "--output", "out.jsonl", *GENERATE], tmp_path, 2)
    assert done.returncode == 0, done.stderr
    assert sorted((tmp_path / "out.jsonl").read_text().splitlines()) == sorted(generated.read_text().splitlines())


def test_score(generated, tiny_models, tmp_path, capsys):
    out = tmp_path / "scored.jsonl"
    call("score", generated, "--reward", tiny_models["llama"][1], "--output", out, "--batch_size", 5)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_models["llama"][1])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_models["llama"][1])
    for row in rows[:5]:
        for name, text, ended in (("score", row["response"], row["ended"]), ("chosen_score", row["chosen"], True)):
            prompt, answer = sft.encode(tokenizer, row["prompt"], text)
            ids = torch.tensor([prompt + (answer if ended else answer[:-1])])
            assert model(input_ids=ids).logits.item() == pytest.approx(row[name], abs=1e-5)
        assert row["gold"] == sft.toy_gold(row["prompt"], row["response"])
    shown = capsys.readouterr().out
    assert "temperature 0.9: 14 answers" in shown and "accuracy of the reward model" in shown and "#" in shown
    (tmp_path / "rules.py").write_text("def length(prompts, responses, rows):\n    return [len(r) for r in responses]\n")
    call("score", generated, "--reward", f"{tmp_path}/rules.py:length", "--output", tmp_path / "rule.jsonl")
    assert json.loads((tmp_path / "rule.jsonl").read_text().splitlines()[0])["score"] == len(rows[0]["response"])


def test_compare(tmp_path, capsys):
    a, b = samples(tmp_path, "a", [3, 2, 1, 5, 5], [12] * 5), samples(tmp_path, "b", [1, 2, 3, 4, 4])
    call("compare", a, b, "--output", tmp_path / "c.jsonl")
    shown = capsys.readouterr().out
    assert "3 wins, 1 ties, 1 losses (sign test p = 0.625)" in shown and "win rate 0.700" in shown and "+2.0 tokens" in shown
    assert [json.loads(line)["choice"] for line in (tmp_path / "c.jsonl").read_text().splitlines()] == ["A", "tie", "B", "A", "A"]


def test_files_that_do_not_match(tmp_path):
    a, b = samples(tmp_path, "a", [1, 2]), samples(tmp_path, "b", [1, 2, 3])
    bare = write(tmp_path / "bare", [{"prompt": "p0", "response": "x"}, {"prompt": "p1", "response": "x"}])
    torn = tmp_path / "torn"
    torn.write_text(a.read_text() + '{"prompt": "p')
    double = write(tmp_path / "double", [json.loads(line) for line in a.read_text().splitlines()] * 2)
    for argv, message in ((["compare", a, b], "do not answer the same prompts: 0 of 2 .* 1 of 3"),
                          (["compare", a, bare], "line 1 of .*bare has no score, tokens; run evaluate.py score"),
                          (["compare", a, torn], "line 3 of .*torn is no JSON object .half-written"),
                          (["compare", a, double], "has several answers to 'p0'"),
                          (["compare", a, tmp_path / "none"], "cannot read .*none: No such file"),
                          (["agreement", write(tmp_path / "one", [{"prompt": "p", "pair": "x", "rater": "r", "choice": "A"}])], "needs two raters"),
                          (["score", a, "--reward", "none.py:f"], "there is no file none.py")):
        with pytest.raises(SystemExit, match=message):
            call(*argv)


# ---- judge ----
class Judge(http.server.BaseHTTPRequestHandler):
    """Prefers the answer with the higher number in it; misbehaves as `plan`, a list for each request's text, says."""
    plan, asked, keys, now, most, lock = {}, [], set(), 0, 0, threading.Lock()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        with Judge.lock:
            Judge.asked.append(text)
            Judge.keys.add(self.headers["Authorization"])
            Judge.now += 1
            Judge.most = max(Judge.most, Judge.now)
            act = next((acts.pop(0) for key, acts in Judge.plan.items() if key in text and acts), "answer")
        try:
            self.act(act, text)
        except OSError:
            pass  # the client gave up
        with Judge.lock:
            Judge.now -= 1

    def act(self, act, text):
        time.sleep(0.02)
        if act == "drop":
            return self.connection.close()
        if act == "slow":
            time.sleep(1.5)
        if act == "redirect":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            return self.end_headers()
        status = act if isinstance(act, int) else 200
        numbers = [float(text.split(f"[candidate {x}]\n")[1].split("\n")[0].split()[-1]) for x in "AB"]
        choice = "A" if act == "first" or numbers[0] > numbers[1] else "B" if numbers[1] > numbers[0] else "equal"
        content = "no idea" if act == "malformed" else f"Reasons.\nChoice: {choice}"
        data = b"{broken" if act == "broken" else json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        if status == 401:
            data = b"invalid key sk-secret-123"
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "1")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    Judge.plan, Judge.asked, Judge.keys, Judge.most = {}, [], set(), 0
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123")
    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listener.server_port}/v1"
    listener.shutdown()
    listener.server_close()


def judged(tmp_path, scores_a, scores_b):
    make = lambda name, scores: write(tmp_path / name, [{"task": "tldr", "prompt": f"p{i}.", "response": f"{name} {s}", "tokens": 5}
                                                        for i, s in enumerate(scores)])
    return make("a", scores_a), make("b", scores_b)


def test_judge(server, tmp_path, capsys):
    """Every misbehaviour is survived; both orders; what turns with the order is a tie; no secret anywhere."""
    a, b = judged(tmp_path, [3, 1, 2, 9, 9, 9, 9, 9, 9], [1, 3, 2, 1, 1, 1, 1, 1, 1])
    Judge.plan = {"p3.": [429, 500], "p4.": ["drop", "broken"], "p5.": ["slow"], "p6.": ["malformed"], "p7.": ["first", "first"],
                  "p8.": ["malformed"] * 6}
    argv = ["judge", a, b, "--base_url", server, "--judge_model", "m", "--output", tmp_path / "j.jsonl", "--timeout", 1, "--backoff", 0.05,
            "--concurrency", 3]
    call(*argv)
    shown = capsys.readouterr()
    assert "1 of 9 pairs have no verdict (failed or malformed), 1 are ties because the verdict turned with the order" in shown.out
    assert "5 wins, 2 ties, 1 losses" in shown.out
    assert Judge.keys == {"Bearer sk-secret-123"} and 1 < Judge.most <= 4  # 3, and one that the client has given up
    assert "secret" not in shown.out + shown.err + (tmp_path / "j.jsonl").read_text()
    assert "relevance" in Judge.asked[0] and "[candidate A]" in Judge.asked[0]
    count = len(Judge.asked)
    call(*argv)  # nothing is asked, or paid, twice
    assert len(Judge.asked) == count and "5 wins" in capsys.readouterr().out
    lines = (tmp_path / "j.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "j.jsonl").write_text("".join(lines[:-3]) + lines[-3][:20])  # killed while it wrote
    call(*argv)
    assert len(Judge.asked) == count + 3 and "1 of 9 pairs have no verdict" in capsys.readouterr().out
    b.write_text(b.read_text().replace("b 1", "c 1"))  # other answers: other verdicts, which have to be asked for
    call(*argv)
    assert len(Judge.asked) > count + 3


def test_a_judge_that_is_down_or_refuses(server, tmp_path, capsys):
    a, b = judged(tmp_path, [3], [1])
    argv = ["judge", a, b, "--judge_model", "m", "--output", tmp_path / "j.jsonl", "--timeout", 1, "--backoff", 0.01, "--tries", 3, "--base_url"]
    call(*argv, "http://127.0.0.1:9/v1")
    assert "1 of 1 pairs have no verdict" in capsys.readouterr().out and not (tmp_path / "j.jsonl").exists()
    for act in (401, "redirect"):
        Judge.plan = {"p0.": [act] * 9}
        with pytest.raises(SystemExit) as end:
            call(*argv, server)
        assert str(401 if act == 401 else 302) in str(end.value) and "secret" not in str(end.value)
    Judge.plan = {}
    call(*argv, server)
    assert "1 wins" in capsys.readouterr().out


def test_strata():
    pairs = [({"prompt": i, "stratum": "ab"[i < 20]}, {}) for i in range(100)]
    drawn = evaluate.stratified(pairs, 50, seed=0)
    assert len(drawn) == 50 == len({pair[0]["prompt"] for pair in drawn}) and sum(pair[0]["stratum"] == "b" for pair in drawn) == 10
    assert drawn == evaluate.stratified(pairs, 50, seed=0) != evaluate.stratified(pairs, 50, seed=1)


# ---- human, agreement, the rest ----
def test_human(tmp_path):
    """Blind, in random order, stopped and continued; who always presses 1 is judged by what was shown first."""
    a, b = samples(tmp_path, "a", range(12)), samples(tmp_path, "b", range(12))
    command = [sys.executable, str(ROOT / "evaluate.py"), "human", str(a), str(b), "--annotator", "kim", "--output", "h.jsonl"]
    first = subprocess.run(command, input="1\n1\nx\n2\nq\n", cwd=tmp_path, capture_output=True, text=True)
    assert "press 1, 2, 0 or q" in first.stdout and "3 of 12 are judged" in first.stdout
    second = subprocess.run(command, input="1\n" * 8 + "0\n", cwd=tmp_path, capture_output=True, text=True)
    rows = [json.loads(line) for line in (tmp_path / "h.jsonl").read_text().splitlines()]
    assert second.returncode == 0 and len(rows) == 12 and rows[-1]["choice"] == "tie" and "12 pairs" in second.stdout
    shown = (first.stdout + second.stdout).split("[answer 1]\n")[1:]
    picks = [block.split("\n")[0][0] for block in shown]
    expected = [picks[0], picks[1], "ab"[picks[2] == "a"], *picks[3 if len(picks) == 12 else 4:][:8]]
    assert [row["choice"].lower() for row in rows[:11]] == expected and {"a", "b"} == set(picks)


def test_agreement(tmp_path, capsys):
    rows = lambda rater, choices, **more: [{"prompt": i, "pair": "x", "rater": rater, "choice": c, **more} for i, c in enumerate(choices)]
    write(tmp_path / "x", rows("model", "AABB"))
    write(tmp_path / "y", rows("judge", "AAAB", order=0) + rows("judge", "AABB", order=1))  # the third turned: a tie
    call("agreement", tmp_path / "x", tmp_path / "y")
    assert "| model / judge | 4 | 0.75 (" in capsys.readouterr().out


def test_best_of_n(tmp_path, capsys):
    rows = [{"prompt": p, "score": s, "temperature": 1.0} for p, scores in (("p", [1, 2, 3, 4]), ("q", [0, 0, 0, 8])) for s in scores]
    call("best-of-n", write(tmp_path / "s", rows), "--output", tmp_path / "curve.json")
    curve = json.loads((tmp_path / "curve.json").read_text())[str(tmp_path / "s")]
    assert [point["n"] for point in curve] == [1, 2, 4] and [point["score"] for point in curve] == pytest.approx([2.25, (10 / 3 + 4) / 2, 6])


@pytest.mark.skipif(not evaluate.shutil.which("bwrap"), reason="needs Debian's package bubblewrap")
def test_pass_at_k(tmp_path, capsys):
    tests = json.dumps({"inputs": ["1\n"], "outputs": ["1\n"]})
    rows = [{"prompt": p, "response": r, "input_output": tests, "difficulty": d}
            for p, d, answers in (("p", "introductory", ["print(1)", "print(2)"]), ("q", "interview", ["1/0", "print("])) for r in answers]
    path = write(tmp_path / "s", rows)
    call("pass-at-k", path, "--k", 1, 2)
    shown = capsys.readouterr().out.splitlines()
    assert "pass@1 0.000" in shown[0] and shown[0].startswith("interview")
    assert "pass@1 0.500" in shown[1] and "pass@2 1.000" in shown[1] and "2 problems" in shown[2] and "pass@1 0.250" in shown[2]
    assert [json.loads(line)["passed"] for line in path.read_text().splitlines()] == [True, False, False, False]
    with pytest.raises(SystemExit, match="pass@5 needs 5 samples"):
        call("pass-at-k", path)


def test_summary_and_plots(tmp_path, capsys):
    a, b = samples(tmp_path, "a", [1, 2, 3]), samples(tmp_path, "b", [2, 3, 4])
    call("summary", f"PPO={a}", f"MA-PPO={b}")
    shown = capsys.readouterr().out
    assert "| PPO | hh | 3 | 2.00 (" in shown and "| MA-PPO | hh | 3 | 3.00 (" in shown and "+50%" in shown
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit, match="line 1 of .* has no update"):
        call("plot", "curves", f"A={a}")
    for seed in range(2):
        (tmp_path / f"run{seed}").mkdir()
        write(tmp_path / f"run{seed}/metrics.jsonl", [{"update": u, "objective/scores": u + seed} for u in range(1, 5)] + [{"update": 4, "eval/x": 1}])
    for kind, inputs in (("curves", f"A={tmp_path}/run0,{tmp_path}/run1"), ("scores", f"A={a}"), ("temperature", f"A={a}"), ("best-of-n", f"A={a}")):
        call("plot", kind, inputs, "--output", tmp_path / f"{kind}.png")
        assert (tmp_path / f"{kind}.png").read_bytes()[:4] == b"\x89PNG"
    call("plot", "scores", f"A={a}", "--output", tmp_path / "s.svg")
    assert "<svg" in (tmp_path / "s.svg").read_text()


def test_plots_say_what_they_need(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        call("plot", "scores", f"A={samples(tmp_path, 'a', [1])}")


@pytest.mark.parametrize("name", "generate score compare judge human agreement best-of-n pass-at-k plot summary".split())
def test_every_command_has_help_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as end:
        call(name, "--help")
    assert end.value.code == 0 and f"example: python evaluate.py {name} " in capsys.readouterr().out
