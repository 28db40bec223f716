"""What the scripts beside this one share: their checks, the random models and rows that they train on, padded batches for comparison, peaks of memory.

They import it first, since it finds sftkit and the tests' tiny tokenizer.
"""
import gc
import json
import os
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
import sftkit.training as training
from sftkit.recipe import Recipe
from tiny import WORDS, tiny_tokenizer, write_jsonl

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SMALL = dict(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)       # for --tiny

results = []                                                                  # of this process's checks, in their order


def check(name, ok, **numbers):
    "Print a check with the numbers behind it, and keep it."
    results.append(dict(check=name, ok=bool(ok), **numbers))
    print(("ok   " if ok else "FAIL ") + name + "  " + "  ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items()), flush=True)


def failed(): return sum(not r["ok"] for r in results)
def device_name(): return torch.cuda.get_device_name() if CUDA else "cpu"
def about(**more): return dict(device=device_name(), **more, torch=torch.__version__, date=time.strftime("%Y-%m-%d"))
def write(file, found): Path(file).write_text(json.dumps(found, indent=1))


def random_llama(
    folder, # written there with its tokenizer
    device=DEVICE, # the weights are drawn there: another device, other weights
    dtype=torch.float32,
    extra=(), # special tokens of the tokenizer
    **config, # of the LlamaConfig
)->int: # number of parameters
    "A Llama with random weights, the same at every call."
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    with torch.device(device): model = LlamaForCausalLM(LlamaConfig(**config, bos_token_id=0, eos_token_id=1, pad_token_id=2)).to(dtype)
    model.save_pretrained(folder)
    tiny_tokenizer(extra=extra).save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def log_normal_rows(file, count, most=1900):
    "Write `count` rows of random words, their lengths log-normal with a median of 181 words, from 8 to `most`; the same at every call. Returns them."
    random, words = torch.Generator().manual_seed(1), WORDS.split()
    lengths = torch.exp(torch.randn(count, generator=random) + 5.2).clamp(8, most).int().tolist()
    rows = [dict(text=" ".join(words[i] for i in torch.randint(0, len(words), (n,), generator=random).tolist())) for n in lengths]
    write_jsonl(file, rows)
    return rows


def recipe_in(folder, name, **fields):
    "A recipe for the model `m` and `rows.jsonl` in `folder` that saves no checkpoint on the way."
    project = folder / name.replace(" ", "-").replace(",", "")
    return Recipe(model=str(folder / "m"), data_path=str(folder / "rows.jsonl"), project_name=str(project), **dict(epochs=1, max_seq_length=2048, lr=1e-5, save_steps=10**6) | fields)


@contextmanager
def batches(flat):
    "Batches without padding where the model allows it (`flat`); else padded ones, for comparison."
    real = training.use_flat_attention
    if not flat: training.use_flat_attention = lambda *a: "padded for comparison"
    try: yield
    finally: training.use_flat_attention = real


@contextmanager
def cudnn_attention():
    "With cuDNN's attention where PyTorch chooses it, as without sftkit."
    with patch("sftkit.loss.steady_attention", nullcontext), patch("sftkit.training.steady_attention", nullcontext): yield


def foreach_adamw():
    "With AdamW as PyTorch takes it unasked: each operation over all weights at once, with copies."
    return patch("sftkit.engine.optimizer_name", lambda r, dtype: r.optimizer)


@contextmanager
def older_card():
    "As on a GPU older than Ampere: no attention kernel for rows of any length, and of those for equal rows the memory-efficient one alone."
    switches = torch.backends.cuda.enable_cudnn_sdp, torch.backends.cuda.enable_flash_sdp
    for switch in switches: switch(False)
    try:
        with patch("sftkit.loss.has_varlen", lambda device: False): yield
    finally:
        for switch in switches: switch(True)


def forget_peak():
    "From here on, the peak of allocated memory is counted anew."
    gc.collect()
    if CUDA: torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()


def shared_memory(tiny=False):
    "Where a temporary folder for large files is quickest; None is the system's own."
    return "/dev/shm" if Path("/dev/shm").is_dir() and not tiny else None
