"""What a recipe does to the model itself: compiled layers, LoftQ, ready-made quantised weights."""
import contextlib
import shutil
import pytest
import torch

from sftkit import Run, Session
from sftkit.model import add_lora, decoder_layers, load_base, quick_products, steady_attention
from sftkit.recipe import ModelError, Recipe, RecipeError
from tiny import save_tiny, save_tiny_gguf, tiny_model, tiny_tokenizer, write_jsonl

ROWS = [dict(prompt="what is it " * (i % 5 + 1), completion="the light in the kitchen " * (i % 3 + 1)) for i in range(16)]


def test_compiled_layers_train_alike(tmp_path, monkeypatch):
    "The graphs are traced, cut and differentiated; that a compiler then makes C++ of them is PyTorch's affair, and takes half a minute. bench/gpu.py has kernels made."
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, **how: compile(layer, backend="aot_eager", **how))
    torch._dynamo.utils.counters.clear()
    plan = (Session(save_tiny(tmp_path/"m"), project=str(tmp_path/"plain")).data(write_jsonl(tmp_path/"d.jsonl", ROWS))
            .options(batch_size=4, gradient_accumulation=1, epochs=2, lr=1e-3, compile=False, gradient_checkpointing=False,
                     peft=True, target_modules="q_proj", lora_dropout=0, packing=True, max_seq_length=96))
    plain = plan.fit()
    compiled = Session.from_recipe(plan.recipe.replace(project_name=str(tmp_path/"compiled"), compile=True)).fit()
    flags = [next(e["compiled"] for e in r.events if e["kind"] == "plan") for r in (plain, compiled)]
    assert flags == [False, True] and all(layer._compiled_call_impl is not None for layer in decoder_layers(compiled.model))
    assert torch._dynamo.utils.counters["aot_autograd"]["ok"] > 0
    assert len(plain.history) == len(compiled.history) and (plain.history.loss - compiled.history.loss).abs().max() < 1e-4
    from safetensors.torch import load_file
    a, b = (load_file(r.path/"adapter_model.safetensors") for r in (plain, compiled))
    assert sorted(a) == sorted(b) and not any("_orig_mod" in k for k in a)
    prompt = "what is it "
    assert Run.open(compiled.path).generate(prompt, max_new_tokens=8) == compiled.generate(prompt, max_new_tokens=8)


@pytest.mark.parametrize("cls", ["llama", "gpt2"])
def test_loftq_starts_as_the_best_low_rank_part_of_what_quantisation_took(tmp_path, cls):
    import bitsandbytes as bnb
    folder = save_tiny(tmp_path/"m", cls=cls, hidden=64)
    recipe = Recipe(model=folder, data_path="d", project_name="p", peft=True, quantization="int4", init_lora_weights="loftq", lora_r=4, lora_alpha=32)
    model, whole = add_lora(load_base(folder, quantization="int4"), recipe), dict(load_base(folder).named_parameters())
    seen = 0
    for name, layer in model.get_base_model().named_modules():
        if not hasattr(layer, "lora_A") or not isinstance(layer.get_base_layer(), bnb.nn.Linear4bit): continue
        kept = bnb.functional.dequantize_4bit(layer.get_base_layer().weight.data, layer.get_base_layer().weight.quant_state).float()
        weight = whole[f"{name}.weight"].float()
        lost = (weight if weight.shape == kept.shape else weight.T) - kept
        left = lost - 8 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        best = torch.linalg.svdvals(lost)[4:].norm()                 # Eckart-Young: no rank-4 matrix comes closer
        assert best <= left.norm() * (1 + 1e-4) and left.norm() < 1.02 * best < lost.norm()
        seen += 1
    assert seen >= 8


def test_loftq_trains_and_reloads(tmp_path):
    run = (Session(save_tiny(tmp_path/"m", hidden=64), project=str(tmp_path/"r")).data(write_jsonl(tmp_path/"d.jsonl", ROWS)).lora(r=4, init="loftq").quantize("int4")
           .options(batch_size=4, gradient_accumulation=1, epochs=2, lr=1e-3).fit())
    assert run.history.loss.iloc[-1] < run.history.loss.iloc[0]
    assert Run.open(run.path).generate("what is it ", max_new_tokens=6) == run.generate("what is it ", max_new_tokens=6)
    with pytest.raises(RecipeError, match="needs `quantization="): Recipe(model="m", data_path="d", project_name="p", peft=True, init_lora_weights="loftq")


