"""Real diffusers classes at tiny size, with random weights, built without a download."""

from __future__ import annotations

import functools
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch


def seeded(build):
    """Give a builder weights of its own seed, whatever ran before, and leave the global seed."""

    @functools.wraps(build)
    def made(*args: Any, **kwargs: Any):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            out = build(*args, **kwargs)
            wake(out)
        return out

    return made


@torch.no_grad()
def wake(thing: Any) -> None:
    """Replace weights that are zero from the start (gates, last layers): zero hides mistakes."""
    models = thing.components.values() if hasattr(thing, "components") else [thing]
    for model in models:
        if isinstance(model, torch.nn.Module):
            for p in model.parameters():
                if p.numel() > 1 and not p.any():
                    p.normal_(0, 0.05)
            model.eval()


@seeded
def tiny_unet(**kwargs: Any):
    """UNet2DModel: 3 channels, 16 x 16, two levels, attention in one."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        **{
            "sample_size": 16,
            "in_channels": 3,
            "out_channels": 3,
            "layers_per_block": 1,
            "block_out_channels": (16, 32),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
            "norm_num_groups": 8,
            **kwargs,
        }
    )


@seeded
def tiny_unet_cond(**kwargs: Any):
    """UNet2DConditionModel in the SD block layout: 4 channels, 8 x 8, cross-attention width 32."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 1,
            "block_out_channels": (16, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
            **kwargs,
        }
    )


@seeded
def tiny_dit(**kwargs: Any):
    """DiTTransformer2DModel: 3 blocks of width 32, 10 classes, 8 x 8 latents."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "sample_size": 8,
            "patch_size": 2,
            "num_embeds_ada_norm": 10,
            **kwargs,
        }
    )


@seeded
def tiny_pixart(**kwargs: Any):
    """PixArtTransformer2DModel: 3 blocks of width 32, captions of width 16, 8 x 8 latents."""
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 3,
            "sample_size": 8,
            "patch_size": 2,
            "cross_attention_dim": 32,
            "caption_channels": 16,
            "use_additional_conditions": False,
            **kwargs,
        }
    )


def tiny_vae(**kwargs: Any):
    """AutoencoderKL of factor 2: (B, 3, 16, 16) to (B, 4, 8, 8)."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        **{
            "block_out_channels": (8, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "sample_size": 16,
            "mid_block_add_attention": False,
            **kwargs,
        }
    )


@functools.cache
def _words() -> Path:
    """Write a letter-level CLIP vocabulary and return its folder."""
    import json

    folder = Path(mkdtemp(prefix="effuse-tiny-"))
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    listed = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(listed)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def tiny_tokenizer():
    """CLIPTokenizer over single letters, 12 tokens at most."""
    from transformers import CLIPTokenizer

    folder = _words()
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12
    )


def tiny_text(projection: int | None = None):
    """CLIPTextModel of width 32, or with a projection of the given width."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
        projection_dim=projection or 32,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


@seeded
def tiny_sd(scheduler: Any = None, **unet: Any):
    """StableDiffusionPipeline: 16 x 16 pictures, 8 x 8 latents, no safety checker."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text(),
        tokenizer=tiny_tokenizer(),
        unet=tiny_unet_cond(**unet),
        scheduler=scheduler
        or DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@seeded
def tiny_ddpm(scheduler: Any = None, **unet: Any):
    """DDPMPipeline: 16 x 16 pixels."""
    from diffusers import DDPMPipeline, DDPMScheduler

    pipe = DDPMPipeline(tiny_unet(**unet), scheduler or DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@seeded
def tiny_dit_pipe(scheduler: Any = None, **dit: Any):
    """DiTPipeline: 10 classes (diffusers' null class is 1000, so the table has 1,000)."""
    from diffusers import DDIMScheduler, DiTPipeline

    pipe = DiTPipeline(
        tiny_dit(**{"num_embeds_ada_norm": 1000, **dit}),
        tiny_vae(),
        scheduler or DDIMScheduler(clip_sample=False),
        id2label={str(i): f"class {i}" for i in range(10)},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def _fast_tokenizer_file() -> Path:
    """Write a letter-level tokenizer of the kind T5 uses (pad 0, end 1) and return its file."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    listed = ["<pad>", "</s>", "<unk>", *(chr(c) for c in range(ord("a"), ord("z") + 1))]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(listed)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    file = Path(mkdtemp(prefix="effuse-tiny-")) / "tokenizer.json"
    words.save(str(file))
    return file


def tiny_t5_tokenizer():
    """A fast tokenizer over single letters that ends and pads as T5's."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(_fast_tokenizer_file()),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=16,
    )


def tiny_t5(width: int = 32):
    """T5EncoderModel of the given width."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=32, d_model=width, d_ff=37, d_kv=8, num_heads=4, num_layers=2)
    )


@seeded
def tiny_sdxl(scheduler: Any = None, **unet: Any):
    """StableDiffusionXLPipeline: 16 x 16 pictures, two text encoders, added conditions."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
        "cross_attention_dim": 64,
        "use_linear_projection": True,
    }
    pipe = StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text(),
        text_encoder_2=tiny_text(32),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=tiny_unet_cond(**{**added, **unet}),
        scheduler=scheduler
        or EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@seeded
def tiny_pixart_pipe(scheduler: Any = None, sigma: bool = False, **transformer: Any):
    """PixArtAlphaPipeline, or PixArtSigmaPipeline: 16 x 16 pictures, learned variance."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline

    pipe = (PixArtSigmaPipeline if sigma else PixArtAlphaPipeline)(
        tokenizer=tiny_t5_tokenizer(),
        text_encoder=tiny_t5(16),
        vae=tiny_vae(),
        transformer=tiny_pixart(**transformer),
        scheduler=scheduler or DPMSolverMultistepScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@seeded
def tiny_sd3(scheduler: Any = None, **transformer: Any):
    """StableDiffusion3Pipeline: 16 x 16 pictures, three text encoders, shift 3."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    network = SD3Transformer2DModel(
        **{
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 64,
            "pos_embed_max_size": 8,
            **transformer,
        }
    )
    pipe = StableDiffusion3Pipeline(
        transformer=network,
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=tiny_text(32),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=tiny_text(32),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=tiny_t5(),
        tokenizer_3=tiny_t5_tokenizer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@seeded
def tiny_flux(scheduler: Any = None, **transformer: Any):
    """FluxPipeline: give it height and width 16; dynamic shifting, guidance embedded."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    network = FluxTransformer2DModel(
        **{
            "patch_size": 1,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 4, 8),
            "guidance_embeds": True,
            **transformer,
        }
    )
    pipe = FluxPipeline(
        scheduler=scheduler
        or FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=tiny_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=tiny_text(),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=tiny_t5(),
        tokenizer_2=tiny_t5_tokenizer(),
        transformer=network,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
