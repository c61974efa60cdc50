"""Greedy answers of an exported model by transformers and by vLLM: python try_export.py MODEL PROMPTS.jsonl."""

import argparse
import json
import os
from itertools import islice
from pathlib import Path

SYSTEM = "Solve it."
"""As prompts.system in smollm2.yaml."""
NUM_PROMPTS = 3
MAX_TOKENS = 80
CPU_ENGINE = {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def main(folder: Path, prompts: Path) -> None:
    """Print the first held-out problems with both answers."""
    with prompts.open(encoding="utf-8") as file:
        problems = [json.loads(line)["prompt"] for line in islice(file, NUM_PROMPTS)]
    chats = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}] for text in problems]
    answers = zip(problems, by_transformers(folder, chats), by_vllm(folder, chats), strict=True)
    for problem, first, second in answers:
        same = "the same" if first == second else f"\n{second}"
        print(f"\n{problem}\ntransformers:\n{first}\nvLLM: {same}")


def by_transformers(folder: Path, chats: list[list[dict[str, str]]]) -> list[str]:
    """Greedy answers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    answers = []
    for chat in chats:
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        tokens = model.generate(**prompt, max_new_tokens=MAX_TOKENS, do_sample=False)
        answers.append(tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def by_vllm(folder: Path, chats: list[list[dict[str, str]]]) -> list[str]:
    """Greedy answers."""
    os.environ |= CPU_ENGINE
    from vllm import LLM, SamplingParams

    engine = LLM(str(folder), max_model_len=256, max_num_seqs=8, enforce_eager=True)
    greedy = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    return [result.outputs[0].text for result in engine.chat(chats, greedy, use_tqdm=False)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="MODEL")
    parser.add_argument("prompts", type=Path, metavar="PROMPTS.jsonl")
    args = parser.parse_args()
    main(args.folder, args.prompts)
