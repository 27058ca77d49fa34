"""The body's exchange on 16M elements: packed, averaged and stepped, applied; on the wires fp32, bf16 and int8."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernel_cases.case import LEARNING_RATE, MU, PIECE, Case, Variant, by_inductor, into
from megatron_dept.ops import body, reference, wires

ELEMENTS, SILOS, BLOCK = 16 << 20, 2, wires.BLOCK


def groups(device: str) -> dict[str, Callable[[], Case]]:
    """The cases, each made when it is called for, so that only one's memory is held."""
    makers = {"body_pack": pack, "body_mean": mean, "body_unpack": unpack, "body_apply": apply}
    return {f"{name} {wire}": partial(makers[name], device, wire) for name in makers for wire in wires.WIRES}


def pieces(*tensors: Tensor):
    """The tensors' pieces of equal place, one tuple after the other."""
    return zip(*(tensor.split(PIECE) for tensor in tensors), strict=True)


def views(packed: Tensor, wire: str) -> tuple[Tensor, ...]:
    """What lies on the wire: (elements,), int8: (elements, scales)."""
    if wire != "int8":
        return (packed.view(torch.float32 if wire == "fp32" else torch.bfloat16),)
    return packed[:ELEMENTS].view(torch.int8), packed[ELEMENTS:].view(torch.float32)


