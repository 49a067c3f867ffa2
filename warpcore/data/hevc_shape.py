"""The shape of pixels that H.265 says in its own header, as FFmpeg's decoder reads it: no frame is decoded."""

MAX_BYTES = 2**16
"""Of what the header may say."""


def pixel_shape(configuration: bytes) -> tuple[int, int]:
    """Width and height of a pixel by the content of a box `hvcC`; (1, 1) where it says nothing, or can't be read."""
    import av

    context = av.CodecContext.create("hevc", "r")
    context.extradata = configuration[:MAX_BYTES]
    try:
        context.open()
    except (av.FFmpegError, ValueError):
        return 1, 1
    shape = context.sample_aspect_ratio
    return (shape.numerator, shape.denominator) if shape else (1, 1)
