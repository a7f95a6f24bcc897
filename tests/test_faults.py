"""What happens to runs, injected: kills, signals, damaged and half-written files, a full disk, NaN, wrong options and rows.
After each, nothing that had been saved is lost, and the run goes on or says plainly why not."""
import fcntl
import gc
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

import ma_ppo
import ppo
import reward
import sft
from conftest import ROOT, SMALL, read_metrics, run

STAGES = {"sft": sft, "reward": reward, "ppo": ppo, "ma_ppo": ma_ppo}


def options(stage, tiny_models, pairs_file, updates=6):
    policy, reward_model = tiny_models["llama"]
    models = {"sft": ["--model", policy], "reward": ["--policy", policy]}.get(stage, ["--policy", policy, "--reward", reward_model])
    return ["--task", "pairs", "--data_path", pairs_file, *SMALL[stage], *models, "--updates", str(updates), "--eval_every", "2"]


def exact(folder):
    """The metrics of a run but for times, and its samples."""
    rows = [{k: v for k, v in row.items() if not k.startswith(("time/", "tokens_per_s", "pairs_per_s"))} for row in read_metrics(folder)]
    return rows, Path(folder, "samples.jsonl").read_text()


def stopped(module, argv, status):
    with pytest.raises(SystemExit) as end:
        module.main(argv)
    assert end.value.code == status, end.value.code
    del end
    gc.collect()  # the traceback holds the run's lock on its folder


STOP_AT_ONCE = ["--max_hours", "0.0000001"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "ma_ppo"])
def test_a_resumed_run_is_the_uninterrupted_run(stage, tiny_models, pairs_file, tmp_path):
    """Bit for bit, interrupted after every update."""
    module, argv = STAGES[stage], options(stage, tiny_models, pairs_file)
    module.main([*argv, "--output_dir", str(tmp_path / "whole")])
    for _ in range(6):
        stopped(module, [*argv, "--output_dir", str(tmp_path / "parts"), "--resume", *STOP_AT_ONCE], 0)
    with open(tmp_path / "parts/metrics.jsonl", "a") as file:
        file.write('{"update": 6, "half')  # killed while it wrote
    module.main([*argv, "--output_dir", str(tmp_path / "parts"), "--resume"])
    assert exact(tmp_path / "parts") == exact(tmp_path / "whole")
    for path in (tmp_path / "whole/final").rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "parts/final" / path.relative_to(tmp_path / "whole/final")).read_bytes()
    assert len(list((tmp_path / "parts/checkpoints").iterdir())) == 2  # --keep


@pytest.fixture(scope="module")
def interrupted(tiny_models, pairs_file, tmp_path_factory):
    """The output folder of a run with checkpoints after updates 1 and 2, and its options."""
    folder, argv = tmp_path_factory.mktemp("interrupted") / "out", options("ma_ppo", tiny_models, pairs_file, 4)
    for _ in range(2):
        stopped(ma_ppo, [*argv, "--output_dir", str(folder), "--resume", *STOP_AT_ONCE], 0)
    return folder, argv


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["__0_0.distcp", ".metadata", "random-0.pt", "manifest.json", "missing"])
def test_a_damaged_checkpoint_is_found_and_the_one_before_it_used(kind, interrupted, tmp_path, capsys):
    folder, argv = interrupted
    shutil.copytree(folder, tmp_path / "out")
    path = tmp_path / "out/checkpoints/update-000002" / ("random-0.pt" if kind == "missing" else kind)
    if kind == "missing":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
    ma_ppo.main([*argv, "--output_dir", str(tmp_path / "out"), "--resume"])
    said = capsys.readouterr().err
    assert "update-000002 is damaged" in said and "the one before it is used" in said and "goes on after update 1" in said
    assert [row["update"] for row in read_metrics(tmp_path / "out") if "lr" in row] == [1, 2, 3, 4]


