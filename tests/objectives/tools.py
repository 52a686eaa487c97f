"""The recorded training cases as our objective's batch, draws and networks."""

from typing import Any

import torch
from torch import Tensor, nn

from tests.golden.record import tensor, tensors
from tests.golden.toynet import ConvNet, LoraNet
from twinflow_train.batch import Batch, Condition
from twinflow_train.draws import Draws
from twinflow_train.flow.losses import Distance, l2
from twinflow_train.objectives.roles import Shares
from twinflow_train.objectives.twinflow import TwinFlow


def objective_of(config: dict[str, Any], **changes: Any) -> TwinFlow:
    """Translate a recorded configuration."""
    distance = config["distance"]
    settings: dict[str, Any] = {
        "shares": Shares(**(config["shares"] or {})),
        "order": config["order"],
        "guidance": config["guidance_rho"],
        "guidance_low": config["guidance_window"][0],
        "guidance_high": config["guidance_window"][1],
        "teacher_decay": config["ema_decay"],
        "rectify_weight": config["rectify_weight"]
        if (config["shares"] or {"fake": 1})["fake"]
        else 0.0,
        "consistency_ratio": config["consistency_ratio"],
        "distance": l2() if distance["type"] == "l2" else Distance(alpha=distance["alpha"]),
        "image_free": config["image_free"],
    }
    return TwinFlow(**(settings | changes))


def batch_of(name: str) -> Batch:
    """Return a recorded case's batch."""
    cond = tensor(f"{name}/in/cond")
    return Batch(
        data=tensor(f"{name}/in/data"),
        cond=Condition(tokens=cond[:, None]),
        null=Condition(tokens=tensor(f"{name}/in/null")[:, None]),
        keys=tuple(map(str, range(len(cond)))),
    )


def draws_of(name: str, step: int, objective: TwinFlow, batch: int) -> Draws:
    """Return a recorded step's random draws."""
    recorded = tensors(f"{name}/step{step}/draw/")
    table = objective.table(batch, seed=0, step=0)
    rows = table.slices(torch.arange(batch))
    z = recorded["z"]
    t = recorded["t"].flatten().to(z.dtype)
    t[rows["generator"]] = 1.0
    part = torch.ones_like(t)
    kappa = objective.consistency_ratio
    jumps, near = (
        recorded["tt_u"].flatten() * kappa,
        recorded["tmin_u"].flatten() * min(0.05, kappa),
    )
    part[rows["jump"]] = jumps[rows["jump"]]
    part[rows["local"]] = near[rows["local"]]
    part[rows["fake"]] = 0.0
    r = t - t * part
    fake = torch.zeros(batch, dtype=torch.bool)
    fake[rows["fake"]] = True
    inside = (t > objective.guidance_low) & (t < objective.guidance_high)
    generator = torch.zeros(batch, dtype=torch.bool)
    generator[rows["generator"]] = objective.rectify_weight > 0
    z_fake = recorded.get("z_imgfree", recorded.get("z_adv", z[:0]))
    if objective.image_free:
        z_fake = torch.cat([z_fake[: rows["fake"].start], recorded["z_adv"]])
    needs = {
        "generate": fake | objective.image_free,
        "guide": inside & ~fake & (objective.guidance > 0),
        "recurse": (t - r >= objective.delta) & ~fake & (objective.order > 0),
        "rectify": generator,
    }
    inner = max(1, objective.order)
    return Draws(
        counts=table.counts,
        roles=rows,
        t=t,
        r=r,
        noise=z,
        noise_fake=z_fake,
        noise_rectify=recorded.get("z_dm", z[:0]),
        tau=recorded["t_dm"].flatten().to(z.dtype) if "t_dm" in recorded else t[:0],
        grid=(torch.arange(1, inner, dtype=z.dtype) / inner).expand(batch, -1),
        unconditional=torch.zeros(batch, dtype=torch.bool),
        calls=frozenset(needs),
        **{key: need.nonzero().flatten() for key, need in needs.items()},
    )


class Net(nn.Module):
    """A toy network as a Velocity; `shift` feeds one time, t - r / 2, as the recorded LoRA runs."""

    def __init__(
        self, net: ConvNet, *, shift: bool = False, adapter: str | None = "default"
    ) -> None:
        super().__init__()
        self.net = net
        self.shift = shift
        self.adapter = adapter

    def forward(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Condition) -> Tensor:
        tokens = cond.tokens[:, 0]
        if isinstance(self.net, LoraNet):
            self.net.active = self.adapter
        if self.shift:
            return self.net(x_t, t - r / 2, c=[tokens])
        return self.net(x_t, t, r, c=[tokens])


def conv(weights: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> Net:
    """Build the plain toy network with recorded weights."""
    net = ConvNet(dtype=dtype)
    net.load_state_dict(weights)
    return Net(net)