def test_acceptance_28_a_model_that_unsloth_lacks_is_said_with_the_remedy(tmp_path, monkeypatch):
    import sys
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    class FastLanguageModel:
        @staticmethod
        def from_pretrained(*args, **kwargs): raise error
    fake = ModuleType("unsloth")
    fake.FastLanguageModel, fake.__spec__ = FastLanguageModel, ModuleSpec("unsloth", None)
    monkeypatch.setitem(sys.modules, "unsloth", fake)
    monkeypatch.setattr("sftkit.model.unsloth_obstacle", lambda *a: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path)); monkeypatch.setenv("UNSLOTH_DISABLE_STATISTICS", "1"); monkeypatch.setenv("UNSLOTH_COMPILE_LOCATION", str(tmp_path))
    plan = Session(save_tiny(tmp_path/"m"), project=str(tmp_path/"r"), unsloth=True).data(write_jsonl(tmp_path/"d.jsonl", ROWS)).lora(r=4)
    for error in (NotImplementedError("Unsloth: no such family yet!\nMake an issue."), RuntimeError("Unsloth: no such family yet!")):
        with pytest.raises(ModelError, match=r"Unsloth could not load `.*m` \(\w+: Unsloth: no such family yet!\)\. Leave `unsloth` out"): plan.fit(resume=False)
    error = torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(ModelError, match="Memory ran out"): plan.fit(resume=False)


def quantised_plan(tmp_path, bits="int4", **kw):
    "A plan on a checkpoint that comes quantised."
    folder = save_tiny(tmp_path/"m", hidden=64, **kw)
    load_base(folder, quantization=bits).save_pretrained(tmp_path/"ready")
    for name in ("tokenizer.json", "tokenizer_config.json"): shutil.copy(tmp_path/"m"/name, tmp_path/"ready"/name)
    return Session(str(tmp_path/"ready"), project=str(tmp_path/"r")).data(write_jsonl(tmp_path/"d.jsonl", ROWS)).options(batch_size=4, gradient_accumulation=1, epochs=2, lr=1e-2)


def test_a_checkpoint_that_comes_quantised_is_trained_with_an_adapter(tmp_path):
    plan = quantised_plan(tmp_path)
    with pytest.raises(ModelError, match="lora"): plan.fit()
    run = plan.lora(r=4).fit()
    import bitsandbytes as bnb
    assert any(isinstance(m, bnb.nn.Linear4bit) for m in run.model.modules())
    assert run.history.loss.iloc[-1] < run.history.loss.iloc[0]
    assert Run.open(run.path).generate("what is it ", max_new_tokens=6) == run.generate("what is it ", max_new_tokens=6)
    with pytest.raises(ModelError, match="already"): plan.lora(r=4).quantize("int4").fit()
    with pytest.raises(ModelError, match="'pissa'` rewrites the base weights.*stored quantised"): plan.lora(r=4, init="pissa").fit()


