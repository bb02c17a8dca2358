"""QAFE-Net: the data, the model, training and scoring."""

import os

# Fresh memory for large tensors comes in pages of 2 MiB instead of 4 KiB: filling one is 5 times faster on a CPU.
# torch looks at this when it makes its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
