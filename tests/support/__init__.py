"""What several tests share: small models, tokenizers of every kind, run directories and a reader of the pages."""
