"""Program synthesis: verdicts, the compiler signal, pass@k, and what hostile programs can do (nothing)."""
import itertools
import json
import math
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

import evaluate
from conftest import DATA, run

pytestmark = pytest.mark.skipif(not evaluate.shutil.which("bwrap"), reason="needs Debian's package bubblewrap")
SUM = "print(sum(map(int, input().split())))"


def results(program, given="3 4\n", expected="7\n", function=None):
    tests = {"inputs": [given], "outputs": [expected]} | ({"fn_name": function} if function else {})
    return evaluate.run_tests([program], [json.dumps(tests)])[0]


def test_solutions_of_the_test_data_pass():
    """Every solution of tests/data/apps.jsonl passes all its tests: standard input, functions, methods of Solution."""
    programs, tests = [], []
    for row in map(json.loads, (DATA / "apps.jsonl").read_text().splitlines()):
        if row["input_output"]:
            for solution in json.loads(row["solutions"] or "[]")[:1]:
                programs.append(solution)
                tests.append(row["input_output"])
    found = evaluate.run_tests(programs, tests)
    assert len(programs) > 40 and {result for group in found for result in group} == {"pass"}
    assert [len(group) for group in found] == [len(json.loads(text)["inputs"]) for text in tests]


def test_the_toy_problems_are_solved_by_their_solutions():
    import toy_apps
    draw = random.Random(1)
    rows = [row for i in range(40) if (row := toy_apps.problem(draw, i))]
    found = evaluate.run_tests([json.loads(row["solutions"])[0] for row in rows], [row["input_output"] for row in rows])
    assert len(rows) > 20 and found == [["pass"] * 3] * len(rows)


def test_the_compiler_signal():
    """-1, -0.6, and -0.3 + 1.3 of the share that passes; the same program twice costs one run."""
    tests = json.dumps({"inputs": ["1 1\n", "2 2\n", "3 3\n", "4 4\n"], "outputs": ["2\n", "4\n", "6\n", "8\n"]})
    programs = [SUM, "def f(:", "1 / 0", "print(4)", "print('x')", "if input() == '3 3': raise ValueError", SUM]
    scores = evaluate.compiler_reward([""] * 7, programs, [{"input_output": tests}] * 7)
    assert scores == pytest.approx([1.0, -1.0, -0.6, -0.3 + 1.3 / 4, -0.3, -0.6, 1.0])
    assert evaluate.compiler_reward([], [], []) == []


@pytest.mark.parametrize("printed, expected, same", [
    ("1 2\n", "1 2", True), ("1\n2", "1 2\n", True), ("  1  ", "1", True), ("1 2", "1 2 3", False), ("Yes", "yes", False),
    ("0.3333333", "0.333333", True), ("0.33", "0.34", False), ("5", "5.0", True), ("1e3", "1000.0", True), ("1000001", "1000000", False),
    ("", "", True), ("", "0", False), ("nan", "nan", True), ("1.5x", "1.5", False), ("-0.0", "0", True), ("1" * 60, "1" * 59 + "2", False),
])
def test_outputs_are_compared_by_words(printed, expected, same):
    assert evaluate.same_output(printed, expected) == same


@pytest.mark.parametrize("program, arguments, expected, result", [
    ("def f(a, b): return a + b", [1, 2], 3, "pass"),
    ("def f(a, b): return a + b", [1, 2], [3], "pass"),  # some rows wrap the value
    ("def f(a, b): return a + b", [1, 2], 4, "fail"),
    ("class Solution:\n    def f(self, a: List[int]) -> int:\n        return sum(a)", [[1, 2]], 3, "pass"),
    ("def f(a): return (a, [a])", [1], [1, [1]], "pass"),  # a tuple as a list
    ("def f(a): return a / 3", [1], 0.333333, "pass"),
    ("def f(a): return {'k': a}", [True], {"k": True}, "pass"),
    ("def f(a): return 10 ** 5000", [0], 10 ** 60, "fail"),
    ("def f(a): print(a); return a", ["ü"], "ü", "pass"),  # what it prints is not what it returns
    ("def g(a): return a", [1], 1, "runtime"),
    ("def f(a): return Counter(a).most_common(1)", [[1, 1, 2]], [[1, 2]], "pass"),  # the names that APPS imports
    ("def f(a): return object()", [1], 1, "fail"),
    ("def f(a): return 10 ** 400", [1], 2.5, "fail"),  # more than a float can hold
])
def test_functions(program, arguments, expected, result):
    assert results(program, arguments, expected, "f") == [result]


