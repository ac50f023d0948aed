"""From dataset addresses to packed token ids: download, formats, dataset, tokenize, batching."""
