"""Fine-tuning on demonstrations, the induction initialisation, and the toy task's initial policy."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from learner.warmstart.induction_init import distinct_batch, induction_pretrain, repeated_batch, wire_induction
from learner.warmstart.recipe import OPTIMIZER, build_toy_model, warm_start
from learner.warmstart.sft import Demonstrations, padded, permuted, supervised_finetune
from protocol.errors import ConfigError, DataError


def demonstrations(contexts: list[list[int]], masks: list[list[bool]]) -> Demonstrations:
    return Demonstrations(
        token_ids=np.concatenate(contexts).astype(np.int32),
        loss_mask=np.concatenate(masks).astype(np.bool_),
        offsets=np.cumsum([0, *map(len, contexts)]).astype(np.int64),
    )


def model(seed: int = 0):
    return build_toy_model(vocab_size=98, eos_token_id=1, pad_token_id=0, seed=seed)


def test_the_toy_model_has_113472_parameters_and_does_not_change_the_global_rng():
    before = torch.get_rng_state()
    made = model()
    assert sum(p.numel() for p in made.parameters()) == 113_472
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(made.model.embed_tokens.weight, model().model.embed_tokens.weight)


def test_padding_is_on_the_right_and_never_trained():
    examples = demonstrations([[5, 6, 7], [8, 9]], [[False, True, True], [False, True]])
    ids, mask = padded(examples, np.array([1, 0]))
    assert ids.tolist() == [[8, 9, 0], [5, 6, 7]]
    assert mask.tolist() == [[False, True, False], [False, True, True]]


def test_padding_and_neighbours_do_not_change_the_loss():
    contexts = [list(range(10, 30)), [40, 41, 42, 43]]
    masks = [[k % 2 == 1 for k in range(20)], [False, True, True, False]]
    examples = demonstrations(contexts, masks)
    frozen = OPTIMIZER.model_copy(update={"learning_rate": 0.0})
    together = supervised_finetune(model(), examples, steps=1, optimizer=frozen, seed=0)
    total, count = 0.0, 0
    plain = model()
    for context, mask in zip(contexts, masks, strict=True):
        logprobs = plain(torch.tensor([context])).logits[0].log_softmax(-1)
        for at in range(1, len(context)):
            if mask[at]:
                total, count = total - float(logprobs[at - 1, context[at]].detach()), count + 1
    assert together == pytest.approx(total / count, abs=1e-5)


def test_permuted_is_a_bijection_of_the_range_only():
    ids = np.tile(np.arange(30), (4, 1))
    mixed = permuted(ids, range(10, 20), np.random.default_rng(0))
    assert (mixed[:, :10] == ids[:, :10]).all()
    assert (mixed[:, 20:] == ids[:, 20:]).all()
    assert all(sorted(row) == list(range(10, 20)) for row in mixed[:, 10:20].tolist())
    assert len({tuple(row) for row in mixed.tolist()}) == 4


def test_a_permutation_beyond_the_vocabulary_is_refused():
    examples = demonstrations([[5, 6]], [[False, True]])
    with pytest.raises(ConfigError, match="98 ids"):
        supervised_finetune(model(), examples, steps=1, optimizer=OPTIMIZER, permute=range(90, 99), seed=0)


@pytest.mark.parametrize("make", [distinct_batch, repeated_batch])
def test_each_trained_symbol_repeats_an_earlier_pair_of_symbols(make):
    ids, mask = make(range(9, 83), batch_size=16, rng=np.random.default_rng(0))
    assert mask.any(axis=1).all()
    for row, marked in zip(ids.tolist(), mask.tolist(), strict=True):
        for at in (k for k, m in enumerate(marked) if m):
            assert (row[at - 1], row[at]) in set(pairwise(row[:at]))


def test_the_initialised_heads_attend_one_position_back():
    made = model()
    wire_induction(made, seed=0)
    made.set_attn_implementation("eager")
    ids = torch.randint(9, 83, (1, 40), generator=torch.Generator().manual_seed(0))
    weights = made(ids, output_attentions=True).attentions[0][0, :2]
    assert (weights[:, 1:].argmax(-1) == torch.arange(39)).float().mean() > 0.95


def test_copying_is_learned_within_the_step_limit():
    made = model(seed=1)
    wire_induction(made, seed=1)
    steps: list[int] = []
    loss = induction_pretrain(
        made,
        symbols=range(9, 83),
        repeated_steps=0,
        optimizer=OPTIMIZER,
        seed=1,
        on_progress=lambda phase, step, loss: steps.append(step),
    )
    assert loss < 0.1
    assert len(steps) < 290


def test_fine_tuning_learns_only_tokens_with_loss_mask():
    examples = demonstrations([[5, 6, 7, 8]] * 8, [[False, True, False, False]] * 8)
    made = model()
    loss = supervised_finetune(
        made, examples, steps=40, optimizer=OPTIMIZER.model_copy(update={"warmup_steps": 5}), seed=0
    )
    probabilities = made(torch.tensor([[5, 6, 7]])).logits[0].softmax(-1)
    assert loss < 1.5
    assert probabilities[0, 6] > 0.9
    assert probabilities[2, 8] < 0.1


def tokenizer_folder(folder: Path, *, size: int = 98) -> Path:
    tokenizer = Tokenizer(models.WordLevel({f"w{k}": k for k in range(size)}, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken("w0"), AddedToken("w1")])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "w0", "eos_token": "w1", "unk_token": "w2"}'
    )
    return folder


def write(path: Path, examples: Demonstrations, metadata: dict[str, str] | None) -> Path:
    arrays = {"token_ids": examples.token_ids, "loss_mask": examples.loss_mask, "offsets": examples.offsets}
    save_file(arrays, path, metadata=metadata)
    return path


RANGES = {"symbols": "9:83", "permutable": "23:83"}


def test_the_warm_start_folder_loads_with_its_tokenizer(tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    examples = demonstrations([[3, 30, 31, 30, 31, 1]] * 40, [[False, False, False, True, True, True]] * 40)
    phases: set[str] = set()
    warm_start(
        tmp_path / "model",
        demonstrations=write(tmp_path / "d.safetensors", examples, RANGES),
        tokenizer_dir=tokenizer_folder(tmp_path / "tokenizer"),
        seed=0,
        repeated_steps=2,
        imitation_steps=2,
        on_progress=lambda phase, step, loss: phases.add(phase),
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (loaded.config.eos_token_id, loaded.config.vocab_size, loaded.dtype) == (1, 98, torch.float32)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) == 98
    assert phases == {"copying", "imitation"}


def test_unusable_inputs_are_refused_by_name(tmp_path: Path):
    examples = demonstrations([[3, 30, 31]], [[False, False, True]])
    tokenizer = tokenizer_folder(tmp_path / "tokenizer", size=20)

    def start(path: Path, tokenizer_dir: Path) -> None:
        warm_start(tmp_path / "model", demonstrations=path, tokenizer_dir=tokenizer_dir, seed=0)

    with pytest.raises(DataError, match=r"absent\.safetensors"):
        start(tmp_path / "absent.safetensors", tokenizer)
    with pytest.raises(DataError, match="below the 20"):
        start(write(tmp_path / "a.safetensors", examples, RANGES), tokenizer)
    with pytest.raises(DataError, match="symbols"):
        start(write(tmp_path / "b.safetensors", examples, None), tokenizer)
    with pytest.raises(DataError, match="tokenizer"):
        start(tmp_path / "a.safetensors", tmp_path / "nowhere")
    broken = replace(examples, offsets=np.array([0, 2], dtype=np.int64))
    with pytest.raises(DataError, match="offsets"):
        Demonstrations.load(write(tmp_path / "c.safetensors", broken, None))
