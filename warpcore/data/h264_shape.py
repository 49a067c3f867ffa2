"""The shape of pixels that H.264 says in its own header: the sequence parameter set of ITU-T H.264, 7.3.2.1."""

MAX_SET_BYTES = 4096
_WITH_CHROMA = (44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244)
"""Profiles whose headers say the format of colours and scaling lists."""
_SHAPES = (
    (1, 1), (1, 1), (12, 11), (10, 11), (16, 11), (40, 33), (24, 11), (20, 11), (32, 11), (80, 33), (18, 11), (15, 11),
    (64, 33), (160, 99), (4, 3), (3, 2), (2, 1),
)  # fmt: skip
"""Table E-1, by number: width and height of a pixel; 0 says nothing."""
_OWN_SHAPE = 255


def pixel_shape(configuration: bytes) -> tuple[int, int]:
    """Width and height of a pixel by the content of a box `avcC`; (1, 1) where it says nothing, or can't be read."""
    length = int.from_bytes(configuration[6:8])
    try:
        width, height = _shape_of(_Bits(configuration[8 : 8 + min(length, MAX_SET_BYTES)]))
    except IndexError:  # it ends too early
        return 1, 1
    return (width, height) if width and height else (1, 1)


class _Bits:
    """Reads numbers of the bits of a NAL unit. Raises IndexError at their end."""

    def __init__(self, unit: bytes):
        self._bits = "".join(f"{byte:08b}" for byte in unit.replace(b"\0\0\3", b"\0\0"))
        self._place = 0

    def fixed(self, count: int) -> int:
        start, self._place = self._place, self._place + count
        if self._place > len(self._bits):
            raise IndexError
        return int(self._bits[start : self._place], 2)

    def unsigned(self) -> int:
        """ue(v): as many zeros as bits come after a one."""
        one = self._bits.find("1", self._place)
        if one < 0:
            raise IndexError
        zeros, self._place = one - self._place, one
        return self.fixed(zeros + 1) - 1

    def signed(self) -> int:
        """se(v)"""
        number = self.unsigned()
        return (number + 1) // 2 if number % 2 else -(number // 2)


def _shape_of(bits: _Bits) -> tuple[int, int]:
    bits.fixed(8)  # the unit's header
    profile = bits.fixed(8)
    bits.fixed(16)
    bits.unsigned()
    if profile in _WITH_CHROMA:
        _skip_chroma(bits)
    bits.unsigned()
    order = bits.unsigned()
    if order == 0:
        bits.unsigned()
    elif order == 1:
        bits.fixed(1)
        for _ in range(2):
            bits.signed()
        for _ in range(bits.unsigned()):
            bits.signed()
    bits.unsigned()
    bits.fixed(1)
    for _ in range(2):  # width and height
        bits.unsigned()
    if not bits.fixed(1):
        bits.fixed(1)
    bits.fixed(1)
    for _ in range(4 if bits.fixed(1) else 0):  # what is cropped
        bits.unsigned()
    if not bits.fixed(1) or not bits.fixed(1):
        return 1, 1
    number = bits.fixed(8)
    if number == _OWN_SHAPE:
        return bits.fixed(16), bits.fixed(16)
    return _SHAPES[number]


def _skip_chroma(bits: _Bits) -> None:
    """Formats of colours, and scaling lists."""
    chroma = bits.unsigned()
    if chroma == 3:
        bits.fixed(1)
    for _ in range(2):
        bits.unsigned()
    bits.fixed(1)
    if not bits.fixed(1):
        return
    for number in range(12 if chroma == 3 else 8):
        if bits.fixed(1):
            last = following = 8
            for _ in range(16 if number < 6 else 64):
                if following:
                    following = (last + bits.signed()) % 256
                last = following or last
