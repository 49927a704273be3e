"""A stack of Transformer encoder layers of PyTorch: [N, length, d_model] floats in and out.

Without tokens, positions and masks. All layers have equal initial weights, because
nn.TransformerEncoder copies the layer it is given.
"""

from torch import nn


def build(
    d_model: int = 256, heads: int = 8, layers: int = 4, feedforward: int = 1024
) -> nn.Module:
    """Return the encoder with random weights."""
    # The model is not trained, and dropout would make train and eval mode differ.
    layer = nn.TransformerEncoderLayer(d_model, heads, feedforward, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers)
