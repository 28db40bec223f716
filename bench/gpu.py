"""What must hold on a GPU, checked on one: python bench/gpu.py [--layers 16 --hidden 2048] [--out GPU.json]

A random Llama is made on the spot, so nothing is downloaded. Each line is a check with the numbers behind it; the exit code is the number of failed checks.
--only takes some of the groups of checks: precisions, lora, recompute, flash, packing, older, compiled, distillation, optimizers, merging, memory, unsloth.
With --tiny it runs on a CPU, to try the script itself.
"""
import argparse
import os
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from runs import CUDA, check, device_name, failed, forget_peak, older_card, random_llama, results, write

import torch
from safetensors.torch import load_file
from sftkit.export import merge
from sftkit.loss import has_varlen
from sftkit.model import FORMATS, best_device, load_base, load_trained
from sftkit.recipe import ModelError, Recipe
from sftkit.training import Trainer
from sftkit.prepare import train_loader
from tiny import write_jsonl

BEST = "bf16" if CUDA else "no"


def make_model(folder, layers, hidden):
    random_llama(folder, "cpu", extra=("<|im_start|>", "<|im_end|>"), vocab_size=32000, hidden_size=hidden, intermediate_size=hidden * 4, num_hidden_layers=layers,
                 num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 256), tie_word_embeddings=False)


