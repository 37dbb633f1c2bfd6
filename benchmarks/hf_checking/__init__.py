"""Parts of benchmarks/hf_versions.py."""