@pytest.mark.parametrize("bits,cls,rounding", [("int4", "llama", 1e-4), ("int8", "llama", 0.1), ("int4", "gpt2", 1e-4)])      # of inputs too, in int8
def test_an_adapter_on_a_checkpoint_that_comes_quantised_is_merged_into_what_that_computes_with(tmp_path, bits, cls, rounding):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM
    plan = quantised_plan(tmp_path, bits, cls=cls).lora(r=4, dropout=0)
    run, ids = plan.fit(), torch.tensor([[5, 9, 300, 44, 61, 7]])
    result = run.merge(tmp_path/"out")
    assert result.max_difference < 1e-4 and result.trained_difference < rounding
    merged = AutoModelForCausalLM.from_pretrained(tmp_path/"out")
    with torch.no_grad():
        assert (merged(ids).logits - run.model(ids).logits).abs().max() < rounding
        with run.model.disable_adapter(): assert (merged(ids).logits - run.model(ids).logits).abs().max() > 0.1
    assert not hasattr(merged.config, "quantization_config")
    whole, got = load_file(tmp_path/"m"/"model.safetensors"), load_file(tmp_path/"out"/"model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in got.items()} == {n: (t.shape, t.dtype) for n, t in whole.items()}


def test_a_checkpoint_whose_weights_nobody_here_unpacks_cannot_be_merged_and_that_is_said_first(tmp_path):
    import json
    from sftkit.export import merge
    from sftkit.recipe import RunError
    folder = tmp_path/"m"
    plan = Session(save_tiny(folder), project=str(tmp_path/"r")).data(write_jsonl(tmp_path/"d.jsonl", ROWS)).options(epochs=1)
    run = plan.lora(r=4).fit()
    config = json.loads((folder/"config.json").read_text())
    (folder/"config.json").write_text(json.dumps(config | dict(quantization_config=dict(quant_method="gptq", bits=4))))
    with pytest.raises(ModelError, match="stored quantised \\(gptq\\).*Leave `merge_adapter` out"): plan.options(project_name=str(tmp_path/"x")).lora(r=4, merge=True).fit()
    assert not (tmp_path/"x").exists()
    with pytest.raises(RunError, match="stored quantised \\(gptq\\).*The adapter itself works"): merge(run.path, tmp_path/"out", [[5, 6]])


def test_a_gguf_file_is_read_and_trained_on(tmp_path):
    import gguf
    source = save_tiny_gguf(tmp_path/"m.gguf", extra=("<|im_start|>", "<|im_end|>"), packed=True)
    run = Session(source, project=str(tmp_path/"r"), chat_template="chatml").data(write_jsonl(tmp_path/"d.jsonl", ROWS)).lora(r=2).options(batch_size=4, gradient_accumulation=1, lr=1e-2).fit()
    assert run.history.loss.iloc[-1] < run.history.loss.iloc[0]
    stored = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(source).tensors}
    layers, ids = decoder_layers(run.model), torch.tensor([[5, 9, 300, 44, 61, 7]])
    for i, layer in enumerate(layers): assert torch.equal(layer.mlp.down_proj.base_layer.weight, torch.tensor(stored[f"blk.{i}.ffn_down.weight"]))
    rows = run.model.get_input_embeddings().weight[:len(stored["token_embd.weight"])]
    assert torch.equal(rows, torch.tensor(stored["token_embd.weight"])) and not torch.equal(rows, load_base(save_tiny_gguf(tmp_path/"plain.gguf", extra=("<|im_start|>", "<|im_end|>"))).get_input_embeddings().weight)
    with torch.no_grad(), run.model.disable_adapter(): assert torch.equal(run.model(ids).logits[..., :len(rows)], load_base(source)(ids).logits)      # the tokenizer has a token more
    with pytest.raises(ModelError, match="no file"): Session(str(tmp_path/"none.gguf"), project=str(tmp_path/"x")).data(str(tmp_path/"d.jsonl")).fit()


@pytest.mark.parametrize("bits", ["int4", "int8"])
def test_a_gguf_file_is_quantised_from_its_plain_numbers_and_its_header_is_read_once(tmp_path, monkeypatch, bits):
    import bitsandbytes as bnb
    import gguf
    source, read = save_tiny_gguf(tmp_path/"tiny.gguf", hidden=64), []
    real = gguf.GGUFReader
    monkeypatch.setattr(gguf, "GGUFReader", lambda path, *a: read.append(path) or real(path, *a))
    plan = Session(source, project=str(tmp_path/"r")).data(write_jsonl(tmp_path/"d.jsonl", ROWS)).lora(r=4, dropout=0).quantize(bits).options(batch_size=4, gradient_accumulation=1, epochs=2, lr=1e-2)
    run = plan.fit()
    assert len(read) == 2                                            # its header, then its weights
    layers = [m for m in run.model.modules() if isinstance(m, bnb.nn.Linear4bit if bits == "int4" else bnb.nn.Linear8bitLt)]
    assert len(layers) == 14 and run.history.loss.iloc[-1] < run.history.loss.iloc[0]
    plain, ids = load_base(source), torch.tensor([[5, 9, 300, 44, 61, 7]])
    plain.save_pretrained(tmp_path/"plain")
    with torch.no_grad(), run.model.disable_adapter(): ours, theirs = run.model(ids).logits, load_base(str(tmp_path/"plain"), quantization=bits)(ids).logits
    assert torch.equal(ours[..., :theirs.shape[-1]], theirs)         # the tokenizer has a token more than the model
    assert Run.open(run.path).generate("what is it ", max_new_tokens=6) == run.generate("what is it ", max_new_tokens=6)
    assert run.merge(tmp_path/"out").max_difference < 1e-4
    before = len(read)
    load_base(source)
    save_tiny_gguf(tmp_path/"tiny.gguf", hidden=32)
    assert load_base(source).config.hidden_size == 32 and len(read) == before + 3     # another file by that name is read anew


