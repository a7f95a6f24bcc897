"""Every figure that the paper reports (sections 4 and 5, appendix B.5).

    python evaluate.py pass-at-k samples.jsonl        program synthesis: pass@1 and pass@5 by difficulty

Stage 3 on --task apps takes its reward from here: --reward evaluate.py:compiler_reward.
"""
import argparse
import functools
import json
import marshal
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# ---- programs ----
# What a program may use, each time that it is run. Seconds and bytes; all but the wall time by the kernel.
WALL_TIME = 8
LIMITS = {"RLIMIT_CPU": 4, "RLIMIT_AS": 512 << 20, "RLIMIT_NPROC": 8, "RLIMIT_FSIZE": 4 << 20, "RLIMIT_NOFILE": 64, "RLIMIT_CORE": 0}
PYTHON = os.path.realpath(sys.executable)  # not the virtual environment's: programs have the standard library alone

# What runs inside: reads the job, gives up its rights, and runs the program. It knows no expected output, so there is
# no verdict in it to forge: whatever the program does, it can but print, or return, something that is compared outside.
HARNESS = """
import marshal, posix, resource, sys  # what Python has built in: os and json would double the time to start
with open(int(sys.argv[1]), "rb") as file:
    job = marshal.load(file)
if posix.getuid() == 0:
    posix.setgroups([])
    posix.setresgid(job["user"], job["user"], job["user"])
    posix.setresuid(job["user"], job["user"], job["user"])
for name, limit in job["limits"].items():
    resource.setrlimit(getattr(resource, name), (limit, limit))
posix.environ.clear()
sys.argv = ["program.py"]
sys.set_int_max_str_digits(0)
__builtins__.exit = __builtins__.quit = sys.exit
try:
    code = compile(job["program"], "program.py", "exec")
except BaseException:
    posix._exit(99)
if job["function"] is None:
    exec(code, {"__name__": "__main__"})
else:
    import json
    result = open(posix.dup(1), "w")
    posix.dup2(posix.open("/dev/null", posix.O_WRONLY), 1)
    scope = {"__name__": "program"}
    exec("import collections, functools, heapq, itertools, math, random, sys; from typing import *; from collections import *; "
         "from functools import *; from heapq import *; from itertools import *; from math import *", scope)
    exec(code, scope)
    function = scope[job["function"]] if job["function"] in scope else getattr(scope["Solution"](), job["function"])
    value = function(*job["arguments"])
    json.dump(value, result, default=lambda x: list(x) if hasattr(x, "__iter__") else repr(x))
    result.close()
    posix._exit(0)
"""


