"""An encoder and the decoder that reads its states: cut one after the other, and checked together.

The encoder is cut first. The decoder is then measured, fitted and verified on the states of the pruned encoder, which
are those that it reads in the written folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from snpc.errors import UserError
from snpc.folders.model_folder import ModelFolder
from snpc.pipeline import (
    DecoderPair,
    PrunedModel,
    VerificationData,
    check_cached_decoding,
    measure_whole,
    quality_json,
    verification_data,
)
from snpc.runtime.batches import open_file
from snpc.runtime.calibration import Calibration, EncoderDecoder
from snpc.runtime.execution import Execution, RunFunction, random_batch
from snpc.runtime.io import load
from snpc.types import AnyArray, Feeds, Model, Quality, TensorSpec

PrunePart = Callable[[Path, Path, Calibration | None], PrunedModel]
"""(model, where it is written, its data) -> result."""


@dataclass(frozen=True)
class WholeVerdict:
    """What holds of a pruned encoder with its pruned decoder: ``checks``, in words, and the ``quality`` of what both
    make, against what the original decoder makes of the original encoder's states; None without data."""

    checks: tuple[str, ...]
    quality: Quality | None

    def to_json(self) -> dict[str, Any]:
        quality = quality_json(self.quality) if self.quality is not None else None
        return {"checks": list(self.checks), "quality": quality}


@dataclass(frozen=True)
class PrunedParts:
    """Both parts, and what holds of them together."""

    encoder: PrunedModel
    decoder: PrunedModel
    whole: WholeVerdict


@dataclass(frozen=True)
class ModelParts:
    """The files of an encoder and of the decoder to plan on, and how data goes to them."""

    encoder: Path
    decoder: Path
    reads: EncoderDecoder

    @classmethod
    def of(cls, source: ModelFolder) -> ModelParts:
        """Of a folder whose encoder is cut too."""
        assert source.encoder_path is not None
        reads = EncoderDecoder.of(load(source.encoder_path), load(source.model_path))
        assert reads is not None
        return cls(source.encoder_path, source.model_path, reads)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Those that data for the whole has."""
        return self.reads.inputs

    def check(self, data: Calibration) -> None:
        """Raises UserError where data is for one part alone."""
        missing = {spec.name for spec in self.inputs} - {spec.name for spec in data.inputs}
        if missing:
            raise UserError(
                f"{data.source}: is for one part, and lacks {', '.join(sorted(missing))}: encoder and decoder are cut "
                f"together on data with {', '.join(spec.name for spec in self.inputs)}"
            )

    def prune(
        self, encoder_path: Path, path: Path, data: Calibration | None, prune_part: PrunePart, execution: Execution
    ) -> PrunedParts:
        """Write both parts. Raises CheckFailed where they do not decode together."""
        with naming_part("encoder", self.encoder):
            own = self.reads.encoder_data(data) if data is not None else None
            encoder = prune_part(self.encoder, encoder_path, own)
        decoder_data = self.decoder_data(data, encoder.path, execution) if data is not None else None
        with naming_part("decoder", self.decoder):
            decoder = prune_part(self.decoder, path, decoder_data)
        checks = self.checks(encoder, decoder, data, execution)
        quality = self.quality(encoder, decoder, data, execution) if data is not None else None
        return PrunedParts(encoder, decoder, WholeVerdict(checks, quality))

    def decoder_data(self, data: Calibration, encoder: Path, execution: Execution) -> Calibration:
        """What goes to the decoder behind the encoder in this file."""
        with running_encoder(encoder, data, execution) as run:
            return self.reads.decoder_data(data, run)

    def checks(
        self, encoder: PrunedModel, decoder: PrunedModel, data: Calibration | None, execution: Execution
    ) -> tuple[str, ...]:
        """Prefill and steps behind each encoder, on one sample or random inputs."""
        feeds = next(data.first_rows(1)) if data is not None else random_batch(encoder.plan.analysis, 1)
        original, pruned = (self.states(file, feeds, execution) for file in (self.encoder, encoder.path))
        companions = [companion.path for companion in decoder.companions if companion.path != decoder.path]
        written = load(decoder.path, companions=companions)
        before, after = decoder_pairs(decoder.plan.analysis.model, original), decoder_pairs(written, pruned)
        return tuple(
            f"{name} behind the pruned encoder: {check}"
            for name, pair in before.items()
            for check in check_cached_decoding(pair, after[name], execution)
        )

    def states(self, encoder: Path, feeds: Feeds, execution: Execution) -> dict[str, AnyArray]:
        """Of the first sample."""
        with open_file(encoder, execution) as run:
            return {name: array[:1] for name, array in self.reads.states_feeds(feeds, run).items()}

    def quality(self, encoder: PrunedModel, decoder: PrunedModel, data: Calibration, execution: Execution) -> Quality:
        """On samples that were held out, where there are some."""
        analysis, shown = decoder.plan.analysis, data.held_out or data
        written = replace(self, reads=replace(self.reads, decoder=decoder.inputs))  # caches may be narrower

        def fed(parts: ModelParts, file: Path) -> VerificationData:
            behind = parts.decoder_data(shown, file, execution)
            found = verification_data(analysis, behind, fitted_to=False, execution=execution)
            return replace(found, held_out=data.held_out is not None)

        before, after = fed(self, self.encoder), fed(written, encoder.path)
        return measure_whole(analysis, load(decoder.path).path, before, after, execution)


def decoder_pairs(model: Model, states: Feeds) -> dict[str, DecoderPair]:
    """By the file of the second: the decoder with each that may go on from its caches, and the branches of those that
    are merged."""
    if not model.companions:
        return {model.path.name: DecoderPair(model, model, states)}
    pairs: dict[str, DecoderPair] = {}
    for companion in model.companions:
        if companion.merged is not None:
            pairs |= decoder_pairs(companion, states)
        else:
            file = model.merged or companion.path
            pairs[file.name] = DecoderPair(model, companion, states)
    return pairs


@contextmanager
def naming_part(part: str, model: Path) -> Iterator[None]:
    """What cannot be done with one part names it, and how the other goes without it."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"{part} {model.name}: {error}; encoder and decoder are asked for the same, and --file cuts one of them"
        ) from None


@contextmanager
def running_encoder(path: Path, data: Calibration, execution: Execution) -> Iterator[RunFunction]:
    """A run of the encoder, which tells progress of each batch."""
    batches = len(data.batch_plan) + (len(data.held_out.batch_plan) if data.held_out is not None else 0)
    with open_file(path, execution) as run, execution.progress.stage("states of the encoder", batches) as advance:

        def made(feeds: Feeds) -> dict[str, AnyArray]:
            outputs = run(feeds)
            advance(1)
            return outputs

        yield made
