"""OpenUni behind our convention: stock SANA, seen through the released connector."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from tests.pipelines.openuni import released as tensors_of
from twinflow_train.batch import Condition
from twinflow_train.engines.recompute import recompute_every
from twinflow_train.errors import UserError
from twinflow_train.flow.path import interpolate, jump
from twinflow_train.models.joined import TorchWeights, load_tensors
from twinflow_train.models.openuni import NOT_TRAINED, OpenUni, OpenUniNet
from twinflow_train.models.sana import Sana
from twinflow_train.models.two_times import TargetTime
from twinflow_train.models.weights import Weights

SMALL = OpenUni(
    layers=2, heads=2, head_dim=8, cross_heads=2, channels=4, text_width=12, caption_width=10,
    connector_layers=2, connector_heads=3, connector_hidden=20,
)  # fmt: skip
CONNECTOR = 6 * (4 * (1536**2 + 1536) + 4 * 1536 + 2 * 1536 * 8960 + 8960 + 1536)
PROJECTOR = 1536 * 2304 + 2304


def released(size: OpenUni = SMALL, **more: Tensor) -> dict[str, Tensor]:
    return tensors_of(size, queries=4) | more


def filled(weights: Weights, size: OpenUni = SMALL) -> OpenUniNet:
    net = size.build().to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            shape = parameter.shape
            parameter.copy_(weights.read(net.stored_name(name), shape, 0, shape[0]))
    return net


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("released") / "openuni.pth"
    torch.save(released(), path)
    return path


@pytest.fixture(scope="module")
def stock() -> SanaTransformer2DModel:
    """The stock SANA with the checkpoint's weights."""
    sana = SanaTransformer2DModel(**SMALL.stock_arguments())
    own = {k.removeprefix("transformer."): v for k, v in released().items() if k[0] == "t"}
    sana.load_state_dict(own)
    return sana.eval()


@pytest.fixture(scope="module")
def net(checkpoint: Path) -> OpenUniNet:
    """Our network with the checkpoint's weights and a second embedder of its own."""
    net = filled(SMALL.stored_weights(checkpoint))
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.stock.transformer.time_embed.embed_r.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draws))
    return net


def states(*lengths: int, seed: int = 0) -> Condition:
    draws = torch.Generator().manual_seed(seed)
    return Condition.pad([torch.randn(n, SMALL.text_width, generator=draws) for n in lengths])


