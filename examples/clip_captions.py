"""Captions to tokens, and how a long caption becomes a short one in the masked training.

    caption -> some of its words, or of its tokens -> (L,) tokens

Which ones are kept matters, and more so the fewer they are: see "Captions" in examples/README.md.
"""

import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import regex
import torch
from clip_shards import captions_of, raw_samples
from clip_towers import make_tokenizer
from torch import Tensor
from tqdm import tqdm
from user_errors import UserError

MIN_COUNT = 5  # of a word that anything can be said of; as in CLIPF's code
WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")  # where CLIP's tokenizer cuts
Tokenize = Callable[..., Tensor]  # as open_clip's: a list of strings, and perhaps a length, to (B, L) int64

_clean = open_clip.tokenizer.get_clean_fn("lower")


def words_of(caption: str) -> list[str]:
    """Words in lower case and punctuation marks, in their order."""
    words: list[str] = WORDS.findall(_clean(caption))
    return words


@dataclass(frozen=True)
class ByFrequency:
    """Random words of a caption that has too many, rare ones more often, in their order (CLIPF, arXiv 2412.16148).

    A word scores a number in [0, 1), drawn from torch's generator, less max(0, 1 - sqrt(threshold / f)), where f is its
    share of all words; less 1 if it was met less than five times. The words of the highest scores are kept.

    Args:
        tokenize: of open_clip.
        num_tokens: L, of which two are the ends of the caption.
        counts: of the words in all captions.
        threshold: a share of all words, above 0.
    """

    tokenize: Tokenize
    num_tokens: int
    counts: Mapping[str, int]
    threshold: float
    _handicap: dict[str, float] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        known = {word: count for word, count in self.counts.items() if count >= MIN_COUNT}
        total = sum(known.values())
        for word, count in known.items():
            self._handicap[word] = max(0.0, 1 - math.sqrt(self.threshold * total / count))

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Tokens (B, L) int64."""
        return self.tokenize([self.shorten(caption) for caption in captions], self.num_tokens)

    def shorten(self, caption: str) -> str:
        words = words_of(caption)
        num_kept = self.num_tokens - 2
        if len(words) <= num_kept:  # and what has too many tokens all the same is cut at its end
            return caption
        scores = torch.rand(len(words)) - torch.tensor([self._handicap.get(word, 1.0) for word in words])
        return " ".join(words[index] for index in scores.topk(num_kept).indices.sort().values.tolist())


def make_shortener(
    architecture: Mapping[str, Any], num_tokens: int, reduction: str, *, counts: Mapping[str, int], threshold: float
) -> Tokenize:
    """A tokenizer for captions of at most `num_tokens` tokens.

    Args:
        architecture: see `clip_towers.model_config`.
        reduction: see `clip_options.Text`.
        counts, threshold: of "frequency", see `ByFrequency`.
    """
    if reduction == "frequency":
        return ByFrequency(make_tokenizer(architecture), num_tokens, counts, threshold)
    options = {} if reduction == "truncate" else {"reduction_mask": reduction}
    return functools.partial(make_tokenizer(architecture, **options), context_length=num_tokens)


def check_reduction(
    architecture: Mapping[str, Any], num_tokens: int, reduction: str = "truncate", threshold: float = 1e-6
) -> None:
    """Refuse what the text tower or its tokenizer can't do.

    Raises:
        UserError: with the way out.
    """
    text = architecture["text_cfg"]
    context = text.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
    if not 3 <= num_tokens <= context:
        raise UserError(f"caption_tokens must be from 3 to {context}, the context of the model, got {num_tokens}")
    if text.get("pool_type", "argmax") == "last" or text.get("embed_cls"):
        raise UserError(
            "caption_tokens: this text tower reads a caption off its last position, which would be another one in the "
            f"evaluation: take context_length {num_tokens} instead, for training and evaluation"
        )
    if "hf_tokenizer_name" in text and reduction not in ("truncate", "frequency"):
        raise UserError(
            f"caption_reduction {reduction} needs CLIP's own tokenizer, and this model has "
            f"{text['hf_tokenizer_name']}: take truncate or frequency"
        )
    if not threshold > 0:
        raise UserError(f"caption_threshold must be above 0, got {threshold}")
    if reduction == "syntax":
        try:
            import nltk  # only for this

            nltk.pos_tag(nltk.tokenize.word_tokenize("two words"))
        except (ImportError, LookupError) as error:
            raise UserError(
                "caption_reduction syntax needs nltk and its data: pip install nltk, then python -m nltk.downloader "
                "punkt punkt_tab averaged_perceptron_tagger averaged_perceptron_tagger_eng"
            ) from error


def read_counts(file: Path) -> dict[str, int]:
    """Counted words, `{"word": count}`.

    Raises:
        UserError: when it is no such file.
    """
    try:
        counts = json.loads(file.read_text(encoding="utf-8"))
        return {str(word): int(count) for word, count in counts.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f'caption_counts {file} is no JSON file of {{"word": count}}: {error}') from error


def write_counts(file: Path, counts: Mapping[str, int]) -> None:
    """The most frequent words first; under its name only when it is whole."""
    part = file.with_suffix(".part")
    ranked = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    part.write_text(json.dumps(ranked, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    part.replace(file)


def count_words(captions: Iterable[str]) -> Counter[str]:
    """How often each word is met."""
    return Counter(word for caption in captions for word in words_of(caption))


def count_words_in_shards(shards: Sequence[str], *, all_captions: bool, workers: int) -> Counter[str]:
    """Likewise, in the first caption of every image, or in all of them; `workers` processes read the shards."""
    loader = torch.utils.data.DataLoader(
        _WordsOf(shards, all_captions), batch_size=None, num_workers=workers, generator=torch.Generator()
    )
    total: Counter[str] = Counter()
    for counts in tqdm(loader, desc="counting words", unit=" shards", disable=None):
        total.update(dict(counts))
    return total


class _WordsOf(torch.utils.data.Dataset[list[tuple[str, int]]]):
    """Words and how often they are met, of every shard; as pairs, since a loader would count a Counter twice."""

    def __init__(self, shards: Sequence[str], all_captions: bool) -> None:
        self.shards = shards
        self.all_captions = all_captions

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> list[tuple[str, int]]:
        return list(count_words(self._captions(self.shards[index])).items())

    def _captions(self, shard: str) -> Iterator[str]:
        for raw in raw_samples([shard], lambda problem: None):  # which the training reports
            try:
                captions = captions_of(raw)
            except (ValueError, AttributeError):  # likewise
                continue
            yield from captions if self.all_captions else captions[:1]
