"""Every stage on every architecture, what a run leaves, determinism, missing stages, the first command of the README."""
import json
import shutil

import pytest
import torch
import transformers

import ma_ppo
import ppo
import reward
import sft
from conftest import ARCHITECTURES, SMALL, read_metrics, run

STAGE_3_METRICS = """objective/kl objective/entropy objective/scores objective/rlhf_reward policy/loss policy/approxkl
policy/clipfrac value/loss value/clipfrac value/explained_var val/ratio_dev norm/advantages norm/values norm/policy_grad
norm/value_grad response/length response/eos_rate macro/length macro/count macro/parse_failures time/termination time/gather time/rollout time/score time/update tokens_per_s
lr update episodes skipped""".split()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def stages(request, tiny_models, pairs_file, tmp_path_factory):
    """The four stages in a row on the user's own rows, in this process -> the folder with their output folders."""
    folder = tmp_path_factory.mktemp("run")
    data = ["--task", "pairs", "--data_path", pairs_file]
    out = lambda stage: ["--output_dir", str(folder / stage)]
    sft.main([*data, *SMALL["sft"], *out("sft"), "--model", tiny_models[request.param][0]])
    policy = ["--policy", str(folder / "sft/final")]
    reward.main([*data, *SMALL["reward"], *out("reward"), *policy])
    for stage, module in (("ppo", ppo), ("ma_ppo", ma_ppo)):
        module.main([*data, *SMALL[stage], *out(stage), *policy, "--reward", str(folder / "reward/final")])
    return folder


@pytest.mark.slow
def test_stages_on_every_architecture(stages, tokenizer):
    for stage, metric in (("sft", "eval/perplexity"), ("reward", "eval/accuracy"), ("ppo", "eval/scores"), ("ma_ppo", "eval/scores")):
        rows = read_metrics(stages / stage)
        assert metric in rows[-1] and [row["update"] for row in rows if "lr" in row] == [1, 2]
        assert all(torch.tensor([v for v in row.values()]).isfinite().all() for row in rows)
        assert json.loads((stages / stage / "args.json").read_text())["batch_size"] == 4
        assert (stages / stage / "samples.jsonl").read_text().count("\n") >= 3
        assert transformers.AutoTokenizer.from_pretrained(stages / stage / "final").get_vocab() == tokenizer.get_vocab()
    for stage in ("ppo", "ma_ppo"):
        rows = [row for row in read_metrics(stages / stage) if "lr" in row]
        assert set(STAGE_3_METRICS) == set(rows[0])
        # the ratio is 1 before the first step of an update, and the weights are those of the rollout
        assert all(row["val/ratio_dev"] < 1e-5 for row in rows)
        assert abs(rows[0]["objective/kl"]) < 1e-4
        assert all(row["norm/policy_grad"] > 0 and row["norm/value_grad"] > 0 for row in rows)
        before = transformers.AutoModelForCausalLM.from_pretrained(stages / "sft/final").state_dict()
        after = transformers.AutoModelForCausalLM.from_pretrained(stages / stage / "final").state_dict()
        assert before.keys() == after.keys() and any((before[name] != after[name]).any() for name in before)
        critic, report = transformers.AutoModelForSequenceClassification.from_pretrained(
            stages / stage / "final/critic", output_loading_info=True)
        assert critic.config.num_labels == 1 and not report["missing_keys"]
    macro = [row for row in read_metrics(stages / "ma_ppo") if "lr" in row][0]
    assert macro["macro/count"] == pytest.approx(macro["response/length"] / macro["macro/length"]) and macro["macro/length"] > 2


@pytest.mark.slow
def test_n_1_is_ppo_end_to_end(stages, pairs_file, tmp_path):
    """With one token per macro action ma_ppo.py writes the very metrics of ppo.py."""
    ma_ppo.main(["--task", "pairs", "--data_path", pairs_file, *SMALL["ppo"], "--output_dir", str(tmp_path), "--ngram", "1",
                 "--policy", str(stages / "sft/final"), "--reward", str(stages / "reward/final")])
    exact = lambda rows: [{k: v for k, v in row.items() if not k.startswith(("time/", "tokens_per_s"))} for row in rows]
    assert exact(read_metrics(tmp_path)) == exact(read_metrics(stages / "ppo"))


