"""Tiny random models of every family, and the table of docs/models.md.

    python -m tests.families docs/models.md

writes that file: `foretoken.check` runs on each model here in float64, and `load` is shown each refused configuration.
"""

import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

import foretoken
from foretoken.attention import adopt
from foretoken.check import Report, check, layers_text
from foretoken.errors import UserError
from foretoken.target import Target, model_class_of

VOCAB = 80
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
ENDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
BASE: dict[str, Any] = ENDS | {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
GROUPED: dict[str, Any] = BASE | {"num_key_value_heads": 2}
HEADS: dict[str, Any] = GROUPED | {"head_dim": 12}
SLIDING: dict[str, Any] = HEADS | {"sliding_window": 16}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT: dict[str, Any] = BASE | {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
GPT: dict[str, Any] = ENDS | {"vocab_size": VOCAB, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 256}
ROTATED: dict[str, Any] = {"rotary_dim": 8}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
LONG_ROPE: dict[str, Any] = {
    "original_max_position_embeddings": 128,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 6,
        "long_factor": [2.0] * 6,
        "original_max_position_embeddings": 128,
    },
}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: t.LlamaConfig(**GROUPED),
    "apertus": lambda: t.ApertusConfig(**GROUPED),
    "arcee": lambda: t.ArceeConfig(**GROUPED),
    "bitnet": lambda: t.BitNetConfig(**GROUPED),
    "codegen": lambda: t.CodeGenConfig(**GPT, **ROTATED),
    "cohere": lambda: t.CohereConfig(**GROUPED),
    "cohere2": lambda: t.Cohere2Config(**SLIDING, layer_types=MIXED),
    "cwm": lambda: t.CwmConfig(**SLIDING, layer_types=MIXED),
    "deepseek_v2": lambda: t.DeepseekV2Config(
        **LATENT, **EXPERTS, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1
    ),
    "deepseek_v3": lambda: t.DeepseekV3Config(
        **LATENT, **EXPERTS, n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1
    ),
    "ernie4_5": lambda: t.Ernie4_5Config(**HEADS),
    "exaone4": lambda: t.Exaone4Config(**SLIDING, layer_types=MIXED),
    "falcon": lambda: t.FalconConfig(**BASE, alibi=False, new_decoder_architecture=False),
    "falcon_new": lambda: t.FalconConfig(**BASE, alibi=False, new_decoder_architecture=True, num_kv_heads=2),
    "gemma": lambda: t.GemmaConfig(**HEADS),
    "gemma2": lambda: t.Gemma2Config(**SLIDING, layer_types=MIXED, query_pre_attn_scalar=12),
    "gemma3": lambda: t.Gemma3TextConfig(**SLIDING, layer_types=MIXED, query_pre_attn_scalar=12),
    "gemma3_vision": lambda: t.Gemma3Config(
        text_config=t.Gemma3TextConfig(**SLIDING, layer_types=MIXED, query_pre_attn_scalar=12),
        vision_config=t.SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
        image_token_id=VOCAB - 1,
        mm_tokens_per_image=4,
    ),
    "glm": lambda: t.GlmConfig(**HEADS),
    "glm4": lambda: t.Glm4Config(**HEADS),
    "glm4_moe": lambda: t.Glm4MoeConfig(**HEADS, **EXPERTS, n_routed_experts=4, first_k_dense_replace=1),
    "gpt2": lambda: t.GPT2Config(**GPT),
    "gpt_bigcode": lambda: t.GPTBigCodeConfig(**GPT),
    "gpt_neox": lambda: t.GPTNeoXConfig(**BASE),
    "gpt_oss": lambda: t.GptOssConfig(**SLIDING, layer_types=MIXED, num_local_experts=4, num_experts_per_tok=2),
    "gptj": lambda: t.GPTJConfig(**GPT, **ROTATED),
    "granite": lambda: t.GraniteConfig(**GROUPED),
    "granitemoe": lambda: t.GraniteMoeConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "helium": lambda: t.HeliumConfig(**HEADS),
    "hunyuan_v1_dense": lambda: t.HunYuanDenseV1Config(**HEADS),
    "ministral": lambda: t.MinistralConfig(**SLIDING),
    "mistral": lambda: t.MistralConfig(**SLIDING),
    "mixtral": lambda: t.MixtralConfig(**SLIDING, num_local_experts=4, num_experts_per_tok=2),
    "nemotron": lambda: t.NemotronConfig(**HEADS),
    "olmo": lambda: t.OlmoConfig(**GROUPED),
    "olmo2": lambda: t.Olmo2Config(**GROUPED),
    "olmo3": lambda: t.Olmo3Config(**GROUPED, sliding_window=16, layer_types=MIXED),
    "olmoe": lambda: t.OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2),
    "opt": lambda: t.OPTConfig(
        **ENDS,
        vocab_size=VOCAB,
        hidden_size=48,
        word_embed_proj_dim=48,
        ffn_dim=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
    ),
    "persimmon": lambda: t.PersimmonConfig(**BASE),
    "phi": lambda: t.PhiConfig(**GROUPED),
    "phi3": lambda: t.Phi3Config(**GROUPED, sliding_window=16),
    "phi3_longrope": lambda: t.Phi3Config(**GROUPED, sliding_window=None, **LONG_ROPE),
    "phimoe": lambda: t.PhimoeConfig(**GROUPED, sliding_window=None, num_local_experts=4, num_experts_per_tok=2),
    "qwen2": lambda: t.Qwen2Config(**GROUPED),
    "qwen2_mixed": lambda: t.Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=16, layer_types=MIXED),
    "qwen2_moe": lambda: t.Qwen2MoeConfig(**GROUPED, **EXPERTS, num_experts=4, shared_expert_intermediate_size=32),
    "qwen3": lambda: t.Qwen3Config(**HEADS),
    "qwen3_moe": lambda: t.Qwen3MoeConfig(**HEADS, **EXPERTS, num_experts=4),
    "seed_oss": lambda: t.SeedOssConfig(**HEADS),
    "smollm3": lambda: t.SmolLM3Config(**GROUPED, no_rope_layers=[1, 0, 1]),
    "stablelm": lambda: t.StableLmConfig(**GROUPED, rope_parameters=ROPE | {"partial_rotary_factor": 0.5}),
    "starcoder2": lambda: t.Starcoder2Config(**GROUPED, sliding_window=16),
}
"""Family -> its tiny configuration."""

