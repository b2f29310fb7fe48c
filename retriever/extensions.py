"""The retriever's extension points: encoders and index structures by name, built in or from the user's own package.

--encoder notes.encoder:Trigrams --encoder-option dimension=64
    ─► ExtensionSection(use="notes.encoder:Trigrams", dimension=64)
    ─► with_all_options: validated, defaults filled in; the index's manifest records this
    ─► create_encoder: import, Trigrams(options, compute=…)
"""

from __future__ import annotations

import logging
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from protocol.config_base import ExtensionSection
from protocol.errors import ConfigError, DataError, PalimpsestError
from protocol.extensions import ExtensionPoint, described, options_of
from retriever.encoders.base import HUGGINGFACE, Compute, Encoder, EncoderSpec
from retriever.manifest import check_encoder
from retriever.structures.base import StructureSpec, VectorIndex

log = logging.getLogger(__name__)

BOW = "bow"
MINILM = "minilm"
HNSW = "hnsw"
FLAT = "flat"
MODEL_ENCODERS = (MINILM, HUGGINGFACE)
_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")

ENCODERS = ExtensionPoint(
    key="encoder",
    noun="encoder",
    builtins={
        MINILM: "retriever.encoders.huggingface:MiniLMEncoder",
        BOW: "retriever.encoders.bow:BagOfWordsEncoder",
        HUGGINGFACE: "retriever.encoders.huggingface:HuggingFaceEncoder",
    },
    methods={
        "fit": "fit(self, passages)",
        "encode_passages": "encode_passages(self, passages)",
        "encode_queries": "encode_queries(self, queries)",
        "save_state": "save_state(self, folder)",
        "load_state": "load_state(self, folder)",
    },
)
STRUCTURES = ExtensionPoint(
    key="structure",
    noun="index structure",
    builtins={
        HNSW: "retriever.structures.hnsw:HnswIndex",
        FLAT: "retriever.structures.flat:FlatIndex",
    },
    methods={
        "__len__": "__len__(self)",
        "allocate": "allocate(self, num_rows)",
        "add": "add(self, vectors)",
        "search": "search(self, queries, k)",
        "save": "save(self, folder)",
        "load": "load(self, folder)",
    },
)
_BASES: Mapping[str, type] = {ENCODERS.key: Encoder, STRUCTURES.key: VectorIndex}


