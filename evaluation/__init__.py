"""What can be measured of a trained model: losses, benchmarks, behaviour, probes, decoding."""
