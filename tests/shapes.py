"""Two small local checkpoints with random weights, shaped like Qwen3 and Llama 3 where it matters to text: special tokens, chat template, BOS, ends."""
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from reprpo.world.model import sample

WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

QWEN3_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN3_MARKS = ["<tool_call>", "</tool_call>", "<think>", "</think>"]  # added to the vocabulary, but not flagged as special
QWEN3_TEMPLATE = """\
{%- set ns = namespace(asked=-1) %}
{%- for m in messages if m.role == 'user' and not m.content.startswith('<tool_response>') %}{% set ns.asked = messages.index(m) %}{% endfor %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- set said, thought = m.content, '' %}
    {%- if m.role == 'assistant' and '</think>' in said %}
        {%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- set said = said.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if m.role == 'assistant' and loop.index0 > ns.asked and (loop.last or thought) %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
    {{- said + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""

LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
                  "<|reserved_special_token_0|>"]
LLAMA3_TEMPLATE = """\
{{- bos_token }}
{%- if date_string is not defined %}
    {%- if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}
{%- endif %}
{%- set first = messages[0].content | trim if messages[0].role == 'system' else '' %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\nToday Date: ' + date_string + '\\n\\n' }}
{{- first + '<|eot_id|>' }}
{%- for m in messages if m.role != 'system' %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""


@lru_cache
def english() -> tuple[str, ...]:
    "Some thousand words to learn merges from: the world's documents, and the licence for longer ones."
    return (*sample(400), (Path(__file__).parents[1] / "LICENSE").read_text())


def byte_level(special: list[str], marks: list[str] = (), size: int = 1000) -> Tokenizer:
    "A byte-level BPE with special tokens behind its vocabulary, as both families have them."
    t = Tokenizer(models.BPE())
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"), alphabet])
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(english(), trainers.BpeTrainer(vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    t.add_special_tokens(special)
    t.add_tokens(list(marks))
    return t


def qwen3_tokenizer() -> PreTrainedTokenizerFast:
    "No BOS, the turn's end is EOS, another token pads; a last answer gets an empty block of thought."
    t = byte_level(QWEN3_SPECIAL, QWEN3_MARKS)
    t.normalizer = normalizers.NFC()
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=QWEN3_TEMPLATE, model_max_length=1024,
                                   clean_up_tokenization_spaces=False)


def llama3_tokenizer(eos: str = "<|end_of_text|>") -> PreTrainedTokenizerFast:
    "BOS from the tokenizer and from the template, a date, and a turn's end that is not EOS."
    t = byte_level(LLAMA3_SPECIAL)
    bos = LLAMA3_SPECIAL[0]
    first = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, t.token_to_id(bos))])
    t.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), first])
    return PreTrainedTokenizerFast(tokenizer_object=t, bos_token=bos, eos_token=eos, chat_template=LLAMA3_TEMPLATE, model_max_length=1024,
                                   clean_up_tokenization_spaces=False)


def _save(folder, tokenizer, config, model) -> Path:
    "The whole checkpoint, with weights that depend on nothing."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = model(config)
    net.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id], bos_token_id=config.bos_token_id, do_sample=True, temperature=0.6, top_k=20)
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    net.save_pretrained(folder)
    if bar: logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)
    return Path(folder)


SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
             max_position_embeddings=1024, initializer_range=0.1)


def qwen3_shaped(folder, tied: bool = True) -> Path: # the folder
    "A checkpoint like Qwen3's: `reprpo --model FOLDER` reads it."
    t = qwen3_tokenizer()
    ids = dict(eos_token_id=t.eos_token_id, bos_token_id=t.pad_token_id, pad_token_id=t.pad_token_id)
    config = Qwen3Config(vocab_size=len(t), tie_word_embeddings=tied, **ids, **SMALL)
    return _save(folder, t, config, Qwen3ForCausalLM)


def llama3_shaped(folder, tied: bool = True) -> Path: # the folder
    "A checkpoint like Llama 3.2's: `reprpo --model FOLDER` reads it."
    t = llama3_tokenizer()
    config = LlamaConfig(vocab_size=len(t), tie_word_embeddings=tied, bos_token_id=t.bos_token_id, eos_token_id=t.eos_token_id, pad_token_id=None, **SMALL)
    return _save(folder, t, config, LlamaForCausalLM)
