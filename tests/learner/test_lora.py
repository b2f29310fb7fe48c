from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from learner.model.export import published_weights
from learner.model.loading import Policy
from learner.model.lora import add_adapters
from learner.model.parallel import World
from learner.training.checkpoint import TrainingProgress, restore_checkpoint, save_checkpoint
from learner.training.optimizer import apply_update, build_optimizer
from protocol.errors import ConfigError
from protocol.learner_config import LoraConfig, OptimizerConfig
from tests.learner.tiny import VOCAB_SIZE, tiny_model

CONFIG = LoraConfig(rank=4, alpha=6.0, targets=("q_proj", "v_proj", "down_proj"))
TOKEN_IDS = torch.arange(36).reshape(3, 12) % VOCAB_SIZE


def adapted(*, seed: int = 1) -> PreTrainedModel:
    model = tiny_model()
    torch.manual_seed(seed)
    add_adapters(model, CONFIG)
    return model


def train(model: PreTrainedModel, optimizer: torch.optim.Optimizer, *, num_steps: int) -> None:
    for _ in range(num_steps):
        logits(model).log_softmax(-1)[..., 3].sum().backward()
        apply_update(model, optimizer, rate=0.05, clip_norm=1.0)


def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=TOKEN_IDS, use_cache=False).logits


def publish(model: PreTrainedModel) -> dict[str, Tensor]:
    return published_weights(model, world=World(), dtype=torch.float32)


def test_only_adapters_are_trained_and_their_product_starts_at_zero() -> None:
    model = adapted()
    assert torch.equal(logits(model), logits(tiny_model()))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * len(CONFIG.targets)
    assert all(".lora_" in name for name in trained)


def test_published_weights_have_the_base_model_names_and_the_adapted_logits() -> None:
    model, base = adapted(), tiny_model()
    train(model, build_optimizer(model, OptimizerConfig()), num_steps=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    published = publish(model)
    assert list(published) == list(publish(base))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    wanted = logits(model)
    base.load_state_dict(published, strict=False)
    base.tie_weights()
    assert float((wanted - logits(tiny_model())).detach().abs().max()) > 0.1
    torch.testing.assert_close(logits(base), wanted, rtol=1e-5, atol=1e-5)
    name = "model.layers.1.mlp.down_proj"
    product = before[f"{name}.lora_B.default.weight"] @ before[f"{name}.lora_A.default.weight"]
    torch.testing.assert_close(published[f"{name}.weight"], before[f"{name}.base_layer.weight"] + 1.5 * product)


def test_a_checkpoint_holds_adapters_for_training_and_merged_weights_for_serving(tmp_path: Path) -> None:
    model = adapted()
    optimizer = build_optimizer(model, OptimizerConfig())
    train(model, optimizer, num_steps=2)
    folder = save_checkpoint(
        tmp_path,
        policy=Policy(model=model, tokenizer_files=()),
        optimizer=optimizer,
        progress=TrainingProgress(2),
        keep=1,
    )
    (file,) = (folder / "training").iterdir()
    with safe_open(file, framework="pt") as tensors:
        assert all(".lora_" in name or name.startswith("rng/") for name in tensors.keys())  # noqa: SIM118 (not a dict)
    served = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(served), logits(model), rtol=1e-5, atol=1e-5)
    train(model, optimizer, num_steps=2)

    resumed = adapted(seed=2)
    optimizer = build_optimizer(resumed, OptimizerConfig())
    restore_checkpoint(folder, policy=Policy(model=resumed, tokenizer_files=()), optimizer=optimizer)
    train(resumed, optimizer, num_steps=2)
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "norm", "key_proj"])
def test_a_target_that_is_no_linear_layer_of_the_decoder_is_refused(target: str) -> None:
    with pytest.raises(ConfigError, match=rf"learner\.lora\.targets .*got '{target}'"):
        add_adapters(tiny_model(), LoraConfig(targets=("q_proj", target)))
