"""How fast rows of mixed length are trained: sftkit's batches and layers against TRL's SFTTrainer, in one run on one GPU.

    python bench/speed.py [--tiny] [--json FILE]

A random Llama of 1.2 billion parameters is written to a temporary folder; rows have log-normal lengths (median about 240 tokens, at most 2,048). Every configuration trains the same rows.
`tokens/s` counts real tokens (no padding) over the median of the steps after the first four; `first` is the time to the end of the first step; peak is what torch allocated.
"""
import argparse, gc, json, os, statistics, sys, tempfile, time, warnings
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent/"tests")]
warnings.filterwarnings("ignore")
import torch
from tiny import WORDS, tiny_tokenizer, write_jsonl
import sftkit.training as training
from sftkit import Recipe

args = argparse.ArgumentParser(); args.add_argument("--tiny", action="store_true"); args.add_argument("--json"); args.add_argument("--only", default=""); args = args.parse_args()
CUDA = torch.cuda.is_available()


def make(folder):
    from transformers import LlamaConfig, LlamaForCausalLM
    big = dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8)
    small = dict(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    with torch.device("cuda" if CUDA else "cpu"):
        model = LlamaForCausalLM(LlamaConfig(**(small if args.tiny else big), max_position_embeddings=4096, tie_word_embeddings=True, pad_token_id=2, bos_token_id=0, eos_token_id=1)).to(torch.bfloat16)
    model.save_pretrained(folder/"m"); tiny_tokenizer().save_pretrained(folder/"m")
    random = torch.Generator().manual_seed(1)
    words = WORDS.split()
    lengths = torch.exp(torch.randn(60 if args.tiny else 640, generator=random) + 5.2).clamp(8, 1900).int().tolist()
    rows = [dict(text=" ".join(words[i] for i in torch.randint(0, len(words), (n,), generator=random).tolist())) for n in lengths]
    write_jsonl(folder/"rows.jsonl", rows)
    return rows


def measure(folder, name, rows, flat=True, **options):
    gc.collect()
    if CUDA: torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
    real = training.use_flat_attention
    if not flat: training.use_flat_attention = lambda *a: "padded for comparison"
    recipe = Recipe(model=str(folder/"m"), data_path=str(folder/"rows.jsonl"), project_name=str(folder/name.replace(" ", "-").replace(",", "")), epochs=1, max_seq_length=2048, lr=1e-5, save_steps=10**6, **options)
    try: run = training.Trainer(recipe).fit()[0]
    finally: training.use_flat_attention = real
    steps = [e for e in run.events() if e["kind"] == "step"]
    timed = steps[4:-1] or steps
    peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else float("nan")
    return dict(name=name, tokens_per_second=statistics.median(e["seq_tokens"] / e["seconds"] for e in timed), first=steps[0]["seconds"], steps=len(steps), peak_gib=peak, loss=steps[-1]["loss"])


def trl(folder, name, rows, lora, **config):
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer
    gc.collect()
    if CUDA: torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
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
    trainer = Counting(str(folder/"m"), args=SFTConfig(str(folder/name.replace(" ", "-")), num_train_epochs=1, per_device_train_batch_size=8, gradient_accumulation_steps=4, max_length=2048, learning_rate=1e-5, save_strategy="no", report_to=[],
        logging_steps=1000, disable_tqdm=True, use_cpu=not CUDA, bf16=CUDA, **config), train_dataset=Dataset.from_list(rows), peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None, callbacks=[clock])
    result = trainer.train()
    timed = clock.steps[4:-1] or clock.steps
    peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else float("nan")
    return dict(name=name, tokens_per_second=statistics.median(n / s for s, n in timed), first=clock.steps[0][0], steps=len(clock.steps), peak_gib=peak, loss=result.training_loss)


with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() and not args.tiny else None) as folder:
    folder = Path(folder)
    rows, found = make(folder), []
    lora, packed = dict(peft=True, lora_dropout=0), dict(packing=True, batch_size=8, gradient_accumulation=1)
    jobs = {
        "TRL default, LoRA": lambda n: trl(folder, n, rows, True),
        "padded, LoRA": lambda n: measure(folder, n, rows, flat=False, compile=False, **lora),
        "padding-free, LoRA": lambda n: measure(folder, n, rows, compile=False, **lora),
        "padding-free compiled, LoRA": lambda n: measure(folder, n, rows, compile=True, **lora),
        "packed, LoRA": lambda n: measure(folder, n, rows, compile=False, **lora, **packed),
        "packed, LoRA, no recompute": lambda n: measure(folder, n, rows, compile=False, gradient_checkpointing=False, **lora, **packed),
        "packed compiled, LoRA, no recompute": lambda n: measure(folder, n, rows, compile=True, gradient_checkpointing=False, **lora, **packed),
        "TRL default, full": lambda n: trl(folder, n, rows, False),
        "padding-free, full": lambda n: measure(folder, n, rows, compile=False),
        "padding-free compiled, full": lambda n: measure(folder, n, rows, compile=True),
    }
    for name, job in jobs.items():
        if args.only and args.only not in name: continue
        began = time.monotonic()
        found.append(job(name) | dict(wall=time.monotonic() - began))
        print("{name:38} {tokens_per_second:9.0f} tokens/s  first {first:5.1f} s  {steps:3} steps  peak {peak_gib:5.1f} GiB  loss {loss:.3f}  wall {wall:.0f} s".format(**found[-1]), flush=True)
    about = dict(device=torch.cuda.get_device_name() if CUDA else "cpu", torch=torch.__version__, date=time.strftime("%Y-%m-%d"))
    print(json.dumps(about))
    if args.json: Path(args.json).write_text(json.dumps(dict(about=about, found=found), indent=1))
