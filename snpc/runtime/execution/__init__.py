"""Running models under onnxruntime: sessions, feeds and memory."""
