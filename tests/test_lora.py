"""What each LoRA option does to the numbers, which layers can be named, and what a run may go on from."""
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CHAT
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from sftkit import Run, Session
from sftkit.engine import Recorder
from sftkit.model import add_lora, load_base, load_for_training, load_tokenizer, load_trained
from sftkit.recipe import ModelError, Recipe, RecipeError
from running import chat_plan, nats_by_hand, real_rows, steps
from tiny import save_tiny, tiny_model, tiny_tokenizer

IDS = torch.tensor([[5, 9, 300, 44, 61, 7]])


def plan_for(model, project="run", source=CHAT, **fields): return chat_plan(model, project, source,
                                                                            **{**dict(max_steps=2, batch_size=4, gradient_accumulation=1), **fields})
def notes(run): return " ".join(e["text"] for e in run.events if e["kind"] == "note")
def recipe(**fields): return Recipe(**{**dict(model="m", data_path="d", project_name="p", peft=True), **fields})
def small(**kw): return tiny_model(tiny_tokenizer(), **kw)


def adapted(target="q_proj", base=None, **fields):
    "A base, the same base with an adapter whose B is not zero, and the one layer of it that is looked at."
    base = base or small()
    kept = {n: p.detach().clone() for n, p in base.named_parameters()}
    model = add_lora(base, recipe(**{**dict(lora_r=4, lora_alpha=32, lora_dropout=0.0, target_modules=target), **fields}))
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if ".lora_B." in name: p.data.normal_(0, 0.1)
    return kept, model.eval(), model.get_base_model().model.layers[0].self_attn.q_proj


def product(layer): return layer.lora_B["default"].weight @ layer.lora_A["default"].weight


# -- what each option does -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fields,scale", [({}, 32 / 4), (dict(lora_r=8), 32 / 8), (dict(lora_alpha=8), 8 / 4), (dict(use_rslora=True), 32 / 4**0.5),
                                          (dict(use_rslora=True, lora_r=16), 32 / 16**0.5)])
def test_rank_alpha_and_rslora_are_the_published_scale(fields, scale):
    """arXiv:2106.09685: W x + (alpha / r) B A x; arXiv:2312.03732: alpha / sqrt(r)."""
    kept, _, layer = adapted(**fields)
    x, weight = torch.randn(3, 32), kept["model.layers.0.self_attn.q_proj.weight"]
    assert layer.lora_A["default"].weight.shape == (fields.get("lora_r", 4), 32) and layer.lora_A["default"].weight.dtype == torch.float32
    assert torch.allclose(layer(x), x @ weight.T + scale * x @ product(layer).T, atol=1e-5)


def test_dropout_falls_on_the_input_of_the_adapter_alone():
    kept, model, layer = adapted(lora_dropout=0.5)
    x, weight = torch.randn(400, 32), kept["model.layers.0.self_attn.q_proj.weight"]
    assert torch.allclose(layer(x), x @ weight.T + 8 * x @ product(layer).T, atol=1e-5)              # eval mode: none
    layer.train(); torch.manual_seed(3)
    got = layer(x) - x @ weight.T
    torch.manual_seed(3)
    assert torch.allclose(got, 8 * torch.nn.functional.dropout(x, 0.5) @ product(layer).T, atol=1e-5)
    assert adapted(lora_dropout=0.0)[2].train()(x).equal(adapted(lora_dropout=0.0)[2].eval()(x))


def test_dora_normalises_columns_and_trains_their_magnitude():
    """arXiv:2402.09353, equation 5: m (W + s B A) / ||W + s B A||, with the norm of each output's row in transformers' layout."""
    kept, _, layer = adapted(use_dora=True)
    x, weight = torch.randn(3, 32), kept["model.layers.0.self_attn.q_proj.weight"]
    vector = layer.lora_magnitude_vector["default"].weight
    assert vector.requires_grad and torch.allclose(vector, weight.norm(dim=1), atol=1e-5)             # starts as the base is
    vector.data.mul_(torch.linspace(0.5, 2, len(vector)))
    whole = weight + 8 * product(layer)
    assert torch.allclose(layer(x), x @ (vector[:, None] * whole / whole.norm(dim=1, keepdim=True)).T, atol=1e-5)


