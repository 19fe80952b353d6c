"""Networks to ONNX files, in float and int8. May import: networks, data, runtime, bundle, common."""
