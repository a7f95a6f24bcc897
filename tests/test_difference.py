"""ppo.py and ma_ppo.py are the same file outside the marked section."""
import re

from conftest import ROOT

SECTION = re.compile(r"# ---- advantages ----\n.*?\n# ---- end of advantages ----\n", re.S)


def test_the_advantages_are_the_only_difference():
    texts = [(ROOT / name).read_text() for name in ("ppo.py", "ma_ppo.py")]
    assert [len(SECTION.findall(text)) for text in texts] == [1, 1]
    ppo, ma_ppo = (SECTION.sub("", text) for text in texts)
    assert ppo == ma_ppo
    assert texts[0] != texts[1]
    assert "import termination" not in ppo, "what macro actions need stands in the section"


def test_the_readme_shows_the_difference():
    import subprocess
    diff = subprocess.run(["diff", "ppo.py", "ma_ppo.py"], cwd=ROOT, capture_output=True, text=True).stdout
    shown = (ROOT / "README.md").read_text().split("```diff\n")[1].split("```")[0]
    assert shown == diff
