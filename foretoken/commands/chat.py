"""`foretoken chat`."""

from foretoken.commands.options import (
    Attention,
    Compile,
    Device,
    Drafter,
    Dtype,
    MinP,
    Model,
    NewTokens,
    Quantize,
    Repetition,
    Rule,
    Seed,
    Settings,
    Show,
    Stop,
    Temperature,
    TopK,
    TopP,
)


def chat(
    model: Model,
    drafter: Drafter = "suffix",
    set_: Settings = None,
    rule: Rule = "match",
    max_new_tokens: NewTokens = 512,
    stop: Stop = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Repetition = 1.0,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    attention: Attention = None,
    quantize: Quantize = None,
    compiled: Compile = False,
    show: Show = False,
) -> None:
    """Talk to a model on the terminal."""
    from foretoken.answer import Ask
    from foretoken.chat import chat as talk

    sampling = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    ask = Ask(
        model,
        drafter,
        set_ or [],
        rule,
        max_new_tokens,
        stop or [],
        sampling,
        dtype,
        device,
        attention,
        quantize,
        compiled,
    )
    talk(ask, show=show)