@pytest.mark.slow
def test_what_may_not_change_is_refused_by_name(interrupted, tmp_path):
    folder, argv = interrupted
    shutil.copytree(folder, tmp_path / "out")
    out = ["--output_dir", str(tmp_path / "out")]
    for more, message in ((["--resume", "--kl_coef", "0.2", "--ngram", "3"], "--kl_coef was 0.05, now 0.2; --ngram was 5, now 3"),
                          ([], "has checkpoints of an earlier run; go on with --resume"),
                          (["--resume", "no/such/folder"], "no checkpoint is whole")):
        with pytest.raises(SystemExit, match=message):
            ma_ppo.main([*argv, *out, *more])
        torch.distributed.destroy_process_group()
        gc.collect()
    ma_ppo.main([*argv, *out, "--resume", "--eval_every", "1", "--updates", "3"])  # harmless
    assert len(read_metrics(tmp_path / "out")) == 3 + 3  # and the evaluations of updates 0, 2 and 3


@pytest.mark.slow
def test_another_number_of_processes(interrupted, tmp_path):
    """A checkpoint of one process goes on on two: the same prompts, and weights that are those of the checkpoint."""
    folder, argv = interrupted
    shutil.copytree(folder, tmp_path / "out")
    done = run(["ma_ppo.py", *argv, "--output_dir", "out", "--resume"], tmp_path, 2)
    assert done.returncode == 0, done.stderr
    rows = [row for row in read_metrics(tmp_path / "out") if "lr" in row]
    assert [row["update"] for row in rows] == [1, 2, 3, 4] and all(row["val/ratio_dev"] < 1e-5 for row in rows)


@pytest.mark.slow
def test_a_second_run_on_the_same_folder_is_refused(interrupted):
    folder, argv = interrupted
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="another run is writing to"):
            ma_ppo.main([*argv, "--output_dir", str(folder), "--resume"])


def start(argv, cwd, processes=0, script="ma_ppo.py", limit=None, **env):
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone", "--"] if processes else []
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return subprocess.Popen([sys.executable, *launcher, str(ROOT / script), *argv], cwd=cwd, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                            text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | env, start_new_session=True, preexec_fn=full if limit else None)


def wait_for(condition, seconds=90):
    for _ in range(seconds * 20):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_update_end_and_saves(number, status, tiny_models, pairs_file, tmp_path):
    argv = options("ma_ppo", tiny_models, pairs_file, 30)
    process = start([*argv, "--output_dir", "out"], tmp_path)
    wait_for(lambda: (tmp_path / "out/metrics.jsonl").exists() and len(read_metrics(tmp_path / "out")) > 2)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    done = [row["update"] for row in read_metrics(tmp_path / "out") if "lr" in row][-1]
    assert process.returncode == status and f"ends after update {done}: signal {int(number)}" in said and done < 30
    assert (tmp_path / f"out/checkpoints/update-{done:06d}/manifest.json").exists() and "Traceback" not in said


def children(pid):
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


@pytest.mark.slow
def test_kill_9_at_random_moments(tiny_models, pairs_file, tmp_path):
    """Twelve kills, of one rank of two and of all: each restart goes on from the last checkpoint, a dead rank takes the other
    with it, and the metrics end up as those of a run that nobody killed."""
    argv = options("ma_ppo", tiny_models, pairs_file, 60)
    done = run(["ma_ppo.py", *argv, "--output_dir", "whole"], tmp_path, 2)
    assert done.returncode == 0, done.stderr
    update = statistics.mean(row["time/rollout"] + row["time/score"] + row["time/update"] for row in read_metrics(tmp_path / "whole") if "lr" in row)
    saved = lambda: max([0, *(int(path.name[-6:]) for path in (tmp_path / "out").glob("checkpoints/update-??????"))])
    draw, kills, process = random.Random(0), 0, None
    out = [*argv, "--output_dir", "out", "--resume", "--save_every", "1"]
    while kills < 12:
        process, before = start(out, tmp_path, 2), saved()
        wait_for(lambda: process.poll() is not None or saved() > before)
        time.sleep(draw.uniform(0, 3 * update))  # in the middle of updates and of saves, however fast the machine is
        if process.poll() is not None:
            break
        ranks, launcher = children(process.pid), process.pid
        for pid in ranks[-1:] if kills % 2 else [launcher, *ranks]:
            os.kill(pid, signal.SIGKILL)
        process.stderr.close()
        process.wait(timeout=60)  # bounded, where one rank alone is dead
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() and "zombie" not in Path(f"/proc/{pid}/status").read_text() for pid in ranks))
        kills += 1
    done = run(["ma_ppo.py", *out], tmp_path, 2)
    assert done.returncode == 0, done.stderr
    assert exact(tmp_path / "out") == exact(tmp_path / "whole")
    assert kills >= 6, "the run was over before it could be killed"


