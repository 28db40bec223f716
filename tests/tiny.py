"""Tiny random models and tokenizers that the tests make themselves; nothing is downloaded."""
import json
from pathlib import Path

WORDS = ("the a of to and in is it you that he was for on are with as his they be at one have this from or had by hot word but what some we can out other were all there "
         "when up use your how said an each she which do their time if will way about many then them write would like so these her long make thing see him two has look more day could go come did "
         "question answer python machine learning hello world light kitchen turn on off please what language programming instruction response input output system user assistant")


def tiny_tokenizer(bos="<s>", eos="</s>", pad="<pad>", chat_template=None, extra=(), vocab_size=600):
    "A byte-level BPE fast tokenizer trained on a few words; `bos`/`eos`/`pad` may be None, `extra` are further special tokens."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    special = [t for t in dict.fromkeys([bos, eos, pad, *extra]) if t]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    raw.train_from_iterator([WORDS] * 3, trainer)
    tok = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token=eos, pad_token=pad, model_max_length=100000, clean_up_tokenization_spaces=False)
    if chat_template: tok.chat_template = chat_template
    return tok


def tiny_model(tokenizer, layers=2, hidden=32, heads=4, kv_heads=2, seed=0, tie=True, cls="llama"):
    "A random Llama (or GPT-2) of a few layers over `tokenizer`'s vocabulary, fp32."
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    if cls == "gpt2":
        cfg = GPT2Config(vocab_size=len(tokenizer), n_positions=512, n_embd=hidden, n_layer=layers, n_head=heads, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **ids)
        return GPT2LMHeadModel(cfg)
    cfg = LlamaConfig(vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=heads,
                      num_key_value_heads=kv_heads, max_position_embeddings=4096, tie_word_embeddings=tie, **ids)
    return LlamaForCausalLM(cfg)


def save_tiny(folder, **kw):
    "Save a tiny model and tokenizer under `folder`; returns the folder as text. Keywords of `tiny_tokenizer` and `tiny_model` are told apart by name."
    names = {"bos", "eos", "pad", "chat_template", "extra", "vocab_size"}
    tok = tiny_tokenizer(**{k: v for k, v in kw.items() if k in names})
    model = tiny_model(tok, **{k: v for k, v in kw.items() if k not in names})
    model.save_pretrained(folder); tok.save_pretrained(folder)
    return str(folder)


def save_tiny_gguf(path, hidden=32, extra=(), packed=False):
    "A tiny Llama with its tokenizer as a GGUF file, `packed` in 8 bit (Q8_0); returns its path as text."
    import gguf
    tok = tiny_tokenizer(extra=extra)
    model = tiny_model(tok, hidden=hidden)
    c, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny"); writer.add_context_length(512); writer.add_vocab_size(len(tok)); writer.add_embedding_length(hidden); writer.add_feed_forward_length(c.intermediate_size)
    writer.add_block_count(c.num_hidden_layers); writer.add_head_count(c.num_attention_heads); writer.add_head_count_kv(c.num_key_value_heads); writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(10000.0); writer.add_tokenizer_model("gpt2"); writer.add_token_list(tok.convert_ids_to_tokens(range(len(tok))))
    writer.add_token_merges([" ".join(pair) for pair in json.loads(tok.backend_tokenizer.to_str())["model"]["merges"]])
    writer.add_token_types([3 if i in tok.added_tokens_decoder else 1 for i in range(len(tok))])
    writer.add_bos_token_id(tok.bos_token_id); writer.add_eos_token_id(tok.eos_token_id); writer.add_pad_token_id(tok.pad_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight": continue
        kind = gguf.GGMLQuantizationType.Q8_0 if packed and weight.dim() == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(names.get_name(name, (".weight",)), gguf.quantize(weight.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
    return str(path)


def write_jsonl(path, rows):
    Path(path).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return str(path)
