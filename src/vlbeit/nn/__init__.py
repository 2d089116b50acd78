"""The MoME Transformer: embeddings, attention, experts, backbone, heads."""
