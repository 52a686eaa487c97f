"""Variants of the objective, as options of the `objective` group: published ones, and ours."""

from twinflow_train.flow.losses import l2
from twinflow_train.objectives.roles import Shares
from twinflow_train.objectives.twinflow import TwinFlow


def flow_matching() -> TwinFlow:
    """Plain flow matching: makes or continues a multi-step base model."""
    return TwinFlow(
        shares=Shares(generator=0, jump=0, fake=0),
        order=0,
        guidance=0.0,
        consistency_ratio=0.0,
        rectify_weight=0.0,
    )


def rcgm() -> TwinFlow:
    """Recursive consistency alone, no adversary: generator, local and jump rows."""
    return TwinFlow(shares=Shares(fake=0), rectify_weight=0.0)


def rcgm_pure() -> TwinFlow:
    """Recursive consistency on jump rows only."""
    return TwinFlow(shares=Shares(generator=0, local=0, fake=0), rectify_weight=0.0)


def twinflow_paper() -> TwinFlow:
    """The paper's text: a third of the batch adversarial, random recursion times, squared error."""
    return TwinFlow(
        shares=Shares(generator=1, local=0, jump=4, fake=1),
        random_grid=True,
        rectify_weight=1.0,
        distance=l2(),
        time_weight=False,
        separate_means=True,
    )


def twinflow_wide() -> TwinFlow:
    """The reference with a delta ten times as wide: quieter targets, a little bias."""
    return TwinFlow(delta=0.1)


def twinflow_scratch() -> TwinFlow:
    """Training from random weights: squared error, wide delta, less guidance, more local rows."""
    return TwinFlow(shares=Shares(local=2), delta=0.1, guidance=0.5, distance=l2())


def twinflow_lora_order1() -> TwinFlow:
    """First-order LoRA training: direct rows, guidance 4 from the frozen base."""
    return TwinFlow(shares=Shares(jump=0, direct=1), order=1, guidance=4.0, teacher_decay=1.0)


def twinflow_image_free() -> TwinFlow:
    """Training on the network's own samples, guided by the frozen base."""
    return TwinFlow(image_free=True, guidance=4.0, teacher_decay=1.0)
