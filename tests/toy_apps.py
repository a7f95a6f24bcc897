"""Small problems in the schema of APPS, and a tiny model and tokenizer to learn them: python tests/toy_apps.py FOLDER

Each asks for a program that reads numbers and does two or three things with them, in words that vary. Leaves FOLDER/data/train.jsonl,
FOLDER/data/test.jsonl and FOLDER/model; the README has the commands that train on them.
"""
import json
import random
import sys
from pathlib import Path

KEEP = {"even": "x % 2 == 0", "odd": "x % 2 == 1", "greater than three": "x > 3", "less than six": "x < 6", "not five": "x != 5"}
CHANGE = {"double": "x * 2", "square": "x * x", "add one to": "x + 1", "negate": "-x", "subtract two from": "x - 2"}
PRINT = {"their sum": "sum(v)", "the largest": "max(v)", "the smallest": "min(v)", "how many there are": "len(v)",
         "them in rising order": "*sorted(v)", "them from last to first": "*v[::-1]"}
KEEP_WORDS = ("Keep those that are {}.", "Forget the numbers that are not {}.", "Only numbers that are {} count.")
CHANGE_WORDS = ("Then {} each.", "Now {} every one of them.", "You must {} each of them.")
PRINT_WORDS = ("Print {}.", "Your program prints {}.", "Tell {}.")


def problem(draw, number):
    steps, code = ["You are given numbers in one line."], ["v = list(map(int, input().split()))"]
    chosen = [(KEEP, KEEP_WORDS, "v = [x for x in v if {}]"), (CHANGE, CHANGE_WORDS, "v = [{} for x in v]")]
    draw.shuffle(chosen)
    for table, words, line in chosen[:draw.choice((1, 2, 2))]:
        name, expression = draw.choice(list(table.items()))
        steps.append(draw.choice(words).format(name))
        code.append(line.format(expression))
    name, expression = draw.choice(list(PRINT.items()))
    steps.append(draw.choice(PRINT_WORDS).format(name))
    solution = "\n".join([*code, f"print({expression})"])
    inputs, outputs = [], []
    for _ in range(40):
        values = [draw.randint(0, 9) for _ in range(draw.randint(4, 7))]
        v = list(values)
        for line in code[1:]:
            v = eval(line.removeprefix("v = "), {"v": v})
        if v and len(inputs) < 3:  # max() of nothing raises
            inputs.append(" ".join(map(str, values)) + "\n")
            outputs.append(" ".join(map(str, eval(f"[{expression}]", {"v": v}))) + "\n")
    if len(inputs) < 3:  # odd numbers among doubles, say
        return None
    return {"problem_id": number, "question": " ".join(steps), "solutions": json.dumps([solution]),
            "input_output": json.dumps({"inputs": inputs, "outputs": outputs}), "difficulty": "introductory" if len(steps) < 4 else "interview",
            "url": "", "starter_code": ""}


def main(folder):
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    folder = Path(folder)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    draw, seen = random.Random(0), set()
    for split, size in (("train", 3000), ("test", 300)):
        rows = []
        while len(rows) < size:
            row = problem(draw, len(seen))
            if row and row["question"] not in seen:
                seen.add(row["question"])
                rows.append(row)
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [row["question"] for row in rows] + ["\nQUESTION:\n", "\nUse Standard Input format\nANSWER:\n"] + [
        text for row in rows for text in json.loads(row["solutions"])]
    tokenizer = Tokenizer(models.BPE())  # one token for a word or a sign, so that a program is some 30 to 60 of them
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=420, special_tokens=["<pad>", "<bos>", "<eos>"],
                                                             initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


if __name__ == "__main__":
    main(sys.argv[1])
