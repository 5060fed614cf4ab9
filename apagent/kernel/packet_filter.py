"""Socket filters in classic BPF: what isn't for us doesn't even wake us up.

A filter sees a netlink datagram from its first header on and says whether it is queued. It loads in
network order, while netlink is in host order. Numbers: linux/bpf_common.h, linux/filter.h.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Sequence
from typing import NamedTuple

_SO_ATTACH_FILTER = 26
_INSTRUCTION = struct.Struct("=HBBI")
_PROGRAM = struct.Struct("@HP")
_WORD, _HALF, _BYTE = 0x20, 0x28, 0x30
"""BPF_LD | BPF_ABS, of 4, 2 and 1 bytes."""
_AND = 0x54
_JUMP_IF_EQUAL, _JUMP_IF_SET = 0x15, 0x45
_RETURN = 0x06
_WHOLE_PACKET = 0xFFFFFFFF


class Step(NamedTuple):
    """A load, a change of what was loaded, or (if it leads anywhere) a test of it.

    `then` and `otherwise` name labels; empty: the next step.
    """

    code: int
    value: int
    then: str = ""
    otherwise: str = ""


def load_word(offset: int) -> Step:
    """Load 4 bytes."""
    return Step(_WORD, offset)


def load_half(offset: int) -> Step:
    """Load 2 bytes."""
    return Step(_HALF, offset)


def load_byte(offset: int) -> Step:
    """Load a byte."""
    return Step(_BYTE, offset)


def masked(mask: int) -> Step:
    """Leave of the loaded value only the bits of `mask`."""
    return Step(_AND, mask)


def equals(value: int, then: str, otherwise: str = "") -> Step:
    """Go to `then` if the loaded value is `value`, else to `otherwise`."""
    return Step(_JUMP_IF_EQUAL, value, then, otherwise)


def has_bit(mask: int, then: str, otherwise: str = "") -> Step:
    """Go to `then` if the loaded value has a bit of `mask`, else to `otherwise`."""
    return Step(_JUMP_IF_SET, mask, then, otherwise)


def go(to: str) -> Step:
    """Go to `to` in any case."""
    return Step(_JUMP_IF_EQUAL, 0, to, to)


KEEP, DROP = "keep", "drop"


def assemble(*blocks: tuple[str, Sequence[Step]]) -> bytes:
    """The program of labelled blocks in order; what runs out of the last one is kept.

    The labels `keep` and `drop` are always there. Jumps lead forward, 255 steps at most.
    """
    steps = [step for _, block in blocks for step in block]
    labels = {KEEP: len(steps), DROP: len(steps) + 1}
    position = 0
    for label, block in blocks:
        labels[label] = position
        position += len(block)

    def distance(label: str, here: int) -> int:
        return labels[label] - here - 1 if label else 0

    program = [
        _INSTRUCTION.pack(
            step.code, distance(step.then, i), distance(step.otherwise, i), step.value
        )
        for i, step in enumerate(steps)
    ]
    ends = (_INSTRUCTION.pack(_RETURN, 0, 0, value) for value in (_WHOLE_PACKET, 0))
    return b"".join([*program, *ends])


def attach(to: socket.socket, program: bytes) -> None:
    """Give a socket the filter. Raises OSError."""
    buffer = ctypes.create_string_buffer(program, len(program))
    count = len(program) // _INSTRUCTION.size
    to.setsockopt(
        socket.SOL_SOCKET, _SO_ATTACH_FILTER, _PROGRAM.pack(count, ctypes.addressof(buffer))
    )
