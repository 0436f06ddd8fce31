"""Train image models on clusters: one Hydra config, exact data, runs that survive."""

__version__ = "0.1.0"
