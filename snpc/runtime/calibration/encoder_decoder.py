"""Data for an encoder and the decoder that reads its states: the decoder's inputs are made by running the encoder.

| input of the whole | goes to |
|---|---|
| those of the encoder, such as ``input_features``, or ``input_ids`` with ``attention_mask`` | the encoder |
| ``decoder_input_ids`` | the decoder, as its token ids |

The decoder's ``encoder_hidden_states`` are what the encoder makes, and its ``encoder_attention_mask`` is the encoder's
mask. Samples that are fitted to and samples that are held out stay the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from snpc.graph import decoder_input
from snpc.runtime.calibration.dataset import Calibration, calibration_from_batches
from snpc.runtime.calibration.sources import CalibrationPart, CalibrationSource, HeldArrays, part_in_memory
from snpc.runtime.calibration.text_inputs import find_ids, find_mask, find_states, with_filled_inputs
from snpc.types import AnyArray, Feeds, Model, TensorSpec

DECODER_IDS = "decoder_input_ids"


@dataclass(frozen=True)
class EncoderDecoder:
    """The inputs of both, and ``states``: the encoder's output that the decoder reads."""

    encoder: tuple[TensorSpec, ...]
    decoder: tuple[TensorSpec, ...]
    states: str

    @classmethod
    def of(cls, encoder: Model, decoder: Model) -> EncoderDecoder | None:
        """None where the decoder does not read the states of this encoder, or its token ids are not found."""
        wanted, ids = find_states(decoder.inputs), find_ids(decoder.inputs)
        if wanted is None or ids is None or any(decoder_input(s.name) == "encoder_states" for s in encoder.inputs):
            return None
        fitting = [s.name for s in encoder.outputs if len(s.shape) == 3 and s.shape[2] == wanted.shape[2]]
        return cls(encoder.inputs, decoder.inputs, fitting[0]) if fitting else None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Of the whole."""
        ids = find_ids(self.decoder)
        assert ids is not None
        return (*self.encoder, replace(ids, name=DECODER_IDS))

    def encoder_data(self, whole: Calibration) -> Calibration:
        """What goes to the encoder."""
        return whole.restricted_to(self.encoder)

    def decoder_data(self, whole: Calibration, run: Callable[[Feeds], Mapping[str, AnyArray]]) -> Calibration:
        """What goes to the decoder, of states that ``run`` makes: the encoder, which is run here, on all samples."""
        held_out = self.decoder_data(whole.held_out, run) if whole.held_out is not None else None
        source = CalibrationSource(whole.source, self.decoder_parts(whole, run), self.decoder)
        return replace(calibration_from_batches(whole, with_filled_inputs(source)), held_out=held_out)

    def decoder_parts(
        self, whole: Calibration, run: Callable[[Feeds], Mapping[str, AnyArray]]
    ) -> Iterator[CalibrationPart]:
        """One for each batch of the whole."""
        store = HeldArrays()
        for number, feeds in enumerate(whole.batches()):
            label = f"{whole.source}, {whole.batch_text(number)}"
            made = {**self.states_feeds(feeds, run), **self.ids_feeds(feeds)}
            yield part_in_memory(label, store.keep(label, made))

    def states_feeds(self, feeds: Feeds, run: Callable[[Feeds], Mapping[str, AnyArray]]) -> dict[str, AnyArray]:
        """The decoder's states, and their mask where it takes one and the encoder has one."""
        states, mask = find_states(self.decoder), find_mask(self.encoder)
        assert states is not None
        made = {states.name: run({spec.name: feeds[spec.name] for spec in self.encoder})[self.states]}
        if mask is not None:
            made |= {s.name: feeds[mask.name].astype(s.dtype) for s in self.decoder if is_state_mask(s)}
        return made

    def ids_feeds(self, feeds: Feeds) -> dict[str, AnyArray]:
        ids = find_ids(self.decoder)
        assert ids is not None
        return {ids.name: feeds[DECODER_IDS]}


def is_state_mask(spec: TensorSpec) -> bool:
    return decoder_input(spec.name) == "encoder_mask"
