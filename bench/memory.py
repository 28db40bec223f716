"""What `plan.memory()` says before a run, and what the run then took: one line a configuration.

    python bench/memory.py [--tiny] [--json FILE] [--only WORDS]

A random Llama of 0.56 billion parameters is written to a temporary folder; rows have log-normal lengths (median about 180 tokens, at most 2,048). Each configuration trains four steps.
`forecast` is what the forecast expects torch to allocate, `measured` is torch.cuda.max_memory_allocated, `reserved` what torch took from the driver; `total` is what the verdict compares with the card: allocated, and CUDA itself and spare room.
With --tiny it runs on a CPU, where nothing is measured, to try the script itself.
"""
import argparse, gc, json, math, os, sys, tempfile, time, warnings
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent/"tests")]
warnings.filterwarnings("ignore")
import torch
from tiny import WORDS, tiny_tokenizer, write_jsonl
import sftkit.training as training
from sftkit import Recipe
from sftkit.memory import machine

args = argparse.ArgumentParser(); args.add_argument("--tiny", action="store_true"); args.add_argument("--json"); args.add_argument("--only", default=""); args = args.parse_args()
CUDA = torch.cuda.is_available()


def make(folder):
    from transformers import LlamaConfig, LlamaForCausalLM
    big = dict(vocab_size=64000, hidden_size=1536, intermediate_size=4096, num_hidden_layers=14, num_attention_heads=24, num_key_value_heads=8)
    small = dict(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    with torch.device("cuda" if CUDA else "cpu"):
        model = LlamaForCausalLM(LlamaConfig(**(small if args.tiny else big), max_position_embeddings=4096, tie_word_embeddings=False, pad_token_id=2, bos_token_id=0, eos_token_id=1)).to(torch.bfloat16)
    model.save_pretrained(folder/"m"); tiny_tokenizer().save_pretrained(folder/"m")
    random = torch.Generator().manual_seed(1)
    words = WORDS.split()
    lengths = torch.exp(torch.randn(60 if args.tiny else 400, generator=random) + 5.2).clamp(8, 100 if args.tiny else 1900).int().tolist()
    write_jsonl(folder/"rows.jsonl", [dict(text=" ".join(words[i] for i in torch.randint(0, len(words), (n,), generator=random).tolist())) for n in lengths])
    return sum(p.numel() for p in model.parameters())


def measure(folder, name, flat=True, **options):
    gc.collect()
    if CUDA: torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated() if CUDA else 0
    real = training.use_flat_attention
    if not flat: training.use_flat_attention = lambda *a: "padded for comparison"
    fields = {**dict(epochs=1, max_steps=4, gradient_accumulation=2, batch_size=8, max_seq_length=2048, lr=1e-5, save_steps=10**6, compile=False), **options}
    recipe = Recipe(model=str(folder/"m"), data_path=str(folder/"rows.jsonl"), project_name=str(folder/name.replace(" ", "-").replace(",", "")), **fields)
    trainer, began = training.Trainer(recipe), time.monotonic()
    said = training.memory_forecast(trainer.data, machine(device=training.best_device()), compiled=recipe.compile is True, flat=flat)
    asked = time.monotonic() - began
    try: run = trainer.fit()[0]
    finally: training.use_flat_attention = real
    parts = next((e["parts"] for e in run.events() if e["kind"] == "memory" and "parts" in e), {})
    found = dict(name=name, forecast=said.allocated_bytes, total=said.total_bytes, measured=torch.cuda.max_memory_allocated() - base if CUDA else None, reserved=torch.cuda.max_memory_reserved() if CUDA else None,
                 moment=said.moment, flat=said.flat, tokens=said.load.tokens if said.flat else said.load.rows * said.load.width, forecast_seconds=round(asked, 2), parts=said.parts, held=parts, loss=[e for e in run.events() if e["kind"] == "step"][-1]["loss"])
    gib = lambda n: "    na" if n is None else f"{n / 2**30:6.2f}"
    off = f"{said.allocated_bytes / found['measured'] - 1:+7.1%}" if CUDA else "     na"
    print(f"{name:44} forecast {gib(found['forecast'])}  measured {gib(found['measured'])}  {off}  reserved {gib(found['reserved'])}  total {gib(found['total'])} GiB  highest in the {said.moment}, {found['tokens']:,} tokens, asked in {asked:.1f} s", flush=True)
    held = {k: v for k, v in parts.items() if v}
    print(" " * 8 + "counted in the run: " + ", ".join(f"{k} {v / 2**20:.1f}" for k, v in held.items()) + " MiB; forecast of it: " + ", ".join(f"{k} {said.parts.get(k, 0) / 2**20:.1f}" for k in held), flush=True)
    return found


with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() and not args.tiny else None) as folder:
    folder = Path(folder)
    size, found, began = make(folder), [], time.monotonic()
    print(f"{torch.cuda.get_device_name() if CUDA else 'cpu'}, torch {torch.__version__}, transformers {__import__('transformers').__version__}, {time.strftime('%Y-%m-%d')}; a Llama of {size / 1e6:.0f} million parameters", flush=True)
    packed = dict(packing=True, max_seq_length=128 if args.tiny else 2048, batch_size=4)
    jobs = {
        "full": dict(),
        "full, fused AdamW": dict(optimizer="adamw_torch_fused"),
        "full, nothing recomputed, one micro-batch": dict(optimizer="adamw_torch_fused", gradient_checkpointing=False, gradient_accumulation=1),
        "full, 8-bit AdamW, packed": dict(optimizer="adamw_bnb_8bit", **packed),
        "LoRA": dict(peft=True),
        "LoRA, padded": dict(peft=True, flat=False),
        "LoRA, nothing recomputed": dict(peft=True, gradient_checkpointing=False),
        "LoRA, packed, nothing recomputed, no dropout": dict(peft=True, gradient_checkpointing=False, lora_dropout=0, **packed),
        "LoRA, packed, compiled, nothing recomputed": dict(peft=True, gradient_checkpointing=False, lora_dropout=0, compile=True, **packed),
        "LoRA on int4": dict(peft=True, quantization="int4"),
        "LoRA on int4, nothing recomputed": dict(peft=True, quantization="int4", gradient_checkpointing=False),
        "LoRA on int8, packed": dict(peft=True, quantization="int8", **packed),
    }
    for name, options in jobs.items():
        if args.only and args.only not in name: continue
        if options.get("compile") and not CUDA: continue
        found.append(measure(folder, name, **options))
    if CUDA:
        errors = [f["forecast"] / f["measured"] - 1 for f in found]
        print(f"forecast to measured: {min(errors):+.1%} to {max(errors):+.1%}, mean size of the error {sum(map(abs, errors)) / len(errors):.1%}; {time.monotonic() - began:.0f} s in all")
    about = dict(device=torch.cuda.get_device_name() if CUDA else "cpu", torch=torch.__version__, date=time.strftime("%Y-%m-%d"), parameters=size)
    if args.json: Path(args.json).write_text(json.dumps(dict(about=about, found=found), indent=1))
