"""A small `AutoencoderKL` as Stable Diffusion 3.5 and Z-Image have it: eightfold, shifted."""

from __future__ import annotations

from diffusers import AutoencoderKL


def shifted(*, shift: float, scale: float) -> AutoencoderKL:
    """Build it with random values."""
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=shift,
        scaling_factor=scale,
    )
