"""The number of processes and of micro-batches changes nothing; a run of several processes ends cleanly."""
import pytest
import torch

from conftest import SMALL, read_metrics, run


@pytest.fixture(scope="module")
def updates(tiny_models, tmp_path_factory):
    """What one update gives: {(processes, micro-batches of the whole batch): metrics and weights}."""
    results, folder = {}, tmp_path_factory.mktemp("updates")
    for processes, micro_batches in ((1, 1), (1, 4), (2, 1), (2, 4), (4, 2)):
        target, replicate = folder / f"{processes}_{micro_batches}", 2 if processes == 4 else 1  # four: HSDP, 2 x 2
        rows = 8 // processes // micro_batches
        done = run(["tests/update_worker.py", *tiny_models["gemma"], rows, replicate, target], folder, processes)
        assert done.returncode == 0, done.stderr[-2000:]
        results[processes, micro_batches] = torch.load(target)
    return results


@pytest.mark.slow
@pytest.mark.parametrize("processes, micro_batches", [(1, 4), (2, 1), (2, 4), (4, 2)])
def test_processes_and_micro_batches_change_nothing(updates, processes, micro_batches):
    expected, result = updates[1, 1], updates[processes, micro_batches]
    assert result["metrics"] == pytest.approx(expected["metrics"], abs=1e-5, rel=1e-5)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(result["weights"][name], weight, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_the_update_is_worth_comparing(updates, tiny_models):
    import transformers
    metrics = updates[1, 1]["metrics"]
    assert metrics["policy/clipfrac"] > 0.05 and metrics["norm/policy_grad"] > 0.01 and metrics["norm/value_grad"] > 0.01
    before = transformers.AutoModelForCausalLM.from_pretrained(tiny_models["gemma"][0]).state_dict()
    moved = [(updates[1, 1]["weights"][f"policy {name}"] - weight).abs().max() for name, weight in before.items()]
    assert max(moved) > 5e-4


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_stage_3_on_several_processes(processes, tiny_models, tmp_path):
    """Responses of different lengths on the ranks do not deadlock; HSDP (2 x 2) works like FSDP."""
    replicate = ["--replicate", "2"] if processes == 4 else []
    done = run(["ma_ppo.py", "--policy", tiny_models["qwen2"][0], "--reward", tiny_models["qwen2"][1], *SMALL["ma_ppo"],
                "--output_dir", "out", "--max_response_length", "90", *replicate], tmp_path, processes)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = [row for row in read_metrics(tmp_path / "out") if "lr" in row]
    assert len(metrics) == 2 and all(row["val/ratio_dev"] < 1e-5 for row in metrics)
    assert any(0 < row["response/eos_rate"] for row in metrics)  # some rows end early: the ranks' lengths differ


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_the_earlier_stages_on_two_processes(stage, tiny_models, tmp_path):
    """They see the same rows in the same order, so their figures are those of one process."""
    model = ["--model" if stage == "sft" else "--policy", tiny_models["llama"][0]]
    for processes in (1, 2):
        done = run([f"{stage}.py", *SMALL[stage], *model, "--updates", "3", "--micro_batch_size", "1", "--output_dir", str(processes)],
                   tmp_path, processes)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = ([{k: v for k, v in row.items() if not k.endswith("_per_s")} for row in read_metrics(tmp_path / n)] for n in "12")
    assert len(one) == 3 and all(a == pytest.approx(b, rel=1e-4, abs=1e-5) for a, b in zip(one, two))


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(3))
def test_two_processes_end_cleanly(attempt, tiny_models, tmp_path):
    done = run(["ppo.py", "--policy", tiny_models["llama"][0], "--reward", tiny_models["llama"][1], *SMALL["ppo"],
                "--updates", "1", "--output_dir", "out"], tmp_path, 2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out/final/model.safetensors").exists() and (tmp_path / "out/final/critic/model.safetensors").exists()
