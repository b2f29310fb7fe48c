"""A run file and every kind of file that a run's identity covers. The files' contents are not a usable model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_CONFIG = """
[run]
name = "r"
dir = "run"

[model]
path = "model"

[task]
use = "qa"
questions = ["questions.jsonl"]

[reward]
use = "f1"

[[tool]]
use = "own.tools:Tool"
name = "mine"
file = "./tools/data.txt"

[workflow]
use = "memsearcher"
max_turns = 3

[retriever]
indexes = { wiki = "index" }

[learner]
groups_per_batch = 2
group_size = 2
reference = "reference"
"""

_FILES = {
    "model/config.json": '{"vocab_size": 9}',
    "model/tokenizer.json": '{"vocab": ["a"]}',
    "model/tokenizer_config.json": '{"eos_token": "</s>", "pad_token": "a"}',
    "model/chat_template.jinja": "{{ messages }}",
    "model/model.safetensors": "weights a " * 64,
    "reference/config.json": '{"vocab_size": 9}',
    "reference/model.safetensors": "reference a " * 64,
    "index/manifest.json": '{"sha256": {"vectors.npy": "00"}}',
    "questions.jsonl": '{"id": "1", "question": "who?", "answers": ["a"]}\n',
    "tools/data.txt": "some data\n",
    "run.toml": _CONFIG,
}


FILE_CHANGES: dict[str, tuple[str, str]] = {
    "weights": ("model/model.safetensors", "model.weights"),
    "model config": ("model/config.json", "model.config"),
    "tokenizer": ("model/tokenizer.json", "model.tokenizer"),
    "tokenizer config": ("model/tokenizer_config.json", "model.tokenizer_config"),
    "chat template": ("model/chat_template.jinja", "model.chat_template"),
    "questions": ("questions.jsonl", "task.questions[0]"),
    "index": ("index/manifest.json", "retriever.indexes.wiki"),
    "option of the user's tool": ("tools/data.txt", "tool.mine.file"),
}
"""name of a change → (file, key of the identity that then differs), for files that actors and learner have"""


@dataclass(frozen=True, slots=True)
class RunFiles:
    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "run.toml"

    def change(self, name: str) -> None:
        """Changes one letter of a file, whose size and modification time stay the same."""
        path = self.folder / name
        status, data = path.stat(), bytearray(path.read_bytes())
        place = data.rindex(b"a")
        data[place] = ord("b")
        path.write_bytes(bytes(data))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def make_run_files(folder: Path) -> RunFiles:
    """Writes run.toml and the files that it names into `folder`."""
    for name, text in _FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return RunFiles(folder)
