"""What a recipe says before anything is loaded: values without effect, rows too long for the model, evaluation rows that are gone, the token that reads."""
import os
from pathlib import Path

import pytest
import torch
from conftest import CHAT
from sftkit import Run, Session
from sftkit.recipe import DataError, ModelError, Recipe, RecipeError, hub_access, parse_args, recipe_fields, without_effect
from running import chat_plan, nats_by_hand, real_rows, steps
from tiny import tiny_model, tiny_tokenizer, write_jsonl


def plan_for(model, project="run", source=CHAT, **fields): return chat_plan(model, project, source,
                                                                            **{**dict(max_steps=2, batch_size=4, gradient_accumulation=1), **fields})
def notes(run): return " ".join(e["text"] for e in run.events if e["kind"] == "note")
def recipe(**fields): return Recipe(**{**dict(model="m", data_path="d", project_name="p"), **fields})


# -- values without effect -----------------------------------------------------------------------------------------------------------

NOTHING = [(dict(lora_r=64), dict(peft=True)), (dict(use_dora=True, lora_dropout=0.1), dict(peft=True)), (dict(modules_to_save="norm"), dict(peft=True)),
           (dict(early_stopping_threshold=0.1), dict(early_stopping_patience=2)), (dict(eval_steps=5, eval_batch_size=2), dict(valid_split=0.1)),
           (dict(eval_steps=5), dict(valid_path="v.jsonl")),
           (dict(eval_steps=5), dict(early_stopping_patience=1)), (dict(eval_metrics="bleu"), dict(use_enhanced_eval=True)),
           (dict(eval_samples=3), dict(use_enhanced_eval=True)),
           (dict(eval_max_new_tokens=9), dict(eval_save_predictions=True)),
           (dict(distill_alpha=0.1, distill_temperature=2.0), dict(use_distillation=True, teacher_model="t")),
           (dict(teacher_quantization="int4"), dict(use_distillation=True, teacher_model="t")), (dict(epochs=1), dict(max_steps=-1)),
           (dict(warmup_ratio=0.2), dict(scheduler="cosine"))]


@pytest.mark.parametrize("fields,with_effect", NOTHING, ids=lambda d: ",".join(d))
def test_a_value_without_effect_is_named_with_what_would_make_it_count(fields, with_effect):
    missing = dict(max_steps=5) if "epochs" in fields else dict(scheduler="constant") if "warmup_ratio" in fields else {}
    said, = without_effect(recipe(**fields, **missing))
    assert all(f"`{name}={value!r}`" in said for name, value in fields.items()) and "no effect" in said and "What counts" in said
    assert not [s for s in without_effect(recipe(**fields, **with_effect)) if any(name in s for name in fields)]


def test_defaults_and_every_value_that_counts_say_nothing():
    assert without_effect(recipe()) == [] and without_effect(recipe(warmup_ratio=0.0, scheduler="constant")) == []
    assert without_effect(recipe(**{n: f.default for n, f in recipe_fields().items() if n not in ("model", "data_path", "project_name", "token")})) == []


def test_plan_and_run_say_what_has_no_effect(tiny):
    plan = plan_for(tiny, lora_r=64, eval_steps=1)
    for shown in (repr(plan), plan._repr_html_()): assert "lora_r=64" in shown and "no adapter is trained" in shown and "no rows are held out" in shown
    list(plan.batches())
    assert "no adapter is trained" in repr(plan)
    run = plan.fit()
    said = [i for i, e in enumerate(run.events) if e["kind"] == "note" and "no effect" in e["text"]]
    assert len(said) == 2 and max(said) < next(i for i, e in enumerate(run.events) if e["kind"] == "plan")


# -- rows and positions --------------------------------------------------------------------------------------------------------------

LONG = [dict(text="the light in the kitchen " * n) for n in (3, 5, 100, 200, 4, 6, 150, 2)]


@pytest.fixture(scope="module")
def gpt2_64(tmp_path_factory):
    "A GPT-2 with 64 positions."
    folder, tokenizer = tmp_path_factory.mktemp("positions")/"gpt2", tiny_tokenizer(pad=None, extra=("<|im_start|>", "<|im_end|>"))
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
                               bos_token_id=0, eos_token_id=1)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("options", [{}, dict(packing=True), dict(valid_split=3), dict(peft=True, lora_dropout=0.0)], ids=str)
