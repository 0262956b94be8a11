"""The benchmark suite: cases beside a peer and the machine's own ceilings, measured in turn; see tools/benchmark.py."""
