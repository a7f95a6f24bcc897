"""The stage scripts are self-contained: a block that several need stands in each, under "# Copied from". This test holds
every copy to its origin, byte for byte; `python tests/test_copies.py --fix` brings the copies up to date, and what the
README quotes of the code: the difference between ppo.py and ma_ppo.py, and line counts."""
import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [name for name in ("sft.py", "reward.py", "ppo.py", "ma_ppo.py", "evaluate.py") if (ROOT / name).exists()]
COPY = re.compile(r"# Copied from (\w+\.py)\n(# ---- (.+?) ----\n.*?# ---- end of \3 ----\n)", re.S)


def block(script, name):
    """The text between the two marker lines of a block, markers included."""
    text = (ROOT / script).read_text()
    return text[text.index(f"# ---- {name} ----\n"):text.index(end := f"# ---- end of {name} ----\n") + len(end)]


def test_copies_equal_their_origin():
    found = 0
    for script in SCRIPTS:
        text = (ROOT / script).read_text()
        copies = COPY.findall(text)
        assert len(copies) == text.count("# Copied from"), f"a copy in {script} is not a whole marked block"
        for origin, copied, name in copies:
            assert copied == block(origin, name), f"{name} in {script} differs from {origin}: tests/test_copies.py --fix"
            found += 1
    assert found >= 9  # options, data and distribution in three scripts: the pattern still finds them


def test_functions_of_one_name_are_checked_copies():
    owner = {}
    for script in SCRIPTS:
        if script == "ma_ppo.py":
            continue  # the twin of ppo.py, see test_difference.py
        text = COPY.sub("", (ROOT / script).read_text())
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in ("main", "presets", "Args", "AdvantageArgs"):
                assert node.name not in owner, f"{node.name} stands in {owner[node.name]} and in {script}, not as a copy"
                owner[node.name] = script


if __name__ == "__main__" and "--fix" in sys.argv:
    for script in SCRIPTS:
        path = ROOT / script
        path.write_text(COPY.sub(lambda m: f"# Copied from {m[1]}\n{block(m[1], m[3])}", path.read_text()))
    readme = (ROOT / "README.md").read_text()
    diff = subprocess.run(["diff", "ppo.py", "ma_ppo.py"], cwd=ROOT, capture_output=True, text=True).stdout
    readme = re.sub(r"(?s)(```diff\n).*?```", lambda m: m[1] + diff + "```", readme)
    lines = {(script, node.name): str(node.end_lineno - node.lineno + 1) for script in [*SCRIPTS, "termination.py"]
             for node in ast.parse((ROOT / script).read_text()).body if isinstance(node, ast.FunctionDef)}
    readme = re.sub(r"\| \[(\w+)\]\((\w+\.py)\) \| \d+ \|", lambda m: f"| [{m[1]}]({m[2]}) | {lines[m[2], m[1]]} |", readme)
    (ROOT / "README.md").write_text(readme)