def test_input_as_lines_and_bytes_that_are_no_text():
    assert results("print(int(input()) + int(input()))", ["3", "4"], ["7"]) == ["pass"]
    assert results("import sys; sys.stdout.buffer.write(b'\\xff\\xfe')") == ["fail"]
    assert results("import sys; print(len(sys.stdin.read()))", "x" * (8 << 20), str(8 << 20)) == ["pass"]


FORK = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
HOSTILE = {  # what it tries: (program, its result)
    "fork bomb": (FORK, "runtime"),
    "fork bomb, patient": ("import os, time\nfor _ in range(100):\n    if os.fork() == 0:\n        time.sleep(60)", "runtime"),
    "memory bomb": ("a = []\nwhile True:\n    a.append(bytearray(1 << 24))", "runtime"),
    "memory bomb in /tmp": ("for i in range(99):\n    open(f'/tmp/{i}', 'wb').write(bytes(4 << 20))", "runtime"),
    "infinite loop": ("while True: pass", "runtime"),
    "sleep": ("import time\ntime.sleep(1000)", "runtime"),
    "ignores signals": ("import signal, time\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except Exception: pass\n"
                        "while True: time.sleep(1)", "runtime"),
    "output flood": ("while True: print('x' * 1000)", "runtime"),
    "error flood": ("import sys\nfor _ in range(10**5): sys.stderr.write('x' * 1000)\n" + SUM, "pass"),
    "reads /etc/passwd": ("print(open('/etc/passwd').read())", "runtime"),
    "reads the repository": (f"print(open({str(DATA / 'apps.jsonl')!r}).read())", "runtime"),
    "reads $HOME": (f"import os\nprint(os.listdir({str(Path.home())!r}))\nprint(open({str(Path.home() / '.bashrc')!r}).read())", "runtime"),
    "reads the environment": ("import os\nprint(7 if os.environ or b'PATH' in os.environb else 0)", "fail"),
    "reads /proc": ("import os\nprint(open('/proc/1/environ').read())", "runtime"),
    "writes outside": (f"open({str(DATA / 'written')!r}, 'w').write('x')", "runtime"),
    "writes to Python's files": ("import os\nopen(os.__file__, 'a').write('x')", "runtime"),
    "writes to /dev": ("open('/dev/shm/x', 'wb').write(bytes(100))", "runtime"),
    "imports what is installed": ("import sys\nsys.path.append(sys.prefix + '/lib/python%d.%d/site-packages' % sys.version_info[:2])\nimport pip",
                                  "runtime"),
    "writes into /": ("open('/written', 'w').write('x')", "runtime"),
    "opens a socket": ("import socket\nsocket.create_connection(('127.0.0.1', PORT), 2).send(b'x')", "runtime"),
    "kills its parent": ("import os\nos.kill(os.getppid(), 9)\nprint(0)", "runtime or fail"),
    "kills everyone": ("import os\nos.kill(-1, 9)", "runtime"),
    "double fork": ("import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60)\n    os._exit(0)\n" + SUM, "pass"),
    "daemon that holds the output": ("import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], "
                                     "start_new_session=True)\n" + SUM, "pass"),
    "threads that stay": ("import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\n" + SUM, "runtime"),
    "deep recursion": ("import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)\nf(0)", "runtime"),
    "segfault": ("import ctypes\nctypes.string_at(0)", "runtime"),
    "huge integers": ("print(len(str(7 ** 7 ** 8)))", "runtime"),
    "more time": ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (999, 999))", "runtime"),
    "another user": ("import os\nos.setuid(0)", "runtime"),
    "a mount": ("import ctypes\nl = ctypes.CDLL(None, use_errno=True)\nassert l.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None) == 0", "runtime"),
    "long to compile": ("x = " + "(" * 90 + "1" + ")" * 90 + "\n" + "y = [" + "[], " * 10**6 + "]", "runtime or fail or compile"),
    "does not compile, deeply": ("(" * 10**6, "compile"),
    # forgeries of a pass: an early end, what the harness would print, its tools replaced, its variables read
    "prints the verdict": ("print('pass')\nprint({'status': 'pass', 'passed': 1})", "fail"),
    "ends early": ("import os\nos._exit(0)", "fail"),
    "SystemExit": ("raise SystemExit(0)", "fail"),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", "runtime"),
    "patches builtins": ("import builtins\nbuiltins.print = builtins.compile = lambda *a, **k: 7\nprint(7)", "fail"),
    "writes to every descriptor": ("import os\nfor fd in range(1, 64):\n    try: os.write(fd, b'pass 7 ')\n    except OSError: pass", "fail"),
    "reads every descriptor": ("import os\nfor fd in range(3, 64):\n    try: print(os.read(fd, 10**6))\n    except OSError: pass", "fail"),
    "reads the harness": ("import __main__, gc, sys\nprint(vars(__main__).get('job'), sys.argv)\n"
                          "print([o for o in gc.get_objects() if isinstance(o, dict) and 'outputs' in o])", "fail"),
    "hides its errors": ("import sys, os\nsys.excepthook = lambda *a: os._exit(0)\n1 / 0", "fail"),
}


