"""The lab: the method's claims against its rivals. An experiment is data, `experiments/NAME/quick.toml` and `full.toml`."""
