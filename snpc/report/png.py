"""Small pictures as PNG in a ``data:`` URL."""

from __future__ import annotations

import struct
import zlib
from base64 import b64encode

import numpy as np
import numpy.typing as npt

from snpc.types import FloatArray

PixelArray = npt.NDArray[np.uint8]

# Cividis (Nuñez, Anderton, Renslow 2018) at eight points: lightness rises evenly, color-blind readers see the same.
CIVIDIS = ((0, 34, 78), (29, 61, 109), (78, 87, 108), (112, 113, 115), (149, 143, 120), (184, 172, 109), (220, 201, 87),
           (254, 232, 56))  # fmt: skip


def apply_colormap(values: FloatArray) -> PixelArray:
    """[height, width] in 0..1 -> [height, width, 3] in cividis."""
    stops = np.linspace(0, 1, len(CIVIDIS))
    channels = [np.interp(values, stops, [color[k] for color in CIVIDIS]) for k in range(3)]
    return np.round(np.stack(channels, -1)).astype(np.uint8)


def png_data_url(pixels: PixelArray) -> str:
    """The URL of a picture [height, width, 3]."""
    height, width, _ = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)  # filter 0: none
    parts = (
        png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        png_chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)),
        png_chunk(b"IEND", b""),
    )
    return "data:image/png;base64," + b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
