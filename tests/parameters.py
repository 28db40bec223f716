"""docs/parameters.md: each field of the recipe with its fluent step, flag, default and the test that holds it. `python tests/parameters.py` writes it."""
from pathlib import Path

from sftkit.recipe import recipe_fields
from sftkit.session import _STEPS

ROOT = Path(__file__).resolve().parent.parent
# field -> scenario of the acceptance tests (`test_acceptance_NN_...`) or the name of a test
SHOWN_BY = dict(
    model="01", data_path="05", project_name="01", text_column="05", trainer="10", train_split="05", valid_path="19", valid_split="19", seed="23", resume="24",
    continue_from="test_full_weights_are_those_a_run_starts_from", epochs="01", max_steps="23", batch_size="25", lr="03",
    warmup_ratio="test_each_step_has_the_learning_rate_of_the_formula", gradient_accumulation="16", optimizer="test_the_optimizer_is_the_one_that_is_named",
    scheduler="test_each_step_has_the_learning_rate_of_the_formula", early_stopping_patience="20", early_stopping_threshold="20", save_steps="24",
    eval_steps="20", save_total_limit="test_save_total_limit_leaves_the_last_checkpoints", max_seq_length="14", padding="15", chat_template="11",
    add_eos_token="13", block_size="test_block_size_cuts_joined_text", train_on="16", peft="06", lora_r="test_rank_alpha_and_rslora_are_the_published_scale",
    lora_alpha="test_rank_alpha_and_rslora_are_the_published_scale", lora_dropout="test_dropout_falls_on_the_input_of_the_adapter_alone",
    target_modules="test_exactly_the_targets_get_an_adapter", merge_adapter="08", use_dora="test_dora_normalises_columns_and_trains_their_magnitude",
    use_rslora="test_rank_alpha_and_rslora_are_the_published_scale", init_lora_weights="test_each_initialisation_starts_where_its_paper_says",
    modules_to_save="test_modules_to_save_are_trained_in_full_and_only_those_named", quantization="07", mixed_precision="27", use_flash_attention_2="28",
    gradient_checkpointing="22", unsloth="28", packing="21", use_distillation="17", teacher_model="17", distill_temperature="17", distill_alpha="17",
    use_enhanced_eval="18", eval_metrics="18", eval_save_predictions="18", eval_samples="test_eval_samples_and_eval_batch_size_are_what_an_evaluation_takes",
    weight_decay="test_weight_decay_shrinks_what_a_step_leaves", max_grad_norm="test_max_grad_norm_bounds_the_step",
    eval_batch_size="test_eval_samples_and_eval_batch_size_are_what_an_evaluation_takes",
    teacher_quantization="test_a_quantised_teacher_is_held_in_4_bit", trust_remote_code="test_code_that_comes_with_a_model_runs_only_when_trusted", compile="test_compiled_layers_train_alike", nodes="30",
    eval_max_new_tokens="18", log="29", distributed_backend="30", gpus="30", token="31", push_to_hub="test_push_to_hub_uploads_after_training", hub_model_id="test_what_the_two_fields_mean_together")


def step(name):
    "The fluent spelling of a field."
    own = dict(model="Session(model)", project_name="Session(…, project=)", data_path=".data(source)", text_column=".data(…, column=)", train_split=".data(…, split=)", valid_path=".data(…, eval=)", valid_split=".data(…, eval=)",
               peft=".lora()", use_distillation=".distill(teacher)", use_enhanced_eval=".metrics(names)", trainer=".trainer(cls)")
    if name in own: return own[name]
    return next((f".{verb}({keyword}=)" for verb, fields in _STEPS.items() for keyword, field in fields.items() if field == name), f".fit({name}=)")


def table():
    lines = ["# Parameters", "", "Each field of the recipe, made by `python tests/parameters.py`. A number is a scenario: the tests `test_acceptance_NN_…` hold it; `-` means that no test of its own does.", ""]
    group = None
    for name, f in recipe_fields().items():
        if f.metadata["group"] != group: lines += ["", f"## {(group := f.metadata['group'])}", "", "| field | fluent | flag | default | meaning | shown by |", "|---|---|---|---|---|---|"]
        default = "required" if f.default is f.default_factory else "" if name == "token" else f"`{f.default!r}`"
        lines.append(f"| `{name}` | `{step(name)}` | `--{name.replace('_', '-')}` | {default} | {f.metadata['doc'].replace('|', '/')} | {SHOWN_BY.get(name, '-')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__": (ROOT / "docs" / "parameters.md").write_text(table(), encoding="utf-8")
