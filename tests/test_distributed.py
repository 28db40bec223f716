"""Several processes and machines: the losses of one process at the same effective batch, and configurations that are written down."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sftkit import Run, Recipe
from sftkit.launch import launch_command
from sftkit.recipe import RecipeError, RunError
from running import ROOT, environment
from tiny import save_tiny, write_jsonl

ROWS = [dict(prompt="what is it " * (i % 5 + 1), completion="the light in the kitchen " * (i % 3 + 1)) for i in range(22)]
COMMON = "--model m --data-path d.jsonl --epochs 2 --lr 1e-3 --valid-split 4 --use-enhanced-eval --eval-metrics perplexity,exact_match --eval-max-new-tokens 4".split()


def sftkit(cwd, *args, wait=True, **env):
    env = environment(**{"OMP_NUM_THREADS": "1", **env})
    started = subprocess.Popen([sys.executable, "-m", "sftkit", "llm", *COMMON, *map(str, args)], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if not wait: return started
    out = started.communicate(timeout=600)[0]
    return started.returncode, out


pytestmark = pytest.mark.xdist_group("distributed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    save_tiny(folder/"m"); write_jsonl(folder/"d.jsonl", ROWS)
    code, out = sftkit(folder, "--project-name", "one", "--batch-size", 2, "--gradient-accumulation", 4)
    assert code == 0, out
    return folder


def same_as_one(folder, name, tolerance=1e-5, one="one"):
    one, other = Run.open(folder/one), Run.open(folder/name)
    assert other.state == "finished" and len(one.history) == len(other.history) > 3
    assert (one.history.loss - other.history.loss).abs().max() < tolerance, (one.history.loss.tolist(), other.history.loss.tolist())
    assert [e["loss"] for e in other.events if e["kind"] == "eval"] == pytest.approx([e["loss"] for e in one.events if e["kind"] == "eval"], abs=tolerance)
    plans = [[(e["padding_free"], e["total_parameters"], e["trainable_parameters"]) for e in r.events if e["kind"] == "plan"] for r in (one, other)]
    assert plans[0][0] == plans[1][0]
    samples = [[e["text"] for e in r.events if e["kind"] == "sample" and e["when"] == "before"] for r in (one, other)]
    assert samples[0] == samples[1] and len(samples[0]) > 0
    from safetensors.torch import load_file
    a, b = (load_file(next(f for f in (r.path/"model.safetensors", r.path/"adapter_model.safetensors") if f.exists())) for r in (one, other))
    assert sorted(a) == sorted(b) and max(float((a[k].float() - b[k].float()).abs().max()) for k in a) < tolerance


def test_acceptance_30_accelerate_launch_trains_as_one_process(folder):
    "What `accelerate launch` does on two GPUs, here with gloo on a CPU."
    env = environment(OMP_NUM_THREADS="1")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = subprocess.run([*launcher, "-m", "sftkit", "llm", *COMMON, "--project-name", "accelerated", "--batch-size", "2", "--gradient-accumulation", "2"], cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    same_as_one(folder, "accelerated")


def test_acceptance_30_two_machines_meet_and_train_as_one(folder):
    args = ["--project-name", "machines", "--nodes", 2, "--gpus", 1, "--batch-size", 2, "--gradient-accumulation", 2]
    import socket
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    agents = [sftkit(folder, *args, wait=False, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="") for _ in range(2)]
    outputs = [a.communicate(timeout=600)[0] for a in agents]
    assert [a.returncode for a in agents] == [0, 0], outputs
    same_as_one(folder, "machines")


def test_acceptance_30_machines_without_a_meeting_place_are_told_what_to_type(tmp_path, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(RecipeError, match="MASTER_ADDR=<address of the first machine>"):
        launch_command(Recipe(model="m", data_path="d", project_name="p", nodes=2), 1)
    monkeypatch.setenv("MASTER_ADDR", "nowhere.invalid")
    with pytest.raises(RecipeError, match="MASTER_ADDR=nowhere.invalid.*cannot find that address"):
        launch_command(Recipe(model="m", data_path="d", project_name="p", nodes=2), 1)


def test_acceptance_29_two_processes_log_to_a_tracker(folder):
    "`--log` may stand for `--log-dir` and `--logs-specs` of torchrun, which reads the words of its script too."
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    code, out = sftkit(folder, "--project-name", "logged", "--log", "tensorboard", "--gpus", 2, *SMALL, "--max-steps", 2, CUDA_VISIBLE_DEVICES="")
    assert code == 0, out
    written, = (folder/"logged"/"tensorboard").glob("*/events.out.*")              # by the first process alone
    read = EventAccumulator(str(written.parent)); read.Reload()
    assert [s.value for s in read.Scalars("train/loss")] == pytest.approx(Run.open(folder/"logged").history.loss.tolist(), rel=1e-5)


DEEPSPEED = next((p for p in (Path(sys.prefix)/"deepspeed", Path(os.environ.get("SFTKIT_DEEPSPEED", "/nonexistent"))) if (p/"deepspeed").is_dir()), None)


SMALL = ["--batch-size", 2, "--gradient-accumulation", 2]
SHARED = {"fsdp": dict(PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT/'tests'}", CUDA_VISIBLE_DEVICES="")}
SHARED["deepspeed"] = SHARED["fsdp"] | dict(PYTHONPATH=f"{SHARED['fsdp']['PYTHONPATH']}{os.pathsep}{DEEPSPEED}", DS_ACCELERATOR="cpu")
LORA = ["--peft", "--lora-dropout", 0]
PACKED = ["--packing", "--max-seq-length", 64, "--epochs", 4]


def shared_run(folder, backend, name, *more, code=0, **env):
    "A run of two processes that share the model; returns what each noted."
    done, out = sftkit(folder, "--project-name", name, "--trainer", "watched:Watched", "--distributed-backend", backend, "--gpus", 2, *SMALL, *more, **SHARED[backend], **env)
    assert done == code, out
    return [json.loads((folder/f"{name}-{rank}.json").read_text()) for rank in range(2)]


def loaded_once(seen, whole): # bytes
    "The first process had the model, the other none of it, and then its share."
    first, other = seen
    assert [s["loads"] for s in seen] == [1, 0] and first["loaded"] >= whole and other["loaded"] == 0
    assert 0 < other["most"] < 0.6 * whole and first["flat"] == other["flat"] and first["formats"] == other["formats"]


def reference(folder, name, *more):
    if not (folder/name).exists():
        code, out = sftkit(folder, "--project-name", name, "--batch-size", 2, "--gradient-accumulation", 4, *more)
        assert code == 0, out
    return name


def size(run): return 4 * next(e["total_parameters"] for e in run.events if e["kind"] == "plan")
deepspeed = pytest.param("deepspeed", marks=pytest.mark.skipif(DEEPSPEED is None, reason="deepspeed is not built in this environment (`make test` tries to)"))


EXPERTS = """import torch
from transformers import LlamaConfig, LlamaForCausalLM

