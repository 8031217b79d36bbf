"""LoRA, rsLoRA and DoRA on any network: which layers (lora.py), what an adapted one computes (layer.py), and the files
of PEFT, diffusers and kohya (formats.py).

May import `run` and `weights`; must not know any network or system.
"""