def parse_options(arguments: Iterable[str], *, flag: str) -> dict[str, object]:
    """The `key=value` arguments of a command-line flag. Values are TOML; a value that is not TOML is a string.

    Raises: ConfigError if an argument has no key or a key occurs twice.
    """
    options: dict[str, object] = {}
    for argument in arguments:
        key, separator, text = argument.partition("=")
        if not separator or not key:
            raise ConfigError(f"{flag} must be key=value, got {argument!r}")
        if key in options:
            raise ConfigError(f"{flag} {argument}: {key} is given twice")
        try:
            options[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            options[key] = text
    return options


def encoder_section(name: str, options: Mapping[str, object] | None = None) -> ExtensionSection:
    """The section of an encoder. `name`: a built-in, an import path `package.module:Name`, a Hugging Face folder.

    Raises: DataError if it is none of them.
    """
    options = dict(options or {})
    folder = Path(name)
    if name in ENCODERS.builtins or (_IMPORT_PATH.fullmatch(name) and not folder.is_dir()):
        return _section(name, options)
    if not folder.is_dir():
        raise DataError(
            f"there is no encoder {name!r}; give minilm, bow, a Hugging Face model folder, or an import path "
            "package.module:Name"
        )
    return _section(HUGGINGFACE, {**options, "folder": str(folder.resolve())})


def structure_section(name: str, options: Mapping[str, object] | None = None) -> ExtensionSection:
    """The section of a structure. `name`: a built-in or an import path. Raises: ConfigError if it is neither."""
    if name not in STRUCTURES.builtins and not _IMPORT_PATH.fullmatch(name):
        raise ConfigError(
            f"--structure must be auto, {', '.join(STRUCTURES.builtins)} or an import path package.module:Name, "
            f"got {name!r}"
        )
    return _section(name, options or {})


def with_all_options(point: ExtensionPoint, section: ExtensionSection) -> ExtensionSection:
    """`section` with validated options: defaults filled in, paths absolute. Raises: ConfigError."""
    options = options_of(_load(point, section), section, key=point.key, base_dir=Path.cwd())
    return _section(section.use, options.model_dump(mode="json"))


def create_encoder(section: ExtensionSection, *, compute: Compute | None = None, context: str = "") -> Encoder:
    """Creates an encoder without its state. `context` is a prefix of error messages.

    Raises: ConfigError if it cannot be imported, lacks a method or refuses an option; DataError if its model cannot
    be used.
    """
    _load(ENCODERS, section, context=context)
    return ENCODERS.create(section, base_dir=Path.cwd(), key=f"{context}encoder", compute=compute or Compute())


def create_structure(
    section: ExtensionSection, *, dimension: int, num_threads: int = 1, context: str = ""
) -> VectorIndex:
    """Creates an empty index structure. `context` is a prefix of error messages.

    Raises: ConfigError if it cannot be imported, lacks a method or refuses an option.
    """
    _load(STRUCTURES, section, context=context)
    return STRUCTURES.create(
        section, base_dir=Path.cwd(), key=f"{context}structure", dimension=dimension, num_threads=num_threads
    )


def reopen_encoder(
    spec: EncoderSpec, *, index_folder: Path, encoder: str | None = None, compute: Compute | None = None
) -> Encoder:
    """The encoder that an index was made with, with its state. `encoder`, if given, is what `--encoder` named: it
    must be the same encoder; a Hugging Face folder may have another path than when the index was made.

    Raises: ConfigError or DataError if it cannot be opened or is not the encoder that `spec` describes.
    """
    section = _section(spec.use, spec.options)
    if encoder is not None:
        wanted = encoder_section(encoder)
        if wanted.use != spec.use and not {wanted.use, spec.use} <= set(MODEL_ENCODERS):
            raise DataError(
                f"index {index_folder} was made with another encoder: expected {spec.source}, found {encoder}; "
                "use the encoder that it was made with, or build the index again"
            )
        if wanted.use in MODEL_ENCODERS:
            kept = {name: value for name, value in spec.options.items() if name != "folder"}
            section = _section(wanted.use, {**kept, **wanted.options})
    opened = create_encoder(section, compute=compute, context=f"index {index_folder}: ")
    with running(ENCODERS, section.use):
        opened.load_state(index_folder)
    check_encoder(spec, spec_of(section, opened), folder=index_folder)
    return opened


def reopen_structure(
    spec: StructureSpec,
    *,
    index_folder: Path,
    dimension: int,
    ef_search: int | None = None,
    num_threads: int = 1,
) -> VectorIndex:
    """The index structure of an index folder, loaded. `ef_search` replaces the recorded one of an `hnsw` structure.

    Raises: ConfigError or DataError if it cannot be opened.
    """
    changed = {"ef_search": ef_search} if spec.use == HNSW and ef_search is not None else {}
    structure = create_structure(
        _section(spec.use, {**spec.options, **changed}),
        dimension=dimension,
        num_threads=num_threads,
        context=f"index {index_folder}: ",
    )
    with running(STRUCTURES, spec.use):
        structure.load(index_folder)
    return structure


@contextmanager
def running(point: ExtensionPoint, use: str) -> Iterator[None]:
    """Context manager around calls into the class `use`. Converts exceptions of user code, not of built-ins.

    Raises: ConfigError if a user's own code raises anything but a PalimpsestError; the traceback is in the log.
    """
    try:
        yield
    except PalimpsestError:
        raise
    except Exception as error:
        if use in point.builtins:
            raise
        log.exception("the %s %s failed", point.noun, use)
        raise ConfigError(f"{point.key}: {use} raised {described(error)}") from error


def spec_of(section: ExtensionSection, encoder: Encoder) -> EncoderSpec:
    """The manifest's record of an encoder that was created from `section` and has its state."""
    return EncoderSpec(
        use=section.use, options=section.options, fingerprint=encoder.fingerprint, dimension=encoder.dimension
    )


def _section(use: str, options: Mapping[str, object]) -> ExtensionSection:
    return ExtensionSection.model_validate({**options, "use": use})


def _load(point: ExtensionPoint, section: ExtensionSection, *, context: str = "") -> type:
    """The class that `section` names. Raises: ConfigError."""
    found, base = point.load(section.use, key=f"{context}{point.key}"), _BASES[point.key]
    if not issubclass(found, base):
        raise ConfigError(
            f"{context}{point.key}.use: {section.use} must be a subclass of {base.__module__}.{base.__name__}"
        )
    return found