def test_merged_folder_can_be_read_by_others_and_its_difference_is_honest(tmp_path):
    import os, stat
    from sftkit.export import _difference, merge
    from sftkit.recipe import RunError
    run = (Session(save_tiny(tmp_path/"m"), project=str(tmp_path/"r")).data(write_jsonl(tmp_path/"d.jsonl", ROWS)).lora(r=4).options(batch_size=4, gradient_accumulation=1, epochs=1, lr=1e-2, save_steps=1).fit())
    with pytest.raises(RunError, match="`examples` is empty"): merge(run.path, tmp_path/"empty", [[]])
    assert not (tmp_path/"empty").exists()
    before = os.umask(0o022)
    try: run.merge(tmp_path/"merged")
    finally: os.umask(before)
    assert stat.S_IMODE((tmp_path/"merged").stat().st_mode) == 0o755
    nan = _difference([torch.tensor([1.0]), torch.tensor([1.0, 2.0])], [torch.tensor([1.0]), torch.tensor([float("nan"), 2.0])])
    assert nan != nan
    for path in run.path.iterdir():                                  # as if it had been interrupted: weights in checkpoints alone
        if path.is_file() and path.suffix in (".safetensors", ".json"): path.unlink()
    assert Run.open(run.path).merge(tmp_path/"again").max_difference < 1e-3


def weights(run):
    from safetensors.torch import load_file
    return load_file(run.path/"model.safetensors")


def test_weight_decay_shrinks_what_a_step_leaves(tmp_path):
    """AdamW (arXiv:1711.05101): decay is apart from the gradient's step, so one step with decay differs by lr * decay * weight; norms and biases are spared."""
    plan = Session(save_tiny(tmp_path/"m"), project=str(tmp_path/"a")).data(write_jsonl(tmp_path/"d.jsonl", ROWS)).options(batch_size=16, gradient_accumulation=1, max_steps=1, lr=1e-2, warmup_ratio=0.0, scheduler="constant")
    before = {n: p.detach().clone() for n, p in load_base(str(tmp_path/"m")).named_parameters()}
    plain, decayed = weights(plan.fit()), weights(Session.from_recipe(plan.recipe.replace(project_name=str(tmp_path/"b"), weight_decay=0.5)).fit())
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.allclose(plain[name] - decayed[name], 1e-2 * 0.5 * before[name], atol=1e-6)
    assert torch.equal(plain["model.norm.weight"], decayed["model.norm.weight"])


def test_max_grad_norm_bounds_the_step(tmp_path):
    plan = Session(save_tiny(tmp_path/"m"), project=str(tmp_path/"a")).data(write_jsonl(tmp_path/"d.jsonl", ROWS)).options(batch_size=16, gradient_accumulation=1, max_steps=1, lr=1.0, warmup_ratio=0.0, scheduler="constant", optimizer="sgd")
    before = {n: p.detach().clone() for n, p in load_base(str(tmp_path/"m")).named_parameters()}
    def moved(run): return torch.sqrt(sum((p - before[n]).square().sum() for n, p in weights(run).items() if n in before))
    clipped = Session.from_recipe(plan.recipe.replace(project_name=str(tmp_path/"b"), max_grad_norm=0.01)).fit()
    free = Session.from_recipe(plan.recipe.replace(project_name=str(tmp_path/"c"), max_grad_norm=0.0)).fit()
    assert abs(moved(clipped) - 0.01) < 1e-5
    norm = free.history.grad_norm.iloc[0]
    assert norm > 0.02 and abs(moved(free) - norm) < 1e-4 * norm and clipped.history.grad_norm.iloc[0] == pytest.approx(norm)      # the norm on record is that before clipping


def test_eval_batch_size_changes_no_evaluation(tmp_path):
    plan = Session(save_tiny(tmp_path/"m"), project=str(tmp_path/"a")).data(write_jsonl(tmp_path/"d.jsonl", ROWS), eval=5).options(batch_size=4, gradient_accumulation=1, epochs=1)
    one, three = (next(e["loss"] for e in Session.from_recipe(plan.recipe.replace(project_name=str(tmp_path/f"e{n}"), eval_batch_size=n)).fit().events if e["kind"] == "eval") for n in (1, 3))
    assert abs(one - three) < 1e-5


