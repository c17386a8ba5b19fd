"""Pictures as calibration data: short side resized, center cropped, (value / 255 - mean) / std."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from snpc.errors import UserError
from snpc.runtime.calibration.sources import (
    CalibrationPart,
    CalibrationSource,
    ImageFormat,
    as_user_error,
    name_list,
)
from snpc.runtime.io import ArrayHeader
from snpc.types import AnyArray, TensorSpec

PREPROCESS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {  # name -> mean, std
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5,), (0.5,)),  # most ViTs of timm and Google: values in [-1, 1]
    "0-1": ((0.0,), (1.0,)),
}


PILLOW_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")  # others start programs (PostScript) or are hardly ever used
MAX_ASPECT = (
    16  # how many times longer than the frame a picture is resized; both sides hang over, only the middle stays
)


@dataclass(frozen=True)
class ImageOptions:
    """How a picture becomes an input; the defaults are ImageNet's. Raises UserError for impossible values.

    ``size``: (height, width), None takes the model's static sizes. ``mean``, ``std``: one value, or one per channel,
    of pixels scaled to [0, 1]; uint8 inputs get the raw pixels instead. ``layout``: where the channel axis is.
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = PREPROCESS["imagenet"][0]
    std: tuple[float, ...] = PREPROCESS["imagenet"][1]
    layout: Literal["nchw", "nhwc"] = "nchw"

    def __post_init__(self) -> None:
        if self.layout not in ("nchw", "nhwc"):
            raise UserError(f"image layout '{self.layout}': nchw or nhwc")
        if self.size is not None and min(self.size) < 1:
            raise UserError(f"image size {self.size}: height and width are at least 1")
        if not self.mean or not np.isfinite(self.mean).all():
            raise UserError(f"image mean {self.mean}: one number, or one per channel")
        if not self.std or not np.isfinite(self.std).all() or min(self.std) <= 0:
            raise UserError(f"image std {self.std}: one positive number, or one per channel")


IMAGENET = ImageOptions()


def image_source(
    folder: Path, files: Sequence[Path], inputs: tuple[TensorSpec, ...], options: ImageOptions
) -> CalibrationSource:
    """One part per picture, read when its batch is due."""
    spec = _image_input(folder, inputs)
    frame = _image_format(spec, options)
    pixels = (frame.channels, frame.height, frame.width)
    shape = (1, *pixels) if options.layout == "nchw" else (1, *pixels[1:], pixels[0])
    header = ArrayHeader(shape, np.dtype(np.uint8 if frame.raw else np.float32))
    unbatched = len(spec.shape) == 3  # a model for a single picture: no sample axis
    stored_input = TensorSpec(spec.name, spec.dtype, (1, *spec.shape)) if unbatched else spec
    _import_pillow()

    def part(file: Path) -> CalibrationPart:
        return CalibrationPart(str(file), {spec.name: header}, partial(_read_image, frame, file))

    return CalibrationSource(
        str(folder), (part(file) for file in files), (stored_input,), unbatched=unbatched, images=frame
    )


