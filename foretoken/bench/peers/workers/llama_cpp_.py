"""llama.cpp through llama-cpp-python: plain decoding and its prompt lookup, one prompt at a time."""

from time import perf_counter
from typing import Any

import llama_cpp  # pyright: ignore[reportMissingImports]
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding  # pyright: ignore[reportMissingImports]
from protocol import SIZES, Answer, Group, Load, Tally, parameters, serve

CACHE_TYPES = {"float32": llama_cpp.GGML_TYPE_F32, "bfloat16": 30}  # GGML_TYPE_BF16, which the package does not name


class LlamaCpp:
    """A GGUF model; `load.files` is its file."""

    def __init__(self, load: Load) -> None:
        lookup = load.method == "prompt_lookup"
        self.llama: Any = llama_cpp.Llama(
            load.files,
            n_ctx=load.most + 32,  # room for guesses behind the last token
            n_threads=load.threads,
            n_threads_batch=load.threads,
            type_k=CACHE_TYPES[load.dtype],
            type_v=CACHE_TYPES[load.dtype],
            logits_all=lookup,  # it judges guesses by the logits of all tokens
            draft_model=LlamaPromptLookupDecoding(load.settings["ngram"], load.settings["length"]) if lookup else None,
            verbose=False,
        )
        self.lookup = lookup
        self.forwards = 0
        self.facts = {
            "llama_cpp_python": llama_cpp.__version__,
            "system": llama_cpp.llama_print_system_info().decode(),
            "activations": "float32",  # whatever the weights are
            "cache": load.dtype,
            "weights_bytes": SIZES[load.dtype] * parameters(load.model),
            "extra_parameters": 0,
            "batched": False,
            "exact": True,
        }
        evaluate = self.llama.eval

        def counted(tokens: list[int]) -> None:
            self.forwards += 1
            evaluate(tokens)

        self.llama.eval = counted

    def run(self, group: Group) -> Answer:
        (prompt,) = group.prompts
        self.llama.set_seed(group.seed)
        self.llama.reset()  # or it would not read again what it remembers of the prompt
        self.forwards = 0
        tokens: list[int] = []
        yields: list[int] = []
        began = first = perf_counter()
        options = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
        for token in self.llama.generate(prompt, temp=group.temperature, **options):
            if not tokens:
                first = perf_counter()
            tokens.append(token)
            yields += [0] * (self.forwards - len(yields))
            yields[-1] += 1
            if len(tokens) == group.max_new_tokens or token in group.eos:
                break
        seconds = perf_counter() - began
        tally = Tally()
        for emitted in yields:
            tally.add(emitted)
        accepted = tally.accepted if self.lookup else None
        return Answer([tokens], seconds, first - began, self.forwards - 1, accepted)


if __name__ == "__main__":
    serve(LlamaCpp)
