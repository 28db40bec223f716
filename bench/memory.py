"""What `plan.memory()` says before a run, and what the run then took: one line a configuration.

    python bench/memory.py [--tiny] [--json FILE] [--only WORDS ...]

A random Llama of 0.56 billion parameters is written to a temporary folder; rows have log-normal lengths (median about 180 tokens, at most 2,048). Each configuration trains four steps.
`forecast` is what the forecast expects torch to allocate, `measured` is torch.cuda.max_memory_allocated, `reserved` what torch took from the driver; `total` is what the verdict compares with the card: allocated, and CUDA itself and spare room.
--only takes parts of names, in quotes where they hold spaces; a configuration runs if its name holds any of them. With --tiny it runs on a CPU, where nothing is measured, to try the script itself.
"""
import argparse, sys, tempfile, time, warnings
from importlib.metadata import version
from pathlib import Path

warnings.filterwarnings("ignore")
from runs import CUDA, SMALL, about, batches, device_name, forget_peak, log_normal_rows, random_llama, recipe_in, shared_memory, write

import torch
import sftkit.training as training
from sftkit.model import best_device
from sftkit.prepare import memory_forecast
from sftkit.memory import machine

BIG = dict(vocab_size=64000, hidden_size=1536, intermediate_size=4096, num_hidden_layers=14, num_attention_heads=24, num_key_value_heads=8)


def jobs(tiny):
    "Fields of the recipe by the configuration's name; `flat` is no field: False pads the batches."
    packed = dict(packing=True, max_seq_length=128 if tiny else 2048, batch_size=4)
    return {
        "full": dict(),
        "full, one micro-batch": dict(gradient_accumulation=1),
        "full, nothing recomputed, one micro-batch": dict(gradient_checkpointing=False, gradient_accumulation=1),
        "full, 8-bit AdamW, packed": dict(optimizer="adamw_bnb_8bit", **packed),
        "LoRA": dict(peft=True),
        "LoRA, padded": dict(peft=True, flat=False),
        "LoRA, nothing recomputed": dict(peft=True, gradient_checkpointing=False),
        "LoRA, packed, nothing recomputed, no dropout": dict(peft=True, gradient_checkpointing=False, lora_dropout=0, **packed),
        "LoRA, packed, compiled, nothing recomputed": dict(peft=True, gradient_checkpointing=False, lora_dropout=0, compile=True, **packed),
        "LoRA on int4": dict(peft=True, quantization="int4"),
        "LoRA on int4, nothing recomputed": dict(peft=True, quantization="int4", gradient_checkpointing=False),
        "LoRA on int8": dict(peft=True, quantization="int8"),
        "LoRA on int8, nothing recomputed": dict(peft=True, quantization="int8", gradient_checkpointing=False),
        "LoRA on int8, packed": dict(peft=True, quantization="int8", **packed),
    }


def measure(folder, name, flat=True, **options):
    "Train one configuration; what was forecast for it and what it took, bytes."
    forget_peak()
    base = torch.cuda.memory_allocated() if CUDA else 0
    recipe = recipe_in(folder, name, **dict(max_steps=4, gradient_accumulation=2, batch_size=8, compile=False) | options)
    with batches(flat):
        trainer, began = training.Trainer(recipe), time.monotonic()
        said = memory_forecast(trainer.data, machine(device=best_device()), compiled=recipe.compile is True, flat=flat)
        asked = time.monotonic() - began
        run = trainer.fit()[0]
    events = run.events()
    measured = torch.cuda.max_memory_allocated() - base if CUDA else None
    reserved = torch.cuda.max_memory_reserved() if CUDA else None
    return dict(name=name, forecast=said.allocated_bytes, total=said.total_bytes, measured=measured, reserved=reserved, moment=said.moment, flat=said.flat,
                tokens=said.load.tokens if said.flat else said.load.rows * said.load.width, forecast_seconds=round(asked, 2), parts=said.parts,
                held=next((e["parts"] for e in events if e["kind"] == "memory" and "parts" in e), {}), loss=[e for e in events if e["kind"] == "step"][-1]["loss"])


def show(f):
    "Two lines of what `measure` found."
    gib = lambda n: "    na" if n is None else f"{n / 2**30:6.2f}"
    mib = lambda parts: ", ".join(f"{k} {v / 2**20:.1f}" for k, v in parts.items())
    off = f"{f['forecast'] / f['measured'] - 1:+7.1%}" if f["measured"] else "     na"
    held = {k: v for k, v in f["held"].items() if v}
    print(f"{f['name']:44} forecast {gib(f['forecast'])}  measured {gib(f['measured'])}  {off}  reserved {gib(f['reserved'])}  total {gib(f['total'])} GiB  "
          f"highest in the {f['moment']}, {f['tokens']:,} tokens, asked in {f['forecast_seconds']:.1f} s", flush=True)
    print(f"        counted in the run: {mib(held)} MiB; forecast of it: {mib({k: f['parts'].get(k, 0) for k in held})}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", help="a file for the figures")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORDS", help="configurations whose name holds any of these")
    a = parser.parse_args()
    chosen = {n: o for n, o in jobs(a.tiny).items() if any(words in n for words in a.only) and (CUDA or not o.get("compile"))}
    if not chosen: sys.exit(f"--only {a.only}: no such configuration. Names: {'; '.join(jobs(a.tiny))}")
    found, began = [], time.monotonic()
    with tempfile.TemporaryDirectory(dir=shared_memory(a.tiny)) as folder:
        folder = Path(folder)
        size = random_llama(folder / "m", dtype=torch.bfloat16, **(SMALL if a.tiny else BIG), max_position_embeddings=4096, tie_word_embeddings=False)
        log_normal_rows(folder / "rows.jsonl", *((60, 100) if a.tiny else (400, 1900)))
        print(f"{device_name()}, torch {torch.__version__}, transformers {version('transformers')}, {time.strftime('%Y-%m-%d')}; a Llama of {size / 1e6:.0f} million parameters", flush=True)
        for name, options in chosen.items():
            found.append(measure(folder, name, **options))
            show(found[-1])
            if a.json: write(a.json, dict(about=about(parameters=size), found=found))
    if CUDA:
        errors = [f["forecast"] / f["measured"] - 1 for f in found]
        print(f"forecast to measured: {min(errors):+.1%} to {max(errors):+.1%}, mean size of the error {sum(map(abs, errors)) / len(errors):.1%}; {time.monotonic() - began:.0f} s in all")


if __name__ == "__main__": main()