@pytest.mark.parametrize("how,bad", [("full", "nan"), ("lora", "inf"), ("int4", "nan"), ("int8", "inf")])
def test_a_weight_that_is_not_finite_is_named_and_the_family_is_not_blamed(tmp_path, how, bad):
    model = tiny_model(tiny_tokenizer(), hidden=64)
    with torch.no_grad(): model.model.layers[1].mlp.down_proj.weight[3, 4] = float(bad)
    save_tiny(tmp_path/"m", hidden=64); model.save_pretrained(tmp_path/"m")
    plan = Session(str(tmp_path/"m"), project=str(tmp_path/"r")).data(write_jsonl(tmp_path/"d.jsonl", ROWS))
    if how != "full": plan = plan.lora(r=4)
    if "int" in how: plan = plan.quantize(how)
    with pytest.raises(ModelError, match=r"The loss of this LlamaForCausalLM .*is nan .*weights hold numbers that are not finite, `model\.layers\.1\.mlp\.down_proj\.weight` first"): plan.fit()


def test_what_overflows_in_a_narrow_format_is_told_the_wider_one():
    from sftkit.loss import check_scoring
    for dtype, factor, said in ((torch.float16, 1e4, r"overflows in float16\. Type `mixed_precision='bf16'`"), (torch.bfloat16, 1e30, r"overflows in bfloat16\. Type `mixed_precision='no'`"),
                                (torch.float32, 1e30, "overflows in float32. No format is wider, so give `model` another one")):
        model = tiny_model(tiny_tokenizer(), hidden=64)
        for layer in (model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.up_proj): torch.nn.init.constant_(layer.weight, factor)
        with pytest.raises(ModelError, match=f"before anything is trained: its weights are finite, and what it computes with them {said}"): check_scoring(model.to(dtype), list(range(5, 40)))


def test_a_quantised_teacher_is_held_in_4_bit(tmp_path):
    import bitsandbytes as bnb
    from sftkit.loss import load_teacher
    folder = save_tiny(tmp_path/"m", hidden=64)
    recipe = Recipe(model=folder, data_path="d", project_name="p", use_distillation=True, teacher_model=folder, teacher_quantization="int4")
    teacher = load_teacher(recipe, torch.device("cpu"), torch.float32)
    assert sum(isinstance(m, bnb.nn.Linear4bit) for m in teacher.modules()) == 14 and not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def test_code_that_comes_with_a_model_runs_only_when_trusted(tmp_path):
    import json
    folder = tmp_path/"m"
    save_tiny(folder)
    (folder/"modeling_own.py").write_text("from transformers import LlamaConfig, LlamaForCausalLM\nfrom pathlib import Path\nPath(__file__).with_name('ran').write_text('x')\n"
                                          "class OwnConfig(LlamaConfig): model_type = 'own'\nclass OwnModel(LlamaForCausalLM): config_class = OwnConfig\n")
    config = json.loads((folder/"config.json").read_text()) | dict(model_type="own", auto_map={"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"})
    (folder/"config.json").write_text(json.dumps(config))
    plan = Session(str(folder), project=str(tmp_path/"r")).data(write_jsonl(tmp_path/"d.jsonl", ROWS)).options(batch_size=4, gradient_accumulation=1, max_steps=1)
    with pytest.raises(ModelError, match="trust_remote_code"): plan.fit()
    assert not (tmp_path/"r").exists()
    assert type(plan.fit(trust_remote_code=True).model).__name__ == "OwnModel"


@pytest.mark.parametrize("recompute", [True, False])
def test_an_8_bit_layer_keeps_no_input_for_its_frozen_weight(tiny_wide, recompute):
    "bitsandbytes holds the inputs of 8-bit layers beside autograd's saved tensors, for a gradient that nobody takes. Without them the gradients are the same."
    import weakref
    import bitsandbytes as bnb
    from bitsandbytes.autograd import _functions as products
    from sftkit.model import load_for_training, load_tokenizer
    def gradients(model, held=None):
        for layer in model.modules():
            if held is not None and isinstance(layer, bnb.nn.Linear8bitLt): layer.register_forward_pre_hook(lambda m, args: held.append(weakref.ref(args[0].untyped_storage())))
        ids = torch.arange(40)[None] + 5
        loss = model(input_ids=ids, labels=ids).loss
        alive = sum(ref() is not None for ref in held or ())
        loss.backward()
        return alive, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    r = Recipe(model=tiny_wide, data_path="d", project_name="p", peft=True, quantization="int8", gradient_checkpointing=recompute, lora_dropout=0)
    load = lambda: load_for_training(r, load_tokenizer(tiny_wide), [], torch.device("cpu"), torch.float32)
    held, lean = [], load()
    with torch.no_grad():
        for n, p in lean.named_parameters():
            if "lora_B" in n: p.normal_()
    alive, ours = gradients(lean, held)
    mended, products.MatMul8bitFp = products.MatMul8bitFp, products.MatMul8bitFp.__base__                   # bitsandbytes' own
    lean.zero_grad(); held.clear()
    try: kept, theirs = gradients(lean, held)
    finally: products.MatMul8bitFp = mended
    assert len(held) >= 28 and kept > len(held) / 3 and (alive <= 2 if recompute else alive < kept)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