def latents(rows: int, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(rows, SMALL.channels, 4, 6, generator=draws)


def connect(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Do what the released connector and projector do, written from their description."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return layer_norm(x, x.shape[-1:], scale, shift, 1e-6)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (SMALL.connector_heads, -1)).transpose(1, 2)

    for n in range(SMALL.connector_layers):
        layer = f"connector.layers.{n}"
        inner = norm(x, f"{layer}.layer_norm1")
        q, k, v = (heads(linear(inner, f"{layer}.self_attn.{one}_proj")) for one in "qkv")
        weight = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        attended = (weight @ v).transpose(1, 2).flatten(-2)
        x = x + linear(attended, f"{layer}.self_attn.out_proj")
        inner = linear(norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1")
        x = x + linear(gelu(inner, approximate="tanh"), f"{layer}.mlp.fc2")
    return linear(x, "projector")


@torch.no_grad()
def test_connector_and_projector_are_the_released_ones(net: OpenUniNet) -> None:
    x = states(5, 5).tokens
    expected = connect({k: v.double() for k, v in released().items()}, x.double())
    torch.testing.assert_close(net.stock.captions(x, None).double(), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_at_r_equal_t_it_is_stock_sana_on_what_the_connector_gives_bit_for_bit(
    net: OpenUniNet, stock: SanaTransformer2DModel
) -> None:
    x, t, cond = latents(4), torch.tensor([1.0, 0.123456789, 0.5, 0.0]), states(5, 5, 5, 5)
    theirs = stock(
        hidden_states=x,
        encoder_hidden_states=net.stock.captions(cond.tokens, None),
        timestep=1000 * t,
        return_dict=False,
    )[0]
    assert torch.equal(net(x, t, t, cond), theirs)


@torch.no_grad()
def test_one_euler_step_is_the_stock_schedulers(
    net: OpenUniNet, stock: SanaTransformer2DModel
) -> None:
    data, noise, cond = latents(2, 3), latents(2, 4), states(5, 5)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[0.9, 0.4])
    x = scheduler.scale_noise(data, scheduler.timesteps[:1], noise)
    velocity = stock(
        hidden_states=x,
        encoder_hidden_states=net.stock.captions(cond.tokens, None),
        timestep=scheduler.timesteps[:1].expand(2),
        return_dict=False,
    )[0]
    theirs = scheduler.step(velocity, scheduler.timesteps[0], x, return_dict=False)[0]
    now, then = torch.full((2,), 0.9), torch.full((2,), 0.4)
    ours = interpolate(data, noise, now)
    ours = jump(ours, net(ours, now, now, cond), now, then)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert float((ours - x).abs().max()) > 0.1


@torch.no_grad()
def test_both_times_the_sign_and_the_states_matter(net: OpenUniNet) -> None:
    x, t, cond = latents(3), torch.tensor([1.0, 0.8, 0.5]), states(5, 5, 5)
    one = net(x, t, 0 * t, cond)
    for other in (
        net(x, t, t, cond),
        net(x, t, t / 2, cond),
        net(x, t, 0 * t, states(5, 5, 5, seed=2)),
    ):
        assert ((one - other).abs().flatten(1).max(1).values > 1e-4).all()
    real, fake = net(x, t, t, cond), net(x, -t, -t, cond)
    assert ((real - fake).abs().flatten(1).max(1).values > 1e-4).all()


@torch.no_grad()
def test_padding_and_company_do_not_change_a_sample(net: OpenUniNet) -> None:
    x, cond = latents(3), states(3, 1, 5)
    t, r = torch.tensor([1.0, 0.9, -0.6]), torch.tensor([0.0, 0.9, -0.6])
    longer = cond.padded(8)
    mask = longer.full_mask()
    garbage = replace(longer, tokens=torch.where(mask[..., None], longer.tokens, 50.0))
    together = net(x, t, r, cond)
    torch.testing.assert_close(net(x, t, r, garbage), together, rtol=0, atol=1e-5)
    for i, length in enumerate((3, 1, 5)):
        row = slice(i, i + 1)
        alone = net(x[row], t[row], r[row], Condition(tokens=cond.tokens[row, :length]))
        torch.testing.assert_close(alone, together[row], rtol=0, atol=1e-5)


@torch.no_grad()
def test_bfloat16_tells_times_apart_that_bfloat16_cannot(net: OpenUniNet, checkpoint: Path) -> None:
    half = filled(SMALL.stored_weights(checkpoint)).bfloat16()
    x, cond, t = latents(2), states(5, 5), torch.tensor([0.751, -0.5025])
    near = t + 2e-4
    assert torch.equal(t.bfloat16(), near.bfloat16())  # or this test says nothing
    here = half(x, t, t, cond)
    assert here.dtype == torch.float32
    assert not torch.equal(here, half(x, near, near, cond))
    assert float((here - net(x, t, t, cond)).abs().max()) < 0.1 * float(here.abs().max())


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_not_frozen_learns(checkpoint: Path, frozen: bool) -> None:
    size = replace(SMALL, freeze_connector=frozen)
    net = filled(size.stored_weights(checkpoint), size)
    t = torch.tensor([0.9, 0.5])
    net(latents(2), t, t / 2, states(5, 5)).square().sum().backward()
    got = {name for name, p in net.named_parameters() if p.grad is not None}
    assert got == {name for name, p in net.named_parameters() if p.requires_grad}
    still = {n.split(".")[1] for n, p in net.named_parameters() if not p.requires_grad}
    assert still == ({"connector", "projector"} if frozen else set())


@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_blocks_give_the_same_gradients(checkpoint: Path, every: int) -> None:
    t = torch.tensor([0.9, 0.5])
    found: list[list[Tensor]] = []
    calls: list[int] = []
    for recompute in (False, True):
        net = filled(SMALL.stored_weights(checkpoint))
        if recompute:
            caller = recompute_every(every, len(net.blocks))

            def counted(block: Any, *inputs: Any, caller: Any = caller) -> object:
                calls.append(len(inputs))
                return caller(block, *inputs)

            net.recompute(counted)
            with torch.no_grad():
                net(latents(2), t, t / 2, states(5, 5))
            assert not calls
        net(latents(2), t, t / 2, states(5, 5)).square().sum().backward()
        found.append([p.grad for p in net.parameters() if p.grad is not None])
    assert len(calls) == len(SMALL.build().blocks) == 4
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_every_parameter_is_named_as_in_the_released_checkpoint(net: OpenUniNet) -> None:
    names = set(net.stored_names().values())
    second = {name for name in names if name.startswith("transformer.time_embed_2.")}
    assert names - second == released().keys() - {"meta_queries"}
    assert {name.replace("_2.", ".", 1) for name in second} == {
        name for name in names if name.startswith("transformer.time_embed.")
    }


def test_the_released_size_builds_on_meta() -> None:
    parameters = {n: p.numel() for n, p in OpenUni().build().named_parameters()}
    sana = sum(p.numel() for p in Sana().build().parameters())
    own = {
        part: sum(many for name, many in parameters.items() if name.startswith(f"stock.{part}."))
        for part in ("transformer", "connector", "projector")
    }
    assert own == {"transformer": sana, "connector": CONNECTOR, "projector": PROJECTOR}


def test_weights_that_were_saved_are_read_again(net: OpenUniNet, tmp_path: Path) -> None:
    named = [(net.stored_name(name), p.detach()) for name, p in net.named_parameters()]
    for order in (named, sorted(named, key=lambda one: one[0])):
        SMALL.save(tmp_path / "export", iter(order))
        again = filled(SMALL.stored_weights(tmp_path / "export"))
        for one, other in zip(net.parameters(), again.parameters(), strict=True):
            assert torch.equal(one, other)
    stock = SanaTransformer2DModel.from_pretrained(tmp_path / "export" / "transformer")
    assert torch.equal(stock.proj_out.weight, net.stock.transformer.proj_out.weight)


# What is refused


def test_a_checkpoint_that_lacks_or_exceeds_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"

    def refused(tensors: Any, match: str) -> None:
        torch.save(tensors, path)
        with pytest.raises(UserError, match=match):
            filled(SMALL.stored_weights(path))

    whole = released()
    cut = {key: value for key, value in whole.items() if key != "connector.layers.1.mlp.fc1.bias"}
    refused(cut, r"lacks 1 of \d+ tensors: connector\.layers\.1\.mlp\.fc1\.bias")
    no_sana = {key: value for key, value in whole.items() if not key.startswith("transformer.")}
    refused(no_sana, r"lacks \d+ of \d+ tensors: transformer\.")
    refused(released(other=torch.ones(1)), r"1 tensors .* no place for: other")
    wide = replace(SMALL, connector_hidden=24)
    refused(released(wide), r"fc1.* shape \(24,\), .* wants \(20,\)|\(24, 12\).*wants \(20, 12\)")
    refused({"model": 3}, "does not hold tensors by their names")
    torch.save({"state_dict": whole | {"vae.x": torch.ones(1), "lmm.y": torch.ones(1)}}, path)
    filled(SMALL.stored_weights(path))


class Evil:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "executed")


def test_a_file_executes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"a": torch.ones(1), "b": Evil(tmp_path / "proof")}, path)
    with pytest.raises(UserError, match=r"evil\.pth cannot be read as tensors"):
        load_tensors(path)
    assert not (tmp_path / "proof").exists()
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as tensors"):
        load_tensors(path)
    with pytest.raises(UserError, match=r"none\.pth does not exist"):
        TorchWeights(tmp_path / "none.pth", names=[], others=NOT_TRAINED, fresh={})


