"""What a folder holds: the model that is cut, its other forms, and everything else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from snpc.errors import UserError
from snpc.folders.forms import form_of
from snpc.graph import is_cache_name, is_float
from snpc.runtime.calibration import EncoderDecoder
from snpc.runtime.io import load, model_files
from snpc.types import Model

GENAI_CONFIG = "genai_config.json"
CONFIGS = (GENAI_CONFIG, "config.json")
ONNX_FOLDER = "onnx"  # in which transformers.js looks for models
MODEL_PLACES = ("", ONNX_FOLDER, "encoder", "decoder")  # subfolders in which tools put models
BESIDE_MODELS = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
)  # fmt: skip
"""What optimum and transformers.js read beside a model."""
USUAL_NAME = "model.onnx"  # of the one model of a folder
PARTS = ("encoder", "decoder")
MIN_ELEMENTS = 256  # of a constant that is compared with those of other models


@dataclass(frozen=True)
class ModelFolder:
    """Files of a folder, by their paths inside it.

    ``model``: what is cut. ``companions``: models with the same weights, which are cut alike, such as a decoder that
    goes on from the caches of ``model``. ``encoder``: the model whose states these decoders read, where it is cut too;
    None where one part is cut. ``forms``: the same models in other precisions, with their external data, which would no
    longer belong to them. ``others``: everything else, which goes with them as it is. ``alone``: one model is meant,
    and only what tools read beside it goes with it.
    """

    path: Path
    model: Path
    companions: tuple[Path, ...] = ()
    encoder: Path | None = None
    forms: tuple[Path, ...] = ()
    others: tuple[Path, ...] = ()
    alone: bool = False

    @property
    def model_path(self) -> Path:
        return self.path / self.model

    @property
    def companion_paths(self) -> tuple[Path, ...]:
        return tuple(self.path / companion for companion in self.companions)

    @property
    def encoder_path(self) -> Path | None:
        return self.path / self.encoder if self.encoder is not None else None

    @property
    def cut(self) -> tuple[Path, ...]:
        """All models that are cut."""
        return (*((self.encoder,) if self.encoder is not None else ()), self.model, *self.companions)

    @property
    def part(self) -> str:
        """Which part of an encoder-decoder model ``model`` is: "encoder", "decoder", or "" where it is the whole."""
        if self.encoder is not None:
            return "decoder"
        models = [file for file in (self.model, *self.others) if file.suffix == ".onnx"]
        parts = {part for part in PARTS for model in models if part in words_of(model)}
        return next((part for part in PARTS if part in words_of(self.model) and parts == set(PARTS)), "")

    @property
    def says_cache_widths(self) -> bool:
        """Does the runtime read the width of caches from the folder, so that they may get narrower?"""
        return (self.path / GENAI_CONFIG).is_file()


def find_model_folder(path: Path, file: str | None = None) -> ModelFolder:
    """The contents of ``path``. ``file``: the model that is cut, by its path in the folder; None: the one that
    genai_config.json names, the only one, or an encoder and the decoders that read its states.

    Raises UserError where there is no such model, or several and none is named.
    """
    models = models_in(path)
    encoder, decoders = encoder_and_decoders(path, models) if file is None else (None, [])
    model, *companions = decoders or decoders_alike(path, models, chosen_model(path, models, file))
    source = ModelFolder(path, model, tuple(companions), encoder)
    forms = [form for form in models if form not in source.cut and form_of(form, source.cut)]
    own = files_of(path, source.cut)
    left_out = files_of(path, forms) - own
    others = [p.relative_to(path) for p in sorted(path.rglob("*")) if p.is_file() and not is_hidden(p, path)]
    rest = tuple(other for other in others if other not in own | left_out)
    return replace(source, forms=tuple(sorted(left_out)), others=rest)


def single_model_folder(model: Path, companions: Sequence[Path | str] = ()) -> ModelFolder:
    """``model`` and its ``companions`` with the configurations and the tokenizer that lie beside it, or beside its
    folder ``onnx``.

    Raises UserError where it belongs to a folder of onnxruntime-genai, which names its file, or where companions lie
    elsewhere.
    """
    root = model.parent.parent if model.parent.name == ONNX_FOLDER else model.parent
    for companion in companions:
        if Path(companion).parent.resolve() != model.parent.resolve():
            raise UserError(f"{companion}: does not lie beside {model}, as models of one folder do")
    if (model.parent / GENAI_CONFIG).is_file():
        raise UserError(f"{model}: {GENAI_CONFIG} beside it names its file: prune the folder {model.parent}")
    beside = tuple(Path(name) for name in BESIDE_MODELS if (root / name).is_file())
    place = model.parent.relative_to(root)
    alike = tuple(place / Path(companion).name for companion in companions)
    return ModelFolder(root, place / model.name, alike, others=beside, alone=True)


def main_model(path: Path) -> Path:
    """The model that a folder is about. Raises UserError as ``find_model_folder`` does."""
    return path / chosen_model(path, models_in(path), None)


def models_in(path: Path) -> list[Path]:
    """Model files where tools put them, by their paths in the folder."""
    return sorted(p.relative_to(path) for place in MODEL_PLACES for p in (path / place).glob("*.onnx"))


def chosen_model(path: Path, models: Sequence[Path], file: str | None) -> Path:
    """The path, inside the folder, of the model that is cut."""
    if file is not None:
        if Path(file) not in models:
            raise UserError(f"{path}: has no model {file}; {listed(models)}")
        return Path(file)
    named = genai_model(path)
    if named is not None:
        if not (path / named).is_file():
            raise UserError(f"{path / GENAI_CONFIG}: names the model {named}, which is not in the folder")
        return named
    bare = without_forms(models)
    if len(bare) == 1:
        return bare[0]
    usual = [model for model in bare if model.name == USUAL_NAME]
    if len(usual) == 1 and not any(is_part(model) for model in bare):
        return usual[0]
    if len(bare) > 1 and len(alike := decoders_alike(path, bare, bare[0])) == len(bare):
        return alike[0]
    if not bare:
        raise UserError(f"{path}: holds no .onnx file, and none in {path / ONNX_FOLDER}")
    raise UserError(f"{path}: {listed(bare)}: name the one to cut with --file; the others are copied")


def encoder_and_decoders(path: Path, models: Sequence[Path]) -> tuple[Path | None, list[Path]]:
    """An encoder and the decoders that read its states, the one to plan on first, where a folder holds nothing else;
    (None, []) of any other folder."""
    bare = without_forms(models)
    encoders = [model for model in bare if "encoder" in words_of(model) and "decoder" not in words_of(model)]
    rest = [model for model in bare if model not in encoders]
    if len(encoders) != 1 or not rest or genai_model(path) is not None:
        return None, []
    decoders = decoders_alike(path, rest, rest[0])
    if len(decoders) != len(rest):
        return None, []
    reads = EncoderDecoder.of(load(path / encoders[0]), load(path / decoders[0]))
    return (encoders[0], decoders) if reads is not None else (None, [])


def decoders_alike(path: Path, models: Sequence[Path], model: Path) -> list[Path]:
    """``model`` and those beside it that hold most of its weights, as a decoder with a past and one without do. They
    are cut alike. The first is the one to plan on: it takes no caches, so that any data will do, and is no branch."""
    bare = without_forms(models)
    beside = [other for other in bare if other.parent == model.parent and other != model]
    if not beside or model not in bare:
        return [model]
    loaded = {file: load(path / file) for file in (model, *beside)}
    own = weight_digests(loaded[model])
    alike = [file for file in loaded if file == model or 2 * len(own & weight_digests(loaded[file])) > len(own)]
    return sorted(
        alike, key=lambda file: (cache_inputs(loaded[file]), loaded[file].merged is not None, file != model, file.name)
    )


def cache_inputs(model: Model) -> int:
    return sum(is_cache_name(spec.name) for spec in model.inputs)


def weight_digests(model: Model) -> set[bytes]:
    """Of the content of every large float constant."""
    constants = [value.const_value for value in model.graph.graph.initializers.values()]
    return {
        hashlib.sha1(tensor.tobytes(), usedforsecurity=False).digest()
        for tensor in constants
        if tensor is not None and is_float(tensor.dtype) and tensor.size >= MIN_ELEMENTS
    }


def listed(models: Sequence[Path]) -> str:
    return f"it holds {', '.join(map(str, models)) or 'no .onnx file'}"


def is_part(model: Path) -> bool:
    """Is this one of several models that make one, such as an encoder and a decoder?"""
    return any(word in words_of(model) for word in (*PARTS, "embed", "vision"))


def words_of(model: Path) -> str:
    """What the path of a model says of it: ``encoder_model.onnx`` or ``encoder/model.onnx``."""
    return f"{model.parent.name}/{model.stem}"


def without_forms(models: Sequence[Path]) -> list[Path]:
    """The models that do not have the name of another precision of one of them."""
    return [model for model in models if form_of(model, models) is None]


def genai_model(path: Path) -> Path | None:
    """The decoder that genai_config.json names."""
    config = path / GENAI_CONFIG
    if not config.is_file():
        return None
    name = read_json(config).get("model", {}).get("decoder", {}).get("filename")
    return Path(name) if isinstance(name, str) and name else None


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError for a file that is no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: is no JSON object")
    return found


def files_of(folder: Path, models: Sequence[Path]) -> set[Path]:
    """The models and the files of their weights, by their paths in the folder; those that lie elsewhere are left."""
    files = {file.resolve() for model in models for file in model_files(folder / model)}
    root = folder.resolve()
    return {file.relative_to(root) for file in files if file.is_relative_to(root)}


def is_hidden(file: Path, folder: Path) -> bool:
    """Files of version control and of caches stay behind."""
    return any(part.startswith(".") for part in file.relative_to(folder).parts)
