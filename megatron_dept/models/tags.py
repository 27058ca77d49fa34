"""Who owns a parameter: the body (DeepSpeed's engine, averaged every round) or the embedding (the source's own).

Every parameter says so when it is made, as a plain attribute, so that nothing ever has to guess it from a name. The
attribute stays through `module.to(...)` and under ZeRO; `copy.deepcopy` loses it, which `check_tagged` finds.
"""

from typing import Literal

from torch import nn

Owner = Literal["body", "embedding"]
_OWNERS = ("body", "embedding")
_ATTRIBUTE = "dept_owner"


def tag(parameter: nn.Parameter, owner: Owner) -> nn.Parameter:
    """Mark `parameter` as the body's or the embedding's and return it. `ValueError` for any other owner."""
    if owner not in _OWNERS:
        raise ValueError(f"a parameter belongs to {' or '.join(_OWNERS)}, not {owner!r}")
    setattr(parameter, _ATTRIBUTE, owner)
    return parameter


def owner(parameter: nn.Parameter) -> Owner:
    """Who owns `parameter`. `ValueError` where nobody said."""
    try:
        return getattr(parameter, _ATTRIBUTE)
    except AttributeError:
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} has no owner; tag it where it is made"
        ) from None


def check_tagged(module: nn.Module, expected: Owner | None = None) -> None:
    """Raise `ValueError` naming every parameter of `module` without an owner, or with another one than `expected`."""
    untagged = [name for name, parameter in module.named_parameters() if not hasattr(parameter, _ATTRIBUTE)]
    if untagged:
        raise ValueError(f"parameters without an owner: {', '.join(untagged)}; tag them where they are made")
    if expected is not None:
        foreign = [name for name, parameter in module.named_parameters() if owner(parameter) != expected]
        if foreign:
            raise ValueError(f"parameters that are not the {expected}'s: {', '.join(foreign)}")
