"""QAFE-Net: the data, the model, training and scoring."""

from .installation import expect

expect("numpy", "torch")
