"""transformers' models and ours, tiny and random: the same losses and gradients, and what their outputs have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastssl

pytestmark = pytest.mark.xdist_group("transformers")  # one process imports it, which takes seconds

WORDS, LENGTH, BATCH = 97, 11, 3
TRUNK = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
TEXT = {**TRUNK, "vocab_size": WORDS, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
IMAGE = {**TRUNK, "image_size": 32, "patch_size": 8}
MAE = {f"decoder_{name}": value for name, value in TRUNK.items()}
SPEECH = {
    "conv_dim": (16, 16), "conv_stride": (4, 3), "conv_kernel": (8, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "codevector_dim": 16, "proj_codevector_dim": 12,
    "num_codevectors_per_group": 2, "num_negatives": 7, "mask_time_length": 2,
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "BertForMaskedLM": ("BertConfig", TEXT),
    "CLIPModel": ("CLIPConfig", {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 16}),
    "GPT2LMHeadModel": ("GPT2Config", {**TEXT, "n_positions": LENGTH}),
    "LlamaForCausalLM": ("LlamaConfig", {**TEXT, "tie_word_embeddings": True}),
    "MistralForCausalLM": ("MistralConfig", {**TEXT, "num_key_value_heads": 2}),
    "Qwen2ForCausalLM": ("Qwen2Config", {**TEXT, "num_key_value_heads": 2}),
    "Qwen3ForCausalLM": ("Qwen3Config", {**TEXT, "num_key_value_heads": 2, "head_dim": 8}),
    "RobertaForMaskedLM": ("RobertaConfig", TEXT),
    "SiglipModel": (
        "SiglipConfig",
        {"text_config": {**TEXT, "max_position_embeddings": LENGTH}, "vision_config": IMAGE},
    ),
    "ViTMAEForPreTraining": ("ViTMAEConfig", {**IMAGE, **MAE}),
    "Wav2Vec2ForPreTraining": ("Wav2Vec2Config", {**TRUNK, **SPEECH}),
}
LANGUAGE = sorted(name for name in CONFIGS if "LM" in name)


@pytest.fixture(scope="module")
def models(transformers) -> Callable[..., list[nn.Module]]:
    """Of a name: theirs, and ours with the same weights."""
    from fastssl.integrations import transformers as ours

    def make(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> list[nn.Module]:
        config, arguments = CONFIGS[name]
        torch.manual_seed(0)
        pair = [getattr(m, name)(getattr(transformers, config)(**arguments, **options)) for m in (transformers, ours)]
        for parameter in pair[0].parameters():  # no zeros, of which some are positions and biases
            parameter.data += 0.1 * torch.randn_like(parameter)
        pair[1].load_state_dict(pair[0].state_dict())
        return [model.to(dtype) for model in pair]

    assert sorted(ours.__all__) == sorted(CONFIGS)
    return make


def _inputs(model: nn.Module, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """What a training step gives to a model."""
    torch.manual_seed(1)
    words = torch.randint(1, WORDS, (BATCH, LENGTH))
    images = torch.randn(BATCH, 3, 32, 32, dtype=dtype)
    name = type(model).__name__
    if name in LANGUAGE:
        return {"input_ids": words, "labels": words.masked_fill(torch.rand(words.shape) < 0.3, -100)}
    if name == "ViTMAEForPreTraining":
        return {"pixel_values": images}
    if name == "Wav2Vec2ForPreTraining":
        steps = int(model._get_feat_extract_output_lengths(900))
        negatives = torch.randint(steps, (2, steps, 7)) + torch.tensor([0, steps]).view(2, 1, 1)
        masked = torch.rand(2, steps) < 0.4
        return {
            "input_values": torch.randn(2, 900, dtype=dtype),
            "mask_time_indices": masked,
            "sampled_negative_indices": negatives,
        }
    return {"input_ids": words, "pixel_values": images, "return_loss": True}


def _step(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(2)  # dropout, masks, codes
    model.zero_grad()
    output = model(**inputs)
    output[0].backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _assert_agree(
    first: tuple[Any, dict[str, Tensor]], second: tuple[Any, dict[str, Tensor]], rtol: float = 1e-6
) -> None:
    (output, gradients), (expected, expected_gradients) = first, second
    torch.testing.assert_close(output[0], expected[0], rtol=rtol, atol=0, check_dtype=False)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(float(g.abs().max()) for g in expected_gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=rtol, atol=rtol * largest, msg=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_same_loss_and_gradients(name, models):
    """Of a training step; after eval() the same output, field by field; and what a tuple has."""
    theirs, ours = models(name)
    inputs = _inputs(theirs)
    for model in (theirs.train(), ours.train()):
        for part in model.modules():
            part.training = part.training and not isinstance(part, nn.Dropout)
    expected, result = _step(theirs, inputs), _step(ours, inputs)
    _assert_agree(result, expected)
    missing = set(expected[0]) - set(result[0])
    assert missing == ({"logits"} if name in LANGUAGE else {"logits_per_image", "logits_per_text"} & set(expected[0]))
    for field in set(result[0]) & {"mask", "ids_restore", "projected_states", "text_embeds", "contrastive_loss"}:
        torch.testing.assert_close(result[0][field], expected[0][field], rtol=1e-6, atol=1e-9, check_dtype=False)

    torch.manual_seed(2)
    loss, *_ = ours(**inputs, return_dict=False)
    assert torch.equal(loss, result[0][0])

    outputs = []
    for model in (theirs.eval(), ours.eval()):
        torch.manual_seed(2)
        outputs.append(model(**inputs))
    assert list(outputs[0]) == list(outputs[1])
    torch.testing.assert_close(outputs[1][0], outputs[0][0], rtol=1e-6, atol=0, check_dtype=False)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "GPT2LMHeadModel"])
def test_language_models_options(name, models, transformers):
    """Gradient accumulation, labels that are shifted already, and 16 bits; and where logits are made after all."""
    theirs, ours = (model.train() for model in models(name, attn_implementation="eager"))
    inputs = _inputs(theirs)
    shifted = {"shift_labels": inputs["labels"].roll(-1, 1)}
    for extra in (
        {"num_items_in_batch": torch.tensor(50)},
        {"num_items_in_batch": 50, **shifted},
        {"use_cache": False},
    ):
        if name == "BertForMaskedLM" and "shift_labels" in extra:
            continue
        _assert_agree(_step(ours, {**inputs, **extra}), _step(theirs, {**inputs, **extra}))
    positional = ours(inputs["input_ids"], labels=inputs["labels"])
    assert positional.logits is None and ours(inputs["input_ids"]).logits is not None

    half = [model.train().to(torch.bfloat16) for model in models(name)]
    (result, _), (expected, _) = (_step(model, inputs) for model in (half[1], half[0]))
    assert result.loss.dtype == torch.float32
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-2, atol=0, check_dtype=False)

    head = ours.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, output: output * 2)
    assert ours(**inputs).logits is not None
    hook.remove()
    if name == "GPT2LMHeadModel":
        ours.loss_function = lambda logits, labels, **kwargs: F.cross_entropy(logits[0], labels[0]) * 0 + 7
        assert ours(**inputs).loss == 7
    with pytest.raises(TypeError):
        ours(inputs["input_ids"], input_ids=inputs["input_ids"], labels=inputs["labels"])


def test_equal_negatives_are_none(models):
    """With four codes many of the negatives are the positive itself: they are found without being read."""
    from fastssl.integrations import transformers as ours

    theirs, model = (m.eval() for m in models("Wav2Vec2ForPreTraining"))
    inputs = _inputs(theirs)
    rows = theirs(**inputs).projected_quantized_states.flatten(0, 1)
    ids = inputs["sampled_negative_indices"].flatten(0, 1)
    equal = (rows[ids] == rows.unsqueeze(1)).all(-1)
    assert 0.05 < equal.double().mean() < 0.95
    assert torch.equal(ours._equal_rows(rows, ids), equal)
    _assert_agree(_step(model, inputs), _step(theirs, inputs))
    zeros = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [0.0, -1.0]])
    assert ours._equal_rows(zeros, torch.tensor([[1, 2], [0, 2], [0, 1]])).tolist() == [[True, False]] * 2 + [
        [False] * 2
    ]


def test_patch(models, transformers):
    """A model that exists has the fused loss at once, and the original's afterwards."""
    theirs, _ = models("GPT2LMHeadModel")
    inputs, original = _inputs(theirs), type(theirs).forward
    with fastssl.patch("transformers"):
        assert theirs.train()(**inputs).logits is None
        assert transformers.AutoModelForCausalLM.from_config(theirs.config).train()(**inputs).logits is None
    assert type(theirs).forward is original and theirs(**inputs).logits is not None
