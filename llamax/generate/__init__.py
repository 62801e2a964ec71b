"""Text from a trained model: sampling, the decoding engine, streams."""
