"""The decoder as portable ONNX: graphs, weights beside them, and how to drive and compile them."""
