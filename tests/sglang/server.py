"""A real SGLang server in a separate process, and the small random model that it serves."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from actor.tasks.toy.tokenizer import VOCABULARY_SIZE, write_tokenizer

ROOT = Path(__file__).parents[2]
API_KEY = "a-key-of-the-tests"
CONTEXT_LENGTH = 2_048
MAX_RUNNING = 16
# The server starts in 25 s on two idle cores.
_START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 30.0

_OPTIONS = {
    "dtype": "float32",
    "api-key": API_KEY,
    "host": "127.0.0.1",
    "max-total-tokens": 16_384,
    "max-running-requests": MAX_RUNNING,
    "random-seed": 0,
}
_CPU_OPTIONS = {"device": "cpu", "attention-backend": "torch_native", "sampling-backend": "pytorch"}
_FLAGS = ("--skip-server-warmup", "--sleep-on-idle", "--disable-cuda-graph")


def python() -> Path:
    """The python of an environment with sglang: PALIMPSEST_SGLANG_PYTHON, or that of `make test-sglang`."""
    return Path(os.environ.get("PALIMPSEST_SGLANG_PYTHON") or ROOT / ".venv-sglang" / "bin" / "python")


def save_model(folder: Path) -> Path:
    """Saves a random two-layer Qwen2 without an EOS token, whose log-probs differ clearly, and the toy's tokenizer."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "eos_token"})
    )
    return folder


@dataclass
class Server:
    """A server process. Use it as a context manager; `stop` and `start` restart it at the same address."""

    model: Path
    log: Path
    port: int = field(default_factory=lambda: _free_port())
    start_s: float = 0.0
    _process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the server; returns when it responds to /health. Raises: RuntimeError."""
        has_gpu = torch.cuda.is_available()
        options = _OPTIONS | ({} if has_gpu else _CPU_OPTIONS) | {"model-path": self.model, "port": self.port}
        # Without a GPU, SGLang's check of installed packages would require its CUDA kernels. The health check must not
        # generate a token: that could not end while the server is paused.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "0"
        if not has_gpu:
            environment["SGLANG_USE_CPU_ENGINE"] = "1"
        started_s = time.monotonic()
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [
                    str(python()),
                    str(Path(__file__).with_name("cpu_server.py")),
                    *(text for name, value in options.items() for text in (f"--{name}", str(value))),
                    *_FLAGS,
                ],
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )
        while not _responds(f"{self.url}/health"):
            if self._process.poll() is not None or time.monotonic() - started_s > _START_TIMEOUT_S:
                self.stop()
                raise RuntimeError(f"SGLang did not start:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.2)
        self.start_s = time.monotonic() - started_s

    def stop(self) -> None:
        """Terminates the server, then kills the remaining processes of its session."""
        if self._process is None:
            return
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_TIMEOUT_S)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None


def _free_port() -> int:
    """A free port below the ephemeral range, so that no other socket gets it before SGLang binds it, 30 s later."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port found")


def _responds(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5.0) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False