@pytest.mark.slow
def test_torchrun_brings_a_dead_run_back(tiny_models, pairs_file, tmp_path):
    argv = [*options("ma_ppo", tiny_models, pairs_file, 30), "--output_dir", "out", "--resume", "--save_every", "1"]
    process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--max_restarts=2", "--",
                                str(ROOT / "ma_ppo.py"), *argv], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    wait_for(lambda: len(list((tmp_path / "out").glob("checkpoints/*6"))) > 0)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0 and "goes on after update" in said
    assert [row["update"] for row in read_metrics(tmp_path / "out") if "lr" in row] == list(range(1, 31))


@pytest.mark.slow
def test_a_full_disk(interrupted, tmp_path):
    """A limit on file sizes stands for it: the save fails in words, what was saved before is whole and goes on."""
    folder, argv = interrupted
    shutil.copytree(folder, tmp_path / "out")
    process = start([*argv, "--output_dir", "out", "--resume", "--save_every", "1"], tmp_path, limit=60_000)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and "cannot save" in said and "earlier checkpoints are as they were" in said
    assert sorted(path.name for path in (tmp_path / "out/checkpoints").glob("update-??????")) == ["update-000001", "update-000002"]
    ma_ppo.main([*argv, "--output_dir", str(tmp_path / "out"), "--resume"])
    assert [row["update"] for row in read_metrics(tmp_path / "out") if "lr" in row] == [1, 2, 3, 4]


def test_an_output_folder_that_cannot_be_written(tiny_models, pairs_file, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SystemExit, match="cannot write to --output_dir"):
        sft.main([*options("sft", tiny_models, pairs_file), "--output_dir", str(tmp_path / "out")])


@pytest.mark.slow
def test_nan_on_one_rank_skips_the_update_on_all(tiny_models, pairs_file, tmp_path):
    argv = [*options("ma_ppo", tiny_models, pairs_file, 5), "--output_dir", "out"]
    done = start(argv, tmp_path, 2, "tests/fault_worker.py", FAULT_UPDATES="2 3")
    assert done.communicate(timeout=120) and done.returncode == 0
    rows = [row for row in read_metrics(tmp_path / "out") if "lr" in row]
    assert [row["skipped"] for row in rows] == [0, 1, 1, 0, 0]
    for path in (tmp_path / "out/final").rglob("*.safetensors"):
        weights = transformers.modeling_utils.load_state_dict(str(path))
        assert all(weight.isfinite().all() for weight in weights.values())
    done = start([*argv[:-1], "bad", "--max_bad_updates", "2"], tmp_path, 2, "tests/fault_worker.py", FAULT_UPDATES="2 3 4 5")
    said = done.communicate(timeout=120)[1]
    assert done.returncode == 1 and "ends after update 3: 2 updates in a row" in said and "--resume goes on from here" in said


@pytest.mark.slow
def test_nan_in_a_weight_stops_the_run(tiny_models, pairs_file, tmp_path, capsys):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_models["llama"][0])
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    shutil.copy(Path(tiny_models["llama"][0], "tokenizer.json"), tmp_path / "nan")
    shutil.copy(Path(tiny_models["llama"][0], "tokenizer_config.json"), tmp_path / "nan")
    argv = options("ma_ppo", tiny_models, pairs_file, 5)
    argv[argv.index("--policy") + 1] = str(tmp_path / "nan")
    stopped(ma_ppo, [*argv, "--output_dir", str(tmp_path / "out"), "--max_bad_updates", "2"], 1)
    assert "Weights are not finite, so no checkpoint was made" in capsys.readouterr().err
    assert not (tmp_path / "out/checkpoints").exists()


