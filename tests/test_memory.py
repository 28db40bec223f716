"""The memory forecast: what it counts is what runs hold, its rehearsal keeps what training keeps, and its remedies help."""
import json
import re
from unittest.mock import patch

import pytest
import torch
import transformers
from transformers import LlamaConfig

import sftkit.memory as memory
from sftkit import Session
from sftkit.cli import main
from sftkit.data import collate
from sftkit.events import read_events
from sftkit.memory import GPUS, Ledger, Load, Machine, blank_model, forecast, heaviest, held_parts, machine, read_memory, rehearse
from sftkit.model import add_lora, load_base, load_for_training, load_tokenizer, recompute_activations
from sftkit.loss import flat_batch, token_loss_sum, use_flat_attention
from sftkit.recipe import ModelError, Recipe, RecipeError
from sftkit.training import Trainer
from sftkit.prepare import memory_forecast
from tiny import save_tiny, write_jsonl

CPU, A100 = Machine("cpu", 8 * 2**30, "cpu"), machine("A100")
LLAMA_8B = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192)
LLAMA_1B = dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=4096, tie_word_embeddings=True)


def recipe(model="m", **fields): return Recipe(**{**dict(model=str(model), data_path="d", project_name="p"), **fields})


@pytest.fixture(autouse=True)
def nothing_remembered():
    "Each test has its own rehearsals made."
    memory._ANSWERS.clear()


# ---- what is there: counted alike on the meta device and in a loaded model

CASES = {"full": {}, "LoRA": dict(peft=True), "LoRA on some layers": dict(peft=True, target_modules="SOME", lora_r=3), "DoRA": dict(peft=True, use_dora=True), "rows of new tokens": dict(peft=True, new=2),
         "layers saved whole": dict(peft=True, modules_to_save="HEAD"), "int8": dict(peft=True, quantization="int8"), "int4": dict(peft=True, quantization="int4"), "bf16 base": dict(peft=True, dtype=torch.bfloat16)}


@pytest.mark.parametrize("family", ["llama", "untied", "gpt2"])
@pytest.mark.parametrize("case", CASES)
def test_weights_and_adapter_are_those_of_the_loaded_model(tmp_path, family, case):
    fields = dict(CASES[case])
    some, head = ("c_attn,c_fc", "wte") if family == "gpt2" else ("q_proj,down_proj", "embed_tokens")
    dtype, new = fields.pop("dtype", torch.float32), fields.pop("new", 0)
    if "target_modules" in fields: fields["target_modules"] = some
    if "modules_to_save" in fields: fields["modules_to_save"] = head
    folder = save_tiny(tmp_path/"m", cls="gpt2" if family == "gpt2" else "llama", hidden=64, tie=family == "llama")
    r, tokenizer = recipe(folder, gradient_checkpointing=False, **fields), load_tokenizer(folder)
    ids = list(range(len(tokenizer), len(tokenizer) + new))
    if new: tokenizer.add_tokens([f"<new{i}>" for i in range(new)], special_tokens=True)
    real = load_for_training(r, tokenizer, ids, torch.device("cpu"), dtype)
    counted = held_parts(real)
    blank = blank_model(folder, r, dtype if r.peft else torch.float32, r.quantization, len(tokenizer), ids)
    assert blank.parts() == {k: counted[k] for k in ("weights", "adapter")}
    assert sum(p.numel() for p in blank.trained) == sum(p.numel() for p in real.parameters() if p.requires_grad)