@pytest.mark.parametrize("init", ["default", "gaussian", "pissa", "olora"])
def test_each_initialisation_starts_where_its_paper_says(init):
    """default: A uniform within 1 / sqrt(in) (Kaiming, a = sqrt(5)), B zero. gaussian: A normal with deviation 1 / r, B zero.
    PiSSA (arXiv:2404.02948): s B A is the best rank-r part of W, taken out of the base. OLoRA (arXiv:2406.01775): B has orthogonal columns, from a QR
    factorisation of W. Whatever it is, the model is at first the one it was."""
    base = small(hidden=64)
    before = base(IDS).logits.detach()
    weight = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    model = add_lora(base, recipe(lora_r=4, lora_dropout=0.0, target_modules="q_proj", init_lora_weights=init)).eval()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    a, b, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, 32 / 4
    assert torch.allclose(model(IDS).logits, before, atol=1e-5)
    if init in ("default", "gaussian"):
        assert not b.any() and torch.equal(layer.get_base_layer().weight, weight)
        if init == "default": assert 0.9 / 8 < a.abs().max() <= 1 / 8
        else: assert a.abs().max() > 0.5 and abs(a.std() - 0.25) < 0.05
        return
    residual, part = layer.get_base_layer().weight, scale * b @ a
    assert torch.allclose(residual + part, weight, atol=1e-5)
    if init == "pissa": assert abs(residual.norm() - torch.linalg.svdvals(weight)[4:].norm()) < 1e-4      # Eckart-Young
    else:
        inner = b.T @ b
        assert torch.allclose(inner / inner[0, 0], torch.eye(4), atol=1e-4) and part.norm() > 0.01


