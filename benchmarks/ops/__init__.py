"""Operations against eager code, torch.compile, peer libraries, the machine's limits (`python -m benchmarks.ops`)."""