def test_an_adapter_is_r_times_in_and_out(tmp_path):
    blank = blank_model(LlamaConfig(**LLAMA_8B), recipe(peft=True, lora_r=16), torch.bfloat16)
    layer = 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 2 * (4096 + 14336) + (14336 + 4096))                  # q, o; k, v; gate, up; down
    assert blank.parts()["adapter"] == 4 * 32 * layer
    assert abs(blank.parts()["weights"] - 2 * 8_030_261_248) < 4096                                              # Llama-3-8B has 8,030,261,248 parameters; the rest is rotary frequencies


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit"])
def test_optimizer_state_is_that_after_a_real_step(tmp_path, optimizer):
    folder = save_tiny(tmp_path/"m", hidden=64)
    write_jsonl(tmp_path/"d.jsonl", [dict(text="the light in the kitchen " * (i % 4 + 1)) for i in range(16)])
    run, model, data = Trainer(Recipe(model=folder, data_path=str(tmp_path/"d.jsonl"), project_name=str(tmp_path/"r"), max_steps=2, batch_size=4, gradient_accumulation=1, optimizer=optimizer)).fit()
    parts = next(e["parts"] for e in run.events() if e["kind"] == "memory" and "parts" in e)
    said = memory_forecast(data).parts
    assert said["weights"] == parts["weights"] and parts["gradients"] == sum(p.numel() * 4 for p in model.parameters())
    assert abs(said.get("optimizer", 0) - parts["optimizer"]) <= 2048, (said.get("optimizer"), parts["optimizer"])      # code tables of 8-bit optimizers
    plan = next(e for e in run.events() if e["kind"] == "plan")
    assert plan["forecast"]["parts"]["weights"] == parts["weights"] and sum(plan["forecast"]["parts"].values()) == plan["forecast"]["total_bytes"] and plan["recompute"] is True


# ---- activations: what autograd saves in sftkit's own forward pass on a CPU, against the rehearsal

SHAPE = dict(vocab_size=300, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
FAMILIES = {"Llama": {}, "Qwen2": {}, "Qwen3": dict(head_dim=16), "Gemma": dict(head_dim=16), "Gemma2": dict(head_dim=16), "Gemma3Text": dict(head_dim=16), "Phi3": {}, "Mistral": dict(sliding_window=64), "SmolLM3": {}, "GPTNeoX": {},
            "GPT2": dict(n_embd=64, n_layer=3, n_head=4, n_positions=256)}


def real_model(family, r=None):
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(**{**SHAPE, **FAMILIES[family]})
    cls = dict(GPT2="GPT2LMHeadModel", Gemma3Text="Gemma3ForCausalLM").get(family, family + "ForCausalLM")
    model = getattr(transformers, cls)(config)
    model.config.use_cache = False
    return config, (add_lora(model, r) if r is not None and r.peft else model).train()


def kept_bytes(model, batch):
    "Bytes of distinct storages that live between forward and backward pass because autograd saved them, without parameters and buffers."
    seen, own = {}, {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    def pack(t):
        if t.untyped_storage()._cdata not in own: seen[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): loss = token_loss_sum(model, batch)
    return sum(seen.values()), loss


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "LoRA"])
def test_activations_are_those_that_autograd_saves(family, adapter):
    r = recipe(peft=adapter, lora_r=4)
    config, model = real_model(family, r)
    random = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 300, (n,), generator=random).tolist() for n in (40, 90, 25)]
    padded = collate([dict(input_ids=i, labels=i) for i in rows], 0)
    flat = use_flat_attention(model, rows[0]) is None
    real, _ = kept_bytes(model, flat_batch(padded) if flat else padded)
    load = Load(3, 90, (40, 90, 25), 155 - 3)
    windows, said = rehearse(blank_model(config, r), load, CPU, torch.float32, flat=flat)
    held = said["activations"] + said["loss"]
    # what lives but is not saved, inputs and the labels above all, is in the rehearsal too
    # Within 1 % but for GPT-2, whose dropped attention on a CPU, and Mistral, whose window's mask, are reckoned roughly.
    low, high = dict(GPT2=(0.95, 1.03), Mistral=(0.95, 1.01)).get(family, (0.99, 1.01))
    assert low * real < held < high * real, (family, real, held)