class Mixture(torch.nn.Module):
    "Four experts, layers of their own, of which each token goes to one."
    def __init__(self, whole, width):
        super().__init__()
        self.gate, self.experts = torch.nn.Linear(width, 4, bias=False), torch.nn.ModuleList([type(whole)(whole.config) for _ in range(4)])
    def forward(self, x):
        weights, chosen = self.gate(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for i in chosen.unique().tolist(): out = out + self.experts[i](x) * (weights * (chosen == i))[..., None]
        return out

class OwnConfig(LlamaConfig): model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers: layer.mlp = Mixture(layer.mlp, config.hidden_size)
        self.post_init()
"""


def save_experts(folder):
    "A Llama with its own code: a mixture whose experts are layers, so that one to which no token is sent gets no gradient."
    from transformers import AutoConfig, AutoModelForCausalLM
    import torch
    save_tiny(folder)
    (folder/"modeling_own.py").write_text(EXPERTS)
    config = json.loads((folder/"config.json").read_text()) | dict(model_type="own", auto_map={"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"})
    (folder/"config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True).save_pretrained(folder)


def save_mixtral(folder):
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM
    save_tiny(folder)
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**{k: v for k, v in json.loads((folder/"config.json").read_text()).items() if k in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "bos_token_id", "eos_token_id", "pad_token_id")},
        num_local_experts=8, num_experts_per_tok=1)).save_pretrained(folder)


@pytest.mark.parametrize("kind,more", [("lora", LORA), ("tiny-mixtral", []), ("own-experts", ["--trust-remote-code"])], ids=lambda v: v if isinstance(v, str) else "")
def test_ddp_looks_for_missing_gradients_only_where_some_may_be_missing(folder, kind, more):
    "One process and two train alike, an expert without a token included; and PyTorch does not say that it looks in vain."
    if kind != "lora":
        (save_mixtral if "mixtral" in kind else save_experts)(folder/kind)
        more = [*more, "--model", kind]
    one = reference(folder, f"one-{kind}", *more)
    code, out = sftkit(folder, "--project-name", f"ddp-{kind}", "--gpus", 2, *SMALL, *more, CUDA_VISIBLE_DEVICES="")
    assert code == 0 and "find_unused" not in out, out
    same_as_one(folder, f"ddp-{kind}", one=one)


@pytest.mark.parametrize("backend", ["fsdp", deepspeed])
@pytest.mark.parametrize("kind,more", [("full", ()), ("packed-recompute", [*PACKED, "--gradient-checkpointing", "True"])], ids=lambda v: v if isinstance(v, str) else "")
def test_acceptance_30_a_model_in_shares_is_loaded_once_and_trains_as_in_one_process(folder, backend, kind, more):
    one = "one" if kind == "full" else reference(folder, f"one-{kind}", *more)
    seen = shared_run(folder, backend, name := f"{backend}-{kind}", *more)
    loaded_once(seen, size(Run.open(folder/one)))
    config = json.loads((folder/name/f"{backend}.json").read_text())
    assert config["version"] == 2 if backend == "fsdp" else (config["zero_optimization"]["stage"], config["train_batch_size"]) == (3, 8)
    same_as_one(folder, name, one=one)


@pytest.mark.parametrize("backend", ["fsdp", deepspeed])
def test_a_run_in_shares_that_broke_off_is_gone_on_with(folder, backend):
    whole = size(Run.open(folder/"one"))
    shared_run(folder, backend, name := f"{backend}-broken", code=1, BREAKS="4")
    run = Run.open(folder/name)
    assert run.state == "failed" and [step for step, _ in run.directory.checkpoints()] == [3]
    loaded_once(shared_run(folder, backend, name, "--resume"), whole)
    same_as_one(folder, name)


@pytest.mark.parametrize("kind,more", [("lora", ()), ("saved", ["--modules-to-save", "norm"]), ("dora-best", ["--use-dora", "--early-stopping-patience", 1, "--early-stopping-threshold", 100])],
                         ids=lambda v: v if isinstance(v, str) else "")
def test_an_adapter_over_a_base_in_shares_trains_as_in_one_process(folder, kind, more):
    one = reference(folder, f"one-{kind}", *LORA, *more)
    loaded_once(shared_run(folder, "fsdp", f"fsdp-{kind}", *LORA, *more), size(Run.open(folder/one)))
    same_as_one(folder, f"fsdp-{kind}", one=one)


def test_an_adapter_in_fp32_over_a_base_in_bf16_is_shared_out(folder):
    more = [*LORA, "--mixed-precision", "bf16"]
    one, seen = reference(folder, "one-bf16", *more), shared_run(folder, "fsdp", "fsdp-bf16", *more)
    assert [s["loads"] for s in seen] == [1, 0] and seen[1]["loaded"] == 0 and seen[0]["formats"] == seen[1]["formats"] == ["torch.bfloat16", "torch.float32"]
    a, b = Run.open(folder/one).history.loss, Run.open(folder/"fsdp-bf16").history.loss
    assert len(a) == len(b) and (a - b).abs().max() < 0.01


@pytest.mark.skipif(DEEPSPEED is None, reason="deepspeed is not built in this environment (`make test` tries to)")
def test_acceptance_30_deepspeed_shares_an_adapters_optimizer_and_trains_as_one_process(folder):
    seen = shared_run(folder, "deepspeed", "lora", *LORA)
    assert [s["loads"] for s in seen] == [1, 1] and json.loads((folder/"lora"/"deepspeed.json").read_text())["zero_optimization"]["stage"] == 2
    a, b = Run.open(folder/reference(folder, "one-lora", *LORA)).history.loss, Run.open(folder/"lora").history.loss
    assert len(a) == len(b) == 6 and (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("fields,message", [(dict(distributed_backend="ddp"), r"`distributed_backend='ddp'` shares work among two GPUs or more, and this machine shows 1 .*do: leave `distributed_backend` out to train on one\.$"),
                                            (dict(gpus=2), r"`gpus=2` asks for 2 GPUs, and this machine shows 1 .*do: leave `gpus` out to train on one\.$"),
                                            (dict(gpus=4, distributed_backend="fsdp"), "do: leave `gpus` and `distributed_backend` out to train on one"),
                                            (dict(gpus=2, nodes=2), r"`gpus=2` asks for 2 GPUs, and this machine shows 1 .*do: say `gpus=1`\.$")], ids=str)
def test_acceptance_30_one_gpu_is_too_few_for_what_was_typed(fields, message, tiny, chat_file, monkeypatch):
    from sftkit import Session
    from sftkit.launch import launch, process_count_for
    for name in ("CUDA_VISIBLE_DEVICES", "WORLD_SIZE"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    recipe = Recipe(model=tiny, data_path=chat_file, project_name="p", **fields)
    for ask in (process_count_for, launch, lambda r: Session.from_recipe(r).start()):
        with pytest.raises(RecipeError, match=message): ask(recipe)
    with pytest.raises(RunError, match=r"`fit` trains in this one\. Type plan\.start\(\)"): Session.from_recipe(recipe).fit()
    assert not Path("p").exists()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert [process_count_for(recipe.replace(gpus=n, nodes=None)) for n in (None, 2, 4)] == [(4, True), (2, True), (4, True)]


def test_missing_deepspeed_and_fsdp_on_a_cpu_are_refused_before_anything_loads(folder, monkeypatch, tmp_path):
    import torch
    from sftkit.engine import check_backend, sharding_config
    monkeypatch.setattr("sftkit.engine.importlib.util.find_spec", lambda name: None)
    with pytest.raises(RunError, match="pip install deepspeed"): check_backend(Recipe(model="m", data_path="d", project_name="p", distributed_backend="deepspeed"))
    if not torch.cuda.is_available():
        with pytest.raises(RunError, match="needs GPUs"): check_backend(Recipe(model="m", data_path="d", project_name="p", distributed_backend="fsdp"))
    with pytest.raises(RecipeError, match="bitsandbytes"): Recipe(model="m", data_path="d", project_name="p", distributed_backend="fsdp", peft=True, quantization="int4")
    fsdp = sharding_config(Recipe(model="m", data_path="d", project_name="p", distributed_backend="fsdp"), torch.bfloat16, 4)
    assert fsdp["version"] == 2 and fsdp["state_dict_type"] == "FULL_STATE_DICT" and "auto" not in fsdp.values()
    zero = sharding_config(Recipe(model="m", data_path="d", project_name="p", distributed_backend="deepspeed", max_grad_norm=0.5), torch.bfloat16, 4)
    assert zero["bf16"]["enabled"] and not zero["fp16"]["enabled"] and zero["gradient_clipping"] == 0.5 and zero["train_batch_size"] == 8 * 4 * 4 and "auto" not in json.dumps(zero)


def sharded_worker(script, model, **env):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, str(ROOT/"tests"/script), str(model)], env=environment(OMP_NUM_THREADS="1", **env), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("tie", [True, False])
def test_a_loss_in_chunks_is_right_in_a_model_that_fsdp_shares_out(tmp_path, tie):
    "FSDP gathers the head's weight around one call of its module, and the loss uses it chunk by chunk, and again in the backward pass."
    save_tiny(tmp_path/"m", tie=tie)
    assert f"same as whole, {'tied' if tie else 'untied'}" in sharded_worker("sharded.py", tmp_path/"m")


@pytest.mark.skipif(DEEPSPEED is None, reason="deepspeed is not built in this environment (`make test` tries to)")
def test_processes_with_unlike_numbers_of_chunks_do_not_wait_for_each_other_in_zero3(tmp_path):
    "ZeRO-3 gathers a weight at each call of its module, all processes together: one with four chunks of logits and one with two must call the head equally often."
    save_tiny(tmp_path/"m", tie=True)
    env = dict(PYTHONPATH=f"{ROOT}{os.pathsep}{DEEPSPEED}", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    assert "same as whole, tied" in sharded_worker("zero3.py", tmp_path/"m", **env)


LATE = """import os, signal
from sftkit.training import Trainer
from sftkit import engine

class Late(Trainer):
    "Breaks in one process: in its data, at its third step, or by being killed there."
    def preprocess(self, row):
        if self.here("data"): raise ValueError("no such luck")
        return row
    def here(self, how): return os.environ.get("BREAKS") == f"{how} {os.environ.get('RANK')}"
    def _fit(self, view):
        usual = engine.Engine.training_step
        def step(own, *args, **more):
            if own.state.global_step == 2 and self.here("step"): raise ValueError("no such luck")
            if own.state.global_step == 2 and self.here("killed"): os.kill(os.getpid(), signal.SIGKILL)
            return usual(own, *args, **more)
        engine.Engine.training_step = step
        return super()._fit(view)
"""


@pytest.mark.parametrize("how", ["data 0", "step 1", "killed 1"])
def test_acceptance_01_of_several_processes_that_fail_one_says_why_and_nothing_else_is_said(folder, how):
    (folder/"late.py").write_text(LATE)
    name = how.replace(" ", "-")
    said = sftkit(folder, "--project-name", name, "--gpus", 2, *SMALL, "--trainer", "late:Late", wait=False, BREAKS=how, CUDA_VISIBLE_DEVICES="")
    out = said.communicate(timeout=600)[0]
    assert said.returncode == 1 and "Traceback" not in out and "torch/distributed" not in out, out
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and out.rstrip().endswith(errors[0]) and ("SIGKILL" if "killed" in how else "no such luck") in errors[0], out
    if "data" in how: assert not (folder/name).exists()
    else:
        last = Run.open(folder/name).directory.status()
        assert (last["state"], last["error"]) == ("failed", errors[0].removeprefix("error: "))


def test_acceptance_26_a_step_that_is_not_finite_names_the_rows_of_all_processes(folder):
    told = []
    for name, more in (("lost-one", ["--gradient-accumulation", 4]), ("lost-two", ["--gradient-accumulation", 2, "--gpus", 2])):
        code, out = sftkit(folder, "--project-name", name, "--batch-size", 2, *more, "--lr", "1e30", "--warmup-ratio", 0, "--max-grad-norm", 0, CUDA_VISIBLE_DEVICES="")
        told.append(re.search(r"(?:After|At) step (\d+) .*Rows of that step: (.*?)\. ", out).groups())
        assert code == 1 and len(told[-1][1].split(", ")) == 8, out
    assert told[0][0] == told[1][0] and set(told[0][1].split(", ")) == set(told[1][1].split(", "))


def test_the_traceback_of_the_process_that_failed_is_shown_on_request(folder):
    (folder/"late.py").write_text(LATE)
    code, out = sftkit(folder, "--project-name", "shown", "--gpus", 2, *SMALL, "--trainer", "late:Late", "--traceback", BREAKS="step 1", CUDA_VISIBLE_DEVICES="")
    assert code != 0 and 'late.py", line' in out and out.count("ChildFailedError") == 0, out


def test_acceptance_01_a_started_run_of_several_processes_says_why_it_failed(folder, monkeypatch):
    from sftkit import Session
    (folder/"late.py").write_text(LATE)
    monkeypatch.chdir(folder); monkeypatch.syspath_prepend(str(folder))
    for how, why in ("data 1", "`preprocess` failed on d.jsonl line 1: ValueError: no such luck. The row's columns: prompt, completion."), ("step 0", "ValueError: no such luck"):
        monkeypatch.setenv("BREAKS", how)
        run = Session("m", project="started", trainer="late:Late", lr=1e-3, gpus=2, batch_size=2, gradient_accumulation=1).data("d.jsonl").start(resume=False)
        with pytest.raises(RunError) as told: run.wait(120)
        assert str(told.value) == f"The run in `{run.directory.shown}` failed. {why}" and run.state == "failed"


@pytest.mark.skipif(os.name != "posix", reason="signals to a process group")
def test_an_interrupt_of_several_processes_writes_a_checkpoint_and_can_be_gone_on_with(folder, monkeypatch):
    import signal
    from running import until
    args = ["--project-name", "stopped", "--gpus", 2, "--batch-size", 2, "--gradient-accumulation", 2]
    log = open(folder/"log", "w+")
    started = subprocess.Popen([sys.executable, "-m", "sftkit", "llm", *COMMON, *map(str, args), "--epochs", "200"], cwd=folder, stdout=log, stderr=log, start_new_session=True,
                               env=environment(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""))
    until(lambda: (folder/"stopped"/"recipe.yaml").exists() and len(Run.open(folder/"stopped").history) > 2, 120)
    os.killpg(started.pid, signal.SIGINT)                                         # as Ctrl-C in a terminal does
    assert started.wait(120) == 130, (folder/"log").read_text()
    run = Run.open(folder/"stopped")
    assert run.state == "interrupted" and run.directory.checkpoints() and "Traceback" not in (folder/"log").read_text()
    from sftkit import Session
    from sftkit.cli import main
    asked = []
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sftkit.launch.launch", lambda recipe: asked.append(recipe) or 0)                   # what it does with a recipe is shown above
    monkeypatch.setattr(Session, "start", lambda plan, renderer=None: asked.append(plan.recipe))
    assert main(["resume", "stopped"]) == 130                                      # still interrupted, as the stand-in trains nothing
    run.resume()
    assert [(r.resume, r.gpus, r.epochs) for r in asked] == [(True, 2, 200)] * 2
