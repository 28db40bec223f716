"""How fast rows of mixed length are trained, and prompts answered: sftkit's batches and layers against TRL's SFTTrainer, in one run on one GPU.

    python bench/speed.py [--tiny] [--json FILE] [--only WORDS ...]

A random Llama of 1.2 billion parameters is written to a temporary folder; rows have log-normal lengths (median about 240 tokens, at most 2,048). Every configuration trains the same rows.
`tokens/s` of training counts real tokens (no padding) over the median of the steps after the first four; `first` is the time to the end of the first step; peak is what torch allocated.
Of answers it counts new tokens: 64 to each of 128 prompts of 20 to 400 tokens, lengths that the process has not met before, as they are in practice.
--only takes parts of names, in quotes where they hold spaces; a configuration runs if its name holds any of them. With --tiny it runs on a CPU, to try the script itself.
"""
import argparse, contextlib, json, statistics, sys, tempfile, time, warnings
from pathlib import Path

warnings.filterwarnings("ignore")
from runs import CUDA, DEVICE, SMALL, about, batches, cudnn_attention, foreach_adamw, forget_peak, log_normal_rows, older_card, random_llama, recipe_in, shared_memory, write

import torch
import sftkit.training as training
from sftkit.evaluate import generate
from sftkit.model import load_base, load_tokenizer

BIG = dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8)


def figures(name, steps, loss):
    "What is told of one configuration; `steps` are (seconds, real tokens)."
    peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else float("nan")
    return dict(name=name, tokens_per_second=statistics.median(tokens / seconds for seconds, tokens in (steps[4:-1] or steps)), first=steps[0][0], steps=len(steps), peak_gib=peak, loss=loss)


def ours(folder, name, rows, flat=True, place=contextlib.nullcontext, **options):
    "One epoch by sftkit."
    forget_peak()
    with batches(flat), place(): run = training.Trainer(recipe_in(folder, name, **options)).fit()[0]
    steps = [e for e in run.events() if e["kind"] == "step"]
    return figures(name, [(e["seconds"], e["seq_tokens"]) for e in steps], steps[-1]["loss"])


def trl(folder, name, rows, lora, **config):
    "One epoch by TRL's SFTTrainer with its defaults."
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer
    forget_peak()
    class Clock(TrainerCallback):
        def __init__(self): self.steps, self.tokens = [], 0
        def on_step_begin(self, *a, **k):
            if CUDA: torch.cuda.synchronize()
            self.began = time.monotonic()
        def on_step_end(self, *a, **k):
            if CUDA: torch.cuda.synchronize()
            self.steps.append((time.monotonic() - self.began, self.tokens)); self.tokens = 0
    clock = Clock()
    class Counting(SFTTrainer):
        def training_step(self, model, inputs, *a, **k):
            clock.tokens += int(inputs["attention_mask"].sum()) if inputs.get("attention_mask") is not None else inputs["input_ids"].numel()
            return super().training_step(model, inputs, *a, **k)
    usual = dict(num_train_epochs=1, per_device_train_batch_size=8, gradient_accumulation_steps=4, max_length=2048, learning_rate=1e-5, save_strategy="no", report_to=[], logging_steps=1000,
                 disable_tqdm=True, use_cpu=not CUDA, bf16=CUDA)
    options = SFTConfig(str(folder / name.replace(" ", "-")), **usual | config)
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    result = Counting(str(folder / "m"), args=options, train_dataset=Dataset.from_list(rows), peft_config=adapter, callbacks=[clock]).train()
    return figures(name, clock.steps, result.training_loss)


def answers(folder, name, rows, place=contextlib.nullcontext, **options):
    "128 prompts answered at once, after one of another length."
    model, tokenizer = load_base(folder / "m", torch.bfloat16 if CUDA else torch.float32, DEVICE), load_tokenizer(str(folder / "m"))
    random = torch.Generator().manual_seed(sum(name.encode()))
    prompts = [torch.randint(3, 300, (n,), generator=random).tolist() for n in torch.randint(20, 400, (128,), generator=random).tolist()]
    forget_peak()
    with place():
        generate(model, tokenizer, [[5] * 10], 4, stop_ids=[])
        began = time.monotonic()
        generate(model, tokenizer, prompts, 64, stop_ids=[], **options)                      # ends in text, so the GPU has been waited for
    return figures(name, [(time.monotonic() - began, 64 * len(prompts))], float("nan"))


def jobs():
    "A function and its options by the configuration's name."
    lora, packed = dict(peft=True, lora_dropout=0), dict(packing=True, batch_size=8, gradient_accumulation=1)
    return {
        "TRL default, LoRA": (trl, dict(lora=True)),
        "padded, LoRA": (ours, dict(flat=False, compile=False, **lora)),
        "padded, cuDNN's attention, LoRA": (ours, dict(flat=False, place=cudnn_attention, compile=False, **lora)),
        "padding-free, LoRA": (ours, dict(compile=False, **lora)),
        "padded, as on an older card, LoRA": (ours, dict(flat=False, place=older_card, compile=False, **lora)),
        "padding-free, as on an older card, LoRA": (ours, dict(place=older_card, compile=False, **lora)),
        "padding-free compiled, LoRA": (ours, dict(compile=True, **lora)),
        "packed, LoRA": (ours, dict(compile=False, **lora, **packed)),
        "packed, LoRA, no recompute": (ours, dict(compile=False, gradient_checkpointing=False, **lora, **packed)),
        "packed compiled, LoRA, no recompute": (ours, dict(compile=True, gradient_checkpointing=False, **lora, **packed)),
        "TRL default, full": (trl, dict(lora=False)),
        "padding-free, full": (ours, dict(compile=False)),
        "padding-free, AdamW not fused, full": (ours, dict(place=foreach_adamw, compile=False)),
        "padding-free compiled, full": (ours, dict(compile=True)),
        "answers": (answers, dict()),
        "answers, 8 at a time": (answers, dict(batch_size=8)),
        "answers, cuDNN's attention": (answers, dict(place=cudnn_attention)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", help="a file for the figures")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORDS", help="configurations whose name holds any of these")
    a = parser.parse_args()
    chosen = {n: job for n, job in jobs().items() if any(words in n for words in a.only)}
    if not chosen: sys.exit(f"--only {a.only}: no such configuration. Names: {'; '.join(jobs())}")
    found = []
    with tempfile.TemporaryDirectory(dir=shared_memory(a.tiny)) as folder:
        folder = Path(folder)
        random_llama(folder / "m", dtype=torch.bfloat16, **(SMALL if a.tiny else BIG), max_position_embeddings=4096, tie_word_embeddings=True)
        rows = log_normal_rows(folder / "rows.jsonl", 60 if a.tiny else 640)
        for name, (job, options) in chosen.items():
            began = time.monotonic()
            found.append(job(folder, name, rows, **options) | dict(wall=time.monotonic() - began))
            print("{name:38} {tokens_per_second:9.0f} tokens/s  first {first:5.1f} s  {steps:3} steps  peak {peak_gib:5.1f} GiB  loss {loss:.3f}  wall {wall:.0f} s".format(**found[-1]), flush=True)
            if a.json: write(a.json, dict(about=about(), found=found))
    print(json.dumps(about()))


if __name__ == "__main__": main()
