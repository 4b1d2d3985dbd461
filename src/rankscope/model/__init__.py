"""The frozen base model: loading, checks, device, quantization."""
