"""Which packets of H.264 and H.265 video other frames refer to, told by the first two bytes of their NAL units.

A frame that nothing refers to need not be decoded where it is not wanted; all others keep their pixels to the bit.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

_START_CODE = re.compile(rb"\x00\x00\x01(..)", re.DOTALL)
_LENGTH_BYTES_PLACES = {"h264": 4, "hevc": 21}
"""Of the byte of a codec's configuration record (avcC, hvcC: ISO/IEC 14496-15) that says how long lengths are."""


class Use(NamedTuple):
    """What may refer to the picture of a packet."""

    layer: int
    """Temporal layer: pictures of lower ones never refer to it."""
    is_reference: bool
    """Whether pictures of the same layer may."""


def without_unused(packets: list[Any], is_wanted: list[bool], context: Any) -> Iterator[Any]:
    """Those of the packets, in decoding order, that are wanted or that a wanted one can depend on.

    context: PyAV's of the decoder; of codecs other than H.264 and H.265 all packets are given.
    """
    use_of = _USES.get(context.codec.canonical_name)
    if use_of is None:
        yield from packets
        return
    units = _splitter(context)
    uses = [use_of(units(memoryview(packet))) for packet in packets]
    top = max(use.layer for use, wanted in zip(uses, is_wanted, strict=True) if wanted)
    for packet, use, wanted in zip(packets, uses, is_wanted, strict=True):
        if wanted or use.layer < top or (use.layer == top and use.is_reference):
            yield packet


def _h264_use(headers: Iterable[bytes]) -> Use:
    """ITU-T H.264, 7.4.1: pictures of slices (types 1 to 5) with nal_ref_idc 0 are referred to by none."""
    units = [((header[0] >> 5) & 3, header[0] & 31) for header in headers]
    slices = [ref_idc for ref_idc, kind in units if 1 <= kind <= 5]
    has_parameters = any(kind in (7, 8, 13, 15) for _, kind in units)
    return Use(0, has_parameters or not slices or any(slices))


def _h265_use(headers: Iterable[bytes]) -> Use:
    """ITU-T H.265, 7.4.2.2: even types below 16 are not referred to by pictures of the same temporal layer."""
    units = [(header[0] >> 1, (header[1] & 7) - 1) for header in headers if not _is_further_view(header)]
    slices = [(kind, layer) for kind, layer in units if kind < 32]
    has_parameters = any(32 <= kind <= 34 for kind, _ in units)
    if has_parameters or not slices:
        return Use(0, True)
    return Use(max(layer for _, layer in slices), any(kind >= 16 or kind % 2 for kind, _ in slices))


_USES: dict[str, Callable[[Iterable[bytes]], Use]] = {"h264": _h264_use, "hevc": _h265_use}


def _is_further_view(header: bytes) -> bool:
    """Whether nuh_layer_id is not 0, as of a second eye or of transparency: decoders leave it out."""
    return bool(header[0] & 1 or header[1] >> 3)


def _splitter(context: Any) -> Callable[[memoryview], Iterator[bytes]]:
    """The function that gives the first two bytes of every NAL unit of a packet."""
    record, place = context.extradata or b"", _LENGTH_BYTES_PLACES[context.codec.canonical_name]
    if len(record) <= place or record[0] != 1:  # units after start codes: ITU-T H.264, annex B
        return lambda data: (match[1] for match in _START_CODE.finditer(data))
    length_bytes = (record[place] & 3) + 1

    def units(data: memoryview) -> Iterator[bytes]:
        start = length_bytes
        while start + 2 <= len(data):
            yield bytes(data[start : start + 2])
            start += int.from_bytes(data[start - length_bytes : start], "big") + length_bytes

    return units
