"""nnU-Net, self-configuring and federated on NVIDIA FLARE."""

__version__ = "0.1.0"
