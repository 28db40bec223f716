"""What must hold on a GPU, checked on one: python bench/gpu.py [--layers 16 --hidden 2048] [--out GPU.json]

A random Llama is made on the spot, so nothing is downloaded. Each line is a check with the numbers behind it; the exit code is the number of failed checks.
With --tiny it runs on a CPU, to try the script itself.
"""
import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "tests")]

import torch
from sftkit.events import RunDirectory
from sftkit.export import merge
from sftkit.model import best_device, load_base, load_trained
from sftkit.recipe import ModelError, Recipe
from sftkit.training import Trainer, train_loader
from tiny import tiny_tokenizer, write_jsonl

results = []


def check(name, ok, **numbers):
    results.append(dict(check=name, ok=bool(ok), **numbers))
    print(("ok   " if ok else "FAIL ") + name + "  " + "  ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items()), flush=True)


def make_model(folder, layers, hidden):
    from transformers import LlamaConfig, LlamaForCausalLM
    tokenizer = tiny_tokenizer(extra=("<|im_start|>", "<|im_end|>"))
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32000, hidden_size=hidden, intermediate_size=hidden * 4, num_hidden_layers=layers, num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 256),
                         tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder); tokenizer.save_pretrained(folder)
    return str(folder)


def fit(recipe):
    "(losses, median seconds per step, peak bytes, model, run directory, events) of a run without a view; large files are removed at once."
    gc.collect()
    if torch.cuda.is_available(): torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
    run, model, _ = Trainer(recipe).fit()
    events = run.events()
    steps = [e for e in events if e["kind"] == "step"]
    for _, checkpoint in run.checkpoints(): shutil.rmtree(checkpoint)
    if not recipe.peft: shutil.rmtree(run.path)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return [s["loss"] for s in steps], sorted(s["seconds"] for s in steps)[len(steps) // 2], peak, model, run, events


def truth(path, batches):
    "Masked cross-entropy of the batches in fp32, from full logits, row by row without padding."
    model, total, count = load_base(path, torch.float32, best_device()), 0.0, 0
    for batch in batches:
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"]):
            ids, labels = ids[mask].to(model.device), labels[mask][1:].to(model.device)
            with torch.no_grad(): logits = model(ids[None]).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
            count += int((labels != -100).sum())
    return total / count


def documents_truth(path, batch):
    "As `truth`, for a packed batch, document by document."
    apart = [(ids[d == k], labels[d == k]) for ids, labels, d in zip(batch["input_ids"], batch["labels"], batch["documents"]) for k in range(1, int(d.max()) + 1)]
    return truth(path, [dict(input_ids=i[None], attention_mask=torch.ones_like(i)[None], labels=l[None]) for i, l in apart])


def rate(events):
    "Median real tokens per second over the steps after the third."
    rates = sorted(e["seq_tokens"] / e["seconds"] for e in events if e["kind"] == "step" and e["step"] > 3)
    return rates[len(rates) // 2]


def memory_that_runs_out(base, device):
    "A run that may only take some of what it wants must give the same losses, in smaller pieces."
    wide = base.replace(batch_size=32, gradient_accumulation=1, gradient_checkpointing=False, mixed_precision="no", max_steps=4, compile=False)
    whole, _, peak, *_ = fit(wide.replace(project_name="whole"))
    total = torch.cuda.get_device_properties(device).total_memory
    least = fit(wide.replace(project_name="least", batch_size=1, max_steps=2))[2]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((least + 0.4 * (peak - least)) / total)
    try: cut, _, less, *_, events = fit(wide.replace(project_name="cut"))
    finally: torch.cuda.set_per_process_memory_fraction(1.0)
    gap, cuts = max(abs(x - y) for x, y in zip(whole, cut)), [e["most_tokens"] for e in events if e["kind"] == "oom"]
    check("memory that runs out: same losses in smaller pieces", bool(cuts) and gap < 1e-3 and less < peak, largest_gap=gap, most_tokens=cuts, peak_GB=less / 1e9, unlimited_GB=peak / 1e9)


def unsloth_against_ours(base):
    "Unsloth's layers under our batches and loss: the losses of our own layers, and what they cost. Loading Unsloth rewrites classes for good, so this comes last."
    options = dict(mixed_precision="bf16", max_steps=8, padding="right", compile=False)
    plans = {"LoRA": base.replace(peft=True, lora_dropout=0.0, lr=1e-3, **options), "LoRA on int4": base.replace(peft=True, lora_dropout=0.0, lr=1e-3, quantization="int4", **options), "full": base.replace(**options)}
    own = {name: fit(plan.replace(project_name=f"own-{name}")) for name, plan in plans.items()}
    for name, plan in plans.items():
        losses, seconds, peak, trained, run, events = fit(plan.replace(project_name=f"unsloth-{name}", unsloth=True))
        gap, facts = max(abs(x - y) for x, y in zip(losses, own[name][0])), next(e for e in events if e["kind"] == "plan")
        used = any("layers are Unsloth's" in e.get("text", "") for e in events)
        check(f"Unsloth, {name}: the losses of our layers", used and abs(losses[0] - own[name][0][0]) < 0.05 and losses[-1] < losses[0], first=losses[0], own_first=own[name][0][0], last=losses[-1], own_last=own[name][0][-1], largest_gap=gap,
              padding_free=facts["padding_free"], step_ms=1000 * seconds, own_step_ms=1000 * own[name][1], peak_GB=peak / 1e9, own_peak_GB=own[name][2] / 1e9)
        if plan.peft:
            reloaded, tokenizer = load_trained(run.path, torch.bfloat16, best_device(), plan.quantization)
            check(f"Unsloth, {name}: the adapter loads without it", any("lora" in n for n, _ in reloaded.named_parameters()))
        del trained


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=("memory", "unsloth"), help="these checks alone")
    parser.add_argument("--layers", type=int, default=12); parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tiny", action="store_true"); parser.add_argument("--out"); parser.add_argument("--worker", help="a recipe to carry out as one of several processes")
    a = parser.parse_args()
    if a.worker:
        Trainer(Recipe.from_yaml(a.worker)).fit()
        return 0
    if a.tiny: a.layers, a.hidden = 2, 64
    device = best_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}, transformers {__import__('transformers').__version__}, {time.strftime('%Y-%m-%d')}", flush=True)
    os.chdir(tempfile.mkdtemp())
    model = make_model("model", a.layers, a.hidden)
    rows = [{"messages": [{"role": "user", "content": f"turn on light {i} " + "please " * (i % 40)}, {"role": "assistant", "content": f"light {i % 7} on " + "now " * (i % 25)}]} for i in range(400)]
    data = write_jsonl("chat.jsonl", rows)
    base = Recipe(model=model, data_path=data, project_name="p", chat_template="chatml", max_steps=12, batch_size=8, gradient_accumulation=2, lr=1e-4, warmup_ratio=0.0, valid_split=20)

    if a.only:
        memory_that_runs_out(base, device) if a.only == "memory" else unsloth_against_ours(base)
        return finish(a)
    loader = train_loader(Trainer(base).data)
    expected = truth(model, [b for b, _ in zip(loader, range(2))])
    peaks, runs = {}, {}
    for precision, tolerance in ("no", 1e-4), ("bf16", 2e-3), ("fp16", 2e-3):
        try: losses, seconds, peak, trained, run, _ = fit(base.replace(project_name=f"full-{precision}", mixed_precision=precision))
        except ModelError as e: check(f"full fine-tune {precision}", device.type == "cpu" and precision == "fp16", refused=str(e)[:60]); continue
        check(f"full fine-tune {precision}: step-1 loss is the fp32 truth", abs(losses[0] - expected) < tolerance * expected, loss=losses[0], truth=expected, step_ms=1000 * seconds, peak_GB=peak / 1e9)
        check(f"full fine-tune {precision}: learns", losses[-1] < losses[0] - 0.3, first=losses[0], last=losses[-1])
        runs[precision] = losses, seconds
        if precision != "no" and device.type == "cuda": check(f"full fine-tune {precision}: really computes in {precision}", losses != runs["no"][0], largest_gap=max(abs(x - y) for x, y in zip(losses, runs["no"][0])))
        check(f"full fine-tune {precision}: master weights stay fp32", {p.dtype for p in trained.parameters()} == {torch.float32})
        del trained
    if device.type == "cuda": check("the best format is chosen unasked", next(e for e in fit(base.replace(project_name="auto", max_steps=1))[5] if e["kind"] == "plan")["dtype"] == "bfloat16")

    for bits in None, "int8", "int4":
        losses, seconds, peak, trained, run, _ = fit(base.replace(project_name=f"lora-{bits}", peft=True, lora_r=16, quantization=bits, lr=1e-3))
        layers = [m for m in trained.modules() if type(m).__module__.startswith("bitsandbytes") and hasattr(m, "weight")]
        peaks[bits] = sum(p.numel() * p.element_size() for n, p in trained.named_parameters() if "proj" in n and "lora" not in n)
        check(f"LoRA on {bits or 'unquantised'} base: learns", losses[-1] < losses[0], first=losses[0], last=losses[-1], step_ms=1000 * seconds, peak_GB=peak / 1e9, linear_weight_MB=peaks[bits] / 1e6)
        if bits: check(f"{bits}: every linear layer is quantised", len(layers) == 7 * a.layers and all(m.weight.dtype == (torch.uint8 if bits == "int4" else torch.int8) for m in layers))
        check(f"LoRA on {bits or 'unquantised'} base: adapter is fp32", {p.dtype for p in trained.parameters() if p.requires_grad} == {torch.float32})
        reloaded, tokenizer = load_trained(run.path, torch.bfloat16 if device.type == "cuda" else torch.float32, device, bits)
        ids = torch.tensor([tokenizer("turn on the light")["input_ids"]], device=device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"): before, after = trained(ids).logits.float(), reloaded(ids).logits.float()
        gap = ((after - before).norm() / before.norm()).item()
        check(f"LoRA on {bits or 'unquantised'} base: reloaded gives the same logits", gap < (2e-3 if device.type == "cuda" else 1e-6), relative_gap=gap)
        del trained, reloaded
    check("int4 weights take a quarter of bf16's" if device.type == "cuda" else "int4 weights take an eighth of fp32's", peaks["int4"] * (3.9 if device.type == "cuda" else 7.8) < peaks[None], ratio=peaks[None] / peaks["int4"])

    on, off = (fit(base.replace(project_name=f"gc-{gc_}", gradient_checkpointing=gc_, mixed_precision="no", max_steps=4)) for gc_ in (True, False))
    check("recomputing activations: same losses", max(abs(x - y) for x, y in zip(on[0], off[0])) < 1e-4, gap=max(abs(x - y) for x, y in zip(on[0], off[0])), peak_on_GB=on[2] / 1e9, peak_off_GB=off[2] / 1e9)
    noted = fit(base.replace(project_name="flash", use_flash_attention_2=True, max_steps=1))[5]
    check("flash-attn is used or its fallback named", any("flash" in e.get("text", "") for e in noted) or bool(find_spec("flash_attn")))
    memory = next(e for e in reversed(noted) if e["kind"] == "memory")
    check("the gauge reads this device", memory["device"] == name and 0 < memory["allocated_bytes"] <= memory["limit_bytes"], allocated_GB=memory["allocated_bytes"] / 1e9, limit_GB=memory["limit_bytes"] / 1e9)

    packed = base.replace(packing=True, max_seq_length=512, batch_size=4, gradient_accumulation=1)
    first = next(iter(train_loader(Trainer(packed.replace(project_name="x")).data)))
    expected = documents_truth(model, first)
    for precision, tolerance in ("no", 1e-4), ("bf16", 2e-3) if device.type == "cuda" else ("no", 1e-4):
        losses, seconds, peak, *_, events = fit(packed.replace(project_name=f"packed-{precision}", mixed_precision=precision))
        check(f"packed {precision}: step-1 loss is the fp32 truth of the documents alone", abs(losses[0] - expected) < tolerance * expected, loss=losses[0], truth=expected, documents=int(first["rows"].numel()),
              tokens_per_s=rate(events), peak_GB=peak / 1e9)
    padded = fit(base.replace(project_name="padded", mixed_precision="bf16" if device.type == "cuda" else "no"))
    packed_same = fit(packed.replace(project_name="packed", mixed_precision="bf16" if device.type == "cuda" else "no"))
    check("packing: real tokens per second, packed to padded", True, ratio=rate(packed_same[5]) / rate(padded[5]))

    from sftkit.model import _has_varlen
    check("rows go without padding, through variable-length flash attention", next(e for e in packed_same[5] if e["kind"] == "plan")["padding_free"] and (_has_varlen(device) or device.type != "cuda"))
    plain, compiled = (fit(base.replace(project_name=f"compiled-{c}", compile=c, max_steps=6)) for c in (False, True))
    gap = max(abs(x - y) for x, y in zip(plain[0], compiled[0]))
    check("compiled layers: the losses of plain ones", gap < (0.05 if device.type == "cuda" else 1e-4), largest_gap=gap, step_ms=1000 * compiled[1], plain_step_ms=1000 * plain[1])
    if device.type == "cuda":
        Path("fsdp.yaml").write_text(base.replace(project_name="fsdp", distributed_backend="fsdp", gpus=torch.cuda.device_count() if torch.cuda.device_count() > 1 else None, max_steps=6).to_yaml())
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(torch.cuda.device_count()), str(Path(__file__).resolve()), "--worker", "fsdp.yaml"], capture_output=True, text=True)
        losses = [e["loss"] for e in RunDirectory("fsdp").events() if e["kind"] == "step"] if done.returncode == 0 else []
        gap = max((abs(x - y) for x, y in zip(losses, plain[0])), default=float("inf")) if torch.cuda.device_count() == 1 else 0.0
        check("FSDP: the losses of an unsharded model, and a result that loads", len(losses) == 6 and gap < 0.05 and load_base("fsdp") is not None, processes=torch.cuda.device_count(), largest_gap=gap)
        if done.returncode: print(done.stderr[-3000:])

    lora = base.replace(peft=True, lora_dropout=0.0, lr=1e-3, max_steps=4)
    for bits in None, "int4":
        *_, events = fit(lora.replace(project_name=f"teacher-{bits}", use_distillation=True, teacher_model=model, teacher_quantization=bits))
        kl = [e["kl"] for e in events if e["kind"] == "step"]
        check(f"distillation, teacher {bits or 'unquantised'}: KL to itself at step 1", abs(kl[0]) < (0.05 if bits else 1e-3 if device.type == "cuda" else 1e-5), kl=kl[0], last=kl[-1])
    for optimizer in "adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_fused":
        losses, _, peak, *_ = fit(base.replace(project_name=optimizer, optimizer=optimizer))
        check(f"{optimizer}: learns", losses[-1] < losses[0] - 0.3, first=losses[0], last=losses[-1], peak_GB=peak / 1e9)
    losses, _, _, trained, run, _ = fit(lora.replace(project_name="merge", quantization="int4", max_steps=12))
    merged = merge(run.path, "merged", [first["input_ids"][0, :64].tolist()], trained, device)
    check("int4 run merged into the full-precision base", merged.max_difference < 1e-3 * 30 and merged.dtype == "float32", to_adapter=merged.max_difference, to_trained=merged.trained_difference)

    if device.type == "cuda":
        memory_that_runs_out(base, device)
        if find_spec("unsloth"): unsloth_against_ours(base)
    return finish(a)


def finish(a):
    if a.out: Path(a.out).write_text(json.dumps(results, indent=1))
    failed = sum(not r["ok"] for r in results)
    print(f"{len(results) - failed} passed, {failed} failed")
    return failed


if __name__ == "__main__": sys.exit(main())