def apart(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """As many in memory of their own: inductor does not write to views of one buffer."""
    return [each.clone() for each in tensors]


def quantise(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(int8 elements, scales, what they do not say) of whole blocks; a block of zeros or NaN is not looked after."""
    blocks = x.view(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    q = (blocks * (127 / largest)).round_()
    scale = largest / 127
    return q.to(torch.int8).view(-1), scale.view(-1), (blocks - q * scale).view(-1)


def wide(*sent: Tensor) -> Tensor:
    """fp32 of what lay on the wire."""
    if len(sent) == 1:
        return sent[0].float()
    return (sent[0].view(-1, BLOCK).float() * sent[1].unsqueeze(1)).view(-1)


def numbers(device: str, count: int) -> list[Tensor]:
    return [torch.randn(ELEMENTS, device=device) for _ in range(count)]


def room(device: str, wire: str, *leading: int) -> Tensor:
    return torch.empty(*leading, wires.wire_bytes(ELEMENTS, wire), dtype=torch.uint8, device=device)


def pack(device: str, wire: str) -> Case:
    value, local, left = numbers(device, 3)
    their_left, whole_left = left.clone(), left.clone()
    ours, theirs = room(device, wire), room(device, wire)
    residual, scratch = (left if wire == "int8" else None), torch.empty(PIECE, device=device)
    sent = views(theirs, wire)

    def fused():
        body.body_pack(value, local, None, residual, wire, ours)
        return (ours if wire == "fp32" else views(ours, wire)[0],)

    def cast_in_pieces():
        for v, w, to in pieces(value, local, sent[0]):
            to.copy_(torch.sub(v, w, out=scratch))
        return sent

    def quantise_in_pieces():
        scales = sent[1].split(PIECE // BLOCK)
        for (v, w, r, to), scale in zip(pieces(value, local, their_left, sent[0]), scales, strict=True):
            q, s, rest = quantise(torch.sub(v, w, out=scratch).add_(r))
            to.copy_(q), scale.copy_(s), r.copy_(rest)
        return sent

    def quantise_whole():
        q, s, rest = quantise((value - local).add_(whole_left))
        sent[0].copy_(q), sent[1].copy_(s), whole_left.copy_(rest)
        return sent

    def compiled(v, w, r, *outs):
        if wire == "int8":
            return into([*outs, r], quantise(v - w + r))
        return into(outs, [(v - w).bfloat16()])

    peers: dict[str, Variant] = {"inductor": by_inductor(compiled, value, local, left.clone(), *apart(sent))}
    if wire == "fp32":
        peers = {"sub(out)": lambda: (torch.sub(value, local, out=sent[0]).view(torch.uint8),)}
    elif wire == "bf16":
        peers |= {
            "sub, to": lambda: ((value - local).to(torch.bfloat16),),
            "sub(out), copy_ in pieces": cast_in_pieces,
            "foreach": lambda: (torch._foreach_copy_([sent[0]], torch._foreach_sub([value], [local])), sent)[1],
        }
    else:
        peers |= {"whole": quantise_whole, "in pieces": quantise_in_pieces}
    moved = ELEMENTS * (8 + (8 if wire == "int8" else 0)) + ours.numel()
    return Case(f"body_pack, {wire}{' with residual' if wire == 'int8' else ''}", moved, fused, peers)


def received(device: str, wire: str) -> Tensor:
    packed = room(device, wire, SILOS)
    for each in packed:
        reference.encode(numbers(device, 1)[0], None, wire, each)
    return packed


def mean_of(*sent: Tensor) -> Tensor:
    """The mean of both silos'; `sent` are the views of the first, then of the second."""
    half = len(sent) // 2
    return (wide(*sent[:half]) + wide(*sent[half:])) / SILOS


def pieces_of_wires(packed: Tensor, wire: str):
    """Pieces of what both silos sent, as `mean_of` takes them."""
    sent = [*views(packed[0], wire), *views(packed[1], wire)]
    return zip(*(each.split(PIECE // BLOCK if each.numel() < ELEMENTS else PIECE) for each in sent), strict=True)


def mean(device: str, wire: str) -> Case:
    packed = received(device, wire)
    ours, theirs = torch.empty(ELEMENTS, device=device), torch.empty(ELEMENTS, device=device)
    sent = (*views(packed[0], wire), *views(packed[1], wire))

    def fused():
        body.body_mean(packed, SILOS, wire, ours)
        return (ours,)

    def in_pieces():
        for part, to in zip(pieces_of_wires(packed, wire), theirs.split(PIECE), strict=True):
            if wire == "fp32":
                torch.add(*part, out=to).div_(SILOS)
            else:
                to.copy_(mean_of(*part))
        return (theirs,)

    peers: dict[str, Variant] = {
        "widen, +, /": lambda: (mean_of(*sent),),
        "in pieces": in_pieces,
        "inductor": by_inductor(lambda out, *s: into([out], [mean_of(*s)]), theirs, *sent),
    }
    if wire == "fp32":
        peers["add(out), div_"] = lambda: (torch.add(*sent, out=theirs).div_(SILOS),)
        peers["mean(out)"] = lambda: (torch.mean(packed.view(torch.float32), 0, out=theirs),)
    return Case(f"body_mean of {SILOS}, {wire}", packed.numel() + ELEMENTS * 4, fused, peers)


def unpack(device: str, wire: str) -> Case:
    packed = received(device, wire)
    value, momentum, left = numbers(device, 3)
    sent = (*views(packed[0], wire), *views(packed[1], wire))
    ours, theirs = room(device, wire), room(device, wire)
    back = views(theirs, wire)
    residual = left if wire == "int8" else None
    own = momentum.clone()

    def fused():
        body.body_unpack(packed, SILOS, value, momentum, LEARNING_RATE, MU, wire, ours, residual)
        return (momentum,)

    def stepped(v, m, r, to, *s):
        average = mean_of(*s)
        new = m * MU + average
        update = (new * MU + average) * LEARNING_RATE
        if wire == "int8":
            return into([m, *to, r], [new, *quantise(update + r)])
        return into([m, *to], [new, v - update if wire == "fp32" else update.bfloat16()])

    def in_pieces():
        parts = pieces_of_wires(packed, wire)
        scales = back[-1].split(PIECE // BLOCK) if wire == "int8" else [None] * (ELEMENTS // PIECE)
        for s, scale, (v, m, r, to) in zip(parts, scales, pieces(value, own, their_left, back[0]), strict=True):
            average = torch.add(*s).div_(SILOS) if wire == "fp32" else mean_of(*s)
            m.mul_(MU).add_(average)
            update = average.add_(m, alpha=MU)
            if wire == "fp32":
                torch.sub(v, update, alpha=LEARNING_RATE, out=to)
            elif wire == "bf16":
                to.copy_(update.mul_(LEARNING_RATE))
            else:
                q, s8, rest = quantise(update.mul_(LEARNING_RATE).add_(r))
                to.copy_(q), scale.copy_(s8), r.copy_(rest)
        return (own,)

    their_left = left.clone()
    # A fused SGD of torch's own steps on the mean: FedAvg's and DiLoCo's usual outer optimizer.
    parameter = torch.nn.Parameter(value.clone())
    sgd = torch.optim.SGD([parameter], lr=LEARNING_RATE, momentum=MU, nesterov=True, fused=True)
    sgd.state[parameter]["momentum_buffer"] = momentum.clone()

    def fused_sgd():
        parameter.grad = mean_of(*sent)
        sgd.step()
        if wire == "int8":
            quantise(value - parameter.detach())
        else:
            back[0].copy_(parameter.detach() if wire == "fp32" else value - parameter.detach())
        return (sgd.state[parameter]["momentum_buffer"],)

    peers: dict[str, Variant] = {
        "in pieces": in_pieces,
        "inductor": by_inductor(stepped, value, momentum.clone(), left.clone(), apart(back), *sent),
        "mean, fused SGD": fused_sgd,
    }
    moved = packed.numel() + ELEMENTS * (12 + (8 if wire == "int8" else 0)) + ours.numel()
    return Case(f"body_unpack of {SILOS}, Nesterov, {wire}", moved, fused, peers)


def apply(device: str, wire: str) -> Case:
    packed = received(device, wire)[0].clone()
    value = torch.zeros(ELEMENTS, device=device)
    their, their_whole = value.clone(), value.clone()
    masters = [torch.empty_like(value) for _ in range(2)]
    lows = [torch.empty(ELEMENTS, dtype=torch.bfloat16, device=device) for _ in range(2)]
    sent = views(packed, wire)

    def fused():
        body.body_apply(packed, value, wire, masters[0], lows[0])
        return (value,)

    def whole():
        their_whole.copy_(sent[0]) if wire == "fp32" else their_whole.sub_(wide(*sent))
        masters[1].copy_(their_whole), lows[1].copy_(their_whole)
        return (their_whole,)

    def in_pieces():
        scales = sent[-1].split(PIECE // BLOCK) if wire == "int8" else [None] * (ELEMENTS // PIECE)
        for scale, (s, v, m, low) in zip(scales, pieces(sent[0], their, masters[1], lows[1]), strict=True):
            if wire == "fp32":
                v.copy_(s)
            else:
                v.sub_(wide(s) if scale is None else wide(s, scale))
            m.copy_(v), low.copy_(v)
        return (their,)

    def compiled(v, m, low, *s):
        new = s[0] if wire == "fp32" else v - wide(*s)
        return into([v, m, low], [new, new, new.bfloat16()])

    peers: dict[str, Variant] = {
        "sub_, copy_, copy_": whole,
        "in pieces": in_pieces,
        "inductor": by_inductor(compiled, value.clone(), masters[1], lows[1], *sent),
    }
    moved = packed.numel() + ELEMENTS * (4 + 4 + 2 + (0 if wire == "fp32" else 4))
    return Case(f"body_apply with master and bf16, {wire}", moved, fused, peers)
