"""Several GPUs of one machine, checked on one that has them: python bench/gpus.py [--out GPUS.json] [--layers 16 --hidden 2048]

Each way of starting several processes must take the steps of one process with the same rows an update: the launchers of acceptance 30 (`sftkit llm`, `accelerate launch`, `torchrun`, `plan.start`), then
FSDP and DeepSpeed (where it is installed), which must not load the whole model on any of them; killed and resumed, they must take the same steps. Then how much faster two are than one. A random Llama is
made on the spot. --only takes some of launchers, sharding (or of it fsdp or deepspeed alone) and speed. With --tiny it runs on a CPU, two processes with gloo, to try the script itself.
With --one-gpu two processes share a single GPU, as two machines that NCCL joins over a socket (NCCL_HOSTID tells it that they are two, or it would refuse); sharding alone is checked then.
"""
import argparse, json, os, signal, socket, statistics, subprocess, sys, tempfile, time
from importlib.util import find_spec
from pathlib import Path

import psutil
from runs import CUDA, ROOT, about, check, failed, log_normal_rows, random_llama, results, shared_memory, write

import torch
from sftkit.events import RunDirectory
from sftkit.model import load_base
from sftkit.recipe import Recipe

os.environ.update(SFTKIT_RENDERER="plain", PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))          # for the processes started here
SFTKIT = [sys.executable, "-m", "sftkit"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sftkit"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--multi_gpu", "-m", "sftkit"]


LOADS = """import json, os, torch
from sftkit import engine
from sftkit.training import Trainer

held = lambda p: getattr(p, "_local_tensor", p).nbytes + getattr(p, "ds_tensor", torch.empty(0)).nbytes

class Loads(Trainer):
    "Notes what a process has held, at most, by the time when it has its share of the weights."
    def _fit(self, view):
        def noted(share_out):
            def call(*args):
                model = share_out(*args) or args[0]
                sizes = [getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters()]
                most = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else sum(map(held, model.parameters()))
                with open(f"{self.recipe.project_name}-{os.environ['RANK']}.json", "w") as f: json.dump(dict(most=most, whole=sum(sizes), largest=max(sizes)), f)
                return model
            return call
        for name in ("share_out_fsdp", "share_out_zero3"): setattr(engine, name, noted(getattr(engine, name)))
        return super()._fit(view)
"""


def make(layers, hidden, vocabulary):
    random_llama("m", vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64 or 2,
                 num_key_value_heads=max(1, hidden // 256), max_position_embeddings=4096, tie_word_embeddings=True)
    log_normal_rows("rows.jsonl", *((512, 1900) if hidden > 64 else (48, 120)))
    Path("loads.py").write_text(LOADS)


def steps_of(name): return [e for e in RunDirectory(name).events() if e["kind"] == "step"] if Path(name).exists() else []


def run(name, launcher, recipe, kill_at=None):
    "Carry a recipe out with a launcher's command, killed after step `kill_at` and then resumed; returns its steps, the seconds from start to end, and the exit code."
    r = recipe.replace(project_name=name)
    (Path(name + ".yaml")).write_text(r.to_yaml())
    began, command = time.monotonic(), ["llm", "--config", name + ".yaml"]
    if kill_at:
        started = start(launcher, command, r)
        while len(steps_of(name)) < kill_at and all(process.poll() is None for process in started): time.sleep(0.1)
        for process in [p for agent in started for p in (*psutil.Process(agent.pid).children(recursive=True), agent) if agent.poll() is None]: process.send_signal(signal.SIGKILL)
        for process in started: process.wait()
        if len(steps_of(name)) >= r.max_steps: return [], time.monotonic() - began, "not killed in time"
        command = ["resume", name]
    started = start(launcher, command, r)
    for process in started: process.wait()
    code = max(abs(process.returncode) for process in started)
    if code: print(*(Path(f"{name}-{i}.log").read_text()[-4000:] for i in range(len(started))), sep="\n")
    return steps_of(name), time.monotonic() - began, code


def start(launcher, command, recipe): # a process of each machine that the recipe names, all on this one
    env, started = {**os.environ, "OMP_NUM_THREADS": "4"}, []
    if recipe.nodes:
        with socket.socket() as s: s.bind(("127.0.0.1", 0)); env |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]), NCCL_SOCKET_IFNAME="lo")
    for machine in range(recipe.nodes or 1):
        with open(f"{recipe.project_name}-{machine}.log", "w") as log:
            started.append(subprocess.Popen([*launcher, *command], stdout=log, stderr=subprocess.STDOUT, env=env | dict(NCCL_HOSTID=str(machine)) if recipe.nodes else env))
    return started


def gap(a, b): return max((abs(x["loss"] - y["loss"]) for x, y in zip(a, b)), default=float("inf")) if len(a) == len(b) else float("inf")
def rate(steps, processes=1): return statistics.median(processes * e["seq_tokens"] / e["seconds"] for e in (steps[3:-1] or steps))


