"""What the trainer reaches: scores on public sets, what CutMix adds, calibration, speed of input, and memory."""