@pytest.mark.parametrize("body, message", [
    ("[1 / len(r.replace('x', '')) if 0 else 1 / 0 for r in responses]", r"raised ZeroDivisionError.* for the response .* to 'review"),
    ("[float('nan')] * len(responses)", "must give a finite number .* nan for the response .* to 'review"),
    ("[0.0]", "gave 1 scores for 4 responses"),
    ("['good'] * len(responses)", "gave 'good' for the response"),
])
def test_a_reward_function_that_is_wrong(body, message, tiny_models, pairs_file, tmp_path):
    (tmp_path / "rules.py").write_text(f"def f(prompts, responses, rows):\n    return {body}\n")
    argv = options("ppo", tiny_models, pairs_file)
    argv[argv.index("--reward") + 1] = f"{tmp_path}/rules.py:f"
    with pytest.raises(SystemExit, match=message):
        ppo.main([*argv, "--output_dir", str(tmp_path / "out")])


@pytest.mark.slow
def test_too_much_kl_stops_the_run(tiny_models, pairs_file, tmp_path, capsys):
    stopped(ppo, [*options("ppo", tiny_models, pairs_file), "--output_dir", str(tmp_path), "--max_kl", "0.000001", "--policy_lr", "0.1",
                  "--warmup_steps", "0"], 1)
    assert "more than --max_kl" in capsys.readouterr().err and any((tmp_path / "checkpoints").iterdir())


VALUES = ["0", "1", "-1", "2.5", "1e9", "-inf", "inf", "nan", "", "x", "true", "None", "0x10", "9" * 40, "é", "--seed"]


def test_random_options_give_a_sentence_or_a_run():
    """Every option of every stage with every wrong value: parsed, or refused in words, never a traceback."""
    draw = random.Random(0)
    for stage, module in STAGES.items():
        groups = [module.Args] + ([module.AdvantageArgs] if hasattr(module, "AdvantageArgs") else [])
        names = [name for group in groups for name in group.__dataclass_fields__ if name not in ("print_args", "termination")]
        cases = [[(name, value)] for name in names for value in VALUES]
        cases += [[(draw.choice(names), draw.choice(VALUES)) for _ in range(3)] for _ in range(100)]
        for case in draw.sample(cases, 250):
            argv = [word for name, value in case for word in (f"--{name}", value)]
            try:
                args = module.parse_args(*groups, argv=argv, presets=module.presets)
            except SystemExit as end:
                assert end.code == 2 or isinstance(end.code, str)
                continue
            for name, value in vars(args).items():
                assert value != value or not isinstance(value, float) or value >= 0, (name, value)
                assert value == value, f"{name} is nan"


def test_mutated_rows_give_a_sentence_or_are_skipped(pairs_file, tmp_path, tokenizer):
    draw = random.Random(0)
    good = Path(pairs_file).read_text().splitlines()[:30]
    wrong = [None, 3, [], {}, "", " ", "\x00", [[]], [{"role": "user"}], True, "x" * 5000, {"a": [1, {"b": None}]}]
    for case in range(60):
        rows = [json.loads(line) for line in good]
        for _ in range(3):
            row = draw.choice(rows)
            row[draw.choice(("prompt", "chosen", "rejected", "new"))] = draw.choice(wrong)
            if draw.random() < 0.3:
                row.pop(draw.choice(list(row)))
        path = tmp_path / f"{case}.jsonl"
        text = "\n".join(map(json.dumps, rows))
        path.write_text(text if draw.random() < 0.8 else text[:draw.randrange(len(text))])
        args = sft.parse_args(sft.Args, argv=["--task", "pairs", "--data_path", str(path), "--all_rows", "true"])
        try:
            train, held_out = sft.load_rows(args, 0, ["prompt", "chosen"], tokenizer)
            assert all(isinstance(row["prompt"], str) and row["chosen"].strip() for row in train + held_out)
        except SystemExit as end:
            assert isinstance(end.code, str) and str(path) in end.code
