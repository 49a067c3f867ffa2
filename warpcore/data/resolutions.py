"""The sizes of clips at resolutions that have names: `144p`, `256`, `240p` and others, for many aspect ratios each.

They are those of Open-Sora, in whose `bucket_config` the names occur; the squares are PixArt-alpha's.
"""

from typing import NamedTuple

from warpcore.errors import UserError
from warpcore.text import brief


class NamedSizes(NamedTuple):
    """What the name of a resolution stands for."""

    area: int
    """In px²: resolutions are tried from the largest area down."""
    sizes: dict[float, tuple[int, int]]
    """Height / width, rounded as the tables have it -> (H, W) in px."""


_VIDEO_RATIOS = "0.38 0.43 0.48 0.50 0.53 0.54 0.56 0.62 0.67 0.75 1.00 1.33 1.50 1.78 1.89 2.00 2.08"
_SQUARE_RATIOS = (
    "0.25 0.26 0.27 0.28 0.32 0.33 0.35 0.40 0.42 0.48 0.50 0.52 0.57 0.60 0.68 0.72 0.78 0.82 0.88 0.94 1.00 1.07 "
    "1.13 1.21 1.29 1.38 1.46 1.67 1.75 2.00 2.09 2.40 2.50 2.89 3.00 3.11 3.62 3.75 3.88 4.00"
)
_RATIOS_OF_2880 = (
    "0.25 0.26 0.27 0.28 0.32 0.33 0.34 0.40 0.42 0.47 0.49 0.51 0.55 0.59 0.68 0.72 0.78 0.83 0.89 0.93 1.00 1.07 "
    "1.12 1.21 1.28 1.39 1.47 1.70 1.82 2.03 2.13 2.39 2.50 2.92 3.00 3.12 3.68 3.82 3.95 4.00"
)
_SQUARE_SIZES = (
    "128x512 128x496 128x480 128x464 144x448 144x432 144x416 160x400 160x384 176x368 176x352 176x336 192x336 "
    "192x320 208x304 208x288 224x288 224x272 240x272 240x256 256x256 256x240 272x240 272x224 288x224 288x208 "
    "304x208 320x192 336x192 352x176 368x176 384x160 400x160 416x144 432x144 448x144 464x128 480x128 496x128 "
    "512x128"
)
"""At 256 px; those of 512, 1024 and 2048 px are 2, 4 and 8 times as large."""
_SIZES_OF_2880 = (
    "1408x5760 1408x5568 1408x5376 1408x5184 1600x4992 1600x4800 1600x4672 1792x4480 1792x4288 1920x4096 1920x3904 "
    "1920x3776 2112x3840 2112x3584 2304x3392 2304x3200 2496x3200 2496x3008 2688x3008 2688x2880 2880x2880 2880x2688 "
    "3008x2688 3008x2496 3200x2496 3200x2304 3392x2304 3584x2112 3840x2112 3904x1920 4096x1920 4288x1792 4480x1792 "
    "4672x1600 4800x1600 4992x1600 5184x1408 5376x1408 5568x1408 5760x1408"
)
_VIDEO_SIZES = {
    ("144p", 36864): (
        "117x312 125x291 133x277 135x270 139x262 141x260 144x256 151x241 156x234 166x221 192x192 221x165 235x156 "
        "256x144 263x139 271x135 277x132"
    ),
    ("240p", 102240): (
        "196x522 210x490 222x462 226x452 232x438 236x436 240x426 252x404 262x393 276x368 320x320 370x278 392x262 "
        "426x240 440x232 452x226 462x222"
    ),
    ("360p", 230400): (
        "294x784 314x732 332x692 340x680 350x662 352x652 360x640 380x608 392x588 416x554 480x480 554x416 588x392 "
        "640x360 660x350 678x340 692x332"
    ),
    ("480p", 409920): (
        "392x1046 420x980 444x925 452x904 466x880 470x870 480x854 506x810 522x784 554x738 640x640 740x555 784x522 "
        "854x480 880x466 906x454 924x444"
    ),
    ("720p", 921600): (
        "588x1568 628x1466 666x1388 678x1356 698x1318 706x1306 720x1280 758x1212 784x1176 832x1110 960x960 "
        "1108x832 1176x784 1280x720 1320x698 1358x680 1386x666"
    ),
    ("1080p", 2073600): (
        "882x2352 942x2198 998x2080 1018x2036 1048x1980 1058x1958 1080x1920 1138x1820 1176x1764 1248x1664 "
        "1440x1440 1662x1246 1764x1176 1920x1080 1980x1048 2036x1018 2078x998"
    ),
    ("2k", 3686400): (
        "1176x3136 1256x2930 1330x2770 1358x2716 1398x2640 1412x2612 1440x2560 1518x2428 1568x2352 1662x2216 "
        "1920x1920 2218x1664 2352x1568 2560x1440 2638x1396 2716x1358 2772x1330"
    ),
    ("4k", 8294400): (
        "1764x4704 1886x4400 1996x4158 2036x4072 2096x3960 2118x3918 2160x3840 2276x3642 2352x3528 2494x3326 "
        "2880x2880 3326x2494 3528x2352 3840x2160 3958x2096 4072x2036 4156x1994"
    ),
}


