"""Several processes and machines: the losses of one process at the same effective batch, and configurations that are written down."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sftkit import Run, Recipe, Session
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


def same_as_one(folder, name, tolerance=1e-5):
    one, other = Run.open(folder/"one"), Run.open(folder/name)
    assert other.state == "finished" and len(one.history) == len(other.history) == 6
    assert (one.history.loss - other.history.loss).abs().max() < tolerance, (one.history.loss.tolist(), other.history.loss.tolist())
    assert [e["loss"] for e in other.events if e["kind"] == "eval"] == pytest.approx([e["loss"] for e in one.events if e["kind"] == "eval"], abs=tolerance)
    from safetensors.torch import load_file
    a, b = (load_file(r.path/"model.safetensors") for r in (one, other))
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


DEEPSPEED = next((p for p in (Path(sys.prefix)/"deepspeed", Path(os.environ.get("SFTKIT_DEEPSPEED", "/nonexistent"))) if (p/"deepspeed").is_dir()), None)


@pytest.mark.skipif(DEEPSPEED is None, reason="deepspeed is not built in this environment (`make test` tries to)")
@pytest.mark.parametrize("peft", [False, True], ids=["zero3", "lora-zero2"])
def test_acceptance_30_deepspeed_trains_as_one_process(folder, peft):
    extensions = str(folder/"extensions")            # what DeepSpeed compiles; in its usual place, a build that was killed leaves a lock that all later ones wait for
    env = dict(TORCH_EXTENSIONS_DIR=extensions, PYTHONPATH=f"{ROOT}{os.pathsep}{DEEPSPEED}", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    name, more = ("lora", ["--peft", "--lora-dropout", 0]) if peft else ("zero", [])
    code, out = sftkit(folder, "--project-name", name, "--distributed-backend", "deepspeed", "--gpus", 2, "--batch-size", 2, "--gradient-accumulation", 2, *more, **env)
    assert code == 0, out
    config = json.loads((folder/name/"deepspeed.json").read_text())
    assert config["zero_optimization"]["stage"] == (2 if peft else 3) and config["train_batch_size"] == 8
    if not peft: return same_as_one(folder, name)
    code, out = sftkit(folder, "--project-name", "lora-one", "--batch-size", 2, "--gradient-accumulation", 4, *more)
    assert code == 0, out
    a, b = Run.open(folder/"lora-one").history.loss, Run.open(folder/"lora").history.loss
    assert len(a) == len(b) == 6 and (a - b).abs().max() < 1e-5


def test_missing_deepspeed_and_fsdp_on_a_cpu_are_refused_before_anything_loads(folder, monkeypatch, tmp_path):
    import torch
    from sftkit.training import check_backend, sharding_config
    monkeypatch.setattr("sftkit.training.importlib.util.find_spec", lambda name: None)
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
    env = dict(TORCH_EXTENSIONS_DIR=str(tmp_path/"extensions"), PYTHONPATH=f"{ROOT}{os.pathsep}{DEEPSPEED}", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    assert "same as whole, tied" in sharded_worker("zero3.py", tmp_path/"m", **env)