def test_a_family_that_keeps_its_padding_is_found_out():
    config, model = real_model("Gemma2")
    assert use_flat_attention(model, list(range(3, 40))) is not None
    load = Load(3, 90, (40, 90, 25), 152)
    with pytest.raises(memory._KeepsPadding): rehearse(blank_model(config, recipe()), load, CPU, torch.float32, flat=True)
    said = forecast(recipe(gradient_checkpointing=False), lambda r: (load, load), CPU, config)
    assert said.flat is False and "padded" in said.details()[0] and not said.notes


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_peak_is_that_of_a_real_step_watched_by_the_same_ledger(family, recompute, micro_batches):
    "The ledger can watch real tensors as well: a whole step on the CPU, backward pass included, peaks where its rehearsal does."
    config, model = real_model(family)
    ids = torch.randint(3, 300, (155,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [ids[:40], ids[40:130], ids[130:]]
    batch = flat_batch(collate([dict(input_ids=i, labels=i) for i in rows], 0))
    if recompute: recompute_activations(model)
    assert use_flat_attention(model, rows[0]) is None
    if micro_batches == 2: token_loss_sum(model, batch).backward()
    ledger = Ledger(known=[*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)])
    with ledger: token_loss_sum(model, batch).backward()
    there = sum(p.numel() * 4 for p in model.parameters()) if micro_batches == 2 else 0
    windows, _ = rehearse(blank_model(config, recipe()), Load(3, 90, (40, 90, 25), 152), CPU, torch.float32, recompute=recompute, gradients=micro_batches == 2)
    said = max(sum(parts.values()) for parts in windows.values())
    assert abs(said / (ledger.peak + there) - 1) < 0.08, (said, ledger.peak + there)


def test_recomputation_keeps_a_layers_input_alone():
    load, (config, _) = Load(4, 128, (128,) * 4, 400), real_model("Llama")
    at = lambda recompute: rehearse(blank_model(config, recipe()), load, CPU, torch.float32, recompute=recompute)[1]["activations"]
    assert at(True) < at(False) / 4
    deeper = LlamaConfig(**{**SHAPE, "num_hidden_layers": 6})
    more = rehearse(blank_model(deeper, recipe()), load, CPU, torch.float32, recompute=True)[1]["activations"] - at(True)
    assert more == 3 * 512 * 64 * 4                                     # layers x tokens x hidden x fp32


@pytest.mark.parametrize("fields", [{}, dict(peft=True), dict(peft=True, quantization="int4"), dict(gradient_accumulation=1), dict(optimizer="adamw_torch_fused", gradient_checkpointing=False)], ids=["full", "LoRA", "int4", "one micro-batch", "kept"])
def test_deep_models_are_reckoned_from_shallow_ones(fields):
    config, load = LlamaConfig(**{**SHAPE, "num_hidden_layers": 14}), Load(4, 256, (256,) * 4, 700)
    r = recipe(**fields)
    line = forecast(r, lambda r: (load, load), A100, config)
    with patch.object(memory, "_alike", lambda model: False): whole = forecast(r, lambda r: (load, load), A100, config)
    assert line.moment == whole.moment and abs(line.allocated_bytes / whole.allocated_bytes - 1) < 0.005


# ---- figures measured on an H100 (bench/GPU.md, bench/speed.py): a Llama of 1.2 billion parameters on rows of log-normal length; peak GiB that torch allocated

def speed_rows():
    random = torch.Generator().manual_seed(1)
    return torch.exp(torch.randn(640, generator=random) + 5.2).clamp(8, 1900).int().tolist()


MEASURED = {"padded, LoRA": (6.3, dict(peft=True, lora_dropout=0), False), "padding-free, LoRA": (5.0, dict(peft=True, lora_dropout=0), True),
            "packed, LoRA": (6.3, dict(peft=True, lora_dropout=0, packing=True, gradient_accumulation=1), True),
            "packed, LoRA, no recomputation": (32.2, dict(peft=True, lora_dropout=0, packing=True, gradient_accumulation=1, gradient_checkpointing=False), True),
            "padding-free, full": (22.5, {}, True)}                     # on an H200, of the batches as they are formed now


@pytest.mark.parametrize("name", MEASURED)
def test_forecast_comes_within_three_percent_of_what_was_measured(name):
    from sftkit.prepare import _batches
    gib, fields, flat = MEASURED[name]
    lengths = [n + 1 for n in speed_rows()]                             # words are tokens, and an end
    def loads(r): # of micro-batches as they were formed when this was measured: rows sorted by length, eight batches at a time
        order = _batches(r.replace(gradient_accumulation=1), lengths)
        if name != "padding-free, full": order.sorted_together = 8 * r.batch_size
        return heaviest(order.epoch_batches(order.random(0)), lengths, [n - 1 for n in lengths])
    said = forecast(recipe(epochs=1, compile=False, **fields), loads, machine("H200" if name == "padding-free, full" else "H100"), LlamaConfig(**LLAMA_1B), flat=flat)
    assert abs(said.allocated_bytes / 2**30 / gib - 1) < 0.03, (said.allocated_bytes / 2**30, gib)


def test_forecast_of_an_8b_model_stands_beside_figures_of_others():
    """Measured on an H100 for other libraries: QLoRA (nf4, r=16) of this shape with checkpointing took 13.4 GiB in TRL, packed with variable-length attention, 15.7k tokens a micro-batch. TRL's loss stands otherwise in memory and its adapters are bf16, so 15 % is allowed."""
    load = Load(8, 2048, (1024,) * 16, 9600)
    said = forecast(recipe(peft=True, quantization="int4", packing=True, lora_dropout=0), lambda r: (load, load), machine("H100"), LlamaConfig(**LLAMA_8B))
    assert abs(said.allocated_bytes / 2**30 / 13.4 - 1) < 0.15, said
    assert abs(said.parts["weights"] / 2**30 - (0.516 * 6.98e9 + 2 * 1.05e9) / 2**30) < 0.1         # 6.98 billion in linear layers, 1.05 in embedding and head
    full = forecast(recipe(), lambda r: (load, load), A100, LlamaConfig(**LLAMA_8B))
    assert full.total_bytes > 16 * 8.03e9 and not full.fits


# ---- verdict and remedies

def eight(r): return (Load(r.batch_size, min(2048, r.max_seq_length), (min(2048, r.max_seq_length),) * r.batch_size, 500 * r.batch_size),) * 2


@pytest.mark.parametrize("fields,gpu", [({}, "A100"), (dict(peft=True, gradient_checkpointing=False), "RTX 4090"), (dict(peft=True, quantization="int8"), "T4")], ids=["full", "LoRA kept", "int8"])
def test_each_remedy_is_a_recipe_and_lowers_the_forecast(fields, gpu):
    config = LlamaConfig(**{**LLAMA_8B, "hidden_size": 8192, "intermediate_size": 28_672, "num_attention_heads": 64, "num_hidden_layers": 3})  # few wide layers are soon rehearsed
    said = forecast(recipe(**fields), eight, machine(gpu), config)
    found = said.remedies
    assert len(found) >= 3 and [x.total_bytes for x in found] == sorted(x.total_bytes for x in found)
    for remedy in found:
        changed = said.recipe.replace(**remedy.changes)                 # valid values
        again = forecast(changed, eight, machine(gpu), config)
        assert again.total_bytes == remedy.total_bytes < said.total_bytes and remedy.fits == again.fits
        assert changed.batch_size * changed.gradient_accumulation >= said.recipe.batch_size * said.recipe.gradient_accumulation
    names = {tuple(x.changes) for x in found}
    if not said.recipe.gradient_checkpointing: assert ("gradient_checkpointing",) in names
    if not said.recipe.peft: assert ("peft",) in names and ("peft", "quantization") in names
    if said.verdict != "fits": assert found[0].code in repr(said) and "What would help" in said._repr_html_()


def test_quantisation_is_no_remedy_for_a_family_of_which_nothing_is_packed():
    config = transformers.FalconConfig(hidden_size=4096, num_attention_heads=32, num_hidden_layers=3)
    for fields in ({}, dict(peft=True)):
        found = [x.changes for x in forecast(recipe(gradient_checkpointing=False, **fields), eight, machine("T4"), config).remedies]
        assert dict(gradient_checkpointing=True) in found and not any("quantization" in changes for changes in found)


def test_verdicts_go_by_the_limit():
    config = LlamaConfig(**SHAPE)
    size = forecast(recipe(), eight, A100, config).total_bytes
    of = lambda share: forecast(recipe(), eight, machine(device_bytes=int(size / share)), config)
    assert [of(s).verdict for s in (0.5, 0.95, 1.2)] == ["fits", "tight", "does not fit"] and of(0.95).fits and not of(1.2).fits
    assert repr(of(0.5)).startswith("fits with room") and repr(of(0.95)).startswith("fits, and is tight")


def test_auto_recomputes_only_where_memory_asks_for_it():
    config = LlamaConfig(**LLAMA_1B)
    on = lambda gpu: forecast(recipe(peft=True, gradient_checkpointing="auto"), eight, machine(gpu), config)
    assert on("A100").recompute is False and on("T4").recompute is True and on("T4").recipe.gradient_checkpointing == "auto"
    assert forecast(recipe(gradient_checkpointing="auto"), eight, CPU, LlamaConfig(**SHAPE)).recompute is False


def test_several_devices_share_or_repeat():
    config = LlamaConfig(**LLAMA_1B)
    of = lambda n=4, **f: forecast(recipe(**f), eight, A100, config, processes=n)
    one, ddp, fsdp, zero3 = of(1), of(distributed_backend="ddp"), of(distributed_backend="fsdp"), of(distributed_backend="deepspeed")
    assert ddp.parts["buckets"] == ddp.parts["gradients"] and ddp.parts["weights"] == one.parts["weights"]
    for shared in (fsdp, zero3): assert shared.parts["optimizer"] == -(-one.parts["optimizer"] // 4) and shared.total_bytes < one.total_bytes
    assert fsdp.parts["weights"] == -(-one.parts["weights"] // 4) and "on each of 4 devices" in fsdp.sentence()
    lora = of(distributed_backend="deepspeed", peft=True)
    assert lora.parts["weights"] == of(1, peft=True).parts["weights"] and lora.parts["optimizer"] == -(-of(1, peft=True).parts["optimizer"] // 4)      # stage 2 shares no weights


def test_distillation_counts_the_teacher(tmp_path):
    folder, teacher = save_tiny(tmp_path/"m"), save_tiny(tmp_path/"t", layers=4, hidden=64)
    write_jsonl(tmp_path/"d.jsonl", [dict(text="the light in the kitchen " * (i % 4 + 1)) for i in range(16)])
    plan = Session(folder, project=str(tmp_path/"p")).data(str(tmp_path/"d.jsonl"))
    alone, taught = plan.memory(), plan.distill(teacher).memory()
    assert taught.parts["teacher"] == held_parts(load_base(teacher))["weights"] and taught.total_bytes > alone.total_bytes + taught.parts["teacher"] / 2 and not taught.notes


def test_evaluation_with_answers_can_be_the_highest_moment():
    config = LlamaConfig(**SHAPE)
    said = forecast(recipe(peft=True, use_enhanced_eval=True, eval_batch_size=512, eval_max_new_tokens=4000), eight, A100, config)
    assert said.moment == "evaluation" and said.parts["cache"] == 2 * 2 * 512 * 6048 * 32 * 3


def test_a_family_that_cannot_be_rehearsed_gets_a_rough_figure_that_says_so():
    config = LlamaConfig(**SHAPE)
    with patch.object(memory, "rehearse", side_effect=NotImplementedError("looks at numbers")): said = forecast(recipe(), eight, A100, config)
    whole = forecast(recipe(), eight, A100, config)
    assert "rough figure" in said.notes[0] and "looks at numbers" in said.notes[0] and 0.3 < said.total_bytes / whole.total_bytes < 5


def test_mixture_of_experts_has_a_forecast():
    config = transformers.MixtralConfig(**SHAPE, num_local_experts=4)
    said = forecast(recipe(gradient_checkpointing=False), eight, A100, config)
    assert said.parts["activations"] > 0 and said.parts["weights"] > 4 * 3 * 4 * 3 * 64 * 160


# ---- machines

def test_cards_by_any_spelling():
    assert machine("rtx-3090").limit_bytes == machine("NVIDIA GeForce RTX 3090").limit_bytes == machine("3090").limit_bytes and machine("a100 80GB").name == "A100" and machine("v100-32gb").name == "V100-32GB"
    assert machine("T4", device_bytes=2**30) == Machine("T4", 2**30, "cuda", 7.5) and all(machine(name).name == name for name in GPUS)
    with pytest.raises(RecipeError, match="Did you mean `H100`"): machine("H10O")


def test_old_cards_attend_by_groups_of_documents_in_fp16():
    load, config = Load(2, 300, (300, 200), 400), LlamaConfig(**SHAPE)
    assert machine("T4").dtype(None) == torch.float16
    new, old = (forecast(recipe(peft=True, gradient_checkpointing=False), lambda r: (load, load), machine(gpu), config) for gpu in ("A100", "T4"))
    assert old.parts["activations"] > new.parts["activations"] and old.flat and new.flat


def test_a_rehearsal_is_made_once_for_the_same_question_and_again_for_another():
    load, made = Load(2, 300, (300, 200), 400), []
    real = memory.rehearse
    ask = lambda **fields: forecast(recipe(peft=True, **{"gradient_checkpointing": False, **fields}), lambda r: (load, load), A100, LlamaConfig(**SHAPE)).total_bytes
    with patch.object(memory, "rehearse", lambda *a, **k: made.append(a) or real(*a, **k)):
        assert ask() == ask(lr=1e-3) and len(made) == 1
        assert ask(lora_dropout=0.5) != ask(lora_dropout=0) and len(made) == 3
        assert ask(gradient_checkpointing=True) < ask() and len(made) == 4


# ---- as a person meets it

@pytest.fixture
def plan(tmp_path, tiny, chat_file): return Session(tiny, project=str(tmp_path/"run")).data(chat_file).options(batch_size=4)


def test_plan_memory_loads_no_weight(plan):
    from transformers import PreTrainedModel
    with patch.object(PreTrainedModel, "from_pretrained", side_effect=AssertionError("weights were loaded")), patch("safetensors.safe_open", side_effect=AssertionError("a file of weights was opened")):
        said = plan.memory(gpu="T4")
        assert said.fits and said.limit_bytes == int(14.6 * 2**30) and said.total_bytes == sum(said.parts.values()) and isinstance(said.remedies, list)
        assert not plan.lora(r=4).quantize("int4").memory(device_bytes=2**20).fits
    html = said._repr_html_()
    assert "<script" not in html and "class=" not in html and html.count("<div") == html.count("</div>") and "fits with room" in html
    with pytest.raises(RecipeError, match="is not in the table"): plan.memory(gpu="GT 710")


def test_plan_shows_the_verdict_once_rows_are_encoded(plan):
    assert "memory" not in repr(plan).replace("in memory", "")
    plan.preview(1)
    assert re.search(r"memory +fits with room: .* on cpu", repr(plan)) and "fits with room" in plan._repr_html_()


def test_missing_model_is_named_before_anything(tmp_path, chat_file):
    with pytest.raises(ModelError, match="no folder"): Session("./nowhere", project=str(tmp_path/"p")).data(chat_file).memory()
    shown = repr(Session("./nowhere", project=str(tmp_path/"p")).data(chat_file))
    assert "memory" not in shown


def test_command_line(tiny, chat_file, capsys):
    assert main(["memory", "--model", tiny, "--data-path", chat_file, "--gpu", "T4", "--peft"]) == 0
    out = capsys.readouterr().out
    assert "fits with room" in out and "on T4" in out and "adapter" in out
    assert main(["memory", "--model", tiny, "--data-path", chat_file, "--device-gib=0.5"]) == 0 and "does not fit" in capsys.readouterr().out
    assert main(["memory", "--model", tiny, "--data-path", chat_file, "--gpu", "T5"]) == 1 and "Did you mean" in capsys.readouterr().err
    assert main(["memory", "--model", tiny, "--data-path", chat_file, "--device-gib"]) == 1 and "a size in GiB" in capsys.readouterr().err


def test_largest_batch_is_found_among_the_runs_own(plan):
    data = plan._work.data
    said = memory_forecast(data)
    from sftkit.prepare import train_loader
    sizes = []
    for epoch in range(3):
        loader = train_loader(data, flat=True); loader.batch_sampler.set_epoch(epoch)
        sizes += [b["input_ids"].numel() for b in loader]
    assert said.load.tokens == max(sizes)


def test_a_run_records_forecast_and_parts_and_shows_them(plan, tmp_path):
    from sftkit.charts import Progress, gauge_html
    from sftkit.view import run_html
    from sftkit.widgets import _live_facts
    run = plan.lora(r=4).options(epochs=1, gradient_checkpointing="auto").fit(renderer="plain")
    events = read_events(run.path/"events.jsonl")[0]
    said = next(e for e in events if e["kind"] == "plan")["forecast"]
    parts = [e["parts"] for e in events if e["kind"] == "memory" and "parts" in e]
    assert len(parts) == 1 and parts[0]["adapter"] == said["parts"]["adapter"] == parts[0]["gradients"] and parts[0]["optimizer"] == said["parts"]["optimizer"]
    progress = Progress(events)
    gauge = progress.gauge()
    assert gauge["forecast_bytes"] == said["peak_bytes"] == said["total_bytes"] and gauge["parts"] == parts[0]
    shown = gauge_html(gauge)
    assert all(word in shown for word in ("weights", "adapter", "optimizer state", "gradients", "activations, Python and libraries", "forecast")) and shown in run_html(progress)
    live = _live_facts(progress)
    drawn = live["gauge"]
    assert [p[0].split()[0] for p in drawn["parts"]] == ["weights", "adapter", "optimizer", "gradients", "activations,"] and drawn["forecast"][1] <= 1
    assert len(json.dumps(drawn["parts"])) < 400 and sum(p[1] for p in drawn["parts"]) <= drawn["peak"] + 0.001


def test_a_gauge_without_parts_is_as_before():
    from sftkit.charts import gauge_html
    assert "activations" not in gauge_html(dict(allocated_bytes=1, reserved_bytes=2, peak_bytes=3, limit_bytes=10)) and "forecast" not in gauge_html(dict(allocated_bytes=1, peak_bytes=3, limit_bytes=10))


def test_a_gpu_run_that_will_not_fit_is_warned_and_goes_on(plan, monkeypatch):
    import sftkit.training as training
    too_much = forecast(recipe(), eight, machine("T4"), LlamaConfig(**LLAMA_1B))
    monkeypatch.setattr(training, "memory_forecast", lambda data, compiled: too_much)
    class Cuda: type = "cuda"
    log = []
    class Log:
        def append(self, kind, **fields): log.append(fields)
    work = plan._work
    said = work._forecast(Log(), work.data, Cuda())
    assert said is too_much and log[0]["level"] == "warning" and "does not fit" in log[0]["text"] and said.remedies[0].code in log[0]["text"]


def test_forecast_on_the_sample_model():
    from sftkit import sample_data, sample_model
    said = Session(sample_model(), project="p").data(sample_data()).memory(gpu="T4")
    assert said.fits and abs(said.parts["weights"] / 4 - 134_515_008) < 1000 and said.verdict == "fits"        # SmolLM2-135M, tied


def test_the_peak_is_that_of_the_run(tiny, chat_file):
    "What an earlier run of this process, or the process that started this one, held is not this run's."
    from sftkit.memory import reset_peak
    cpu = torch.device("cpu")
    once = torch.ones(2**28, dtype=torch.uint8); high = read_memory(cpu)["peak_bytes"]; del once
    reset_peak(cpu)
    after = read_memory(cpu)
    assert after["allocated_bytes"] <= after["peak_bytes"] < high - 2**27
    again = torch.ones(2**27, dtype=torch.uint8)
    assert read_memory(cpu)["peak_bytes"] >= after["allocated_bytes"] + again.nbytes - 2**20
    del again
    run = Session(tiny, project="run").data(chat_file).options(max_steps=2, batch_size=2).fit()
    assert max(e["peak_bytes"] for e in run.events if e["kind"] == "memory") < high


@pytest.mark.parametrize("card, counts", [("T4", False), ("A100", True)])
def test_recomputed_layers_are_forecast_as_compiled_only_where_they_are(card, counts):
    lengths = [40] * 64
    loads = lambda r: heaviest([list(range(8))], lengths, lengths)
    plain, compiled = (forecast(recipe(peft=True, lora_dropout=0, gradient_checkpointing=True), loads, machine(card), LlamaConfig(**SHAPE), compiled=c) for c in (False, True))
    assert (compiled.parts["activations"] < plain.parts["activations"]) == counts == any("compiled" in n for n in compiled.notes)