def _named(area: int, ratios: str, sizes: str, scale: int = 1) -> NamedSizes:
    pairs = ((scale * int(height), scale * int(width)) for height, width in (one.split("x") for one in sizes.split()))
    return NamedSizes(area, dict(zip(map(float, ratios.split()), pairs, strict=True)))


RESOLUTIONS: dict[str, NamedSizes] = {
    **{name: _named(area, _VIDEO_RATIOS, sizes) for (name, area), sizes in _VIDEO_SIZES.items()},
    **{str(256 * n): _named((256 * n) ** 2, _SQUARE_RATIOS, _SQUARE_SIZES, n) for n in (1, 2, 4, 8)},
    "2880": _named(2880**2, _RATIOS_OF_2880, _SIZES_OF_2880),
}
RATIOS = {
    "3:8": 0.38, "9:21": 0.43, "12:25": 0.48, "1:2": 0.50, "9:17": 0.53, "27:50": 0.54, "9:16": 0.56, "5:8": 0.62,
    "2:3": 0.67, "3:4": 0.75, "1:1": 1.00, "4:3": 1.33, "3:2": 1.50, "16:9": 1.78, "17:9": 1.89, "2:1": 2.00,
    "50:27": 2.08,
}  # fmt: skip
"""Height : width, as the tables name it; 50:27 stands for the inverse of 12:25 there."""
LENGTHS = {f"{2 * n}s": 51 * n for n in (1, 2, 4, 8, 16)} | {f"{n}x": 51 * n for n in (1, 2, 4, 8, 16)}
"""Frames of clips whose length has a name: `2s` has 51."""


def named_size(resolution: str, ratio: str | None = None) -> tuple[int, int]:
    """(H, W) in px of a resolution, such as `480p`, at a ratio of height to width, such as `9:16` or `0.56`; without
    one at 9:16, and of squares and their like, which have no such sizes, the square.

    Raises:
        UserError: there is no such resolution, or it has no such ratio.
    """
    if resolution not in RESOLUTIONS:
        raise UserError(f"resolution: {brief(resolution)} has no sizes; write one of {', '.join(RESOLUTIONS)}")
    sizes = RESOLUTIONS[resolution].sizes
    ratio = ratio or ("9:16" if RATIOS["9:16"] in sizes else "1:1")
    try:
        wanted = RATIOS[ratio] if ratio in RATIOS else round(float(ratio), 2)
        return sizes[wanted]
    except (ValueError, KeyError, OverflowError):
        of_it = [name for name, value in RATIOS.items() if value in sizes] + [f"{value:.2f}" for value in sizes]
        raise UserError(
            f"aspect_ratio: {brief(ratio)} is not among those of {resolution}, which are height : width: write one of "
            f"{', '.join(of_it)}"
        ) from None


def named_length(name: str) -> int:
    """Frames of a length such as `4s`. Raises UserError for one that has no name."""
    if name not in LENGTHS:
        raise UserError(f"{brief(name)} is no length; write a number of frames, or one of {', '.join(LENGTHS)}")
    return LENGTHS[name]
