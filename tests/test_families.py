"""What a family of models, a launcher or a short run brings with it: found out before anything loads, or done as the recipe says."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import CHAT
from sftkit import Run, train
from sftkit.recipe import ModelError, RunError
from running import chat_plan, environment, steps
from tiny import tiny_model, tiny_tokenizer

MARKERS = ("<|im_start|>", "<|im_end|>")


def plan_for(model, project="run", source=CHAT, **fields):
    return chat_plan(model, project, source, **{**dict(max_steps=2, batch_size=4, gradient_accumulation=1), **fields})


def notes(run): return " ".join(e["text"] for e in run.events if e["kind"] == "note")


def saved(folder, family, **more):
    "A random model of a family, with a tokenizer that knows the chatml markers."
    tok = tiny_tokenizer(extra=MARKERS)
    ids = dict(bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
    torch.manual_seed(0)
    shape = dict(vocab_size=len(tok), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = getattr(transformers, family + "ForCausalLM")(getattr(transformers, family + "Config")(**{**shape, **ids, **more}))
    model.save_pretrained(folder); tok.save_pretrained(folder)
    return str(folder)


# -- a run of one step ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant_with_warmup"])
def test_a_run_of_one_step_trains(tiny, scheduler):
    run = plan_for(tiny, max_steps=1, scheduler=scheduler).fit()
    before, after = (dict(transformers.AutoModelForCausalLM.from_pretrained(m).named_parameters()) for m in (tiny, "run"))
    assert steps(run, "lr") == [1e-2] and any((before[n] - p).abs().max() > 1e-3 for n, p in after.items())


# -- packing and flash-attn ----------------------------------------------------------------------------------------------------------

def test_packing_takes_the_attention_that_stands_in_for_flash_attn(tiny):
    plain, asked = (plan_for(tiny, f"flash-{flash}", packing=True, max_steps=3, use_flash_attention_2=flash).fit() for flash in (False, True))
    assert steps(asked) == steps(plain) and "scaled_dot_product_attention is used instead" in notes(asked)


# -- a teacher with fewer positions --------------------------------------------------------------------------------------------------

def test_rows_are_cut_at_the_positions_of_the_teacher(tmp_path):
    tok = tiny_tokenizer(extra=MARKERS)
    student, teacher = str(tmp_path/"student"), str(tmp_path/"teacher")
    short = tiny_model(tok, cls="gpt2").config
    short.n_positions = 64
    for folder, model in ((student, tiny_model(tok)), (teacher, transformers.GPT2LMHeadModel(short))):
        model.save_pretrained(folder); tok.save_pretrained(folder)
    rows = [{"text": "the kitchen light " * 60 + str(i)} for i in range(16)]
    plan = plan_for(student, source=rows, use_distillation=True, teacher_model=teacher, chat_template=None)
    assert max(b["input_ids"].shape[1] for b in plan.batches()) == 64
    run = plan.fit()
    assert len(steps(run)) == 2 and f"the teacher `{teacher}` has 64 positions: rows are cut at 64" in notes(run) and run.recipe.max_seq_length == 64
    with pytest.raises(ModelError, match=f"block_size=128` is more than the 64 positions of `{teacher}`"): plan.options(block_size=128, project_name="b").fit()
    free = plan_for(student, "free", rows, chat_template=None).fit()
    assert free.recipe.max_seq_length == 2048


# -- processes that the recipe is not for --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fields,env,said", [
    (dict(gpus=4, distributed_backend="ddp"), dict(WORLD_SIZE=1), "`gpus=4`, `distributed_backend='ddp'`, and what was started is 1 process on one machine"),
    (dict(gpus=4), dict(WORLD_SIZE=1), "without WORLD_SIZE=1 in the environment.*leave `gpus=4` out"),
    (dict(distributed_backend="ddp"), dict(WORLD_SIZE=1, LOCAL_WORLD_SIZE=1), "leave `distributed_backend='ddp'` out"),
    (dict(gpus=4), dict(WORLD_SIZE=2, LOCAL_WORLD_SIZE=2), "2 processes on one machine.*say `gpus=2`"),
    (dict(nodes=3), dict(WORLD_SIZE=4, LOCAL_WORLD_SIZE=2, GROUP_WORLD_SIZE=2), "2 processes on each of 2 machines.*say `gpus=2`, `nodes=2`")], ids=str)
def test_processes_that_the_recipe_is_not_for_are_refused_before_anything_loads(tiny, chat_file, monkeypatch, fields, env, said):
    from sftkit.training import Trainer
    plan = plan_for(tiny, source=chat_file, **fields)
    for name, value in env.items(): monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("sftkit.model.load_base", None); monkeypatch.setattr("sftkit.training.prepare", None)
    for go in (plan.fit, plan.start, lambda: train(plan.recipe), Trainer(plan.recipe).fit):
        with pytest.raises(RunError, match=said): go()
    assert not Path("run").exists()


def test_processes_that_the_recipe_is_for_are_let_through(monkeypatch):
    from sftkit.engine import check_processes
    from sftkit.recipe import Recipe
    for fields, env in ((dict(), dict(WORLD_SIZE=1)), (dict(gpus=1), dict(WORLD_SIZE=1)), (dict(gpus=2, distributed_backend="ddp"), dict(WORLD_SIZE=2, LOCAL_WORLD_SIZE=2)),
                        (dict(distributed_backend="ddp"), dict(WORLD_SIZE=3, LOCAL_WORLD_SIZE=1, GROUP_WORLD_SIZE=2)), (dict(gpus=2, nodes=2), dict(WORLD_SIZE=4)), (dict(gpus=1), {})):
        with monkeypatch.context() as patch:
            for name, value in env.items(): patch.setenv(name, str(value))
            check_processes(Recipe(model="m", data_path="d", project_name="p", **fields))


def test_a_launcher_that_starts_one_process_for_a_recipe_of_four_is_refused(tiny, chat_file):
    args = plan_for(tiny, source=chat_file, gpus=4, distributed_backend="ddp").recipe.to_args()
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", "sftkit", "llm", *args],
                          capture_output=True, text=True, timeout=120, env=environment(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"))
    assert done.returncode != 0 and "what was started is 1 process" in done.stderr and not Path("run").exists()


# -- mixtures of experts -------------------------------------------------------------------------------------------------------------

MIXTURES = {"Mixtral": dict(num_local_experts=4), "Qwen3Moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=16),
            "Qwen2Moe": dict(num_experts=4, moe_intermediate_size=64, shared_expert_intermediate_size=64)}


@pytest.fixture(scope="module", params=MIXTURES)
def mixture(request, tmp_path_factory):
    return request.param, saved(tmp_path_factory.mktemp("mixture")/request.param, request.param, **MIXTURES[request.param])


@pytest.mark.parametrize("how", [{}, dict(dora=True, dropout=0), dict(init="pissa", dropout=0), dict(init="olora")], ids=str)
def test_lora_on_a_mixture_leaves_the_experts_alone(mixture, how):
    from safetensors.torch import load_file
    from sftkit.model import linear_layers, load_base, load_trained
    family, model = mixture
    plan = plan_for(model).lora(r=4, **how)
    run = plan.fit()
    assert f"The experts of {family}ForCausalLM are parameters without layers of their own: they get no adapter." in notes(run)
    stored = load_file("run/adapter_model.safetensors")
    names = {k.split(".lora_")[0].rsplit(".", 1)[-1] for k in stored if ".lora_" in k}
    assert names == set(linear_layers(load_base(model))) >= {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not any(".experts." in k for k in stored)
    if how.get("init"): return                                           # peft stores these against the rewritten base, of a layer of one output with rank 1
    assert plan.memory().parts["adapter"] == 4 * sum(v.numel() for v in stored.values())
    ids = torch.tensor([[5, 9, 300, 44, 61, 7]])
    with torch.no_grad(): assert (load_trained("run")[0](ids).logits - run.model(ids).logits).abs().max() < 1e-5


def test_the_experts_that_int4_leaves_out_are_named_with_their_share(mixture):
    from sftkit.model import experts, load_base
    family, model = mixture
    run = plan_for(model, max_steps=1).quantize("int4").lora(r=4).fit()
    base = load_base(model)
    share = sum(p.numel() for p in experts(base)) / sum(p.numel() for p in base.parameters())
    assert f"they get no adapter and are not held in 4 bit: {share:.0%} of the weights stay as they are." in notes(run) and share > 0.3
    assert all(p.dtype != torch.uint8 for p in experts(run.model.get_base_model()))


def test_a_layer_that_peft_takes_for_the_experts_is_refused(tmp_path):
    "Qwen3-MoE with a plain first layer: peft takes the names of that layer's projections for the experts of the others."
    model = saved(tmp_path/"m", "Qwen3Moe", **MIXTURES["Qwen3Moe"], mlp_only_layers=[0])
    with pytest.raises(ModelError, match="`up_proj` has a name by which peft means the experts of Qwen3MoeForCausalLM"): plan_for(model).lora(targets="q_proj,up_proj").fit()
    assert not Path("run").exists()
    assert len(steps(plan_for(model).lora(r=4).fit())) == 2


# -- layers by which kernels pass ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family,more", [("Mamba", dict(state_size=8)), ("FalconH1", dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1))],
                         ids=["Mamba", "FalconH1"])
def test_all_linear_leaves_out_what_peft_refuses_and_naming_it_is_refused_before_anything_loads(tmp_path, monkeypatch, family, more):
    from safetensors.torch import load_file
    model = saved(tmp_path/"m", family, **more)
    plan = plan_for(model).lora(r=4, dropout=0)
    run = plan.fit()
    stored = load_file("run/adapter_model.safetensors")
    names = {k.split(".lora_")[0].rsplit(".", 1)[-1] for k in stored}
    assert "in_proj" in names and "out_proj" not in names and f"out_proj of {family}ForCausalLM gets no adapter" in notes(run)
    assert plan.memory().parts["adapter"] == 4 * sum(v.numel() for v in stored.values())
    assert plan_for(model, "further", continue_from="run").lora(r=4, dropout=0).fit().state == "finished"
    monkeypatch.setattr("sftkit.model.load_base", None)
    with pytest.raises(ModelError, match=f"LoRA target `out_proj` is a layer of {family}ForCausalLM by which kernels pass, taking its weight"): plan_for(model, "x").lora(targets="in_proj,out_proj").fit()
    assert not Path("x").exists()


# -- linear layers of a class of their own -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def falcon(tmp_path_factory): return saved(tmp_path_factory.mktemp("falcon")/"m", "Falcon", new_decoder_architecture=True, num_kv_heads=2)


def test_a_family_of_which_nothing_is_packed_is_refused_before_anything_loads(falcon, tiny, chat_file, monkeypatch):
    from sftkit.memory import blank_model
    from sftkit.model import load_base
    said = r"Nothing of `.*` can be held in {} bit, so `{}='int{}'` would save no memory: .*beside its head a FalconForCausalLM has none \(its linear layers: FalconLinear\)"
    with pytest.raises(ModelError, match=said.format(4, "quantization", 4)): load_base(falcon, quantization="int4")
    monkeypatch.setattr("sftkit.model.load_base", None)
    for bits in 4, 8:
        plan = plan_for(falcon, source=chat_file).lora(r=4).quantize(f"int{bits}")
        for go in (plan.fit, plan.start, plan.memory, lambda: blank_model(falcon, plan.recipe, quantization=f"int{bits}")):
            with pytest.raises(ModelError, match=said.format(bits, "quantization", bits)): go()
    taught = plan_for(tiny, source=chat_file).distill(falcon).options(teacher_quantization="int4")
    with pytest.raises(ModelError, match=said.format(4, "teacher_quantization", 4)): taught.fit()
    assert not Path("run").exists()


class OwnLinear(torch.nn.Linear): "As Falcon's."


@pytest.mark.parametrize("bits", ["int4", "int8"])
def test_layers_that_are_left_whole_are_named_with_their_share_and_forecast_so(tmp_path, monkeypatch, bits):
    import bitsandbytes as bnb
    from sftkit.memory import held_parts
    from sftkit.model import load_base, load_configuration, structure
    from transformers.models.llama import modeling_llama
    class MLP(modeling_llama.LlamaMLP):
        def __init__(self, config):
            super().__init__(config)
            self.down_proj = OwnLinear(config.intermediate_size, config.hidden_size, bias=False)
    monkeypatch.setattr(modeling_llama, "LlamaMLP", MLP)
    plan = plan_for(saved(tmp_path/"m", "Llama", intermediate_size=128), max_steps=1).quantize(bits).lora(r=4)
    run = plan.fit()
    base = run.model.get_base_model()
    whole = {n: m for n, m in base.named_modules() if isinstance(m, OwnLinear)}
    assert len(whole) == 2 and sum(isinstance(m, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)) for m in base.modules()) == 12
    share = sum(m.weight.numel() for m in whole.values()) / sum(p.numel() for p in structure(load_configuration(plan.recipe.model)).parameters())
    assert f"down_proj of LlamaForCausalLM are layers of a class of its own (OwnLinear), which bitsandbytes does not hold in {bits[-1]} bit: {share:.0%} of" in notes(run) and share > 0.1
    assert plan.memory().parts["weights"] == held_parts(load_base(plan.recipe.model, quantization=bits))["weights"]


def test_what_a_quantised_checkpoint_keeps_whole_is_forecast_so(tmp_path):
    from sftkit.memory import blank_model, held_parts
    from sftkit.model import load_base
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=["lm_head", "down_proj"])
    AutoModelForCausalLM.from_pretrained(saved(tmp_path/"whole", "Llama", intermediate_size=128), quantization_config=packed).save_pretrained(tmp_path/"m")
    base = load_base(str(tmp_path/"m"))
    assert type(base.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert blank_model(str(tmp_path/"m")).parts()["weights"] == held_parts(base)["weights"]


# -- packing with a family that mixes documents --------------------------------------------------------------------------------------

def test_packing_is_refused_before_anything_loads_or_is_set_aside(tmp_path, monkeypatch):
    model = saved(tmp_path/"bloom", "Bloom", n_head=4)
    plan_for(model, max_steps=1).fit()
    monkeypatch.setattr("sftkit.model.load_base", None)
    for go in (plan_for(model, packing=True).fit, plan_for(model, packing=True).start):
        with pytest.raises(ModelError, match="In BloomForCausalLM a packed document sees the one before it.*packing=False"): go()
    assert Run.open("run").state == "finished" and not Path("run.1").exists()


def test_a_teacher_that_mixes_packed_documents_is_refused_likewise(tmp_path, tiny):
    teacher = saved(tmp_path/"bloom", "Bloom", n_head=4)
    with pytest.raises(ModelError, match="In BloomForCausalLM a packed document"): plan_for(tiny, packing=True).distill(teacher).fit()
    assert not Path("run").exists()


@pytest.mark.parametrize("family,more", [("Llama", {}), ("Mistral", dict(sliding_window=7)), ("Qwen3", dict(head_dim=128, hidden_size=512)), ("Gemma2", dict(head_dim=256)),
                                         ("OPT", dict(ffn_dim=512)), ("GPTNeoX", {}), ("Mixtral", dict(num_local_experts=8)), ("Qwen3Moe", dict(num_experts=16, head_dim=64)),
                                         ("GptOss", dict(head_dim=64, num_local_experts=8)), ("Falcon", {}), ("StableLm", {}), ("Bloom", dict(n_head=4))], ids=str)
def test_a_small_copy_says_of_packing_what_the_model_says(family, more):
    from sftkit.loss import check_packing
    from sftkit.memory import small_copy
    config = getattr(transformers, family + "Config")(**{**dict(vocab_size=3000, hidden_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                                                               pad_token_id=2999), **more})
    model, copy = getattr(transformers, family + "ForCausalLM")(config).eval(), small_copy(config)
    def says(m):
        try: return check_packing(m, list(range(3, 51)))
        except ModelError as e: return str(e)
    assert says(copy) == says(model) and (says(copy) is not None) == (family in ("Bloom", "Falcon", "GptOss", "OPT"))
    assert type(copy) is type(model) and sum(p.numel() for p in copy.parameters()) < 400_000 and config.vocab_size == 3000
