"""A model that says exactly what a small one says, and costs what a large one costs.

    python benchmarks/padded.py MODEL PARAMETERS OUT

The feed-forward layers are widened with zeros: gate, up and down projections get rows and columns that add nothing, so
every logit is what it was, while a forward reads and multiplies all of it. Speed-ups can so be measured where reading
weights is what takes time, with acceptance that is real. Drafters trained for the small model fit (other_target=true).
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

MULTIPLE = 64
"""Widths are multiples of this, as those of large models are."""


def padded(small: LlamaForCausalLM, parameters: int) -> LlamaForCausalLM:
    """The same function with about so many parameters."""
    config: Any = small.config
    have = sum(p.numel() for p in small.parameters())
    per_width = 3 * config.hidden_size * config.num_hidden_layers
    more = max(0, parameters - have) // per_width // MULTIPLE * MULTIPLE
    fields = config.to_dict() | {"intermediate_size": config.intermediate_size + more}
    wide: Any = LlamaForCausalLM(type(config)(**fields))
    weights = small.state_dict()
    for name, value in weights.items():
        if "mlp." in name:
            extra = (0, 0, 0, more) if "down_proj" not in name else (0, more, 0, 0)
            weights[name] = torch.nn.functional.pad(value, extra)
    wide.load_state_dict(weights)
    return wide.to(small.dtype)


def main() -> None:
    source, parameters, out = sys.argv[1], int(float(sys.argv[2])), Path(sys.argv[3])
    small: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    wide = padded(small, parameters)
    tokens = torch.arange(64)[None] * 37 % small.config.vocab_size
    assert torch.allclose(small(tokens).logits, wide(tokens).logits, atol=1e-4), "the padding changed the function"
    wide.generation_config = small.generation_config
    wide.to(small.config.dtype if isinstance(small.config.dtype, torch.dtype) else torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)
    print(f"{out}: {sum(p.numel() for p in wide.parameters()) / 1e6:.1f}M parameters")


if __name__ == "__main__":
    main()
