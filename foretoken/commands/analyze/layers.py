"""`foretoken analyze layers`."""

from foretoken.commands.analyze.options import Data, Length, Limit, Models, Out
from foretoken.commands.options import Device, Dtype, Model


def layers(
    model: Model,
    data: Data,
    out: Out,
    models: Models = None,
    limit: Limit = 20_000,
    length: Length = 0,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """What each layer would say, read through the output head: how far that is from the final law, and how unsure."""
    from foretoken.commands.analyze.options import finish, listed
    from foretoken.study.layers import run

    for one in [model, *listed(models)]:
        run(one, data, out, limit=limit, length=length, dtype=dtype, device=device)
    finish(out, "layers")
