"""Hunyuan-DiT in small, with the stages that make what is published: an autoencoder, then a transformer and the readers
of its texts together. All its parts learn the toy world from nothing.
"""

from nanomed.systems.hunyuan import OPTIONS, Hunyuan

__all__ = ["OPTIONS", "PRESETS", "RECIPES", "Hunyuan"]

PRESETS = {
    "hunyuan-tiny": dict(
        transformer=dict(num_attention_heads=4, attention_head_dim=32, num_layers=4, sample_size=8, patch_size=1,
                         text_len=48, text_len_t5=32, cross_attention_dim=64, cross_attention_dim_t5=64),
        text_encoder=dict(vocab_size=400, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                          intermediate_size=128),
        text_encoder_2=dict(vocab_size=512, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4),
        vae=dict(block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8), steps=25, guidance=3.0,
    ),
}  # fmt: skip
RECIPES = {
    "hunyuan-tiny": {
        "": dict(data="toy:2000", augment=False, views=1, schedule="cosine"),
        "vae": dict(steps=900, lr=3e-3, warmup=20, ema=0.0, save_every=450),
        "base": dict(steps=1500, lr=2e-3, warmup=50, ema=0.99, dropout=0.1, places=0.3, places_first=300),
        "transformer": dict(steps=100, batch=8, lr=3e-4, ema=0.0, rank=8, save_every=100),
    },
}