SELF_ATTENTION = ("codegen", "falcon", "falcon_new", "gptj", "stablelm")
"""Supported families whose models compute attention by themselves, which no step is compiled for."""

REFUSED: dict[str, Callable[[], PreTrainedConfig]] = {
    "bamba": t.BambaConfig,
    "bert": t.BertConfig,
    "bloom": t.BloomConfig,
    "falcon_alibi": lambda: t.FalconConfig(alibi=True),
    "falcon_h1": t.FalconH1Config,
    "falcon_mamba": t.FalconMambaConfig,
    "gpt_neo": t.GPTNeoConfig,
    "granitemoehybrid": t.GraniteMoeHybridConfig,
    "jamba": t.JambaConfig,
    "lfm2": lambda: t.Lfm2Config(num_hidden_layers=3, layer_types=["conv", "conv", "full_attention"]),
    "llama4": t.Llama4TextConfig,
    "mamba": t.MambaConfig,
    "mamba2": t.Mamba2Config,
    "minimax": t.MiniMaxConfig,
    "mpt": t.MptConfig,
    "nemotron_h": t.NemotronHConfig,
    "openai-gpt": t.OpenAIGPTConfig,
    "qwen3_next": t.Qwen3NextConfig,
    "recurrent_gemma": t.RecurrentGemmaConfig,
    "rwkv": t.RwkvConfig,
    "t5": t.T5Config,
    "xlstm": t.xLSTMConfig,
    "zamba2": t.Zamba2Config,
}
"""Family -> a configuration that `load` must refuse."""

SUPPORTED = tuple(CONFIGS)


