"""ma_ppo.py with a fault: the policy's loss on one rank is NaN in the updates that FAULT_UPDATES names (test_faults.py)."""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ma_ppo

calls, honest = [0], ma_ppo.policy_loss


def faulty(*args):
    calls[0] += 1  # one micro-batch an update in this test
    loss, metrics = honest(*args)
    wrong = os.environ["RANK"] == "1" and str(calls[0]) in os.environ["FAULT_UPDATES"].split()
    return loss * float("nan") if wrong else loss, metrics


ma_ppo.policy_loss = faulty
ma_ppo.main()
