"""Inference: answers with the approved champion, and takes corrections. Runs on ONNX Runtime, without torch."""
