"""A stack of PyTorch's own Transformer encoder layers: [N, length, d_model] floats in and out.

It knows no tokens, positions or masks, only vectors that attend to one another; its layers start
as copies of a single one, because that is how nn.TransformerEncoder makes them.
"""

from torch import nn


def build(
    d_model: int = 256, heads: int = 8, layers: int = 4, feedforward: int = 1024
) -> nn.Module:
    """The encoder, with random weights."""
    # Nothing here is trained, so dropout would only make train and eval mode disagree.
    layer = nn.TransformerEncoderLayer(d_model, heads, feedforward, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers)
