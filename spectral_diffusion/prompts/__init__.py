"""Prompts: the tokens, weights and parts in them, and what the UNet is given of them."""
