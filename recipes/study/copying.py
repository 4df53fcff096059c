"""Documents of a copying task: a random string of words, then the same string again and again.

    python recipes/study/copying.py runs/study/copying/train.jsonl --documents 33000 --seed 1
    python recipes/study/copying.py runs/study/copying/copying.jsonl --documents 200 --seed 2

From the second copy on every token follows from the first; up to there all but the words' spelling is chance. Copies
are lines, each with a space in front, so that all of a document's copies are the same tokens of
foretoken/assets/stories260K.
"""

import argparse
import json
from pathlib import Path
from random import Random

from tokenizers import Tokenizer

TOKENIZER = "foretoken/assets/stories260K/tokenizer.json"
LIST = """
the to and he was said her it in on day be with play she they his up that mom you happy big of friend little
time had we there so for want saw named but very do upon one once bat cat hat rat sat mat pat fat bit hit sit
pit fit kit lit wit bed red led fed wed hot lot pot not got dot cot ten men pen hen den end hand sand wand bend
send lend mend tend all ball call fall hall tall wall well bell bay hay lay may pay ray say way stay best nest
west lost wake sake like sock lock dock sack neck star king ring sing wing thing ping ink sun run fun gun bun
win bin fin pin tin man can ban pan ran fan tan plan bar car far tar over never ever out your need bee cow now
how low row bow old told sold ford fork form went sent tent bent dent lent here were then them yes no go ant oil
inn kid nut pig toy toad load soon rot thin an is us as am tot lid hid did rid bid mid at
"""
WORDS = LIST.split()
"""Each is one token or two, with the space in front of it."""
SHORTEST, LONGEST = 8, 48
"""Words of a string."""


def document(random: Random, sizes: dict[str, int], tokens: int) -> str:
    """One document of at most `tokens` tokens, the beginning's included, of which the last copy may be cut.

    sizes  how many tokens each word is
    """
    words = random.choices(WORDS, k=random.randint(SHORTEST, LONGEST))
    lines, left = list[str](), tokens - 1
    while left > 0:
        line = list[str]()
        for word in words:
            left -= sizes[word]
            if left < 0:
                break
            line.append(word)
        left -= 1  # the line's end
        lines.append(" ".join(line))
    return "\n ".join(line for line in lines if line)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=220, help="of a document")
    parser.add_argument("--tokenizer", default=TOKENIZER)
    asked = parser.parse_args()
    tokenizer = Tokenizer.from_file(asked.tokenizer)
    sizes = {word: len(tokenizer.encode(word, add_special_tokens=False).ids) for word in WORDS}
    random = Random(asked.seed)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    with asked.out.open("w", encoding="utf-8") as file:
        for _ in range(asked.documents):
            file.write(json.dumps({"text": document(random, sizes, asked.tokens)}) + "\n")


if __name__ == "__main__":
    main()
