"""Paths, the marker `slow`, and the tiny models that several tests share."""
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may need a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
sys.path.insert(0, str(ROOT))

import pytest
import torch
import transformers

import sft

ARCHITECTURES = ("gemma", "gemma2", "llama", "qwen2", "gpt2")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds; left out by -m 'not slow'")


def tiny_config(architecture, tokenizer):
    """A two-layer model: rotary or learned positions, tied or untied embeddings, soft-capped logits, sliding window."""
    ids = dict(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
               pad_token_id=tokenizer.pad_token_id, initializer_range=0.1)
    if architecture == "gpt2":
        return transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **ids)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **ids)
    return {"gemma": lambda: transformers.GemmaConfig(head_dim=8, **shape),
            "gemma2": lambda: transformers.Gemma2Config(head_dim=8, query_pre_attn_scalar=8, sliding_window=16, **shape),
            "llama": lambda: transformers.LlamaConfig(tie_word_embeddings=False, **shape),
            "qwen2": lambda: transformers.Qwen2Config(tie_word_embeddings=True, **shape)}[architecture]()


@pytest.fixture(scope="session")
def tokenizer():
    return sft.toy_tokenizer()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory, tokenizer):
    """Folders of random policies and of random scalar-head models: {"llama": (policy, reward model), ...}."""
    folders = {}
    for architecture in ARCHITECTURES:
        torch.manual_seed(0)
        config, folder = tiny_config(architecture, tokenizer), tmp_path_factory.mktemp(architecture)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "policy")
        config.num_labels = 1
        transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "reward")
        for name in ("policy", "reward"):
            tokenizer.save_pretrained(folder / name)
        folders[architecture] = (str(folder / "policy"), str(folder / "reward"))
    return folders


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    """400 rows of the toy task as the user's own JSONL file."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in sft.toy_rows("train", 400)))
    return str(path)


@pytest.fixture(autouse=True)
def leave_process_group():
    """A stage that ended with an error in this process is still in its process group, and holds its output folder."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()


SMALL = {"sft": ["--batch_size", "4", "--updates", "2", "--eval_size", "4"],
         "reward": ["--batch_size", "4", "--updates", "2", "--eval_size", "4"],
         "ppo": ["--batch_size", "4", "--micro_batch_size", "2", "--updates", "2", "--eval_size", "4", "--max_response_length", "12",
                "--max_prompt_length", "64"]}
SMALL["ma_ppo"] = SMALL["ppo"]


def run(command, cwd, processes=0, timeout=300):
    """Runs a script of the project as a person would, with torchrun on `processes` processes -> the finished process."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone", "--"]
    script, *options = command
    return subprocess.run([*(launcher if processes else [sys.executable]), str(ROOT / script), *map(str, options)], cwd=cwd,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=timeout)


def read_metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