@pytest.mark.slow
def test_same_seed_same_metrics_and_other_seed_others(tiny_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = ["--policy", tiny_models["llama"][0], "--reward", tiny_models["llama"][1]]
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        ma_ppo.main([*SMALL["ma_ppo"], *models, "--output_dir", name, "--seed", seed, "--termination", "randomized_ngram"])
    exact = [[{k: v for k, v in row.items() if not k.startswith(("time/", "tokens_per_s"))} for row in read_metrics(tmp_path / n)]
             for n in "abc"]
    assert exact[0] == exact[1] != exact[2]
    assert "objective/gold" in exact[0][1] and "eval/gold" in exact[0][-1]
    for name in "ab":
        assert (tmp_path / name / "samples.jsonl").read_text() == (tmp_path / "a/samples.jsonl").read_text()


@pytest.mark.slow
def test_a_rule_as_reward(tiny_models, tmp_path, monkeypatch):
    """A function as the reward, the critic from the policy with a new head; two epochs on a rollout; clipped scores."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.py").write_text("def length(prompts, responses, rows):\n    return [len(r.split()) for r in responses]\n")
    ppo.main([*SMALL["ppo"], "--policy", tiny_models["gpt2"][0], "--reward", "rules.py:length", "--output_dir", "out",
              "--ppo_epochs", "2", "--score_clip", "0.5", "--whiten_advantages", "true", "--dtype", "bf16", "--top_k", "0", "--top_p", "0.9"])
    rows = [row for row in read_metrics("out") if "lr" in row]
    assert rows[0]["objective/scores"] > 1 and abs(rows[0]["objective/rlhf_reward"] - 0.5) < 0.1
    assert rows[0]["norm/advantages"] == pytest.approx((4 * rows[0]["response/length"])**0.5, rel=1e-3)


@pytest.mark.slow
def test_a_tokenizer_without_pad_token_gets_one(tiny_models, tokenizer, tmp_path, monkeypatch):
    """The pad token is never EOS: the embeddings grow by one row, in the policy and in every later stage."""
    monkeypatch.chdir(tmp_path)
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<bos>", eos_token="<eos>",
                                                unk_token="<unk>", pad_token="<eos>")
    shutil.copytree(tiny_models["llama"][0], "model")
    bare.save_pretrained("model")
    spec = json.loads((tmp_path / "model/tokenizer.json").read_text())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "<pad>"]
    spec["model"]["vocab"] = {("<spare>" if word == "<pad>" else word): i for word, i in spec["model"]["vocab"].items()}
    (tmp_path / "model/tokenizer.json").write_text(json.dumps(spec))
    sft.main([*SMALL["sft"], "--model", "model", "--output_dir", "sft"])
    trained = transformers.AutoTokenizer.from_pretrained("sft/final")
    assert trained.pad_token_id == len(tokenizer) != trained.eos_token_id
    assert transformers.AutoModelForCausalLM.from_pretrained("sft/final").get_input_embeddings().num_embeddings == len(tokenizer) + 1
    reward.main([*SMALL["reward"], "--policy", "sft/final", "--output_dir", "reward"])
    ppo.main([*SMALL["ppo"], "--policy", "sft/final", "--reward", "reward/final", "--output_dir", "ppo"])


@pytest.mark.parametrize("command, message", [
    (["ppo.py", "--task", "pairs", "--data_path", "rows.jsonl"],
     "runs/pairs/sft/final does not exist; run: torchrun sft.py --task pairs --data_path rows.jsonl --model NAME_OR_FOLDER"),
    (["sft.py", "--task", "pairs"], "needs --model"),
    (["ma_ppo.py", "--ngram", "0"], "--ngram is 0"),
    (["ma_ppo.py", "--ngram", "2.5"], "--ngram is 2.5; it must be a whole number"),
    (["reward.py", "--policy", "no/such/model"], "no tokenizer at no/such/model"),
])
def test_what_is_missing_is_said_in_one_line(command, message, tmp_path):
    done = run(command, tmp_path)
    assert done.returncode != 0 and message in done.stderr.replace("\n", " ") and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_missing_stage_that_fails_ends_all_ranks(tmp_path):
    (tmp_path / "runs").write_text("a file where a folder should be")
    done = run(["ppo.py"], tmp_path, 2, timeout=120)
    assert done.returncode != 0 and "runs/toy/sft/final does not exist, so sft.py runs first" in done.stderr
    assert "sft.py ended with status" in done.stderr