SHARED = {"full": {}, "LoRA": dict(peft=True), "DoRA": dict(peft=True, use_dora=True), "pissa": dict(peft=True, init_lora_weights="pissa"),
          "layers in full": dict(peft=True, modules_to_save="norm", target_modules="q_proj,up_proj"), "the embedding in full": dict(peft=True, modules_to_save="embed_tokens"), "kept activations": dict(gradient_checkpointing=False)}


def in_two_processes(monkeypatch, r, tokenizer, ids, dtype):
    "What `load_to_share` gives in the first process and in another one."
    from sftkit import model
    load = lambda: model.load_to_share(r, tokenizer, ids, torch.device("cpu"), dtype)
    with monkeypatch.context() as patch:
        told = []
        patch.setattr(model, "from_main_process", lambda call: told.append(call()) or told[0])
        first = load()
        patch.setattr(model, "from_main_process", lambda call: told[0])
        patch.setattr(model, "load_base", None)
        return first, load()


def same_in_both(first, other):
    from sftkit.model import loose_tensors, replace_parameters
    assert all(p.is_meta for p in other.parameters()) and other.training and not any(t.is_meta for *_, t in loose_tensors(other))
    facts = lambda m: [(n, p.shape, p.dtype, p.requires_grad, type(p)) for n, p in m.named_parameters()]
    assert facts(first) == facts(other) and [type(m) for m in first.modules()] == [type(m) for m in other.modules()]
    loose = [[(path, name, t) for path, _, name, t in loose_tensors(m)] for m in (first, other)]
    assert len(loose[0]) == len(loose[1]) and all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(*loose))
    weights = dict(first.named_parameters())
    replace_parameters(other, lambda name, p: weights[name.removeprefix(".")])
    ids = torch.arange(5, 25)[None]
    with torch.no_grad(): assert torch.equal(first.eval()(input_ids=ids).logits, other.eval()(input_ids=ids).logits)
    assert first.generation_config.to_dict() == other.generation_config.to_dict() and first.config.to_dict() == other.config.to_dict()
    assert all(module.padding_idx is None for m in (first, other) for module in m.modules() if isinstance(module, torch.nn.Embedding))


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("new", [False, True], ids=["", "new tokens"])
def test_a_model_without_weights_is_that_of_the_first_process_in_all_but_weights(kind, new, tiny, monkeypatch):
    from sftkit.model import add_tokens, load_tokenizer
    r, tokenizer = Recipe(model=tiny, data_path="d", project_name="p", lora_r=4, **SHARED[kind]), load_tokenizer(tiny)
    ids = add_tokens(tokenizer, ["<new>", "<newer>"]) if new else []
    first, other = in_two_processes(monkeypatch, r, tokenizer, ids, torch.bfloat16)
    assert first.is_gradient_checkpointing == other.is_gradient_checkpointing == (kind != "kept activations")
    same_in_both(first, other)


def test_weights_and_adapters_that_are_gone_on_with_are_laid_out_likewise(tiny, tiny_gpt2, tmp_path, monkeypatch):
    from sftkit.model import add_tokens, load_for_training, load_tokenizer, save_model
    for name, fields in (("whole", {}), ("adapter", dict(peft=True, lora_r=4, init_lora_weights="olora", modules_to_save="norm"))):
        r, tokenizer = Recipe(model=tiny, data_path="d", project_name="p", **fields), load_tokenizer(tiny)
        ids = add_tokens(tokenizer, ["<new>"])
        save_model(load_for_training(r, tokenizer, ids, torch.device("cpu"), torch.float32), tokenizer, tmp_path/name)
        same_in_both(*in_two_processes(monkeypatch, r.replace(continue_from=str(tmp_path/name)), tokenizer, [], torch.float32))
    r = Recipe(model=tiny_gpt2, data_path="d", project_name="p", peft=True, target_modules="c_attn")
    same_in_both(*in_two_processes(monkeypatch, r, load_tokenizer(tiny_gpt2), [], torch.bfloat16))