@pytest.mark.parametrize("targets", ["q_proj,down_proj", "all-linear", "layers.1.mlp.up_proj"])
def test_exactly_the_targets_get_an_adapter(targets):
    model = add_lora(small(), recipe(target_modules=targets))
    got = {n.partition(".lora_A.")[0].removeprefix("base_model.model.") for n, _ in model.named_parameters() if ".lora_A." in n}
    linear = {n for n, m in small().named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    assert got == {n for n in linear if targets == "all-linear" or any(n.endswith(t) for t in targets.split(","))} and got


def test_modules_to_save_are_trained_in_full_and_only_those_named(tmp_path):
    untied = save_tiny(tmp_path/"untied", extra=("<|im_start|>", "<|im_end|>"), tie=False)
    run = plan_for(untied).lora(r=4, dropout=0, targets="q_proj", modules_to_save="norm,lm_head").fit()
    base, trained = load_file(f"{untied}/model.safetensors"), load_file("run/adapter_model.safetensors")
    whole = {n.removeprefix("base_model.model.") for n in trained if "lora" not in n}
    assert whole == {"model.norm.weight", "lm_head.weight"}                # a `norm` is no `input_layernorm`
    for name in whole: assert (trained["base_model.model." + name] - base[name]).abs().max() > 1e-3
    trainable = {n for n, p in run.model.named_parameters() if p.requires_grad and "lora" not in n}
    assert trainable == {f"base_model.model.{n}.modules_to_save.default.weight" for n in ("model.norm", "lm_head")}


def test_modules_to_save_in_bf16_are_trained_in_fp32_and_stay_so_when_gone_on_with(tmp_path, monkeypatch):
    "An update of 5e-5 is lost in a weight of bf16; the frozen layers, and what flows between all of them, are in bf16 none the less."
    untied = save_tiny(tmp_path/"untied", extra=("<|im_start|>", "<|im_end|>"), tie=False)
    plan = lambda name, **fields: plan_for(untied, name, lr=5e-5, warmup_ratio=0.0, mixed_precision="bf16", save_steps=2, max_steps=4).lora(r=4, dropout=0, targets="q_proj", **fields)
    whole = plan("whole", modules_to_save="norm,lm_head,embed_tokens")
    run, base = whole.fit(), load_file(f"{untied}/model.safetensors")
    stored = load_file("whole/adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float32} == {p.dtype for p in run.model.parameters() if p.requires_grad}
    assert {p.dtype for p in run.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    for name in ("model.norm.weight", "lm_head.weight"): assert (stored["base_model.model." + name] != base[name].bfloat16().float()).float().mean() > 0.9
    assert (stored["base_model.model.model.embed_tokens.weight"] != base["model.embed_tokens.weight"].bfloat16().float()).any()
    with torch.no_grad(): assert run.model.get_base_model().model(IDS).last_hidden_state.dtype == torch.bfloat16
    assert run.generate("turn on light 1", max_new_tokens=2) is not None
    assert steps(run)[0] == steps(plan("plain").fit())[0]                    # at first the layers are those of the base, to the last bit
    assert whole.memory().parts["adapter"] == 4 * sum(t.numel() for t in stored.values())
    reopened = get_peft_model_state_dict(Run.open("whole").model)
    assert all(torch.equal(reopened[k], v) and reopened[k].dtype == torch.float32 for k, v in stored.items())
    merged = load_file(run.merge("merged").path/"model.safetensors")
    assert {t.dtype for t in merged.values()} == {torch.float32} and torch.equal(merged["model.norm.weight"], stored["base_model.model.model.norm.weight"])
    usual = Recorder._asked
    monkeypatch.setattr(Recorder, "_asked", lambda own: usual(own) | ({"stop"} if own.engine.state.global_step == 2 else set()))
    cut = plan("cut", modules_to_save="norm,lm_head,embed_tokens")
    assert cut.fit().state == "stopped"
    monkeypatch.setattr(Recorder, "_asked", usual)
    assert steps(cut.options(resume=True).fit()) == steps(run)
    again = load_file("cut/adapter_model.safetensors")
    assert all(torch.equal(t, again[n]) for n, t in stored.items())
    r = whole.recipe.replace(project_name="next", continue_from="whole")
    trained = load_for_training(r, load_tokenizer("whole"), [], torch.device("cpu"), torch.bfloat16)
    state = get_peft_model_state_dict(trained)
    assert state.keys() == stored.keys() and all(t.dtype == torch.float32 and torch.equal(t, stored[n]) for n, t in state.items())


def test_new_token_rows_are_trained_beside_a_layer_saved_whole(tmp_path):
    plain = save_tiny(tmp_path/"plain")
    plan_for(plain).lora(r=4, dropout=0, modules_to_save="norm").fit()
    base, model = load_base(plain).get_input_embeddings().weight, load_trained("run")[0]
    added = len(model.get_base_model().get_input_embeddings().weight) - len(base)
    stored = load_file("run/adapter_model.safetensors")
    delta = next(v for k, v in stored.items() if "token_adapter" in k)
    assert added > 0 and len(delta) == added


# -- what can be named ---------------------------------------------------------------------------------------------------------------

WRONG = [(dict(target_modules="lm_head"), "is the head of LlamaForCausalLM.*modules_to_save=\"lm_head"),
         (dict(target_modules="embed_tokens"), "is the head of LlamaForCausalLM too.*modules_to_save"),
         (dict(target_modules="q_proj,self_attn"), "is a LlamaAttention: name q_proj, k_proj"),
         (dict(target_modules="norm"), "is a LlamaRMSNorm. Layers: q_proj"), (dict(target_modules="q_prj"), "Did you mean `q_proj`"),
         (dict(modules_to_save="lm_haed"), "no such layer.*lm_head.*Did you mean"),
         (dict(modules_to_save="mlp", target_modules="up_proj"), "leaves no layer for the LoRA target `up_proj`"),
         (dict(modules_to_save="model"), "leaves no layer"),
         (dict(modules_to_save="mlp", quantization="int4"), "held quantised")]


@pytest.mark.parametrize("fields,message", WRONG, ids=str)
def test_layers_that_cannot_be_named_are_refused_before_anything_loads(tiny, monkeypatch, fields, message):
    import sftkit.model
    monkeypatch.setattr(sftkit.model, "load_base", None)                      # nothing is loaded
    with pytest.raises(ModelError, match=message): plan_for(tiny, peft=True, **fields).fit()
    assert not Path("run").exists()


def test_olora_on_weights_that_lie_the_other_way_round_is_refused_before_anything_loads(tiny_gpt2, monkeypatch):
    "peft 0.21 factors GPT-2's weights as they lie: an error of torch, or, where a layer is square, another model than the base."
    import sftkit.model
    monkeypatch.setattr(sftkit.model, "load_base", None)
    for fields in (dict(), dict(target_modules="h.0.attn.c_proj")):
        with pytest.raises(ModelError, match="olora.*does not work on `.*c_.*Conv1D.*'pissa'"): plan_for(tiny_gpt2, chat_template="zephyr", peft=True, init_lora_weights="olora", **fields).fit()
    assert not Path("run").exists()


@pytest.mark.parametrize("init", ["pissa", "gaussian"])
def test_the_other_initialisations_leave_gpt2_what_it_was(tiny_gpt2, init):
    base = load_base(tiny_gpt2)
    before = base(IDS).logits.detach()
    model = add_lora(base, recipe(lora_r=4, lora_dropout=0.0, init_lora_weights=init)).eval()
    assert torch.allclose(model(IDS).logits, before, atol=1e-5)


def test_an_untied_embedding_can_have_an_adapter(tmp_path):
    untied = save_tiny(tmp_path/"untied", extra=("<|im_start|>", "<|im_end|>"), tie=False)
    plan = plan_for(untied, max_steps=4).lora(r=4, dropout=0, targets="q_proj,embed_tokens")
    loss, _ = nats_by_hand(load_base(untied), real_rows([next(iter(plan.batches()))]))
    run = plan.fit()
    assert steps(run)[0] == pytest.approx(loss, abs=1e-4) and steps(run)[-1] < steps(run)[0]
    stored = load_file("run/adapter_model.safetensors")
    assert {k.split(".lora")[0].rsplit(".", 1)[-1] for k in stored} == {"q_proj", "embed_tokens"}
    with torch.no_grad(): trained, again = run.model(IDS).logits, load_trained("run")[0](IDS).logits
    assert (trained - again).abs().max() < 1e-5
    run.merge("out")
    with torch.no_grad(): assert (load_base("out")(IDS).logits - trained).abs().max() < 1e-4
    assert plan.memory().parts["adapter"] == 4 * sum(v.numel() for v in stored.values())
    with pytest.raises(ModelError, match="`lm_head` is the head of"): plan_for(untied, "x").lora(targets="lm_head").fit()
    plain = save_tiny(tmp_path/"plain", tie=False)                            # the template brings new tokens, whose rows are trained by themselves
    with pytest.raises(ModelError, match="rows for 2 new tokens"): plan_for(plain, "x").lora(targets="embed_tokens").fit()


# -- continuing ----------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def first(tmp_path_factory):
    "A finished adapter on some layers, and the base it belongs to, whose tokenizer lacks the markers of the template."
    folder = tmp_path_factory.mktemp("first")
    base = save_tiny(folder/"base")
    plan_for(base, str(folder/"first"), max_steps=4).lora(r=4, alpha=8, dropout=0, targets="q_proj,v_proj", rslora=True).fit()
    return base, str(folder/"first")


def test_an_adapter_is_continued_as_it_was_made_with_its_template_and_tokens(first):
    base, folder = first
    plan = Session(base, project="second", continue_from=folder, lr=1e-2, max_steps=2, batch_size=4, gradient_accumulation=1).data(CHAT).lora()
    batch = next(iter(plan.batches()))
    model, tokenizer = load_trained(folder)
    loss, _ = nats_by_hand(model, real_rows([batch]))
    run = plan.fit()
    assert steps(run)[0] == pytest.approx(loss, abs=1e-4)
    assert run.tokenizer.chat_template == tokenizer.chat_template and "<|im_start|>" in run.tokenizer.get_vocab()
    assert "The chat template is that of" in notes(run) and "target_modules='q_proj,v_proj'" in notes(run) and "lora_dropout=0" in notes(run)
    r = Run.open("second").recipe
    assert (r.lora_r, r.lora_alpha, r.lora_dropout, r.target_modules, r.use_rslora) == (4, 8, 0, "q_proj,v_proj", True)
    stored = load_file("second/adapter_model.safetensors")
    assert any("token_adapter" in k for k in stored) and any((v - load_file(f"{folder}/adapter_model.safetensors")[k]).abs().max() > 0 for k,
                                                             v in stored.items() if "token_adapter" in k)
    assert plan.memory().parts["adapter"] == 4 * sum(v.numel() for v in stored.values())
    again = Session.from_recipe(r.replace(project_name="third")).fit()        # what the run records is the same run
    assert steps(again) == steps(run)


@pytest.mark.parametrize("fields", [dict(lora_r=8), dict(lora_alpha=64), dict(lora_dropout=0.2), dict(target_modules="q_proj"), dict(use_dora=True),
                                    dict(modules_to_save="norm"), dict(init_lora_weights="gaussian")], ids=str)
def test_a_recipe_that_differs_from_the_adapter_it_continues_is_refused(first, fields):
    name = next(iter(fields))
    with pytest.raises(ModelError, match=f"was made with {name}=.*use its values: `{name}="):
        plan_for(first[0], "x", continue_from=first[1], peft=True, **fields).fit()
    assert not Path("x").exists()


def test_a_template_with_tokens_that_the_adapter_lacks_is_refused(first):
    with pytest.raises(ModelError, match="<\\|user\\|>.*was not trained with"):
        plan_for(first[0], "x", continue_from=first[1], peft=True, chat_template="zephyr").fit()


def test_an_adapter_on_the_weights_of_an_earlier_run_keeps_that_base(tmp_path):
    "Reopened, merged, moved, compared with its base and continued: always on the full weights that the run started from."
    save_tiny(tmp_path/"work"/"base", extra=("<|im_start|>", "<|im_end|>"))
    os.chdir(tmp_path/"work")
    fields = dict(lr=1e-2, max_steps=6, batch_size=4, gradient_accumulation=1)
    rows = real_rows(list(Session("base", project="x", **fields).data(CHAT).batches())[:2])
    Session("base", project="full", **fields).data(CHAT).fit()
    run = Session("base", project="on-it", continue_from="full", **fields).data(CHAT).lora(dropout=0, merge=True, init="pissa").fit()
    loss = lambda model: nats_by_hand(model, rows)[0]
    as_trained, earlier = loss(run.model), loss(load_base("full"))
    assert abs(as_trained - loss(load_base("on-it/merged"))) < 1e-4 and abs(earlier - loss(load_base("base"))) > 0.1
    os.rename(tmp_path/"work", tmp_path/"moved"); os.chdir(tmp_path/"moved")
    again = Run.open("on-it")
    assert loss(again.model) == pytest.approx(as_trained, abs=1e-4) and again.merge("merged").max_difference < 1e-3
    assert loss(load_base("merged")) == pytest.approx(as_trained, abs=1e-4)
    from sftkit.session import _as_base
    with _as_base(again) as before: assert loss(before.model) == pytest.approx(earlier, abs=1e-4)
    os.rename(tmp_path/"moved", tmp_path/"work"); os.chdir(tmp_path/"work")
    with pytest.raises(ModelError, match="stands on the weights.*full.*Type model='full'"): Session("base", project="third", continue_from="on-it").data(CHAT).lora().fit()
    assert not Path("third").exists()
    third = Session("full", project="third", continue_from="on-it", **fields).data(CHAT).lora()
    batch = next(iter(third.batches()))
    assert steps(third.fit())[0] == pytest.approx(nats_by_hand(run.model, real_rows([batch]))[0], abs=1e-4)


def test_loftq_starts_from_the_earlier_weights_that_are_quantised(tmp_path):
    base = save_tiny(tmp_path/"base", hidden=64)
    fields = dict(lr=1e-2, max_steps=8, batch_size=4, gradient_accumulation=1)
    Session(base, project="full", **fields).data(CHAT).fit()
    first = {}
    for init in ("default", "loftq"):
        plan = Session(base, project=init, continue_from="full", **fields | dict(max_steps=1)).data(CHAT).lora(r=32, dropout=0, init=init).quantize("int4")
        batch = next(iter(plan.batches()))
        first[init] = abs(steps(plan.fit())[0] - nats_by_hand(load_base("full"), real_rows([batch]))[0])
    assert first["loftq"] < first["default"] < 0.2


def test_another_base_is_refused_by_name_and_shape(first, tiny, tiny_gpt2, tmp_path):
    wide = save_tiny(tmp_path/"wide", hidden=64)
    base, folder = first
    with pytest.raises(ModelError, match="was trained on `.*base`.*wide.*q_proj` is \\(32, 32\\) there and \\(64, 64\\) here"):
        plan_for(wide, "x", continue_from=folder, peft=True).fit()
    with pytest.raises(ModelError, match="GPT2LMHeadModel.*does not exist here"): plan_for(tiny_gpt2, "x", continue_from=folder, peft=True).fit()
    plan_for(tiny, "full", max_steps=1).fit()
    with pytest.raises(ModelError, match="trained on a LlamaForCausalLM.*`model.embed_tokens.weight` is \\(32,\\) there and \\(64,\\) here"):
        plan_for(wide, "x", continue_from="full").fit()
    assert not Path("x").exists()


def test_full_weights_are_those_a_run_starts_from(tmp_path):
    base = save_tiny(tmp_path/"base")                                        # the first run adds the template's tokens
    plan_for(base, "full", max_steps=4).fit()
    for folder in ("full", "full/checkpoint-4"):
        plan = Session(base, project="next-" + folder.replace("/", "-"), continue_from=folder, lr=1e-2, max_steps=1, batch_size=4,
                       gradient_accumulation=1).data(CHAT)
        batch = next(iter(plan.batches()))
        from transformers import AutoModelForCausalLM
        loss, _ = nats_by_hand(AutoModelForCausalLM.from_pretrained("full").eval(), real_rows([batch]))
        run = plan.fit()
        assert steps(run)[0] == pytest.approx(loss, abs=1e-4) and "The chat template is that of" in notes(run)
        before, after = load_file("full/model.safetensors"), load_file(run.path/"model.safetensors")
        assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}


def test_a_run_does_not_continue_from_the_folder_it_would_take(first):
    base, folder = first
    shutil.copytree(folder, "mine")
    with pytest.raises(RecipeError, match="name of its own"): Session(base, project="mine", continue_from="mine").data(CHAT).lora().start()
    for source in ("mine", "./mine/checkpoint-4", Path("mine").resolve()):
        with pytest.raises(RecipeError, match="name of its own"): plan_for(base, "mine", continue_from=source, peft=True).fit()
    assert Path("mine/adapter_model.safetensors").exists() and not Path("mine.1").exists()
