"""What the house networks are: stock diffusers and transformers classes, small."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKL,
        DiTTransformer2DModel,
        UNet2DConditionModel,
        UNet2DModel,
    )
    from transformers import CLIPModel

    from effuse.processes import MeanReverting

LATENT = 16
"""Side of a latent: the autoencoder's factor is 4."""

WORDS = 24
"""Longest caption in tokens, with both ends."""

TEXT_WIDTH = 192
"""Width of the text states, which the UNet attends to."""


def autoencoder() -> AutoencoderKL:
    """Return the untrained autoencoder: (B, 3, 64, 64) in [-1, 1] to (B, 4, 16, 16), 1.45M."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def clip(words: int, eos: int) -> CLIPModel:
    """Return the untrained image-text model, 4.5M.

    Args:
        words: size of the vocabulary.
        eos: number of the token that ends a caption.
    """
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    text = CLIPTextConfig(
        vocab_size=words,
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=128,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=WORDS,
        hidden_act="gelu",
        bos_token_id=eos - 1,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        projection_dim=128,
        num_hidden_layers=5,
        num_attention_heads=6,
        image_size=64,
        patch_size=8,
        hidden_act="gelu",
    )
    return CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128)
    )


def tokenizer(captions: list[str], folder: str, size: int = 2400) -> Any:
    """Train a `CLIPTokenizer` (byte-pair encoding, ends of words marked) on captions.

    Args:
        captions: what to learn from.
        folder: where its files go.
        size: of the vocabulary.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    marks = ["<|startoftext|>", "<|endoftext|>"]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=marks[1]))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789")
    alphabet = [*letters, *(a + "</w>" for a in letters)]
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2,
        end_of_word_suffix="</w>",
        initial_alphabet=letters,
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    import json

    state = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"]]
    words = [w for w, _ in sorted(state["vocab"].items(), key=lambda item: item[1])]
    words = list(dict.fromkeys([*alphabet, *words]))
    vocab = {w: i for i, w in enumerate([*words, *marks])}
    made = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=WORDS)
    made.save_pretrained(folder)
    return made


def unet() -> UNet2DConditionModel:
    """Return the untrained text-conditioned UNet, SD's block layout, on (B, 4, 16, 16)."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 128, 192),
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 4, 6),
        norm_num_groups=16,
    )


def dit() -> DiTTransformer2DModel:
    """Return the untrained class-conditioned transformer, patches of 2 on (B, 4, 16, 16).

    `DiTPipeline` takes 1000 as the number of "no class", hence the size of the class table.
    """
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=7,
        sample_size=LATENT,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )


def pixels() -> UNet2DModel:
    """Return the untrained unconditional UNet on (B, 3, 32, 32)."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=16,
    )


def restorer() -> UNet2DModel:
    """Return the untrained UNet of house:restore: x - mu and mu, (B, 6, 64, 64), to (B, 3, 64, 64).

    No attention: damage is local, and it runs on pictures of any size divisible by 4.
    """
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=64,
        in_channels=6,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(24, 48, 56),
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        add_attention=False,
        norm_num_groups=8,
    )


def restoring() -> MeanReverting:
    """Return the process of house:restore: as published, on pictures in [0, 1]."""
    from effuse.processes import MeanReverting

    return MeanReverting()


def lean_attention(model: Any) -> None:
    """Let a diffusers model attend by plain products: on a CPU the backward pass is far faster.

    Same result as the stock processor to rounding; nothing of it is saved with the model.
    """
    from diffusers.models.attention_processor import Attention

    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(_Plain())


class _Plain:
    def __call__(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        temb: Any = None,
        **_: Any,
    ) -> Any:
        x, shape = hidden_states, hidden_states.shape
        if x.ndim == 4:
            x = x.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        context = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            f(y).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for f, y in ((attn.to_q, x), (attn.to_k, context), (attn.to_v, context))
        )
        score = ((q * attn.scale) @ k.transpose(-1, -2)).softmax(-1, dtype=q.dtype)
        out = attn.to_out[0]((score @ v).transpose(1, 2).flatten(2))
        if len(shape) == 4:
            out = out.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor


def scheduler() -> Any:
    """Return the house's scheduler: DDIM, linear noise, v-prediction, trailing steps."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def pixel_scheduler() -> Any:
    """Return the scheduler of house:pixels: DDPM as published, linear noise, epsilon."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", prediction_type="epsilon"
    )