def mine():
    """Processes on this machine that run the harness."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"program.py" in path.read_bytes() and b"setresuid" in path.read_bytes():
                found.append(path)
        except OSError:
            pass
    return found


@pytest.fixture(scope="module")
def port():
    """A listener on loopback that must never be reached."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield listener.getsockname()[1]
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs(name, port):
    """The right verdict in bounded time, nothing left behind, and an honest program beside it and after it passes."""
    program, expected = HOSTILE[name]
    files, began = set(os.listdir(tempfile.gettempdir())), time.monotonic()
    honest, test = json.dumps({"inputs": ["3 4\n"] * 3, "outputs": ["7\n"] * 3}), json.dumps({"inputs": ["3 4\n"], "outputs": ["7\n"]})
    found, beside = evaluate.run_tests([program.replace("PORT", str(port)), SUM], [test, honest])
    assert found[0] in expected.split(" or ")
    assert time.monotonic() - began < evaluate.WALL_TIME + 5
    assert beside == ["pass"] * 3 and results(SUM) == ["pass"]
    for _ in range(40):  # the kernel needs a moment
        if not mine():
            break
        time.sleep(0.05)
    assert not mine() and set(os.listdir(tempfile.gettempdir())) <= files and not (DATA / "written").exists()


@pytest.mark.slow
@pytest.mark.parametrize("program", [
    "class E(int):\n    def __eq__(s, o): return True\ndef f(a): return E(1)",
    "import json\njson.dump = lambda v, f, **k: f.write('7 pass')\ndef f(a): return 1",
    "import os\ndef f(a):\n    for fd in range(1, 64):\n        try: os.write(fd, b'[7]')\n        except OSError: pass\n    os._exit(0)",
    "class A:\n    def __iter__(s):\n        while True: yield 7\ndef f(a): return A()",
    "def f(a):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
    "import os\nos._exit = lambda n: None\ndef f(a): raise SystemExit(0)",
])
def test_forged_values(program):
    assert results(program, [1], 7, "f")[0] in ("fail", "runtime")
    assert results("def f(a): return 7", [1], 7, "f") == ["pass"]


def test_without_bubblewrap(monkeypatch, tmp_path):
    """The task refuses to start, says what to do, and takes --sandbox none as the user's word, with a warning."""
    script = "import evaluate; print(evaluate.compiler_reward([''], ['print(7)'], [{'input_output': '{\"inputs\": [\"\"], \"outputs\": [\"7\"]}'}]))"
    bare = {name: value for name, value in os.environ.items() if name != "PATH"} | {"PYTHONPATH": str(DATA.parent.parent)}
    done = lambda env: subprocess.run([sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True)
    refused = done(bare | {"PATH": str(tmp_path)})
    assert refused.returncode == 1 and "apt-get install bubblewrap" in refused.stderr and "--sandbox none" in refused.stderr
    assert "Traceback" not in refused.stderr
    risked = done(bare | {"PATH": str(tmp_path), "MA_RLHF_SANDBOX": "none"})
    assert risked.stdout == "[1.0]\n" and "WARNING" in risked.stderr


@pytest.mark.slow
def test_limits_hold_without_a_sandbox(monkeypatch):
    monkeypatch.setattr(evaluate, "sandbox", lambda: [])
    for name in ("fork bomb", "memory bomb", "infinite loop", "output flood", "sleep"):
        program, expected = HOSTILE[name]
        assert evaluate.run_program(program)[0] == expected, name
    assert evaluate.run_program(SUM, "3 4\n") == ("ran", "7\n")


def test_pass_at_k_is_the_share_of_samples_that_pass():
    """Against the definition: of all ways to choose k of n samples, those with one that passed."""
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            ways = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert evaluate.pass_at_k(n, c, k) == pytest.approx(sum(map(any, ways)) / len(ways), abs=1e-12)
    assert 0 < evaluate.pass_at_k(10_000, 1, 1) < 1.001e-4  # no overflow
    for wrong in ((3, 1, 4), (3, 4, 1), (3, 1, 0)):
        with pytest.raises(ValueError):
            evaluate.pass_at_k(*wrong)