def make_chats(file):
    turns = [(f"turn on light {i} " + "please " * (i % 40), f"light {i % 7} on " + "now " * (i % 25)) for i in range(400)]
    return write_jsonl(file, [{"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]} for asked, said in turns])


def fit(recipe):
    "(losses, median seconds per step, peak bytes, model, run directory, events) of a run without a view; large files are removed at once."
    forget_peak()
    run, model, _ = Trainer(recipe).fit()
    events = run.events()
    steps = [e for e in events if e["kind"] == "step"]
    for _, checkpoint in run.checkpoints(): shutil.rmtree(checkpoint)
    if not recipe.peft: shutil.rmtree(run.path)
    peak = torch.cuda.max_memory_allocated() if CUDA else 0
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


def largest_gap(xs, ys): return max((abs(x - y) for x, y in zip(xs, ys)), default=float("inf"))


def precisions(base):
    "A full fine-tune in each precision: the loss of its first step is the fp32 truth, and it learns."
    expected = truth(base.model, [b for b, _ in zip(train_loader(Trainer(base).data), range(2))])
    in_fp32 = None
    for precision, tolerance in ("no", 1e-4), ("bf16", 2e-3), ("fp16", 2e-3):
        try: losses, seconds, peak, trained, run, _ = fit(base.replace(project_name=f"full-{precision}", mixed_precision=precision))
        except ModelError as e: check(f"full fine-tune {precision}", not CUDA and precision == "fp16", refused=str(e)[:60]); continue
        check(f"full fine-tune {precision}: step-1 loss is the fp32 truth", abs(losses[0] - expected) < tolerance * expected,
              loss=losses[0], truth=expected, step_ms=1000 * seconds, peak_GB=peak / 1e9)
        check(f"full fine-tune {precision}: learns", losses[-1] < losses[0] - 0.3, first=losses[0], last=losses[-1])
        if precision == "no": in_fp32 = losses
        elif CUDA: check(f"full fine-tune {precision}: really computes in {precision}", losses != in_fp32, largest_gap=largest_gap(losses, in_fp32))
        check(f"full fine-tune {precision}: master weights stay fp32", {p.dtype for p in trained.parameters()} == {torch.float32})
        del trained
    if CUDA:
        chosen = next(e for e in fit(base.replace(project_name="auto", max_steps=1))[5] if e["kind"] == "plan")["dtype"]
        check("the best format is chosen unasked", chosen == "bfloat16")


def lora(base):
    "Adapters on a plain, an int8 and an int4 base: learning, formats, memory of the weights, and the same logits when loaded again. Layers trained in full beside one."
    weights, device = {}, best_device()
    for bits in None, "int8", "int4":
        what = f"LoRA on {bits or 'unquantised'} base"
        losses, seconds, peak, trained, run, _ = fit(base.replace(project_name=f"lora-{bits}", peft=True, lora_r=16, quantization=bits, lr=1e-3))
        layers = [m for m in trained.modules() if type(m).__module__.startswith("bitsandbytes") and hasattr(m, "weight")]
        weights[bits] = sum(p.numel() * p.element_size() for n, p in trained.named_parameters() if "proj" in n and "lora" not in n)
        check(f"{what}: learns", losses[-1] < losses[0], first=losses[0], last=losses[-1], step_ms=1000 * seconds, peak_GB=peak / 1e9, linear_weight_MB=weights[bits] / 1e6)
        if bits:
            stored = {m.weight.dtype for m in layers}
            check(f"{bits}: every linear layer is quantised", len(layers) == 7 * trained.config.num_hidden_layers and stored == {torch.uint8 if bits == "int4" else torch.int8})
        check(f"{what}: adapter is fp32", {p.dtype for p in trained.parameters() if p.requires_grad} == {torch.float32})
        reloaded, tokenizer = load_trained(run.path, torch.bfloat16 if CUDA else torch.float32, device, bits)
        ids = torch.tensor([tokenizer("turn on the light")["input_ids"]], device=device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=CUDA): before, after = trained(ids).logits.float(), reloaded(ids).logits.float()
        gap = ((after - before).norm() / before.norm()).item()
        check(f"{what}: reloaded gives the same logits", gap < (2e-3 if CUDA else 1e-6), relative_gap=gap)
        del trained, reloaded
    for precision in ("bf16", "fp16") if CUDA else ("bf16",):
        losses, *_, trained, run, _ = fit(base.replace(project_name=f"saved-{precision}", peft=True, modules_to_save="norm,lm_head", mixed_precision=precision, lr=5e-5))
        check(f"layers trained in full, {precision}: all that is trained is fp32, the rest is not", {p.dtype for p in trained.parameters() if p.requires_grad} == {torch.float32}
              and {p.dtype for p in trained.parameters() if not p.requires_grad} == {FORMATS[precision]})
        stored, before = load_file(run.path / "adapter_model.safetensors"), load_file(f"{base.model}/model.safetensors")
        moved = {n: (stored[f"base_model.model.{n}"].cpu() != before[n].to(FORMATS[precision]).float()).float().mean().item() for n in ("model.norm.weight", "lm_head.weight")}
        check(f"layers trained in full, {precision}: updates of 5e-5 arrive", losses[-1] < losses[0] and min(moved.values()) > 0.9, first=losses[0], last=losses[-1], share_moved=min(moved.values()))
        del trained
    check("int4 weights take a quarter of bf16's" if CUDA else "int4 weights take an eighth of fp32's", weights["int4"] * (3.9 if CUDA else 7.8) < weights[None], ratio=weights[None] / weights["int4"])


def recompute(base):
    on, off = (fit(base.replace(project_name=f"gc-{again}", gradient_checkpointing=again, mixed_precision="no", max_steps=4)) for again in (True, False))
    gap = largest_gap(on[0], off[0])
    check("recomputing activations: same losses", gap < 1e-4, gap=gap, peak_on_GB=on[2] / 1e9, peak_off_GB=off[2] / 1e9)


def flash(base):
    noted = fit(base.replace(project_name="flash", use_flash_attention_2=True, max_steps=1))[5]
    check("flash-attn is used or its fallback named", any("flash" in e.get("text", "") for e in noted) or bool(find_spec("flash_attn")))
    memory = next(e for e in reversed(noted) if e["kind"] == "memory")
    right = memory["device"] == device_name() and 0 < memory["allocated_bytes"] <= memory["limit_bytes"]
    check("the gauge reads this device", right, allocated_GB=memory["allocated_bytes"] / 1e9, limit_GB=memory["limit_bytes"] / 1e9)


def packed_plan(base):
    "The plan that packs, and its first batch."
    packed = base.replace(packing=True, max_seq_length=512, batch_size=4, gradient_accumulation=1)
    return packed, next(iter(train_loader(Trainer(packed.replace(project_name="x")).data)))


def packing(base):
    "Packed rows have the loss of their documents alone, and train more real tokens a second than padded ones."
    packed, first = packed_plan(base)
    expected = documents_truth(base.model, first)
    for precision, tolerance in (("no", 1e-4), ("bf16", 2e-3)) if CUDA else (("no", 1e-4),):
        losses, seconds, peak, *_, events = fit(packed.replace(project_name=f"packed-{precision}", mixed_precision=precision))
        check(f"packed {precision}: step-1 loss is the fp32 truth of the documents alone", abs(losses[0] - expected) < tolerance * expected,
              loss=losses[0], truth=expected, documents=int(first["rows"].numel()), tokens_per_s=rate(events), peak_GB=peak / 1e9)
    padded = fit(base.replace(project_name="padded", mixed_precision=BEST))[5]
    again = fit(packed.replace(project_name="packed", mixed_precision=BEST))[5]
    if CUDA: check("packing: real tokens per second, packed to padded", rate(again) > rate(padded), ratio=rate(again) / rate(padded))
    flat = next(e for e in again if e["kind"] == "plan")["padding_free"]
    check("rows go without padding, through variable-length flash attention", flat and (has_varlen(best_device()) or not CUDA))


def older(base):
    "fp16 and no variable-length kernel: attention takes documents of like length together, in packed rows too."
    expected = truth(base.model, [b for b, _ in zip(train_loader(Trainer(base).data), range(2))])
    packed, first = packed_plan(base)
    for precision, tolerance in (("no", 1e-4), ("fp16", 2e-3)) if CUDA else (("no", 1e-4),):
        with older_card():
            losses, _, _, *_, events = fit(base.replace(project_name=f"older-{precision}", mixed_precision=precision))
            together, *_ = fit(packed.replace(project_name=f"older-packed-{precision}", mixed_precision=precision, max_steps=2))
        flat = next(e for e in events if e["kind"] == "plan")["padding_free"]
        check(f"as on an older card, {precision}: step-1 loss is the fp32 truth, and it learns", flat and abs(losses[0] - expected) < tolerance * expected and losses[-1] < losses[0] - 0.3,
              loss=losses[0], truth=expected, last=losses[-1])
        alone = documents_truth(base.model, first)
        check(f"as on an older card, {precision}: packed rows have the loss of their documents", abs(together[0] - alone) < tolerance * alone, loss=together[0], truth=alone)


def compiled(base):
    plain, fast = (fit(base.replace(project_name=f"compiled-{c}", compile=c, max_steps=6)) for c in (False, True))
    gap = largest_gap(plain[0], fast[0])
    check("compiled layers: the losses of plain ones", gap < (0.05 if CUDA else 1e-4), largest_gap=gap, step_ms=1000 * fast[1], plain_step_ms=1000 * plain[1])


def distillation(base):
    for bits in None, "int4":
        plan = base.replace(peft=True, lora_dropout=0.0, lr=1e-3, max_steps=4, project_name=f"teacher-{bits}", use_distillation=True, teacher_model=base.model, teacher_quantization=bits)
        kl = [e["kl"] for e in fit(plan)[5] if e["kind"] == "step"]
        check(f"distillation, teacher {bits or 'unquantised'}: KL to itself at step 1", abs(kl[0]) < (0.05 if bits else 1e-3 if CUDA else 1e-5), kl=kl[0], last=kl[-1])


def optimizers(base):
    for optimizer in "adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_fused":
        losses, _, peak, *_ = fit(base.replace(project_name=optimizer, optimizer=optimizer))
        check(f"{optimizer}: learns", losses[-1] < losses[0] - 0.3, first=losses[0], last=losses[-1], peak_GB=peak / 1e9)


def merging(base):
    ids = packed_plan(base)[1]["input_ids"][0, :64].tolist()
    *_, trained, run, _ = fit(base.replace(project_name="merge", peft=True, lora_dropout=0.0, lr=1e-3, quantization="int4", max_steps=12))
    merged = merge(run.path, "merged", [ids], trained, best_device())
    check("int4 run merged into the full-precision base", merged.max_difference < 1e-3 * 30 and merged.dtype == "float32", to_adapter=merged.max_difference, to_trained=merged.trained_difference)


def memory_that_runs_out(base):
    "A run that may only take some of what it wants must give the same losses, in smaller pieces."
    wide = base.replace(batch_size=32, gradient_accumulation=1, gradient_checkpointing=False, mixed_precision="no", max_steps=4, compile=False)
    whole, _, peak, *_ = fit(wide.replace(project_name="whole"))
    total = torch.cuda.get_device_properties(best_device()).total_memory
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
    lora = base.replace(peft=True, lora_dropout=0.0, lr=1e-3, **options)
    plans = {"LoRA": lora, "LoRA on int4": lora.replace(quantization="int4"), "full": base.replace(**options)}
    own = {name: fit(plan.replace(project_name=f"own-{name}")) for name, plan in plans.items()}
    for name, plan in plans.items():
        losses, seconds, peak, trained, run, events = fit(plan.replace(project_name=f"unsloth-{name}", unsloth=True))
        gap, facts = max(abs(x - y) for x, y in zip(losses, own[name][0])), next(e for e in events if e["kind"] == "plan")
        used = any("layers are Unsloth's" in e.get("text", "") for e in events)
        check(f"Unsloth, {name}: the losses of our layers", used and abs(losses[0] - own[name][0][0]) < 0.05 and losses[-1] < losses[0],
              first=losses[0], own_first=own[name][0][0], last=losses[-1], own_last=own[name][0][-1], largest_gap=gap,
              padding_free=facts["padding_free"], step_ms=1000 * seconds, own_step_ms=1000 * own[name][1], peak_GB=peak / 1e9, own_peak_GB=own[name][2] / 1e9)
        if plan.peft:
            reloaded, tokenizer = load_trained(run.path, torch.bfloat16, best_device(), plan.quantization)
            check(f"Unsloth, {name}: the adapter loads without it", any("lora" in n for n, _ in reloaded.named_parameters()))
        del trained


def checks():
    "The groups of checks that this machine can make, by name, in their order."
    found = [precisions, lora, recompute, flash, packing, older, compiled, distillation, optimizers, merging]
    groups = {f.__name__: f for f in found}
    if CUDA: groups["memory"] = memory_that_runs_out
    if CUDA and find_spec("unsloth"): groups["unsloth"] = unsloth_against_ours
    return groups


def main():
    groups = checks()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=groups, default=list(groups), help="these checks alone")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", help="a file for the figures")
    a = parser.parse_args()
    if a.tiny: a.layers, a.hidden = 2, 64
    out = a.out and Path(a.out).resolve()
    print(f"{device_name()}, torch {torch.__version__}, transformers {version('transformers')}, {time.strftime('%Y-%m-%d')}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_model("model", a.layers, a.hidden)
        base = Recipe(model="model", data_path=make_chats("chat.jsonl"), project_name="p", chat_template="chatml", max_steps=12, batch_size=8, gradient_accumulation=2, lr=1e-4,
                      warmup_ratio=0.0, valid_split=20)
        for name, group in groups.items():
            if name in a.only: group(base)
            if out: write(out, results)
        os.chdir("/")
    print(f"{len(results) - failed()} passed, {failed()} failed")
    return failed()


if __name__ == "__main__": sys.exit(main())
