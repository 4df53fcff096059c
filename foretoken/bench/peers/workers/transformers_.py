"""transformers: `generate`, its assisted generation and its prompt lookup."""

from time import perf_counter
from typing import Any

import torch
import transformers
from protocol import Answer, Group, Load, Tally, serve
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer


class Watch(BaseStreamer):
    """When the first token came, and how many came from each forward. `generate` hands it the prompt first."""

    def __init__(self) -> None:
        self.puts: list[int] = []
        self.first = 0.0

    def put(self, value: torch.Tensor) -> None:
        if len(self.puts) == 1:
            self.first = perf_counter()
        self.puts.append(value.shape[-1])

    def end(self) -> None:
        pass


class Transformers:
    """A model and what assists it."""

    def __init__(self, load: Load) -> None:
        torch.set_num_threads(load.threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = loaded(load.model, load.dtype, self.device)
        self.options: dict[str, Any] = {}
        self.assistant: Any = None
        if load.method == "prompt_lookup":
            self.options["prompt_lookup_num_tokens"] = load.settings["length"]
            self.options["max_matching_ngram_size"] = load.settings["ngram"]
        if load.draft is not None:
            self.assistant = loaded(load.draft, load.dtype, self.device)
            settings = self.assistant.generation_config
            settings.num_assistant_tokens = load.settings["depth"]
            settings.num_assistant_tokens_schedule = "constant"
            settings.assistant_confidence_threshold = 0.0
        self.plain = load.method == "plain"
        self.facts = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "device": str(self.device),
            "attention": self.model.config._attn_implementation,
            "weights_bytes": sum(p.nbytes for p in self.model.parameters()),
            "extra_parameters": 0 if self.assistant is None else sum(p.numel() for p in self.assistant.parameters()),
            "batched": self.plain,  # it refuses to assist more than one row
            "exact": True,
        }

    def run(self, group: Group) -> Answer:
        width = max(map(len, group.prompts))
        tokens = torch.zeros(len(group.prompts), width, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(group.prompts):  # on the right, as `generate` wants them
            tokens[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        config = GenerationConfig(
            max_new_tokens=group.max_new_tokens,
            do_sample=group.temperature > 0,
            temperature=group.temperature or 1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=group.eos or None,
            pad_token_id=0,
            **self.options,
        )
        torch.manual_seed(group.seed)
        watch = Watch()
        began = perf_counter()
        out = self.model.generate(
            tokens.to(self.device),
            attention_mask=mask.to(self.device),
            generation_config=config,
            streamer=watch,
            assistant_model=self.assistant,
        )
        rows = out[:, width:].tolist()
        seconds = perf_counter() - began
        tally = Tally()
        for emitted in watch.puts[1:]:
            tally.add(emitted)
        return Answer(
            [upto(row, group.eos) for row in rows],
            seconds,
            watch.first - began,
            len(watch.puts) - 2,
            None if self.plain else tally.accepted,
        )


def loaded(folder: str, dtype: str, device: torch.device) -> Any:
    """The model with no generation settings of its own: those of a run are all that count."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.to(device).eval()
    model.generation_config = GenerationConfig()
    return model


def upto(tokens: list[int], eos: list[int]) -> list[int]:
    """The tokens as far as the first end token, with it."""
    ends = [i for i, token in enumerate(tokens) if token in eos]
    return tokens[: ends[0] + 1] if ends else tokens


if __name__ == "__main__":
    serve(Transformers)
