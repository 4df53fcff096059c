"""A tokenizer of one's own: byte-level pairs that know indentation."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from foretoken.errors import UserError

END = "<|endoftext|>"
PIECES = (
    r"(?i:'(?:s|t|re|ve|m|ll|d)(?!\p{L}))"  # English endings
    r"|[\r\n]+[ \t]*"  # line breaks with the indentation behind them: one token where the next statement begins
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # a word with the one space, dot, bracket or underscore before it
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+"
    r"|[^\S\r\n]+(?!\S)"  # spaces within a line, but for the last, which belongs to what follows
    r"|\s+"
)
"""What no token crosses; after the pattern of GPT-4 and Llama 3, but for line breaks with indentation."""
SMALLEST = 257
"""Every byte, and the end of a text."""


def train_tokenizer(texts: Iterable[str], vocab: int, out: Path) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with at most `vocab` tokens, saved in the folder `out`; every text survives it.

    Its one special token ends a text; none is added by itself.
    """
    if vocab < SMALLEST:
        raise UserError(f"A vocabulary of {vocab} cannot spell every text; ask for {SMALLEST} tokens or more.")
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytewise])  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, bos_token=END, clean_up_tokenization_spaces=False
    )
    made.save_pretrained(out)
    return made
