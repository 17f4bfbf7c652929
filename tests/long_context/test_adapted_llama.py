from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ds_offload.adapter import change_config, merge_adapter
from ds_offload.errors import InputError
from long_context.adapted_llama import AdaptedLlama, AdapterShape
from long_context.adapter_files import CONFIG, WEIGHTS, save_adapter, scale_adapter

SIZES = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "head_dim": 8}
SHAPE = AdapterShape(attention_rank=4, mlp_rank=2, rope_theta=5e5, max_positions=256)


def llama(theta: float = SHAPE.rope_theta) -> LlamaForCausalLM:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 97}
    rope = {"rope_theta": theta, "rope_type": "default"}
    return LlamaForCausalLM(LlamaConfig(**SIZES, **heads, rope_parameters=rope, max_position_embeddings=256)).eval()


def adapted(model: LlamaForCausalLM) -> AdaptedLlama:
    """With an adapter that changes something."""
    made = AdaptedLlama.from_model(model, SHAPE, torch.float32)
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in made.up.values():
            weight.copy_(torch.randn(weight.shape, generator=chance) / 20)
        for weight in made.norms.values():
            weight.mul_(1 + torch.randn(weight.shape, generator=chance) / 10)
    return made


def inputs(length: int = 33) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sequences; the positions of the second leave a gap."""
    ids = torch.randint(97, (2, length), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(length).repeat(2, 1)
    positions[1, 10:] += 100
    return ids, positions


def test_a_new_adapter_changes_nothing() -> None:
    model = llama()
    ids, positions = inputs()
    made = AdaptedLlama.from_model(model, SHAPE, torch.float32)
    logits = made.hidden(ids, positions) @ made.embedding.T
    torch.testing.assert_close(logits, model(ids, position_ids=positions).logits, rtol=1e-5, atol=1e-5)


def test_the_files_give_peft_the_same_logits(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    model = llama()
    made = adapted(model)
    save_adapter(made, tmp_path, "base")
    assert (tmp_path / CONFIG).is_file()
    loaded = peft.PeftModel.from_pretrained(model, tmp_path)
    ids, positions = inputs()
    logits = made.hidden(ids, positions) @ made.embedding.T
    # The file is in 16 bits.
    torch.testing.assert_close(loaded(ids, position_ids=positions).logits, logits, rtol=1e-3, atol=1e-3)
    merged = dict(loaded.merge_and_unload().named_parameters())["model.layers.1.mlp.down_proj.weight"]
    torch.testing.assert_close(merged, made.merged("down_proj")[1], rtol=1e-3, atol=1e-4)


def gradients(made: AdaptedLlama) -> tuple[float, list[torch.Tensor]]:
    ids, positions = inputs()
    hidden = made.hidden(ids, positions).flatten(0, 1)[:-1]
    loss, _, _ = made.losses(hidden, ids.flatten()[1:], torch.full((len(hidden),), 1 / len(hidden)))
    return loss.item(), list(torch.autograd.grad(loss, list(made.parameters().values())))


def test_gradients_are_those_of_separate_products() -> None:
    made = adapted(llama())
    _, found = gradients(made)
    # B A x as a product of its own, through autograd alone.
    weight = made.down["v_proj"], made.up["v_proj"]
    down, up = (part.detach().clone().requires_grad_() for part in weight)
    made.down["v_proj"], made.up["v_proj"] = down, up
    made.merged = lambda kind: (
        made.base[kind]
        + sum(  # type: ignore[method-assign]
            made.up[kind][:, :, r, None] * made.down[kind][:, r, None] for r in range(SHAPE.rank(kind))
        )
    )
    _, expected = gradients(made)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_what_is_computed_again_has_the_same_gradients() -> None:
    made = adapted(llama())
    loss, found = gradients(made)
    made.checkpoint_from = 1
    again, expected = gradients(made)
    assert again == pytest.approx(loss, abs=1e-6)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("rows", [1, 7, 4096])
def test_losses_in_pieces_are_those_of_all_logits(monkeypatch, rows: int) -> None:
    monkeypatch.setattr("long_context.adapted_llama.LOGIT_ROWS", rows)
    made = AdaptedLlama.from_model(llama(), SHAPE, torch.float32)
    hidden, targets, weights = torch.randn(20, 48), torch.randint(97, (20,)), torch.rand(20)
    total, losses, right = made.losses(hidden, targets, weights)
    logits = hidden @ made.embedding.T
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(total, (expected * weights).sum())
    assert torch.equal(right, logits.argmax(-1) == targets)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_bfloat16_on_a_gpu_follows_float32_on_a_cpu(compiled: bool) -> None:
    from long_context.attention_kernels import fastest_attention

    model = llama()
    expected, reference = gradients(adapted(model))
    made = adapted(model)
    device = torch.device("cuda")
    # Head dim 8 is the least that the kernels take.
    for group in (made.base, made.down, made.up, made.norms):
        for name, weight in group.items():
            group[name] = weight.detach().to(device).requires_grad_(weight.requires_grad)
    made.embedding, made.dtype = made.embedding.to(device, torch.bfloat16), torch.bfloat16
    made.attention = fastest_attention(6, 8, device)
    if compiled:
        made.compile()
    ids, positions = (part.to(device) for part in inputs())
    hidden = made.hidden(ids, positions).flatten(0, 1)[:-1]
    weights = torch.full((len(hidden),), 1 / len(hidden), device=device)
    loss, _, _ = made.losses(hidden, ids.flatten()[1:], weights)
    assert loss.item() == pytest.approx(expected, abs=0.02)
    found = torch.autograd.grad(loss, list(made.parameters().values()))
    for one, other in zip(found, reference, strict=True):
        assert (one.cpu() - other).norm() < 0.1 * other.norm()


def test_a_merged_model_is_the_adapted_one(tmp_path) -> None:
    made = adapted(llama())
    model = llama(theta=1e4)
    # Its matrices are written in 16 bits.
    save_adapter(made, tmp_path / "adapter", "base")
    change_config(model.config, tmp_path / "adapter")
    merge_adapter(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.max_position_embeddings == SHAPE.max_positions
    ids, positions = inputs()
    logits = made.hidden(ids, positions) @ made.embedding.T
    error = loaded(ids, position_ids=positions).logits - logits
    assert error.norm() < 1e-3 * logits.norm()


@pytest.mark.parametrize("share", [0.0, 0.75, 1.0])
def test_a_scaled_adapter_lies_between_the_base_model_and_the_adapted_one(tmp_path, share: float) -> None:
    base = llama()
    save_adapter(adapted(llama()), tmp_path / "whole", "base")
    scale_adapter(tmp_path / "whole", tmp_path / "scaled", base, share)
    whole, scaled = llama(), llama()
    merge_adapter(whole, tmp_path / "whole")
    merge_adapter(scaled, tmp_path / "scaled")
    config = scaled.config
    change_config(config, tmp_path / "scaled")
    assert config.max_position_embeddings == SHAPE.max_positions
    others = dict(whole.named_parameters()), dict(base.named_parameters())
    for name, weight in scaled.named_parameters():
        expected = torch.lerp(others[1][name], others[0][name], share)
        torch.testing.assert_close(weight, expected, atol=1e-4, rtol=1e-3)


def test_a_share_or_folder_that_makes_no_adapter_is_refused_and_writes_nothing(tmp_path) -> None:
    base = llama()
    save_adapter(adapted(llama()), tmp_path / "whole", "base")
    with pytest.raises(InputError, match=r"a share of 1.5: give one from 0"):
        scale_adapter(tmp_path / "whole", tmp_path / "scaled", base, 1.5)
    with pytest.raises(InputError, match="holds no adapter of this model"):
        scale_adapter(tmp_path, tmp_path / "scaled", base, 0.5)
    (tmp_path / "whole" / WEIGHTS).write_bytes(b"cut short")
    with pytest.raises(InputError, match="holds no adapter of this model"):
        scale_adapter(tmp_path / "whole", tmp_path / "scaled", base, 0.5)
    assert not (tmp_path / "scaled").exists()