@functools.cache
def sandbox():
    """The command in front of an untrusted program: bubblewrap, with no network, no files but Python's own (read-only), an
    empty /tmp in memory, no environment, and processes that die with it. [] where the environment variable
    MA_RLHF_SANDBOX is none. Exits with a sentence where it does not work."""
    if os.environ.get("MA_RLHF_SANDBOX") == "none":
        print("WARNING: --sandbox none: programs that a model wrote run on this machine with nothing but limits on time, memory, "
              "processes and file sizes; they can read files and use the network", file=sys.stderr)
        return []
    shown = [PYTHON, f"{sys.base_prefix}/lib", "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"]
    command = [shutil.which("bwrap") or "bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts",
               "--unshare-cgroup-try", "--die-with-parent", "--new-session", "--clearenv", "--dev", "/dev",
               "--size", str(16 << 20), "--perms", "1777", "--tmpfs", "/tmp", "--chdir", "/tmp"]
    for folder in reversed(Path(PYTHON).parents[:-1]):  # which would else be closed to all but root
        command += ["--perms", "0755", "--dir", str(folder)]
    command += [word for path in shown if os.path.exists(path) for word in ("--ro-bind", path, path)]
    # root changes to another user inside (a limit on processes does not bind root), all others are in a user namespace
    command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if os.geteuid() == 0 else ["--unshare-user"]
    command += ["--remount-ro", "/"]
    try:
        trial = subprocess.run([*command, PYTHON, "-I", "-S", "-c", "print(6 * 7)"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        trial = subprocess.CompletedProcess([], 1, "", str(error))
    if trial.stdout != "42\n":
        sys.exit(f"programs that a model wrote run in a sandbox, and bubblewrap does not work here ({trial.stderr.strip()[-200:]}): "
                 "apt-get install bubblewrap, give the container the right to make namespaces, or take the risk with --sandbox none")
    return command


def run_program(program, stdin="", function=None, arguments=()):
    """Runs an untrusted Python program once -> (status, output). status: "ran", "runtime" (it raised, or exceeded a limit)
    or "compile". output: what it printed, or, with the name of a `function`, what that returned, as JSON."""
    job = {"program": program, "function": function, "arguments": arguments, "limits": LIMITS,
           "user": 10_000 + threading.get_native_id() % 50_000}  # one for each program that runs now: the kernel counts by user
    with tempfile.TemporaryFile() as job_file, tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as printed:
        marshal.dump(job, job_file)
        job_file.seek(0)
        given.write(stdin.encode(errors="replace"))
        given.flush()
        with open(f"/proc/self/fd/{given.fileno()}", "rb") as read_only:
            process = subprocess.Popen(
                [*sandbox(), PYTHON, "-I", "-S", "-c", HARNESS, str(job_file.fileno())], stdin=read_only, stdout=printed,
                stderr=subprocess.DEVNULL, pass_fds=[job_file.fileno()], env={}, start_new_session=True)
        try:
            code = process.wait(WALL_TIME)
        except subprocess.TimeoutExpired:
            code = -1
        finally:  # of an interrupt too
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
        printed.seek(0)
        return {0: "ran", 99: "compile"}.get(code, "runtime"), printed.read().decode(errors="replace")


def number(text):
    return int(text) if len(text) < 4000 else text  # int() refuses more digits, and nothing computes with them here


def same_output(printed, expected):
    """Whether two outputs are the same words, numbers with a decimal point or exponent up to 1e-5 (APPS' tolerance).

    >>> same_output("1  2.500001 no\\n", "1 2.5\\nno"), same_output("1000001", "1000000"), same_output("1", "1 2")
    (True, False, False)
    """
    printed, expected = printed.split(), expected.split()
    return len(printed) == len(expected) and all(map(same_word, printed, expected))


def same_word(a, b):
    if a == b or a.lstrip("+-").isdigit() and b.lstrip("+-").isdigit():
        return a == b
    try:
        return math.isclose(float(a), float(b), rel_tol=1e-5, abs_tol=1e-8)
    except ValueError:
        return False


def same_value(a, b):
    """Whether two values read from JSON are equal, floats up to 1e-5."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_value, a, b))
    if isinstance(a, float) and isinstance(b, (int, float)) or isinstance(b, float) and isinstance(a, int):
        return math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-8)
    return a == b


def run_test(program, function, given, expected):
    """One test of an APPS problem -> "compile", "runtime", "pass" or "fail"."""
    lines = lambda text: "\n".join(map(str, text)) if isinstance(text, list) else str(text)
    if function is None:
        status, output = run_program(program, lines(given))
        return status if status != "ran" else "pass" if same_output(output, lines(expected)) else "fail"
    status, output = run_program(program, "", function, given)
    if status != "ran":
        return status
    try:
        value = json.loads(output, parse_int=number)
        wrapped = isinstance(expected, list) and len(expected) == 1 and same_value(value, expected[0])
        return "pass" if wrapped or same_value(value, expected) else "fail"
    except (ValueError, RecursionError):
        return "fail"


@functools.cache
def pool():
    """One thread for each core of this process; they wait for the programs that they start."""
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def run_tests(programs, tests):
    """Runs each program on the tests of its problem, all cores at once; the same program on the same tests only once.

    programs: sources; tests: APPS' input_output, JSON texts -> for each program the list of its tests' results, "compile",
    "runtime", "pass" or "fail"; it is cut short after the first "compile" or "runtime".
    """
    sandbox()  # probed here, where its error ends the run and not a thread

    def one(key, function, given, expected):
        if key in ended:
            return None
        result = run_test(key[0], function, given, expected)
        if result in ("compile", "runtime"):
            ended.add(key)
        return result

    futures, ended = {}, set()
    for key in dict.fromkeys(zip(programs, tests)):
        problem = json.loads(key[1], parse_int=number)
        futures[key] = [pool().submit(one, key, problem.get("fn_name"), given, expected)
                        for given, expected in zip(problem["inputs"], problem["outputs"])]
    results = {key: [result for future in group if (result := future.result())] for key, group in futures.items()}
    return [results[key] for key in zip(programs, tests)]


def compiler_reward(prompts, responses, rows):
    """The adaptive compiler signal of the paper (appendix B.5): -1 for a program that does not compile, -0.6 for one that
    raises or exceeds a limit, else -0.3 + 1.3 * the share of its tests that it passes. rows: APPS problems."""
    scores = []
    for results in run_tests(responses, [row["input_output"] for row in rows]):
        errors = [value for name, value in (("compile", -1.0), ("runtime", -0.6)) if name in results]
        scores.append(errors[0] if errors else -0.3 + 1.3 * results.count("pass") / len(results))
    return scores


def pass_at_k(n, c, k):
    """The unbiased estimate 1 - C(n - c, k) / C(n, k) of the chance that one of k samples passes, c of n having passed.

    >>> pass_at_k(5, 1, 1), pass_at_k(5, 1, 5), pass_at_k(4, 0, 2)
    (0.2, 1.0, 0.0)
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples of a problem and 0 <= passed <= samples, not {c} of {n}")
    return 1 - math.prod(1 - k / i for i in range(n - c + 1, n + 1))
# ---- end of programs ----