def test_a_model_that_cannot_be_laid_out_like_the_first_is_refused(tiny, monkeypatch):
    from sftkit import model
    r, tokenizer = Recipe(model=tiny, data_path="d", project_name="p", peft=True), model.load_tokenizer(tiny)
    monkeypatch.setattr(model, "_without_weights", lambda r, *args, real=model._without_weights: real(r.replace(lora_r=3), *args))
    with pytest.raises(ModelError, match=r"not what the first process has loaded \(`.*lora_A.*` is .*so it cannot be shared out"): in_two_processes(monkeypatch, r, tokenizer, [], torch.float32)


def test_cudnns_attention_is_left_out_while_anybody_is_inside_and_then_as_it_was():
    chosen = torch.backends.cuda.cudnn_sdp_enabled()
    with steady_attention(): assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == chosen
    first, second = steady_attention(), steady_attention()
    first.__enter__(); second.__enter__(); first.__exit__(None, None, None)                  # as of two threads
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    second.__exit__(None, None, None)
    assert torch.backends.cuda.cudnn_sdp_enabled() == chosen


def test_layers_that_cannot_be_compiled_are_not_said_to_be(tiny):
    run = Session(tiny, project="recomputed", chat_template="chatml").data(ROWS).options(max_steps=1, batch_size=4, gradient_accumulation=1, compile=True, gradient_checkpointing=True).fit()
    assert not next(e["compiled"] for e in run.events if e["kind"] == "plan") and all(layer._compiled_call_impl is None for layer in decoder_layers(run.model))
    assert [e["text"] for e in run.events if e["kind"] == "note" and "compile" in e["text"]][0].startswith("`compile` has no effect in this run")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    "A Llama that is large enough for oneDNN's products."
    return save_tiny(tmp_path_factory.mktemp("large")/"m", hidden=512, layers=6)


@pytest.mark.parametrize("flat", [True, False])
def test_quick_products_are_as_precise(large, monkeypatch, flat):
    "Loss and gradients with oneDNN's products and with MKL's, beside the same in float64."
    from sftkit import loss, model as made
    from sftkit.data import collate
    monkeypatch.setattr(made, "_onednn_is_quicker", lambda: True)
    counted, real = [], made._onednn_product
    monkeypatch.setattr(made, "_onednn_product", lambda *a: counted.append(a[1].shape) or real(*a))
    model = load_base(large)
    loss.score_tokens(model)
    for p in model.lm_head.parameters(): p.requires_grad_(False)                      # a frozen weight gets no gradient, and passes one on
    rows = [dict(input_ids=list(range(5, 5 + n)), labels=list(range(5, 5 + n))) for n in (40, 33, 12)]
    assert loss.use_flat_attention(model, rows[0]["input_ids"]) is None
    batch = collate(rows, 2)
    if flat: batch = loss.flat_batch(batch)
    counted.clear()
    def passed(place):
        model.zero_grad()
        with place: (total := loss.token_loss_sum(model, batch)).backward()
        return total.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()
    mkl, mkl_gradient = passed(contextlib.nullcontext())
    assert not counted
    quick, quick_gradient = passed(quick_products(model))
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.weight.numel() >= 2**16]
    assert len(linears) >= 42 and len(counted) >= 3 * 42
    model.double()
    exact, gradient = passed(contextlib.nullcontext())
    assert len(quick_gradient) == len(gradient) and quick == pytest.approx(exact, rel=1e-6)
    off, usual_off = ((g - gradient).norm() / gradient.norm() for g in (quick_gradient, mkl_gradient))
    assert off < max(2 * usual_off, 1e-6), (off, usual_off)


