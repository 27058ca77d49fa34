"""The run's sources, opened: dataset, vocabulary and sample stream of each, and the blend of all for STD and ACT.

Shapes: `n` sequences, `L` seq_length, `v` ids of the source's vocabulary, `V` ids of its tokenizer.
"""

from dataclasses import dataclass

import numpy as np

from megatron_dept.common.errors import ConfigError, DataError
from megatron_dept.config.schema import RunConfig
from megatron_dept.data.blend import BlendedStream
from megatron_dept.data.directory import DatasetDirectory
from megatron_dept.data.remap import VocabularyMap
from megatron_dept.data.sampler import SampleStream
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


class SourceSet:
    """All sources of a run. `names` are those of the configuration; `trained` what the rounds sample from."""

    def __init__(self, config: RunConfig) -> None:
        self._rule = VARIANTS[config.dept.variant]
        self.kind = self._rule.vocabulary
        self.names = tuple(source.name for source in config.sources)
        if MIXTURE in self.names:
            raise ConfigError(f"sources: the name {MIXTURE!r} is the blend's; choose another")
        self.directories = {
            source.name: DatasetDirectory.open(getattr(source, config.data_field)) for source in config.sources
        }
        if self._rule.vocabulary != "own":
            _check_one_tokenizer(config, self.directories)
        sizes = {name: directory.tokenizer().vocab_size for name, directory in self.directories.items()}
        self.vocab_size = None if self._rule.vocabulary == "own" else sizes[self.names[0]]
        self.vocabularies = {
            name: VocabularyMap(
                directory.vocabulary() if self._rule.vocabulary == "trimmed" else np.arange(sizes[name]), sizes[name]
            )
            for name, directory in self.directories.items()
        }
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
        self.trained = tuple(self._sources)

    def __getitem__(self, name: str) -> Source:
        return self._sources[name]


def _check_one_tokenizer(config: RunConfig, directories: dict[str, DatasetDirectory]) -> None:
    """A global vocabulary is one tokenizer: the configured one, or else the first source's."""
    if config.tokenizer is not None:
        reference = load_tokenizer(config.tokenizer)
    else:
        reference = next(iter(directories.values())).tokenizer()
    for directory in directories.values():
        directory.check_tokenizer(reference)
