"""Students to ONNX in float32 and int8, and predictions from an export without torch."""
