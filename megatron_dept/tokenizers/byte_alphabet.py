"""GPT-2's byte alphabet: a printable character for each of the 256 bytes, which byte-level tokenizers spell with."""

from functools import cache


@cache
def byte_characters() -> tuple[str, ...]:
    """The character of each byte 0..255 (GPT-2, Radford et al. 2019): itself where printable, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(0x100 + index) for index in range(256))
    return tuple(chr(byte) if byte in printable else next(others) for byte in range(256))


@cache
def character_bytes() -> dict[str, int]:
    """The inverse of `byte_characters`."""
    return {character: byte for byte, character in enumerate(byte_characters())}


def spell(text: bytes) -> str:
    """`text` in the byte alphabet, one character a byte."""
    alphabet = byte_characters()
    return "".join(alphabet[byte] for byte in text)
