"""LoRA (Hu et al. 2021): one frozen network, and small trained ones that are part of it.

The student, its averages and the base are the same module. They differ in which adapter is added
to its linear layers, if any, and in which second time embedder it asks.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twinflow_train.batch import Condition, Times, Velocity
from twinflow_train.errors import UserError, check, listed
from twinflow_train.files import save_tensors, whole_file
from twinflow_train.models.adapter import BASE, Adapter, Assembly, Tensors
from twinflow_train.models.base import Model, VelocityNet
from twinflow_train.models.two_times import Embedded, TargetTime
from twinflow_train.models.weights import LORA_FILE, RandomWeights, Weights

PREFIX = "transformer."
"""What pipelines put before the names of a LoRA's tensors, to tell which part they are for."""

DOWN, UP = ".lora_A.weight", ".lora_B.weight"


@dataclass(kw_only=True)
class LoRA(Adapter):
    """Low-rank adapters on linear layers: W x becomes W x + alpha / rank B A x.

    A second time embedder (target_time=embedder) is trained in full beside them.

    rank: rows of A and columns of B. alpha: of the adapters' scale, alpha / rank.
    targets: the layers by the ends of their names in the stock class, such as to_q or to_out.0;
        empty takes the model family's.
    """

    partial: ClassVar[bool] = True

    rank: int = 64
    alpha: float = 64.0
    targets: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        rules = [("rank", self.rank >= 1, "at least 1"), ("alpha", self.alpha > 0, "positive")]
        check("adapter", self, rules)

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank

    def check(self, model: Model) -> None:
        """Refuse targets that are no linear layers of the model: UserError."""
        if not model.lora_targets:
            raise UserError(
                f"adapter=lora: there is none for {type(model).__name__}; choose adapter=none"
            )
        self._layers(model, model.build())

    def assemble(self, model: Model, beside: Sequence[str]) -> list[Assembly]:
        """Build the one module that is all the networks, and the base besides."""
        net, switch = model.build(), Switch()
        kinds = ("model", *(kind for kind in beside if kind != "frozen"))
        for own, linear in self._layers(model, net).items():
            adapted = LoraLinear(
                linear, rank=self.rank, scale=self.scale, kinds=kinds, switch=switch
            )
            net.set_submodule(own, adapted, strict=True)
        if not model.target_time.shifts:
            second = f"stock.{model.second.first}.embed_r"
            copies = Copies(net.get_submodule(second), kinds=kinds, switch=switch)
            net.set_submodule(second, copies, strict=True)
        owners = _owners(net)
        for own, parameter in net.named_parameters():
            if owners[own][0] != "model":
                parameter.requires_grad_(False)
        networks: dict[str, Velocity] = {"model": net, BASE: BaseView(net, switch)}
        networks |= {kind: View(net, switch, kind) for kind in kinds[1:]}
        if "frozen" in beside:
            shifted = model.target_time is TargetTime.shift_all
            networks["frozen"] = View(net, switch, None) if shifted else networks[BASE]
        return [Assembly(net=net, networks=networks, owners=owners)]

    def weights(self, base: Weights, *, seed: int) -> Weights:
        """Give the base's weights, and adapters that add nothing yet: B is zero."""
        return AdaptedWeights(base, RandomWeights(seed, _initial, {}))

    def save(self, folder: Path, model: Model, tensors: Tensors, *, dtype: torch.dtype) -> None:
        """Write the adapters as pipelines load them, and the second embedder, if any, beside it.

        B is multiplied by alpha / rank: so the file is right for every reader, also for those that
        know of no alpha, and take 1.
        """
        lora, rest = {}, {}
        for name, tensor in tensors:
            if name.endswith((DOWN, UP)):
                scaled = self.scale * tensor if name.endswith(UP) else tensor
                lora[PREFIX + name.removeprefix(PREFIX)] = scaled.to(dtype).contiguous()
            else:
                rest[name] = tensor.to(dtype).contiguous()
        files = {LORA_FILE: lora, _second_file(model): rest}
        for file, found in files.items():
            if found:
                with whole_file(folder / file) as unfinished:
                    save_tensors(found, unfinished, metadata={"format": "pt"})

    def contents(self, model: Model) -> str:
        """Begin a sentence on what `save` writes, up to its verb "hold"."""
        lora = f"`{LORA_FILE}`, a LoRA of rank {self.rank} for `load_lora_weights`,"
        if model.target_time.shifts:
            return f"Here is what it adds to its base: {lora} holds"
        second = f"and `{_second_file(model)}`, the embedder of the target time,"
        return f"Here is what it adds to its base: {lora} {second} hold"

    def merged(self, model: Model, base: Weights, tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights of the whole network, W + alpha / rank B A in float32 where adapted."""
        ours = dict(tensors)
        net = model.build()
        for own, name in net.stored_names().items():
            if name in ours:
                yield name, ours[name]
                continue
            shape = net.get_parameter(own).shape
            value = base.read(name, shape, 0, shape[0]).float()
            layer = name.removesuffix(".weight")
            if layer + DOWN in ours:
                value = value.addmm(ours[layer + UP], ours[layer + DOWN], alpha=self.scale)
            yield name, value

    def _layers(self, model: Model, net: VelocityNet) -> dict[str, nn.Linear]:
        """Find the layers to adapt, by their names in `net`.

        Those on which no output depends are left out: they would get no gradient.
        """
        wanted = list(self.targets) or list(model.lora_targets)
        found: dict[str, nn.Linear] = {}
        met: set[str] = set()
        for own, module in net.named_modules():
            name = net.stored_name(own)
            ends = [end for end in wanted if f".{name}".endswith(f".{end}")]
            if not ends or name.startswith(f"{model.second.name}."):
                continue
            if not isinstance(module, nn.Linear):
                inner = [n for n, m in module.named_modules(prefix=name) if type(m) is nn.Linear]
                raise UserError(
                    f"adapter.targets: {ends[0]} is {name}, a {type(module).__name__}, and only "
                    f"linear layers can be adapted; inside of it are: {listed(inner) or 'none'}"
                )
            if module.weight.requires_grad:
                met.update(ends)
                found[own] = module
        # The family's may all be such layers: a network of one block has no use for its text's.
        if unmet := [end for end in self.targets if end not in met]:
            raise UserError(
                f"adapter.targets: no layer that an output depends on is named {listed(unmet)}; "
                f"usual for this model are: {', '.join(model.lora_targets)}"
            )
        return found


class Switch:
    """Which network the module is at present; the student whenever no view is being asked.

    So the student is also what the backward pass finds when it computes blocks anew.
    """

    def __init__(self) -> None:
        self.kind: str | None = "model"

    @contextmanager
    def to(self, kind: str | None) -> Iterator[None]:
        """Be another network for a while; None is the base."""
        self.kind = kind
        try:
            yield
        finally:
            self.kind = "model"


class LoraLinear(nn.Module):
    """A frozen linear layer with an adapter for each kind of network.

    peft's own layer is not used: to choose an adapter there also changes which parameters want
    gradients, and sharded parameters cannot have that changed between passes.
    """

    def __init__(
        self, linear: nn.Linear, *, rank: int, scale: float, kinds: Sequence[str], switch: Switch
    ) -> None:
        super().__init__()
        self.base_layer = linear
        self.scale, self.kinds, self.switch = scale, kinds, switch
        with torch.device(linear.weight.device):
            self.lora_A = nn.ModuleDict(
                {kind: nn.Linear(linear.in_features, rank, bias=False) for kind in kinds}
            )
            self.lora_B = nn.ModuleDict(
                {kind: nn.Linear(rank, linear.out_features, bias=False) for kind in kinds}
            )

    @property
    def weight(self) -> Tensor:
        """The frozen weight: networks ask it for the type that they compute in."""
        return self.base_layer.weight

    def forward(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows out"]:
        """Apply the layer, and the adapter of the present network unless that is the base."""
        out: Tensor = self.base_layer(x)
        if (kind := self.switch.kind) is None:
            return out
        return out.add(self.lora_B[kind](self.lora_A[kind](x)), alpha=self.scale)


class Copies(nn.Module):
    """A module that is trained in full, with a copy for each kind of network.

    The base has none, and gets the student's: it is only asked where that is multiplied by zero.
    """

    def __init__(self, module: nn.Module, *, kinds: Sequence[str], switch: Switch) -> None:
        super().__init__()
        self.of = nn.ModuleDict({kind: copy.deepcopy(module) for kind in kinds})
        self.switch = switch

    def forward(self, *inputs: object, **named: object) -> Embedded:
        """Ask the present network's copy."""
        out: Embedded = self.of[self.switch.kind or "model"](*inputs, **named)
        return out


@dataclass(frozen=True, eq=False)
class View:
    """One of the networks that a module is; nobody differentiates what it says."""

    net: VelocityNet
    switch: Switch
    kind: str | None

    def __call__(
        self, x_t: Float[Tensor, "b *chw"], t: Times, r: Times, cond: Condition, /
    ) -> Float[Tensor, "b *chw"]:
        """Predict the velocity."""
        with self.switch.to(self.kind):
            out: Tensor = self.net(x_t, t, r, cond)
        return out


class BaseView(View):
    """The module without adapters and asked at t alone, whatever r is: the stock network."""

    def __init__(self, net: VelocityNet, switch: Switch) -> None:
        super().__init__(net, switch, None)

    def __call__(
        self, x_t: Float[Tensor, "b *chw"], t: Times, r: Times, cond: Condition, /
    ) -> Float[Tensor, "b *chw"]:
        """Predict the instantaneous velocity at t."""
        return super().__call__(x_t, t, 0 * t if self.net.target_time.shifts else t, cond)


def fingerprint(model: Model, base: Weights) -> str:
    """Hash each tensor's name, shape, type and first row: what tells one base from another.

    To read all of it would take minutes. How it is cut into files makes no difference.
    """
    found, net = hashlib.sha256(), model.build()
    for own, name in net.stored_names().items():
        shape = net.get_parameter(own).shape
        row = base.read(name, shape, 0, 1)
        found.update(f"{name} {row.dtype} {list(shape)}".encode())
        found.update(row.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256 {found.hexdigest()[:16]}"


def _second_file(model: Model) -> str:
    return f"{model.second.name}.safetensors"


def _owners(net: VelocityNet) -> dict[str, tuple[str, str]]:
    """Say which network each parameter belongs to, and what weight files call it."""
    owners = {
        own: (BASE, net.stored_name(own.replace(".base_layer.", ".")))
        for own, _ in net.named_parameters()
    }
    for own, module in net.named_modules():
        if isinstance(module, LoraLinear):
            for side in ("lora_A", "lora_B"):
                for kind in module.kinds:
                    stored = net.stored_name(f"{own}.{side}.weight")
                    owners[f"{own}.{side}.{kind}.weight"] = kind, stored
        if isinstance(module, Copies):
            for kind, copied in module.of.items():
                for name, _ in copied.named_parameters():
                    owners[f"{own}.of.{kind}.{name}"] = kind, net.stored_name(f"{own}.{name}")
    return owners


def _initial(name: str, shape: torch.Size) -> tuple[str, float]:
    """Start A with the spread of peft's, and B at zero."""
    return ("constant", 0.0) if name.endswith(UP) else ("normal", (3 * shape[1]) ** -0.5)


class AdaptedWeights:
    """Weights of a base and of what is added to it."""

    def __init__(self, base: Weights, added: Weights) -> None:
        self.base, self.added = base, added

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        """Return rows of the named tensor, on the CPU."""
        weights = self.added if name.endswith((DOWN, UP)) else self.base
        return weights.read(name, shape, start, stop)