def make(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Target:
    """The tiny model of a family, with weights from `seed`, attending as loaded models do."""
    with quietly():
        config = CONFIGS[name]()
        model = model_class_of(config)._from_config(config)
    randomise(model, seed)
    model = model.to(dtype)
    model.generation_config.eos_token_id = None  # outputs are compared up to their length
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # torch has no grouped product in float64
    adopt(model)
    return Target(model)


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Weights large enough that every layer changes the answer; vectors (norms, biases, sinks) moved off 0 and 1."""
    draw, embedding = torch.Generator().manual_seed(seed + 1), model.get_input_embeddings().weight
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=draw)
            if weight.dim() > 1:
                weight.copy_(noise * 2.0 / weight.shape[-1] ** 0.5)
            else:
                weight.add_(0.2 * noise)
        embedding.mul_(0.1)  # else the last token's own embedding decides, and the answer repeats it


class quietly:  # noqa: N801
    """transformers' remarks about tiny configurations silenced."""

    def __enter__(self) -> None:
        self.level = logging.get_verbosity()
        logging.set_verbosity_error()

    def __exit__(self, *error: object) -> None:
        logging.set_verbosity(self.level)


def refusal(name: str, folder: Path) -> str:
    """What `load` says of a folder that holds a refused family's configuration and no weights."""
    with quietly():
        REFUSED[name]().save_pretrained(folder)
        try:
            foretoken.load(folder)
        except UserError as error:
            return str(error)
    raise AssertionError(f"{name} was not refused")


def supported_row(name: str, report: Report) -> list[str]:
    """Family, class, layers, trees, ragged batch, compiled, difference."""
    agrees = {part: "yes" if found.agrees else "no" for part, found in report.parts.items()}
    return [
        name,
        f"`{report.model_class}`",
        layers_text(report.windows),
        agrees.get("tree", "no"),
        agrees.get("ragged batch", "no"),
        "no" if name in SELF_ATTENTION else "yes",
        f"{report.difference:.0e}",
    ]


INTRODUCTION = """# Models

foretoken runs unmodified transformers models. A model can be a target if its cache holds plain keys and values, full or
with a sliding window, and if its forward takes `position_ids` and a mask per node. What cannot is refused from
`config.json`, before any weight is read. `foretoken check MODEL` measures your own model: random prompts in a ragged
batch, read in pieces; a branching draft behind each; a path committed that is not the first; a second draft behind it.
Every node's logits are compared with a plain forward without cache, mask or batch.

This page is written by `python -m tests.families docs/models.md`, from tiny random models of each family.

## Supported

The difference is the largest of any logit, over the spread (standard deviation) of the logits, in float64. Around 1e-15
is float64's own rounding; from 1e-7 on, the family computes some part in float32 whatever its dtype. “Compiled” is
whether its step can be ([compiling](compiling.md)); the others compute attention by themselves.
"""

NOTES = """
- Sliding windows are 16 here, so that prompts pass them and go round the ring of slots.
- Rotary scalings that change with the length of the text ("dynamic", "longrope") are exact up to the original context,
  and foretoken takes that as the model's context: past it, even plain decoding depends on how its tokens were grouped
  into forwards.
- Models with experts may send a token elsewhere after a rounding. In half precision `foretoken check` then says
  "unclear" and how many nodes differ; check such a model in float32.
- Attention has to be "sdpa" or "eager" (or ours, the default in place of "sdpa"): flash attention takes no tree masks.

## Refused
"""


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(reports: dict[str, Report]) -> str:
    """The text of docs/models.md."""
    head = ["family", "transformers class", "attention", "trees", "ragged batch", "compiled", "largest difference"]
    supported = table(head, [supported_row(name, report) for name, report in reports.items()])
    with tempfile.TemporaryDirectory() as folder:
        refused = table(["family", "what `load` says"], [[name, refusal(name, Path(folder))] for name in REFUSED])
    return f"{INTRODUCTION}\n{supported}\n{NOTES}\n{refused}\n"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    Path(sys.argv[1]).write_text(page({name: check(make(name)) for name in SUPPORTED}))