@pytest.mark.parametrize("shape", [(7, 300), (2, 5, 300), (300,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out", [250, 400])                                        # fewer and more than come in: either side may be the one that is copied
def test_a_layer_by_onednn_is_the_layer(shape, bias, out, monkeypatch):
    "Output and all gradients, of inputs that lie in any order, and of a batch without rows."
    from sftkit import model as made
    counted, real = [], made._onednn_product
    monkeypatch.setattr(made, "_onednn_product", lambda *a: counted.append(1) or real(*a))
    layer = torch.nn.Linear(300, out, bias=bias)
    for x in (torch.randn(shape), torch.randn(*shape[:-1], 600)[..., ::2], torch.randn(0, *shape[1:-1], 300)):
        got = []
        for place in (contextlib.nullcontext(), made._by_onednn()):
            counted.clear(); layer.zero_grad(); x = x.detach().requires_grad_()
            with place: layer(x).square().sum().backward()
            got.append([x.grad, *(p.grad for p in layer.parameters())])
        assert all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in zip(*got)) and len(counted) == (3 if x.numel() else 0)


def test_onednn_meets_few_numbers_of_rows(monkeypatch):
    "It keeps what it prepares for each."
    from sftkit import model as made
    shapes, real = set(), made._onednn_product
    monkeypatch.setattr(made, "_onednn_product", lambda *a: shapes.add((a[0].shape, a[1].shape)) or real(*a))
    layer = torch.nn.Linear(256, 320, bias=False)
    with made._by_onednn():
        for n in range(64, 257): layer(torch.randn(n, 256, requires_grad=True)).sum().backward()
    assert 3 * 32 < len(shapes) <= 3 * 33                                             # of the output and the two gradients
    assert all(n <= made._rounded(n) <= 1.0625 * n for n in range(1, 5000)) and len({made._rounded(n) for n in range(1, 4097)}) < 150


def test_what_onednn_does_not_take_is_left_to_pytorch():
    from sftkit import model as made
    x, weight, linear = torch.randn(3, 300), torch.randn(300, 300), torch.nn.functional.linear
    for bias in (torch.randn(600)[::2], torch.randn(1).expand(300), torch.randn(1, 300)):
        usual = linear(x, weight, bias)
        with made._by_onednn(): assert torch.equal(torch.nn.functional.linear(x, weight, bias), usual)
    with made._by_onednn(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"): torch.nn.functional.linear(x[:, :7], weight)


def test_what_another_thread_computes_meanwhile_is_left_to_it(monkeypatch):
    import threading
    from sftkit import model as made
    counted, real = [], made._onednn_product
    monkeypatch.setattr(made, "_onednn_product", lambda *a: counted.append(threading.current_thread()) or real(*a))
    x, weight = torch.randn(3, 300), torch.randn(300, 300)
    with made._by_onednn():
        other = threading.Thread(target=lambda: torch.nn.functional.linear(x, weight)); other.start(); other.join()
        assert not counted
        torch.nn.functional.linear(x, weight)
        assert counted == [threading.current_thread()]


def test_quick_products_are_for_large_models_in_fp32_on_a_cpu_that_gains(large, tiny, monkeypatch):
    from sftkit import model as made
    quicker_here = made._onednn_is_quicker.__wrapped__
    monkeypatch.setattr(made, "_onednn_is_quicker", lambda: True)
    usual = torch.nn.functional.linear
    def taken(model):
        with quick_products(model): return torch.nn.functional.linear is not usual
    model = load_base(large)
    assert taken(model) and not taken(load_base(tiny)) and not taken(model.to("meta"))
    model = load_base(large)
    model.model.layers[0].compile(backend="eager")
    assert not taken(model)                                                             # a compiler has products of its own
    x, weight = torch.randn(4, 512), torch.randn(512, 512)
    assert made._is_for_onednn(x, weight) and not made._is_for_onednn(x, weight[:16]) and not made._is_for_onednn(x.bfloat16(), weight.bfloat16()) and not made._is_for_onednn(x.to("meta"), weight)
    with torch.autocast("cpu", torch.bfloat16): assert not made._is_for_onednn(x, weight)
    with pytest.raises(ZeroDivisionError), quick_products(load_base(large)): 1 / 0
    assert torch.nn.functional.linear is usual
    for maker, capability, quicker in (("AuthenticAMD", "AVX512", True), ("GenuineIntel", "AVX512", False), ("AuthenticAMD", "AVX2", False)):
        with monkeypatch.context() as m:
            m.setattr(made, "_cpu_maker", lambda: maker); m.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability); m.setattr(torch.backends.mkl, "is_available", lambda: True)
            assert quicker_here() == quicker


def test_a_run_and_its_answers_use_quick_products(large, tmp_path, monkeypatch):
    from sftkit import model as made
    from running import steps
    counted, real = [], made._onednn_product
    monkeypatch.setattr(made, "_onednn_product", lambda *a: counted.append(torch._C._current_graph_task_id() != -1) or real(*a))       # in a backward pass or not
    plan = Session(large, project="quick", chat_template="chatml").data(ROWS).lora(r=4, dropout=0).options(max_steps=2, batch_size=4, gradient_accumulation=1, lr=1e-3)
    monkeypatch.setattr(made, "_onednn_is_quicker", lambda: False)
    usual = plan.fit(project_name="usual")
    assert not counted
    monkeypatch.setattr(made, "_onednn_is_quicker", lambda: True)
    quick = plan.fit()
    assert any(counted) and not all(counted) and steps(quick) == pytest.approx(steps(usual), rel=1e-5)
    counted.clear()
    assert quick.generate("what is it", 4) == usual.generate("what is it", 4) and counted
