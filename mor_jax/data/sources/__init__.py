"""Sources of documents: text, JSON lines, parquet, TensorFlow Datasets, Hugging Face, GCS."""