def test_another_familys_folder_is_refused(net: OpenUniNet, tmp_path: Path) -> None:
    plain = Sana(layers=2, heads=2, head_dim=8, cross_heads=2, channels=4, text_width=10)
    SanaTransformer2DModel(**plain.stock_arguments()).save_pretrained(tmp_path / "transformer")
    with pytest.raises(UserError, match=r"connector does not exist"):
        SMALL.stored_weights(tmp_path)
    named = [(net.stored_name(name), p.detach()) for name, p in net.named_parameters()]
    SMALL.save(tmp_path, iter(named))
    with pytest.raises(UserError, match=r"num_hidden_layers is 2, the configuration's is 3"):
        replace(SMALL, connector_layers=3).stored_weights(tmp_path)
    with pytest.raises(UserError, match=r"caption_channels is 10, the configuration's is 12"):
        replace(SMALL, caption_width=12).stored_weights(tmp_path)
    with pytest.raises(UserError, match=r"caption_channels is 10, the configuration's is 12"):
        replace(plain, text_width=12).stored_weights(tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"connector_layers": 0}, "model.connector_layers must be at least 1, got 0"),
        ({"connector_heads": 5}, r"connector_heads = 5 must divide model.text_width = 12"),
        ({"caption_width": -1}, "model.caption_width must be at least 1, got -1"),
        ({"layers": 0}, "model.layers must be at least 1, got 0"),
    ],
)
def test_a_size_that_cannot_be_built_is_refused_by_key(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        replace(SMALL, **changes)


def test_data_that_does_not_fit_is_refused_with_both_numbers() -> None:
    SMALL.check((4, 4, 6), 12)
    with pytest.raises(UserError, match=r"model.text_width is 12, .* width 10"):
        SMALL.check((4, 4, 6), 10)
    with pytest.raises(UserError, match=r"model.channels is 4, the data has 16"):
        SMALL.check((16, 4, 6), 12)
    with pytest.raises(UserError, match=r"pooled embeddings of width 8"):
        SMALL.check((4, 4, 6), 12, pooled_width=8)


def test_a_shifted_network_has_no_second_embedder(checkpoint: Path) -> None:
    size = replace(SMALL, target_time=TargetTime.shift)
    net = filled(size.stored_weights(checkpoint), size)
    assert set(net.stored_names().values()) == released().keys() - {"meta_queries"}
    x, t, cond = latents(2), torch.tensor([0.8, 0.4]), states(5, 5)
    with torch.no_grad():
        assert torch.equal(net(x, t, t, cond), net(x, t / 2, 0 * t, cond))
