"""The run's sources, opened: dataset, vocabulary and sample stream of each, and the blend of all for STD and ACT.

Shapes: `n` sequences, `L` seq_length, `v` ids of the source's vocabulary, `V` ids of its tokenizer.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dept.common.errors import ConfigError, DataError
from megatron_dept.config.schema import RunConfig
from megatron_dept.data.blend import BlendedStream
from megatron_dept.data.directory import DatasetDirectory
from megatron_dept.data.remap import VocabularyMap
from megatron_dept.data.sampler import SampleStream
from megatron_dept.dept.sampling import assign_home_slots, assign_slots
from megatron_dept.dept.variants import VARIANTS
from megatron_dept.tokenizers.load import load_tokenizer

MIXTURE = "mixture"
"""The name under which the blend of all sources trains."""


@dataclass(frozen=True)
class Source:
    """One source as a silo trains it, or the blend of all of them. Batches hold rows of the embedding, not ids."""

    name: str
    vocabulary: VocabularyMap
    stream: SampleStream | BlendedStream

    def batch(self, cursor: int, count: int) -> np.ndarray:
        """Samples cursor to cursor + count: int64 [count, L + 1], local rows of the vocabulary.

        Raises `DataError` naming an id that the vocabulary lacks, and the source that it comes from.
        """
        if isinstance(self.stream, BlendedStream):
            samples, drawn = self.stream.batch(cursor, count)
            names = [self.stream.streams[source].name for source in drawn]
        else:
            samples = self.stream.batch(cursor, count)
            names = [self.name] * count
        try:
            return self.vocabulary.to_local(samples)
        except DataError:
            for name, sample in zip(names, samples, strict=True):
                try:
                    self.vocabulary.to_local(sample)
                except DataError as error:
                    raise DataError(f"source {name}: {error}") from error
            raise


@dataclass(frozen=True)
class SourceCard:
    """What all silos know of a source, also where its data is another silo's."""

    vocabulary_size: int
    """Rows of its embedding."""
    vocab_size: int
    """Ids of its tokenizer."""
    tokenizer_fingerprint: str
    text_fingerprint: str
    data: str
    """Its dataset directory, where it is at home."""


class SourceSet:
    """All sources of a run. `names` are those of the configuration; `trained` what the rounds sample from.

    `directories` and `vocabularies` are of the sources whose data this launch has; `cards` of all, as soon as silos
    that are launches of their own have told each other (`learn`).
    """

    def __init__(self, config: RunConfig) -> None:
        self._rule = VARIANTS[config.dept.variant]
        self._homes = config.homes
        self.kind = self._rule.vocabulary
        self.names = tuple(source.name for source in config.sources)
        if MIXTURE in self.names:
            raise ConfigError(f"sources: the name {MIXTURE!r} is the blend's; choose another")
        self.directories = {
            source.name: DatasetDirectory.open(getattr(source, config.data_field))
            for source in config.sources
            if config.is_at_home(source)
        }
        if self._rule.vocabulary != "own":
            _check_one_tokenizer(config, self.directories)
        sizes = {name: directory.tokenizer().vocab_size for name, directory in self.directories.items()}
        self.vocab_size = None if self._rule.vocabulary == "own" else next(iter(sizes.values()))
        self.vocabularies = {
            name: VocabularyMap(
                directory.vocabulary() if self._rule.vocabulary == "trimmed" else np.arange(sizes[name]), sizes[name]
            )
            for name, directory in self.directories.items()
        }
        self.cards = {
            name: SourceCard(
                len(self.vocabularies[name]),
                sizes[name],
                fingerprint(directory),
                text_fingerprint(directory),
                str(directory.path),
            )
            for name, directory in self.directories.items()
        }
        for name, vocabulary in self.vocabularies.items():
            if len(vocabulary) < config.parallel.most_tensor_ranks:
                raise ConfigError(
                    f"source {name} has {len(vocabulary)} rows for tensor_model_parallel_size "
                    f"{config.parallel.most_tensor_ranks}: every tensor rank needs one; set it to at most "
                    f"{len(vocabulary)}"
                )
        streams = {
            name: SampleStream(directory.indexed("train"), config.model.seq_length, config.seed, name)
            for name, directory in self.directories.items()
        }
        if self._rule.synchronous:
            assert self.vocab_size is not None
            blend = BlendedStream(
                list(streams.values()),
                [directory.indexed("train").total_tokens for directory in self.directories.values()],
                config.dept.std_tau,
                config.seed,
            )
            every_id = VocabularyMap(np.arange(self.vocab_size), self.vocab_size)
            self._sources = {MIXTURE: Source(MIXTURE, every_id, blend)}
        else:
            self._sources = {name: Source(name, self.vocabularies[name], stream) for name, stream in streams.items()}
        self.trained = (MIXTURE,) if self._rule.synchronous else self.names

    def __getitem__(self, name: str) -> Source:
        return self._sources[name]

    def learn(self, cards: Mapping[str, SourceCard]) -> None:
        """Take over what other silos say of their sources.

        Raises `ConfigError` where a source is nobody's, or a shared vocabulary is not one tokenizer's.
        """
        self.cards = {name: cards[name] for name in self.names if name in cards}
        missing = [name for name in self.names if name not in cards]
        if missing:
            raise ConfigError(f"sources: no silo has {', '.join(missing)} at home; start one that has, or remove them")
        if self._rule.vocabulary == "own":
            return
        first, reference = next(iter(self.cards.items()))
        for name, card in self.cards.items():
            if card.tokenizer_fingerprint != reference.tokenizer_fingerprint:
                raise ConfigError(
                    f"source {name} is under tokenizer {card.tokenizer_fingerprint[:12]}, source {first} under "
                    f"{reference.tokenizer_fingerprint[:12]}; a global vocabulary is one tokenizer's: preprocess both "
                    "with the same"
                )

    @property
    def largest_vocabulary(self) -> int:
        """Rows of the largest source: what the head on a pipeline's last stage may cost."""
        return max(card.vocabulary_size for card in self.cards.values())

    def slots(self, names: Sequence[str], silos: int) -> tuple[tuple[str | None, ...], ...]:
        """`names` as slots x silos: on their home silos where they have any, else wherever is room.

        A silo alone trains those whose data it has.
        """
        if silos == 1:
            return tuple((name,) for name in names if name in self.directories or name == MIXTURE)
        return assign_slots(names, silos) if self._homes is None else assign_home_slots(names, self._homes, silos)


def fingerprint(directory: DatasetDirectory) -> str:
    """SHA-256 of the tokenizer that a dataset was made with."""
    return str(directory.card["tokenizer"]["fingerprint"])


def text_fingerprint(directory: DatasetDirectory) -> str:
    """What tells one training text from another under the same tokenizer: its size and how often each id occurs."""
    size = directory.card["splits"]["train"]
    digest = hashlib.blake2b(np.ascontiguousarray(directory.token_counts).tobytes(), digest_size=8).hexdigest()
    return f"{size['documents']} documents, {size['tokens']} tokens, counts {digest}"


def _check_one_tokenizer(config: RunConfig, directories: dict[str, DatasetDirectory]) -> None:
    """A global vocabulary is one tokenizer: the configured one, or else the first source's."""
    if config.tokenizer is not None:
        reference = load_tokenizer(config.tokenizer)
    else:
        reference = next(iter(directories.values())).tokenizer()
    for directory in directories.values():
        directory.check_tokenizer(reference)
