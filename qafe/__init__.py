"""QAFE-Net: the data, the model, training and scoring."""