def launchers(base):
    one, _, code = run("one", SFTKIT, base.replace(gradient_accumulation=2))
    if code: sys.exit("One process did not train; its output stands above.")
    check("one process, which uses one GPU however many there are", len(one) == base.max_steps, last=one[-1]["loss"], tokens_per_s=rate(one))
    ways = (("sftkit llm --distributed-backend ddp", SFTKIT, dict(distributed_backend="ddp", gpus=2)), ("torchrun -m sftkit llm", TORCHRUN, {}), ("accelerate launch -m sftkit llm", ACCELERATE, {}))
    for name, launcher, fields in ways:
        steps, seconds, code = run(name.split()[0], launcher, base.replace(**fields))
        check(f"{name}: the losses of one process", code == 0 and gap(steps, one) < 1e-3, largest_gap=gap(steps, one), tokens_per_s=rate(steps, 2) if steps else 0, wall_s=seconds)
    if find_spec("anywidget"):
        from sftkit import Session
        done = Session.from_recipe(base.replace(project_name="started")).start(gpus=2).wait(400)
        steps = [e for e in done.events if e["kind"] == "step"]
        check("plan.start(gpus=2): the losses of one process", gap(steps, one) < 1e-3, largest_gap=gap(steps, one))


def sharding(half, backends, two):
    reference = {}
    for backend in backends:
        for kind, fields in (("full", {}), ("LoRA", dict(peft=True, lora_dropout=0.0, lr=1e-3))):
            if kind not in reference: reference[kind], *_ = run(f"plain-{kind}", SFTKIT, half.replace(gradient_accumulation=2, **fields))
            steps, seconds, code = run(f"{backend}-{kind}", SFTKIT, half.replace(distributed_backend=backend, trainer="loads:Loads", **two, **fields))
            loads = code == 0 and (load_base(f"{backend}-{kind}") is not None if kind == "full" else Path(f"{backend}-{kind}/adapter_model.safetensors").exists())
            distance = gap(steps, reference[kind])
            check(f"{backend}, {kind}: the losses of one process, and a result that loads", loads and distance < 0.05, largest_gap=distance, wall_s=seconds)
            saved = half.replace(distributed_backend=backend, save_steps=2, **two, **fields)
            (again, *_), (resumed, seconds, code) = run(f"{backend}-{kind}-again", SFTKIT, saved), run(f"{backend}-{kind}-killed", SFTKIT, saved, kill_at=3)
            check(f"{backend}, {kind}: killed and resumed, the losses of a run that was not", code == 0 and gap(resumed, steps) < 0.005, largest_gap=gap(resumed, steps),
                  largest_gap_of_two_whole_runs=gap(again, steps), wall_s=seconds)
            if backend == "fsdp" or kind == "full":
                notes = [json.loads(f.read_text()) for rank in range(2) if (f := Path(f"{backend}-{kind}-{rank}.json")).exists()]
                most, whole, largest = (max((n[k] for n in notes), default=0) for k in ("most", "whole", "largest"))
                check(f"{backend}, {kind}: no process loads more than its share and a weight", len(notes) == 2 and most < 0.6 * whole + largest, most=most, whole=whole, largest=largest)


def speed(half):
    fast = half.replace(peft=True, lora_dropout=0.0, packing=True, max_seq_length=2048 if CUDA else 128, batch_size=4, max_steps=-1, epochs=4)
    single, *_ = run("fast-1", SFTKIT, fast)
    double, *_ = run("fast-2", SFTKIT, fast.replace(distributed_backend="ddp", gpus=2))
    numbers = dict(one=rate(single), two=rate(double, 2), ratio=rate(double, 2) / rate(single)) if single and double else {}
    check("LoRA, packed: real tokens per second, two to one", bool(numbers), **numbers)


def missing(backend):
    "Why a backend cannot run here; nothing where it can."
    if backend == "fsdp" and not CUDA: return "fsdp is checked on GPUs only"
    if backend == "deepspeed" and not find_spec("deepspeed"): return "deepspeed is not installed"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="a file for the figures")
    parser.add_argument("--only", nargs="*", choices=("launchers", "sharding", "fsdp", "deepspeed", "speed"), default=("launchers", "sharding", "speed"),
                        help="these checks alone; sharding is fsdp and deepspeed")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--one-gpu", action="store_true", help="sharding alone, two processes on one GPU")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    a = parser.parse_args()
    if a.one_gpu: a.only = [o for o in a.only if o not in ("launchers", "speed")]
    if not (a.tiny or a.one_gpu) and torch.cuda.device_count() < 2: sys.exit(f"This machine shows {torch.cuda.device_count()} GPUs; two are needed.")
    backends = [b for b in ("fsdp", "deepspeed") if b in a.only or "sharding" in a.only]
    left_out = [why for b in backends if (why := missing(b))]
    if left_out: print("Left out: " + "; ".join(left_out), flush=True)
    out = a.out and Path(a.out).resolve()
    with tempfile.TemporaryDirectory(dir=shared_memory()) as folder:
        os.chdir(folder)
        make(*((2, 64, 600) if a.tiny else (a.layers, a.hidden, 32000)))
        base = Recipe(model="m", data_path="rows.jsonl", project_name="x", batch_size=4, gradient_accumulation=1, max_steps=4 if a.tiny else 10, lr=1e-4, mixed_precision="no", compile=False,
                      save_steps=10**6)
        half = base.replace(mixed_precision=None if CUDA else "no")
        if "launchers" in a.only: launchers(base)
        sharding(half, [b for b in backends if not missing(b)], dict(gpus=1, nodes=2) if a.one_gpu else dict(gpus=2))
        if "speed" in a.only: speed(half)
        os.chdir("/")
    machine = about(gpus=torch.cuda.device_count())
    if out: write(out, dict(about=machine, results=results))
    print(json.dumps(machine), f"{len(results) - failed()} passed, {failed()} failed")
    return failed()


if __name__ == "__main__": sys.exit(main())
