"""How fast a small real model is trained, and answers, on a CPU: sftkit, with PyTorch's own choices and with its own, against TRL's SFTTrainer, in one run.

    python bench/cpu.py [--steps N] [--json FILE]

The sample model (SmolLM2-135M-Instruct) on the sample rows, 4 a step, in fp32; of TRL in the order that it draws, of sftkit always in the same. `tokens/s` counts real tokens (no padding) over the median of the steps after the first four;
of answers, those that were generated to the first 32 held-out prompts.
"""
import argparse, contextlib, json, platform, tempfile, time
from pathlib import Path
from unittest.mock import patch

from runs import about, foreach_adamw, write

import torch
from speed import figures, ours, trl
from sftkit import sample_data, sample_model
from sftkit.evaluate import generate
from sftkit.model import load_base, load_tokenizer


def mkl_products():
    "As PyTorch multiplies by itself."
    return patch("sftkit.model._onednn_is_quicker", lambda: False)


@contextlib.contextmanager
def unfused_mkl():
    with mkl_products(), foreach_adamw(): yield


def answers(folder, name, rows, place=contextlib.nullcontext):
    "32 prompts answered at once, at most 24 tokens each."
    model, tokenizer = load_base(folder / "m"), load_tokenizer(str(folder / "m"))
    prompts = [tokenizer.apply_chat_template(json.loads(line)["messages"][:1], add_generation_prompt=True, return_dict=False)
               for line in (sample_data() / "test.jsonl").read_text(encoding="utf-8").splitlines()[:32]]
    with place():
        generate(model, tokenizer, prompts[:1], 2)
        began = time.monotonic()
        generate(model, tokenizer, prompts, 24, stop_ids=[])
    return figures(name, [(time.monotonic() - began, 24 * len(prompts))], float("nan"))


def jobs(steps):
    "A function and its options by the configuration's name."
    small = dict(batch_size=4, gradient_accumulation=1, max_steps=steps, gradient_checkpointing=False)
    theirs = dict(per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=steps, gradient_checkpointing=False)
    lora = dict(peft=True, lora_dropout=0)
    return {"TRL, LoRA": (trl, dict(lora=True, **theirs)), "sftkit with MKL's products, LoRA": (ours, dict(place=mkl_products, **small, **lora)), "sftkit, LoRA": (ours, small | lora),
            "TRL, full": (trl, dict(lora=False, **theirs)), "sftkit with MKL's products, full": (ours, dict(place=mkl_products, **small)), "sftkit with MKL's products and AdamW not fused, full": (ours, dict(place=unfused_mkl, **small)),
            "sftkit, full": (ours, small), "answers with MKL's products": (answers, dict(place=mkl_products)), "answers": (answers, {})}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--json", help="a file for the figures")
    a = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "m").symlink_to(sample_model())
        rows = [json.loads(line) for line in (sample_data() / "train.jsonl").read_text(encoding="utf-8").splitlines()]
        rows = [dict(prompt=r["messages"][:-1], completion=r["messages"][-1:]) for r in rows]              # so that TRL, too, trains the answers alone
        (folder / "rows.jsonl").symlink_to(sample_data() / "train.jsonl")
        for name, (job, options) in jobs(a.steps).items():
            found.append(job(folder, name, rows, **options))
            print("{name:52} {tokens_per_second:7.0f} tokens/s  {steps:3} steps  loss {loss:.3f}".format(**found[-1]), flush=True)
            if a.json: write(a.json, dict(about=about(), found=found))
    print(json.dumps(about(threads=torch.get_num_threads(), cpu=cpu_name())))


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__": main()