def test_rows_are_cut_at_the_positions_of_the_model_everywhere(gpt2_64, options):
    plan = plan_for(gpt2_64, source=LONG, **options)
    batches = list(plan.batches())
    assert max(b["input_ids"].shape[1] for b in batches) == 64 and len(plan.encode(LONG[2])["input_ids"]) == 64 and len(plan.encode(LONG[2])["cut_ids"]) > 0
    assert plan.memory().load.width <= 64 * 4 and "cut at 64" in repr(plan)
    run = plan.fit()
    assert run.state == "finished" and "max_seq_length is 2048, the model has 64 positions: rows are cut at 64" in notes(run)
    first = next(i for i, e in enumerate(run.events) if e["kind"] == "note" and "64 positions" in e["text"])
    assert first < next(i for i, e in enumerate(run.events) if e["kind"] == "plan")
    opened = Run.open("run")
    assert opened.recipe.max_seq_length == 64 and opened.evaluate(LONG, metrics="perplexity")["loss"] > 0
    assert opened.generate("the light in the kitchen " * 10, max_new_tokens=200) == run.generate("the light in the kitchen " * 10, max_new_tokens=200)
    from sftkit.model import load_base
    if not options:
        loss, _ = nats_by_hand(load_base(gpt2_64), real_rows(batches[:1]))
        assert steps(run)[0] == pytest.approx(loss, abs=1e-4)


def test_short_rows_of_such_a_model_say_nothing_and_blocks_that_are_too_long_are_refused(gpt2_64):
    run = plan_for(gpt2_64, source=LONG[:2] * 4).fit()
    assert "positions" not in notes(run)
    with pytest.raises(ModelError, match="block_size=128.*64 positions.*block_size=64"): plan_for(gpt2_64, "x", LONG, block_size=128).fit()
    assert not Path("x").exists() and plan_for(gpt2_64, "y", LONG, block_size=64).fit().state == "finished"


def test_answers_are_generated_up_to_the_last_position(gpt2_64):
    chat = [dict(prompt="light " * n, completion="on off") for n in (3, 40, 50, 55, 70, 4, 5, 6)]
    run = plan_for(gpt2_64, source=chat, valid_split=6, use_enhanced_eval=True, eval_metrics="exact_match", eval_samples=8).fit()
    assert run.state == "finished" and any(e["kind"] == "sample" for e in run.events)


