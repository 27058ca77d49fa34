"""The run's sources, opened: dataset, vocabulary and sample stream of each, and the blend of all for STD and ACT.

Shapes: `n` sequences, `L` seq_length, `v` ids of the source's vocabulary, `V` ids of its tokenizer.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dept.common.errors import ConfigError, DataError
from megatron_dept.common.lazy import LazyMapping
from megatron_dept.config.schema import RunConfig
from megatron_dept.data.blend import BlendedStream
from megatron_dept.data.directory import DatasetDirectory, TokenizerShelf
from megatron_dept.data.remap import VocabularyMap
from megatron_dept.data.sampler import SampleStream
from megatron_dept.dept.sampling import assign_home_slots, assign_slots
from megatron_dept.dept.variants import VARIANTS
from megatron_dept.tokenizers.base import Tokenizer
from megatron_dept.tokenizers.load import load_tokenizer

KEPT_OPEN = 8
"""Sources that stay open, those used last: the one in training, the next one, and those of a run that has few."""
MIXTURE = "mixture"
"""The name under which the blend of all sources trains."""


@dataclass(frozen=True)
class Source:
    """One source as a silo trains it, or the blend of all of them. Batches hold rows of the embedding, not ids."""

    name: str
    vocabulary: VocabularyMap
    stream: SampleStream | BlendedStream

    def prepare(self, cursor: int) -> None:
        """Do now what the first batch from `cursor` on would wait for."""
        if isinstance(self.stream, SampleStream):
            self.stream.prepare(cursor)

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
    that are launches of their own have told each other (`learn`). All sources are checked at the start, one after
    another, and then opened when they are asked for: of a thousand few are open. A blend keeps all of its open.
    """

    def __init__(self, config: RunConfig) -> None:
        self._rule = VARIANTS[config.dept.variant]
        self._homes = config.homes
        self.kind = self._rule.vocabulary
        self.names = tuple(source.name for source in config.sources)
        if MIXTURE in self.names:
            raise ConfigError(f"sources: the name {MIXTURE!r} is the blend's; choose another")
        paths = {
            source.name: getattr(source, config.data_field) for source in config.sources if config.is_at_home(source)
        }
        self._shelf = TokenizerShelf()
        self._paths = paths
        at_home = tuple(paths)
        self.directories = LazyMapping(at_home, self._open, KEPT_OPEN)
        # A global vocabulary is one tokenizer: the configured one, or else the first source's.
        reference: Tokenizer | None = None
        if self.kind != "own":
            first = self.directories[at_home[0]]
            reference = first.tokenizer() if config.tokenizer is None else load_tokenizer(config.tokenizer)
        self.cards = {name: self._check(name, config, reference) for name in at_home}
        self.vocab_size = None if reference is None else reference.vocab_size
        self._every_id: VocabularyMap | None = None
        if self.kind == "global":
            assert self.vocab_size is not None
            self._every_id = VocabularyMap(np.arange(self.vocab_size), self.vocab_size)
        self.vocabularies = LazyMapping(at_home, self._vocabulary, KEPT_OPEN)
        self._sources: Mapping[str, Source]
        if self._rule.synchronous:
            assert self._every_id is not None
            blend = BlendedStream(
                [self._stream(name, config) for name in at_home],
                [self.directories[name].card["splits"]["train"]["tokens"] for name in at_home],
                config.dept.std_tau,
                config.seed,
            )
            self._sources = {MIXTURE: Source(MIXTURE, self._every_id, blend)}
        else:
            self._sources = LazyMapping(
                at_home, lambda name: Source(name, self.vocabularies[name], self._stream(name, config)), KEPT_OPEN
            )
        self.trained = (MIXTURE,) if self._rule.synchronous else self.names

    def _open(self, name: str) -> DatasetDirectory:
        return DatasetDirectory.open(self._paths[name], self._shelf)

    def _check(self, name: str, config: RunConfig, reference: Tokenizer | None) -> SourceCard:
        """Find what is wrong with a source's data before it trains."""
        directory = self.directories[name]
        if reference is not None:
            directory.check_tokenizer(reference)
        # The card's size is that of the tokenizer with the card's fingerprint, which its file has. To load it for that,
        # a thousand sources' a thousand times, would take minutes.
        vocab_size = directory.card["tokenizer"]["vocab_size"]
        rows = len(directory.vocabulary()) if self.kind == "trimmed" else vocab_size
        card = SourceCard(rows, vocab_size, fingerprint(directory), text_fingerprint(directory), str(directory.path))
        if rows < config.parallel.most_tensor_ranks:
            raise ConfigError(
                f"source {name} has {rows} rows for tensor_model_parallel_size {config.parallel.most_tensor_ranks}: "
                f"every tensor rank needs one; set it to at most {rows}"
            )
        self._stream(name, config)
        return card

    def _stream(self, name: str, config: RunConfig) -> SampleStream:
        return SampleStream(self.directories[name].indexed("train"), config.model.seq_length, config.seed, name)

    def _vocabulary(self, name: str) -> VocabularyMap:
        if self._every_id is not None:
            return self._every_id
        vocab_size = self.cards[name].vocab_size
        ids = self.directories[name].vocabulary() if self.kind == "trimmed" else np.arange(vocab_size)
        return VocabularyMap(ids, vocab_size)

    def ids(self, name: str) -> np.ndarray:
        """The ids of its tokenizer that a source's rows stand for, int64 [v]; it is not kept open for that."""
        return self._open(name).vocabulary() if self.kind == "trimmed" else np.arange(self.cards[name].vocab_size)

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
