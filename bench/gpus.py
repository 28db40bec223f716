"""Several GPUs of one machine, checked on one that has them: python bench/gpus.py [--out GPUS.json] [--layers 16 --hidden 2048]

Each way of starting several processes must take the steps of one process with the same rows an update: the launchers of acceptance 30 (`sftkit llm`, `accelerate launch`, `torchrun`, `plan.start`), then
FSDP and DeepSpeed (where it is installed). Then how much faster two are than one. A random Llama is made on the spot. With --tiny it runs on a CPU, two processes with gloo, to try the script itself.
"""
import argparse, json, os, statistics, subprocess, sys, tempfile, time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", SFTKIT_RENDERER="plain", PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from sftkit.events import RunDirectory
from sftkit.model import load_base
from sftkit.recipe import Recipe
from tiny import WORDS, tiny_tokenizer, write_jsonl

results, words = [], WORDS.split()


def check(name, ok, **numbers):
    results.append(dict(check=name, ok=bool(ok), **numbers))
    print(("ok   " if ok else "FAIL ") + name + "  " + "  ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items()), flush=True)


def make(layers, hidden, vocabulary):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64 or 2, num_key_value_heads=max(1, hidden // 256),
                                             max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=2))
    model.save_pretrained("m"); tiny_tokenizer().save_pretrained("m")
    random = torch.Generator().manual_seed(1)
    lengths = torch.exp(torch.randn(512 if hidden > 64 else 48, generator=random) + 5.2).clamp(8, 1900 if hidden > 64 else 120).int().tolist()
    write_jsonl("rows.jsonl", [dict(text=" ".join(words[i] for i in torch.randint(0, len(words), (n,), generator=random).tolist())) for n in lengths])


def run(name, launcher, recipe, processes=2):
    "Carry a recipe out with a launcher's command; returns its events, with the time from start to end."
    r = recipe.replace(project_name=name)
    (Path(name + ".yaml")).write_text(r.to_yaml())
    env = {**os.environ, "OMP_NUM_THREADS": "4"}
    began = time.monotonic()
    done = subprocess.run([*launcher, "llm", "--config", name + ".yaml"], capture_output=True, text=True, env=env)
    if done.returncode: print(done.stdout[-1500:], done.stderr[-3000:])
    events = RunDirectory(name).events() if Path(name).exists() else []
    return [e for e in events if e["kind"] == "step"], time.monotonic() - began, done.returncode


def gap(a, b): return max((abs(x["loss"] - y["loss"]) for x, y in zip(a, b)), default=float("inf")) if len(a) == len(b) else float("inf")
def rate(steps, processes=1): return statistics.median(processes * e["seq_tokens"] / e["seconds"] for e in (steps[3:-1] or steps))


def launchers(base, sftkit, torchrun, accelerate):
    one, _, code = run("one", sftkit, base.replace(gradient_accumulation=2))
    if code: sys.exit("One process did not train; its output stands above.")
    check("one process, which uses one GPU however many there are", len(one) == base.max_steps, last=one[-1]["loss"], tokens_per_s=rate(one))
    for name, launcher, fields in (("sftkit llm --distributed-backend ddp", sftkit, dict(distributed_backend="ddp", gpus=2)), ("torchrun -m sftkit llm", torchrun, {}), ("accelerate launch -m sftkit llm", accelerate, {})):
        steps, seconds, code = run(name.split()[0], launcher, base.replace(**fields))
        check(f"{name}: the losses of one process", code == 0 and gap(steps, one) < 1e-3, largest_gap=gap(steps, one), tokens_per_s=rate(steps, 2) if steps else 0, wall_s=seconds)
    if find_spec("anywidget"):
        from sftkit import Session
        done = Session.from_recipe(base.replace(project_name="started")).start(gpus=2).wait(400)
        steps = [e for e in done.events if e["kind"] == "step"]
        check("plan.start(gpus=2): the losses of one process", gap(steps, one) < 1e-3, largest_gap=gap(steps, one))


def sharding(half, sftkit, cuda):
    plain, *_ = run("plain", sftkit, half.replace(gradient_accumulation=2))
    for backend in (["fsdp"] if cuda else []) + (["deepspeed"] if find_spec("deepspeed") else []):
        for kind, fields in (("full", {}), ("LoRA", dict(peft=True, lora_dropout=0.0, lr=1e-3))):
            reference = plain if kind == "full" else run("plain-lora", sftkit, half.replace(gradient_accumulation=2, **fields))[0]
            steps, seconds, code = run(f"{backend}-{kind}", sftkit, half.replace(distributed_backend=backend, gpus=2, **fields))
            loads = code == 0 and (load_base(f"{backend}-{kind}") is not None if kind == "full" else Path(f"{backend}-{kind}/adapter_model.safetensors").exists())
            check(f"{backend}, {kind}: the losses of one process, and a result that loads", loads and gap(steps, reference) < 0.05, largest_gap=gap(steps, reference), wall_s=seconds)


def speed(half, sftkit, cuda):
    fast = half.replace(peft=True, lora_dropout=0.0, packing=True, max_seq_length=2048 if cuda else 128, batch_size=4, max_steps=-1, epochs=4)
    single, *_ = run("fast-1", sftkit, fast)
    double, *_ = run("fast-2", sftkit, fast.replace(distributed_backend="ddp", gpus=2))
    check("LoRA, packed: real tokens per second, two to one", bool(single and double), one=rate(single), two=rate(double, 2), ratio=rate(double, 2) / rate(single))


def main():
    a = argparse.ArgumentParser(); a.add_argument("--out"); a.add_argument("--only", nargs="*", choices=("launchers", "sharding", "speed"), default=("launchers", "sharding", "speed")); a.add_argument("--tiny", action="store_true"); a.add_argument("--layers", type=int, default=12); a.add_argument("--hidden", type=int, default=1024); a = a.parse_args()
    cuda = torch.cuda.is_available()
    if not a.tiny and torch.cuda.device_count() < 2: sys.exit(f"This machine shows {torch.cuda.device_count()} GPUs; two are needed.")
    out = a.out and Path(a.out).resolve()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        os.chdir(folder)
        make(*((2, 64, 600) if a.tiny else (a.layers, a.hidden, 32000)))
        sftkit, torchrun = [sys.executable, "-m", "sftkit"], [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sftkit"]
        accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--multi_gpu", "-m", "sftkit"]
        base = Recipe(model="m", data_path="rows.jsonl", project_name="x", batch_size=4, gradient_accumulation=1, max_steps=4 if a.tiny else 10, lr=1e-4, mixed_precision="no", compile=False, save_steps=10**6)
        half = base.replace(mixed_precision=None if cuda else "no")
        if "launchers" in a.only: launchers(base, sftkit, torchrun, accelerate)
        if "sharding" in a.only: sharding(half, sftkit, cuda)
        if "speed" in a.only: speed(half, sftkit, cuda)
        os.chdir("/")
    about = dict(device=torch.cuda.get_device_name() if cuda else "cpu", gpus=torch.cuda.device_count(), torch=torch.__version__, date=time.strftime("%Y-%m-%d"))
    if out: out.write_text(json.dumps(dict(about=about, results=results), indent=1))
    failed = sum(not r["ok"] for r in results)
    print(json.dumps(about), f"{len(results) - failed} passed, {failed} failed")
    return failed


if __name__ == "__main__": sys.exit(main())