def test_rotary_rows_beyond_what_the_model_was_made_for_are_trained_with_a_note(tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    model.config.max_position_embeddings = 64
    model.save_pretrained(tmp_path/"m"); tokenizer.save_pretrained(tmp_path/"m")
    chat = [dict(prompt="light " * n, completion="on off " * 3) for n in (3, 80, 50, 55, 100, 4, 5, 90)]
    plan = plan_for(str(tmp_path/"m"), source=chat, valid_split=4, use_enhanced_eval=True, eval_metrics="exact_match")
    assert max(b["input_ids"].shape[1] for b in plan.batches()) > 64 or len(plan.encode(chat[4])["input_ids"]) > 64
    run = plan.fit()
    assert run.state == "finished" and "rows are longer than the 64 positions the model was made for" in notes(run)
    assert Run.open("run").recipe.max_seq_length == 2048


@pytest.mark.parametrize("family,fields,limit",
                         [("GPT2", dict(n_positions=77), 77), ("OPT", dict(max_position_embeddings=77), 77), ("GPTNeo", dict(max_position_embeddings=77), 77),
                          ("GPTJ", dict(n_positions=77), 77),
                                                 ("GPTBigCode", dict(n_positions=77), 77), ("Bloom", {}, None),
                                                 ("Llama", dict(max_position_embeddings=77), None), ("GPTNeoX", dict(max_position_embeddings=77), None),
                                                 ("Falcon", dict(max_position_embeddings=77), None), ("Mamba", {}, None),
                                                 ("Qwen2", dict(max_position_embeddings=77), None)])
def test_the_configuration_says_whether_positions_end(family, fields, limit):
    "Tried on the family itself: a row of one more token runs exactly where no limit is stated."
    import transformers
    from sftkit.model import position_limit
    small = dict(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_heads=4, n_embd=32, n_layer=2, n_head=4,
                 num_layers=2, attention_types=[[["global"], 2]], ffn_dim=32,
                 word_embed_proj_dim=32, rotary_dim=8, num_key_value_heads=4, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    if family != "GPTNeo": small.pop("attention_types")
    config = getattr(transformers, family + "Config")(**{**small, **fields})
    assert position_limit(config) == limit
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    run = lambda n: model(input_ids=torch.ones(1, n, dtype=torch.long))
    with torch.no_grad():
        run(77)
        if limit is None: run(100)
        else:
            with pytest.raises((IndexError, RuntimeError)): run(78)


# -- evaluation rows that are gone -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("spelling", ["path", "memory", "split", "trainer"])
@pytest.mark.parametrize("metrics", [False, True])
def test_a_mapping_that_leaves_no_evaluation_rows_is_one_error_before_loading(tiny, spelling, metrics, monkeypatch):
    import sftkit.training
    monkeypatch.setattr(sftkit.training, "load_for_training", None)
    marked = [dict(r, held=True) for r in CHAT[:6]]
    keep = lambda row: None if row.get("held") else row
    Path("folder").mkdir()
    write_jsonl("folder/train.jsonl", CHAT); write_jsonl("folder/validation.jsonl", marked); write_jsonl("valid.jsonl", marked)
    plan = plan_for(tiny, use_enhanced_eval=metrics)
    if spelling == "memory": plan = plan.data(CHAT, eval=marked).map(keep)
    if spelling == "path": plan = plan.data("folder/train.jsonl", eval="valid.jsonl").map(keep)
    if spelling == "split": plan = plan.data("folder", eval="validation").map(keep)
    if spelling == "trainer":
        from sftkit.training import Trainer
        class Own(Trainer):
            def preprocess(self, row): return keep(row)
        plan = plan.data("folder/train.jsonl", eval="valid.jsonl").trainer(Own)
    with pytest.raises(DataError, match="No rows are left to evaluate on: the mapping leaves all of"): plan.fit()
    assert not Path("run/events.jsonl").exists()


# -- the token -----------------------------------------------------------------------------------------------------------------------

def test_acceptance_31_the_token_reads_model_data_teacher_and_run_and_is_gone_afterwards(tiny, monkeypatch):
    import datasets
    from huggingface_hub import get_token
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    seen = {}
    def watch(owner, name, label, result=None):
        own = getattr(owner, name)
        def told(*args, **kwargs):
            seen.setdefault(label, []).append(get_token())
            return own(*args, **kwargs) if result is None else result
        monkeypatch.setattr(owner, name, told)
    for auto in (AutoConfig, AutoModelForCausalLM, AutoTokenizer): watch(auto, "from_pretrained", auto.__name__)
    watch(datasets, "load_dataset", "load_dataset",
          datasets.DatasetDict(train=datasets.Dataset.from_list(CHAT), validation=datasets.Dataset.from_list(CHAT[:5])))
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
    plan = plan_for(tiny, source="org/lamps", eval="validation", token="hf_of_the_recipe").lora(r=4).distill(tiny).map(lambda row: row)
    plan.memory(); run = plan.fit()
    assert set(seen) == {"AutoConfig", "AutoModelForCausalLM", "AutoTokenizer",
                         "load_dataset"} and {t for told in seen.values() for t in told} == {"hf_of_the_recipe"}
    assert len(seen["AutoModelForCausalLM"]) >= 2 and os.environ["HF_TOKEN"] == "hf_of_the_environment"
    for path in Path("run").rglob("*"): assert not path.is_file() or b"hf_of_the_recipe" not in path.read_bytes(), path
    seen.clear()
    run.merge("out")
    assert {t for told in seen.values() for t in told} <= {"hf_of_the_recipe"} and seen
    with pytest.raises(DataError):
        with hub_access("hf_other"): raise DataError("an error")
    assert os.environ["HF_TOKEN"] == "hf_of_the_environment"


def test_a_hub_that_does_not_answer_is_told_once():
    import logging
    from sftkit.recipe import hub_access
    said, log, quiet = [], logging.getLogger("huggingface_hub.utils._http"), logging.Handler()
    quiet.emit = lambda record: said.append(record.getMessage())
    log.addHandler(quiet)
    try:
        with hub_access(None), hub_access("hf_x"):
            for n in range(1, 6):
                log.warning("'[Errno -2]' thrown while requesting HEAD https://huggingface.co/a/b/resolve/main/config.json")
                log.warning(f"Retrying in {n}s [Retry {n}/5].")
            log.warning("something else")
        log.warning("Retrying in 1s [Retry 1/5].")
    finally: log.removeHandler(quiet)
    assert said == ["The hub does not answer; trying again a few times.", "something else", "Retrying in 1s [Retry 1/5]."]


def test_acceptance_32_mistakes_of_every_kind_are_told_together():
    def said(make):
        with pytest.raises(RecipeError) as told: make()
        return str(told.value)
    one = said(lambda: Recipe(model="m", data_path="d", project_name="p", padding="lft", quantization="int4"))
    assert one.startswith("2 things") and "`padding` is 'lft'" in one and "add `peft=True`" in one
    assert "add `peft=True`" not in said(lambda: Recipe(model="m", data_path="d", project_name="p", peft="maybe", quantization="int4"))      # may be what was meant
    two = said(lambda: parse_args(["--learning-rte", "3", "--epochs", "x"]))
    assert two.startswith("5 things") and all(f"`{n}`" in two for n in ("--learning-rte", "epochs", "model", "data_path", "project_name"))
    assert "things" not in said(lambda: parse_args(["--learning-rte", "3"], dict(model="m", data_path="d", project_name="p")))
    assert said(lambda: parse_args(["--model", "m", "--peft", "maybe"])).splitlines()[1].strip() == "1. `--peft` is followed by `maybe`; accepted: nothing, yes or no."


def test_acceptance_32_an_unknown_flag_hides_no_conflict():
    def said(make):
        with pytest.raises(RecipeError) as told: make()
        return str(told.value)
    whole = dict(model="m", data_path="d", project_name="p")
    words = ["--model", "m", "--data-path", "d", "--project-name", "p", "--quantization", "int4", "--learning-rate", "1"]
    one = said(lambda: parse_args(words))
    assert one.startswith("2 things") and "Did you mean `--lr`" in one and "add `peft=True`" in one
    assert one.splitlines()[2] == said(lambda: Recipe(**whole, quantization="int4", learning_rate=1)).splitlines()[2]
    assert "add `peft=True`" in said(lambda: parse_args(["--learning-rate", "1"], dict(whole, quantization="int4")))                   # of a file
    assert "add `peft=True`" not in said(lambda: parse_args([*words, "--pefft"]))                                                     # may be what was meant


@pytest.mark.parametrize("fields", [dict(push_to_hub=True), dict(continue_from="other")], ids=str)
def test_a_recipe_without_a_name_says_so_whatever_else_it_asks_for(fields):
    for make in (lambda: Recipe(model="m", data_path="d", **fields), lambda: parse_args(["--model", "m", "--learning-rate", "1"], fields)):
        with pytest.raises(RecipeError, match="`project_name` is missing"): make()


def test_a_metric_given_as_a_function_is_told_the_name_to_type(monkeypatch):
    def words(predictions, references): return 1.0
    def said(metrics):
        plan = Session("m", project="p").data("d.jsonl")
        with pytest.raises(RecipeError) as told: plan.metrics(metrics)
        with pytest.raises(RecipeError) as flat: recipe(eval_metrics=metrics)
        assert str(told.value) == str(flat.value) and " at 0x" not in str(told.value) and "`module:function`" in str(told.value)
        return str(told.value)
    for given in (words, ["bleu", words], ("bleu", lambda predictions, references: 1.0)): assert "Put it into a file my_metrics.py" in said(given)
    assert 'eval_metrics="my_metrics:words"' in said(words) and "run.evaluate(metrics=words)" in said(words)
    Path("mine.py").write_text("def words(predictions, references): return 1.0\n")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    import mine
    assert "Put it" not in said(mine.words) and 'Type eval_metrics="mine:words", or .metrics("mine:words")' in said(mine.words)


@pytest.mark.parametrize("name, why", [("use_liger_kernel", "logits of a whole batch"), ("padding_free", "without padding"), ("group_by_length", "like length")])
def test_acceptance_28_what_is_done_unasked_is_said_to_be(name, why):
    said = f"` is not a {{}}, and not needed: .*{why}.*Leave it out"
    with pytest.raises(RecipeError, match=name + said.format("parameter")): Recipe(model="m", data_path="d", project_name="p", **{name: True})
    flag = "--" + name.replace("_", "-")
    with pytest.raises(RecipeError, match=flag + said.format("flag")): parse_args([flag])