def _image_input(folder: Path, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
    if len(inputs) != 1:
        raise UserError(
            f"{folder}: pictures can feed a model with one input, this one has {len(inputs)} "
            f"({name_list(spec.name for spec in inputs)}): save an .npz with a key for each"
        )
    (spec,) = inputs
    if len(spec.shape) not in (3, 4) or not (spec.dtype.kind in "fu" or spec.dtype.name == "bfloat16"):
        raise UserError(
            f"{folder}: it holds pictures, but input '{spec.name}' ({spec.dtype} {list(spec.shape)}) takes none: "
            "save what it takes as an .npz"
        )
    return spec


def _image_format(spec: TensorSpec, options: ImageOptions) -> ImageFormat:
    dims = spec.shape[-3:]
    first = options.layout == "nchw"
    channels = _channel_count(spec, dims[0] if first else dims[2], dims[2] if first else dims[0], options)
    height, width = _image_size(spec, dims[1:] if first else dims[:2], options)
    raw = spec.dtype == np.uint8
    if not raw and spec.dtype.kind == "u":
        raise UserError(f"input '{spec.name}' takes {spec.dtype}: pictures are fed as uint8 or floats; save an .npz")
    for name, values in (("mean", options.mean), ("std", options.std)):
        if not raw and len(values) not in (1, channels):
            raise UserError(
                f"image {name} has {len(values)} values, but input '{spec.name}' takes {channels} channel(s): "
                f"give one value or {channels} (--image-{name})"
            )
    return ImageFormat(height, width, channels, options.mean, options.std, options.layout, raw)


def _channel_count(spec: TensorSpec, size: int | str, other: int | str, options: ImageOptions) -> int:
    """1 is grayscale, 3 is RGB; a dynamic channel axis of a batched input is RGB."""
    if size in (1, 3):
        return int(size)
    if isinstance(size, str) and len(spec.shape) == 4 and other not in (1, 3):
        return 3
    subject = f"input '{spec.name}' takes {list(spec.shape)}, as {options.layout} not a picture of 1 or 3 channels"
    if other in (1, 3):
        raise UserError(f"{subject}: it looks like {'nhwc' if options.layout == 'nchw' else 'nchw'} (--image-layout)")
    raise UserError(f"{subject}: save what it takes as an .npz")


def _image_size(spec: TensorSpec, dims: Sequence[int | str], options: ImageOptions) -> tuple[int, int]:
    height, width = dims
    if options.size is None:
        if isinstance(height, int) and isinstance(width, int):
            return height, width
        raise UserError(f"input '{spec.name}' takes pictures of any size {list(spec.shape)}: choose one (--image-size)")
    for model_size, image_size in zip(dims, options.size, strict=True):
        if isinstance(model_size, int) and model_size != image_size:
            raise UserError(
                f"image size {options.size[0]}x{options.size[1]}, but input '{spec.name}' takes {height}x{width}: "
                "leave --image-size out"
            )
    return options.size


def _import_pillow() -> Any:
    try:
        import PIL.Image
    except ImportError as error:
        raise UserError("reading pictures needs Pillow: pip install snpc[images]") from error
    return PIL.Image


def _read_image(frame: ImageFormat, file: Path, names: Sequence[str]) -> dict[str, AnyArray]:
    """The picture, for the one input there is."""
    return dict.fromkeys(names, _load_image(_import_pillow(), frame, file))


def _load_image(pillow: Any, frame: ImageFormat, file: Path) -> AnyArray:
    """file -> [1,C,H,W] or [1,H,W,C], uint8 or float32. The picture stands as its EXIF orientation says."""
    from PIL import ImageOps

    advice = "the picture cannot be read; repair or remove it"
    broken = (OSError, ValueError, SyntaxError, MemoryError, pillow.DecompressionBombError)
    with as_user_error(str(file), advice, *broken), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large pictures, which are read, and of palettes
        with pillow.open(file, formats=PILLOW_FORMATS) as picture:
            if picture.mode[0] in "IF":  # converting would clip them to white
                raise ValueError("its pixels have more than 8 bits")
            upright = ImageOps.exif_transpose(picture)
            pixels = _resize_and_crop(pillow, upright.convert("RGB" if frame.channels == 3 else "L"), frame)
    array: AnyArray = pixels.reshape(frame.height, frame.width, frame.channels)
    if not frame.raw:
        array = (array.astype(np.float32) / 255 - np.array(frame.mean, np.float32)) / np.array(frame.std, np.float32)
    return array[None] if frame.layout == "nhwc" else np.ascontiguousarray(array.transpose(2, 0, 1))[None]


def _resize_and_crop(pillow: Any, picture: Any, frame: ImageFormat) -> AnyArray:
    """Resized (bicubic) until it just covers the frame, then cropped around the center."""
    picture = _crop_long_side(picture, frame)
    scale = max(frame.height / picture.height, frame.width / picture.width)
    width, height = max(frame.width, round(picture.width * scale)), max(frame.height, round(picture.height * scale))
    if (width, height) != picture.size:
        picture = picture.resize((width, height), pillow.Resampling.BICUBIC)
    left, top = (width - frame.width) // 2, (height - frame.height) // 2
    return np.asarray(picture.crop((left, top, left + frame.width, top + frame.height)))


def _crop_long_side(picture: Any, frame: ImageFormat) -> Any:
    """The middle of a picture that is far longer than the frame: resized whole, 30000 by 1 pixels take gigabytes."""
    longest_width = math.ceil(MAX_ASPECT * picture.height * frame.width / frame.height)
    longest_height = math.ceil(MAX_ASPECT * picture.width * frame.height / frame.width)
    width, height = min(picture.width, longest_width), min(picture.height, longest_height)
    if (width, height) == picture.size:
        return picture
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))
